"""diagnose() on runs that are finite and do not learn: nothing moves, or the wrong way; and on what only looks so."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose, supervised

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 8, generator=G), torch.randn(64, 1, generator=G)
CLASSES = torch.randint(0, 3, (64,), generator=G)
MSE, CROSS_ENTROPY = supervised(nn.MSELoss()), supervised(nn.CrossEntropyLoss())


def net(out=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, out))


def adam(model, lr=1e-3, **options):
    return torch.optim.Adam(model.parameters(), lr, **options)


def sgd(model, lr=0.05, **options):
    return torch.optim.SGD(model.parameters(), lr, **options)


class Detached(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.how = nn.Linear(8, 32), nn.Linear(32, 1), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                hidden = F.relu(self.body(x))
            return self.head(hidden)
        hidden = F.relu(self.body(x))
        return self.head(hidden.detach() if self.how == "detach" else torch.tensor(hidden.tolist()))


class LowRank(nn.Module):
    def __init__(self, start=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 1).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.full((8, 2), start)), nn.Parameter(torch.zeros(2, 1))

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b


def old_head(freeze):
    model = net()
    optimizer = adam(model)
    model[2] = nn.Linear(32, 1)
    model[0].requires_grad_(not freeze)
    return model, (X, Y), MSE, optimizer


def of_another_model():
    return net(), (X, Y), MSE, adam(net())


def in_bfloat16(lr):
    model = net().bfloat16()
    return model, (X.bfloat16(), Y.bfloat16()), MSE, sgd(model, lr)


def one(model, optimizer, batch=(X, Y), loss_fn=MSE):
    return model, batch, loss_fn, optimizer(model)


def low_rank():
    model = LowRank()
    return model, (X, Y), MSE, torch.optim.SGD([model.a, model.b], 0.1)


def rebuilt():
    def loss_fn(model, batch):
        return torch.tensor(F.mse_loss(model(batch[0]), batch[1]).item(), requires_grad=True)

    return one(net(), adam, loss_fn=loss_fn)


STUCK = {
    "rate 0": (lambda: one(net(), lambda m: adam(m, 0.0)), "learning rate", {}, True, "broken"),
    "rate 0, SGD": (lambda: one(net(), lambda m: sgd(m, 0.0)), "learning rate", {}, True, "broken"),
    "rate 1e-12": (lambda: one(net(), lambda m: sgd(m, 1e-12)), "learning rate", {}, True, "broken"),
    "old head, frozen body": (lambda: old_head(True), "optimizer", {"parameter": "2.weight"}, True, "broken"),
    "old head": (lambda: old_head(False), "optimizer", {"parameter": "2.weight"}, True, "warning"),
    "another model": (of_another_model, "optimizer", {"parameter": "0.weight"}, True, "broken"),
    "bfloat16": (lambda: in_bfloat16(1e-6), "precision", {"parameter": "0.weight"}, True, "broken"),
    "maximize": (lambda: one(net(), lambda m: sgd(m, 0.02, maximize=True)), "optimizer", {}, True, "broken"),
    "maximize, Adam": (lambda: one(net(), lambda m: adam(m, maximize=True)), "optimizer", {}, True, "broken"),
    "small inputs": (lambda: one(net(), sgd, (X * 1e-4, Y)), "input", {}, True, "warning"),
    "detached": (lambda: one(Detached("detach"), adam), "gradient", {"module": "body"}, False, "warning"),
    "rebuilt body": (lambda: one(Detached("tensor"), adam), "gradient", {"module": "body"}, False, "warning"),
    "rebuilt loss": (rebuilt, "gradient", {"module": "0"}, False, "broken"),
    "factors of 0": (low_rank, "weights", {"parameter": "a"}, True, "broken"),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", STUCK)
def test_what_does_not_move(name, steps):
    build, kind, place, tried, severity = STUCK[name]
    model, batch, loss_fn, optimizer = build()
    found = diagnose(model, batch, loss_fn, optimizer, steps=steps)
    cause = found.causes[0]
    assert cause.kind == kind
    assert cause.severity == severity
    assert {what: getattr(cause.place, what) for what in place} == place
    assert cause.tried == tried
    if tried:
        assert cause.trial[-1] < cause.trial[0]


def with_schedule():
    model = net()
    optimizer = adam(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    assert optimizer.param_groups[0]["lr"] == 0
    return model, (X, Y), MSE, optimizer


class Pair(nn.Module):
    """A generator and its critic, of which one is trained at a time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.critic = nn.Linear(8, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.critic(self.generator(x))


def one_of_two():
    model = Pair()
    return model, (X, torch.ones(64, 1)), MSE, adam(model.generator)


class WithTarget(nn.Module):
    """A copy of the network gives the targets; the optimizer was given everything."""

    def __init__(self):
        super().__init__()
        self.online = net()
        self.target = copy.deepcopy(self.online)

    def forward(self, x):
        with torch.no_grad():
            goal = 0.9 * self.target(x.roll(1, 0)) + x[:, :1]
        return F.mse_loss(self.online(x), goal)


class WithPooler(nn.Module):
    """A head that runs and that the loss does not use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.pooler, self.never = (nn.Linear(8, n) for n in (8, 1, 3, 3))

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.head(hidden), self.pooler(hidden)


def likelihood():
    model = net()
    return model, (X, Y), lambda m, b: -F.mse_loss(m(b[0]), b[1]), sgd(model, 0.01, maximize=True)


def bfloat16_adam():
    model = net(3).bfloat16()
    return model, (X.bfloat16(), CLASSES), lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]), adam(model)


def some_frozen():
    model = net()
    optimizer = adam(model)
    model[0].requires_grad_(False)
    return model, (X, Y), MSE, optimizer


def low_rank_started():
    model = LowRank(0.1)
    return model, (X, Y), MSE, torch.optim.SGD([model.a, model.b], 0.1)


def one_group_at_0():
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    return model, (X, Y), MSE, torch.optim.Adam(groups, 1e-3)


def with_parameter_outside():
    """A temperature that no model has, and that the loss function uses."""
    model, scale = net(3), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.Adam([*model.parameters(), scale])
    return model, (X, CLASSES), lambda m, b: F.cross_entropy(m(b[0]) * scale.exp(), b[1]), optimizer


def small_without_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))
    return model, (X * 1e-3, CLASSES), CROSS_ENTROPY, adam(model)


def hinge():
    """A loss of 0, whose gradients are 0."""
    model = net()
    return model, (X, Y), lambda m, b: (m(b[0]) - 99).relu().mean(), adam(model)


class Distilled(nn.Module):
    """A teacher of another width, in eval mode; the optimizer was given everything."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.teacher, self.student = nn.Sequential(nn.Linear(8, 50), nn.Tanh(), nn.Linear(50, 1)), net()

    def forward(self, x):
        self.teacher.eval()
        return F.mse_loss(self.student(x), self.teacher(x).detach())


LEARNS = {
    "frozen body": lambda: one(Detached("no_grad"), adam),
    "teacher": lambda: one(Distilled(), adam, X, lambda m, b: m(b)),
    "warm-up": with_schedule,
    "one of two": one_of_two,
    "target network": lambda: one(WithTarget(), adam, X, lambda m, b: m(b)),
    "pooler": lambda: one(WithPooler(), adam, loss_fn=lambda m, b: F.mse_loss(m(b[0])[0], b[1])),
    "likelihood": likelihood,
    "bfloat16": bfloat16_adam,
    "frozen": some_frozen,
    "low rank": low_rank_started,
    "one group at 0": one_group_at_0,
    "parameter outside": with_parameter_outside,
    "small, no bias": small_without_bias,
    "hinge": hinge,
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", LEARNS)
def test_what_only_looks_so(name, steps):
    model, batch, loss_fn, optimizer = LEARNS[name]()
    found = diagnose(model, batch, loss_fn, optimizer, steps=steps)
    assert found.causes == (), str(found)


def test_a_model_that_is_disturbed_comes_back():
    model = Detached("detach")
    optimizer = adam(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    diagnose(model, (X, Y), MSE, optimizer)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state


def test_what_runs_under_no_grad_is_noted():
    model = Detached("no_grad")
    found = diagnose(model, (X, Y), MSE, adam(model))
    assert any("body.weight" in note for note in found.notes)


# An optimizer of the user's own, one that lacks weights, and codes that a cast makes equal.


class Own(torch.optim.Optimizer):
    """Steps by hand, rightly or not."""

    def __init__(self, parameters, lr=0.05, how="right"):
        super().__init__(parameters, {"lr": lr})
        self.how = how

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if self.how == "rebinds":
                    p = p - group["lr"] * p.grad
                elif self.how == "divides by 0":
                    p.sub_(group["lr"] * p.grad / (1 - torch.ones(()) * 0.9**0))
                else:
                    p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize(
    ("how", "said"), [("rebinds", "changes no parameter"), ("divides by 0", "not finite in step 1"), ("right", "")]
)
def test_a_step_of_ones_own(how, said):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 6)
    found = diagnose(model, (x, x[:, :1]), supervised(nn.MSELoss()), Own(model.parameters(), how=how))
    if not said:
        assert found.verdict == "healthy", found
        return
    cause = found.causes[0]
    assert (cause.kind, str(cause.place), cause.tried) == ("optimizer", "", True), found
    assert said in cause.explanation


def test_weights_that_the_optimizer_does_not_have():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)), torch.randn(128, 6)
    y = (x[:, :1] * x[:, 1:2]) + x[:, 2:3]
    few = torch.optim.Adam([p for p in model.parameters() if p.dim() == 1], 1e-2)
    found = diagnose(model, (x, y), supervised(nn.MSELoss()), few)
    cause = found.causes[0]
    assert (cause.kind, cause.place.parameter, cause.tried) == ("optimizer", "0.weight", True), found
    head = torch.optim.Adam(model[2].parameters(), 3e-2)  # of a body that is left as it is
    assert diagnose(model, (x, y), supervised(nn.MSELoss()), head).verdict == "healthy"


class Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 1)

    def forward(self, codes):
        return self.head(torch.relu(self.table(codes.long())))


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_codes_that_a_cast_makes_equal(scale):
    torch.manual_seed(0)
    codes = torch.randint(10, (64,)).float()
    model = Codes()
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    y = 5 * codes[:, None].sin()
    found = diagnose(model, (codes * scale, y - y.mean()), supervised(nn.MSELoss()), optimizer)
    if scale == 1.0:
        assert found.verdict == "healthy", found
    else:
        assert (found.causes[0].kind, found.causes[0].place.op) == ("operation", "long"), found


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("lr", [0.1, 0.0, 1e-6, 1e6])
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "bool"])
def test_a_batch_with_a_sparse_matrix(layout, lr):
    """Whatever else is wrong, no check stumbles over it; that it is not looked at is said."""
    torch.manual_seed(0)
    whole = (torch.rand(32, 32) < 0.2).float()
    adjacency = whole.bool().to_sparse() if layout == "bool" else getattr(whole, layout)()
    model, x = nn.Linear(4, 2), torch.randn(32, 4)
    labels = (x[:, 0] > 0).long()

    def loss_fn(model, batch):
        return F.cross_entropy(torch.sparse.mm(batch[0].to(torch.float32), model(batch[1])), batch[2])

    found = diagnose(model, (adjacency, x, labels), loss_fn, torch.optim.SGD(model.parameters(), lr))
    assert [cause.kind for cause in found.causes] == ([] if lr == 0.1 else ["learning rate"]), found
    assert any("batch[0]" in note and "sparse" in note for note in found.notes)


def test_casts_in_a_mapped_model():
    """Under vmap a tensor has no values to look at."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(32, 4)

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            def one(row):
                row = row.to(torch.float64).to(torch.float32)
                scale = row.round().abs().sum().clamp_min(1.0)
                return self.body(row / scale.clone().mul_(1.0))

            return torch.func.vmap(one)(x)

    mapped = Mapped()
    optimizer = torch.optim.Adam(mapped.parameters(), 1e-2)
    assert diagnose(mapped, (x, x[:, :1]), supervised(nn.MSELoss()), optimizer).verdict == "healthy"
