"""Faults in plain feed-forward networks."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .case import CROSS_ENTROPY, DIV, MEAN, POW, STD, Built, Fault, planter, supervised, train

FAULTS: list[Fault] = []
fault = planter(FAULTS, "mlp")


class Mlp(nn.Module):
    """Hidden layers in `encoder` (linear at 0, 2, 4, ..., its activation after each), then `head`."""

    def __init__(self, *sizes: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(fan_in, fan_out), act()]
        self.encoder = nn.Sequential(*layers)
        self.head = nn.Linear(*sizes[-2:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def he(model: nn.Module) -> None:
    for layer in linears(model):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


def hidden(depth: int) -> tuple[str, ...]:
    """Paths of the modules that a fault of a whole `Mlp` with `depth` hidden layers may be pinned on."""
    return ("", "encoder", "head", *(f"encoder.{i}" for i in range(2 * depth)))


cross_entropy = supervised(nn.CrossEntropyLoss())
mse = supervised(nn.MSELoss())


def sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


# Input.


@fault("input", place={"feature": 12})
def raw_wine_tanh(planted: bool = True) -> Built:
    # No scaler: proline is about 750, the other features about 1 to 20; every tanh is saturated.
    x, y = data.wine(raw=planted)
    model = Mlp(13, 32, 32, 3, act=nn.Tanh)
    return model, (x, y), cross_entropy, sgd(model)


@fault("input", place={"feature": (3, 23)}, steps=3)
def raw_cancer_relu(planted: bool = True) -> Built:
    # No scaler: the two area columns (3 and 23) are about 800, most others below 1.
    x, y = data.cancer(raw=planted)
    model = Mlp(30, 64, 64, 2)
    return model, (x, y), cross_entropy, sgd(model, 0.05)


@fault("input", steps=4)
def raw_diabetes(planted: bool = True) -> Built:
    # Blood values as the laboratory gives them, all about 100: plain SGD diverges.
    x, y = data.diabetes(raw=planted)
    model = Mlp(10, 64, 1)
    return model, (x, y), mse, sgd(model, 0.02)


@fault("input", place={"feature": 3}, steps=3)
def micro_units(planted: bool = True) -> Built:
    # One source of the data gives the area in square micrometres.
    x, y = data.cancer()
    if planted:
        x[:, 3] *= 1e6
    model = Mlp(30, 64, 2)
    return model, (x, y), cross_entropy, sgd(model, 0.05)


@fault("input", place={"feature": [5, 11]})
def csv_with_gaps(planted: bool = True) -> Built:
    # pandas.read_csv makes NaN of empty cells.
    x, y = data.cancer()
    if planted:
        x[[3, 40, 41], 5] = torch.nan
        x[[7, 40], 11] = torch.nan
    model = Mlp(30, 32, 2)
    return model, (x, y), cross_entropy, adam(model)


@fault("input", place={"feature": 6})
def log_of_a_feature(planted: bool = True) -> Built:
    # A skewed column was put on a log scale; where the concavity is 0 that gives -inf.
    raw, y = data.cancer(raw=True)
    x, _ = data.cancer()
    x[:, 6] = torch.log(raw[:, 6] + (0.0 if planted else 1.0))
    model = Mlp(30, 32, 2)
    return model, (x, y), cross_entropy, sgd(model, 0.05)


@fault("input", place={"feature": 2}, steps=4)
def sentinel(planted: bool = True) -> Built:
    # Missing BMI cells are coded -99999 in the file.
    x, y = data.diabetes()
    if planted:
        x[[5, 17, 60, 99], 2] = -99999.0
    model = Mlp(10, 64, 1)
    return model, (x, y), mse, sgd(model, 0.05)


@fault("input", place={"feature": [0, 32, 39]})
def constant_columns_standardised(planted: bool = True) -> Built:
    # (x - mean) / std by hand: three pixels are 0 in every digit, 0 / 0.
    x, y = data.digits()
    if planted:
        x, y = data.digits(1797, raw=True)
        x = ((x - x.mean(0)) / x.std(0))[:128]
        y = y[:128]
    model = Mlp(64, 32, 10)
    return model, (x, y), cross_entropy, adam(model)


# Target.


@fault("target", fixable=False)
def classes_from_one(planted: bool = True) -> Built:
    # Class labels 1..10 for 10 outputs.
    x, y = data.digits()
    model = Mlp(64, 32, 10)
    return model, (x, y + 1 if planted else y), cross_entropy, adam(model)


@fault("target")
def missing_targets(planted: bool = True) -> Built:
    # Some patients were not seen again.
    x, y = data.diabetes()
    if planted:
        y[[4, 70]] = torch.nan
    model = Mlp(10, 32, 1)
    return model, (x, y), mse, adam(model)


@fault("target", place={"op": "log"}, fixable=False)
def log_of_a_zero_target(planted: bool = True) -> Built:
    # The target is learnt on a log scale, but counted from the healthiest patient, who so has 0.
    x, y = data.diabetes(raw_y=True)
    y = y - y.min() + (0.0 if planted else 1.0)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        features, target = batch
        return F.mse_loss(model(features), torch.log(target))

    model = Mlp(10, 32, 1)
    return model, (x, y), loss_fn, adam(model)


# Starting weights.


@fault("weights", place={"module": hidden(10)})
def standard_normal_weights(planted: bool = True) -> Built:
    # torch.randn for every weight of ten ReLU layers: each multiplies the signal by about 6.
    x, y = data.digits()
    model = Mlp(64, *[64] * 10, 10)
    he(model)
    if planted:
        for layer in linears(model):
            nn.init.normal_(layer.weight)
    return model, (x, y), cross_entropy, sgd(model, 0.01)


@fault("weights", place={"module": hidden(2)})
def zeros(planted: bool = True) -> Built:
    # "Start from nothing": all weights 0, so no hidden unit ever gets a gradient.
    x, y = data.digits()
    model = Mlp(64, 32, 32, 10)
    if planted:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    return model, (x, y), cross_entropy, sgd(model)


@fault("weights", place={"module": hidden(2)})
def constant(planted: bool = True) -> Built:
    # All weights 0.1: the units of a layer are copies of each other for ever.
    x, y = data.digits()
    model = Mlp(64, 32, 32, 10)
    if planted:
        for layer in linears(model):
            nn.init.constant_(layer.weight, 0.1)
    return model, (x, y), cross_entropy, sgd(model, 0.2)


@fault("weights", place={"module": ("encoder.2", "encoder.3")})
def dead_relus(planted: bool = True) -> Built:
    # A bias of -30, copied from a threshold of another model: no unit of the second layer ever fires.
    x, y = data.digits()
    model = Mlp(64, 64, 64, 10)
    he(model)
    if planted:
        nn.init.constant_(model.encoder[2].bias, -30.0)
    return model, (x, y), cross_entropy, sgd(model)


@fault("weights", place={"module": hidden(12)})
def tiny_weights(planted: bool = True) -> Built:
    # N(0, 0.01), as in the first networks' papers, in twelve tanh layers.
    x, y = data.digits()
    model = Mlp(64, *[64] * 12, 10, act=nn.Tanh)
    for layer in linears(model):
        nn.init.xavier_normal_(layer.weight)
        if planted:
            nn.init.normal_(layer.weight, std=0.01)
    return model, (x, y), cross_entropy, sgd(model, 0.05)


@fault("weights", place={"module": hidden(6)})
def rand_weights(planted: bool = True) -> Built:
    # torch.rand: all weights positive with mean 0.5, so each layer multiplies its mean by 32.
    x, y = data.digits()
    model = Mlp(64, *[64] * 6, 10)
    he(model)
    if planted:
        for layer in linears(model):
            nn.init.uniform_(layer.weight)
    return model, (x, y), cross_entropy, sgd(model, 0.01)


@fault("weights", place={"parameter": "head.weight"})
def one_huge_layer(planted: bool = True) -> Built:
    # The std of the new head was meant to be 0.01.
    x, y = data.digits()
    model = Mlp(64, 64, 64, 10)
    he(model)
    nn.init.normal_(model.head.weight, std=1e4 if planted else 0.01)
    return model, (x, y), cross_entropy, sgd(model, 0.05)


@fault("weights", place={"module": hidden(10)})
def deep_sigmoids(planted: bool = True) -> Built:
    # torch's default weights under ten sigmoids: each divides the gradient by about 7.
    x, y = data.digits()
    model = Mlp(64, *[64] * 10, 10, act=nn.Sigmoid)
    if not planted:
        for layer in linears(model)[:-1]:
            nn.init.xavier_normal_(layer.weight, gain=4.0)
            nn.init.zeros_(layer.bias)
    return model, (x, y), cross_entropy, adam(model, 3e-3)


# Operations.


class BatchStd(nn.Module):
    """Standardises by the batch's own statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) / (x.std(0) + 1e-5)


@fault("operation", place={"module": "encoder.1", "op": STD}, fixable=False)
def std_of_one_sample(planted: bool = True) -> Built:
    # The last batch of the epoch has one row; the unbiased std of one value is 0 / 0.
    x, y = data.wine(1 if planted else 16)
    model = Mlp(13, 32, 32, 3)
    model.encoder[1] = BatchStd()
    return model, (x, y), cross_entropy, adam(model)


class UnitRows(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.norm(dim=-1, keepdim=True) + self.eps)


@fault("operation", place={"module": "encoder.0", "op": (*DIV, "norm", "linalg_vector_norm")}, fixable=False)
def norm_of_a_zero_row(planted: bool = True) -> Built:
    # Rows divided by their norms; some rows are blank (the scanner's empty pages).
    x, y = data.digits(raw=True)
    x = x / 16
    x[[9, 77]] = 0.0
    model = Mlp(64, 32, 32, 10)
    model.encoder = nn.Sequential(UnitRows(0.0 if planted else 1e-6), *model.encoder)
    return model, (x, y), cross_entropy, adam(model)


class LogFeatures(nn.Module):
    """log(x) where that exists, else 0."""

    def __init__(self, safe: bool) -> None:
        super().__init__()
        self.safe = safe
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.shift
        inside = torch.where(x > 0, x, 1.0) if self.safe else x
        return torch.where(x > 0, torch.log(inside), 0.0)


@fault("operation", place={"module": "encoder.0", "op": ("log", "where")}, fixable=False)
def where_does_not_stop_gradients(planted: bool = True) -> Built:
    # torch.where picks the finite branch; the gradient of the other is 0 * inf.
    x, y = data.digits(raw=True)
    model = Mlp(64, 32, 10)
    model.encoder = nn.Sequential(LogFeatures(not planted), *model.encoder)
    return model, (x / 16, y), cross_entropy, adam(model)


# Precision.


class Powers(nn.Module):
    """x, x**2, ..., x**5."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.pow(n) for n in range(1, 6)], -1)


class Polynomial(nn.Module):
    """Powers of the features, their batch norm, a linear layer."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.powers = Powers()
        self.norm = nn.BatchNorm1d(5 * features)
        self.head = nn.Linear(5 * features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.powers(x)))


def in_its_dtype(criterion: nn.Module) -> Any:
    """A loss function that gives the inputs the dtype of the weights; the criterion sees float32."""

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        x, y = batch
        return criterion(model(x.to(next(model.parameters()).dtype)).float(), y)

    return loss_fn


@fault("precision", place={"module": "powers", "op": POW})
def half_powers(planted: bool = True) -> Built:
    # model.half(): the fifth power of a value 10 standard deviations out passes 65504, and the batch norm sees inf.
    x, y = data.cancer(256)
    model = Polynomial(30, 2)
    if planted:
        model.half()
    return model, (x, y), in_its_dtype(nn.CrossEntropyLoss()), sgd(model, 0.01)


@fault("precision", steps=2)
def autocast_gradients_underflow(planted: bool = True) -> Built:
    # An auxiliary loss of weight 1e-5 under float16 autocast without a GradScaler: its gradients round to 0.
    x, _ = data.images()
    x = x.flatten(1)
    model = Mlp(64, 64, 32, 64, 64)
    he(model)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        with torch.autocast("cpu", dtype=torch.float16, enabled=planted):
            out = model(inputs)
        return 1e-5 * F.mse_loss(out.float(), target)

    return model, (x, x.clone()), loss_fn, adam(model)


@fault("precision", fixable=False)
def loss_scale_too_large(planted: bool = True) -> Built:
    # GradScaler(init_scale=2**24) on a float16 model: the scaled gradients pass 65504.
    x, y = data.digits()
    model = Mlp(64, 64, 64, 10).half()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24 if planted else 2.0**6)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        out = model(inputs.to(next(model.parameters()).dtype))
        return scaler.scale(F.cross_entropy(out.float(), target))

    return model, (x, y), loss_fn, sgd(model, 1e-3)


class CosineRows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


@fault("precision", "operation", place={"module": "encoder.0", "op": (*DIV, "norm", "add")})
def half_epsilon(planted: bool = True) -> Built:
    # 1e-8 is 0 in float16: it no longer guards the division for blank rows.
    x, y = data.digits(raw=True)
    x = x / 16
    x[[3, 50]] = 0.0
    model = Mlp(64, 32, 32, 10)
    model.encoder = nn.Sequential(CosineRows(), *model.encoder)
    if planted:
        model.half()
    return model, (x, y), in_its_dtype(nn.CrossEntropyLoss()), sgd(model, 0.05)


# Learning rate.


@fault("learning rate", steps=5)
def adam_lr_10(planted: bool = True) -> Built:
    # lr=10 for Adam, taken from a script that used another optimizer.
    x, y = data.digits()
    model = Mlp(64, 64, 64, 10)
    return model, (x, y), cross_entropy, adam(model, 10.0 if planted else 1e-3)


@fault("learning rate", steps=8)
def sgd_lr_too_large(planted: bool = True) -> Built:
    # Linear regression, lr above 2 / (largest curvature).
    x, y = data.diabetes()
    model = Mlp(10, 32, 1, act=nn.Identity)
    return model, (x, y), mse, sgd(model, 3.0 if planted else 0.05, momentum=0.9 if planted else 0.0)


# Loss.


@fault("loss", place={"op": "log"})
def log_of_softmax(planted: bool = True) -> Built:
    # Cross-entropy by hand as log(softmax); a sharp temperature makes some probabilities exactly 0.
    x, y = data.digits()
    model = Mlp(64, 64, 10)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        logits = model(inputs) / 0.002
        logs = torch.log(torch.softmax(logits, -1)) if planted else torch.log_softmax(logits, -1)
        return -logs[torch.arange(len(target)), target].mean()

    return model, (x, y), loss_fn, sgd(model, 1e-6)


@fault("loss", place={"op": ("binary_cross_entropy", "bce_loss", "bceloss")})
def bce_on_raw_outputs(planted: bool = True) -> Built:
    # BCELoss needs probabilities; the network gives any number.
    x, y = data.cancer()
    model = Mlp(30, 32, 1)
    criterion = nn.BCELoss() if planted else nn.BCEWithLogitsLoss()
    return model, (x, y.float().unsqueeze(1)), supervised(criterion), adam(model)


class Probabilities(Mlp):
    """An Mlp that ends in a softmax."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.probs = nn.Softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.probs(super().forward(x))


@fault("loss", place={"op": ("softmax", "log_softmax", *CROSS_ENTROPY)}, steps=3)
def cross_entropy_on_softmax(planted: bool = True) -> Built:
    # CrossEntropyLoss takes logits and applies the softmax itself.
    x, y = data.digits()
    model = Probabilities(64, 64, 10)
    if not planted:
        model.probs = nn.Identity()
    return model, (x, y), cross_entropy, sgd(model)


@fault("loss", place={"op": "log"})
def manual_bce_saturates(planted: bool = True) -> Built:
    # y log(p) + (1 - y) log(1 - p): fine at first, but after some epochs a sigmoid is exactly 1 in float32.
    x, y = data.cancer()
    y = y.float().unsqueeze(1)
    model = Mlp(30, 64, 1)
    stable = supervised(nn.BCEWithLogitsLoss())
    train(model, (x, y), stable, adam(model, 0.05), 200)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        p = torch.sigmoid(model(inputs))
        return -(target * torch.log(p) + (1 - target) * torch.log(1 - p)).mean()

    return model, (x, y), loss_fn if planted else stable, adam(model)


@fault("operation", "loss", place={"op": MEAN}, fixable=False)
def mean_over_nothing(planted: bool = True) -> Built:
    # Hard-example mining: the mean over the rows whose loss is above a threshold, and none is.
    x, y = data.digits()
    model = Mlp(64, 64, 10)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        losses = F.cross_entropy(model(inputs), target, reduction="none")
        hard = losses > (5.0 if planted else 0.0)
        return losses[hard].mean()

    return model, (x, y), loss_fn, adam(model)


@fault("loss", "target", place={"op": "log"}, fixable=False)
def kl_with_zeros(planted: bool = True) -> Built:
    # KL divergence by hand from one-hot teachers: 0 * log(0).
    x, y = data.digits()
    p = F.one_hot(y, 10).float()
    model = Mlp(64, 64, 10)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, teacher = batch
        logs = torch.log_softmax(model(inputs), -1)
        if planted:
            return (teacher * (torch.log(teacher) - logs)).sum(-1).mean()
        return F.kl_div(logs, teacher, reduction="batchmean")

    return model, (x, p), loss_fn, adam(model)


@fault("loss", "weights", place={"op": ("exp", "poisson_nll_loss")})
def poisson_bias(planted: bool = True) -> Built:
    # The head gives log-rates, but its bias was started at the mean count itself: exp(150).
    x, y = data.diabetes(raw_y=True)
    model = Mlp(10, 32, 1)
    nn.init.constant_(model.head.bias, float(y.mean() if planted else y.mean().log()))
    return model, (x, y), supervised(nn.PoissonNLLLoss(log_input=True)), adam(model)


# Uninitialised.


@fault("weights", "uninitialised", place={"parameter": "encoder.2.weight"})
def nan_in_checkpoint(planted: bool = True) -> Built:
    # The checkpoint was written after the run had broken.
    x, y = data.digits()
    model = Mlp(64, 64, 64, 10)
    if planted:
        with torch.no_grad():
            model.encoder[2].weight[5, 7:9] = torch.nan
    return model, (x, y), cross_entropy, adam(model)


class OwnLinear(nn.Module):
    """A layer with weights from torch.empty."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@fault("uninitialised", "weights", place={"parameter": "head.weight"})
def empty_never_filled(planted: bool = True) -> Built:
    # torch.empty, and reset_parameters() forgotten: whatever was in memory, mostly 0 and some huge numbers.
    x, y = data.digits()
    model = Mlp(64, 64, 10)
    model.head = OwnLinear(64, 10)
    nn.init.xavier_normal_(model.head.weight)
    if planted:
        leftovers = torch.zeros(640)
        leftovers[::7] = 4.6e-41
        leftovers[::11] = -3.1e38
        leftovers[::13] = 1.9e34
        with torch.no_grad():
            model.head.weight.copy_(leftovers.reshape(10, 64))
    return model, (x, y), cross_entropy, adam(model)


@fault("uninitialised", place={"parameter": "encoder.0.weight"})
def nan_in_adam(planted: bool = True) -> Built:
    # The optimizer's state came from a checkpoint of the broken run; the weights did not.
    x, y = data.digits()
    model = Mlp(64, 64, 10)
    optimizer = adam(model)
    train(model, (x, y), cross_entropy, optimizer, 2)
    if planted:
        optimizer.state[model.encoder[0].weight]["exp_avg_sq"][0, 0] = torch.nan
    return model, (x, y), cross_entropy, optimizer


@fault("uninitialised", place={"parameter": ("encoder.2.weight", "encoder.2.bias")})
def left_on_meta(planted: bool = True) -> Built:
    # Built on the meta device to save memory; the checkpoint lacked this layer.
    x, y = data.digits()
    model = Mlp(64, 64, 64, 10)
    if planted:
        model.encoder[2].to("meta")
    return model, (x, y), cross_entropy, adam(model)


# Several at once: the first to mend comes on top.


@fault("input", place={"feature": [2]}, several=True, steps=3)
def gaps_and_adam_lr_10(planted: bool = True) -> Built:
    # NaN cells and lr=10: no step size helps while the data has NaN.
    x, y = data.wine()
    if planted:
        x[[11, 30], 2] = torch.nan
    model = Mlp(13, 32, 3)
    return model, (x, y), cross_entropy, adam(model, 10.0 if planted else 1e-3)


@fault("target", several=True, fixable=False)
def classes_from_one_and_raw_wine(planted: bool = True) -> Built:
    # Labels 1..3 for three outputs stop the run at once; the raw features come next.
    x, y = data.wine(raw=planted)
    model = Mlp(13, 32, 3, act=nn.Tanh)
    return model, (x, y + 1 if planted else y), cross_entropy, sgd(model)


@fault("uninitialised", place={"parameter": "head.bias"}, several=True)
def nan_bias_and_raw_cancer(planted: bool = True) -> Built:
    # A NaN bias poisons every output, whatever the scale of the data.
    x, y = data.cancer(raw=planted)
    model = Mlp(30, 32, 2)
    if planted:
        with torch.no_grad():
            model.head.bias[0] = torch.nan
    return model, (x, y), cross_entropy, sgd(model, 0.01)


@fault("input", place={"feature": [7, 20]}, several=True)
def gaps_and_standard_normal_weights(planted: bool = True) -> Built:
    # NaN cells under exploding weights: the weights alone would still give finite numbers.
    x, y = data.digits()
    model = Mlp(64, *[64] * 5, 10)
    he(model)
    if planted:
        x[1, 7] = x[2, 20] = torch.nan
        for layer in linears(model):
            nn.init.normal_(layer.weight)
    return model, (x, y), cross_entropy, sgd(model, 0.01)
