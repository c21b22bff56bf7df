"""Training steps that an operation breaks, each with what a diagnosis must say: (kind, module, op).

Written from the documentation of torch's operations, one or several for each way in which one can fail.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import initlab

G = torch.Generator().manual_seed(0)
X = torch.randn(16, 8, generator=G)
Y = torch.randn(16, 1, generator=G)
MSE = initlab.supervised(nn.MSELoss())
INF = math.inf


def adam(model, lr=1e-3, **options):
    return torch.optim.Adam(model.parameters(), lr, **options)


class Net(nn.Module):
    """Linear, then a function of what it puts out, then a head."""

    def __init__(self, function, width=8, out=1):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.head = nn.Linear(8, width), Apply(function), nn.Linear(width, out)

    def forward(self, x):
        return self.head(self.middle(self.first(x)))


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step, and the kinds, modules and operations of which a diagnosis names one."""

    make: Callable[[], tuple[Any, ...]]
    kinds: tuple[str, ...]
    module: tuple[str | None, ...]
    op: tuple[str | None, ...]
    words: str = ""  # in the explanation
    advice: str = ""  # in the remedy
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(name, kinds, module, op, words="", advice="", **options):
    def add(make):
        as_tuple = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
        CASES[name] = Case(make, as_tuple(kinds), as_tuple(module), as_tuple(op), words, advice, options)
        return make

    return add


def middle(name, function, op, words="", advice="", kinds="operation", width=8, x=X):
    """A function in the middle of a network."""

    def make():
        model = Net(function, width)
        return model, (x, Y), MSE, adam(model)

    case(name, kinds, "middle", op, words, advice)(make)


def loss(name, function, op, words="", advice="", kinds="loss", out=1, y=Y, x=X):
    """A loss function of a prediction and a target."""

    def make():
        model = Net(torch.tanh, out=out)
        return model, (x, y), lambda m, b: function(m(b[0]), b[1]), adam(model)

    case(name, kinds, None, op, words, advice)(make)


# G. Made in the forward pass, and masked before the loss

row = torch.zeros(16, dtype=torch.bool)
row[3] = True


def gated(x):
    return x * (x > 0)


def masked_scores(x):
    return x.masked_fill(row[:, None], -INF)


shut = torch.where(row, -INF, 0.0)[:, None]
middle("G softmax, where", lambda x: torch.where(row[:, None], 0.0, (x + shut).softmax(-1)), "softmax", "-inf")
middle("G softmax, nan_to_num", lambda x: (x + shut).softmax(-1).nan_to_num(), "softmax", "-inf in 1 of 16")
middle("G softmax, masked_fill", lambda x: (x + shut).softmax(-1).masked_fill(row[:, None], 0), "softmax", "-inf")
middle("G log_softmax", lambda x: (x + shut).log_softmax(-1).masked_fill(row[:, None], 0), "log_softmax", "-inf")
middle("G log, where", lambda x: torch.where(x > 0, gated(x).log(), 0.0), "log", "gets 0", "torch.where(ok, x, 1.0)")
middle("G sqrt, where", lambda x: torch.where(x > 0, x.sqrt(), 0.0), "sqrt", "below 0", "torch.where(ok, x, 1.0)")
middle("G power, where", lambda x: torch.where(x > 0, x**0.3, 0.0), "pow", "0.3", "torch.where(ok, x, 1.0)")
middle("G division, where", lambda x: torch.where(x > 0, 1 / gated(x), 0.0), ("div", "reciprocal"), "0")
middle("G acos, where", lambda x: torch.where(x.abs() < 1, x.acos(), 0.0), "acos", "outside [-1, 1]")
middle("G asin, nan_to_num", lambda x: x.asin().nan_to_num(0, 0, 0), "asin", "outside [-1, 1]")
middle("G root by hand, indexing", lambda x: x + x.sqrt()[:, :1].nanmean() * 0.1, "sqrt", "below 0")
loss("G nanmean", lambda z, y: (z - y).sqrt().nanmean(), "sqrt", "below 0")
loss("G indexing", lambda z, y: (z.sqrt() - y)[z > 0].square().mean(), "sqrt", "below 0")
loss("G multiplied by 0", lambda z, y: torch.where(z > 0, gated(z).log() * y, 0.0).mean(), "log", "gets 0")


class Attention(nn.Module):
    def __init__(self, need_weights=True):
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 1)
        self.need_weights = need_weights

    def forward(self, x, pad):
        out = self.attend(x, x, x, key_padding_mask=pad, need_weights=self.need_weights)[0]
        return self.head(out.masked_fill(pad[..., None], 0)).mean(1)


def padded():
    pad = torch.zeros(4, 6, dtype=torch.bool)
    pad[1] = True
    pad[2, 4:] = True
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)), pad, torch.randn(4, 1)


@case("G attention", "operation", "attend", ("softmax", "multi_head_attention_forward"), "-inf in")
def _():
    model = Attention()
    return model, padded(), lambda m, b: F.mse_loss(m(b[0], b[1]), b[2]), adam(model)


class Causal(nn.Module):
    def __init__(self, mask):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o, self.mask = nn.Linear(8, 8), nn.Linear(8, 1), mask

    def forward(self, x):
        q = self.q(x)
        scores = (q @ q.transpose(1, 2)).masked_fill(~self.mask, -INF)
        return self.o(scores.softmax(-1) @ q).mean(1)


@case("G a causal mask off by one", "operation", "", "softmax", "-inf")
def _():
    model = Causal(torch.ones(6, 6).tril(-1).bool())
    return model, (padded()[0], torch.randn(4, 1)), MSE, adam(model)


# H. Functions of the user's own


class Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.clamp_min(0).sqrt()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad / (2 * ctx.saved_tensors[0])


class Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-8)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / x.norm(dim=-1, keepdim=True)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad * 1e30 * 1e30


class Logged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.log()

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.saved_tensors[0]


for function in (Root, Scaled):
    middle(f"H {function.__name__}", function.apply, function.__name__, "autograd.Function")
    middle(f"H {function.__name__}, activation", lambda x, f=function: f.apply(x).relu() * 2, function.__name__)
    loss(
        f"H {function.__name__} in the loss",
        lambda z, y, f=function: (f.apply(z) - y).square().mean(),
        function.__name__,
    )
middle("H Unit of zeros", lambda x: Unit.apply(x.relu() * 0), "Unit", "autograd.Function")
middle("H log in forward()", Logged.apply, ("log", "Logged"), "below 0")


@case("H two layers on", "operation", "", "Root", "autograd.Function")
def _():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x):
            return self.c(torch.tanh(self.b(Root.apply(self.a(x)))))

    model = Deep()
    return model, (X, Y), MSE, adam(model)


# I. float16


def half(name, function, op, words, module="middle", x=X, y=Y, advice="0.0001 in place"):
    def make():
        model = Net(function).half()
        return model, (x.half(), y.half()), lambda m, b: F.mse_loss(m(b[0]).float(), b[1].float()), None

    case(name, "precision", module, op, words, advice)(make)


zero = X * 0
half("I normalise", lambda x: F.normalize(x * 0, eps=1e-12), ("div", "normalize"), "is 0 in float16", advice="")
half("I sum + eps", lambda x: (r := (x - 9).relu()) / (r.sum(-1, keepdim=True) + 1e-8), "div", "1e-08 is 0 in float16")
half("I log + eps", lambda x: ((x - 9).relu() + 1e-8).log(), "log", "1e-08 is 0 in float16")
half("I clamp", lambda x: (x - 9).sigmoid().sub(1).clamp_min(1e-10).log(), "log", "1e-10 is 0 in float16")
half(
    "I rsqrt", lambda x: x * ((x * 0).square().mean(-1, keepdim=True) + 1e-8).rsqrt(), "rsqrt", "1e-08 is 0 in float16"
)
half("I std + eps", lambda x: x / (x[:, :1].expand_as(x).std(-1, keepdim=True) + 1e-9), "div", "is 0 in float16")
half("I own layer norm", lambda x: (x - x) / ((x - x).var(-1, keepdim=True) + 1e-12).sqrt(), "div", "is 0 in float16")
half("I reciprocal", lambda x: 1 / ((x - 9).relu() + 1e-8), ("reciprocal", "div"), "is 0 in float16")
half("I overflow of exp", lambda x: (x * 0 + 12).exp(), "exp", "overflows", advice="float()")
half(
    "I overflow of a product",
    lambda x: (x * 0 + 300) * 300,
    "mul",
    "9e+04, and float16 ends at 65504",
    advice="float()",
)
half("I overflow of a square", lambda x: (x * 0 + 300).square(), ("square", "pow"), "9e+04", advice="float()")


for name, eps in {"Adam": 1e-8, "AdamW": 1e-8, "RMSprop": 1e-8, "Adagrad": 1e-10, "NAdam": 1e-8}.items():

    @case(f"I eps of {name}", "precision", ("first", "head"), None, "eps of", '["eps"] = 0.0001', steps=2)
    def _(name=name, eps=eps):
        model = Net(torch.relu).half()
        model.first.bias.data[:4] = -9  # dead units have a gradient of 0
        optimizer = getattr(torch.optim, name)(model.parameters(), 1e-3, eps=eps)
        return model, (X.half(), Y.half()), lambda m, b: F.mse_loss(m(b[0]).float(), b[1].float()), optimizer


# J. Counts of 0

none = torch.zeros(16, 1)
classes = torch.randint(0, 3, (16,), generator=G)
counts = "clamp_min(1)"
loss("J masked sum", lambda z, y: ((z - y) * (y > 99)).square().sum() / (y > 99).sum(), "div", "count of 0", counts)
loss("J masked mean", lambda z, y: (z - y)[y > 99].square().mean(), "mean", "no elements", "max(1")
loss("J mse of nothing", lambda z, y: F.mse_loss(z[y > 99], y[y > 99]), "mse_loss", "no elements", "skip")
loss(
    "J smooth_l1 of nothing",
    lambda z, y: F.smooth_l1_loss(z[y > 99], y[y > 99]),
    "smooth_l1_loss",
    "no elements",
    "skip",
)
loss("J len", lambda z, y: z.square().sum() / len(y[y > 99]), "div", "count of 0", counts)
loss(
    "J pos_weight",
    lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=(y == 0).sum() / (y == 1).sum()),
    "div",
    "count of 0",
    counts,
    y=none,
)
loss(
    "J weights of the classes",
    lambda z, y: F.cross_entropy(z, y, weight=(w := 1 / torch.bincount(y, minlength=3).float()) / w.sum()),
    ("div", "reciprocal"),
    "count of 0",
    counts,
    out=3,
    y=classes * 0,
)
loss(
    "J no weight for the classes that occur",
    lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([0.0, 1.0, 1.0])),
    ("cross_entropy", "nll_loss"),
    "no weight",
    out=3,
    y=classes * 0,
)
loss("J log of a share", lambda z, y: -(y.mean().log() * z.mean()), "log", "gets 0", y=none)
loss("J dice", lambda z, y: 1 - (z.relu() * 0 * y).sum() / (z.relu() * 0 + y).sum(), "div", "0", y=none)
loss("J per row", lambda z, y: (z / (y > 0.5).sum(1, keepdim=True)).mean(), "div", "count of 0", counts)
loss(
    "J spread of rewards",
    lambda z, y: (z * (y - y.mean()) / y.std()).mean(),
    "div",
    "the std of equal",
    "std() +",
    y=none,
)
loss("J variance of a batch", lambda z, y: (z * y / (y - 1).var()).mean(), "div", "the var of equal", "var() +", y=none)
loss("J norm", lambda z, y: (z / (y.norm())).mean(), "div", "the norm of zeros", y=none)
loss("J cosine", lambda z, y: 1 - (z * y).sum() / (z.norm() * y.norm()), "div", "the norm of zeros", y=none)
loss("J median of nothing", lambda z, y: z.square().mean() / y.count_nonzero(), "div", "count of 0", counts, y=none)

# K. Built-in operations

middle("K log of a negative number", lambda x: x.log(), "log", "no logarithm", "look at the formula")
middle("K log1p", lambda x: (x.tanh() - 3).log1p(), "log1p", "below -1")
middle("K log of 0", lambda x: x.relu().log(), "log", "gets 0", "clamp_min")
middle("K sqrt of a negative number", lambda x: x.sqrt(), "sqrt", "below 0", "look at the formula")
middle("K sqrt at 0", lambda x: gated(x).sqrt(), "sqrt", "slope is infinite", "x + 1e-08")
middle("K rsqrt at 0", lambda x: x.relu().rsqrt(), "rsqrt", "0")
middle("K fractional power of a negative number", lambda x: x**1.5, "pow", "exponent 1.5")
middle("K power at 0", lambda x: gated(x) ** 0.5, "pow", "slope is infinite")
middle("K negative power at 0", lambda x: x.relu() ** -1.0, ("pow", "reciprocal"), "0")
middle("K acos at 1", lambda x: (x.sign() * (1 + 0 * x)).acos(), "acos", "slope is infinite", "clamp(-1 +")
middle("K asin", lambda x: (x * 3).asin(), "asin", "outside")
middle("K atanh at 1", lambda x: x.clamp(-1, 1).atanh(), "atanh", "infinite")
middle("K acosh", lambda x: x.acosh(), "acosh", "begins above 1")
middle("K logit at 0", lambda x: x.clamp(0, 1).logit(), "logit", "0 or 1", "eps=")
middle("K logit outside", lambda x: x.logit(), "logit", "outside [0, 1]")
middle("K exp", lambda x: (x * 500).exp(), "exp", "88.7")
middle("K exp2", lambda x: torch.exp2(x * 500), "exp2", "gets numbers up to")
middle("K cosh", lambda x: (x * 500).cosh(), "cosh", "88.7")
middle("K sinh", lambda x: (x * 500).sinh(), "sinh", "88.7")
middle("K std of one", lambda x: x / (x[:1].std(0) + 1e-6), "std", "one value", "correction=0")
middle("K var of one", lambda x: x / (x[:1].var(0) + 1e-6), "var", "one value", "correction=0")
middle("K norm of a row of zeros", lambda x: x / (x * 0).norm(dim=1, keepdim=True), "div", "norm of zeros")
middle("K normalize, eps=0", lambda x: F.normalize(x.relu() * 0, eps=0.0), ("normalize", "div"), "0")
middle("K layer_norm, eps=0", lambda x: F.layer_norm(x * 0, (8,), eps=0.0), "layer_norm", "eps=0")
middle("K group_norm, eps=0", lambda x: F.group_norm(x * 0, 2, eps=0.0), "group_norm", "eps=0")
middle(
    "K logsumexp of nothing", lambda x: (s := masked_scores(x)) - s.logsumexp(-1, keepdim=True), "sub", "inf less inf"
)
middle(
    "K 0 times inf", lambda x: x + row[:, None] * -INF, "mul", "0 and inf", "masked_fill", kinds=("operation", "input")
)
middle("K cumprod", lambda x: (x * 1e6 + 1e7).cumprod(1), "cumprod", "multiplies 8 numbers")
middle("K prod", lambda x: x + (x * 1e6 + 1e7).prod(1, keepdim=True), "prod", "multiplies 8 numbers")
middle("K lgamma", lambda x: torch.lgamma(x.round().clamp_max(0)), "lgamma", "whole number")
middle("K distance by hand", lambda x: (x[:, None] - x).square().sum(-1).sqrt()[:, :8], "sqrt", "gets 0 in 16 of 256")
square = lambda x: x.T @ x  # noqa: E731
middle(
    "K eigh of equal values",
    lambda x: x @ torch.linalg.eigh(square(x) * 0 + torch.eye(8))[1],
    "linalg_eigh",
    "equal eigen",
)
middle(
    "K svd of equal values",
    lambda x: x @ torch.linalg.svd(square(x) * 0 + torch.eye(8))[2],
    "linalg_svd",
    "equal singular",
)
middle(
    "K logdet", lambda x: x + torch.logdet(-torch.eye(7) + 0 * square(x)[:7, :7]), ("logdet",), "determinant is below 0"
)
middle("K cholesky", lambda x: x @ torch.linalg.cholesky(-square(x)), "linalg_cholesky", "positive", "torch.eye")
middle(
    "K cholesky of rank 1",
    lambda x: x @ torch.linalg.cholesky(x[:1].T @ x[:1]),
    "linalg_cholesky",
    "eigenvalue",
    "torch.eye",
)
middle("K inverse", lambda x: x @ torch.linalg.inv(square(x) * 0), "linalg_inv", "singular", "torch.eye")
middle(
    "K solve",
    lambda x: torch.linalg.solve(square(x) * 0, x.T).T,
    ("linalg_solve", "linalg_solve_ex"),
    "singular",
    "torch.eye",
)
loss(
    "K ctc",
    lambda z, y: F.ctc_loss(z[:, None, :].log_softmax(-1), torch.ones(1, 12).long(), [16], [12]),
    "ctc_loss",
    "23 frames",
    "zero_infinity",
    out=4,
)
loss(
    "K every label ignored", lambda z, y: F.cross_entropy(z, y), "cross_entropy", "", "skip", out=3, y=classes * 0 - 100
)
loss(
    "K nll of every label ignored",
    lambda z, y: F.nll_loss(z.log_softmax(1), y, ignore_index=1),
    "nll_loss",
    "",
    "skip",
    out=3,
    y=classes * 0 + 1,
)
loss(
    "K kl_div without logarithms",
    lambda z, y: F.kl_div(z.softmax(1), y, reduction="batchmean"),
    "kl_div",
    "log-prob",
    "log_softmax",
    out=3,
    y=torch.ones(16, 3) / 3,
)
loss(
    "K gaussian_nll, variance below 0",
    lambda z, y: F.gaussian_nll_loss(z, y, z),
    "gaussian_nll_loss",
    "var",
    "softplus",
)
loss("K gaussian_nll by hand", lambda z, y: ((z - y).square() / z.relu() + z.relu().log()).mean(), ("div", "log"), "0")
loss("K log of a probability", lambda z, y: -(1 - torch.sigmoid(z * 1e4)).log().mean(), "log", "gets 0")
loss("K poisson", lambda z, y: F.poisson_nll_loss(z * 1e4 + 1e4, y.abs()), ("poisson_nll_loss", "exp"), "88.7")
loss(
    "K normal of scale 0",
    lambda z, y: -torch.distributions.Normal(z, z.relu() * 0, validate_args=False).log_prob(y).mean(),
    ("div", "log"),
    "0",
)


class Temperature(nn.Module):
    def __init__(self, start, use):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.temperature, self.use = nn.Linear(8, 1), nn.Parameter(torch.tensor(start)), use

    def forward(self, x):
        return self.use(self.first(x), self.temperature)


for name, start, use, op in (
    ("K temperature", 0.0, lambda z, t: z / t, "div"),
    ("K temperature, log", 0.0, lambda z, t: z * t.log(), "log"),
    ("K temperature, exp", 200.0, lambda z, t: z * t.exp(), "exp"),
    ("K temperature, power", -2.0, lambda z, t: z * t**0.5, "pow"),
):

    @case(name, ("operation", "weights"), "", op)
    def _(start=start, use=use):
        model = Temperature(start, use)
        return model, (X, Y), MSE, adam(model)


@case("K weight_norm of zeros", ("operation", "weights"), "0", ("weight_norm", "div"), "norm, which is 0")
def _():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    layer.weight.data[1] = 0
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(layer), nn.Linear(4, 1))
    return model, (X, Y), MSE, adam(model)


@case("K old weight_norm of zeros", ("operation", "weights"), "0", ("weight_norm", "div"), "norm, which is 0")
def _():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    layer.weight.data[1] = 0
    model = nn.Sequential(nn.utils.weight_norm(layer), nn.Linear(4, 1))
    return model, (X, Y), MSE, adam(model)


@case("K an index beyond the embedding", "input", "0", "embedding", "index 50", "Embedding(51")
def _():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 1))
    return model, (torch.tensor([[1, 2], [3, 50]]), torch.randn(2, 1)), MSE, adam(model)


@case("K an index below 0", "input", "0", "embedding", "index -1", "padding_idx")
def _():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 1))
    return model, (torch.tensor([[1, 2], [3, -1]]), torch.randn(2, 1)), MSE, adam(model)


@case("K labels of 255", "target", None, "cross_entropy", "255", "ignore_index=255")
def _():
    model = Net(torch.tanh, out=3)
    labels = classes.clone()
    labels[::5] = 255
    return model, (X, labels), initlab.supervised(nn.CrossEntropyLoss()), adam(model)


for name, eps in (("Adam", 0.0), ("RMSprop", 0.0), ("AdamW", 0.0)):

    @case(f"K eps=0 of {name}", "optimizer", ("first", "head"), None, "eps is 0", '["eps"]', steps=2)
    def _(name=name, eps=eps):
        model = Net(torch.relu)
        model.first.bias.data[:4] = -9
        return model, (X, Y), MSE, getattr(torch.optim, name)(model.parameters(), 1e-3, eps=eps)


# F. Recurrences that overflow in the forward pass


class Cell(nn.Module):
    """A recurrence by hand."""

    def __init__(self, step, size=16, gain=2.0, steps=200):
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.state, self.out = nn.Linear(4, size), nn.Linear(size, size, bias=False), nn.Linear(size, 1)
        nn.init.orthogonal_(self.state.weight, gain)
        self.step, self.steps = step, steps

    def forward(self, x):
        h = x.new_zeros(len(x), self.state.in_features)
        for t in range(x.shape[1]):
            h = self.step(self.inward(x[:, t]) + self.state(h))
        return self.out(h)


SERIES = torch.randn(8, 200, 4, generator=G), torch.randn(8, 1, generator=G)


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.u, self.out = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(4, 16)), nn.Linear(16, 1)

    def forward(self, x):
        h = x.new_zeros(len(x), 16)
        for t in range(x.shape[1]):
            h = (h @ self.w + x[:, t] @ self.u).relu()
        return self.out(h)


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.out = nn.RNNCell(4, 16, nonlinearity="relu"), nn.Linear(16, 1)
        nn.init.orthogonal_(self.cell.weight_hh, 2.5)

    def forward(self, x):
        h = x.new_zeros(len(x), 16)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.out(h)


class Layer(nn.Module):
    def __init__(self, layers=1):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.RNN(4, 16, layers, nonlinearity="relu", batch_first=True)
        self.out = nn.Linear(16, 1)
        nn.init.orthogonal_(getattr(self.rnn, f"weight_hh_l{layers - 1}"), 3.0)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


for name, build, module in (
    ("F linear cell", lambda: Cell(lambda h: h), "state"),
    ("F relu cell", lambda: Cell(torch.relu, gain=3.0), "state"),
    ("F leaky cell", lambda: Cell(F.leaky_relu, gain=4.0), "state"),
    ("F a matrix", Matrix, ""),
    ("F RNNCell", Cells, "cell"),
    ("F RNN", Layer, "rnn"),
    ("F RNN of two layers", lambda: Layer(2), "rnn"),
):

    @case(name, "weights", module, None, "largest eigenvalue", "orthogonal_")
    def _(build=build):
        model = build()
        return model, SERIES, MSE, adam(model)


def is_right(one, cause):
    """What a cause gets wrong; "" where it is right."""
    wrong = []
    if cause.kind not in one.kinds:
        wrong.append(f"kind {cause.kind}")
    if cause.place.module not in one.module:
        wrong.append(f"module {cause.place.module!r}")
    if cause.place.op not in one.op:
        wrong.append(f"op {cause.place.op!r}")
    if one.words not in cause.explanation:
        wrong.append(f"explanation {cause.explanation!r}")
    if one.advice not in cause.remedy:
        wrong.append(f"remedy {cause.remedy!r}")
    return "; ".join(wrong)
