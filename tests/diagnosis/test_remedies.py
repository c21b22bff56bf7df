"""What diagnose() may call tried, and which loss functions it may offer in place of the user's."""

import ast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import initlab
from initlab import diagnose, supervised
from initlab.diagnosis import outcomes, trials
from initlab.diagnosis.budget import Budget
from initlab.diagnosis.probes import TrainingStep

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(32, 8, generator=G), torch.randn(32, 1, generator=G)
CLASSES = torch.randint(0, 3, (32,), generator=G)
BITS = (X[:, :1] > 0).float()
MSE = supervised(nn.MSELoss())


def net(*last, out=1, sure=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, out), *last)
    with torch.no_grad():
        if sure:  # beyond what exp, and log of a probability, can hold
            model[2].bias.copy_(torch.linspace(300, -300, out))
    return model


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr)


def angle(out, y):
    return torch.acos(F.normalize(out, dim=-1)[:, :1] * 0 + 1.0 - 0 * y).mean() + F.mse_loss(out[:, :1], y)


OTHER_OBJECTIVES = {
    "sqrt": (3, Y, lambda z, y: (z - z.detach()).square().sum(1).sqrt().mean() + F.mse_loss(z[:, :1], y)),
    "acos": (3, Y, angle),
    "log": (1, Y, lambda z, y: (z - y).square().mean().sub(100).log()),
    "div": (2, Y, lambda z, y: z.square().mean() / (y > 99).sum()),
    "linalg_svd": (9, Y, lambda z, y: torch.linalg.svd(z.view(-1, 3, 3) * 0 + 1)[0].sum() + F.mse_loss(z[:, :1], y)),
    "ctc_loss": (
        3,
        torch.ones(1, 20, dtype=torch.long),
        lambda z, y: F.ctc_loss(z[:12, None].log_softmax(-1), y, torch.tensor([12]), torch.tensor([20])),
    ),
}


@pytest.mark.parametrize("op", OTHER_OBJECTIVES)
def test_an_objective_is_not_replaced_by_another(op):
    out, y, loss = OTHER_OBJECTIVES[op]
    model = net(out=out)
    (cause, *_) = diagnose(model, (X, y), supervised(loss), adam(model)).causes
    assert (cause.kind, cause.place.op) == ("loss" if op == "ctc_loss" else "operation", op)
    assert not cause.tried
    assert cause.remedy.startswith("#")


def by_hand(z, y):
    return -z.softmax(1).log()[range(len(y)), y].mean()


def bce_by_hand(z, y):
    p = z.sigmoid()
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


EQUIVALENT = {
    "log of softmax": (net(out=3, sure=True), CLASSES, by_hand, "CrossEntropyLoss()"),
    "summed": (
        net(out=3, sure=True),
        CLASSES,
        lambda z, y: by_hand(z, y) * len(y),
        'CrossEntropyLoss(reduction="sum")',
    ),
    "softmax in the model": (
        net(nn.Softmax(1), out=3, sure=True),
        CLASSES,
        lambda p, y: -p.log()[range(len(y)), y].mean(),
        "CrossEntropyLoss()",
    ),
    "log of sum of exp": (
        net(out=3, sure=True),
        CLASSES,
        lambda z, y: (z.exp().sum(1).log() - z[range(len(y)), y]).mean(),
        "CrossEntropyLoss()",
    ),
    "sigmoid": (net(sure=True), BITS, bce_by_hand, "BCEWithLogitsLoss()"),
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_an_equal_objective_is_offered(name):
    model, y, loss, offered = EQUIVALENT[name]
    (cause, *_) = diagnose(model, (X, y), supervised(loss), adam(model)).causes
    assert cause.kind == "loss"
    assert offered in cause.remedy
    assert cause.tried
    assert all(torch.tensor(cause.trial).isfinite())


def test_a_temperature_is_part_of_the_objective():
    model = net(out=3)
    loss = supervised(lambda z, y: by_hand(z / 0.001, y))
    (cause, *_) = diagnose(model, (X, CLASSES), loss, adam(model, 1e-6)).causes
    assert (cause.kind, cause.place.op) == ("loss", "log")
    assert "CrossEntropyLoss()(z / 0.001, y)" in cause.remedy
    assert cause.tried


def test_another_weighting_is_another_objective():
    model = net(out=3, sure=True)
    (cause, *_) = diagnose(model, (X, CLASSES), supervised(lambda z, y: 3 * by_hand(z, y)), adam(model)).causes
    assert (cause.kind, cause.place.op) == ("loss", "log")
    assert "loss_fn" not in cause.remedy  # no objective is put in the place of the user's own
    assert "# in the loss function:" in cause.remedy


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("where", ["loss", "model"])
def test_kl_div_keeps_being_kl_div(where, reduction):
    targets = torch.randn(32, 3, generator=G).softmax(1)
    model = net(*[nn.Softmax(1)] if where == "model" else [], out=3)
    to_probabilities = (lambda z: z) if where == "model" else lambda z: z.softmax(-1)
    loss = supervised(lambda z, y: F.kl_div(to_probabilities(z), y, reduction=reduction))
    (cause, *_) = diagnose(model, (X, targets), loss, adam(model)).causes
    assert (cause.kind, cause.place.op) == ("loss", "kl_div")
    assert cause.tried
    assert cause.trial[0] > 0  # no divergence is negative
    assert "binary" not in cause.remedy.lower()
    assert ("LogSoftmax(1)" if where == "model" else f"reduction='{reduction}'") in cause.remedy


SPACES = {
    "cross_entropy": (net(nn.Softmax(1), out=3), CLASSES, nn.CrossEntropyLoss(), "Identity"),
    "nll_loss": (net(nn.Softmax(1), out=3), CLASSES, nn.NLLLoss(), "LogSoftmax"),
    "nll_loss, logits": (net(out=3), CLASSES, nn.NLLLoss(), "LogSoftmax"),
    "binary_cross_entropy": (net(), BITS, nn.BCELoss(), "Sigmoid"),
    "binary_cross_entropy_with_logits": (net(nn.Sigmoid()), BITS, nn.BCEWithLogitsLoss(), "Identity"),
}


@pytest.mark.parametrize("name", SPACES)
def test_a_loss_keeps_its_function_and_gets_what_it_takes(name):
    model, y, loss, layer = SPACES[name]
    (cause, *_) = diagnose(model, (X, y), supervised(loss), adam(model)).causes
    assert (cause.kind, cause.place.op) == ("loss", name.split(",")[0])
    assert cause.tried
    assert layer in cause.remedy
    assert not any(isinstance(node, ast.Name) and node.id == "loss_fn" for node in ast.walk(ast.parse(cause.remedy)))


def step(model=None, lr=0.01, loss=MSE):
    model = net() if model is None else model
    return TrainingStep(model, (X, Y), loss, torch.optim.SGD(model.parameters(), lr))


def rate(value):
    return f'for group in optimizer.param_groups:\n    group["lr"] = {value}'


def tried(one, remedy, seconds=60.0, **options):
    return trials.run(one, remedy, Budget(seconds), **options)


def test_what_counts_as_tried():
    assert tried(step(), "# a comment").effect == ""
    assert tried(step(), "raise ValueError").effect == ""
    assert tried(step(), "not python").effect == ""
    falls = tried(step(), rate(0.01))
    assert falls.effect == "falls"
    assert falls.steps == 25
    assert tried(step(), rate(0.0)).effect == "stays"
    assert tried(step(), rate(1e9)).effect in ("rises", "breaks")


def test_a_loss_that_rises_again_was_not_cured():
    """Four steps down and then up."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)

    def count(optimizer, args, kwargs):
        group = optimizer.param_groups[0]
        group["number"] = group.get("number", 0) + 1
        group["lr"] = 0.02 if group["number"] <= 4 else -0.01

    optimizer.register_step_pre_hook(count)
    trial = tried(TrainingStep(model, (X, Y), MSE, optimizer), "model.train()")
    assert trial.losses[3] < trial.losses[0]
    assert trial.effect != "falls"


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        ((1.0, 0.9, 0.8), True),
        ((1.0, 1.2, 0.8), True),
        ((1.0, 900.0, 0.0), False),
        ((1.0, 0.2, 0.9), False),
        ((1.0, 1.0), False),
        ((-1.0, -1.1), True),
    ],
)
def test_what_falling_is(losses, falls):
    assert outcomes.falls(losses) == falls


def test_the_users_own_loss_is_measured():
    """A remedy that puts another objective in its place is judged by the first."""
    up = "loss_fn = lambda model, batch: -torch.nn.functional.mse_loss(model(batch[0]), batch[1])"
    trial = tried(step(), up)
    assert trial.effect == "rises"
    assert trial.losses[0] > 0
    assert tried(step(), up, rewritten=True).effect == "falls"


def test_a_trial_has_a_budget():
    trial = tried(step(), rate(0.01), seconds=1e-9)
    assert trial.effect == "falls"
    assert trial.steps == trials.LIMITS.trial_least


@pytest.mark.parametrize("remedy", ["model.float()", "raise ValueError", "raise KeyboardInterrupt"])
def test_a_trial_leaves_no_trace(remedy):
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    clipper = initlab.GradClipper(optimizer, max_norm=1.0)
    MSE(model, (X, Y)).backward()
    optimizer.step()
    one = TrainingStep(model, (X, Y), MSE, optimizer)
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    states = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    counts, random = vars(clipper).copy(), torch.get_rng_state()
    text = f"{rate(0.5)}\ntorch.manual_seed(9)\nmodel[0].weight.data.mul_(2)\n{remedy}"
    if "Keyboard" in remedy:
        with pytest.raises(KeyboardInterrupt):
            tried(one, text)
    else:
        tried(one, text)
    assert all(torch.equal(kept[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(states[p][k], v) for p, s in optimizer.state.items() for k, v in s.items())
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert {k: str(v) for k, v in vars(clipper).items()} == {k: str(v) for k, v in counts.items()}
    assert torch.equal(torch.get_rng_state(), random)


def test_two_clippers_are_not_advised():
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.r, self.o = nn.RNN(4, 32, batch_first=True), nn.Linear(32, 1)
            nn.init.orthogonal_(self.r.weight_hh_l0, 3.0)

        def forward(self, x):
            return self.o(self.r(x)[0][:, -1])

    model = Exploding()
    batch = torch.randn(16, 100, 4, generator=G), torch.randn(16, 1, generator=G)
    (cause, *_) = diagnose(model, batch, MSE, torch.optim.SGD(model.parameters(), 0.01)).causes
    assert cause.kind == "gradient"
    assert cause.remedy.count("GradClipper") == 1


def test_an_advice_is_never_tried():
    class Root(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x**0.5, torch.zeros_like(x))

    model = nn.Sequential(nn.Linear(8, 32), Root(), nn.Linear(32, 1))
    (cause, *_) = diagnose(model, (X, Y), MSE, adam(model)).causes
    assert (cause.kind, cause.place.module, cause.place.op) == ("operation", "1", "pow")
    assert (cause.tried, cause.trial) == (False, ())
    assert not trials.is_code(cause.remedy)
