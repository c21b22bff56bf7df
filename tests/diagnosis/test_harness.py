"""What diagnose() may be given, and what it puts back: torch.func, every kind of batch, whatever a pass changes."""

import collections
import copy
import dataclasses
import itertools
import math
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import initlab
from initlab import diagnose
from initlab.diagnosis.batch import leaves, mapped

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(32, 8, generator=G), torch.randn(32, 1, generator=G)


def net(out=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, out))


def adam(model):
    return torch.optim.Adam(model.parameters(), 1e-3)


# torch.func


def vmapped(m, b):
    return F.mse_loss(torch.func.vmap(m)(b[0]), b[1])


def jacobian(m, b):
    return torch.func.vmap(torch.func.jacrev(lambda z: m(z)[0]))(b[0]).pow(2).mean() + m(b[0]).mean()


def slope(m, b):
    return torch.func.vmap(torch.func.grad(lambda z: m(z).tanh()[0]))(b[0]).square().mean() + m(b[0]).mean()


def hessian(m, b):
    return torch.func.vmap(torch.func.hessian(lambda z: m(z).tanh()[0]))(b[0][:4]).square().mean() + m(b[0]).mean()


def called(m, b):
    p = dict(m.named_parameters())
    row = torch.func.vmap(lambda x, y: (torch.func.functional_call(m, p, (x,)) - y).square().sum())
    return row(b[0], b[1]).mean()


def forward_mode(m, b):
    out, change = torch.func.jvp(m, (b[0],), (torch.ones_like(b[0]),))
    return F.mse_loss(out, b[1]) + change.square().mean()


@pytest.mark.parametrize("loss_fn", [vmapped, jacobian, slope, hessian, called, forward_mode])
def test_transforms_of_torch_func_are_no_error(loss_fn):
    model = net()
    found = diagnose(model, (X, Y), loss_fn, adam(model))
    assert found.verdict == "healthy", found


def test_a_failure_inside_a_transform_is_found():
    model = net()

    def loss_fn(m, b):
        return torch.func.vmap(lambda z: m(z).log()[0])(b[0]).mean()

    (cause, *_) = diagnose(model, (X, Y), loss_fn, adam(model)).causes
    assert (cause.kind, cause.place.op) == ("operation", "log")


# Batches


@dataclasses.dataclass
class Batch:
    x: object
    y: object


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: object
    y: object


Pair = collections.namedtuple("Pair", "x y")


def encoding(x, y):
    from transformers import BatchEncoding

    return BatchEncoding({"x": x, "y": y})


def output(x, y):
    from transformers.utils import ModelOutput

    @dataclasses.dataclass
    class Output(ModelOutput):
        x: object = None
        y: object = None

    return Output(x=x, y=y)


BATCHES = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
    "dataclass": Batch,
    "frozen": Frozen,
    "named tuple": Pair,
    "nested": lambda x, y: ({"x": x}, {"y": [y]}),
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "numpy in a dict": lambda x, y: {"x": x.double().numpy(), "y": y.numpy()},
    "BatchEncoding": encoding,
    "ModelOutput": output,
}


def parts(batch):
    found = [torch.as_tensor(leaf.source, dtype=torch.float32) for leaf in leaves(batch)]
    return found[0], found[1]


OF_TRANSFORMERS = ("BatchEncoding", "ModelOutput")


@pytest.mark.long_if.with_args(lambda kind: kind in OF_TRANSFORMERS)
@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_of_any_kind_is_looked_into_and_left_as_it_was(kind):
    if kind in OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    x = X.clone()
    x[3, 4] = math.nan
    batch = BATCHES[kind](x, Y.clone())
    before = [(leaf.source, leaf.tensor.clone()) for leaf in leaves(batch)]

    def loss_fn(model, batch):
        x, y = parts(batch)
        return F.mse_loss(model(x), y)

    model = net()
    (cause, *_) = diagnose(model, batch, loss_fn, adam(model)).causes
    assert (cause.kind, cause.place.feature, cause.tried) == ("input", 4, True)
    for leaf, (source, values) in zip(leaves(batch), before, strict=True):
        assert leaf.source is source
        assert torch.equal(leaf.tensor.nan_to_num(7), values.nan_to_num(7))
    scope = {"batch": batch, "torch": torch, "initlab": initlab}
    exec(cause.remedy, scope)  # as the user would
    assert type(scope["batch"]) is type(batch)
    assert bool(torch.isfinite(loss_fn(model, scope["batch"])))


@pytest.mark.parametrize("kind", [k for k in BATCHES if k not in ("BatchEncoding", "ModelOutput")])
def test_a_batch_is_mapped_to_one_of_its_kind(kind):
    batch = BATCHES[kind](X, Y)
    made = mapped(batch, lambda x: x + 1)
    assert type(made) is type(batch)
    for new, old in zip(leaves(made), leaves(batch), strict=True):
        assert torch.equal(new.tensor, old.tensor + 1)
    assert torch.equal(leaves(batch)[0].tensor.float(), X)


# What is put back


class Counter:
    def __init__(self):
        self.count, self.seen, self.scale = 0, [[0]], torch.ones(3)


class Changing(nn.Module):
    """Changes whatever a pass can change, and what holds it."""

    def __init__(self):
        super().__init__()
        self.inner = net()
        self.nested = {"a": [[1], {"b": [2]}]}
        self.counter = Counter()
        self.list = iter([1.0, 2.0, 3.0] * 1000)
        self.numbers = itertools.count()
        self.cycle = itertools.cycle([1, 2, 3])
        self.python = random.Random(3)
        self.generator = numpy.random.default_rng(3)
        self.old = numpy.random.RandomState(3)
        self.torch = [torch.Generator().manual_seed(3)]
        self.array = numpy.zeros(3)

    def forward(self, x):
        self.nested["a"][0].append(3)
        self.nested["a"][1]["b"].append(4)
        self.nested["c"] = 1
        self.counter.count += 1
        self.counter.seen[0].append(1)
        self.counter.scale *= 2
        next(self.list), next(self.numbers), next(self.cycle)
        self.python.random(), self.generator.random(), self.old.rand()
        torch.rand(1, generator=self.torch[0])
        self.array += 1
        return self.inner(x)

    def taken_down(self):
        return (
            copy.deepcopy(self.nested),
            (self.counter.count, copy.deepcopy(self.counter.seen), self.counter.scale.tolist()),
            (next(copy.copy(self.list)), repr(self.numbers), list(itertools.islice(copy.copy(self.cycle), 4))),
            (self.python.getstate(), str(self.generator.bit_generator.state), str(self.old.get_state())),
            self.torch[0].get_state().tolist(),
            self.array.tolist(),
            self.list.__reduce__()[2],
        )


def test_nested_attributes_generators_and_iterators_are_put_back():
    model = Changing()
    held = (model.nested, model.nested["a"], model.counter, model.counter.seen, model.list, model.array)
    before = model.taken_down()
    optimizer = adam(model)
    found = diagnose(model, (X * 1000, Y), lambda m, b: F.mse_loss(m(b[0]), b[1]), optimizer, steps=3)
    assert found.causes  # remedies were tried
    assert model.taken_down() == before
    now = (model.nested, model.nested["a"], model.counter, model.counter.seen, model.list, model.array)
    assert all(a is b for a, b in zip(held, now, strict=True))


class Loader:
    """An iterator over batches, as a DataLoader's, with a position of its own."""

    def __init__(self):
        self.at, self.order = 0, list(range(10))

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        self.order.append(self.at)
        return X[self.at : self.at + 4], Y[self.at : self.at + 4]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_what_a_loss_function_closes_over_is_put_back(error):
    steps, scale = 0, torch.ones(())
    loader, scaler = Loader(), torch.amp.GradScaler("cpu", init_scale=2.0)
    history = {"losses": []}

    def loss_fn(model, batch):
        nonlocal steps
        steps += 1
        scale.mul_(2.0)
        x, y = next(loader)
        scaler.scale(torch.ones(()))
        scaler.update(4.0)
        loss = F.mse_loss(model(x), y)
        history["losses"].append(float(loss))
        if error is not None and steps == 3:
            raise error("in the third pass")
        return loss

    model = net()
    optimizer = adam(model)
    clipper = initlab.GradClipper(optimizer, max_norm=1.0)
    counted = clipper.state_dict()
    state, kept = scaler.get_scale(), [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                diagnose(model, X, loss_fn, optimizer, steps=5)
        else:
            diagnose(model, X, loss_fn, optimizer, steps=5)
        assert (steps, float(scale), history, loader.at, len(loader.order)) == (0, 1.0, {"losses": []}, 0, 10)
        assert scaler.get_scale() == state
        assert clipper.state_dict() == counted
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))
        assert not optimizer.state


def test_what_holds_a_lock_or_is_a_librarys_is_left_alone():
    import threading

    class Shared:
        def __init__(self):
            self.lock, self.count = threading.Lock(), 0

    shared, model = Shared(), net()

    def loss_fn(m, b):
        shared.count += 1
        return F.mse_loss(m(b[0]), b[1])

    diagnose(model, (X, Y), loss_fn)
    assert shared.count > 0
