"""initlab.init against torch.nn.init's contract, and its values against the distributions they should follow."""

import contextlib
import doctest
import functools
import inspect
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from initlab import init

THEIRS = torch.nn.init
DIFFERENCES = Path(__file__).resolve().parent.parent / "docs" / "init.md"

ALIASES = {name for name in THEIRS.__all__ if not name.endswith("_")} - {"calculate_gain"}
CONSTANT = {"constant_": {"val": 0.3}, "ones_": {}, "zeros_": {}, "eye_": {}, "dirac_": {}}
POINTWISE: dict[str, dict[str, Any]] = {
    "uniform_": {"a": -1.5, "b": 0.25},
    "normal_": {"mean": 0.5, "std": 2.0},
    "trunc_normal_": {"mean": 0.25, "std": 1.5, "a": -2.0, "b": 1.0},
    "xavier_uniform_": {"gain": 0.7},
    "xavier_normal_": {"gain": 0.7},
    "kaiming_uniform_": {"a": 0.1, "mode": "fan_out"},
    "kaiming_normal_": {"nonlinearity": "relu"},
}
RANDOM = POINTWISE | {"orthogonal_": {"gain": 0.7}, "sparse_": {"sparsity": 0.3}}
DISPATCHING = ("uniform_", "normal_", "constant_", "kaiming_uniform_")

every_random = pytest.mark.parametrize("name", RANDOM)
every_pointwise = pytest.mark.parametrize("name", POINTWISE)


def fill(name: str, tensor: Tensor, seed: int | None = None, **changed: Any) -> Tensor:
    if seed is not None:
        changed["generator"] = torch.Generator().manual_seed(seed)
    return getattr(init, name)(tensor, **(RANDOM | CONSTANT)[name] | changed)


def shape_for(name: str) -> tuple[int, ...]:
    return (7, 5, 3) if name == "dirac_" else (63, 37)


def outcome(call: Callable[[], object]) -> tuple[type | None, list[warnings.WarningMessage]]:
    """The type of what the call raises, None if nothing, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return type(error), caught
    return None, caught


# ---------------------------------------------------------------------------------------------------------------
# Names and signatures


def test_public_names_are_torchs() -> None:
    assert set(init.__all__) == set(THEIRS.__all__)
    assert len(init.__all__) == len(set(init.__all__))


@pytest.mark.parametrize("name", sorted(set(THEIRS.__all__) - ALIASES))
def test_signature(name: str) -> None:
    assert inspect.signature(getattr(init, name)) == inspect.signature(getattr(THEIRS, name))


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_signature_of_alias(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (init, THEIRS))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_alias_warns_and_forwards(name: str) -> None:
    args = {"constant_": (0.5,), "sparse_": (0.25,)}.get(name + "_", ())
    shape = (6, 4, 3) if name == "dirac" else (6, 4)
    torch.manual_seed(5)
    expected = getattr(init, name + "_")(torch.empty(shape), *args)
    torch.manual_seed(5)
    tensor = torch.empty(shape)
    with pytest.warns(FutureWarning) as caught:
        assert getattr(init, name)(tensor, *args) is tensor
    with pytest.warns(FutureWarning) as theirs:
        getattr(THEIRS, name)(torch.empty(shape), *args)
    assert [(str(w.message), w.filename) for w in caught] == [(str(w.message), __file__) for w in theirs]
    assert torch.equal(tensor, expected)
    assert getattr(init, name).__name__ == name


@pytest.mark.parametrize("name", ["calculate_gain", *sorted(CONSTANT.keys() - {"eye_", "dirac_"})])
def test_what_draws_nothing_is_torchs_own(name: str) -> None:
    assert getattr(init, name) is getattr(THEIRS, name)


@pytest.mark.parametrize("name", sorted(set(RANDOM) | ALIASES))
def test_documented(name: str) -> None:
    text = inspect.getdoc(getattr(init, name)) or ""
    assert text
    if name in RANDOM:
        order = [text.index(f"\n{section}:\n") for section in ("Args", "Returns", "Raises", "Source", "Example")]
        assert order == sorted(order)


def test_examples() -> None:
    result = doctest.testmod(init, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted >= 3 * len(RANDOM)


# ---------------------------------------------------------------------------------------------------------------
# Errors and warnings, compared live

E = torch.empty
NAN, INF = math.nan, math.inf
BAD: list[tuple[str, Callable[[Any], object]]] = [
    ("uniform_ a > b", lambda m: m.uniform_(E(3), 2.0, 1.0)),
    ("uniform_ a > b, empty", lambda m: m.uniform_(E(0), 2.0, 1.0)),
    ("uniform_ a nan", lambda m: m.uniform_(E(3), NAN, 1.0)),
    ("uniform_ b nan", lambda m: m.uniform_(E(3), 0.0, NAN)),
    ("uniform_ a -inf", lambda m: m.uniform_(E(3), -INF, 0.0)),
    ("uniform_ b inf", lambda m: m.uniform_(E(3), 0.0, INF)),
    ("uniform_ beyond fp32", lambda m: m.uniform_(E(3), 0.0, 1e39)),
    ("uniform_ beyond fp16", lambda m: m.uniform_(E(3, dtype=torch.float16), -1e6, 1e6)),
    ("uniform_ span beyond fp32", lambda m: m.uniform_(E(3), -3e38, 3e38)),
    ("uniform_ str", lambda m: m.uniform_(E(3), "a", 1.0)),
    ("uniform_ None", lambda m: m.uniform_(E(3), 0.0, None)),
    ("uniform_ complex", lambda m: m.uniform_(E(3), 0.0, 1j)),
    ("uniform_ int", lambda m: m.uniform_(E(3, dtype=torch.int32))),
    ("uniform_ bool", lambda m: m.uniform_(E(3, dtype=torch.bool))),
    ("uniform_ float8", lambda m: m.uniform_(E(3, dtype=torch.float8_e4m3fn))),
    ("uniform_ expanded", lambda m: m.uniform_(E(1).expand(4))),
    ("normal_ std < 0", lambda m: m.normal_(E(3), 0.0, -1.0)),
    ("normal_ std < 0, empty", lambda m: m.normal_(E(0), 0.0, -1.0)),
    ("normal_ std nan", lambda m: m.normal_(E(3), 0.0, NAN)),
    ("normal_ str", lambda m: m.normal_(E(3), "a")),
    ("normal_ None", lambda m: m.normal_(E(3), 0.0, None)),
    ("normal_ complex mean", lambda m: m.normal_(E(3, dtype=torch.complex64), 1j)),
    ("normal_ of None", lambda m: m.normal_(None)),
    ("normal_ of a list", lambda m: m.normal_([1.0, 2.0])),
    ("normal_ generator", lambda m: m.normal_(E(3), generator=3)),
    ("normal_ generator, empty", lambda m: m.normal_(E(0), generator=3)),
    ("normal_ int", lambda m: m.normal_(E(3, dtype=torch.int64))),
    ("normal_ float8", lambda m: m.normal_(E(3, dtype=torch.float8_e5m2))),
    ("normal_ expanded", lambda m: m.normal_(E(1).expand(4))),
    ("normal_ sparse", lambda m: m.normal_(torch.eye(3).to_sparse())),
    ("normal_ nested", lambda m: m.normal_(torch.nested.nested_tensor([E(2), E(3)], layout=torch.jagged))),
    ("normal_ mkldnn", lambda m: m.normal_(torch.ones(3).to_mkldnn())),
    ("normal_ uninitialised", lambda m: m.normal_(UninitializedParameter())),
    ("normal_ std < 0, meta", lambda m: m.normal_(E(3, device="meta"), 0.0, -1.0)),
    ("normal_ generator, meta", lambda m: m.normal_(E(3, device="meta"), generator=3)),
    ("trunc_normal_ a > b", lambda m: m.trunc_normal_(E(3), 0.0, 1.0, 2.0, -2.0)),
    ("trunc_normal_ str", lambda m: m.trunc_normal_(E(3), "a")),
    ("trunc_normal_ None", lambda m: m.trunc_normal_(E(3), 0.0, 1.0, None, 2.0)),
    ("trunc_normal_ int", lambda m: m.trunc_normal_(E(3, dtype=torch.int32))),
    ("trunc_normal_ complex", lambda m: m.trunc_normal_(E(3, dtype=torch.complex64))),
    ("trunc_normal_ expanded", lambda m: m.trunc_normal_(E(1).expand(4))),
    ("trunc_normal_ uninitialised", lambda m: m.trunc_normal_(UninitializedParameter())),
    ("xavier_uniform_ gain < 0", lambda m: m.xavier_uniform_(E(3, 3), -1.0)),
    ("xavier_uniform_ gain inf", lambda m: m.xavier_uniform_(E(3, 3), INF)),
    ("xavier_normal_ gain < 0", lambda m: m.xavier_normal_(E(3, 3), -1.0)),
    ("xavier_normal_ gain nan", lambda m: m.xavier_normal_(E(3, 3), NAN)),
    ("orthogonal_ 0 d", lambda m: m.orthogonal_(E(()))),
    ("orthogonal_ 1 d", lambda m: m.orthogonal_(E(3))),
    ("orthogonal_ 1 d, meta", lambda m: m.orthogonal_(E(3, device="meta"))),
    ("orthogonal_ int", lambda m: m.orthogonal_(E(3, 3, dtype=torch.int64))),
    ("orthogonal_ float8", lambda m: m.orthogonal_(E(3, 3, dtype=torch.float8_e4m3fn))),
    ("orthogonal_ gain str", lambda m: m.orthogonal_(E(3, 3), "a")),
    ("orthogonal_ gain None", lambda m: m.orthogonal_(E(3, 3), None)),
    ("orthogonal_ uninitialised", lambda m: m.orthogonal_(UninitializedParameter())),
    ("sparse_ no sparsity", lambda m: m.sparse_(E(3, 3))),
    ("sparse_ 1 d", lambda m: m.sparse_(E(3), 0.5)),
    ("sparse_ 3 d", lambda m: m.sparse_(E(3, 3, 3), 0.5)),
    ("sparse_ nan", lambda m: m.sparse_(E(3, 3), NAN)),
    ("sparse_ inf", lambda m: m.sparse_(E(3, 3), INF)),
    ("sparse_ str", lambda m: m.sparse_(E(3, 3), "a")),
    ("sparse_ std < 0", lambda m: m.sparse_(E(3, 3), 0.5, -1.0)),
    ("sparse_ int", lambda m: m.sparse_(E(3, 3, dtype=torch.int32), 0.5)),
    ("sparse_ expanded", lambda m: m.sparse_(E(1, 1).expand(4, 4), 0.5)),
    ("eye_ 3 d", lambda m: m.eye_(E(2, 2, 2))),
    ("dirac_ 2 d", lambda m: m.dirac_(E(2, 2))),
    ("dirac_ groups", lambda m: m.dirac_(E(3, 2, 2), 2)),
    ("calculate_gain name", lambda m: m.calculate_gain("step")),
    ("calculate_gain bool", lambda m: m.calculate_gain("leaky_relu", True)),
    ("constant_ str", lambda m: m.constant_(E(3), "a")),
]
for _name in ("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_"):
    BAD += [
        (f"{_name} 0 d", lambda m, f=_name: getattr(m, f)(E(()))),
        (f"{_name} 1 d", lambda m, f=_name: getattr(m, f)(E(3))),
        (f"{_name} 1 d, meta", lambda m, f=_name: getattr(m, f)(E(3, device="meta"))),
        (f"{_name} int", lambda m, f=_name: getattr(m, f)(E(3, 3, dtype=torch.int64))),
        (f"{_name} uninitialised", lambda m, f=_name: getattr(m, f)(UninitializedParameter())),
    ]
for _name in ("xavier_uniform_", "xavier_normal_"):
    BAD += [
        (f"{_name} no fans", lambda m, f=_name: getattr(m, f)(E(0, 0))),
        (f"{_name} empty kernel", lambda m, f=_name: getattr(m, f)(E(3, 4, 0))),
        (f"{_name} no fans, meta", lambda m, f=_name: getattr(m, f)(E(0, 0, device="meta"))),
        (f"{_name} gain str", lambda m, f=_name: getattr(m, f)(E(3, 3), "a")),
        (f"{_name} gain None", lambda m, f=_name: getattr(m, f)(E(3, 3), None)),
    ]
for _name in ("kaiming_uniform_", "kaiming_normal_"):
    BAD += [
        (f"{_name} mode", lambda m, f=_name: getattr(m, f)(E(3, 3), mode="fan")),
        (f"{_name} mode int", lambda m, f=_name: getattr(m, f)(E(3, 3), mode=3)),
        (f"{_name} nonlinearity", lambda m, f=_name: getattr(m, f)(E(3, 3), nonlinearity="step")),
        (f"{_name} a str", lambda m, f=_name: getattr(m, f)(E(3, 3), a="a")),
        (f"{_name} a bool", lambda m, f=_name: getattr(m, f)(E(3, 3), a=True)),
        (f"{_name} a nan", lambda m, f=_name: getattr(m, f)(E(3, 3), a=NAN)),
        (f"{_name} mode, meta", lambda m, f=_name: getattr(m, f)(E(3, 3, device="meta"), mode="fan")),
    ]


@pytest.mark.parametrize("call", [pytest.param(call, id=label) for label, call in BAD])
def test_errors_are_torchs(call: Callable[[Any], object]) -> None:
    theirs, ours = outcome(lambda: call(THEIRS))[0], outcome(lambda: call(init))[0]
    assert theirs is not None
    assert ours is theirs


ODD_BUT_FINE: list[tuple[str, Callable[[Any], object]]] = [
    ("uniform_ a == b", lambda m: m.uniform_(E(3), 0.5, 0.5)),
    ("uniform_ 0-d bounds", lambda m: m.uniform_(E(3), torch.tensor(0.0), torch.tensor(2.0))),
    ("normal_ std 0", lambda m: m.normal_(E(3), 1.0, 0.0)),
    ("normal_ ints", lambda m: m.normal_(E(3), 1, 2)),
    ("normal_ bool", lambda m: m.normal_(E(3), 0, True)),
    ("normal_ 0-d tensor", lambda m: m.normal_(E(3), 0.0, torch.tensor(0.5))),
    ("normal_ 0-d array", lambda m: m.normal_(E(3), 0.0, torch.tensor(0.5).numpy()[()])),
    ("normal_ of 0 d", lambda m: m.normal_(E(()))),
    ("trunc_normal_ a == b", lambda m: m.trunc_normal_(E(3), a=0.5, b=0.5)),
    ("trunc_normal_ half open", lambda m: m.trunc_normal_(E(3), a=0.0, b=INF)),
    ("trunc_normal_ ints", lambda m: m.trunc_normal_(E(3), 0, 1, -2, 2)),
    ("xavier_uniform_ gain tensor", lambda m: m.xavier_uniform_(E(3, 3), torch.tensor(2.0))),
    ("xavier_normal_ gain 0", lambda m: m.xavier_normal_(E(3, 3), 0)),
    ("xavier_normal_ one fan", lambda m: m.xavier_normal_(E(0, 3))),
    ("kaiming_normal_ upper case", lambda m: m.kaiming_normal_(E(3, 3), mode="FAN_OUT")),
    ("kaiming_normal_ a inf", lambda m: m.kaiming_normal_(E(3, 3), a=INF)),
    ("kaiming_uniform_ unused a", lambda m: m.kaiming_uniform_(E(3, 3), a="x", nonlinearity="relu")),
    ("orthogonal_ empty", lambda m: m.orthogonal_(E(0, 3))),
    ("orthogonal_ gain tensor", lambda m: m.orthogonal_(E(3, 3), torch.tensor(2.0))),
    ("sparse_ empty", lambda m: m.sparse_(E(0, 4), 0.5)),
    ("sparse_ all", lambda m: m.sparse_(E(3, 3), 1.0)),
    ("sparse_ more than all", lambda m: m.sparse_(E(3, 3), 1.5)),
    ("sparse_ meta", lambda m: m.sparse_(E(3, 3, device="meta"), 0.5)),
    ("trunc_normal_ far, meta", lambda m: m.trunc_normal_(E(3, device="meta"), a=5.0, b=6.0)),
    ("kaiming_uniform_ empty, bad mode", lambda m: m.kaiming_uniform_(E(0, 3), mode="fan")),
    ("kaiming_normal_ empty 1 d", lambda m: m.kaiming_normal_(E(0))),
    ("kaiming_normal_ empty, meta", lambda m: m.kaiming_normal_(E(0, 3, device="meta"))),
    ("trunc_normal_ above", lambda m: m.trunc_normal_(E(3), a=2.5, b=3.0)),
    ("trunc_normal_ below", lambda m: m.trunc_normal_(E(3), a=-3.0, b=-2.5)),
    ("trunc_normal_ just within", lambda m: m.trunc_normal_(E(3), a=2.0, b=3.0)),
    ("trunc_normal_ above, empty", lambda m: m.trunc_normal_(E(0), a=2.5, b=3.0)),
]


@pytest.mark.parametrize("call", [pytest.param(call, id=label) for label, call in ODD_BUT_FINE])
def test_what_torch_takes_is_taken_with_its_warnings(call: Callable[[Any], object]) -> None:
    (theirs, expected), (ours, caught) = outcome(lambda: call(THEIRS)), outcome(lambda: call(init))
    assert theirs is None
    assert ours is None
    assert [w.category for w in caught] == [w.category for w in expected]
    # trunc_normal_'s second sentence is ours; the first says what happened.
    assert [str(w.message).split("trunc_normal_.")[0] for w in caught] == [
        str(w.message).split("trunc_normal_.")[0] for w in expected
    ]
    assert all(w.filename == __file__ for w in caught)  # the caller's line


def test_truncation_warning_says_what_the_values_are() -> None:
    with pytest.warns(
        UserWarning, match=r"^mean is more than 2 std from \[a, b\] in nn.init.trunc_normal_\. .* crowds at the nearer"
    ):
        init.trunc_normal_(torch.empty(3), a=5.0, b=6.0)


def listed_differences() -> list[Any]:
    rows = []
    for line in DIFFERENCES.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 4:
            call, theirs, ours, _ = cells
            rows.append(pytest.param(call.strip("`"), theirs, ours, id=call.strip("`")))
    return rows


def under_fake_mode(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(tensor: Tensor) -> Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return function(tensor)

    return call


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize(("call", "theirs", "ours"), listed_differences())
def test_listed_difference(call: str, theirs: str, ours: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    names = {"__name__": __name__, "nan": NAN, "inf": INF, "make_fx": make_fx}
    names |= {"vmap": torch.vmap, "trace": functools.partial(torch.jit.trace, check_trace=False)}
    names |= {n: getattr(torch.func, n) for n in ("functionalize", "grad", "jvp")}
    names |= {"to_functional": torch._to_functional_tensor, "under_fake_mode": under_fake_mode}
    names |= {n: getattr(torch, n) for n in ("empty", "ones", "compile", "channels_last")}
    names |= {n: getattr(torch, n) for n in ("int32", "float16", "bfloat16", "complex64")}
    for module, expected in ((THEIRS, theirs), (init, ours)):
        functions = {n: getattr(module, n) for n in RANDOM}
        raised = outcome(lambda functions=functions: eval(call, names | functions))[0]
        assert ("fills" if raised is None else raised.__name__) == expected


def test_differences_are_listed() -> None:
    assert len(listed_differences()) >= 10


# ---------------------------------------------------------------------------------------------------------------
# In place: the tensor itself, autograd, version counter


@pytest.mark.parametrize("name", [*RANDOM, *CONSTANT])
@pytest.mark.parametrize("parameter", [False, True], ids=["tensor", "parameter"])
def test_returns_the_tensor_itself(name: str, parameter: bool) -> None:
    tensor = torch.full(shape_for(name), NAN)
    if parameter:
        tensor = torch.nn.Parameter(tensor)
    assert fill(name, tensor) is tensor
    assert tensor.isfinite().all()


@pytest.mark.parametrize("name", [*RANDOM, *CONSTANT])
def test_leaf_stays_a_leaf(name: str) -> None:
    tensor = torch.zeros(shape_for(name), requires_grad=True)
    fill(name, tensor)
    assert tensor.is_leaf
    assert tensor.requires_grad
    assert tensor.grad_fn is None
    assert torch.is_grad_enabled()
    (tensor * 3.0).sum().backward()
    assert tensor.grad is not None
    assert (tensor.grad == 3.0).all()


@pytest.mark.parametrize("name", [*RANDOM, *CONSTANT])
def test_version_counter_moves(name: str) -> None:
    saved = torch.ones(shape_for(name), requires_grad=True)
    other = torch.ones(shape_for(name), requires_grad=True)
    product = saved * other
    before = saved._version
    fill(name, saved)
    assert saved._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@every_pointwise
@pytest.mark.parametrize("tensor", [torch.zeros(0, 3), torch.zeros(4, 4, device="meta")], ids=["empty", "meta"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_version_counter_stays_where_nothing_is_written(name: str, tensor: Tensor) -> None:
    before = tensor._version
    fill(name, tensor)
    assert tensor._version == before


@every_random
def test_view_of_a_leaf(name: str) -> None:
    base = torch.zeros(70, 40, requires_grad=True)
    view = base[2:65, 1:38]
    assert fill(name, view, seed=1) is view
    whole = fill(name, torch.empty(63, 37), seed=1)
    assert torch.equal(base.detach()[2:65, 1:38], whole)
    assert base.detach().count_nonzero() == whole.count_nonzero()  # nothing beside the view was written


@every_random
def test_inference_mode(name: str) -> None:
    with torch.inference_mode():
        inside = torch.zeros(63, 37)
        assert fill(name, inside, seed=2) is inside
    normal = torch.zeros(63, 37)
    with torch.inference_mode():
        fill(name, normal, seed=2)
    assert torch.equal(inside, normal)
    assert normal._version > 0
    with pytest.raises(RuntimeError, match="inference"):
        fill(name, inside)


# ---------------------------------------------------------------------------------------------------------------
# Generators and keys


@every_random
def test_generator_is_the_seed(name: str) -> None:
    by_generator = fill(name, torch.empty(63, 37), seed=42)
    torch.manual_seed(42)
    by_default = fill(name, torch.empty(63, 37))
    assert torch.equal(by_generator, by_default)
    assert not torch.equal(fill(name, torch.empty(63, 37)), by_default)
    assert not torch.equal(fill(name, torch.empty(63, 37), seed=43), by_default)


@every_random
def test_one_key_a_call(name: str) -> None:
    generator, reference = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for shape in ((3, 2), (63, 37)):
        fill(name, torch.empty(shape), generator=generator)
        torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=reference)
        assert torch.equal(generator.get_state(), reference.get_state())


@every_random
def test_generator_leaves_the_default_one_alone(name: str) -> None:
    before = torch.get_rng_state()
    fill(name, torch.empty(63, 37), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@every_random
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_elements_no_draw(name: str, shape: tuple[int, ...]) -> None:
    before = torch.get_rng_state()
    tensor = torch.empty(shape)
    assert fill(name, tensor) is tensor
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", CONSTANT)
def test_constants_draw_nothing(name: str) -> None:
    before = torch.get_rng_state()
    fill(name, torch.empty(shape_for(name)))
    assert torch.equal(torch.get_rng_state(), before)


@every_random
def test_device_context_does_not_matter(name: str) -> None:
    tensor = torch.empty(63, 37)
    with torch.device("meta"):
        assert fill(name, tensor, seed=4) is tensor
        assert tensor.device.type == "cpu"
    assert torch.equal(tensor, fill(name, torch.empty(63, 37), seed=4))


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


ODD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda t: t[:1, :1].expand(t.shape),
    "inference": inference,
    **{str(d): lambda t, d=d: t.to(d) for d in (torch.int32, torch.uint16, torch.bool, torch.float8_e4m3fn)},
    **{str(d): lambda t, d=d: t.to(d) for d in (torch.complex32, torch.complex64, torch.float16)},
    "conj": lambda t: t.to(torch.complex32).conj(),
    "neg": lambda t: t.to(torch.complex64).conj().imag,
    "csr": lambda t: t.to_sparse_csr(),
    "coo": lambda t: t.to_sparse(),
}


def writes_before_it_refuses(module: Any, name: str, odd: str, shape: tuple[int, ...]) -> bool:
    """Whether the function raises for this tensor, and has written to it."""
    tensor = ODD_TENSORS[odd](torch.full(shape, 7.0))
    before = tensor.clone()
    with contextlib.suppress(TypeError):  # some dtypes have no == of their own
        if outcome(lambda: getattr(module, name)(tensor, **(RANDOM | CONSTANT)[name]))[0] is None:
            return False
    a, b = ((t.to_dense() if t.is_sparse or t.is_sparse_csr else t).to(torch.complex64) for t in (tensor, before))
    return not torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:Sparse CSR tensor support")
@every_random
@pytest.mark.parametrize("odd", ODD_TENSORS)
def test_refused_call_writes_nothing(name: str, odd: str) -> None:
    assert not writes_before_it_refuses(init, name, odd, (4, 4))


@pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:Sparse CSR tensor support")
def test_what_torch_writes_before_it_refuses() -> None:
    """docs/init.md says where: the constants are torch's own functions."""
    wrote = {
        (name, odd)
        for name in CONSTANT
        for odd in ODD_TENSORS
        if (name, odd) != ("dirac_", "csr")  # which has two dimensions
        and writes_before_it_refuses(init, name, odd, (4, 4, 3) if name == "dirac_" else (4, 4))
    }
    wrote -= {("eye_", "torch.complex32"), ("eye_", "torch.uint16"), ("dirac_", "coo")}
    assert wrote == {(name, "inference") for name in CONSTANT}


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64])
@pytest.mark.parametrize("conjugate", [False, True])
def test_sparse_of_complex_numbers(dtype: torch.dtype, conjugate: bool) -> None:
    tensor = torch.ones(8, 5, dtype=dtype)
    fill("sparse_", tensor.conj() if conjugate else tensor, seed=3)
    zeros = torch.view_as_real(tensor).eq(0).all(-1)
    assert torch.equal(zeros, fill("sparse_", torch.ones(8, 5), seed=3) == 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", [*RANDOM, "constant_"])
def test_a_dual_tensor_loses_its_tangent(name: str) -> None:
    """What is drawn depends on no input: torch's functions set the tangent to zero."""
    for module in (THEIRS, init):
        with forward_ad.dual_level():
            tensor = forward_ad.make_dual(torch.ones(4, 4), torch.ones(4, 4))
            getattr(module, name)(tensor, **(RANDOM | CONSTANT)[name])
            tangent = forward_ad.unpack_dual(tensor).tangent
            assert tangent is None or not tangent.any()


# ---------------------------------------------------------------------------------------------------------------
# Tensors without values, and wrappers


@every_random
def test_meta(name: str) -> None:
    before = torch.get_rng_state()
    tensor = torch.empty(63, 37, device="meta")
    assert fill(name, tensor) is tensor
    assert torch.equal(torch.get_rng_state(), before)


@every_random
def test_fake(name: str) -> None:
    before = torch.get_rng_state()
    with FakeTensorMode():
        layer = torch.nn.Linear(37, 63)
        assert fill(name, layer.weight) is layer.weight
        with pytest.raises(RuntimeError, match="std"):
            init.normal_(layer.weight, std=-1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def shards() -> Iterator[Callable[[Tensor], Tensor]]:
    """Makes a DTensor of a tensor, sharded over two ranks of which this process is the first."""
    distributed = pytest.importorskip("torch.distributed.tensor")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    mesh = distributed.DeviceMesh("cpu", [0, 1])
    yield lambda tensor: distributed.distribute_tensor(tensor, mesh, [distributed.Shard(0)])
    torch.distributed.destroy_process_group()


def test_dtensor_is_filled_in_part(shards: Callable[[Tensor], Tensor]) -> None:
    """More on real ranks: tests/distributed/scenarios/filling.py."""
    weight = torch.nn.Parameter(shards(torch.ones(63, 37)))
    before = torch.get_rng_state()
    for name in POINTWISE:
        torch.set_rng_state(before)
        assert fill(name, weight) is weight
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        whole = fill(name, torch.ones(63, 37))
        assert torch.equal(weight.to_local(), whole[:32]), name
        assert torch.equal(torch.get_rng_state(), after)  # one key, whatever the rank holds
    for name in ("orthogonal_", "sparse_"):
        with pytest.raises(NotImplementedError, match=r"needs the whole matrix.*distribute_tensor"):
            fill(name, weight)
    assert torch.equal(torch.get_rng_state(), after)


def test_dtensor_on_meta_passes_through(shards: Callable[[Tensor], Tensor]) -> None:
    weight = shards(torch.empty(64, 37, device="meta"))
    for name in RANDOM:
        assert fill(name, weight) is weight


class Wrapper(torch.Tensor):
    """A wrapper whose own storage is not its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("nothing should reach the wrapper")


@every_random
def test_wrapper_is_refused(name: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match="Wrapper, a wrapper around other tensors"):
        fill(name, Wrapper(torch.ones(4, 4)))
    assert torch.equal(torch.get_rng_state(), before)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], object]]] = {
    "vmap": torch.vmap,
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "functionalize": torch.func.functionalize,
}


@every_random
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed_tensor_is_refused(name: str, transform: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match=r"torch\.func transform"):
        TRANSFORMS[transform](lambda x: fill(name, x * 2.0))(torch.ones((2, 4, 4) if transform == "vmap" else (4, 4)))
    assert torch.equal(torch.get_rng_state(), before)


@every_random
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_traced_call_is_refused(name: str, mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    before = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match=r"recorded by torch\.export or make_fx"):
        make_fx(lambda x: fill(name, x * 2.0), tracing_mode=mode)(torch.ones(4, 4))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------
# __torch_function__


class Recorder(torch.Tensor):
    """Notes each function that reaches it, then does what a tensor does."""

    seen: list[tuple[Any, dict[str, Any]]] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append((func, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("name", [*RANDOM, "constant_"])
def test_subclass_dispatch(name: str) -> None:
    tensor = torch.zeros(63, 37).as_subclass(Recorder)
    Recorder.seen.clear()
    assert fill(name, tensor) is tensor
    dispatched = [(func, kwargs) for func, kwargs in Recorder.seen if func is getattr(init, name)]
    assert len(dispatched) == (name in DISPATCHING)
    if name in DISPATCHING:
        signature = inspect.signature(getattr(init, name))
        assert list(dispatched[0][1]) == list(signature.parameters)  # every argument, by name
        assert dispatched[0][1]["tensor"] is tensor
    plain = tensor.as_subclass(torch.Tensor)
    torch.manual_seed(11)
    fill(name, tensor)
    torch.manual_seed(11)
    assert torch.equal(plain, fill(name, torch.empty(63, 37)))


def test_subclass_may_take_over() -> None:
    class Taker:
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func, kwargs

    taker = Taker()
    for name in DISPATCHING:
        func, kwargs = fill(name, taker)
        assert func is getattr(init, name)
        assert kwargs["tensor"] is taker


def test_mode_sees_the_call() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for name in DISPATCHING:
        seen: list[Any] = []
        tensor = torch.zeros(4, 4)
        with Mode():
            assert fill(name, tensor) is tensor
        assert seen[0] is getattr(init, name)


@pytest.mark.parametrize("name", sorted(set(RANDOM) - set(DISPATCHING)))
def test_sampling_methods_are_not_called(name: str) -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (Tensor.normal_, Tensor.uniform_)
            return func(*args, **(kwargs or {}))

    with Mode():
        fill(name, torch.zeros(4, 4))


# ---------------------------------------------------------------------------------------------------------------
# Ranks that differ by their CUDA seed alone


class OnCuda(torch.Tensor):
    """A CPU tensor that says it lies on the first GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda:0")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretends a world size and a CUDA seed, and lets fills of OnCuda tensors go nowhere."""

    def pretend(world_size: int, cuda_seed: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator().manual_seed(cuda_seed),))
        monkeypatch.setattr(init, "fill_", lambda draws: None)

    return pretend


def test_rank_seeds_that_differ_are_refused(ranks: Callable[[int, int], None]) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    ranks(2, 8)
    tensor = torch.ones(4, 4).as_subclass(OnCuda)
    for name in POINTWISE:
        with pytest.raises(RuntimeError, match=r"CUDA seed of cuda:0 is 8, the CPU seed 7.* 2 ranks.*generator="):
            fill(name, tensor)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world_size", "cuda_seed"), [(2, 7), (1, 8)], ids=["equal seeds", "one rank"])
def test_rank_seeds_that_are_fine(ranks: Callable[[int, int], None], world_size: int, cuda_seed: int) -> None:
    torch.manual_seed(7)
    ranks(world_size, cuda_seed)
    tensor = torch.ones(4, 4).as_subclass(OnCuda)
    assert init.normal_(tensor) is tensor


def test_rank_seeds_with_a_way_out(ranks: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    ranks(2, 8)
    init.normal_(torch.ones(4, 4).as_subclass(OnCuda), generator=torch.default_generator)
    init.normal_(torch.ones(0, 4).as_subclass(OnCuda))  # nothing to draw
    init.normal_(torch.ones(4, 4))  # not on CUDA
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # no CUDA seed to look at
    init.normal_(torch.ones(4, 4).as_subclass(OnCuda))


# ---------------------------------------------------------------------------------------------------------------
# torch.compile, imports


@every_random
def test_compiled_caller(name: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def step(x: Tensor, scale: float) -> Tensor:
        weight = torch.zeros(63, 37) * scale
        fill(name, weight)
        return weight * x

    for seed in range(4):
        torch.manual_seed(seed)
        got = step(torch.full((63, 37), 2.0), 1.0 + seed)
        torch.manual_seed(seed)
        assert torch.equal(got, fill(name, torch.empty(63, 37)) * 2.0)
    # The sampling stays out of the graphs, and what is around it is compiled once, or once more for dynamic scales.
    assert 1 <= counter.frame_count <= 4


def test_import_is_light() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import initlab.init; initlab.init.normal_(torch.empty(0));"
        "heavy = ('torch._dynamo', 'torch.distributed.tensor', 'torch.fx.experimental.proxy_tensor', 'scipy');"
        "sys.exit(', '.join(m for m in set(sys.modules) - before if m.startswith(heavy)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------------
# Values


@every_random
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(name: str, dtype: torch.dtype) -> None:
    whole = fill(name, torch.empty(63, 37, dtype=dtype), seed=6)
    padded = torch.full((130, 80), NAN, dtype=dtype)
    layouts = {
        "transposed": torch.empty(37, 63, dtype=dtype).t(),
        "strided": padded[3:129:2, 1:75:2],
        "sliced": torch.full((70, 40), NAN, dtype=dtype)[5:68, 2:39],
    }
    for layout, tensor in layouts.items():
        assert torch.equal(fill(name, tensor, seed=6), whole), layout
    assert padded.isfinite().sum() == 63 * 37  # the gaps are untouched


@pytest.mark.parametrize("name", [*POINTWISE, "orthogonal_"])
def test_channels_last(name: str) -> None:
    whole = fill(name, torch.empty(6, 5, 3, 3), seed=6)
    last = torch.empty(6, 5, 3, 3, memory_format=torch.channels_last)
    assert torch.equal(fill(name, last, seed=6), whole)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["normal_", "trunc_normal_", "xavier_normal_", "kaiming_normal_", "orthogonal_", "sparse_"]
)
def test_half_precision_is_the_rounding(name: str, dtype: torch.dtype) -> None:
    single = fill(name, torch.empty(63, 37), seed=8)
    assert torch.equal(fill(name, torch.empty(63, 37, dtype=dtype), seed=8), single.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_uniform_stays_below_b(dtype: torch.dtype) -> None:
    single = init.uniform_(torch.empty(100_000), generator=torch.Generator().manual_seed(8))
    half = init.uniform_(torch.empty(100_000, dtype=dtype), generator=torch.Generator().manual_seed(8))
    top = 1.0 - torch.finfo(dtype).eps / 2
    assert single.to(dtype).max() == 1.0  # what rounding alone would give
    assert torch.equal(half, single.to(dtype).clamp(max=top))


@every_pointwise
def test_double_precision_agrees(name: str) -> None:
    single, double = (fill(name, torch.empty(63, 37, dtype=d), seed=8) for d in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), single, rtol=3e-7, atol=3e-7)
    if not name.endswith("uniform_"):
        assert not torch.equal(double, double.float().double())


@pytest.mark.parametrize(("dtype", "real"), [(torch.complex64, torch.float32), (torch.complex128, torch.float64)])
def test_complex_normal(dtype: torch.dtype, real: torch.dtype) -> None:
    tensor = init.normal_(torch.empty(200, 100, dtype=dtype), std=3.0, generator=torch.Generator().manual_seed(1))
    parts = torch.empty(200, 100, 2, dtype=real)
    init.normal_(parts, std=3.0 / math.sqrt(2.0), generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.view_as_real(tensor), parts)
    assert tensor.abs().square().mean().item() == pytest.approx(9.0, rel=0.05)


@pytest.mark.parametrize(("dtype", "real"), [(torch.complex64, torch.float32), (torch.complex128, torch.float64)])
def test_complex_uniform(dtype: torch.dtype, real: torch.dtype) -> None:
    tensor = fill("uniform_", torch.empty(63, 37, dtype=dtype), seed=1)
    assert torch.equal(torch.view_as_real(tensor), fill("uniform_", torch.empty(63, 37, 2, dtype=real), seed=1))


def symmetric(bound: float) -> Any:
    return stats.uniform(-bound, 2.0 * bound)


KS_CASES: list[tuple[str, tuple[int, ...], dict[str, Any], Any]] = [
    ("uniform_", (30_011,), {"a": -1.3, "b": 2.6}, stats.uniform(-1.3, 3.9)),
    ("uniform_", (31, 33, 5, 7), {}, stats.uniform()),
    ("normal_", (30_011,), {"mean": -0.7, "std": 2.3}, stats.norm(-0.7, 2.3)),
    ("normal_", (31, 33, 5, 7), {}, stats.norm()),
    ("trunc_normal_", (30_011,), {}, stats.truncnorm(-2, 2)),
    ("trunc_normal_", (173, 181), {"mean": 1, "std": 0.5, "a": 0.9, "b": 3.0}, stats.truncnorm(-0.2, 4, 1, 0.5)),
    ("trunc_normal_", (173, 181), {"a": 2.0, "b": 3.0}, stats.truncnorm(2, 3)),
    ("trunc_normal_", (173, 181), {"a": 0.0, "b": INF}, stats.truncnorm(0, INF)),
    ("xavier_uniform_", (150, 210), {"gain": 1.7}, symmetric(1.7 * math.sqrt(6 / 360))),
    ("xavier_uniform_", (24, 22, 7, 9), {}, symmetric(math.sqrt(6 / 2898))),
    ("xavier_normal_", (150, 210), {"gain": 1.7}, stats.norm(0, 1.7 * math.sqrt(2 / 360))),
    ("xavier_normal_", (24, 22, 7, 9), {}, stats.norm(0, math.sqrt(2 / 2898))),
    ("kaiming_uniform_", (150, 210), {"a": 0.3}, symmetric(math.sqrt(6 / 1.09 / 210))),
    ("kaiming_uniform_", (24, 22, 7, 9), {"mode": "fan_out"}, symmetric(math.sqrt(6 / 1512))),
    ("kaiming_normal_", (150, 210), {"a": 0.3, "mode": "fan_out"}, stats.norm(0, math.sqrt(2 / 1.09 / 150))),
    ("kaiming_normal_", (24, 22, 7, 9), {"nonlinearity": "tanh"}, stats.norm(0, 5 / 3 / math.sqrt(1386))),
]


@pytest.mark.parametrize(("name", "shape", "arguments", "distribution"), KS_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distribution(
    name: str, shape: tuple[int, ...], arguments: dict[str, Any], distribution: Any, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(20)
    values = getattr(init, name)(torch.full(shape, NAN, dtype=dtype), **arguments, generator=generator)
    assert stats.kstest(values.flatten().numpy(), distribution.cdf).pvalue > 1e-3
    low, high = distribution.support()
    assert low - 1e-6 <= values.min() <= values.max() <= high + 1e-6
    correlation = torch.corrcoef(torch.stack((values.flatten()[1:], values.flatten()[:-1])))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(values.numel())


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "distribution"), [case for case in KS_CASES if case[0][0] in "xk"]
)
def test_fans_and_gains(name: str, shape: tuple[int, ...], arguments: dict[str, Any], distribution: Any) -> None:
    scaled = getattr(init, name)(torch.empty(shape), **arguments, generator=torch.Generator().manual_seed(3))
    base, parameters = (
        (init.uniform_, distribution.support()) if "uniform" in name else (init.normal_, (0.0, distribution.std()))
    )
    expected = base(torch.empty(shape), *parameters, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
def test_distribution_far_from_the_mean() -> None:
    values = init.trunc_normal_(torch.empty(30_011), a=5.0, b=INF, generator=torch.Generator().manual_seed(1))
    assert values.min() >= 5.0
    assert stats.kstest(values.double().numpy(), stats.truncnorm(5, INF).cdf).pvalue > 1e-3


# ---------------------------------------------------------------------------------------------------------------
# orthogonal_


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).double()


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (5, 5), (1, 6), (6, 1), (20, 2, 3, 4), (2, 3, 4, 5), (64, 129)])
@pytest.mark.parametrize("gain", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_orthogonal(shape: tuple[int, ...], gain: float, dtype: torch.dtype) -> None:
    w = flat(init.orthogonal_(torch.full(shape, NAN, dtype=dtype), gain, generator=torch.Generator().manual_seed(3)))
    gram = w @ w.T if w.size(0) <= w.size(1) else w.T @ w
    # One rounding of each entry: rows of length <= 1 change by eps / 2 at most, a product of two by eps.
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    assert (gram / gain**2 - torch.eye(len(gram))).abs().max() < tolerance


@pytest.mark.parametrize("shape", [(40, 23), (23, 40), (31, 31)])
def test_orthogonal_is_the_closed_form(shape: tuple[int, int]) -> None:
    # Q of A = QR with a positive diagonal in R is A L^-T, L the Cholesky factor of A^T A.
    a = init.normal_(torch.empty(shape, dtype=torch.float64), generator=torch.Generator().manual_seed(9))
    tall = a if shape[0] >= shape[1] else a.T
    q = torch.linalg.solve_triangular(torch.linalg.cholesky(tall.T @ tall), tall.T, upper=False).T
    expected = 1.5 * (q if shape[0] >= shape[1] else q.T)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        w = init.orthogonal_(torch.empty(shape, dtype=dtype), 1.5, generator=torch.Generator().manual_seed(9))
        assert (w.double() - expected).abs().max() < tolerance


def test_orthogonal_is_uniform() -> None:
    # Over O(3) the trace has mean 0 and mean square 1; QR's own signs would bias every diagonal entry.
    generator = torch.Generator().manual_seed(4)
    traces = torch.stack([init.orthogonal_(torch.empty(3, 3), generator=generator).trace() for _ in range(1500)])
    assert abs(traces.mean()) < 0.1
    assert traces.square().mean().item() == pytest.approx(1.0, abs=0.12)


def test_orthogonal_complex() -> None:
    w = init.orthogonal_(torch.empty(6, 11, dtype=torch.complex128), 0.5)
    assert torch.allclose(w @ w.mH, 0.25 * torch.eye(6, dtype=torch.complex128))


# ---------------------------------------------------------------------------------------------------------------
# sparse_


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(63, 37), (1, 4), (5, 1), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_sparse_zeros_in_each_column(sparsity: float, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = init.sparse_(torch.full(shape, NAN, dtype=dtype), sparsity, generator=torch.Generator().manual_seed(1))
    assert ((w == 0).sum(dim=0) == math.ceil(sparsity * shape[0])).all()


def test_sparse_is_normal_where_it_is_not_zero() -> None:
    w = init.sparse_(torch.empty(201, 301), 0.3, std=0.2, generator=torch.Generator().manual_seed(1))
    dense = init.normal_(torch.empty(201, 301), std=0.2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(w, dense * (w != 0))
    # The places must not depend on the values they hide: what is left has the same distribution as what is gone.
    assert stats.ks_2samp(dense[w == 0].numpy(), dense[w != 0].numpy()).pvalue > 1e-3


def test_sparse_places_are_uniform() -> None:
    rows, cols, zeros = 20, 30_000, 5
    w = init.sparse_(torch.empty(rows, cols), zeros / rows, generator=torch.Generator().manual_seed(2))
    mask = (w == 0).double()
    counts = mask.sum(dim=1).numpy()
    # Zeros of a column exclude each other, so counts vary by (1 - zeros / rows) * rows / (rows - 1) less than chi2's.
    spread = (counts - cols * zeros / rows) / math.sqrt(cols * zeros / rows * (1 - zeros / rows) * rows / (rows - 1))
    assert stats.chi2.sf((spread**2).sum(), rows - 1) > 1e-3
    pairs = (mask @ mask.T)[~torch.eye(rows, dtype=torch.bool)]
    expected = cols * zeros * (zeros - 1) / (rows * (rows - 1))
    assert (pairs - expected).abs().max() < 5 * math.sqrt(expected)
    repeats = (mask[:, 1:] == mask[:, :-1]).all(dim=0).double().mean()
    assert repeats.item() == pytest.approx(1 / math.comb(rows, zeros), abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_sparse_places_are_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    single, other = (fill("sparse_", torch.empty(63, 37, dtype=d), seed=5) for d in (torch.float32, dtype))
    assert torch.equal(single == 0, other == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("shape", [(63, 37), (2, 3), (1, 1)])
def test_sparse_places_and_values_share_no_words(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(init, "fill_", drawn.extend)
    init.sparse_(torch.empty(shape, dtype=dtype), 0.5)
    values, places = drawn
    assert values.key == places.key
    first = places.region.offsets[0] * places.region.shape[1]  # element of the stream, as offsets[1] == 0
    assert places.region.offsets[1] == 0
    assert first % 4 == 0  # a block of its own
    assert first >= values.tensor.numel() * (2 if dtype.is_complex else 1)
