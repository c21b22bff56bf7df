"""diagnose() on the commonest errors: a count of 0, and what torch refuses to compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose, supervised

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 8, generator=G), torch.randn(64, 1, generator=G)
CLASSES = torch.randint(0, 3, (64,), generator=G)
MSE, CROSS_ENTROPY = supervised(nn.MSELoss()), supervised(nn.CrossEntropyLoss())


def net(out=1, into=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(into, 32), nn.ReLU(), nn.Linear(32, out))


def adam(model):
    return torch.optim.Adam(model.parameters(), 1e-3)


def weighted(model, batch):
    positive = batch[1].sum()
    return F.binary_cross_entropy_with_logits(
        model(batch[0]), batch[1], pos_weight=(len(batch[1]) - positive) / positive
    )


def advantage(model, batch):
    reward = (batch[1] - batch[1].mean()) / batch[1].std()
    return (model(batch[0]) * reward).mean()


ZERO = {
    "count": (lambda m, b: m(b[0]).square().mean() / (b[1] > 99).sum(), Y, "count"),
    "positives": (weighted, Y * 0, "count"),
    "rewards": (advantage, Y * 0 - 200, "std"),
    "masked": (lambda m, b: ((m(b[0]) - b[1]) * (b[1] > 99)).sum() / (b[1] > 99).float().sum(), Y, "count"),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_division_by_a_count_of_nothing(name):
    loss_fn, y, made_by = ZERO[name]
    model = net()
    (cause, *_) = diagnose(model, (X, y), loss_fn, adam(model)).causes
    assert (cause.kind, cause.place.op, cause.tried) == ("loss", "div", False)
    assert cause.evidence["divided by"] == f"0, made by {made_by}"
    assert cause.remedy.startswith("#")
    assert ("std" if made_by == "std" else "clamp_min(1)") in cause.remedy


def test_a_target_of_0_is_still_to_blame_for_its_own_reciprocal():
    model = net()
    y = Y.clone()
    y[3] = 0
    (cause, *_) = diagnose(model, (X, y), lambda m, b: (m(b[0]) - (1 / b[1])).abs().mean(), adam(model)).causes
    assert cause.kind == "target"


REFUSED = {
    "float classes": (net(3), (X, CLASSES.float()), CROSS_ENTROPY, "target", True),
    "float64 inputs": (net(), (X.double(), Y), MSE, "input", True),
    "float64 both": (net(), (X.double(), Y.double()), MSE, "input", True),
    "whole inputs": (net(), ((X * 3).long(), Y), MSE, "input", True),
    "wrong width": (net(into=5), (X, Y), MSE, "operation", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses(name):
    model, batch, loss_fn, kind, tried = REFUSED[name]
    found = diagnose(model, batch, loss_fn, adam(model))
    cause = found.causes[0]
    assert (cause.kind, cause.severity, cause.tried) == (kind, "broken", tried)
    assert str(found).count(cause.evidence["error"]) == 1
    assert cause.remedy


def test_the_width_that_is_needed():
    model = net(into=5)
    (cause, *_) = diagnose(model, (X, Y), MSE, adam(model)).causes
    assert cause.place.module == "0"
    assert "torch.nn.Linear(8, 32)" in cause.remedy


def test_nothing_to_learn():
    model = net().requires_grad_(False)
    (cause,) = diagnose(model, (X, Y), MSE, adam(model)).causes
    assert (cause.kind, cause.place.parameter, cause.tried) == ("gradient", "0.weight", True)
    assert not model[0].weight.requires_grad


def test_a_loss_that_is_detached():
    model = net()
    (cause,) = diagnose(model, (X, Y), lambda m, b: F.mse_loss(m(b[0]).detach(), b[1]), adam(model)).causes
    assert (cause.kind, cause.tried) == ("loss", False)
    assert "detach" in cause.remedy


def test_an_empty_batch():
    model = net()
    (cause, *_) = diagnose(model, (X[:0], Y[:0]), MSE, adam(model)).causes
    assert (cause.kind, cause.place.op, cause.tried) == ("loss", "mse_loss", False)
    assert "batch[0] is empty" in cause.explanation


def test_labels_that_mark_what_is_ignored():
    labels = CLASSES.clone()
    labels[::9] = -1
    model = net(3)
    (cause, *_) = diagnose(model, (X, labels), CROSS_ENTROPY, adam(model)).causes
    assert (cause.kind, cause.place.op, cause.tried) == ("target", "cross_entropy", True)
    assert "ignore_index=-1" in cause.remedy


def test_scaled_targets_are_within_their_range():
    """Six digits of the smallest and the largest are printed: the targets must not leave [0, 1] by what they lack."""
    model = nn.Sequential(nn.Linear(8, 1), nn.Sigmoid())
    y = torch.linspace(21.67177, 424.15631, 64)[:, None]
    (cause, *_) = diagnose(model, (X, y), supervised(nn.BCELoss()), adam(model)).causes
    assert (cause.kind, cause.tried) == ("target", True)
