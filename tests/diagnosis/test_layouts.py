"""diagnose() on dimensions in the wrong order: what torch refuses, and batches that are taken for time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import initlab
from initlab import diagnose, supervised

pytestmark = pytest.mark.long

G = torch.Generator().manual_seed(0)
C = torch.randint(0, 4, (32,), generator=G)
IM = torch.randn(32, 3, 8, 8, generator=G) + C.view(-1, 1, 1, 1)
SEQ = torch.randn(32, 10, 6, generator=G) + C.view(-1, 1, 1)


def cnn(ch=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(ch, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


CE = initlab.supervised(nn.CrossEntropyLoss())


def adam(m):
    return torch.optim.Adam(m.parameters(), 1e-2)


def case(m, b, loss=CE):
    return m, b, loss, adam(m)


class R(nn.Module):
    def __init__(s, kind, bf, last=lambda h: h[:, -1]):
        super().__init__()
        torch.manual_seed(0)
        s.k = kind
        s.last = last
        s.r = (
            nn.GRU(6, 16, batch_first=bf)
            if kind == "gru"
            else nn.TransformerEncoderLayer(6, 2, 16, dropout=0.0, batch_first=bf)
            if kind == "enc"
            else nn.MultiheadAttention(6, 2, batch_first=bf)
        )
        s.f = nn.Linear(16 if kind == "gru" else 6, 4)

    def forward(s, x):
        h = s.r(x) if s.k == "enc" else s.r(x)[0] if s.k == "gru" else s.r(x, x, x)[0]
        return s.f(s.last(h))


class T(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.e = nn.Embedding(20, 16)
        s.f = nn.Linear(16, 20)

    def forward(s, x):
        return s.f(s.e(x))


IDS = torch.randint(0, 20, (16, 9), generator=G)


def mlp(i=192, o=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(i, 16), nn.ReLU(), nn.Linear(16, o))


def conv1d():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))


class OverRows(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net, self.softmax = mlp(), nn.Softmax(dim)

    def forward(self, x):
        return self.softmax(self.net(x)).clamp_min(1e-9).log()


REFUSED = {
    "channels last": (lambda: case(cnn(), (IM.movedim(1, -1).contiguous(), C)), "input"),
    "no channels": (lambda: case(cnn(1), (IM[:, 0], C)), "input"),
    "one channel for three": (lambda: case(cnn(3), (IM[:, :1], C)), "input"),
    "not flattened": (lambda: case(mlp(), (IM, C)), "input"),
    "channels last, 1d": (lambda: case(conv1d(), (SEQ, C)), "input"),
    "features before time": (lambda: case(R("gru", True), (SEQ.transpose(1, 2).contiguous(), C)), "input"),
    "classes last": (lambda: case(T(), (IDS, IDS)), "loss"),
    "one-hot classes": (lambda: case(mlp(), (IM.flatten(1), F.one_hot(C, 4))), "target"),
    "a column of classes": (lambda: case(mlp(), (IM.flatten(1), C[:, None])), "target"),
    "a row of labels": (
        lambda: case(mlp(192, 1), (IM.flatten(1), (C > 1).float()), initlab.supervised(nn.BCEWithLogitsLoss())),
        "target",
    ),
}
TIME = {"gru": lambda h: h[:, -1], "enc": lambda h: h.mean(1), "mha": lambda h: h.mean(1)}


@pytest.mark.parametrize("name", REFUSED)
def test_another_order_is_tried(name):
    make, kind = REFUSED[name]
    cause = diagnose(*make()).causes[0]
    assert (cause.kind, cause.severity, cause.tried) == (kind, "broken", True), str(cause)


@pytest.mark.parametrize("kind", TIME)
def test_a_batch_that_is_taken_for_time(kind):
    cause = diagnose(*case(R(kind, False, TIME[kind]), (SEQ, C))).causes[0]
    assert (cause.kind, cause.severity, cause.tried) == ("input", "warning", True)
    assert "batch_first" in cause.remedy


def test_a_softmax_over_the_batch():
    cause = diagnose(*case(OverRows(0), (IM.flatten(1), C), initlab.supervised(nn.NLLLoss()))).causes[0]
    assert (cause.place.module, cause.place.op, cause.tried) == ("softmax", "softmax", True)


RIGHT = {
    "images": lambda: case(cnn(), (IM, C)),
    "batch first": lambda: case(R("gru", True), (SEQ, C)),
    "attention": lambda: case(R("enc", True, lambda h: h.mean(1)), (SEQ, C)),
    "time first": lambda: case(R("gru", False, lambda h: h[-1]), (SEQ.transpose(0, 1).contiguous(), C)),
    "softmax": lambda: case(OverRows(1), (IM.flatten(1), C), initlab.supervised(nn.NLLLoss())),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_in_order(name):
    found = diagnose(*RIGHT[name]())
    assert found.causes == (), str(found)


class Merges(nn.Module):
    """A mean over the batch where one over time was meant, or one that is meant."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.how = nn.Linear(6, 32), nn.Linear(32, 1), how

    def forward(self, x):
        h = torch.relu(self.body(x))
        if self.how == "centred":
            return self.head(h - h.mean(0))
        merged = {"mean": lambda: h.mean(0, keepdim=True), "amax": lambda: h.amax(dim=0)[None]}[self.how]()
        return self.head(merged.expand_as(h))


@pytest.mark.parametrize("how", ["mean", "amax"])
def test_a_reduction_over_the_batch(how):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    model = Merges(how)
    found = diagnose(model, (x, x[:, :1] - x[:, 1:2]), supervised(nn.MSELoss()), torch.optim.Adam(model.parameters()))
    assert (found.causes[0].kind, found.causes[0].place.op) == ("operation", how), found
    assert "every row gets the same output" in found.causes[0].explanation


def test_a_reduction_over_the_batch_that_is_meant():
    """Statistics of the batch, one prediction for all rows whose inputs are one, and a slow run."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    y = x[:, :1] - x[:, 1:2]
    for how, inputs, targets in (("centred", x, y), ("mean", x, torch.full_like(y, 3.0))):
        model = Merges(how)
        found = diagnose(model, (inputs, targets), supervised(nn.MSELoss()), torch.optim.Adam(model.parameters(), 1e-2))
        assert not any(cause.place.op == "mean" for cause in found.causes), found
