"""diagnose() on losses that are finite and wrong: shapes that broadcast, and a first loss far above knowing nothing."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose, supervised

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 8, generator=G), torch.randn(64, generator=G)


def net(*last, out=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, out), *last)


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr)


BROADCAST = {
    "mse_loss": (net(), Y, nn.MSELoss(), (64, 1), (64,)),
    "l1_loss": (net(), Y, nn.L1Loss(), (64, 1), (64,)),
    "smooth_l1_loss": (net(), Y, nn.SmoothL1Loss(), (64, 1), (64,)),
    "huber_loss": (net(nn.Flatten(0)), Y[:, None], nn.HuberLoss(), (64,), (64, 1)),
    "sub": (net(), Y, lambda z, y: (z - y).square().mean(), (64, 1), (64,)),
    "sub, turned": (net(), Y, lambda z, y: (y - z).abs().mean(), (64, 1), (64,)),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", BROADCAST)
def test_shapes_that_broadcast(name):
    model, y, loss, prediction, target = BROADCAST[name]
    found = diagnose(model, (X, y), supervised(loss), adam(model))
    (cause,) = found.causes
    assert (cause.kind, cause.severity, cause.place.op) == ("loss", "warning", name.split(",")[0])
    assert (cause.evidence["prediction"], cause.evidence["target"]) == (prediction, target)
    assert cause.evidence["broadcast"] == (64, 64)
    assert cause.tried
    assert ".reshape(" in cause.remedy


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_target_that_the_loss_makes_has_an_advice():
    model = net()
    found = diagnose(model, (X, Y[:, None]), supervised(lambda z, y: F.mse_loss(z, y.squeeze(1) * 2)), adam(model))
    (cause,) = found.causes
    assert (cause.kind, cause.place.op, cause.tried) == ("loss", "mse_loss", False)
    assert cause.remedy.startswith("#")


def test_torchs_warning_gets_through():
    model = net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diagnose(model, (X, Y), supervised(nn.MSELoss()), adam(model))
    assert [one.category for one in caught] == [UserWarning]
    assert "torch.Size([64, 1])" in str(caught[0].message)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        diagnose(model, (X, Y), supervised(nn.MSELoss()), adam(model))
    assert caught == []


MEANT = {
    "equal": lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1]),
    "one target for all": lambda m, b: (m(b[0]) - torch.ones(1)).square().mean(),
    "pairs of rows": lambda m, b: ((m(b[0]) - m(b[0]).T) - (b[1][:, None] - b[1])).square().mean(),
    "quantiles": lambda m, b: (m(b[0]) - b[1][:, None] - torch.linspace(-1, 1, 5)).abs().mean(),
}


@pytest.mark.parametrize("name", MEANT)
def test_broadcasting_that_is_meant(name):
    model = net()
    found = diagnose(model, (X, Y), MEANT[name], adam(model))
    assert found.causes == (), str(found)


class Tied(nn.Module):
    """An embedding that is the head as well."""

    def __init__(self, how="matmul", std=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.n = nn.Embedding(80, 128), nn.LayerNorm(128)
        nn.init.normal_(self.e.weight, std=std)
        self.head = nn.Linear(128, 80, bias=False)
        if how == "shared":
            self.head.weight = self.e.weight
        self.how = how

    def forward(self, i):
        x = self.n(self.e(i))
        if self.how == "matmul":
            return x @ self.e.weight.T
        return self.head(x) if self.how == "shared" else F.linear(x, self.e.weight)


class Arc(nn.Module):
    """Cosines times 64: a large first loss that is meant."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.w = net(out=16), nn.Parameter(torch.randn(10, 16))

    def forward(self, x):
        return 64 * (F.normalize(self.body(x)) @ F.normalize(self.w).T - 0.2)


IDS = torch.randint(0, 80, (8, 16), generator=G)
TEXT = IDS, IDS.roll(-1, 1)


def next_token(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("how", ["matmul", "linear", "shared"])
def test_a_tied_head_that_is_too_large(how):
    model = Tied(how)
    (cause,) = diagnose(model, TEXT, next_token, adam(model)).causes
    assert (cause.kind, cause.place.parameter) == ("weights", "e.weight")
    assert cause.evidence["loss"] > 5 * cause.evidence["loss of knowing nothing"]
    assert cause.tried
    assert cause.trial[0] < 1.2 * cause.evidence["loss of knowing nothing"]
    assert diagnose(Tied(how, 0.02), TEXT, next_token).causes == ()


def test_a_head_of_its_own_that_is_too_large():
    model = net(nn.LayerNorm(64), nn.Linear(64, 10), out=64)
    nn.init.normal_(model[4].weight, std=2.0)
    labels = torch.randint(0, 10, (64,), generator=G)
    (cause, *_) = diagnose(model, (X, labels), supervised(nn.CrossEntropyLoss()), adam(model)).causes
    assert (cause.kind, cause.place.parameter) == ("weights", "4.weight")
    assert cause.tried


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_a_first_loss_that_is_meant(factor):
    labels = torch.randint(0, 10, (64,), generator=G)
    model = Arc() if factor == 1.0 else net(out=10)
    found = diagnose(model, (X, labels), lambda m, b: factor * F.cross_entropy(m(b[0]), b[1]), adam(model, 1e-4))
    assert found.causes == (), str(found)


def test_a_head_is_not_blamed_for_its_inputs():
    labels = torch.randint(0, 10, (64,), generator=G)
    model = net(out=10)
    found = diagnose(model, (X * 1000, labels), supervised(nn.CrossEntropyLoss()), adam(model))
    assert [cause.kind for cause in found.causes] == ["input"]
