"""Gradients that are not those of the loss: a wrong backward(), a derivative without a graph, one lost in time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose

pytestmark = pytest.mark.long

G = torch.Generator().manual_seed(0)
X = torch.randn(64, 8, generator=G)
Y = X[:, :1] * X[:, 1:2] + X[:, 2:3]


def cube(backward, forward=lambda x: x + 0.1 * x**3):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad, *ctx.saved_tensors)

    return Cube


def step(function, lr=1e-2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr)
    return model, (X, Y), lambda m, b: F.mse_loss(function.apply(m(b[0])), b[1]), optimizer


def slope(x):
    return 1 + 0.3 * x**2


WRONG = {
    "sign": (lambda g, x: -g * slope(x), "wrong sign"),
    "forgets": (lambda g, x: slope(x), "forgets to multiply"),
    "another function": (lambda g, x: g * (torch.cos(9 * x) - 1), "something other than"),
    "half": (lambda g, x: -0.5 * g * slope(x), "-0.5 times"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backward_is_named(name):
    backward, said = WRONG[name]
    found = diagnose(*step(cube(backward)))
    assert found.causes, found
    assert found.causes[0].kind == "gradient", found
    assert found.causes[0].place.op == "Cube"
    assert said in found.causes[0].explanation, found
    assert "F.mse_loss(function.apply" in found.causes[0].evidence["line"]


RIGHT = {
    "right": cube(lambda g, x: g * slope(x)),
    "straight through": cube(lambda g, x: g, torch.round),
    "gradient reversal": cube(lambda g, x: -g, lambda x: x.view_as(x)),
    "gradient scaling": cube(lambda g, x: 0.1 * g, lambda x: x.clone()),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_backward_that_is_right_or_meant_is_not(name):
    found = diagnose(*step(RIGHT[name], lr=1e-8))  # a run that stands still is looked at
    assert all(cause.place.op != "Cube" for cause in found.causes), found


def pinn(second):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss_fn(m, x):
        x = x.clone().requires_grad_()
        u = m(x)
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        again = torch.autograd.grad(first.sum(), x, create_graph=second)[0]
        return ((again + u) ** 2).mean() + (m(torch.zeros(1, 1)) - 1).square().mean()

    return model, torch.linspace(-1, 1, 64)[:, None], loss_fn, torch.optim.Adam(model.parameters(), 1e-2)


def test_a_derivative_without_a_graph_teaches_nothing():
    found = diagnose(*pinn(False))
    assert [(c.kind, c.place.op) for c in found.causes[:1]] == [("gradient", "autograd.grad")], found
    assert "create_graph=True" in found.causes[0].remedy
    assert not diagnose(*pinn(True)).causes


def attack(m, b):
    """FGSM: the derivative goes into the model again, as data."""
    x = b[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(F.mse_loss(m(x), b[1]), x)
    return F.mse_loss(m(b[0] + 0.05 * g.sign()), b[1])


def balanced(m, b):
    """A weight of two losses by the size of their gradients, as VQGAN has: meant to be a constant."""
    one, two = F.mse_loss(m(b[0]), b[1]), m(b[0]).square().mean()
    g1 = torch.autograd.grad(one, m[2].weight, retain_graph=True)[0]
    g2 = torch.autograd.grad(two, m[2].weight, retain_graph=True)[0]
    return one + 0.1 * (g1.norm() / (g2.norm() + 1e-4)).clamp(0, 1) * two


@pytest.mark.parametrize("loss_fn", [attack, balanced])
def test_derivatives_that_are_meant_to_be_constant(loss_fn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    assert not diagnose(model, (X, Y), loss_fn, torch.optim.Adam(model.parameters(), 1e-2)).causes


class Reader(nn.Module):
    def __init__(self, cell, size=16):
        super().__init__()
        self.size, self.cell, self.head = size, cell(1, size), nn.Linear(size, 1)

    def forward(self, x):
        if isinstance(self.cell, nn.RNNBase):
            return self.head(self.cell(x)[0][:, -1])
        h = x.new_zeros(len(x), self.size)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


@pytest.mark.parametrize(
    "cell", [lambda i, h: nn.RNN(i, h, batch_first=True), nn.RNNCell], ids=["layer", "cell by hand"]
)
def test_a_gradient_that_vanishes_in_time(cell):
    torch.manual_seed(0)
    model = Reader(cell)
    x = torch.zeros(32, 120, 1)
    x[:, 0, 0] = torch.randn(32, generator=torch.Generator().manual_seed(1))  # all that there is to know
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([float(x[:, 0].mean())]))
    loss_fn = lambda m, b: F.mse_loss(m(b[0]), b[1])  # noqa: E731
    found = diagnose(model, (x, x[:, 0]), loss_fn, torch.optim.Adam(model.parameters(), 1e-3))
    assert found.causes[0].kind == "gradient", found
    assert found.causes[0].place.module == "cell"
    assert found.causes[0].evidence["steps in time"] == 120
