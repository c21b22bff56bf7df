"""diagnose() on runs that stand still, or that the optimizer's own settings drive off; and on slow ones that learn."""

import pytest
import torch
from torch import nn

from initlab import diagnose, supervised

pytestmark = pytest.mark.long

G = torch.Generator().manual_seed(0)
X = torch.randn(128, 8, generator=G)
Y = torch.stack([X[:, 0] * X[:, 1] + X[:, 2], X[:, 3].sin()], 1)
CLASSES = (X[:, 0] + X[:, 1] > 0).long()
MSE, CROSS_ENTROPY = supervised(nn.MSELoss()), supervised(nn.CrossEntropyLoss())


def net(out=2, act=nn.Tanh, *more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), act(), *more, nn.Linear(32, out))


def sgd(model, lr=0.05, **options):
    return torch.optim.SGD(model.parameters(), lr, **options)


def adam(model, lr=1e-2, **options):
    return torch.optim.Adam(model.parameters(), lr, **options)


def setting(make, model=None, batch=(X, Y), loss_fn=MSE, **values):
    """A run with settings that an optimizer's constructor may refuse, as a loaded state_dict brings them."""
    model = model or net()
    optimizer = make(model)
    for group in optimizer.param_groups:
        group.update(values)
    return model, batch, loss_fn, optimizer


def trained(make, scale, steps=5):
    """An optimizer whose state is of a loss of another scale."""
    model = net()
    optimizer = make(model)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * MSE(model, (X, Y))).backward()
        optimizer.step()
    with torch.no_grad():
        for p, old in zip(model.parameters(), start, strict=True):
            p.copy_(old)
    optimizer.zero_grad()
    if scale != 1:  # the mean forgets in some ten steps, the mean square in some thousand
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
    return model, (X, Y), MSE, optimizer


def with_weights(name, change):
    model = net(2, nn.ReLU)
    with torch.no_grad():
        change(model.get_parameter(name))
    return model, (X, Y), MSE, adam(model)


def saturating():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Sigmoid(), nn.Linear(32, 2))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return model, (100 + 3 * X, CLASSES), CROSS_ENTROPY, sgd(model, 0.1)


def end_of_schedule():
    model = net()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000, eta_min=1e-9)
    for _ in range(1000):
        optimizer.step()
        schedule.step()
    return model, (X, Y), MSE, optimizer


def partly_bfloat16():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(8, 32).bfloat16(), nn.Linear(32, 2)
            self.head.requires_grad_(False)

        def forward(self, x):
            return self.head(self.body(x.to(self.body.weight.dtype)).tanh().float())

    model = Mixed()
    return model, (X, Y), MSE, sgd(model, 2e-3)


class Unregistered(nn.Module):
    def __init__(self, many):
        super().__init__()
        torch.manual_seed(0)
        factor = (0.5 * torch.randn(8, 2)).requires_grad_()
        self.shift, self.held = nn.Parameter(torch.zeros(())), [factor] if many else factor

    def forward(self, x):
        return x @ (self.held[0] if isinstance(self.held, list) else self.held) + self.shift


STUCK = {
    "tensor": (lambda: one(Unregistered(False), sgd), "optimizer"),
    "tensors in a list": (lambda: one(Unregistered(True), sgd), "optimizer"),
    "rate 1e-7": (lambda: setting(adam, lr=1e-7), "learning rate"),
    "rate 1e-8, SGD": (lambda: setting(sgd, lr=1e-8), "learning rate"),
    "end of a schedule": (end_of_schedule, "learning rate"),
    "stale Adam": (lambda: trained(adam, 1e6), "optimizer"),
    "stale AdamW": (lambda: trained(lambda m: torch.optim.AdamW(m.parameters(), 1e-2), 1e5), "optimizer"),
    "eps": (lambda: setting(adam, eps=1e3), "optimizer"),
    "dampening 1": (lambda: setting(lambda m: sgd(m, momentum=0.9), dampening=1.0), None),
    "dropout 0.99": (lambda: one(net(2, nn.ReLU, nn.Dropout(0.999))), "gradient"),
    "saturating features": (saturating, "input"),
    "one part in bfloat16": (partly_bfloat16, None),
    "constant head": (lambda: with_weights("2.bias", lambda p: p.fill_(1e3)), "weights"),
    "dead by bias": (lambda: with_weights("0.bias", lambda p: p.fill_(-50.0)), "weights"),
}


def one(model, make=adam, batch=(X, Y), loss_fn=MSE):
    return model, batch, loss_fn, make(model)


DRIVEN = {
    "momentum 1.1": lambda: setting(lambda m: sgd(m, 0.02, momentum=0.9), momentum=1.15),
    "weight decay 100": lambda: setting(lambda m: sgd(m, 0.05), weight_decay=100.0),
    "decoupled decay": lambda: setting(lambda m: torch.optim.AdamW(m.parameters(), 1e-2), weight_decay=300.0),
}


@pytest.mark.parametrize("name", STUCK)
def test_a_run_that_stands_still_is_set_going(name):
    build, kind = STUCK[name]
    found = diagnose(*build())
    if kind is None:
        assert all(cause.tried for cause in found.causes), str(found)
        return
    cause = found.causes[0]
    assert (cause.kind, cause.tried) == (kind, True), str(found)
    assert cause.trial[-1] < 0.95 * cause.trial[0]


@pytest.mark.parametrize("name", DRIVEN)
def test_a_setting_of_the_optimizer_comes_before_the_rate(name):
    found = diagnose(*DRIVEN[name]())
    assert (found.causes[0].kind, found.causes[0].tried) == ("optimizer", True), str(found)
    assert "learning rate" not in [cause.kind for cause in found.causes]


def near_its_end():
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    y = X[:, :2] * 2
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0] = model.weight[1, 1] = 1.999
        model.bias.zero_()
    return one(model, lambda m: sgd(m, 1e-4), (X, y))


def late_in_training():
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    optimizer = adam(model)
    for _ in range(1000):
        optimizer.zero_grad()
        MSE(model, (X, X[:, :2])).backward()
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-6
    return model, (X, X[:, :2]), MSE, optimizer


def in_warm_up():
    model = net()
    optimizer = adam(model)
    torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, total_iters=100)
    return model, (X, Y), MSE, optimizer


def critic():
    model = net(1)
    return model, (X, X + 0.01), lambda m, b: m(b[0]).mean() - m(b[1]).mean(), sgd(model, 1e-2)


LEARNS = {
    "near its end": near_its_end,
    "late in training": late_in_training,
    "warm-up": in_warm_up,
    "fine-tuning": lambda: one(net(), lambda m: adam(m, 2e-5)),
    "small rate": lambda: one(net(), lambda m: sgd(m, 1e-3)),
    "state of its own": lambda: trained(adam, 1.0),
    "critic": critic,
    "decay": lambda: one(net(), lambda m: torch.optim.AdamW(m.parameters(), 1e-4, weight_decay=0.1)),
    "dropout": lambda: one(net(2, nn.ReLU, nn.Dropout(0.5)), lambda m: adam(m, 1e-5)),
}


@pytest.mark.parametrize("name", LEARNS)
def test_a_slow_run_that_learns_is_left_alone(name):
    found = diagnose(*LEARNS[name]())
    assert found.causes == (), str(found)


class Ending(nn.Module):
    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.end = nn.Linear(8, 2), end

    def forward(self, x):
        return self.end(self.body(x)) if isinstance(self.end, nn.Module) else self.by_hand(self.body(x))

    def by_hand(self, x):
        return self.end(x)


class Step(nn.Module):
    def forward(self, x):
        return x.round()


SILENT = {
    "round": (torch.round, "", "round"),
    "sign": (torch.sign, "", "sign"),
    "floor": (torch.floor, "", "floor"),
    "clamp": (lambda x: (x - 100).clamp(0, 1), "", "clamp"),
    "in a module": (Step(), "end", "round"),
    "one element": (nn.Sequential(nn.Unflatten(1, (2, 1)), nn.LayerNorm(1), nn.Flatten()), "end.1", "layer_norm"),
}


@pytest.mark.parametrize("name", [name for name in SILENT if name != "one element"])
def test_the_operation_whose_derivative_is_0_is_named(name):
    end, module, op = SILENT[name]
    cause = diagnose(*one(Ending(end))).causes[0]
    assert (cause.kind, cause.place.module, cause.place.op) == ("gradient", module, op)


def test_a_layer_norm_over_one_element_is_named():
    end, module, op = SILENT["one element"]
    model = Ending(end)
    end[1].requires_grad_(False)
    cause = diagnose(*one(model, lambda m: adam(m.body))).causes[0]
    assert (cause.kind, cause.place.module, cause.place.op) == ("gradient", module, op)


def convolutions(layers=8):
    """A deep net that a norm in each layer keeps going, and its data."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 16, 3, padding=1)]
    for _ in range(layers):
        parts += [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    model = nn.Sequential(*parts, nn.BatchNorm2d(16), nn.ReLU(), *head)
    x = torch.randn(64, 1, 8, 8)
    return model, (x, (x.mean((1, 2, 3)) * 20).round().clamp(-1, 2).long() + 1)


def test_a_model_left_in_evaluation_mode():
    model, batch = convolutions()
    model.eval()
    found = diagnose(model, batch, CROSS_ENTROPY, torch.optim.Adam(model.parameters(), 1e-2))
    cause = found.causes[0]
    assert (cause.kind, cause.place.module, cause.tried, len(found.causes)) == ("operation", "1", True, 1), found
    assert "evaluation mode" in cause.explanation
    assert not model.training


def test_running_statistics_that_fit_are_no_fault():
    """Fine-tuning with frozen norms: evaluation mode is meant where the statistics are the data's."""
    model, batch = convolutions()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        for _ in range(3):
            model(batch[0])
    model.eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    assert diagnose(model, batch, CROSS_ENTROPY, optimizer).verdict == "healthy"


class Solver(nn.Module):
    """Steps of a differential equation's solver."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Linear(4, 32), nn.ELU(), nn.Linear(32, 4))
        self.f[2].weight.data.mul_(scale)

    def forward(self, x):
        for _ in range(60):
            x = x + 0.05 * self.f(x)
        return x


@pytest.mark.parametrize(("scale", "verdict"), [(200.0, "broken"), (1.0, "healthy")])
def test_a_solver_whose_state_grows(scale, verdict):
    model, x = Solver(scale), torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    found = diagnose(model, (x, x.flip(1)), MSE, optimizer)
    assert found.verdict == verdict, found
    if verdict == "broken":
        assert (found.causes[0].kind, found.causes[0].place.parameter) == ("weights", "f.2.weight"), found
        assert found.causes[0].tried


class PlainList(nn.Module):
    """Layers in a list that nobody registers."""

    def __init__(self, hold, depth):
        super().__init__()
        torch.manual_seed(0)
        self.layers = hold([nn.Linear(8, 8) for _ in range(depth)])
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers.values() if isinstance(self.layers, dict) else self.layers:
            x = torch.relu(layer(x))
        return self.out(x)


@pytest.mark.parametrize("hold", [list, tuple, lambda layers: dict(enumerate(layers))])
def test_layers_in_a_plain_list(hold):
    model = PlainList(hold, 6)
    layers = model.layers.values() if isinstance(model.layers, dict) else model.layers
    hidden = [p for layer in layers for p in layer.parameters()]
    before = [p.detach().clone() for p in hidden]
    found = diagnose(model, (X, CLASSES), CROSS_ENTROPY, adam(model))
    cause = found.causes[0]
    assert (cause.kind, cause.place.parameter, cause.tried) == ("optimizer", "layers[0].weight", True), found
    assert "plain list" in cause.explanation
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(hidden, before, strict=True))


def test_layers_in_a_plain_list_of_a_run_that_learns_are_noted():
    model = PlainList(list, 1)
    found = diagnose(model, (X, CLASSES), CROSS_ENTROPY, adam(model, 5e-2))
    assert found.verdict == "healthy"
    assert any("layers[0].weight" in note and "nn.ModuleList" in note for note in found.notes), found.notes
    model = PlainList(nn.ModuleList, 1)
    assert not any("plain list" in note for note in diagnose(model, (X, CLASSES), CROSS_ENTROPY, adam(model)).notes)


class Towers(nn.Module):
    """Cosines of two nets, over a temperature."""

    def __init__(self, temperature):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))
        self.temperature = temperature

    def forward(self, x):
        a, b = (nn.functional.normalize(net(half), dim=1) for net, half in ((self.a, x), (self.b, -x)))
        return a @ b.T / self.temperature


@pytest.mark.parametrize(("temperature", "verdict"), [(20.0, "warning"), (0.05, "healthy")])
def test_a_temperature_that_flattens_the_softmax(temperature, verdict):
    model = Towers(temperature)
    found = diagnose(model, (X, torch.arange(len(X))), CROSS_ENTROPY, adam(model))
    assert found.verdict == verdict, found
    if verdict == "warning":
        cause = found.causes[0]
        assert (cause.kind, cause.place.op, cause.tried) == ("loss", "cross_entropy", False), found
        assert cause.emulated[-1] < 0.9 * cause.emulated[0]
        assert "softmax is flat" in cause.explanation
