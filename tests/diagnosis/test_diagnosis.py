"""diagnose(): what it restores, what it finds in models of our own, what it says.

The faults in tests/faults were written without sight of its rules and are judged in test_faults.py; these here go
with the rules, one or two each.
"""

import copy
import functools
import itertools
import json
import math
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import initlab
from initlab import cli, diagnose, supervised
from initlab.diagnosis import fixes, names, ranks, report, state
from initlab.diagnosis.batch import features, leaves
from initlab.diagnosis.losses import loss_call
from initlab.diagnosis.origin import Search
from initlab.diagnosis.stats import measure

CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())


def digits(rows=64, raw=False):
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data[:rows], dtype=torch.float32), torch.tensor(data.target[:rows])
    return (x, y) if raw else ((x - x.mean(0)) / x.std(0).clamp_min(0.1), y)


def wine(raw=False):
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    x, y = torch.tensor(x[::2], dtype=torch.float32), torch.tensor(y[::2])
    return (x, y) if raw else ((x - x.mean(0)) / x.std(0), y)


def mlp(*widths, activation=nn.ReLU):
    torch.manual_seed(0)
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr=lr)


class Everything(nn.Module):
    """Changes whatever a module can change while it runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(32, 10)
        self.tied = self.head.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.plain = torch.zeros(4)
        self.history = []
        self.calls = 0
        self.table = {"a": 1}
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.plain += torch.rand(4, generator=self.generator)
        self.history.append(float(self.plain.sum()))
        self.table["b"] = self.calls
        self.frozen.data.mul_(2.0)
        random.random(), numpy.random.rand()
        self.late = torch.rand(1)
        return self.head(self.inner(x))


def take_down(model, optimizer, batch):
    """All that diagnose promises to restore, as bytes and identities."""

    def bits(tensor):
        x = tensor.detach().contiguous()
        return x.reshape(-1).view(torch.uint8).tolist() if x.numel() else [], tensor.dtype, tuple(tensor.shape)

    held = [*model.named_parameters(), *model.named_buffers()]
    seen = {
        "tensors": [(n, id(t), t.data_ptr(), bits(t), t.requires_grad, t._version) for n, t in held],
        "gradients": [(n, id(t.grad), None if t.grad is None else bits(t.grad)) for n, t in model.named_parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            [len(getattr(m, name)) for name in vars(m) if name.endswith("hooks") and getattr(m, name) is not None]
            for m in model.modules()
        ],
        "batch": [(*bits(t), t.requires_grad, t._version, id(t.grad)) for t in batch],
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
        "grad mode": torch.is_grad_enabled(),
    }
    if isinstance(model, Everything):
        seen["own"] = (model.calls, list(model.history), dict(model.table), bits(model.plain), hasattr(model, "late"))
        seen["generator"] = model.generator.get_state().tolist()
    if optimizer is not None:
        state = optimizer.state
        seen["optimizer"] = [
            (n, [(k, id(v), bits(v) if torch.is_tensor(v) else v) for k, v in state[p].items()] if p in state else None)
            for n, p in model.named_parameters()
        ]
        seen["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        seen["optimizer's hooks"] = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    return seen


def fails(phase):
    """A loss function that raises, or gives NaN, in some phase."""

    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("in backward")

    def loss_fn(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if phase == "forward":
            raise RuntimeError("in forward")
        if phase == "backward":
            return Raises.apply(loss)
        if phase == "interrupt":
            raise KeyboardInterrupt
        return loss * math.nan if phase == "nan" else loss

    return loss_fn


@pytest.mark.parametrize("optimizer", [None, "new", "used"])
@pytest.mark.parametrize("phase", ["", "nan", "forward", "backward", "interrupt"])
def test_everything_is_restored(phase, optimizer):
    model, batch = Everything(), digits()
    model.inner[3].eval()
    chosen = None if optimizer is None else torch.optim.AdamW(model.parameters(), lr=10.0)
    if optimizer == "used":
        CROSS_ENTROPY(model, batch).backward()  # leaves gradients
        chosen.step()
    before = take_down(model, chosen, batch)
    if phase == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            diagnose(model, batch, fails(phase), chosen)
    else:
        found = diagnose(model, batch, fails(phase), chosen, steps=3)
        assert found.verdict == "broken" or phase == ""
    assert take_down(model, chosen, batch) == before


def test_a_graph_of_the_users_own_survives():
    model, batch = mlp(64, 16, 10), digits()
    loss = CROSS_ENTROPY(model, batch)
    diagnose(model, batch, CROSS_ENTROPY, sgd(model))
    loss.backward()  # raises if a parameter counts as changed
    assert all(p.grad.isfinite().all() for p in model.parameters())


CRITIC = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


@pytest.mark.parametrize("how", ["closure", "global", "method", "partial"])
def test_other_models_that_the_loss_function_uses_are_restored(how):
    critic = CRITIC if how == "global" else copy.deepcopy(CRITIC)
    critic(torch.randn(4, 8)).sum().backward()  # gradients that must not be added to

    class Judge:
        def __init__(self):
            self.critic = critic

        def loss(self, model, batch):
            return self.critic(model(batch)).mean()

    by_global = lambda model, batch: CRITIC(model(batch)).mean()  # noqa: E731
    by_closure = lambda model, batch: critic(model(batch)).mean()  # noqa: E731
    partial = functools.partial(lambda critic, model, batch: critic(model(batch)).mean(), critic)
    loss_fn = {"closure": by_closure, "global": by_global, "method": Judge().loss, "partial": partial}[how]
    generator, batch = nn.Linear(4, 8), torch.randn(6, 4)
    batch = (batch.requires_grad_() * 1).detach().requires_grad_()
    batch.grad = torch.ones_like(batch)
    before = take_down(critic, None, [batch]), batch.grad.clone()
    diagnose(generator, batch, loss_fn, sgd(generator))
    assert (take_down(critic, None, [batch])) == before[0]
    assert torch.equal(batch.grad, before[1])


class Falls(nn.Module):
    """Catches an error of one of its modules and goes on."""

    def __init__(self, then):
        super().__init__()
        torch.manual_seed(0)
        self.wrong, self.right, self.then = nn.Linear(3, 10), nn.Linear(64, 10), then

    def forward(self, x):
        try:
            return self.wrong(x)
        except RuntimeError:
            return self.then(self.right(x))


def refuse(x):
    raise ValueError("no")


def test_an_error_that_the_model_catches_is_none():
    (cause, *_) = diagnose(Falls(torch.log), digits(), CROSS_ENTROPY).causes
    assert (cause.kind, cause.place.module, cause.place.op) == ("operation", "", "log")
    assert diagnose(Falls(torch.tanh), digits(), CROSS_ENTROPY).verdict == "healthy"
    (cause, *_) = diagnose(Falls(refuse), digits(), CROSS_ENTROPY).causes
    assert (cause.kind, cause.place.module, cause.place.op) == ("operation", "", None)
    assert "ValueError: no" in cause.explanation


def test_parameters_that_are_moved_come_back():
    model = nn.Linear(2, 2)
    weight, address = model.weight, model.weight.data_ptr()
    kept = state.Snapshot([model], None, [])
    before = weight.detach().clone()
    model.half()
    model.weight.requires_grad_(False)
    model.weight = nn.Parameter(torch.zeros(2, 2))
    model.extra = nn.Linear(1, 1)
    kept.restore()
    assert model.weight is weight
    assert weight.data_ptr() == address
    assert weight.dtype == torch.float32
    assert weight.requires_grad
    assert torch.equal(weight, before)
    assert not hasattr(model, "extra")


def test_expanded_and_strided_tensors_come_back():
    batch = [torch.ones(1, 3).expand(4, 3), torch.arange(12.0).view(3, 4).t(), torch.ones(2, dtype=torch.bool)]
    kept = state.Snapshot([], None, batch)
    values = [t.clone() for t in batch]
    batch[0][:1].zero_(), batch[1].zero_(), batch[2].zero_()
    kept.restore()
    assert all(torch.equal(t, v) for t, v in zip(batch, values, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_there_in_any_mode(mode):
    model, batch = mlp(64, 16, 10), digits()
    with mode():
        found = diagnose(model, batch, CROSS_ENTROPY)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert found.gradient_norm > 0


class Own(nn.Module):
    """A model with a line of its own between two layers."""

    def __init__(self, line):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.middle, self.head = nn.Linear(64, 32), nn.Identity(), nn.Linear(32, 10)
        self.middle.forward = line

    def forward(self, x):
        return self.head(self.middle(self.encoder(x)))


OPERATIONS = {
    "log": (lambda h: torch.log(h.relu()), "log"),
    "sqrt": (lambda h: torch.sqrt(h * (h > 0)), "sqrt"),  # only backward
    "where": (lambda h: torch.where(h > 0, torch.log(h * (h > 0)), 0.0), "log"),  # only backward
    "div": (lambda h: h / (h * (h > 9)).norm(dim=1, keepdim=True), "div"),
    "rdiv": (lambda h: h * (1 / (h * 0)), "div"),
    "exp": (lambda h: torch.exp(h * 100) / torch.exp(h * 100).sum(1, keepdim=True), "exp"),
    "softmax": (lambda h: F.softmax(h.masked_fill(torch.arange(len(h))[:, None] == 0, -math.inf), 1), "softmax"),
    "reciprocal": (lambda h: h * (h * 0).reciprocal(), "reciprocal"),
    "pow": (lambda h: h**0.5, "pow"),
    "std": (lambda h: h / h[:1].std(0), "std"),
    "rsqrt": (lambda h: h * torch.rsqrt(h.relu()), "rsqrt"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    line, op = OPERATIONS[name]
    model = Own(line)
    found = diagnose(model, digits(), CROSS_ENTROPY, adam(model))
    (cause, *_) = found.causes
    assert (cause.kind, cause.severity, cause.place.module, cause.place.op) == ("operation", "broken", "middle", op)
    assert "middle" in cause.remedy


def test_masks_are_no_fault():
    def line(h):
        mask = torch.full((32, 32), -math.inf).triu(1)
        scores = h[:, :, None] * h[:, None, :] + mask
        return F.softmax(scores, -1).sum(-1) * h

    model = Own(line)
    assert diagnose(model, digits(), CROSS_ENTROPY, adam(model)).causes == ()


def test_attention_whose_keys_are_all_masked():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 10)

        def forward(self, x):
            hidden = torch.zeros(len(x), 8, dtype=torch.bool)
            hidden[0] = True
            return self.head(self.attention(x, x, x, key_padding_mask=hidden)[0].mean(1))

    x, y = digits()
    (cause, *_) = diagnose(Net(), (x.view(-1, 8, 8), y), CROSS_ENTROPY).causes
    assert (cause.kind, cause.place.module, cause.place.op) == ("operation", "attention", "softmax")


def test_batch_norm_of_one_row():
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    (cause, *_) = diagnose(model, digits(1, raw=True), CROSS_ENTROPY).causes
    assert (cause.kind, cause.place.module, cause.place.op) == ("operation", "1", "batch_norm")
    assert cause.tried


def test_input_with_nan():
    x, y = wine()
    x[3, 5] = x[8, 5] = math.nan
    x[9, 2] = math.inf
    model = mlp(13, 16, 3)
    (cause, *_) = diagnose(model, (x, y), CROSS_ENTROPY, adam(model)).causes
    assert (cause.kind, cause.place.feature) == ("input", [2, 5])
    assert cause.evidence["rows"] == f"3 of {len(x)}"
    assert cause.tried


def test_missing_values_that_the_model_handles_are_no_fault():
    x, y = wine()
    x[3, 5] = math.nan
    model = mlp(13, 16, 3)
    assert diagnose(model, (x, y), lambda m, b: F.cross_entropy(m(b[0].nan_to_num()), b[1])).verdict == "healthy"


def test_features_of_other_scales():
    model = mlp(13, 32, 3, activation=nn.Tanh)
    (cause, *_) = diagnose(model, wine(raw=True), CROSS_ENTROPY, sgd(model)).causes
    assert (cause.kind, cause.place.feature) == ("input", 12)  # proline, around 700
    assert cause.tried
    assert "StandardScaler" in cause.remedy
    normalised = nn.Sequential(nn.BatchNorm1d(13), *mlp(13, 32, 3))
    assert diagnose(normalised, wine(raw=True), CROSS_ENTROPY, sgd(normalised)).causes == ()


def test_raw_pixels():
    x, y = digits(raw=True)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    batch = (x * 16).view(-1, 1, 8, 8), y
    (cause, *_) = diagnose(model, batch, CROSS_ENTROPY, sgd(model)).causes
    assert cause.kind == "input"
    assert cause.tried


@pytest.mark.parametrize(
    ("change", "loss", "fixable"),
    [
        (lambda y: y + 1, nn.CrossEntropyLoss(), True),
        (lambda y: y + 1, lambda z, y: -F.log_softmax(z, 1).gather(1, y[:, None]).mean(), False),
        (lambda y: (y + 1).float()[:, None].expand(-1, 10), nn.BCEWithLogitsLoss(), True),
        (lambda y: torch.where(y == 3, math.nan, y.float())[:, None], nn.MSELoss(), True),
        (lambda y: y.float()[:, None], lambda z, y: F.mse_loss(z[:, :1], y.log()), True),
    ],
)
def test_target(change, loss, fixable, recwarn):
    x, y = digits()
    model = mlp(64, 16, 10)
    (cause, *_) = diagnose(model, (x, change(y)), supervised(loss), adam(model)).causes
    assert (cause.kind, cause.severity) == ("target", "broken")
    assert cause.tried or not fixable


def reweighted(model, write):
    for module in model:
        if isinstance(module, nn.Linear):
            write(module.weight)
            nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (lambda: reweighted(mlp(64, *[64] * 9, 10), nn.init.normal_), "0.weight"),
        (lambda: reweighted(mlp(64, 64, 64, 10), nn.init.normal_), None),
        (lambda: reweighted(mlp(64, 128, 128, 10, activation=nn.Tanh), nn.init.normal_), None),
        (lambda: reweighted(mlp(64, *[64] * 6, 10), lambda w: nn.init.normal_(w, std=0.005)), "0.weight"),
        (lambda: mlp(64, *[32] * 12, 10, activation=nn.Sigmoid), "sigmoids"),
        (lambda: reweighted(mlp(64, 32, 10), nn.init.zeros_), "0.weight"),
        (lambda: reweighted(mlp(64, 32, 32, 10), lambda w: nn.init.constant_(w, 0.05)), "0.weight"),
    ],
    ids=["exploding", "too large", "saturated", "vanishing", "sigmoids", "zeros", "equal"],
)
def test_weights(model, place):
    model = model()
    (cause, *_) = diagnose(model, digits(), CROSS_ENTROPY, sgd(model)).causes
    assert cause.kind == "weights"
    assert place in (None, "sigmoids") or cause.place.parameter == place
    assert "initlab.init_model_(model" in cause.remedy
    assert cause.tried or place == "sigmoids"  # outputs stay the same for every row, whatever the weights


def test_what_the_gain_becomes():
    model = reweighted(mlp(64, *[64] * 9, 10), nn.init.normal_)
    (cause, *_) = diagnose(model, digits(), CROSS_ENTROPY, sgd(model)).causes
    assert cause.evidence["gain"] > 1e3
    assert 0.1 < cause.evidence["gain after the remedy"] < 10


def test_several_causes_at_once():
    """NaN, weights and a rate: each shows itself once the one before is mended, and the remedy mends all."""
    x, y = digits()
    x[3, 5] = math.nan
    model = mlp(64, 64, 64, 10)
    found = diagnose(model, (x, y), CROSS_ENTROPY, adam(model, 10.0))
    assert [cause.kind for cause in found.causes[:2]] == ["input", "learning rate"]
    assert found.causes[0].tried
    assert "group" in found.causes[0].remedy


def test_an_infinity_that_hides():
    """x / inf is 0: the loss is finite, and the model blind."""
    x, y = digits()
    model = Own(lambda h: h / (h.square() * 1000).sum(1, keepdim=True)).half()

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0].half() * 30).float(), batch[1])

    (cause, *_) = diagnose(model, (x, y), loss_fn, sgd(model)).causes
    assert (cause.kind, cause.place.module) == ("precision", "middle")


def test_one_layer_too_large():
    model = mlp(64, 64, 64, 64, 10)
    model[4].weight.data *= 1000
    (cause, *_) = diagnose(model, digits(), CROSS_ENTROPY, sgd(model)).causes
    assert (cause.kind, cause.place.module) == ("weights", "4")


def test_dead_units():
    model = mlp(64, 64, 64, 10)
    nn.init.constant_(model[2].bias, -20.0)
    (cause, *_) = diagnose(model, digits(), CROSS_ENTROPY, sgd(model)).causes
    assert (cause.kind, cause.place.parameter) == ("weights", "2.bias")
    assert cause.tried


class Block(nn.Module):
    """A branch whose last weight and whose scale start at zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(64, 64), nn.Linear(64, 64), nn.Parameter(torch.zeros(64))
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return x + self.gate * self.b(self.a(x).relu())


def recurrent():
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.GRU(8, 32, batch_first=True), "head": nn.Linear(32, 10)})
    model.forward = lambda x: model["head"](model["rnn"](x.view(-1, 8, 8))[0][:, -1])
    return model


def lora():
    torch.manual_seed(0)
    low, high = nn.Linear(64, 4, bias=False), nn.Linear(4, 10, bias=False)
    nn.init.zeros_(high.weight)
    model = nn.ModuleDict({"base": nn.Linear(64, 10).requires_grad_(False), "low": low, "high": high})
    model.forward = lambda x: model["base"](x) + high(low(x))
    return model


HEALTHY = {
    "zero head": lambda: nn.Sequential(*mlp(64, 32, 32), nn.ReLU(), zero_head(32)),
    "zero branches": lambda: nn.Sequential(*[Block() for _ in range(3)], zero_head()),
    "deep, He": lambda: started(mlp(64, *[64] * 19, 10)),
    "deep, Xavier": lambda: started(mlp(64, *[64] * 14, 10, activation=nn.Tanh)),
    "deep, LeCun": lambda: started(mlp(64, *[64] * 11, 10, activation=nn.SELU), "lecun"),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(64), *mlp(64, 32, 10)),
    "recurrent": recurrent,
    "low rank": lora,
}


def zero_head(width=64):
    head = nn.Linear(width, 10)
    nn.init.zeros_(head.weight)
    return head


def started(model, recipe="auto"):
    initlab.init_model_(model, seed=0, recipe=recipe)
    return model


@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm(name):
    torch.manual_seed(0)
    model = HEALTHY[name]()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-4)
    found = diagnose(model, digits(), CROSS_ENTROPY, optimizer)
    assert found.causes == (), str(found)


@pytest.mark.parametrize(("optimizer", "lr"), [(adam, 10.0), (adam, 1.0), (sgd, 100.0)])
def test_learning_rate(optimizer, lr):
    model = mlp(64, 64, 10)
    (cause, *_) = diagnose(model, digits(), CROSS_ENTROPY, optimizer(model, lr)).causes
    assert (cause.kind, cause.severity) == ("learning rate", "broken")
    assert 0 < cause.evidence["rate that would not diverge"] < lr
    assert cause.tried


def test_a_rise_that_is_made_good_is_no_fault():
    """(w - 1)^2, its error times -1.2 in the first step and 0.1 in each of the others."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = sgd(model, 1.1)

    def settle(optimizer, args, kwargs):
        optimizer.param_groups[0]["lr"] = 0.45

    optimizer.register_step_post_hook(settle)
    batch = torch.ones(4, 1), torch.ones(4, 1)
    found = diagnose(model, batch, supervised(nn.MSELoss()), optimizer, steps=1)
    assert found.losses == pytest.approx((1.0, 1.44))
    assert found.causes == ()
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.param_groups[0].update(lr=1.1))
    assert diagnose(model, batch, supervised(nn.MSELoss()), optimizer).causes[0].kind == "learning rate"


def test_targets_are_to_blame_only_alone():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(-1.0))

        def forward(self, x):
            return x

    x = torch.ones(4, 1)
    for loss, kind in (
        (lambda m, b: (b[1] * m.scale).log().sum(), "operation"),
        (lambda m, b: (-b[1]).log().sum() * m.scale, "target"),
    ):
        (cause, *_) = diagnose(Scaled(), (x, x + 1), loss).causes
        assert (cause.kind, cause.place.op) == (kind, "log")


def test_long_recurrence():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.into, self.again, self.out = nn.Linear(1, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 1)
            nn.init.orthogonal_(self.again.weight, 1.3)

        def forward(self, x):
            h = torch.zeros(len(x), 16)
            for t in range(x.shape[1]):
                h = self.again(h) + self.into(x[:, t : t + 1])
            return self.out(h)

    model, x = Net(), torch.randn(8, 60) * 0.1
    (cause, *_) = diagnose(model, (x, x.sum(1, keepdim=True)), supervised(nn.MSELoss()), sgd(model, 0.01)).causes
    assert (cause.kind, cause.place.parameter) == ("gradient", "again.weight")
    assert "GradClipper" in cause.remedy


@pytest.mark.parametrize(
    ("model", "loss", "op"),
    [
        (lambda: nn.Sequential(*mlp(64, 64, 10), nn.Softmax(1)), nn.CrossEntropyLoss(), "cross_entropy"),
        (lambda: nn.Sequential(*mlp(64, 64, 10), nn.Softmax(1)), nn.NLLLoss(), "nll_loss"),
        (lambda: mlp(64, 64, 10), nn.NLLLoss(), "nll_loss"),
        (lambda: mlp(64, 64, 10), lambda z, y: nn.BCELoss()(z, F.one_hot(y, 10).float()), "binary_cross_entropy"),
        (
            lambda: mlp(64, 64, 10),
            lambda z, y: nn.BCEWithLogitsLoss()(z.sigmoid(), F.one_hot(y, 10).float()),
            "binary_cross_entropy_with_logits",
        ),
        (lambda: mlp(64, 64, 10), lambda z, y: F.kl_div(z.softmax(1), F.one_hot(y, 10).float()), "kl_div"),
        (lambda: mlp(64, 64, 10), lambda z, y: -(z * 1e4).softmax(1).log()[range(len(y)), y].mean(), "log"),
        (lambda: mlp(64, 64, 10), lambda z, y: (z[y > 99] ** 2).mean(), "mean"),
        (lambda: mlp(64, 64, 10), lambda z, y: F.cross_entropy(z, y * 0 - 100), "cross_entropy"),
        (lambda: mlp(64, 64, 10), lambda z, y: (z * 1e4).exp().mean(), "exp"),
    ],
)
def test_loss_function(model, loss, op):
    model = model()
    (cause, *_) = diagnose(model, digits(), supervised(loss), adam(model)).causes
    kind = "operation" if op in ("mean", "exp") else "loss"  # of the user's own, in no formula that torch has
    assert (cause.kind, cause.place.op) == (kind, op)


@pytest.mark.parametrize("how", ["half", "autocast"])
def test_overflow_of_16_bits(how):
    x, y = digits()
    model = mlp(64, 64, 10)
    model[2].weight.data *= 3000
    if how == "half":
        model, x = model.half(), x.half()

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
            return F.cross_entropy(model[2](model[:2](batch[0]) * 100).float(), batch[1])

    (cause, *_) = diagnose(model, (x, y), loss_fn).causes
    assert (cause.kind, cause.place.module, cause.place.op) == ("precision", "2", "linear")
    assert math.isfinite(cause.evidence["loss in float32"])
    assert cause.evidence["largest before it"] < 65504


def test_underflow_of_16_bits():
    x, y = digits()
    model = mlp(64, 64, 10).half()

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 10).half()) * 1e-5

    (cause, *_) = diagnose(model, (x.half(), y), loss_fn, sgd(model)).causes
    assert cause.kind == "precision"
    assert cause.evidence["zeros in float32"] < cause.evidence["zeros in 16 bits"]


def test_uninitialised():
    class Net(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.full((64,), value)), nn.Linear(64, 10)

        def forward(self, x):
            return self.head(x * self.scale)

    for value in (3e20, math.nan, 1e-39):
        (cause, *_) = diagnose(Net(value), digits(), CROSS_ENTROPY).causes
        assert (cause.kind, cause.place.parameter) == ("uninitialised", "scale")


def test_running_statistics():
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)).eval()
    model[1].running_var[3] = math.nan
    (cause, *_) = diagnose(model, digits(), CROSS_ENTROPY, adam(model)).causes
    assert (cause.kind, cause.place.parameter) == ("uninitialised", "1.running_var")
    assert cause.tried


def test_state_of_the_optimizer():
    model, batch = mlp(64, 32, 10), digits()
    optimizer = adam(model)
    CROSS_ENTROPY(model, batch).backward()
    optimizer.step()
    optimizer.state[model[2].weight]["exp_avg_sq"][0] = math.nan
    (cause, *_) = diagnose(model, batch, CROSS_ENTROPY, optimizer).causes
    assert (cause.kind, cause.place.parameter) == ("uninitialised", "2.weight")
    assert cause.tried


def test_meta():
    with torch.device("meta"):
        model = mlp(64, 16, 10)
    found = diagnose(model, digits(), CROSS_ENTROPY)
    assert found.causes[0].kind == "uninitialised"
    assert found.causes[0].tried
    assert model[0].weight.is_meta


def test_healthy_says_how_far_it_is_from_trouble():
    model = mlp(64, 32, 10)
    found = diagnose(model, digits(), CROSS_ENTROPY, adam(model), steps=3)
    assert (found.verdict, found.causes, found.broke_at) == ("healthy", (), None)
    assert len(found.losses) == 4
    assert found.losses[0] > found.losses[-1]
    assert [row.name for row in found.layers] == ["", "0", "1", "2"]
    row = found.layers[1]
    out = model[0](digits()[0])
    assert row.largest == pytest.approx(out.abs().max().item())
    assert row.headroom == pytest.approx(torch.finfo(torch.float32).max / row.largest)
    assert row.std == pytest.approx(out.std(correction=0).item(), rel=1e-4)
    assert found.tightest.headroom == min(row.headroom for row in found.layers)


def test_close_to_the_end_of_the_range():
    model, (x, y) = mlp(64, 32, 10), digits()
    scale = 20000 / model[0](x).abs().max().item()
    model[0].weight.data *= scale
    model[2].weight.data /= scale
    model.half()
    found = diagnose(model, (x.half(), y), lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]))
    assert any(note.startswith("0 puts out") and "largest float16" in note for note in found.notes)


def test_losses_are_those_of_training():
    model, batch = mlp(64, 32, 10), digits()
    found = diagnose(model, batch, CROSS_ENTROPY, sgd(model), steps=3)
    optimizer, losses = sgd(model), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = CROSS_ENTROPY(model, batch)
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
    assert found.losses[:3] == tuple(losses)


def test_breaks_in_a_later_step():
    model, batch = mlp(64, 32, 10), digits()
    calls = []

    def loss_fn(model, batch):
        w = model[0].weight
        calls.append(1)
        return CROSS_ENTROPY(model, batch) + torch.sqrt((w - first).square().sum() * -1.0 + 1e-5)

    first = model[0].weight.detach().clone()
    found = diagnose(model, batch, loss_fn, sgd(model, 0.01), steps=8)
    assert found.broke_at > 1
    assert found.verdict == "broken"


def test_compiled_and_wrapped_models_are_looked_at_inside():
    model, batch = mlp(64, 32, 10), digits()
    found = diagnose(torch.compile(model, backend="eager"), batch, CROSS_ENTROPY)
    assert any("OptimizedModule" in note for note in found.notes)
    assert len(found.layers) == 4
    found = diagnose(nn.DataParallel(model), batch, CROSS_ENTROPY)
    assert any("DataParallel" in note for note in found.notes)


def test_a_model_that_is_compiled_in_place_runs_uncompiled():
    model, batch = mlp(64, 32, 10), digits()
    model.compile(backend="eager")
    found = diagnose(model, batch, CROSS_ENTROPY, adam(model))
    assert any("uncompiled" in note for note in found.notes)
    assert len(found.layers) == 4


def test_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mlp(64, 32, 10))
        found = diagnose(model, digits(), CROSS_ENTROPY, adam(model))
    finally:
        torch.distributed.destroy_process_group()
    assert found.verdict == "healthy"
    assert any("DistributedDataParallel" in note for note in found.notes)


def test_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(10))
    found = diagnose(model, digits(), CROSS_ENTROPY)
    assert found.verdict == "healthy"
    assert isinstance(model[0], nn.LazyLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype):
            return F.cross_entropy(model(batch[0]).float(), batch[1])

    model = mlp(64, 32, 10)
    found = diagnose(model, digits(), loss_fn, adam(model))
    assert found.verdict == "healthy"
    assert found.layers[1].dtype == str(dtype).removeprefix("torch.")


def test_lbfgs():
    model = mlp(64, 16, 10)
    found = diagnose(model, digits(), CROSS_ENTROPY, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3))
    assert found.losses[1] < found.losses[0]


def test_text_and_json():
    model = mlp(64, 64, 10)
    found = diagnose(model, digits(), CROSS_ENTROPY, adam(model, 10.0))
    plain = json.loads(found.to_json())
    assert plain["verdict"] == "broken"
    assert plain["causes"][0]["kind"] == "learning rate"
    assert plain == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    text = str(found)
    assert text.startswith("verdict: broken")
    assert text.index("1. learning rate") < text.index("gradient", text.index("\nlayer "))


def test_the_text_does_not_depend_on_the_terminal(monkeypatch):
    model = mlp(64, 16, 10)
    found = diagnose(model, digits(), CROSS_ENTROPY)
    before = str(found)
    assert "Linear" in before
    for name, value in {"COLUMNS": "20", "FORCE_COLOR": "1", "TERM": "dumb", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
        assert str(found) == before


def test_places_read_well():
    place = initlab.Place
    assert str(place()) == ""
    assert str(place(tensor="batch[0]", feature=3)) == "batch[0] feature 3"
    assert str(place(module="", op="log")) == "log in the model itself"
    assert str(place(parameter="a.weight", module="a")) == "a.weight"
    assert str(place(feature=list(range(9)))) == "features 0, 1, 2, 3, 4, 5 and 3 more"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda m, b: (lambda x: x, b, CROSS_ENTROPY), TypeError, "model is a function"),
        (lambda m, b: (m, iter([]), CROSS_ENTROPY), TypeError, "the loader gave no batch"),
        (lambda m, b: (m, b, nn.CrossEntropyLoss()), TypeError, "supervised"),
        (lambda m, b: (m, b, None), TypeError, "loss_fn is a NoneType"),
        (lambda m, b: (m, b, CROSS_ENTROPY, 0.1), TypeError, "optimizer is a float"),
        (lambda m, b: (m, b, lambda m, b: m(b[0])), TypeError, r"shape \(64, 10\)"),
        (lambda m, b: (m, b, lambda m, b: 1.0), TypeError, "a float"),
        (lambda m, b: (m, b[0], CROSS_ENTROPY), TypeError, "pairs"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    model, batch = mlp(64, 16, 10), digits()
    with pytest.raises(error, match=words):
        diagnose(*arguments(model, batch))


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_wrong_steps(steps):
    with pytest.raises(ValueError, match="steps is"):
        diagnose(mlp(64, 10), digits(), CROSS_ENTROPY, steps=steps)


def test_measure_against_torch():
    x = torch.randn(33, 70) * 3 + 1
    x[:, 5] = 0.0
    stats = measure(x)
    assert (stats.low, stats.high) == (x.min().item(), x.max().item())
    assert stats.mean == pytest.approx(x.double().mean().item())
    assert stats.std == pytest.approx(x.double().std(correction=0).item())
    assert stats.signal == pytest.approx(x.double().var(0, correction=0).mean().sqrt().item())
    assert stats.zeros == pytest.approx(1 / 70)
    assert stats.dead == pytest.approx(1 / 70)
    large = measure(torch.randn(3000, 50, 7))
    assert large.std == pytest.approx(1.0, rel=0.05)
    assert measure(torch.empty(0)) is None
    assert measure(torch.ones(3, dtype=torch.long)) is None
    assert not measure(torch.tensor([1.0, math.nan])).finite


def test_features_against_numpy():
    x = torch.tensor(numpy.random.default_rng(0).normal(size=(20, 4)), dtype=torch.float32)
    x[2, 1] = math.nan
    found = features(x)
    known = x.numpy()
    assert found.bad == [1]
    assert found.bad_rows == 1
    assert numpy.allclose(found.mean, numpy.nanmean(known, 0), atol=1e-6)
    assert numpy.allclose(found.reach, numpy.nanmax(abs(known - numpy.nanmean(known, 0)), 0), atol=1e-6)


def test_leaves_and_code():
    batch = {"x": torch.ones(2), "more": [torch.zeros(1), 3], "y": torch.ones(2)}
    found = {leaf.code: leaf for leaf in leaves(batch)}
    assert [(code, leaf.is_target) for code, leaf in found.items()] == [
        ("batch['x']", False),
        ("batch['more'][0]", False),
        ("batch['y']", True),
    ]
    for given in (batch, (torch.ones(2), torch.zeros(3)), [torch.ones(2)], torch.ones(2)):
        for leaf in leaves(given):
            scope = {"batch": copy.deepcopy(given)}
            exec(leaf.rebind(given, f"{leaf.code} * 0 + 7"), scope)
            after = leaves(scope["batch"])
            assert [bool((other.tensor == 7).all()) for other in after] == [x.path == leaf.path for x in after]


def test_names():
    assert names.of_function(torch.Tensor.__rtruediv__) == "div"
    assert names.of_function(torch.linalg.norm) == "norm"
    x = torch.ones(2, requires_grad=True)
    assert names.of_node(x.sqrt().grad_fn.name()) == "sqrt"
    assert names.of_node((x**2).grad_fn.name()) == "pow"
    assert names.of_node(x.log_softmax(0).grad_fn.name()) == "log_softmax"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_search_ends_at_what_held_the_value(value):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 0.5)
    x = torch.tensor([[1.0, value]])
    search = Search(model, {"batch": x}, dict(model.named_parameters()))
    loss = search.forward(lambda: (model(x) * -0.5).softmax(1).sum())
    origin = search.origin(loss)
    assert (origin.source, origin.op) == ("leaf", "batch")


def test_probabilities_are_told_from_logits():
    logits, y = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    assert loss_call("cross_entropy", (logits, y), {}).problem == ""
    assert loss_call("cross_entropy", (logits.log_softmax(1), y), {}).problem == ""
    assert loss_call("cross_entropy", (logits.softmax(1), y), {}).problem == "probabilities"
    assert loss_call("nll_loss", (logits.log_softmax(1), y), {}).problem == ""
    assert loss_call("nll_loss", (logits, y), {}).problem == "logits"
    assert loss_call("cross_entropy", (logits, y + 3), {}).problem == "classes"
    assert loss_call("cross_entropy", (logits, y + 3), {"ignore_index": 3}).problem == "empty"
    assert loss_call("cross_entropy", (logits, y), {}).baseline == pytest.approx(math.log(3))


def test_a_remedy_that_does_not_help_is_not_said_to():
    model = Own(lambda h: h * math.nan)
    found = diagnose(model, digits(), CROSS_ENTROPY, sgd(model))
    assert found.verdict == "broken"
    assert not any(cause.tried for cause in found.causes)


def test_distribution_of_each_activation():
    model = reweighted(mlp(64, 128, 128, 10, activation=nn.Tanh), nn.init.normal_)
    (cause, *_) = diagnose(model, digits(), CROSS_ENTROPY, sgd(model)).causes
    assert cause.remedy == "initlab.init_model_(model, seed=0, recipe='xavier')"
    assert fixes.smaller_rate(0.1, sgd(model, 5.0)).endswith('group["lr"] = 0.5')


def test_long_tables_are_cut():
    """Its ends, and the layers about the first that overflowed."""
    layers = [nn.Linear(4, 4)]
    for _ in range(50):
        layers += [nn.ReLU(), nn.Linear(4, 4)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.abs_().mul_(30)
    found = initlab.diagnose(model, (torch.ones(4, 4), torch.zeros(4, 4)), initlab.supervised(nn.MSELoss()))
    assert len(found.layers) == 102
    text = str(found)
    broke = next(row.name for row in found.layers[1:] if row.headroom == 0)
    assert len(text.splitlines()) < 60
    for name in ("0", "1", "99", "100", broke):
        assert any(line.split()[:1] == [name] for line in text.splitlines()), name
    assert " more" in text
    assert len(found.to_dict()["layers"]) == 102


@pytest.fixture
def four_ranks():
    """As the second of four, whose collectives do nothing."""
    torch.distributed.init_process_group("fake", rank=1, world_size=4)
    yield
    torch.distributed.destroy_process_group()


class Recurrent(nn.Module):
    """It holds its parameters in more places than torch's dict of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head, self.tied = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.parts = [self.head.bias]

    def forward(self, x):
        return self.tied(self.head(self.lstm(x)[0][:, -1]) + self.parts[0])


def test_parameters_keep_their_places_and_their_nodes(four_ranks):
    """DDP hangs its functions on the nodes at which gradients arrive: no pass may come by, and no node may change."""
    model = Recurrent().bfloat16()  # which is replayed in float32
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, 0.01)
    x, y = torch.randn(5, 3, 4).bfloat16(), torch.randn(5, 8).bfloat16()
    supervised(nn.MSELoss())(model, (x, y)).backward()
    optimizer.step()
    arrived, gradients = [], [p.grad for p in parameters]
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in parameters]
    for node in nodes:
        node.register_hook(lambda *_: arrived.append(1))
    values = [p.detach().clone() for p in parameters]
    found = diagnose(model, (x.index_fill(2, torch.tensor([1]), math.inf), y), supervised(nn.MSELoss()), optimizer)
    assert found.causes[0].kind == "input"
    assert found.causes[0].tried
    assert diagnose(model, (x * 1e-5, y), supervised(nn.MSELoss()), optimizer, steps=3).losses[-1] is not None
    assert not arrived
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert all(p in optimizer.state for p in parameters)
    assert len(optimizer.state) == len(parameters)
    assert model.tied.weight is model.head.weight
    assert model.parts[0] is model.head.bias
    assert all(a is b for a, b in zip(model.lstm._flat_weights, model.lstm.parameters(), strict=True))
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, values, strict=True))
    assert [p.expand_as(p).grad_fn.next_functions[0][0] for p in parameters] == nodes


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.LBFGS])
def test_a_diagnosis_beside_others_is_the_same(four_ranks, optimizer):
    """Also of an optimizer in the middle of a run, whose state goes by parameter."""

    def found():
        model, generator = Recurrent(), torch.Generator().manual_seed(1)
        batch = torch.randn(16, 3, 4, generator=generator), torch.randn(16, 8, generator=generator)
        running = optimizer(model.parameters(), 0.1)

        def closure():
            running.zero_grad()
            loss = supervised(nn.MSELoss())(model, batch)
            loss.backward()
            return loss

        for _ in range(3):
            running.step(closure)
        return diagnose(model, batch, supervised(nn.MSELoss()), running, steps=3)

    beside = found()
    torch.distributed.destroy_process_group()
    alone = found()
    torch.distributed.init_process_group("fake", rank=1, world_size=4)
    assert beside == alone
    assert len(set(alone.losses)) == 4


@pytest.mark.parametrize("function", ["all_reduce", "broadcast", "send", "barrier"])
def test_collectives_are_refused_before_they_are_called(four_ranks, function):
    def loss_fn(model, batch):
        loss = model(batch).square().mean()
        if function == "barrier":
            torch.distributed.barrier()
        else:
            getattr(torch.distributed, function)(loss.detach(), *([] if function == "all_reduce" else [2]))
        return loss

    with pytest.raises(NotImplementedError, match="the model, the loss or the optimizer calls c10d"):
        diagnose(nn.Linear(3, 2), torch.ones(2, 3), loss_fn)


def test_dtensors_are_refused_by_name(four_ranks, capsys, tmp_path, monkeypatch):
    from torch.distributed.tensor import distribute_module

    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2))
    distribute_module(model, torch.distributed.init_device_mesh("cpu", (4,)))
    with pytest.raises(NotImplementedError) as raised:
        diagnose(model, torch.ones(2, 3), lambda model, batch: model(batch).mean())
    text = str(raised.value)
    assert text.startswith("weight of '1' (Linear) is a DTensor, and a diagnosis runs passes that other ranks do not")
    assert "one unsharded copy" in text
    assert "initlab.watch(model).report(across=True)" in text
    monkeypatch.setattr(torch, "spread", (model, torch.ones(2, 3), nn.Identity()), raising=False)
    (tmp_path / "spread.py").write_text("import torch\n\ndef build():\n    return torch.spread\n")
    assert cli.main(["doctor", f"{tmp_path}/spread.py:build"]) == 64
    assert f"error: {text}" in capsys.readouterr().err


def test_whose_diagnosis_comes_first():
    def of(verdict, broke_at=None):
        causes = () if verdict == "healthy" else (report.Cause("input", verdict, report.Place(), "bad"),)
        return report.Diagnosis(causes, broke_at=broke_at)

    def first(*diagnoses):
        return ranks.merge(dict(enumerate(diagnoses)))

    assert first(of("healthy"), of("warning"), of("broken", 4), of("broken", 3)).rank == 3
    assert first(of("healthy"), of("broken"), of("broken", 3)).rank == 2
    assert first(of("healthy"), of("warning"), of("warning")).rank == 1
    assert first(of("healthy"), of("healthy")).rank == 0
    found = first(of("healthy"), of("broken", 2), of("warning"), of("healthy"), of("healthy"))
    assert str(found).splitlines()[:2] == [
        "rank 1, verdict: broken, broke in step 2",
        "of 5 ranks: healthy on 0, 3-4; broken on 1; warning on 2",
    ]
    plain = json.loads(found.to_json())
    assert (plain["rank"], plain["verdicts"]["1"], plain["verdicts"]["4"]) == (1, "broken", "healthy")
    with pytest.raises(RuntimeError, match=r"on rank 1, .*: TypeError: no$"):
        first(of("healthy"), "TypeError: no")
