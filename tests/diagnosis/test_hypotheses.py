"""diagnose() by experiment: what reaches the weights, targets, heads, rates; and what no experiment speaks for."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose, supervised
from initlab.diagnosis import outcomes
from initlab.diagnosis.budget import Budget

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 8, generator=G), torch.randn(64, 1, generator=G)
CLASSES = torch.randint(0, 3, (64,), generator=G)
BITS = (X[:, :1] > 0).float()
LINE = torch.linspace(-1, 1, 101)[:, None]
MSE, CE, BCE = (supervised(loss()) for loss in (nn.MSELoss, nn.CrossEntropyLoss, nn.BCELoss))


def BY_HAND(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


LONG = 60.0  # seconds: on a busy machine all trials take all their steps


def net(*last, i=8, o=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(i, 32), nn.ReLU(), nn.Linear(32, o), *last)


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr)


class Prepares(nn.Module):
    """Does something to its input before the first weights see it."""

    def __init__(self, prepare, width=8, out=3):
        super().__init__()
        self.n, self.prepare = net(i=width, o=out), prepare
        self.register_buffer("mean", torch.full((8,), 120.0))
        self.register_buffer("std", torch.full((8,), 70.0))

    def forward(self, x):
        return self.n(self.prepare(self, x))


class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.n = nn.Embedding(5000, 4), net(i=11, o=3)

    def forward(self, x):
        return self.n(torch.cat([self.e(x[:, 0].long()), x[:, 1:]], 1))


class Scratch(nn.Module):
    """Matrices that no module stands for."""

    def __init__(self, how, depth=6, std=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.out = how, nn.Parameter(0.1 * torch.randn(64, 3))
        self.ws = nn.ParameterList([std * torch.randn(8 if i == 0 else 64, 64) for i in range(depth)])
        if how == "linear":
            self.ws = nn.ParameterList([w.T.contiguous() for w in self.ws])

    def forward(self, x):
        for w in self.ws:
            product = {
                "matmul": lambda a, b: a @ b,
                "linear": F.linear,
                "einsum": lambda a, b: torch.einsum("bi,ij->bj", a, b),
            }[self.how]
            x = product(x, w).relu()
        return x @ self.out


PIXELS = torch.rand(64, 8, generator=G) * 255
HEALTHY = {
    "divides by 255": lambda: (Prepares(lambda m, x: x / 255), (PIXELS, CLASSES), CE),
    "log1p": lambda: (Prepares(lambda m, x: x.log1p() / 5), (PIXELS * 1e4, CLASSES), CE),
    "buffers": lambda: (Prepares(lambda m, x: (x - m.mean) / m.std), (PIXELS, CLASSES), CE),
    "ids in a float table": lambda: (
        Ids(),
        (torch.cat([torch.randint(0, 5000, (64, 1), generator=G), X[:, :7]], 1), CLASSES),
        CE,
    ),
    "what nothing reads": lambda: (
        net(),
        {"x": X, "y": Y, "time": torch.arange(64.0) * 3600 + 1.6e9},
        lambda m, b: F.mse_loss(m(b["x"]), b["y"]),
    ),
    "targets in a logarithm": lambda: (net(), (X, Y.exp() * 1e3), lambda m, b: F.mse_loss(m(b[0]), b[1].log() - 7)),
    "counts": lambda: (net(), (X, Y.abs().round()), supervised(nn.PoissonNLLLoss())),
    "own matrices": lambda: (Scratch("matmul", 2, 0.15), (X, CLASSES), CE),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_no_fault(name):
    model, batch, loss = HEALTHY[name]()
    found = diagnose(model, batch, loss, adam(model), budget=LONG)
    assert found.causes == (), str(found)


@pytest.mark.parametrize(("scale", "offset"), [(50.0, 150.0), (1e5, 5e5), (1e6, 1.5e7)])
@pytest.mark.parametrize("optimizer", [lambda m: sgd(m, 0.01), adam], ids=["sgd", "adam"])
def test_targets_out_of_scale(scale, offset, optimizer):
    model = net()
    cause = diagnose(model, (X, Y * scale + offset), MSE, optimizer(model), budget=LONG).causes[0]
    assert (cause.kind, cause.place.tensor, cause.tried) == ("target", "batch[1]", True)
    assert cause.trial[-1] < cause.trial[0] < 2  # in units of the targets' variance
    assert len(cause.trial) == 26


def test_a_model_that_puts_out_such_numbers_is_none():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = net()

        def forward(self, x):
            return self.n(x) * 100 + 500

    model = Scaled()
    assert diagnose(model, (X, Y * 100 + 500), MSE, adam(model), budget=LONG).causes == ()


@pytest.mark.parametrize("how", ["matmul", "linear", "einsum"])
def test_matrices_without_a_module(how):
    model = Scratch(how)
    cause = diagnose(model, (X, CLASSES), CE, sgd(model, 0.1), budget=LONG).causes[0]
    assert (cause.kind, cause.tried) == ("weights", True)
    assert cause.place.parameter.startswith("ws.")
    assert cause.trial[0] == pytest.approx(math.log(3), rel=1.0)
    assert cause.untreated[0] > 100 * cause.trial[0]
    row = next(row for row in diagnose(model, (X, CLASSES), CE).layers if row.name == "ws.1")
    assert row.kind == "Parameter"
    assert row.gain == pytest.approx(8 / 2**0.5, rel=0.5)


MISFITS = {
    "softmax over one": (lambda: net(nn.Softmax(1)), (X, BITS), BCE, "loss", "3", True),
    "one logit": (net, (X, torch.zeros(64, dtype=torch.long)), CE, "loss", None, False),
    "sigmoid, targets of 3 to 33": (lambda: net(nn.Sigmoid(), i=1), (LINE, 30 * LINE**2 + 3), MSE, "loss", "3", True),
    "relu, negative targets": (lambda: net(nn.ReLU(), i=1), (LINE, -1 - LINE**2), MSE, "loss", "3", True),
    "tanh by hand": (lambda: net(nn.Tanh(), i=1), (LINE, 5 * LINE), BY_HAND, "loss", "3", True),
    "several classes": (lambda: net(o=3), (X, (X[:, :3] > 0).float()), CE, "loss", None, None),
    "sigmoid before cross_entropy": (lambda: net(nn.Sigmoid(), o=3), (X, X[:, :3].argmax(1)), CE, "loss", "3", True),
    "relu before cross_entropy": (lambda: net(nn.ReLU(), o=3), (X, X[:, :3].argmax(1)), CE, "loss", "3", True),
    "softmax before BCE": (lambda: net(nn.Softmax(1), o=3), (X, F.one_hot(CLASSES, 3).float()), BCE, "loss", "3", True),
    "one class": (lambda: net(o=10), (X, torch.zeros(64, dtype=torch.long)), CE, "target", None, False),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_belong_together(name):
    make, batch, loss, kind, module, tried = MISFITS[name]
    model = make()
    cause = diagnose(model, batch, loss, adam(model), budget=LONG).causes[0]
    assert (cause.kind, cause.place.module) == (kind, module)
    assert tried is None or cause.tried == tried


def test_a_last_activation_that_fits():
    for model, batch, loss in (
        (net(nn.Sigmoid()), (X, BITS), BCE),
        (net(nn.Sigmoid()), (X, BITS), MSE),
        (net(nn.ReLU()), (X, Y.abs()), MSE),
        (net(o=3), (X, F.one_hot(CLASSES, 3).float()), CE),
        (net(o=3), (X, F.one_hot(CLASSES, 3).float()), supervised(nn.BCEWithLogitsLoss())),
    ):
        found = diagnose(model, batch, loss, adam(model), budget=LONG)
        assert found.causes == (), str(found)


def test_a_rate_that_is_too_low():
    model = net()
    cause = diagnose(model, (X, X[:, :1]), MSE, adam(model, 1e-6), budget=LONG).causes[0]
    assert (cause.kind, cause.tried) == ("learning rate", True)
    assert "0.001" in cause.remedy
    assert cause.trial[0] - cause.trial[-1] > 100 * (cause.untreated[0] - cause.untreated[-1])
    tuned = net()
    assert diagnose(tuned, (X, X[:, :1]), MSE, adam(tuned, 3e-5), budget=LONG).causes == ()


def test_a_plateau_is_no_recovery():
    """The first step kills every unit: the loss falls to the targets' variance, and the net is a constant."""
    model = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    torch.manual_seed(3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.linspace(0, 1, 64)[:, None]
    cause = diagnose(model, (x, 3 * x), MSE, sgd(model, 1.0), budget=LONG).causes[0]
    assert (cause.kind, cause.tried) == ("learning rate", True)
    assert cause.trial[-1] < cause.untreated[-1]


@pytest.mark.parametrize(
    ("losses", "constant", "effect"),
    [
        ((1.0, 0.9, 0.8), False, "falls"),
        ((1.0, 0.9, 0.8), True, "plateau"),
        ((1.0, 0.9999), False, "stays"),
        ((1.0, 1.0, 3.0), False, "rises"),
        ((1.0, math.nan), False, "breaks"),
        ((1.0,), False, ""),
    ],
)
def test_effects(losses, constant, effect):
    assert outcomes.Outcome(losses, constant).effect == effect


def test_a_budget_ends_trials():
    model = net()
    found = diagnose(model, (X, Y * 1e12), MSE, sgd(model, 10.0), steps=3, budget=1e-6)
    assert found.verdict == "broken"
    assert not any(cause.tried for cause in found.causes)  # there was no time for it
    with pytest.raises(ValueError, match="budget is 0"):
        diagnose(model, (X, Y), MSE, budget=0)


def test_the_bar_appears_after_two_seconds(monkeypatch):
    shown = []
    monkeypatch.setattr("initlab.diagnosis.budget.progress", lambda *args: shown.append(args) or _Bar())
    with Budget(100.0, show=True) as budget:
        budget.tick()
        assert shown == []
        monkeypatch.setattr("initlab.diagnosis.budget.time.monotonic", lambda: budget._start + 3)
        budget.tick()
        budget.tick()
    assert len(shown) == 1


class _Bar:
    def __enter__(self):
        return lambda units: None

    def __exit__(self, *exc):
        pass


@pytest.mark.parametrize("steps", [None, 1, 3])
def test_passes_of_a_healthy_model(steps):
    model, passes = net(), []

    def loss_fn(model, batch):
        passes.append(1)
        return MSE(model, batch)

    assert diagnose(model, (X, Y), loss_fn, adam(model), steps=steps, budget=LONG).causes == ()
    untreated = {None: 25, 1: 0, 3: 28}[steps]
    assert len(passes) <= untreated + 4


@pytest.mark.parametrize("when", [3, 20, 40, 60])
def test_an_interrupted_trial_leaves_no_trace(when):
    model, passes = net(), (number for number in itertools.count(1))  # a generator is not put back between runs
    optimizer = adam(model, 5.0)
    MSE(model, (X, Y)).backward()
    optimizer.step()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    states = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    random = torch.get_rng_state()

    def loss_fn(model, batch):
        if next(passes) == when:
            raise KeyboardInterrupt
        return MSE(model, batch)

    with pytest.raises(KeyboardInterrupt):
        diagnose(model, (X, Y * 100), loss_fn, optimizer, budget=LONG)
    assert all(torch.equal(kept[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(states[p][k], v) for p, s in optimizer.state.items() for k, v in s.items())
    assert optimizer.param_groups[0]["lr"] == 5.0
    assert torch.equal(torch.get_rng_state(), random)


def test_inputs_and_targets_that_only_together_are_the_cause():
    """Neither is enough by itself, and a rate of 3e-6 would hide both."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.tensor(a, dtype=torch.float32) for a in datasets.load_diabetes(return_X_y=True, scaled=False))
    torch.manual_seed(0)
    layers = [m for i, o in ((10, 64), (64, 64), (64, 1)) for m in (nn.Linear(i, o), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = diagnose(model, (x, y[:, None]), supervised(nn.MSELoss()), optimizer)
    cause = found.causes[0]
    assert (cause.kind, cause.place.tensor, cause.tried) == ("input", "batch[0]", True), found
    assert "batch[1]" in cause.explanation
    scope = {"batch": (x, y[:, None]), "torch": torch}
    exec(cause.remedy, scope)
    assert all(abs(float(part.std()) - 1) < 0.1 for part in scope["batch"])
