import copy
import math
import pickle
import threading
import warnings
from collections.abc import Callable

import numpy
import pytest
import torch
from initlab.kernels import Constant, Normal, TruncatedNormal, Uniform
from torch import nn

import initlab
from initlab._init_draws import observers
from initlab.models.patches import INIT_PATCHES, sinks
from initlab.models.specs import DimSlice

DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


def timms_trunc_normal_(tensor: torch.Tensor, std: float) -> torch.Tensor:
    """As timm has it: a uniform, mapped by the inverse error function."""
    with torch.no_grad():
        low, high = ((1.0 + math.erf(x / std / math.sqrt(2.0))) / 2.0 for x in (-2.0, 2.0))
        tensor.uniform_(2 * low - 1, 2 * high - 1)
        tensor.erfinv_()
        tensor.mul_(std * math.sqrt(2.0))
        tensor.add_(0.0)
        return tensor.clamp_(min=-2.0, max=2.0)


class One(nn.Module):
    """A module with one parameter, made by a function."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        made = make()
        self.weight = made if isinstance(made, nn.Parameter) else nn.Parameter(made)


def record(build: Callable[[], nn.Module], device: str = "cpu") -> tuple[initlab.BuildRecord, nn.Module]:
    with initlab.record_build() as made, torch.device(device):
        model = build()
    return made, model


def row_of(make: Callable[[], torch.Tensor], device: str) -> initlab.Row:
    made, model = record(lambda: One(make), device)
    return initlab.plan_model(model, 0, made).rows[0]


def filled(function: Callable[..., object], *args: object, **kwargs: object) -> torch.Tensor:
    """An empty matrix with a function called on it."""
    tensor = torch.empty(6, 4)
    function(tensor, *args, **kwargs)
    return tensor


def after(tensor: torch.Tensor, *steps: Callable[[torch.Tensor], object]) -> torch.Tensor:
    for step in steps:
        step(tensor)
    return tensor


@DEVICES
@pytest.mark.parametrize(
    ("make", "distribution"),
    [
        (lambda: torch.randn(8) * 0.02, Normal(0.0, 0.02)),
        (lambda: 0.02 * torch.randn(8) + 1, Normal(1.0, 0.02)),
        (lambda: torch.randn(8).mul(0.5).sub(1.0).neg(), Normal(1.0, 0.5)),
        (lambda: torch.rand(8) * 2 - 1, Uniform(-1.0, 1.0)),
        (lambda: 1 - torch.rand(8) / 2, Uniform(0.5, 1.0)),
        (lambda: torch.rand(8) * (torch.ones(8) * 4), Uniform(0.0, 4.0)),
        (lambda: torch.randn_like(torch.empty(8)), Normal(0.0, 1.0)),
        (lambda: torch.normal(1.0, 2.0, (8,)), Normal(1.0, 2.0)),
        (lambda: torch.normal(torch.zeros(8), torch.ones(8)), Normal(0.0, 1.0)),
        (lambda: torch.normal(torch.zeros(8), 0.5), Normal(0.0, 0.5)),
        (lambda: torch.zeros(8), Constant(0.0)),
        (lambda: torch.ones(8) * 1e-6, Constant(torch.tensor(1e-6).item())),
        (lambda: torch.full((8,), 2.0).log(), Constant(torch.tensor(2.0).log().item())),
        (lambda: torch.tensor(2.5), Constant(2.5)),
        (lambda: torch.tensor([0.5, 0.5]), Constant(0.5)),
        (lambda: torch.ones([]) * math.log(2), Constant(torch.tensor(math.log(2)).item())),
        (lambda: torch.cat([torch.zeros(2), torch.zeros(2)]), Constant(0.0)),
        (lambda: torch.randn(4, 2).t().contiguous(), Normal(0.0, 1.0)),
        (lambda: torch.randn(8).bfloat16(), Normal(0.0, 1.0)),
        (lambda: filled(nn.init.normal_, std=0.02), Normal(0.0, 0.02)),
        (lambda: filled(nn.init.xavier_uniform_), Uniform(-math.sqrt(0.6), math.sqrt(0.6))),
        (lambda: filled(nn.init.trunc_normal_, std=0.02), TruncatedNormal(0.0, 0.02)),
        (lambda: filled(nn.init.constant_, 3.0), Constant(3.0)),
        (lambda: filled(initlab.init.normal_, 0.0, 0.3), Normal(0.0, 0.3)),
        (lambda: filled(initlab.init.trunc_normal_, 0.0, 0.3), TruncatedNormal(0.0, 0.3)),
        (lambda: after(torch.empty(8), lambda t: t.uniform_(-1, 1), lambda t: t.mul_(3)), Uniform(-3.0, 3.0)),
        (lambda: after(torch.randn(8), lambda t: t.data.zero_()), Constant(0.0)),
        (lambda: after(nn.Parameter(torch.zeros(8)), lambda p: p.data.normal_(0, 2)), Normal(0.0, 2.0)),
        (lambda: after(nn.Parameter(torch.zeros(8)), lambda p: setattr(p, "data", torch.rand(8))), Uniform(0.0, 1.0)),
        (lambda: after(torch.zeros(4, 2), lambda t: t.view(-1).uniform_()), Uniform(0.0, 1.0)),
        (lambda: after(torch.zeros(4, 2), lambda t: t.copy_(torch.randn(4, 2) * 2)), Normal(0.0, 2.0)),
        (lambda: after(torch.zeros(4), lambda t: t.copy_(torch.ones(1))), Constant(1.0)),
        (lambda: after(torch.zeros(4), lambda t: t.__setitem__(slice(None), 2.0)), Constant(2.0)),
        (lambda: torch.empty(2, 4).normal_(std=2.0)[1:], Normal(0.0, 2.0)),
    ],
)
def test_distributions(make, distribution, device):
    found = row_of(make, device)
    assert found.slices == ()
    assert type(found.distribution) is type(distribution)
    for name in distribution.__dataclass_fields__:
        assert getattr(found.distribution, name) == pytest.approx(
            getattr(distribution, name), rel=1e-12 if found.fan or found.key else 1e-7
        )


@DEVICES
def test_truncation_by_timm(device):
    found = row_of(lambda: timms_trunc_normal_(torch.empty(8), 0.02), device).distribution
    assert isinstance(found, TruncatedNormal)
    assert found.std == pytest.approx(0.02)


@DEVICES
def test_slices(device):
    def three() -> torch.Tensor:
        weight = torch.empty(6, 4)
        nn.init.normal_(weight[:2])
        nn.init.zeros_(weight[2:4])
        weight[4:].uniform_()
        weight[:2].mul_(0.5)
        return weight

    found = row_of(three, device)
    assert dict(found.slices) == {
        DimSlice(0, 0, 2): Normal(0.0, 0.5),
        DimSlice(0, 2, 2): Constant(0.0),
        DimSlice(0, 4, 2): Uniform(0.0, 1.0),
    }
    joined = row_of(lambda: torch.cat([torch.zeros(2, 3), torch.randn(1, 3)]), device)
    assert dict(joined.slices) == {DimSlice(0, 0, 2): Constant(0.0), DimSlice(0, 2, 1): Normal(0.0, 1.0)}
    columns = row_of(
        lambda: after(torch.zeros(4, 4), lambda t: t[:, 1:3].normal_(), lambda t: t[:, 3].fill_(1)), device
    )
    assert dict(columns.slices) == {DimSlice(1, 1, 2): Normal(0.0, 1.0), DimSlice(1, 3, 1): Constant(1.0)}


@DEVICES
def test_pieces_of_one_distribution(device):
    """A fused query, key and value, as torchtitan fills it: for each of two groups of heads three pieces."""

    def fused(scale: float) -> torch.Tensor:
        weight = torch.empty(2 * 4 * 3, 5)
        view = weight.view(2, 4, 3, 5)
        for start, end, std in ((0, 2, 0.02), (2, 3, 0.02 * scale), (3, 4, 0.02)):
            view[:, start:end].copy_(torch.empty(2, end - start, 3, 5).normal_(std=std))
        return weight

    assert row_of(lambda: fused(1.0), device).distribution == Normal(0.0, 0.02)
    computed = row_of(lambda: fused(2.0), device)
    assert (computed.distribution, computed.source) == (None, "computed")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(fused(1.0))
            self.b = nn.Parameter(self.a.detach().clone())

    made, model = record(Two, device)
    initlab.init_model_(model, 0, made, device="cpu")
    assert torch.equal(model.a, model.b)


@DEVICES
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.empty(8), "nothing was written"),
        (lambda: torch.empty(8) * 2, "nothing wrote it"),
        (lambda: after(torch.empty(8), lambda t: t[:4].zero_()), "writes only a part"),
        (lambda: after(torch.empty(8), lambda t: t[:4].copy_(torch.arange(4))), "only a part"),
        (
            lambda: after(torch.zeros(9), lambda t: t.copy_(torch.tensor(numpy.random.rand(9)))),
            "Python or NumPy have drawn",
        ),
    ],
)
def test_refusals(make, reason, device):
    made, model = record(lambda: One(make), device)
    with pytest.raises(ValueError, match=f"weight .in One.: .*({reason})"):
        initlab.init_model_(model, 0, made, device="cpu")


ORTHOGONAL, SPARSE = nn.init.orthogonal_, nn.init.sparse_  # as a library imports them by name


class Late(nn.Module):
    """Starts in many places: constructors, reset_parameters, init_weights, a parameter replaced, a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4, padding_idx=0)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.gamma = nn.Parameter(torch.ones(4) * 1e-5)
        self.scale = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("noise", torch.randn(4))
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.normal_(self.conv.weight, std=0.02)
        nn.init.zeros_(self.norm.weight)
        self.conv.bias.data.fill_(0.5)


@DEVICES
def test_a_model(device):
    made, model = record(Late, device)
    report = initlab.init_model_(model, 0, made, device="cpu")
    rows = {row.name: row for row in report.rows}
    assert rows["embedding.weight"].aliases == ("head.weight",)
    assert rows["embedding.weight"].slices == ((DimSlice(0, 0, 1), Constant(0.0)),)
    assert rows["conv.weight"].distribution == Normal(0.0, 0.02)
    assert rows["conv.weight"].why == "Late.init_weights"
    assert rows["scale"].distribution == Uniform(0.0, 1.0)
    assert rows["noise"].distribution == Normal(0.0, 1.0)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.norm.weight, torch.zeros(4))
    assert torch.equal(model.norm.running_var, torch.ones(4))
    assert torch.equal(model.conv.bias, torch.full((4,), 0.5))
    assert torch.equal(model.table, torch.arange(4.0))
    assert not any(row.guess for row in report.rows)


def test_torchs_layers_start_as_by_the_recipe_torch():
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 3), nn.Conv2d(2, 4, 3, groups=2), nn.LSTM(3, 4), nn.MultiheadAttention(4, 2), nn.PReLU()
        )

    made, model = record(build, "meta")
    recorded = initlab.init_model_(model, 3, made, device="cpu")
    known = build()
    report = initlab.init_model_(known, 3)
    assert initlab.model_digest(model) == initlab.model_digest(known)
    assert recorded.rows[0].fan == report.rows[0].fan == 4


@DEVICES
def test_building_is_not_changed(device):
    def build() -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(5)
        with torch.device(device):
            model = nn.Sequential(Late(), One(lambda: filled(nn.init.trunc_normal_)), nn.Linear(2, 2))
        return model, torch.get_rng_state()

    plain, state = build()
    with initlab.record_build():
        watched, watched_state = build()
    assert torch.equal(state, watched_state)
    for (name, a), (other, b) in zip(plain.state_dict().items(), watched.state_dict().items(), strict=True):
        assert name == other
        assert a.is_meta == b.is_meta
        assert a.is_meta or torch.equal(a, b)


def test_the_record_serves_what_becomes_of_the_model():
    made, model = record(Late, "meta")
    wanted = copy.deepcopy(model)
    initlab.init_model_(wanted, 1, made, device="cpu")
    digest = initlab.model_digest(wanted)
    emptied = model.to_empty(device="cpu")
    emptied.head.weight = emptied.embedding.weight  # to_empty unties
    for other in (
        emptied,
        copy.deepcopy(model).to(torch.float64).float(),
        nn.DataParallel(model),
        pickle.loads(pickle.dumps(model)),
    ):
        initlab.init_model_(other, 1, made)
        assert initlab.model_digest(other) == digest
    initlab.init_model_(copied := copy.deepcopy(model), 1, pickle.loads(pickle.dumps(made)))
    assert initlab.model_digest(copied) == digest
    inner = copy.deepcopy(model.conv)
    initlab.init_model_(inner, 1, made, names="conv")
    assert torch.equal(inner.weight, model.conv.weight)
    outer = nn.ModuleDict({"body": model, "new": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"new.weight .in Linear.: it was made outside the recorded build"):
        initlab.init_model_(outer, 1, made)
    with pytest.raises(ValueError, match="made outside the recorded build"):  # no other rule fills them either
        initlab.init_model_(outer, 1, {"*": made})
    report = initlab.init_model_(outer, 1, {"new": "he", "*": made})
    assert {row.name: row.distribution for row in report.rows}["body.scale"] == Uniform(0.0, 1.0)


@DEVICES
def test_copies_start_equal(device):
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        model.teacher = nn.Linear(8, 8)
        model.student = nn.Linear(8, 8)
        model.student.load_state_dict(model.teacher.state_dict())
        return model

    made, model = record(build, device)
    initlab.init_model_(model, 0, made, device="cpu")
    assert torch.equal(model.layers[0].linear1.weight, model.layers[1].linear1.weight)
    assert not torch.equal(model.layers[0].linear1.weight, model.layers[0].linear2.weight.t())
    assert torch.equal(model.teacher.weight, model.student.weight)
    alone = copy.deepcopy(model)
    initlab.init_model_(alone, 0, made, only="layers.1")
    assert torch.equal(alone.layers[1].linear1.weight, model.layers[0].linear1.weight)


@DEVICES
def test_numbers_that_are_shared(device):
    class Shared(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            whole = torch.randn(6, 3)
            if how == "parts":
                self.q, self.k, self.v = (nn.Parameter(part.clone()) for part in whole.chunk(3))
            elif how == "views":
                self.q, self.k = nn.Parameter(whole[:3]), nn.Parameter(whole[3:])
            elif how == "negative":
                self.q, self.k = nn.Parameter(whole.clone()), nn.Parameter(-whole)
            elif how == "turned":
                square = torch.randn(3, 3)
                self.q, self.k = nn.Parameter(square.clone()), nn.Parameter(square.t().clone().contiguous())
            elif how == "transposed":
                self.q, self.k = nn.Parameter(whole[:3].clone()), nn.Parameter(whole[:3].t().contiguous())
            else:
                self.q, self.k = nn.Parameter(whole[:4].clone()), nn.Parameter(whole[2:].clone())

    for how in ("parts", "views"):
        made, model = record(lambda how=how: Shared(how), device)
        initlab.init_model_(model, 0, made, device="cpu")
        assert not torch.equal(model.q, model.k)
    for how, same in (
        ("negative", lambda q, k: torch.equal(q, -k)),
        ("turned", lambda q, k: torch.equal(q, k.t())),
        ("transposed", lambda q, k: torch.equal(q, k.t())),
        ("overlapping", lambda q, k: torch.equal(q[2:], k[:2])),
    ):
        made, model = record(lambda how=how: Shared(how), device)
        initlab.init_model_(model, 0, made, device="cpu")
        assert same(model.q, model.k)
        k = model.k.detach().clone()
        initlab.init_model_(model, 0, made, device="cpu", only="k")
        assert torch.equal(model.k, k)


def test_nothing_is_left_behind():
    from torch.nn.modules import module as hooks

    def state() -> tuple[object, ...]:
        return (
            len(hooks._global_parameter_registration_hooks),
            len(hooks._global_module_registration_hooks),
            len(hooks._global_buffer_registration_hooks),
            list(sinks()),
            list(observers()),
            INIT_PATCHES.entered,
            torch.overrides._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
            nn.init.orthogonal_ is ORTHOGONAL,
        )

    before = state()
    with pytest.raises(KeyError, match="gone"), initlab.record_build() as made:
        {"model": nn.Linear(2, 2)}["gone"]
    model = nn.Linear(2, 2)
    assert state() == before
    with pytest.raises(RuntimeError, match="was ended by KeyError"):
        initlab.init_model_(model, 0, made)
    with initlab.record_build() as made, pytest.raises(RuntimeError, match="still going on"):
        initlab.init_model_(model, 0, made)
    assert state() == before


def test_nested_and_with_swap():
    with initlab.record_build() as outer:
        first = nn.Linear(4, 3)
        with initlab.record_build() as inner:
            second = nn.Linear(4, 3)
        with initlab.swap():
            third = One(lambda: filled(nn.init.trunc_normal_, std=0.5))
    with initlab.swap(), initlab.record_build() as within:
        fourth = nn.Linear(4, 3)
    for made, model in ((outer, first), (outer, second), (inner, second), (within, fourth)):
        assert initlab.plan_model(model, 0, made).rows[0].distribution == initlab.plan_model(model).rows[0].distribution
    assert initlab.plan_model(third, 0, outer).rows[0].distribution == TruncatedNormal(0.0, 0.5)
    with pytest.raises(ValueError, match="no Linear with parameters of these names and shapes was built"):
        initlab.init_model_(nn.Linear(4, 5), 0, inner)


def test_other_threads_are_not_recorded():
    found = []

    def build() -> None:
        found.append(nn.Linear(3, 2))

    with initlab.record_build() as made:
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
    assert repr(made) == "<record of a build: no module, 0 parameters and buffers>"
    with pytest.raises(ValueError, match="no Linear with parameters of these names"):
        initlab.init_model_(found[0], 0, made)


def test_two_models_of_one_kind():
    with initlab.record_build() as made:
        student = nn.Sequential(nn.Linear(2, 2))
        teacher = nn.Sequential(nn.Linear(2, 2))
        nn.init.zeros_(teacher[0].weight)
    initlab.init_model_(teacher, 0, made)
    initlab.init_model_(student, 0, made)
    assert not teacher[0].weight.any()
    assert student[0].weight.any()
    with pytest.raises(ValueError, match="several a Sequential fits"):
        initlab.init_model_(copy.deepcopy(teacher), 0, made)


def test_a_model_trained_meanwhile_starts_again():
    made, model = record(lambda: nn.Linear(4, 4))
    initlab.init_model_(model, 0, made)
    before = initlab.model_digest(model)
    model(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert initlab.model_digest(model) != before
    initlab.init_model_(model, 0, made)
    assert initlab.model_digest(model) == before


def test_changed_shapes_are_refused():
    made, model = record(lambda: nn.Linear(4, 4))
    model.weight = nn.Parameter(torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"had the shape \(4, 4\), and now it has \(4, 5\)"):
        initlab.init_model_(model, 0, made)


def test_tensors_that_are_not_strided():
    """They are made as without a record, and refused."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse = nn.Parameter(torch.eye(3).to_sparse() * 2)
            self.linear = nn.Linear(3, 3)
            nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
            self.register_buffer("total", (nested * 2).sum(dim=-1, keepdim=True).unbind()[0].sum())
            self.register_buffer("quantized", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
            self.register_buffer("complex", torch.view_as_real(torch.ones(2, dtype=torch.complex64)))
            torch._foreach_mul_([self.linear.weight.data, self.linear.bias.data], 2.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, model = record(Odd)
    assert float(model.total) == 4.0
    assert torch.equal(model.sparse.detach().to_dense(), torch.eye(3) * 2)
    with pytest.raises(ValueError, match=r"cannot fill 1 of 3(?s:.)*sparse .in Odd"):
        initlab.init_model_(model, 0, made)
    initlab.init_model_(model, 0, made, only="linear")
    assert 3**-0.5 < model.linear.weight.abs().max() <= 2 * 3**-0.5


@pytest.mark.parametrize("recipe", ["build", "own"])
def test_a_padding_row_that_the_code_fills(recipe):
    """As ModernBert does; other recipes keep it at zero."""

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 40, padding_idx=0)
            self.apply(self._init_weights)

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    made, model = record(Filled)
    initlab.init_model_(model, 0, made if recipe == "build" else "own")
    assert model.embedding.weight[0].all()
    initlab.init_model_(model, 0, "he")
    assert not model.embedding.weight[0].any()
