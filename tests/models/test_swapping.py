"""initlab.swap(): what goes to the stream inside it, what does not, and that nothing of it stays behind."""

import copy
import doctest
import functools
import inspect
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from initlab import init, init_model_, swap
from initlab.models import patches, swapping

THEIRS = torch.nn.init
BEFORE = dict(vars(THEIRS))  # captured before any swap(), as a library captures at import

RANDOM: dict[str, dict[str, Any]] = {
    "uniform_": {"a": -1.5, "b": 0.25},
    "normal_": {"mean": 0.5, "std": 2.0},
    "trunc_normal_": {"mean": 0.25, "std": 1.5, "a": -2.0, "b": 1.0},
    "xavier_uniform_": {"gain": 0.7},
    "xavier_normal_": {"gain": 0.7},
    "kaiming_uniform_": {"a": 0.1, "mode": "fan_out"},
    "kaiming_normal_": {"nonlinearity": "relu"},
    "orthogonal_": {"gain": 0.7},
    "sparse_": {"sparsity": 0.3},
}
CONSTANT: dict[str, dict[str, Any]] = {"constant_": {"val": 0.3}, "ones_": {}, "zeros_": {}, "eye_": {}, "dirac_": {}}
EVERY = RANDOM | CONSTANT
ALIASES = {name for name in THEIRS.__all__ if not name.endswith("_")} - {"calculate_gain"}
REPLACED = ("_no_grad_trunc_normal_", "eye_", "dirac_", "orthogonal_", "sparse_")  # in their order there
STEERED = sorted(set(RANDOM) - {"sparse_"})  # torch's sparse_ takes its places from the default generator
METHODS = ("normal_", "uniform_")

every_random = pytest.mark.parametrize("name", RANDOM)
every_method = pytest.mark.parametrize("name", METHODS)

E = torch.empty


def patchable() -> dict[tuple[str, str], Any]:
    """Everything that a swap() could have left changed, by module and name."""
    found = {("torch.nn.init", name): value for name, value in vars(THEIRS).items()}
    found |= {("Tensor", name): getattr(Tensor, name) for name in METHODS}
    for module in [m for m in sys.modules if m.startswith("torch.nn.modules.")]:
        names = [name for name in THEIRS.__all__ if name in vars(sys.modules[module])]
        found |= {(module, name): getattr(sys.modules[module], name) for name in names}
    if (hugging := sys.modules.get("transformers.initialization")) is not None:
        found |= {("transformers.initialization", name): value for name, value in vars(hugging).items()}
        found |= {("TORCH_INIT_FUNCTIONS", name): value for name, value in hugging.TORCH_INIT_FUNCTIONS.items()}
    return found


def modes() -> list[Any]:
    return torch.overrides._get_current_function_mode_stack()


@pytest.fixture(scope="module", autouse=True)
def one_thread_of_torch() -> Iterator[None]:
    """On a busy machine torch's threads spin, and a small matrix takes a tenth of a second to factorise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Around every test: afterwards each patchable thing is the identical object, and no mode is left."""
    before, modes_before = patchable(), modes()
    yield
    after, modes_after = patchable(), modes()
    leaked = [key for key in before if after.get(key) is not before[key]]
    if leaked or modes_after != modes_before:
        clean_up(before)
    assert leaked == []
    assert modes_after == modes_before


def clean_up(before: dict[tuple[str, str], Any]) -> None:
    """So that one leak fails one test."""
    for name in BEFORE:
        setattr(THEIRS, name, before["torch.nn.init", name])
    while modes():
        torch.overrides._pop_mode()
    patches._thread.__dict__.clear()
    patches.INIT_PATCHES.__init__()


@pytest.fixture(name="threads")
def pool_of_threads() -> Iterator[Callable[[], Callable[..., Any]]]:
    """Each call makes another thread: a function that runs a function in it and returns what that returns."""
    with ExitStack() as stack:

        def thread() -> Callable[..., Any]:
            pool = stack.enter_context(ThreadPoolExecutor(1))
            return lambda function, *args: pool.submit(function, *args).result(timeout=60)

        yield thread


class Sampling(TorchDispatchMode):
    """Notes the names of the random operations that torch itself runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def shape_for(name: str) -> tuple[int, ...]:
    return (7, 5, 3) if name.startswith("dirac") else (63, 37)


def filled(function: Callable[..., Tensor], name: str, seed: int = 5, **changed: Any) -> Tensor:
    """What a function gives a new tensor, with the arguments of its name and a generator of its own if it draws."""
    if name in RANDOM:
        changed = {"generator": torch.Generator().manual_seed(seed)} | changed
    return function(torch.full(shape_for(name), math.nan), **EVERY[name] | changed)


def ours(name: str, seed: int = 5) -> Tensor:
    return filled(getattr(init, name), name, seed)


def torchs(name: str, seed: int = 5) -> Tensor:
    return filled(BEFORE[name], name, seed)


def seeded(call: Callable[[], Any], seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return call()


def swapped(call: Callable[[], Any], seed: int = 3) -> Any:
    with swap():
        return seeded(call, seed)


# ---------------------------------------------------------------------------------------------------------------
# The functions of torch.nn.init


def test_every_public_function_is_covered() -> None:
    assert set(THEIRS.__all__) == set(EVERY) | ALIASES | {"calculate_gain"}


@pytest.mark.parametrize("name", EVERY)
def test_function_of_torch_nn_init(name: str) -> None:
    expected = seeded(lambda: getattr(init, name)(E(shape_for(name)), **EVERY[name]))
    state = torch.get_rng_state()
    with swap():
        torch.manual_seed(3)
        tensor = torch.full(shape_for(name), math.nan)
        assert getattr(THEIRS, name)(tensor, **EVERY[name]) is tensor
    assert torch.equal(tensor, expected)
    assert torch.equal(torch.get_rng_state(), state)  # one key, and nothing else, was drawn


@every_random
def test_generator_of_torch_nn_init(name: str) -> None:
    before = torch.get_rng_state()
    with swap():
        got = filled(getattr(THEIRS, name), name)
    assert torch.equal(got, ours(name))
    assert torch.equal(torch.get_rng_state(), before)


@every_random
def test_torch_has_its_own_values_before_and_after(name: str) -> None:
    before = seeded(lambda: getattr(THEIRS, name)(E(63, 37), **RANDOM[name]))
    inside = swapped(lambda: getattr(THEIRS, name)(E(63, 37), **RANDOM[name]))
    assert not torch.equal(before, inside)
    assert torch.equal(before, seeded(lambda: getattr(THEIRS, name)(E(63, 37), **RANDOM[name])))


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"sparse_"}))
def test_function_captured_before(name: str) -> None:
    with swap():
        got = filled(BEFORE[name], name)
    assert torch.equal(got, ours(name))


@pytest.mark.parametrize("name", ["sparse_", "sparse"])
@pytest.mark.filterwarnings("ignore:`nn.init.sparse` is now deprecated:FutureWarning")
def test_sparse_captured_before_takes_its_places_from_torch(name: str) -> None:
    expected = seeded(lambda: init.normal_(E(63, 37), std=0.2))
    for column in range(37):
        expected[torch.randperm(63)[:19], column] = 0.0
    assert torch.equal(swapped(lambda: BEFORE[name](E(63, 37), 0.3, std=0.2)), expected)


@pytest.mark.parametrize("name", sorted(ALIASES - {"sparse"}))
@pytest.mark.parametrize("captured", [False, True], ids=["attribute", "captured"])
def test_alias_warns_and_goes_through(name: str, captured: bool) -> None:
    with swap(), pytest.warns(FutureWarning, match=f"`nn.init.{name}` is now deprecated") as caught:
        got = filled((BEFORE if captured else vars(THEIRS))[name], name + "_")
    assert [w.filename for w in caught] == [__file__]
    assert torch.equal(got, ours(name + "_"))


@every_random
def test_function_captured_inside(name: str) -> None:
    # A module that is first imported inside a swap() keeps what it finds there: it must serve ever after.
    with swap():
        captured = getattr(THEIRS, name)
    expected = seeded(lambda: torchs(name))
    assert torch.equal(seeded(lambda: filled(captured, name)), expected)
    with swap():
        assert torch.equal(filled(captured, name), ours(name))
    assert inspect.signature(captured) == inspect.signature(BEFORE[name])
    assert captured.__name__ == name


@every_random
def test_parameters_stay_leaves(name: str) -> None:
    parameter = nn.Parameter(torch.zeros(63, 37))
    with swap():
        getattr(THEIRS, name)(parameter, **RANDOM[name])
    assert parameter.is_leaf
    assert parameter.grad_fn is None
    (parameter * 3.0).sum().backward()
    assert parameter.grad is not None
    assert (parameter.grad == 3.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_random
def test_function_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    def fill(module: Any) -> Tensor:
        return getattr(module, name)(E(63, 37, dtype=dtype), **RANDOM[name])

    assert torch.equal(swapped(lambda: fill(THEIRS)), seeded(lambda: fill(init)))


@pytest.mark.parametrize("name", sorted(set(RANDOM) - {"trunc_normal_"}))
def test_function_of_complex_tensors(name: str) -> None:
    def fill(module: Any) -> Tensor:
        return getattr(module, name)(E(63, 37, dtype=torch.complex64), **RANDOM[name])

    assert torch.equal(swapped(lambda: fill(THEIRS)), seeded(lambda: fill(init)))


def test_errors_of_initlab_come_through() -> None:
    with swap():
        with pytest.raises(ValueError, match="std"):
            THEIRS.trunc_normal_(E(3), std=0.0)
        with pytest.raises(ValueError, match="2 or more dimensions"):
            THEIRS.orthogonal_(E(3))


def test_truncation_warning_is_initlabs() -> None:
    with swap(), pytest.warns(UserWarning, match="crowds at the nearer bound"):
        THEIRS.trunc_normal_(E(3), a=5.0, b=6.0)


@pytest.mark.usefixtures("backend")
def test_initlabs_own_functions_are_as_ever() -> None:
    for name in EVERY:
        with swap():
            got = filled(getattr(init, name), name)
        assert torch.equal(got, ours(name))


# ---------------------------------------------------------------------------------------------------------------
# Tensor.normal_ and Tensor.uniform_

ARGUMENTS: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[float, float]]] = [
    ("normal_", (), {}, (0.0, 1.0)),
    ("normal_", (0.5,), {}, (0.5, 1.0)),
    ("normal_", (0.5, 2.0), {}, (0.5, 2.0)),
    ("normal_", (0.5,), {"std": 2.0}, (0.5, 2.0)),
    ("normal_", (), {"std": 2.0}, (0.0, 2.0)),
    ("normal_", (), {"std": 2, "mean": 1}, (1.0, 2.0)),
    ("normal_", (torch.tensor(0.5), torch.tensor(2.0)), {}, (0.5, 2.0)),
    ("uniform_", (), {}, (0.0, 1.0)),
    ("uniform_", (-1.5,), {}, (-1.5, 1.0)),
    ("uniform_", (-1.5, 0.25), {}, (-1.5, 0.25)),
    ("uniform_", (-1.5,), {"to": 0.25}, (-1.5, 0.25)),
    ("uniform_", (), {"to": 0.25}, (0.0, 0.25)),
    ("uniform_", (), {"from": -1.5}, (-1.5, 1.0)),
    ("uniform_", (), {"to": 2, "from": -1}, (-1.0, 2.0)),
    ("uniform_", (torch.tensor(-1.5), torch.tensor(0.25)), {}, (-1.5, 0.25)),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "parameters"), ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_method(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: tuple[float, float], dtype: torch.dtype
) -> None:
    expected = seeded(lambda: getattr(init, name)(E(63, 37, dtype=dtype), *parameters))
    state = torch.get_rng_state()
    with swap():
        torch.manual_seed(3)
        tensor = E(63, 37, dtype=dtype)
        assert getattr(tensor, name)(*args, **kwargs) is tensor
        assert torch.equal(torch.get_rng_state(), state)
        generator = torch.Generator().manual_seed(3)
        steered = getattr(E(63, 37, dtype=dtype), name)(*args, **kwargs, generator=generator)
        assert torch.equal(torch.get_rng_state(), state)  # a generator leaves the default one alone
        unbound = getattr(Tensor, name)(
            E(63, 37, dtype=dtype), *args, **kwargs, generator=torch.Generator().manual_seed(3)
        )
    for got in (tensor, steered, unbound):
        assert torch.equal(got, expected)


PLACES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {  # a tensor with a base that must show the values
    "data": lambda: (lambda p: (p.data, p))(nn.Parameter(torch.zeros(63, 37))),
    "detached": lambda: (lambda p: (p.detach(), p))(nn.Parameter(torch.zeros(63, 37))),
    "transposed": lambda: (lambda b: (b.t(), b.t()))(torch.zeros(37, 63)),
    "strided": lambda: (lambda b: (b[3:129:2, 1:75:2], b[3:129:2, 1:75:2]))(torch.zeros(130, 80)),
    "viewed": lambda: (lambda b: (b.view(63, 37), b.view(63, 37)))(torch.zeros(63 * 37)),
}


@every_method
@pytest.mark.parametrize("place", PLACES)
def test_method_in_place(name: str, place: str) -> None:
    tensor, shows = PLACES[place]()
    version = tensor._version
    swapped(lambda: getattr(tensor, name)())
    assert torch.equal(shows, seeded(lambda: getattr(init, name)(E(63, 37))))
    assert tensor._version > version or place == "data"


def test_only_the_view_is_written() -> None:
    whole = torch.full((130, 80), math.nan)
    swapped(lambda: whole[3:129:2, 1:75:2].normal_())
    assert whole.isfinite().sum() == 63 * 37


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_normal_goes_to_initlab(dtype: torch.dtype) -> None:
    expected = seeded(lambda: init.normal_(E(9, 7, dtype=dtype), 0.5, 2.0))
    assert torch.equal(swapped(lambda: E(9, 7, dtype=dtype).normal_(0.5, 2.0)), expected)


def test_complex_uniform() -> None:
    expected = seeded(lambda: init.uniform_(E(9, 7, dtype=torch.complex64), -1.0, 2.0))
    assert torch.equal(swapped(lambda: E(9, 7, dtype=torch.complex64).uniform_(-1.0, 2.0)), expected)


REFUSED: dict[str, Callable[[], object]] = {
    "normal_ int32": lambda: E(3, dtype=torch.int32).normal_(),
    "normal_ bool": lambda: E(3, dtype=torch.bool).normal_(),
    "normal_ float8": lambda: E(3, dtype=torch.float8_e5m2).normal_(),
    "normal_ std < 0": lambda: E(3).normal_(0.0, -1.0),
    "normal_ std nan": lambda: E(3).normal_(0.0, math.nan),
    "normal_ str": lambda: E(3).normal_("a"),
    "normal_ None": lambda: E(3).normal_(mean=None),
    "normal_ complex mean": lambda: E(3, dtype=torch.complex64).normal_(1j),
    "normal_ three": lambda: E(3).normal_(0.0, 1.0, torch.Generator()),
    "normal_ keyword": lambda: E(3).normal_(loc=0.0),
    "normal_ generator": lambda: E(3).normal_(generator=3),
    "normal_ expanded": lambda: E(1).expand(4).normal_(),
    "normal_ uninitialised": lambda: UninitializedParameter().normal_(),
    "uniform_ int64": lambda: E(3, dtype=torch.int64).uniform_(),
    "uniform_ float8": lambda: E(3, dtype=torch.float8_e4m3fn).uniform_(),
    "uniform_ from > to": lambda: E(3).uniform_(2.0, 1.0),
    "uniform_ inf": lambda: E(3).uniform_(0.0, math.inf),
    "uniform_ three": lambda: E(3).uniform_(0.0, 1.0, 2.0),
    "uniform_ twice": lambda: E(3).uniform_(0.0, **{"from": 1.0}),
    "uniform_ names of nn.init": lambda: E(3).uniform_(a=0.0, b=2.0),
}


@pytest.mark.parametrize("call", [pytest.param(call, id=label) for label, call in REFUSED.items()])
def test_refused_as_torch_refuses(call: Callable[[], object]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        call()
    with swap(), pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    assert caught.type is theirs.type


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
@every_method
def test_integers_are_left_to_torch(name: str, dtype: torch.dtype) -> None:
    with swap(), pytest.raises(NotImplementedError, match=r"normal_kernel_cpu|check_uniform_bounds"):
        getattr(E(3, dtype=dtype), name)()


UNTOUCHED: dict[str, Callable[[], Tensor]] = {
    "random_": lambda: E(99).random_(),
    "random_ of int64": lambda: E(99, dtype=torch.int64).random_(7),
    "bernoulli_": lambda: E(99).bernoulli_(),
    "exponential_": lambda: E(99).exponential_(),
    "cauchy_": lambda: E(99).cauchy_(),
    "geometric_": lambda: E(99).geometric_(0.3),
    "log_normal_": lambda: E(99).log_normal_(),
    "randn": lambda: torch.randn(99),
    "randn out": lambda: torch.randn(99, out=E(99)),
    "randn_like": lambda: torch.randn_like(E(99)),
    "rand": lambda: torch.rand(99),
    "rand_like": lambda: torch.rand_like(E(99)),
    "normal": lambda: torch.normal(0.5, 2.0, (99,)),
    "normal out": lambda: torch.normal(torch.zeros(99), 2.0, out=E(99)),
    "randperm": lambda: torch.randperm(99),
    "multinomial": lambda: torch.multinomial(torch.ones(99), 9),
    "dropout": lambda: nn.functional.dropout(torch.ones(99)),
    "distribution": lambda: torch.distributions.Normal(0.0, 1.0).sample((99,)),
    "parameter": lambda: nn.Parameter(torch.randn(99)).detach(),
}


@pytest.mark.parametrize("call", [pytest.param(call, id=label) for label, call in UNTOUCHED.items()])
def test_not_swapped(call: Callable[[], Tensor]) -> None:
    assert torch.equal(swapped(call), seeded(call))


# ---------------------------------------------------------------------------------------------------------------
# Autograd sees the methods as it sees torch's


@every_method
@pytest.mark.parametrize("view", [False, True], ids=["leaf", "view"])
def test_method_of_a_leaf_raises_torchs_error(name: str, view: bool) -> None:
    leaf = torch.ones(4, requires_grad=True)

    def fill() -> None:
        getattr(leaf[1:] if view else leaf, name)()

    with pytest.raises(RuntimeError) as theirs:
        fill()
    before, version = torch.get_rng_state(), leaf._version
    with swap(), pytest.raises(RuntimeError) as caught:
        fill()
    assert str(caught.value) == str(theirs.value)
    assert (leaf == 1.0).all()
    assert leaf._version == version
    assert torch.equal(torch.get_rng_state(), before)


@every_method
def test_nothing_flows_back_through_a_method(name: str) -> None:
    leaf = torch.ones(4, requires_grad=True)
    tensor, part = leaf * 2.0, leaf * 2.0
    with swap():
        got = getattr(tensor, name)(generator=torch.Generator().manual_seed(5))
        getattr(part[1:], name)()
    assert got is tensor
    assert torch.equal(tensor, getattr(init, name)(E(4), generator=torch.Generator().manual_seed(5)))
    tensor.sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad == 0.0).all()
    part.sum().backward()
    assert leaf.grad.tolist() == [2.0, 0.0, 0.0, 0.0]


@every_method
def test_overwriting_what_backward_needs_raises(name: str) -> None:
    tensor = torch.ones(4, requires_grad=True) * 2.0
    square = tensor * tensor
    with swap():
        getattr(tensor, name)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@every_method
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_method_without_grad_mode_fills(name: str, guard: Callable[[], Any]) -> None:
    leaf = torch.ones(63, 37, requires_grad=True)
    with guard():
        swapped(lambda: getattr(leaf, name)())
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert torch.equal(leaf, seeded(lambda: getattr(init, name)(E(63, 37))))


@pytest.mark.parametrize(("name", "args"), [("normal_", (0.0, -1.0)), ("uniform_", (2.0, 1.0))])
def test_refused_method_writes_nothing(name: str, args: tuple[float, float]) -> None:
    leaf = torch.ones(4, requires_grad=True)
    tensor = leaf * 2.0
    with swap(), pytest.raises(RuntimeError):
        getattr(tensor, name)(*args)
    assert (tensor == 2.0).all()
    tensor.sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad == 2.0).all()


@every_method
def test_transformed_tensor_is_refused(name: str) -> None:
    with swap(), pytest.raises(NotImplementedError, match=r"torch\.func transform"):
        torch.vmap(lambda x: getattr(x, name)(), randomness="different")(torch.ones(2, 3))


# ---------------------------------------------------------------------------------------------------------------
# Modules

MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(13, 7),
    "Bilinear": lambda: nn.Bilinear(3, 4, 5),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(3, 4, 2),
    "BatchNorm2d": lambda: nn.BatchNorm2d(6),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "Embedding": lambda: nn.Embedding(11, 5, padding_idx=2),
    "EmbeddingBag": lambda: nn.EmbeddingBag(11, 5),
    "LSTM": lambda: nn.LSTM(5, 4, num_layers=2, bidirectional=True, proj_size=3),
    "GRUCell": lambda: nn.GRUCell(5, 4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
    "MultiheadAttention, kdim": lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(8, 2, 16),
    "Transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
    "AdaptiveLogSoftmaxWithLoss": lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 10]),
}


@contextmanager
def every_name_replaced() -> Iterator[None]:
    """What people do by hand: initlab's functions put in place of torch's, wherever torch.nn has a name for them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for m in sys.modules if m.startswith("torch.nn.")]:
            for name in EVERY:
                if vars(sys.modules[module]).get(name) is BEFORE[name]:
                    patch.setattr(sys.modules[module], name, getattr(init, name))
        yield


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("module", MODULES)
def test_module_is_as_with_every_name_replaced(module: str) -> None:
    with Sampling() as sampling:
        inside = swapped(MODULES[module])
    assert sampling.seen <= {"aten::random_"}  # the keys
    with every_name_replaced():
        assert_same(inside, seeded(MODULES[module]))
    assert all(p.requires_grad and p.is_leaf for p in inside.parameters())
    drawn = [name for name, p in inside.named_parameters() if p.unique().numel() > 1]
    theirs = dict(seeded(MODULES[module]).named_parameters())
    assert drawn == [name for name, p in theirs.items() if p.unique().numel() > 1]
    assert not any(torch.equal(inside.get_parameter(name), theirs[name]) for name in drawn)


def test_layers_filled_by_hand() -> None:
    linear, conv, lstm = swapped(lambda: (nn.Linear(13, 7), nn.Conv2d(4, 6, 3), nn.LSTM(5, 4)))
    torch.manual_seed(3)
    assert torch.equal(linear.weight, init.kaiming_uniform_(E(7, 13), a=math.sqrt(5)))
    assert torch.equal(linear.bias, init.uniform_(E(7), -1 / math.sqrt(13), 1 / math.sqrt(13)))
    assert torch.equal(conv.weight, init.kaiming_uniform_(E(6, 4, 3, 3), a=math.sqrt(5)))
    assert torch.equal(conv.bias, init.uniform_(E(6), -1 / 6, 1 / 6))
    for weight in lstm.parameters():
        assert torch.equal(weight, init.uniform_(E(weight.shape), -0.5, 0.5))


def test_attention_filled_by_hand() -> None:
    attention = swapped(lambda: nn.MultiheadAttention(8, 2))
    torch.manual_seed(3)
    assert torch.equal(attention.out_proj.weight, init.kaiming_uniform_(E(8, 8), a=math.sqrt(5)))
    init.uniform_(E(8))  # the bias of out_proj, which is set to zero afterwards
    assert torch.equal(attention.in_proj_weight, init.xavier_uniform_(E(24, 8)))
    assert not attention.out_proj.bias.any()
    assert not attention.in_proj_bias.any()


def test_reset_parameters_inside() -> None:
    layer = nn.Linear(13, 7)
    swapped(layer.reset_parameters)
    assert torch.equal(layer.weight, seeded(lambda: init.kaiming_uniform_(E(7, 13), a=math.sqrt(5))))


def test_skip_init() -> None:
    before = torch.get_rng_state()
    with swap():
        layer = nn.utils.skip_init(nn.Linear, 13, 7)
        assert torch.equal(torch.get_rng_state(), before)  # it is built on meta
        seeded(layer.reset_parameters)
    assert torch.equal(layer.weight, seeded(lambda: init.kaiming_uniform_(E(7, 13), a=math.sqrt(5))))


def test_lazy_module_materialised_inside() -> None:
    lazy = nn.LazyLinear(7)
    swapped(lambda: lazy(torch.ones(2, 13)))
    assert type(lazy) is nn.Linear
    assert torch.equal(lazy.weight, seeded(lambda: init.kaiming_uniform_(E(7, 13), a=math.sqrt(5))))


def test_lazy_module_materialised_outside() -> None:
    with swap():
        lazy = nn.LazyLinear(7)
    seeded(lambda: lazy(torch.ones(2, 13)))
    assert torch.equal(lazy.weight, seeded(lambda: nn.Linear(13, 7)).weight)


def test_copies_and_forward_passes_are_as_ever() -> None:
    with swap():
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5)
        other = copy.deepcopy(layer)
        inside = seeded(lambda: layer(torch.ones(3, 2, 8)))
    assert_same(layer, other)
    assert torch.equal(inside, seeded(lambda: other(torch.ones(3, 2, 8))))


# ---------------------------------------------------------------------------------------------------------------
# Entering and leaving


def is_swapped() -> bool:
    """Whether this thread's calls go to initlab: all three kinds of them, or none."""
    found = {
        torch.equal(filled(call, name), ours(name))
        for call, name in [
            (lambda t, mean, std, generator: t.normal_(mean, std, generator=generator), "normal_"),
            (THEIRS.trunc_normal_, "trunc_normal_"),
            (THEIRS.orthogonal_, "orthogonal_"),
            (THEIRS.sparse_, "sparse_"),
            (BEFORE["kaiming_uniform_"], "kaiming_uniform_"),
        ]
    }
    assert len(found) == 1
    return found.pop()


def is_patched() -> bool:
    changed = [name for name in BEFORE if vars(THEIRS)[name] is not BEFORE[name]]
    assert changed in ([], list(REPLACED))
    return bool(changed)


def test_inside_and_outside() -> None:
    assert not is_swapped()
    with swap() as nothing:
        assert nothing is None
        assert is_swapped()
        assert is_patched()
    assert not is_swapped()
    assert not is_patched()


def test_only_these_names_are_replaced() -> None:
    before = patchable()
    with swap():
        inside = patchable()
    changed = {key for key in before if inside[key] is not before[key]}
    assert changed == {("torch.nn.init", name) for name in REPLACED}


def test_a_swap_that_is_not_entered_does_nothing() -> None:
    swap()
    swap()(is_swapped)
    assert not is_patched()
    assert not is_swapped()


@pytest.mark.parametrize("reuse", [False, True], ids=["two objects", "one object"])
def test_nested(reuse: bool) -> None:
    outer = swap()
    with outer:
        with outer if reuse else swap():
            assert is_swapped()
        assert is_swapped()
        assert is_patched()
    assert not is_swapped()


def test_one_object_again_and_again() -> None:
    entered = swap()
    for _ in range(3):
        with entered:
            assert is_swapped()
        assert not is_swapped()
        assert not is_patched()


def test_exception_ends_it() -> None:
    error = KeyError("a")
    with pytest.raises(KeyError) as caught, swap():
        raise error
    assert caught.value is error
    assert not is_swapped()
    assert not is_patched()


def test_exception_ends_the_inner_one_only() -> None:
    with swap():
        with pytest.raises(RuntimeError, match="std >= 0"), swap():
            THEIRS.normal_(E(3), 0.0, -1.0)
        assert is_swapped()
    assert not is_swapped()


def test_exits_out_of_order_in_one_thread() -> None:
    # As two tasks of one event loop do, or a generator that is closed late.
    first, second = swap(), swap()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_swapped()
    second.__exit__(None, None, None)
    assert not is_swapped()


@pytest.mark.parametrize("name", REPLACED)
def test_torch_without_a_function_that_must_be_replaced(name: str) -> None:
    @swap()
    def decorated() -> None:
        raise AssertionError("it must not run")

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(THEIRS, name)
        before = patchable()
        for attempt in (lambda: swap().__enter__(), decorated):
            with pytest.raises(RuntimeError, match=rf"torch \S+ has no torch\.nn\.init\.{name}.*init_model_"):
                attempt()
            assert all(vars(THEIRS)[key] is was for key, was in BEFORE.items() if key != name)
            assert patchable().keys() == before.keys()
            assert modes() == []
    with swap():
        assert is_swapped()


# ---------------------------------------------------------------------------------------------------------------
# As a decorator


def test_decorator() -> None:
    @swap()
    def build(width: int, *, bias: bool = True) -> nn.Linear:
        """Builds."""
        return seeded(lambda: nn.Linear(width, 7, bias=bias))

    assert build.__name__ == "build"
    assert build.__doc__ == "Builds."
    assert list(inspect.signature(build).parameters) == ["width", "bias"]
    for _ in range(2):
        layer = build(13, bias=False)
        assert torch.equal(layer.weight, seeded(lambda: init.kaiming_uniform_(E(7, 13), a=math.sqrt(5))))
        assert layer.bias is None
        assert not is_patched()


def test_decorated_function_may_raise() -> None:
    @swap()
    def fails() -> None:
        assert is_swapped()
        raise KeyError("a")

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
        assert not is_swapped()


def test_decorated_function_may_call_itself() -> None:
    @swap()
    def down(depth: int) -> int:
        assert is_swapped()
        below = down(depth - 1) if depth else 0
        assert is_swapped()
        return below + 1

    assert down(4) == 5
    assert not is_swapped()


def test_decorated_method() -> None:
    class Builder:
        @swap()
        def build(self) -> Tensor:
            return filled(THEIRS.normal_, "normal_")

    assert torch.equal(Builder().build(), ours("normal_"))


def test_decorated_function_in_several_threads_at_once() -> None:
    together = threading.Barrier(4)

    @swap()
    def fill(seed: int) -> Tensor:
        together.wait(timeout=30)
        values = filled(THEIRS.trunc_normal_, "trunc_normal_", seed)
        together.wait(timeout=30)
        return values

    with ThreadPoolExecutor(4) as pool:
        for seed, values in enumerate(pool.map(fill, range(8))):
            assert torch.equal(values, ours("trunc_normal_", seed))
        assert not any(pool.map(lambda _: bool(modes()), range(8)))
    assert not is_patched()


def a_generator() -> Iterator[None]:
    yield


async def a_coroutine() -> None: ...


async def an_async_generator() -> Any:
    yield


@pytest.mark.parametrize(
    "refused",
    [nn.Linear, a_generator, a_coroutine, an_async_generator, functools.partial(a_generator)],
    ids=["class", "generator", "coroutine", "async generator", "partial generator"],
)
def test_decorator_refuses_what_would_run_outside_it(refused: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"with initlab\.swap\(\):"):
        swap()(refused)


# ---------------------------------------------------------------------------------------------------------------
# Threads and forks


def test_another_thread_has_torchs_values(threads: Callable[[], Callable[..., Any]]) -> None:
    elsewhere = threads()
    expected = {name: torchs(name) for name in STEERED}
    with swap():
        assert is_patched()
        for name, values in expected.items():
            assert torch.equal(elsewhere(filled, getattr(THEIRS, name), name), values), name
        assert not elsewhere(is_swapped)
        assert is_swapped()


def test_a_swap_in_another_thread_stays_there(threads: Callable[[], Callable[..., Any]]) -> None:
    elsewhere, entered = threads(), swap()
    expected = {name: torchs(name) for name in STEERED}
    elsewhere(entered.__enter__)
    assert elsewhere(is_swapped)
    assert not is_swapped()
    for name, values in expected.items():
        assert torch.equal(filled(getattr(THEIRS, name), name), values), name
    elsewhere(entered.__exit__, None, None, None)
    assert not elsewhere(is_swapped)


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("shared", [False, True], ids=["two objects", "one object"])
def test_overlapping_swaps(threads: Callable[[], Callable[..., Any]], first_out: int, shared: bool) -> None:
    one = swap()
    swaps, workers = (one, one if shared else swap()), (threads(), threads())
    for entered, worker in zip(swaps, workers, strict=True):
        worker(entered.__enter__)
    assert not is_swapped()
    for leaving in (first_out, 1 - first_out):
        assert is_patched()
        assert workers[leaving](is_swapped)
        workers[leaving](swaps[leaving].__exit__, None, None, None)
        assert not workers[leaving](is_swapped)
    assert not is_patched()


def test_one_object_nested_in_one_thread_and_entered_in_another(threads: Callable[[], Callable[..., Any]]) -> None:
    entered, elsewhere = swap(), threads()
    with entered:
        elsewhere(entered.__enter__)
        elsewhere(entered.__enter__)
    still_here, still_there = bool(modes()), elsewhere(is_swapped)
    elsewhere(entered.__exit__, None, None, None)
    elsewhere(entered.__exit__, None, None, None)
    assert still_there
    assert not still_here
    assert not elsewhere(modes)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads give way to each other all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
def test_threads_that_come_and_go() -> None:
    def fill() -> dict[str, bytes]:
        return {name: filled(getattr(THEIRS, name), name).numpy().tobytes() for name in names}

    def inside(_: int) -> bool:
        with swap():
            return fill() == mine

    names = ("normal_", "trunc_normal_", "orthogonal_")
    theirs, mine = fill(), {name: ours(name).numpy().tobytes() for name in names}
    with ThreadPoolExecutor(4) as pool:
        outside = pool.map(lambda _: fill() == theirs, range(50))
        assert all(pool.map(inside, range(50)))
        assert all(outside)
    assert not is_patched()


@pytest.mark.usefixtures("restless")
def test_threads_that_enter_at_once() -> None:
    def come_and_go(_: int) -> None:
        for _ in range(300):
            together.wait(timeout=30)
            with swap():
                pass

    together = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(come_and_go, range(4))) == [None] * 4
    assert not is_patched()


FORKED = """
import os, signal, sys, threading, warnings
warnings.filterwarnings("ignore", category=DeprecationWarning)  # of forking where there are threads
import torch, initlab
from torch.nn import init

before = dict(vars(init))

def values(function):
    return function(torch.empty(9, 7), generator=torch.Generator().manual_seed(1))

def swapped():
    names = ("normal_", "trunc_normal_")  # not orthogonal_: LAPACK hangs in a forked child
    found = {torch.equal(values(getattr(init, name)), values(getattr(initlab.init, name))) for name in names}
    assert len(found) == 1
    return found.pop()

def patched():
    return [name for name in before if vars(init)[name] is not before[name]]

def in_child(check):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            check()
        except BaseException as error:
            sys.stderr.write(f"child: {error!r}")
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

def in_another_thread(hold):
    inside, leave = threading.Event(), threading.Event()
    def run():
        with hold:
            inside.set()
            leave.wait(60)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    inside.wait(60)
    return lambda: (leave.set(), thread.join())
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")


@pytest.mark.long
@needs_fork
def test_fork_inside(python: Callable[..., str]) -> None:
    script = """
swap = initlab.swap()

def leave_it():
    assert swapped()
    swap.__exit__(None, None, None)
    assert not swapped() and not patched()
with swap:
    in_child(leave_it)
    assert swapped()
assert not swapped() and not patched()

def enter_one():
    assert not swapped()
    with swap:
        assert swapped()
    assert not swapped()
release = in_another_thread(initlab.swap())
in_child(enter_one)
release()
from initlab.models import patches, swapping
release = in_another_thread(patches.INIT_PATCHES.lock)
in_child(enter_one)
release()
assert not swapped() and not patched()
print("fine")
"""
    assert python(FORKED + script) == "fine\n"


@needs_fork
def test_fork_while_another_thread_is_inside(python: Callable[..., str]) -> None:
    # The child has no such thread, so nobody will ever leave that swap() there.
    script = """
def check():
    with initlab.swap():
        pass
    assert patched() == [], patched()
release = in_another_thread(initlab.swap())
in_child(check)
release()
print("fine")
"""
    assert python(FORKED + script) == "fine\n"


# ---------------------------------------------------------------------------------------------------------------
# Other people's patches


def test_patch_made_inside_is_not_clobbered() -> None:
    def theirs(tensor: Tensor, gain: float = 1.0, generator: Any = None) -> Tensor:
        return tensor.fill_(gain)

    try:
        with swap():
            THEIRS.orthogonal_ = theirs
            assert (THEIRS.orthogonal_(E(3, 3), 2.0) == 2.0).all()
            with swap():
                pass
            assert THEIRS.orthogonal_ is theirs
        assert THEIRS.orthogonal_ is theirs
        assert [name for name in REPLACED if vars(THEIRS)[name] is not BEFORE[name]] == ["orthogonal_"]
        with swap():
            pass
        assert THEIRS.orthogonal_ is theirs
    finally:
        THEIRS.orthogonal_ = BEFORE["orthogonal_"]


def test_patch_made_and_undone_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    with swap():
        with monkeypatch.context() as patch:
            patch.setattr(THEIRS, "orthogonal_", lambda tensor: tensor)
        assert is_swapped()
    assert not is_patched()


def test_patch_undone_inside() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(THEIRS, "orthogonal_", functools.partial(BEFORE["orthogonal_"]))
    with swap():
        patch.undo()
    assert not is_patched()


def test_patch_undone_afterwards() -> None:
    # It puts back what it found inside the swap(), which from then on does what torch's function does.
    patch = pytest.MonkeyPatch()
    try:
        with swap():
            patch.setattr(THEIRS, "orthogonal_", lambda tensor: tensor)
        patch.undo()
        assert not is_swapped()
        with swap():
            assert is_swapped()
        assert not is_swapped()
    finally:
        THEIRS.orthogonal_ = BEFORE["orthogonal_"]


@pytest.mark.parametrize("name", REPLACED)
def test_name_deleted_inside(name: str) -> None:
    try:
        with swap():
            delattr(THEIRS, name)
        assert name not in vars(THEIRS)
    finally:
        setattr(THEIRS, name, BEFORE[name])
    assert not is_patched()
    with swap():
        assert is_swapped()


@pytest.mark.parametrize("name", ["orthogonal_", "sparse_"])
def test_patch_made_before_is_asked_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As transformers' guard, which leaves alone what a checkpoint has filled.
    @functools.wraps(BEFORE[name])
    def unless_flagged(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if hasattr(tensor, "flag") else BEFORE[name](tensor, *args, **kwargs)

    monkeypatch.setattr(THEIRS, name, unless_flagged)
    loaded = torch.ones(63, 37)
    loaded.flag = True
    with swap():
        getattr(THEIRS, name)(loaded, 0.5)
        other = filled(getattr(THEIRS, name), name)
    assert (loaded == 1.0).all()
    dense = ours("orthogonal_") if name == "orthogonal_" else init.normal_(E(63, 37), 0.0, 0.01, generator_of(5))
    assert torch.equal(other[other != 0], dense[other != 0])
    assert getattr(THEIRS, name) is unless_flagged


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["uniform_", "normal_", "kaiming_uniform_", "xavier_normal_"])
@pytest.mark.parametrize("kind", ["function", "mock"])
def test_patch_that_calls_torchs_function(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.nn.init hands to the mode whatever stands under the name, which need not have that name.
    def counting(tensor: Tensor, **kwargs: Any) -> Tensor:
        calls.append(tensor)
        return BEFORE[name](tensor, **kwargs)

    calls: list[Tensor] = []
    patch = counting if kind == "function" else MagicMock(wraps=BEFORE[name])
    with swap():
        monkeypatch.setattr(THEIRS, name, patch)
        got = filled(getattr(THEIRS, name), name)
        monkeypatch.setattr(THEIRS, name, BEFORE[name])
    assert calls or patch.called
    assert torch.equal(got, ours(name))


# ---------------------------------------------------------------------------------------------------------------
# Meta, fakes, other modes


@contextmanager
def both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


BESIDE: dict[str, Callable[[Any], Any]] = {
    "outside": lambda mode: both(mode, swap()),
    "inside": lambda mode: both(swap(), mode),
}
on_either_side = pytest.mark.parametrize("side", BESIDE)


@on_either_side
@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_what_holds_no_values_draws_no_key(side: str, mode: Callable[[], Any]) -> None:
    before = torch.get_rng_state()
    with BESIDE[side](mode()):
        layers = [nn.Linear(13, 7), nn.LSTM(5, 4), nn.TransformerEncoderLayer(8, 2, 16)]
        for name in RANDOM:
            getattr(THEIRS, name)(E(63, 37), **RANDOM[name])
            BEFORE[name](E(63, 37), **RANDOM[name])
        for name in METHODS:
            getattr(E(3), name)()
            getattr(E(3, requires_grad=True).data, name)()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.is_meta or isinstance(p, FakeTensor) for layer in layers for p in layer.parameters())


@on_either_side
@every_random
@pytest.mark.usefixtures("backend")
def test_real_tensor_under_a_meta_default(side: str, name: str) -> None:
    with BESIDE[side](torch.device("meta")):
        got = getattr(THEIRS, name)(E(63, 37, device="cpu"), **RANDOM[name], generator=generator_of(5))
    assert torch.equal(got, ours(name))


def test_default_device_set_inside() -> None:
    with swap():
        torch.set_default_device("meta")
        try:
            assert nn.Linear(13, 7).weight.is_meta
        finally:
            torch.set_default_device(None)
        assert is_swapped()


class Log(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@on_either_side
def test_other_modes(side: str) -> None:
    log = Log()
    with BESIDE[side](log):
        assert is_swapped()
        log.seen.clear()
        E(3).normal_()
        THEIRS.uniform_(E(3))
    # Above the swap a mode sees what was called, below it what became of that.
    seen = [func for func in log.seen if func in (Tensor.normal_, init.normal_, BEFORE["uniform_"], init.uniform_)]
    expected = {"inside": [Tensor.normal_, BEFORE["uniform_"]], "outside": [init.normal_, init.uniform_]}
    assert seen == expected[side]


def test_mode_between_two_swaps() -> None:
    with swap(), Log(), swap():
        assert is_swapped()


def test_subclass_gets_initlabs_function() -> None:
    class Noting(Tensor):
        seen: list[Any] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    tensor = E(63, 37).as_subclass(Noting)
    with swap():
        THEIRS.normal_(tensor, **RANDOM["normal_"], generator=generator_of(5))
    assert init.normal_ in Noting.seen
    assert torch.equal(tensor.as_subclass(Tensor), ours("normal_"))


# ---------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """torch.compile with the eager backend, from a clean slate."""
    torch._dynamo.reset()
    yield functools.partial(torch.compile, backend="eager")
    torch._dynamo.reset()


def test_compiled_module(compiled: Callable[..., Any]) -> None:
    with swap():
        model = nn.Sequential(nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, 3))
        x = torch.ones(2, 13)
        assert torch.equal(compiled(model, fullgraph=True)(x), model(x))
        assert is_swapped()


@pytest.mark.parametrize("name", ["normal_", "trunc_normal_", "kaiming_uniform_", "orthogonal_"])
@pytest.mark.parametrize("first", ["inside", "outside"])
def test_compiled_function_that_fills(
    compiled: Callable[..., Any], threads: Callable[[], Callable[..., Any]], name: str, first: str
) -> None:
    def fill(x: Tensor) -> Tensor:
        weight = torch.zeros(63, 37)
        getattr(THEIRS, name)(weight, **RANDOM[name])
        return weight + x

    def call() -> bool:
        """Whether the values are initlab's."""
        expected = {torch.equal(seeded(lambda: step(torch.zeros(63, 37))), values) for values in (mine, theirs)}
        assert expected == {True, False}
        return torch.equal(seeded(lambda: step(torch.zeros(63, 37))), mine)

    step, elsewhere = compiled(fill), threads()
    mine = seeded(lambda: getattr(init, name)(E(63, 37), **RANDOM[name]))
    theirs = seeded(lambda: BEFORE[name](E(63, 37), **RANDOM[name]))
    if first == "outside":
        assert not call()
    for _ in range(2):
        with swap():
            assert call()
            assert not elsewhere(call)
            assert call()
        assert not call()


def test_swap_inside_a_compiled_function(compiled: Callable[..., Any]) -> None:
    def fill(x: Tensor) -> Tensor:
        with swap():
            return THEIRS.trunc_normal_(torch.zeros(63, 37)) + x

    expected = seeded(lambda: init.trunc_normal_(E(63, 37)))
    assert torch.equal(seeded(lambda: compiled(fill)(torch.zeros(63, 37))), expected)
    assert torch.equal(seeded(lambda: compiled(swap()(fill))(torch.zeros(63, 37))), expected)
    assert torch.equal(seeded(lambda: swap()(compiled(fill))(torch.zeros(63, 37))), expected)
    assert not is_swapped()


def test_full_graph_is_refused(compiled: Callable[..., Any]) -> None:
    # As it is for initlab.init: a compiler may fuse the stream's arithmetic.
    step = compiled(lambda x: THEIRS.normal_(x + 1.0), fullgraph=True)
    with swap(), pytest.raises(torch._dynamo.exc.Unsupported, match=r"compiler\.disable"):
        step(torch.zeros(3))
    assert not is_patched()


# ---------------------------------------------------------------------------------------------------------------
# transformers


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "GPT2Model": lambda tf: tf.GPT2Model(
        tf.GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=200, bos_token_id=0, eos_token_id=0)
    ),
    "LlamaForCausalLM": lambda tf: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=200
        )
    ),
    "BertModel": lambda tf: tf.BertModel(bert_config(tf)),
    "ViTModel": lambda tf: tf.ViTModel(
        tf.ViTConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=32)
    ),
    "T5Model": lambda tf: tf.T5Model(
        tf.T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=200)
    ),
    "RwkvModel": lambda tf: tf.RwkvModel(  # orthogonal_
        tf.RwkvConfig(hidden_size=64, num_hidden_layers=2, vocab_size=200, bos_token_id=0, eos_token_id=0)
    ),
}


def bert_config(tf: Any) -> Any:
    return tf.BertConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=200
    )


def empty_rows(tensor: Tensor) -> Tensor:
    return (tensor == 0.0).view(len(tensor), -1).all(dim=1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.long
def test_model_of_transformers(model: str, transformers: Any) -> None:
    before = patchable()
    reference = seeded(lambda: MODELS[model](transformers))
    with Sampling() as sampling:
        built = swapped(lambda: MODELS[model](transformers))
    after = patchable()
    assert [key for key in before if after[key] is not before[key]] == []
    assert sampling.seen <= {"aten::random_", "aten::randn"}  # the keys, and ViT's torch.randn, which is overwritten

    assert [n for n, _ in built.named_parameters()] == [n for n, _ in reference.named_parameters()]
    drawn = 0
    for name, theirs in reference.named_parameters():
        mine = built.get_parameter(name)
        assert mine.isfinite().all(), name
        assert torch.equal(empty_rows(mine), empty_rows(theirs)), name  # those of padding
        std = theirs.std()
        if theirs.unique().numel() == 1 or (model == "RwkvModel" and "time_" in name):  # given by a formula
            assert torch.equal(mine, theirs), name
            continue
        drawn += 1
        assert not torch.equal(mine, theirs), name
        error = std / math.sqrt(theirs.numel())  # of a mean; that of a std is sqrt(2) smaller, for normal deviates
        assert abs(mine.mean() - theirs.mean()) < 5 * math.sqrt(2) * error, name
        assert abs(mine.std() - std) < 5 * error, name
    assert drawn >= 8
    assert_same(built, swapped(lambda: MODELS[model](transformers)))


@pytest.mark.long
def test_model_of_transformers_in_bfloat16(transformers: Any) -> None:
    whole = swapped(lambda: MODELS["BertModel"](transformers))
    torch.set_default_dtype(torch.bfloat16)
    try:
        half = swapped(lambda: MODELS["BertModel"](transformers))
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(half.parameters()).dtype == torch.bfloat16
    assert_same(half, whole.bfloat16())


@pytest.mark.long
def test_checkpoint_of_transformers_is_left_alone(transformers: Any, tmp_path: Path) -> None:
    base = transformers.BertModel(bert_config(transformers))
    base.save_pretrained(tmp_path)
    with Sampling() as sampling:
        model = swapped(lambda: transformers.BertForSequenceClassification.from_pretrained(tmp_path))
    assert_same(model.bert, base)
    assert sampling.seen == {"aten::random_"}
    expected = seeded(lambda: init.normal_(E(2, 128), 0.0, 0.02))
    assert torch.equal(model.classifier.weight, expected)
    assert not model.classifier.bias.any()


@on_either_side
@every_random
@pytest.mark.long
def test_flags_of_transformers(side: str, name: str, transformers: Any) -> None:
    from transformers.initialization import guard_torch_init_functions

    loaded, fresh = (nn.Parameter(torch.full((63, 37), 7.0)) for _ in range(2))
    loaded._is_hf_initialized = True
    with BESIDE[side](guard_torch_init_functions()):
        getattr(THEIRS, name)(loaded, **RANDOM[name])
        getattr(THEIRS, name)(fresh, **RANDOM[name], generator=generator_of(5))
    assert (loaded == 7.0).all()
    if name == "sparse_":  # transformers calls the one that it has captured, so the places are torch's
        dense = init.normal_(E(63, 37), 0.0, 0.01, generator_of(5))
        assert torch.equal(fresh.detach(), dense * (fresh.detach() != 0))
        assert ((fresh == 0).sum(dim=0) == 19).all()
    else:
        assert torch.equal(fresh.detach(), ours(name))


@pytest.mark.parametrize("name", STEERED)
@pytest.mark.long
def test_functions_that_transformers_captured(name: str, transformers: Any) -> None:
    from transformers import initialization

    with swap():
        for function in (initialization.TORCH_INIT_FUNCTIONS[name], getattr(initialization, name)):
            assert torch.equal(filled(function, name), ours(name))


# ---------------------------------------------------------------------------------------------------------------
# Documentation


def test_example() -> None:
    result = doctest.testmod(swapping, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted >= 5


def test_check_ranks_alone():
    """One process agrees with itself, and draws that nobody could compare are passed over."""
    with swap(check_ranks=True):
        drawn = torch.empty(3).normal_()
    assert drawn.isfinite().all()
    init_model_(torch.nn.Linear(2, 2), 0, check_ranks=True)


def test_check_ranks_refuses_what_it_cannot_ask():
    """Before anything is drawn."""
    state = torch.get_rng_state()
    fill = swap(check_ranks=3)(lambda: torch.empty(3).normal_())
    with pytest.raises(RuntimeError, match=r"check_ranks asks other ranks, but torch\.distributed is not initialised"):
        fill()
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        with pytest.raises(TypeError, match=r"check_ranks is 3; it must be a ProcessGroup, a DeviceMesh"):
            fill()
        assert torch.equal(torch.get_rng_state(), state)
        fill = swap(check_ranks=torch.distributed.group.WORLD)(lambda: torch.empty(3).normal_())
        assert fill().isfinite().all()
    finally:
        torch.distributed.destroy_process_group()


def test_check_ranks_is_not_asked_where_something_raised(monkeypatch):
    monkeypatch.setattr(swapping, "_compare", lambda *args: pytest.fail("compared"))

    @swap(check_ranks=True)
    def fail():
        torch.empty(3).normal_()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.long  # transformers, peft
@pytest.mark.filterwarnings("ignore")  # PEFT's, that a checkpoint without projections depends on how they are drawn
def test_projections_that_are_drawn_again_at_load(tmp_path):
    """PEFT's VeRA saves a seed in their place: what is saved and loaded inside swap() computes what it did."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)

    def body() -> nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(settings)

    vera = peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False, projection_prng_key=5)
    ids, outputs = torch.arange(12).view(2, 6), {}
    for inside in (True, False):
        with swap() if inside else ExitStack():
            model = peft.get_peft_model(body(), vera).eval()
            for name, parameter in model.named_parameters():
                if "vera_lambda" in name:
                    parameter.data.fill_(0.5)
            outputs[inside] = model(ids).logits
            model.save_pretrained(tmp_path / str(inside))
            again = peft.PeftModel.from_pretrained(body(), tmp_path / str(inside)).eval()
        assert torch.equal(again(ids).logits, outputs[inside])
    assert not torch.equal(outputs[True], outputs[False])
