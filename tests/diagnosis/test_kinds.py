"""Which kind a cause is of where two might be meant, and what must be no cause: gradients that are sparse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose, supervised

pytestmark = pytest.mark.long


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


X = torch.randn(64, 8, generator=seeded())
BITS = (X[:, :1] > 0).float()
IDS = torch.randint(0, 40, (64, 6), generator=seeded(1))
CLASSES = torch.randint(0, 4, (64,), generator=seeded(2))


def net(out=1, *last):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, out), *last)


def adam(model):
    return torch.optim.Adam(model.parameters(), 1e-2)


class Bag(nn.Module):
    """A classifier of bags of words, whose table has sparse gradients."""

    def __init__(self, bag):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(40, 16, sparse=True) if bag else nn.Embedding(40, 16, sparse=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        z = self.table(x)
        return self.head(z if z.dim() == 2 else z.mean(1))


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 0.05),
    "sparse adam": lambda m: torch.optim.SparseAdam([m.table.weight], 1e-2),
    "none": lambda m: None,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bag", [False, True])
def test_a_sparse_gradient_is_no_fault(bag, optimizer):
    model = Bag(bag)
    found = diagnose(model, (IDS, CLASSES), supervised(F.cross_entropy), OPTIMIZERS[optimizer](model))
    assert found.verdict == "healthy", str(found)
    norm = torch.nn.utils.parameters_to_vector
    F.cross_entropy(model(IDS), CLASSES).backward()
    dense = [p.grad.to_dense() for p in model.parameters()]
    assert found.gradient_norm == pytest.approx(float(norm(dense).norm()), rel=1e-5)


def test_a_sparse_momentum_is_put_back():
    model = Bag(False)
    optimizer = OPTIMIZERS["momentum"](model)
    F.cross_entropy(model(IDS), CLASSES).backward()
    optimizer.step()
    kept = optimizer.state[model.table.weight]["momentum_buffer"]
    before = kept.to_dense()
    diagnose(model, (IDS, CLASSES), supervised(F.cross_entropy), optimizer)
    assert optimizer.state[model.table.weight]["momentum_buffer"] is kept
    assert torch.equal(kept.to_dense(), before)


def test_an_optimizer_that_cannot_take_a_sparse_gradient_is_named():
    model = Bag(False)
    (cause, *_) = diagnose(model, (IDS, CLASSES), supervised(F.cross_entropy), adam(model)).causes
    assert "sparse" in cause.evidence["error"]


OWN = {  # of the user's own loss function: the operation, or the objective
    "div": (lambda z, y: (z / (y > 99).sum()).mean(), "operation", "div"),
    "sqrt": (lambda z, y: (z * 0).square().sum(1).sqrt().mean(), "operation", "sqrt"),
    "std": (lambda z, y: z[:1].std(0).mean(), "operation", "std"),
    "acos": (lambda z, y: (z * 1e4).clamp(-1, 1).acos().mean() + (z * 0 + 1).acos().mean(), "operation", "acos"),
    "log of a relu": (lambda z, y: z.relu().log().mean(), "operation", "log"),
    "log of a softmax": (lambda z, y: -(z * 1e4).softmax(1).log().mean(), "loss", "log"),
    "log of 1 - sigmoid": (lambda z, y: -(1 - (z * 1e4).sigmoid()).log().mean(), "loss", "log"),
    "log of a gathered softmax": (
        lambda z, y: -(z * 1e4).softmax(1).gather(1, y[:, None]).log().mean(),
        "loss",
        "log",
    ),
    "log of a sum of exp": (lambda z, y: (z * 1e4).exp().sum(1).log().mean(), "loss", "exp"),
    "exp by itself": (lambda z, y: (z * 1e4).exp().mean(), "operation", "exp"),
}


@pytest.mark.parametrize("name", OWN)
def test_an_operation_of_the_loss_function(name):
    loss, kind, op = OWN[name]
    model = net(4)
    (cause, *_) = diagnose(model, (X, CLASSES), supervised(loss), adam(model)).causes
    assert (cause.kind, cause.place.module, cause.place.op) == (kind, None, op)


@pytest.mark.parametrize(("rows", "kind"), [(1, "weights"), (40, "uninitialised")])
def test_a_table_with_a_bad_row_was_written(rows, kind):
    model = Bag(False)
    with torch.no_grad():
        model.table.weight[:rows] = float("nan")
        model.table.weight[int(IDS[0, 0])] = float("nan")
    (cause, *_) = diagnose(model, (IDS, CLASSES), supervised(F.cross_entropy), OPTIMIZERS["sgd"](model)).causes
    assert (cause.kind, cause.place.parameter) == (kind, "table.weight")


HINGES = {
    "clamp": lambda z, y: (1 - y * z).clamp(min=0).mean(),
    "relu": lambda z, y: F.relu(1 - z * y).mean(),
    "soft_margin_loss": F.soft_margin_loss,
}


@pytest.mark.parametrize("op", HINGES)
def test_a_margin_wants_signs(op):
    model = net()
    (cause, *_) = diagnose(model, (X, BITS), supervised(HINGES[op]), adam(model)).causes
    assert (cause.kind, cause.place.op, cause.tried) == ("target", op, True)
    right = net()
    assert diagnose(right, (X, BITS * 2 - 1), supervised(HINGES[op]), adam(right)).verdict == "healthy"


FRAMES = torch.randn(12, 6, 8, generator=seeded(3))
LABELS = torch.randint(1, 5, (6, 3), generator=seeded(4))


class Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(5)

    def forward(self, x):
        return self.net(x).softmax(-1)


def ctc(model, batch):
    return F.ctc_loss(model(batch[0]), batch[1], torch.full((6,), 12), torch.full((6,), 3))


@pytest.mark.parametrize("make", [lambda: net(5, nn.Softmax(-1)), Softmax, lambda: net(5)])
def test_ctc_wants_logarithms(make):
    model = make()
    (cause, *_) = diagnose(model, (FRAMES, LABELS), ctc, adam(model)).causes
    assert (cause.kind, cause.place.op, cause.tried) == ("loss", "ctc_loss", True)
    right = net(5, nn.LogSoftmax(-1))
    assert diagnose(right, (FRAMES, LABELS), ctc, adam(right)).verdict == "healthy"


@pytest.mark.parametrize(
    ("model", "loss"), [(net(4), lambda z, y: F.nll_loss(z.softmax(1), y)), (net(4, nn.Softmax(1)), F.nll_loss)]
)
def test_nll_wants_logarithms(model, loss):
    (cause, *_) = diagnose(model, (X, CLASSES), supervised(loss), adam(model)).causes
    assert (cause.kind, cause.place.op, cause.tried) == ("loss", "nll_loss", True)


class Factors(nn.Module):
    """A rating as the product of two vectors."""

    def __init__(self, std):
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items, self.bias = nn.Embedding(200, 64), nn.Embedding(100, 64), nn.Embedding(200, 1)
        nn.init.normal_(self.users.weight, 0.0, std)
        nn.init.normal_(self.items.weight, 0.0, std)

    def forward(self, x):
        product = self.users(x[:, 0]) * self.items(x[:, 1])
        return product.sum(-1) + self.bias(x[:, 0])[:, 0]


def test_vectors_that_are_multiplied_start_small():
    pairs = torch.randint(0, 100, (512, 2), generator=seeded(5))
    stars = torch.randint(1, 6, (512,), generator=seeded(6)).float()
    model = Factors(1.0)
    (cause, *_) = diagnose(model, (pairs, stars), supervised(F.mse_loss), adam(model)).causes
    assert (cause.kind, cause.place.parameter, cause.tried) == ("weights", "users.weight", True)
    small = Factors(0.1)
    found = diagnose(small, (pairs, stars), supervised(F.mse_loss), torch.optim.SGD(small.parameters(), 1.0))
    assert found.verdict == "healthy", str(found)
