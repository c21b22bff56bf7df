import math

import numpy as np
import pytest
import torch
from initlab.kernels import Constant, Normal, TruncatedNormal, Uniform
from torch import nn
from torch.nn import init

import initlab
from initlab.models.checking import _differs, mismatch
from initlab.models.naming import tensor_refs
from initlab.models.specs import DimSlice, FillSpec

TENSORS = 300


def said(tensor: torch.Tensor, *fills: tuple[DimSlice | None, object]) -> str | None:
    module = nn.Module()
    module.weight = nn.Parameter(tensor, tensor.requires_grad)
    spec = FillSpec(tuple(fills), why="code")  # type: ignore[arg-type]
    return mismatch(tensor_refs(module)[0][0], spec, TENSORS)


def drawn(distribution: object, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(count, dtype=dtype))
    drawn.seed += 1
    initlab.init_model_(layer, drawn.seed, distribution)
    return layer.weight.detach()


drawn.seed = 0


def leaning(count: int, side: int) -> torch.Tensor:
    """Of the scale of the planned ones; three in four are on one side of 0."""
    return (torch.randn(count) * 0.02).clamp(-0.04, 0.04).abs() * torch.where(torch.rand(count) < 0.75, side, -side)


DISTRIBUTIONS = [
    Normal(0.0, 0.02),
    Normal(1.0, 0.02),
    Uniform(-0.1, 0.1),
    Uniform(0.5, 0.6),
    TruncatedNormal(0.0, 0.02, -0.04, 0.04),
    TruncatedNormal(0.0, 0.02, -2.0, 2.0),
    TruncatedNormal(0.0, 1.0, 0.5, math.inf),
    Constant(0.3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_no_false_refusals(distribution, dtype):
    """At a level of 1e-4 / 300 for each of them, none of a thousand."""
    for count, times in ((1, 100), (2, 100), (3, 100), (17, 100), (300, 50), (5000, 10), (200_000, 1)):
        for _ in range(times):
            assert said(drawn(distribution, count, dtype), (None, distribution)) is None


@pytest.mark.parametrize("planned", [Normal(0.0, 0.02), Uniform(-0.1, 0.1), TruncatedNormal(0.0, 0.02, -0.04, 0.04)])
@pytest.mark.parametrize(
    ("count", "values"),
    [
        (64, lambda n: torch.zeros(n)),
        (64, lambda n: torch.ones(n)),
        (3, lambda n: torch.zeros(n)),
        (64, lambda n: torch.full((n,), 0.01)),
        (64, lambda n: torch.full((n,), math.nan)),
        (64, lambda n: torch.randn(n)),
        (64, lambda n: torch.randn(n) * 1e-3),
        (100_000, lambda n: torch.randn(n) * 0.0225),
        (100_000, lambda n: torch.rand(n) * 0.18 - 0.09),
        (4096, lambda n: torch.randn(n) * 0.02 + 0.01),
        (4096, lambda n: (torch.randn(n) * 0.02).abs()),
        (4096, lambda n: leaning(n, 1)),
        (4096, lambda n: leaning(n, -1)),
    ],
)
def test_what_is_refused(planned, count, values):
    torch.manual_seed(3)
    assert said(values(count), (None, planned)) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("planned", "scipys"),
    [
        (Normal(0.1, 0.02), lambda stats: stats.norm(0.1, 0.02)),
        (Uniform(-0.1, 0.1), lambda stats: stats.uniform(-0.1, 0.2)),
        (TruncatedNormal(0.0, 0.02, -0.03, 0.05), lambda stats: stats.truncnorm(-1.5, 2.5, 0.0, 0.02)),
    ],
    ids=["normal", "uniform", "truncated"],
)
def test_the_distance_is_that_of_the_definition(planned, scipys, dtype):
    """By scipy's distribution functions, value by value: a level just above what the distance allows refuses."""
    cdf = scipys(pytest.importorskip("scipy.stats")).cdf
    ends = np.arange(1, 257) / 256
    for squeezed in (0, 1000, 2500):  # of the values: half as far from the middle; the others keep the ends
        values = drawn(planned, 3000, dtype).double()
        values[:squeezed] = (values.mean() + values[:squeezed]) / 2
        values = values.to(dtype)
        x, eps = values.double().numpy(), torch.finfo(dtype).eps
        at_most, at_least = (np.searchsorted(np.sort(cdf(x + sign * abs(x) * eps)), ends) / len(x) for sign in (-1, 1))
        distance = max(0.0, (ends - at_most)[:-1].max(), (at_least - ends)[:-1].max())
        level = 2 * math.exp(-2 * len(x) * distance**2)
        assert squeezed < 2500 or level < 1e-3
        if level < 1e-2:  # below what the other tests refuse of such values
            assert _differs(values, planned, level * 0.999) == ""
            assert _differs(values, planned, level * 1.001) == "its values are another distribution's"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("planned", DISTRIBUTIONS, ids=str)
def test_one_value_that_is_not_finite_is_refused(planned, value):
    values = drawn(planned, 100)
    values[7] = value
    assert said(values, (None, planned)) is not None


def test_messages():
    assert said(torch.zeros(9), (None, Normal(0.0, 0.02))) == "by code it would be normal(0, 0.02), and it is zero"
    assert said(torch.zeros(9), (None, Constant(1.0))) == "by code it would be 1, and its values are not"
    assert "lie outside" in str(said(torch.ones(9), (None, Uniform(-0.1, 0.1))))


def test_slices():
    rows = (None, Normal(0.0, 1.0)), (DimSlice(0, 0, 1), Constant(0.0))
    weight = torch.randn(50, 20)
    assert "it would be 0" in str(said(weight, *rows))
    weight[0] = 0
    assert said(weight, *rows) is None
    halves = (DimSlice(0, 0, 25), Normal(0.0, 1.0)), (DimSlice(0, 25, 25), Constant(2.0))
    assert "it would be 2" in str(said(weight, *halves))
    weight[25:] = 2
    assert said(weight, *halves) is None


def test_a_tensor_that_is_not_contiguous():
    assert said(torch.randn(300, 200).t(), (None, Normal(0.0, 1.0))) is None
    assert said(torch.randn(300, 200).t(), (None, Normal(0.0, 2.0))) is not None


class Timms(nn.Module):
    """Starts in its constructor, and by a public init_weights() that it may not have called."""

    def __init__(self, call: bool, constructor=lambda model: None) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 10)
        constructor(self)
        if call:
            self.init_weights()

    def init_weights(self, std: float = 0.02) -> None:
        init.normal_(self.conv.weight, std=std)
        init.zeros_(self.norm.weight)


def distributions(model: nn.Module, **named: object) -> dict[str, object]:
    return {row.name: row.distribution for row in initlab.plan_model(model, 0, "own", **named).rows}


def test_public_functions_are_read():
    called, not_called = distributions(Timms(True)), distributions(Timms(False))
    assert called["conv.weight"] == Normal(0.0, 0.02)
    assert called["norm.weight"] == Constant(0.0)
    assert isinstance(not_called["conv.weight"], Uniform)
    assert not_called["norm.weight"] == Constant(1.0)
    with torch.device("meta"):
        assert distributions(Timms(True)) == called


WAYS_OUT = r"initlab.record_build\(\)(?s:.)*initlab.recipes.own\(check=False\)"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("constructor", "name"),
    [
        (lambda m: init.kaiming_normal_(m.head.weight), "head.weight"),
        (lambda m: init.zeros_(m.head.weight), "head.weight"),
        (lambda m: init.zeros_(m.head.bias), "head.bias"),
        (lambda m: init.ones_(m.norm.bias), "norm.bias"),
    ],
)
def test_what_a_constructor_does_is_refused(constructor, name, device):
    with torch.device(device):
        model = Timms(False, constructor)
    before = initlab.model_digest(model) if device == "cpu" else None
    with pytest.raises(ValueError, match=rf"{name} \(in .*(?s:.)*{WAYS_OUT}"):
        initlab.init_model_(model, 0, "own", device="cpu")
    assert before is None or initlab.model_digest(model) == before
    initlab.init_model_(model, 0, {name: Constant(0.0), "*": "own"}, device="cpu")
    initlab.init_model_(model, 0, initlab.recipes.own(check=False))
    initlab.init_model_(model, 1, "own")  # our own values are what they should be


def test_a_trained_model_needs_the_switch():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    model(torch.ones(4, 64)).sum().backward()
    torch.optim.SGD(model.parameters(), 10.0).step()
    with pytest.raises(ValueError, match=WAYS_OUT):
        initlab.init_model_(model, 0, "own")
    initlab.init_model_(model, 0, initlab.recipes.own(check=False))
    initlab.init_model_(model, 0, "own")


def test_only_what_is_selected_is_checked():
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "head": nn.Linear(64, 2)})
    nn.init.normal_(model["body"].weight)  # as if loaded
    initlab.init_model_(model, 0, "own", only="head")
    with pytest.raises(ValueError, match=r"body\.weight"):
        initlab.init_model_(model, 0, "own")


class Guessed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(3))


def test_guesses_are_checked():
    with pytest.raises(ValueError, match="called a bias it would be 0, and its values are not"):
        initlab.plan_model(Guessed(), 0, "own")
    with torch.device("meta"):
        model = Guessed()
    with pytest.raises(ValueError, match="no values to check a guess by"):
        initlab.plan_model(model, 0, "own")


class Unseen(nn.Module):
    """Writes in ways that no counter of a meta tensor shows, in what its constructor calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.start()

    def start(self) -> None:
        """Nothing, here."""


class WritesData(Unseen):
    def start(self) -> None:
        self.linear.weight.data.uniform_()


class Truncates(Unseen):
    def start(self) -> None:
        init.trunc_normal_(self.linear.weight)


@pytest.mark.parametrize("kind", [WritesData, Truncates])
def test_code_whose_writes_show_nowhere(kind):
    with torch.device("meta"):
        model, harmless = kind(), Unseen()
    with pytest.raises(ValueError, match="start may write to it, and on the meta device that shows nowhere"):
        initlab.plan_model(model, 0, "own")
    initlab.plan_model(harmless, 0, "own")


def test_transformers_leaves_out_init_weights_on_meta():
    """Then as many writes as both explain may still be somebody else's."""

    class Body(nn.Module):
        def __init__(self, skip: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            if not skip:
                self.apply(self._init_weights)

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=0.02)

    with torch.device("meta"):
        called, skipped, changed = Body(False), Body(True), Body(True)
        init.ones_(changed.b.weight)
    assert distributions(called) == distributions(skipped)
    with pytest.raises(ValueError, match=r"b.weight .in Linear.: it has been written 2 times"):
        initlab.plan_model(changed, 0, "own")


def test_a_sharded_model_tells_nothing_of_what_its_constructor_drew():
    """fully_shard makes new tensors, whose version counters begin anew."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.LayerNorm(8)
            for p in self.parameters():
                init.normal_(p, std=0.02)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        with initlab.record_build() as build, torch.device("meta"):
            model = Drawn()
        with torch.device("meta"):
            plain = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        for one in (model, plain):
            fully_shard(one, mesh=mesh)
        with pytest.raises(
            ValueError, match=r"a.weight .in Linear.: .*Drawn.__init__ may write to it, and of a sharded"
        ):
            initlab.init_model_(model, 0, "own", device="cpu")
        report = initlab.init_model_(model, 0, build, device="cpu")
        assert {row.distribution for row in report.rows} == {Normal(0.0, 0.02)}
        initlab.init_model_(plain, 0, "own", device="cpu")
    finally:
        dist.destroy_process_group()


def test_a_failing_init_weights_is_left_out():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def init_weights(self) -> None:
            init.zeros_(self.linear.weight)
            raise RuntimeError("needs a checkpoint")

    assert isinstance(distributions(Model())["linear.weight"], Uniform)
