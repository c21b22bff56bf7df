"""What a model's code computes: replayed from a record, for any seed, and compared with the code itself."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from initlab.kernels import Constant, Normal, Uniform, fill_, named_key
from initlab.kernels import Draw as KernelDraw
from torch import nn

import initlab
from initlab.models.programs import LIMIT, call_key

DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])
ORTHOGONAL, SPARSE = nn.init.orthogonal_, nn.init.sparse_  # as a library imports them by name


class One(nn.Module):
    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        made = make()
        self.weight = nn.Parameter(made) if made.is_floating_point() else None
        if self.weight is None:
            self.register_buffer("table", made)


def record(build: Callable[[], nn.Module], device: str = "cpu") -> tuple[initlab.BuildRecord, nn.Module]:
    with initlab.record_build() as made, torch.device(device):
        model = build()
    return made, model


def start(make: Callable[[], torch.Tensor], device: str, seed: int = 0) -> torch.Tensor:
    made, model = record(lambda: One(make), device)
    initlab.init_model_(model, seed, made, device="cpu")
    return next(iter(model.state_dict().values()))


def filled(function: Callable[..., object], *args: object, **kwargs: object) -> torch.Tensor:
    tensor = torch.empty(6, 4)
    function(tensor, *args, **kwargs)
    return tensor


def after(tensor: torch.Tensor, *steps: Callable[[torch.Tensor], object]) -> torch.Tensor:
    for step in steps:
        step(tensor)
    return tensor


def drawn(distribution: Normal | Uniform, name: str, n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """The n-th random call of a parameter."""
    tensor = torch.empty(shape)
    fill_([KernelDraw(tensor, distribution, call_key(seed, name, n))])
    return tensor


def test_the_key_of_a_random_call():
    """Golden: docs/stream.md, section 9."""
    assert call_key(0, "conv.weight", 0) == named_key(0, "conv.weight\x000")
    assert [
        f"{call_key(s, name, n):016x}" for s, name, n in ((0, "w", 0), (0, "w", 1), (-1, "blocks.0.A_log", 10))
    ] == [
        "b58fb218684dcad6",
        "4e24aa01f2314ba4",
        "25d7be0178260727",
    ]


@DEVICES
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.linspace(0, 1, 8),
        lambda: torch.arange(1, 9).float().log(),
        lambda: torch.arange(1, 5, dtype=torch.float32).repeat(3, 1).log().contiguous(),
        lambda: torch.tensor([1.0, 2.0, 4.0]),
        lambda: torch.tensor([[1, 2], [3, 4]]).double() * 0.5,
        lambda: after(torch.zeros(4, 4), lambda t: t[:2, :2].fill_(2.0), lambda t: t.t()[3].copy_(torch.arange(4.0))),
        lambda: after(torch.zeros(6), lambda t: t.__setitem__(slice(None, None, 2), torch.arange(3.0))),
        lambda: after(torch.ones(4, 4), lambda t: t.tril_(), lambda t: t.masked_fill_(t == 0, -math.inf)),
        lambda: torch.stack([torch.arange(4.0).sin(), torch.arange(4.0).cos()], dim=-1).flatten(),
        lambda: torch.meshgrid(torch.arange(3.0), torch.arange(2.0), indexing="ij")[1].contiguous(),
        lambda: torch.linspace(0, 1, 8).chunk(2)[1].clone(),
        lambda: torch.linspace(-3, 3, 8).sort(descending=True).values,
        lambda: torch.arange(8).to(torch.uint8).view(torch.int32),
        lambda: torch.linspace(0, 1, 8, dtype=torch.bfloat16),
        lambda: filled(nn.init.eye_),
        lambda: torch.eye(3).unsqueeze(0).expand(2, 3, 3).contiguous() * torch.arange(3.0),
        lambda: torch.arange(16).view(4, 4)[:, 1:3].contiguous(),
        lambda: after(torch.zeros(3000), lambda t: [t[i].fill_(float(i)) for i in range(100)]),
    ],
)
def test_what_no_seed_changes(make, device):
    wanted = make()
    for seed in (0, 1):
        got = start(make, device, seed)
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@DEVICES
@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: torch.randn(8) ** 2, lambda: drawn(Normal(), "weight", 0, 8) ** 2),
        (
            lambda: torch.randn(8) * torch.rand(8),
            lambda: drawn(Normal(), "weight", 0, 8) * drawn(Uniform(), "weight", 1, 8),
        ),
        (lambda: torch.randn(1, 4).repeat(3, 1), lambda: drawn(Normal(), "weight", 0, 1, 4).repeat(3, 1)),
        (lambda: torch.randn(1, 4).expand(3, 4).contiguous(), lambda: drawn(Normal(), "weight", 0, 1, 4).repeat(3, 1)),
        (
            lambda: after(torch.zeros(4, 4), lambda t: t[:2, :2].normal_(std=2.0)),
            lambda: after(torch.zeros(4, 4), lambda t: t[:2, :2].copy_(drawn(Normal(0.0, 2.0), "weight", 0, 2, 2))),
        ),
        (  # inverse softplus, as Mamba has it
            lambda: after(torch.rand(8) * 4 - 6, lambda t: t.exp_(), lambda t: t.add_(torch.log(-torch.expm1(-t)))),
            lambda: after(
                drawn(Uniform(), "weight", 0, 8) * 4 - 6,
                lambda t: t.exp_(),
                lambda t: t.add_(torch.log(-torch.expm1(-t))),
            ),
        ),
    ],
)
def test_random_calls_have_keys(make, same, device):
    assert torch.equal(start(make, device), same())


@DEVICES
@pytest.mark.parametrize("function", [nn.init.orthogonal_, ORTHOGONAL], ids=["by module", "by name"])
def test_orthogonal(function, device):
    for shape in ((6, 4), (4, 6), (4, 2, 3)):
        weight = start(lambda shape=shape: function(torch.empty(shape), gain=2.0), device).flatten(1)
        rows, columns = weight.shape
        gram = weight.t() @ weight if rows > columns else weight @ weight.t()
        torch.testing.assert_close(gram, 4 * torch.eye(min(rows, columns)), rtol=0, atol=1e-5)
        other = start(lambda shape=shape: function(torch.empty(shape), gain=2.0), device, seed=1)
        assert not torch.equal(weight, other.flatten(1))
    assert torch.equal(*(start(lambda: function(torch.empty(5, 3)), d) for d in ("cpu", "meta")))


@DEVICES
@pytest.mark.parametrize("function", [nn.init.sparse_, SPARSE], ids=["by module", "by name"])
def test_sparse(function, device):
    weight = start(lambda: function(torch.empty(20, 5), sparsity=0.3, std=1.0), device)
    assert (weight == 0).sum(0).tolist() == [6] * 5
    assert len({tuple(column) for column in (weight == 0).t().tolist()}) > 1


@DEVICES
def test_torchs_other_samplers_are_seeded_by_the_key(device):
    for make in (
        lambda: torch.zeros(1000).bernoulli_(0.5),
        lambda: torch.zeros(1000).exponential_(),
        lambda: torch.randperm(1000),
        lambda: torch.randint(0, 9, (1000,)).float(),
    ):
        state = torch.get_rng_state()
        first, again, other = start(make, device), start(make, device), start(make, device, seed=1)
        if device == "meta":
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        torch.manual_seed(3)
        assert float(first.double().mean()) == pytest.approx(float(make().double().mean()), rel=0.15)


@DEVICES
def test_a_generator_of_the_codes_own(device):
    """As VeRA draws its projections, and draws them again at load: not the seed of initlab's, but the code's own."""

    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator(device="cpu").manual_seed(7)
            for name in ("a", "b"):
                tensor = torch.empty(3, 4)
                with torch.no_grad():
                    tensor.uniform_(-1, 1, generator=generator)
                self.register_buffer(name, tensor)
            self.weight = nn.Parameter(torch.empty(3).normal_(generator=generator))
            generator = torch.Generator(device="cpu").manual_seed(7)
            self.again = nn.Parameter(torch.empty(3, 4).uniform_(-1, 1, generator=generator))

    made, model = record(Projections, device)
    for seed in (0, 1):
        initlab.init_model_(model, seed, made, device="cpu")
        wanted = Projections().state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


class Block(nn.Module):
    """Computed, tied, copied, deep-copied and shared starts."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(1, 9, dtype=torch.float32).repeat(4, 1).log())
        self.bias = nn.Parameter(torch.rand(4).exp())
        self.tied = self.bias
        self.copied = nn.Parameter(self.bias.detach().clone())
        self.child = copy.deepcopy(nn.ParameterList([nn.Parameter(self.bias.detach() * 2)]))
        whole = nn.init.orthogonal_(torch.empty(6, 6))
        self.q, self.k = nn.Parameter(whole[:3].clone()), nn.Parameter(whole[3:].clone())
        self.v = nn.Parameter(torch.randn(4, 3) * 0.5)
        self.norm = nn.Parameter(self.v.detach().norm(dim=1, keepdim=True))


@DEVICES
def test_one_models_computed_starts_hang_together(device):
    made, model = record(Block, device)
    report = initlab.init_model_(model, 3, made, device="cpu")
    rows = {row.name: row for row in report.rows}
    assert rows["v"].distribution == Normal(0.0, 0.5)
    assert rows["norm"].source == "computed"
    assert model.tied is model.bias
    assert torch.equal(model.bias, model.copied)
    assert torch.equal(model.bias * 2, model.child[0])
    assert torch.equal(model.norm, model.v.norm(dim=1, keepdim=True))
    gram = torch.cat([model.q, model.k]) @ torch.cat([model.q, model.k]).t()
    torch.testing.assert_close(gram.detach(), torch.eye(6), rtol=0, atol=1e-5)
    digest = initlab.model_digest(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to_empty(device="cpu")):
        initlab.init_model_(other, 3, pickle.loads(pickle.dumps(made)))
        assert initlab.model_digest(other) == digest
    for name in ("k", "norm", "copied", "child"):
        alone = copy.deepcopy(model)
        initlab.init_model_(alone, 4, made)
        initlab.init_model_(alone, 3, made, only=name)
        for key, value in alone.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]) == key.startswith((name, "A_log")) or key == "A_log"


def test_the_dtype_of_today():
    made, model = record(Block, "meta")
    wanted = copy.deepcopy(model)
    initlab.init_model_(wanted, 0, made, device="cpu")
    initlab.init_model_(model.bfloat16(), 0, made, device="cpu")
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16())


def test_a_part_under_names():
    made, model = record(lambda: nn.ModuleDict({"a": Block(), "b": Block()}), "meta")
    whole = copy.deepcopy(model)
    initlab.init_model_(whole, 0, made, device="cpu")
    part = model["b"]
    initlab.init_model_(part, 0, made, device="cpu", names="b")
    assert all(torch.equal(part.state_dict()[name], value) for name, value in whole["b"].state_dict().items())


def test_a_rule_for_what_another_start_is_made_of():
    made, model = record(Block)
    initlab.init_model_(model, 0, {"v": Constant(2.0), "*": made})
    torch.testing.assert_close(model.norm.detach(), torch.full((4, 1), 12.0**0.5))


def test_too_large_is_refused():
    made, model = record(lambda: One(lambda: torch.linspace(0, 1, LIMIT + 1)), "meta")
    with pytest.raises(ValueError, match=rf"through {LIMIT + 1:,} elements, and no more than {LIMIT:,} are computed"):
        initlab.init_model_(model, 0, made, device="cpu")


def test_what_fails_is_named_and_nothing_is_written():
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), One(lambda: torch.empty(4, 4, dtype=torch.float16).normal_()))
        with torch.no_grad():
            model[1].weight.copy_(torch.linalg.qr(model[1].weight)[0])
        return model

    made, model = record(build, "meta")
    with pytest.raises(ValueError, match=r"1.weight .in One. cannot be computed on the CPU .*values="):
        initlab.init_model_(model, 0, made, device="cpu")
    assert model[0].weight.is_meta


def test_numbers_read_from_random_values_are_refused():
    def make() -> torch.Tensor:
        noise = torch.randn(8)
        return noise * noise.std().item()

    made, model = record(lambda: One(make))
    with pytest.raises(ValueError, match="uses a number that it read from random values"):
        initlab.init_model_(model, 0, made)
    made, model = record(lambda: One(lambda: torch.full((3,), torch.rand(1).item())))
    with pytest.raises(ValueError, match="uses a number that it read from random values"):
        initlab.init_model_(model, 0, made)
