"""diagnose() on gradients that end half way: flat operations, cut graphs, parameters outside; and twins that learn."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose, supervised

pytestmark = pytest.mark.long

G = torch.Generator().manual_seed(0)
X = torch.randn(128, 8, generator=G)
Y = X[:, :1] * X[:, 1:2] + X[:, 2:3]
CLASSES = (X[:, 0] + X[:, 1] > 0).long()
MSE, CROSS_ENTROPY = supervised(nn.MSELoss()), supervised(nn.CrossEntropyLoss())


def adam(model, lr=1e-2):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)


def case(model, batch=(X, Y), loss_fn=MSE, lr=1e-2):
    return model, batch, loss_fn, adam(model, lr)


class Made(nn.Module):
    """A net whose forward() is given, with what it needs."""

    def __init__(self, forward, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.by = forward
        self.one, self.two, self.three = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.by(self, x)


def quantised(bits, through):
    def forward(m, x):
        scale = m.one.weight.detach().abs().max() / bits
        w = torch.round(m.one.weight / scale) * scale
        w = m.one.weight + (w - m.one.weight).detach() if through else w
        return m.three((F.linear(x, w, m.one.bias)).tanh())

    return case(Made(forward))


def gated(gate):
    """A branch behind a gate, and a plain one beside it that learns the rest."""
    return case(Made(lambda m, x: m.three(m.two(gate(m.one(x))).tanh()) + 0 * x[:, :1]))


def one_output(norm):
    return case(Made(lambda m, x: m.norm(m.three(m.one(x).tanh())), norm=norm))


def residual(act):
    """The second derivative of a field, which is to be -sin."""

    def loss_fn(m, batch):
        x = batch[:, :1].clone().requires_grad_()
        u = m(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return (ddu + 10 * torch.sin(3 * x)).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 1))
    return case(model, X, loss_fn)


def dropped(p):
    return case(Made(lambda m, x: m.three(F.dropout(m.one(x).relu(), p))))


class Forgets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 1 - x.tanh() ** 2


class Remembers(Forgets):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def own_function(function):
    return case(Made(lambda m, x: m.three(function.apply(m.one(x)))), lr=0.1)


def kept(detach):
    def forward(m, x):
        h = (m.one(x) + m.state).tanh()
        m.state = 0.5 * (h.mean(0).detach() if detach else h.mean(0))
        return m.three(h)

    model = Made(forward)
    model.register_buffer("state", torch.zeros(32))
    return case(model)


def actor(draw):
    """Noise of a learned scale, in front of a net that is not trained."""
    model = Made(lambda m, x: m.three(m.two(draw(torch.distributions.Normal(m.one(x), 0.1))).tanh()))
    model.two.requires_grad_(False)
    model.three.requires_grad_(False)
    return model, (X, Y), MSE, torch.optim.Adam(model.one.parameters(), 1e-2)


def hard(soft):
    def forward(m, x):
        z = m.one(x)
        z = z.softmax(-1) if soft else F.one_hot(z.argmax(-1), 32).float()
        return m.three(m.two(z).tanh())

    return case(Made(forward))


def plain_tensors(parameter):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            w = torch.randn(8, 2) / math.sqrt(8)
            self.w = nn.Parameter(w) if parameter else w.requires_grad_()
            self.b = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return x @ self.w + self.b

    return case(Own(), (X, CLASSES), CROSS_ENTROPY, 0.05)


def frozen_table(zero):
    torch.manual_seed(0)
    table = torch.zeros(20, 16) if zero else torch.randn(20, 16)
    ids = torch.randint(0, 20, (64, 5), generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(
        nn.Embedding.from_pretrained(table), nn.Flatten(), nn.Linear(80, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    return case(model, (ids, (ids[:, 0] > 9).long()), CROSS_ENTROPY)


def resumed(lost):
    model = Made(lambda m, x: m.three(m.one(x).tanh()))
    optimizer = adam(model)
    for _ in range(20):
        optimizer.zero_grad()
        MSE(model, (X, Y)).backward()
        optimizer.step()
    for state in optimizer.state.values():
        if lost:
            state["exp_avg_sq"].zero_()
    return model, (X, Y), MSE, optimizer


def scaled(parameter):
    """A logarithm of 4.6, or the number 100 that it is of."""

    def forward(m, x):
        z = F.normalize(m.one(x), dim=-1)
        return m.scale.exp() * z @ m.anchors.T

    torch.manual_seed(0)
    model = Made(forward, anchors=nn.Parameter(F.normalize(torch.randn(2, 32), dim=-1)))
    model.scale = nn.Parameter(torch.tensor(parameter))
    return case(model, (X, CLASSES), CROSS_ENTROPY, 1e-3)


def smoothed(smoothing):
    def loss_fn(m, batch):
        forbidden = torch.tensor([False, False, True])
        return F.cross_entropy(m(batch[0]).masked_fill(forbidden, -math.inf), batch[1], label_smoothing=smoothing)

    torch.manual_seed(0)
    return case(nn.Linear(8, 3), (X, CLASSES), loss_fn)


def closed(zero):
    model = Made(lambda m, x: m.three(m.norm(m.one(x)).relu()), norm=nn.BatchNorm1d(32))
    if zero:
        nn.init.zeros_(model.norm.weight)
    return case(model)


FAULTS = {
    "round": (lambda: quantised(3, False), "gradient", {"op": "round"}),
    "sign": (lambda: gated(torch.sign), "gradient", {"op": "sign"}),
    "clamp": (lambda: gated(lambda x: (x + 50).clamp(-1, 1)), "gradient", {"op": "clamp"}),
    "one element": (lambda: one_output(nn.LayerNorm(1)), "gradient", {"op": "layer_norm", "module": "norm"}),
    "second derivative": (lambda: residual(nn.ReLU), "gradient", {"op": "relu"}),
    "leaky": (lambda: residual(nn.LeakyReLU), "gradient", {"op": "leaky_relu"}),
    "dropout": (lambda: dropped(0.98), "gradient", {"op": "dropout"}),
    "own backward": (lambda: own_function(Forgets), "gradient", {"op": "Forgets"}),
    "kept graph": (lambda: kept(False), "gradient", {"parameter": "state"}),
    "sample": (lambda: actor(lambda d: d.sample()), "gradient", {"op": "sample", "parameter": "one.weight"}),
    "argmax": (lambda: hard(False), "gradient", {"op": "argmax", "parameter": "one.weight"}),
    "plain tensor": (lambda: plain_tensors(False), "optimizer", {"parameter": "w"}),
    "frozen zeros": (lambda: frozen_table(True), "weights", {"parameter": "0.weight"}),
    "lost moments": (lambda: resumed(True), "optimizer", {}),
    "a scale for its logarithm": (lambda: scaled(100.0), "operation", {"parameter": "scale", "op": "exp"}),
    "smoothing over a mask": (lambda: smoothed(0.1), "loss", {"op": "cross_entropy"}),
    "closed": (lambda: closed(True), "weights", {"parameter": "norm.weight"}),
}
TWINS = {
    "round": lambda: quantised(3, True),
    "clamp": lambda: gated(lambda x: x.clamp(-1, 1)),
    "sign of the input": lambda: case(Made(lambda m, x: m.three(m.one(torch.sign(x) + x).tanh()))),
    "one element": lambda: one_output(nn.Identity()),
    "second derivative": lambda: residual(nn.Tanh),
    "dropout": lambda: dropped(0.5),
    "own backward": lambda: own_function(Remembers),
    "kept graph": lambda: kept(True),
    "rsample": lambda: actor(lambda d: d.rsample()),
    "soft": lambda: hard(True),
    "parameter": lambda: plain_tensors(True),
    "frozen table": lambda: frozen_table(False),
    "moments": lambda: resumed(False),
    "a scale": lambda: scaled(math.log(10.0)),
    "a mask": lambda: smoothed(0.0),
    "open": lambda: closed(False),
}


@pytest.mark.parametrize("name", FAULTS)
def test_where_a_gradient_ends(name):
    make, kind, place = FAULTS[name]
    found = diagnose(*make())
    cause = found.causes[0]
    assert cause.kind == kind, str(found)
    assert {what: getattr(cause.place, what) for what in place} == place, str(found)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_that_learns(name):
    found = diagnose(*TWINS[name]())
    assert found.causes == (), str(found)
