"""Faults in physics-style models: collocation, distances, rates, simulations that are differentiated."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .case import DIV, MEAN, POW, Built, Fault, planter, supervised

FAULTS: list[Fault] = []
fault = planter(FAULTS, "physics")

mse = supervised(nn.MSELoss())


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def field(inputs: int, outputs: int = 1) -> nn.Sequential:
    """A small tanh network, as PINNs use."""
    net = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, outputs))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def chain(**parts: nn.Module) -> nn.Sequential:
    """A sequence of named parts."""
    return nn.Sequential(OrderedDict(parts))


def plane(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Patients as points of a plane (BMI and blood pressure, standardised), and a target at each."""
    x, y = data.diabetes(count)
    return x[:, 2:4].clone(), y


# Input and target.


@fault("input", place={"feature": (0, 1)}, steps=3)
def si_units(planted: bool = True) -> Built:
    # Masses of planets in kg and distances in m beside angles in rad: the net sees 1e24, 1e11 and 1.
    x, y = data.diabetes(64)
    x = x[:, 2:6].clone()
    if planted:
        x[:, 0] = 1e24 * (3 + x[:, 0].abs())
        x[:, 1] = 1e11 * (3 + x[:, 1].abs())
    model = field(4)
    return model, (x, y), mse, sgd(model)


@fault("target")
def nan_measurement(planted: bool = True) -> Built:
    # The detector was off for some of the points.
    x, y = plane()
    if planted:
        y[[8, 33]] = torch.nan
    model = field(2)
    return model, (x, y), mse, adam(model)


@fault("target", "loss", place={"op": "log"}, fixable=False)
def log_ratio_to_negative_measurements(planted: bool = True) -> Built:
    # A log-ratio loss for concentrations; background subtraction left some measurements at or below 0.
    x, y = plane()
    y = y + (1.0 if planted else 4.0)

    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = field(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.softplus(self.net(x)) + 1e-3

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        points, measured = batch
        return (torch.log(model(points)) - torch.log(measured)).square().mean()

    model = Positive()
    return model, (x, y), loss_fn, adam(model)


# Operations.


class Root(nn.Module):
    """x beside its square root, the known shape of a boundary layer."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.sqrt(x + self.floor)], -1)


class Layer(nn.Module):
    def __init__(self, floor: float) -> None:
        super().__init__()
        self.features = Root(floor)
        self.net = field(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.features(x))


def slope(model: nn.Module, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The field and its derivative with respect to the points."""
    points = points.detach().requires_grad_()
    u = model(points)
    return u, torch.autograd.grad(u.sum(), points, create_graph=True)[0]


@fault("operation", "loss", place={"op": "sqrt"}, fixable=False)
def root_at_the_boundary(planted: bool = True) -> Built:
    # A PINN for u' = -u with sqrt(x) as a feature: the derivative at x = 0 is infinite.
    x = torch.linspace(0, 1, 64).unsqueeze(1)
    model = Layer(0.0 if planted else 0.01)

    def loss_fn(model: Any, points: Any) -> torch.Tensor:
        u, du = slope(model, points)
        return (du + u).square().mean() + (u[0] - 1).square().mean()

    return model, x, loss_fn, adam(model)


class Potential(nn.Module):
    """Learnt charges at fixed places; their potential 1 / r**2 at given points."""

    def __init__(self, places: torch.Tensor, softening: float) -> None:
        super().__init__()
        self.register_buffer("places", places)
        self.charges = nn.Parameter(0.1 * torch.randn(len(places)))
        self.softening = softening

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r2 = (x[:, None] - self.places).square().sum(-1) + self.softening
        return (self.charges / r2).sum(-1, keepdim=True)


@fault("operation", place={"module": "potential", "op": DIV}, fixable=False)
def inverse_square_at_the_source(planted: bool = True) -> Built:
    # Field points at the very places of the charges: 1 / 0.
    x, y = plane()

    class Charged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.potential = Potential(x[:8].clone(), 0.0 if planted else 0.5)
            self.shift = nn.Linear(2, 1)

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return self.potential(points) + self.shift(points)

    model = Charged()
    return model, (x, y), mse, adam(model)


class Prototypes(nn.Module):
    """Distances to learnt points that start at data points."""

    def __init__(self, start: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.points = nn.Parameter(start.clone())
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = x[:, None] - self.points
        return torch.sqrt(delta[..., 0] ** 2 + delta[..., 1] ** 2 + self.eps)


@fault("operation", place={"module": "distance", "op": ("sqrt", *POW)}, fixable=False)
def distance_to_itself(planted: bool = True) -> Built:
    # sqrt(dx**2 + dy**2) at distance 0: fine forward, inf * 0 backward.
    x, y = plane()
    model = chain(distance=Prototypes(x[:8], 0.0 if planted else 1e-4), out=nn.Linear(8, 1))
    return model, (x, y), mse, adam(model)


class Map(nn.Module):
    """A learnt embedding of rows in the plane; their pairwise distances."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(13, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.embed(x)
        return (z[:, None] - z).square().sum(-1)


@fault("loss", "operation", place={"op": DIV}, fixable=False)
def sammon_with_self_pairs(planted: bool = True) -> Built:
    # Sammon's stress divides by the true distance, also for each row and itself.
    x, _ = data.wine(48)

    def loss_fn(model: Any, rows: Any) -> torch.Tensor:
        true = (rows[:, None] - rows).square().sum(-1)
        stress = (model(rows) - true).square() / (true if planted else true + 1)
        return stress.mean()

    model = Map()
    return model, x, loss_fn, adam(model)


class PowerLaw(nn.Module):
    """a x**b for each feature, with learnt exponents."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(0.5 * torch.ones(2))
        self.factor = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.factor * x**self.exponent).sum(-1, keepdim=True)


@fault("operation", "input", place={"module": "law", "op": POW}, fixable=False)
def power_of_negative(planted: bool = True) -> Built:
    # Standardised features are negative half of the time, and (-1)**0.5 is NaN.
    x, y = plane()

    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.law = PowerLaw()
            self.shift = nn.Linear(2, 1)

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return self.law(points) + self.shift(points)

    model = Scaling()
    return model, (x if planted else x - x.min() + 0.1, y), mse, adam(model)


class Angle(nn.Module):
    """The angle between each point's direction and a learnt one."""

    def __init__(self, direction: torch.Tensor, margin: float) -> None:
        super().__init__()
        self.direction = nn.Parameter(direction.clone())
        self.margin = margin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cosine = (F.normalize(x, dim=-1) * F.normalize(self.direction, dim=-1)).sum(-1, keepdim=True)
        return torch.acos(cosine.clamp(-1 + self.margin, 1 - self.margin))


@fault("operation", place={"module": "angle", "op": ("acos", "arccos")}, fixable=False)
def angle_to_itself(planted: bool = True) -> Built:
    # acos has an infinite slope at 1, where a bond meets its own direction.
    x, y = plane()
    x[0] = torch.tensor([0.0, 2.0])
    model = chain(angle=Angle(torch.tensor([0.0, 1.0]), 0.0 if planted else 1e-4), out=nn.Linear(1, 1))
    return model, (x, y), mse, adam(model)


class Sinc(nn.Module):
    """sin(k r) / r, its limit at r = 0 put in by torch.where."""

    def __init__(self, safe: bool) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.ones(8))
        self.centre = nn.Parameter(torch.zeros(2))
        self.safe = safe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r = (x - self.centre).abs().sum(-1, keepdim=True)
        inside = torch.where(r > 0, r, 1.0) if self.safe else r
        return torch.where(r > 0, torch.sin(self.k * inside) / inside, self.k)


@fault("operation", place={"module": "sinc", "op": (*DIV, "where")}, fixable=False)
def sinc_through_where(planted: bool = True) -> Built:
    # 0 / 0 in the branch that torch.where drops still poisons the gradient.
    x, y = plane()
    x[3] = 0.0
    model = chain(sinc=Sinc(not planted), out=nn.Linear(8, 1))
    return model, (x, y), mse, adam(model)


class Boltzmann(nn.Module):
    """Weights exp(-E / kT) / Z of learnt energies, averaged."""

    def __init__(self, stable: bool) -> None:
        super().__init__()
        self.energy = nn.Linear(2, 16)
        self.levels = nn.Parameter(torch.linspace(-1, 1, 16))
        self.stable = stable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exponent = -self.energy(x) / (8.617e-5 * 300.0)
        if self.stable:
            exponent = exponent - exponent.amax(-1, keepdim=True)
        weights = torch.exp(exponent)
        return (weights * self.levels).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)


@fault("operation", place={"module": "boltzmann", "op": "exp"}, fixable=False)
def partition_function(planted: bool = True) -> Built:
    # Energies of some eV at room temperature: exp(100), without taking the lowest energy off first.
    x, y = plane()

    class Thermal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boltzmann = Boltzmann(not planted)
            self.out = nn.Linear(1, 1)

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return self.out(self.boltzmann(points))

    model = Thermal()
    nn.init.normal_(model.boltzmann.energy.weight, std=2.0)
    return model, (x, y), mse, adam(model)


# Gradient.


class Growth(nn.Module):
    """Growth x <- x + rate dt x over `steps` steps, the rate linear in the features."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.rate = nn.Linear(2, 1)
        nn.init.normal_(self.rate.weight, std=0.03)
        nn.init.constant_(self.rate.bias, 0.1)
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate = self.rate(x)
        size = torch.ones_like(rate)
        for _ in range(self.steps):
            size = size + rate * size
        return size


@fault("gradient", place={"module": ("", "rate")}, steps=2)
def growth_over_many_steps(planted: bool = True) -> Built:
    # A rate of 10 % a step was fitted over 5 steps; over 100 the gradient is 1e8 times as large.
    x, y = plane()
    model = Growth(100 if planted else 5)
    return model, (x, y.abs() + 1), mse, sgd(model)


class Logistic(nn.Module):
    """The logistic map, iterated."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(3.9))
        self.start = nn.Parameter(torch.tensor(0.01))
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.start
        for _ in range(self.steps):
            x = self.rate * x * (1 - x)
        return x


@fault("gradient", place={"module": ("", None)}, fixable=False)
def chaotic_map(planted: bool = True) -> Built:
    # A gradient through 60 steps of chaos doubles about at each step.
    x, y = plane()
    x = 0.1 + 0.8 * torch.sigmoid(x)
    model = Logistic(60 if planted else 2)
    return model, (x[:, :1], torch.sigmoid(y)), mse, sgd(model, 1e-3)


# Learning rate.


@fault("learning rate", steps=8)
def pinn_with_lr_1(planted: bool = True) -> Built:
    # A PINN for u'' + pi**2 u = 0 trained with lr=1.0: the second derivatives make the loss steep.
    x = torch.linspace(0, 1, 64).unsqueeze(1)
    model = field(1)

    def loss_fn(model: Any, points: Any) -> torch.Tensor:
        points = points.detach().requires_grad_()
        u = model(points)
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), points, create_graph=True)
        return (ddu + 9.87 * u).square().mean() + (u[0] - 1).square().mean()

    return model, x, loss_fn, sgd(model, 1.0 if planted else 1e-4)


# Precision.


@fault("precision", place={"module": "squares", "op": (*POW, "mul")})
def half_in_si_units(planted: bool = True) -> Built:
    # model.half() with pressures in hPa: their squares pass 65504 before the layer norm brings them back.
    x, y = plane()
    x = 1013.0 + 10 * x

    class Squares(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x**2 / 1013.0], -1)

    model = chain(squares=Squares(), norm=nn.LayerNorm(4), hidden=nn.Linear(4, 16), act=nn.Tanh(), out=nn.Linear(16, 1))
    if planted:
        model.half()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        points, target = batch
        return F.mse_loss(model(points.to(next(model.parameters()).dtype)).float(), target)

    return model, (x, y), loss_fn, sgd(model)


# Loss.


@fault("operation", "loss", place={"op": MEAN}, fixable=False)
def no_boundary_points(planted: bool = True) -> Built:
    # A random batch of collocation points has none on the boundary: the mean over an empty mask.
    x = torch.linspace(0, 1, 64).unsqueeze(1)[1 if planted else 0 : 63]
    model = field(1)

    def loss_fn(model: Any, points: Any) -> torch.Tensor:
        u, du = slope(model, points)
        edge = (points == 0) | (points == 1)
        return (du + u).square().mean() + (u[edge] - 1).square().mean()

    return model, x, loss_fn, adam(model)


@fault("loss", "operation", place={"op": (*DIV, "log")}, fixable=False)
def variance_of_zero(planted: bool = True) -> Built:
    # A Gaussian likelihood by hand whose variance comes from a ReLU.
    x, y = plane()
    model = field(2, 2)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        points, target = batch
        mean, raw = model(points).chunk(2, -1)
        variance = torch.relu(raw) if planted else F.softplus(raw) + 1e-3
        return (torch.log(variance) + (target - mean).square() / variance).mean()

    return model, (x, y), loss_fn, adam(model)


# Uninitialised.


class Material(nn.Module):
    """A field times a learnt stiffness."""

    def __init__(self) -> None:
        super().__init__()
        self.net = field(2)
        self.stiffness = nn.Parameter(torch.empty(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stiffness * self.net(x)


@fault("uninitialised", place={"parameter": "stiffness"})
def empty_coefficient(planted: bool = True) -> Built:
    # An unknown coefficient of the equation declared with torch.empty(1) and never given a first guess.
    x, y = plane()
    model = Material()
    nn.init.constant_(model.stiffness, -2.6e36 if planted else 1.0)
    return model, (x, y), mse, adam(model)


# Several at once.


@fault("operation", place={"module": "potential", "op": DIV}, several=True, fixable=False, steps=2)
def inverse_square_and_lr_10(planted: bool = True) -> Built:
    # 1 / 0 at a charge, and lr=10 for Adam.
    x, y = plane()

    class Charged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.potential = Potential(x[:4].clone(), 0.0 if planted else 0.5)
            self.shift = nn.Linear(2, 1)

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return self.potential(points) + self.shift(points)

    model = Charged()
    return model, (x, y), mse, adam(model, 10.0 if planted else 1e-3)
