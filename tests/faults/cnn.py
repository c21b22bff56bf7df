"""Faults in convolutional networks on images of digits."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .case import DIV, POW, STD, Built, Fault, planter, supervised, train

FAULTS: list[Fault] = []
fault = planter(FAULTS, "cnn")


class Cnn(nn.Module):
    """Convolutions in `features` (each followed by `norm`, if any, and a ReLU), mean over the image, `head`."""

    def __init__(self, *channels: int, classes: int = 10, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(channels):
            layers.append(nn.Conv2d(fan_in, fan_out, 3, padding=1))
            if norm is not None:
                layers.append(norm(fan_out))
            layers.append(nn.ReLU())
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def he(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def anywhere(depth: int) -> tuple[str, ...]:
    """Paths of all modules of a `Cnn` of `depth` convolutions without norms: the fault sits in the whole network."""
    return ("", "features", "head", *(f"features.{i}" for i in range(2 * depth)))


cross_entropy = supervised(nn.CrossEntropyLoss())


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


# Input.


@fault("input", steps=3)
def pixels_to_255(planted: bool = True) -> Built:
    # Images read as bytes and never divided by 255, no norm layers, plain SGD.
    x, y = data.images(top=255.0 if planted else 1.0)
    model = Cnn(1, 16, 16)
    he(model)
    return model, (x, y), cross_entropy, sgd(model, 0.1)


@fault("input")
def nan_pixels(planted: bool = True) -> Built:
    # Images normalised one by one with their own std; two blank ones became NaN before they got here.
    x, y = data.images()
    if planted:
        x[[13, 90]] = torch.nan
    model = Cnn(1, 16, 16, norm=nn.BatchNorm2d)
    return model, (x, y), cross_entropy, adam(model)


# Target.


@fault("target", fixable=False)
def unlabelled_is_minus_one(planted: bool = True) -> Built:
    # Unlabelled images carry -1, as in scikit-learn's semi-supervised modules.
    x, y = data.images()
    if planted:
        y[[2, 80, 81]] = -1
    model = Cnn(1, 16, 16)
    return model, (x, y), cross_entropy, adam(model)


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@fault("target", fixable=False)
def void_pixels(planted: bool = True) -> Built:
    # Segmentation masks mark the unsure border with 255; CrossEntropyLoss was not given ignore_index=255.
    x, _ = data.images()
    mask = (x[:, 0] > 0.5).long()
    if planted:
        mask[(x[:, 0] > 0.45) & (x[:, 0] < 0.55)] = 255
    model = Segmenter()
    return model, (x, mask), cross_entropy, adam(model)


# Starting weights.


@fault("weights", place={"module": anywhere(8)})
def standard_normal_convolutions(planted: bool = True) -> Built:
    # N(0, 1) in eight convolutions of 16 channels: each multiplies the signal by about 8.
    x, y = data.images(64)
    model = Cnn(1, *[16] * 8)
    he(model)
    if planted:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model, (x, y), cross_entropy, sgd(model, 0.03)


@fault("weights", place={"module": anywhere(3)})
def zero_convolutions(planted: bool = True) -> Built:
    # A loop over model.modules() sets every weight to 0 instead of every bias.
    x, y = data.images(64)
    model = Cnn(1, 16, 16, 16)
    he(model)
    if planted:
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(layer.weight)
    return model, (x, y), cross_entropy, sgd(model, 0.1)


@fault("weights", place={"module": ("features.4", "features.5")})
def dead_channels(planted: bool = True) -> Built:
    # The third convolution's bias is -100: its ReLU gives 0 for every image.
    x, y = data.images(64)
    model = Cnn(1, 16, 16, 16)
    he(model)
    if planted:
        nn.init.constant_(model.features[4].bias, -100.0)
    return model, (x, y), cross_entropy, sgd(model, 0.1)


@fault("weights", place={"module": anywhere(10)})
def dcgan_weights_without_norm(planted: bool = True) -> Built:
    # N(0, 0.02) comes from networks with batch norm; here are ten plain convolutions.
    x, y = data.images(64)
    model = Cnn(1, *[8] * 10)
    he(model)
    if planted:
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=0.02)
    return model, (x, y), cross_entropy, sgd(model, 0.1)


# Operations.


@fault("operation", place={"module": "features.7"}, fixable=False)
def batch_norm_of_one_value(planted: bool = True) -> Built:
    # A last batch of one image, pooled to 1x1 before the batch norm: one value per channel.
    x, y = data.images(1 if planted else 8)
    model = Cnn(1, 16, 16)
    model.features = nn.Sequential(
        *Cnn(1, 16, 16, norm=nn.BatchNorm2d).features,
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(16),
    )
    return model, (x, y), cross_entropy, adam(model)


class LogImage(nn.Module):
    """Pixels on a log scale."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x + self.floor)


@fault("operation", place={"module": "features.0", "op": "log"}, fixable=False)
def log_of_black_pixels(planted: bool = True) -> Built:
    # A log-intensity layer, as for spectrograms; most pixels are exactly 0.
    x, y = data.images(64)
    model = Cnn(1, 16, 16)
    model.features = nn.Sequential(LogImage(0.0 if planted else 0.1), *model.features)
    return model, (x, y), cross_entropy, adam(model)


class PerImage(nn.Module):
    """Standardises each channel of each image."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean((2, 3), keepdim=True)
        return centred / (centred.square().mean((2, 3), keepdim=True) + self.eps).sqrt()


@fault("operation", place={"module": "norm", "op": DIV}, fixable=False)
def instance_norm_without_eps(planted: bool = True) -> Built:
    # Instance norm by hand without eps; a blank image has variance 0, and 0 / 0 is NaN.
    x, y = data.images(64)
    x[20] = 0.0

    class Normed(Cnn):
        def __init__(self) -> None:
            super().__init__(1, 16, 16)
            self.norm = PerImage(0.0 if planted else 1e-5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.norm(x))

    model = Normed()
    return model, (x, y), cross_entropy, adam(model)


class Contrast(nn.Module):
    """The std of each image's pixels, beside the network's own features."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scale * x
        return torch.sqrt((x - x.mean((2, 3), keepdim=True)).square().mean((2, 3)) + self.eps)


@fault("operation", place={"module": "contrast", "op": ("sqrt", *POW, *STD)}, fixable=False)
def std_of_a_blank_image(planted: bool = True) -> Built:
    # The square root of a variance of 0 is fine forward; its gradient is inf * 0.
    x, y = data.images(64)
    x[31] = 0.0

    class WithContrast(Cnn):
        def __init__(self) -> None:
            super().__init__(1, 16, 16)
            self.contrast = Contrast(0.0 if planted else 1e-6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + self.contrast(x))

    model = WithContrast()
    return model, (x, y), cross_entropy, adam(model)


# Precision.


class Energy(nn.Module):
    """Divides each image by its root mean square."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = (x * x).sum((1, 2, 3), keepdim=True)
        return x / torch.sqrt(total / x[0].numel() + 1.0)


@fault("precision", "input", place={"module": "norm", "op": ("sum", "sum_to_size", "norm")})
def half_sum_of_squares(planted: bool = True) -> Built:
    # model.half() on byte images: each square fits below 65504, their sum does not, and x / inf blanks the image.
    x, y = data.images(64, top=255.0)

    class Normed(Cnn):
        def __init__(self) -> None:
            super().__init__(1, 16, 16)
            self.norm = Energy()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.norm(x))

    model = Normed()
    he(model)
    if planted:
        model.half()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        return F.cross_entropy(model(inputs.to(next(model.parameters()).dtype)).float(), target)

    return model, (x, y), loss_fn, sgd(model, 0.05)


# Learning rate.


@fault("learning rate", steps=5)
def sgd_lr_10(planted: bool = True) -> Built:
    # lr=10 from a script whose loss was divided by the batch size twice.
    x, y = data.images(64)
    model = Cnn(1, 16, 16)
    he(model)
    return model, (x, y), cross_entropy, sgd(model, 10.0 if planted else 0.1)


# Loss.


@fault("operation", "loss", place={"op": DIV}, fixable=False)
def weights_by_inverse_frequency(planted: bool = True) -> Built:
    # Classes weighted by 1 / (their count in the batch); a batch without an 8 has 0 * inf.
    x, y = data.images(64)
    x, y = x[y != 8], y[y != 8]
    model = Cnn(1, 16, 16)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        one_hot = F.one_hot(target, 10).float()
        counts = one_hot.sum(0) if planted else one_hot.sum(0) + 1
        weights = 1 / counts
        return -(weights * one_hot * torch.log_softmax(model(inputs), -1)).sum(-1).mean()

    return model, (x, y), loss_fn, adam(model)


@fault("operation", "loss", place={"op": POW}, fixable=False)
def focal_loss_of_a_sure_model(planted: bool = True) -> Built:
    # (1 - p)**0.5 has an infinite slope at p = 1, which a trained model reaches in float32.
    x, y = data.images(32, top=16.0)
    model = Cnn(1, 16, 32)
    train(model, (x, y), cross_entropy, adam(model, 0.03), 400)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        logs = F.cross_entropy(model(inputs), target, reduction="none")
        away = 1 - torch.exp(-logs)
        return ((away if planted else away + 1e-6) ** 0.5 * logs).mean()

    return model, (x, y), loss_fn, adam(model, 1e-5)


@fault("operation", "loss", place={"op": DIV}, fixable=False)
def recall_of_empty_masks(planted: bool = True) -> Built:
    # A soft recall per image, divided by the area of its mask; some masks are empty.
    x, _ = data.images(64)
    mask = (x[:, 0] > 0.5).float()
    mask[[4, 5]] = 0.0
    model = Segmenter()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, target = batch
        p = model(inputs).softmax(1)[:, 1]
        area = target.sum((1, 2)) if planted else target.sum((1, 2)) + 1
        return 1 - ((p * target).sum((1, 2)) / area).mean()

    return model, (x, mask), loss_fn, adam(model)


# Uninitialised.


@fault("uninitialised", place={"parameter": "features.1.running_var"})
def nan_running_var(planted: bool = True) -> Built:
    # Fine-tuning with frozen batch norm (eval mode) from a checkpoint that had seen one NaN batch.
    x, y = data.images(64)
    model = Cnn(1, 16, 16, norm=nn.BatchNorm2d)
    model(x)
    if planted:
        model.features[1].running_var[3] = torch.nan
    model.eval()
    return model, (x, y), cross_entropy, adam(model)


@fault("uninitialised", place={"parameter": "features.1.running_mean"})
def huge_running_mean(planted: bool = True) -> Built:
    # Buffers made by torch.empty in a port of the weights from another framework, which had no such entry.
    x, y = data.images(64)
    model = Cnn(1, 16, 16, norm=nn.BatchNorm2d)
    model(x)
    if planted:
        model.features[1].running_mean[::5] = 2.7e38
        model.features[1].running_mean[1] = -torch.inf
    model.eval()
    return model, (x, y), cross_entropy, adam(model)


# Several at once.


@fault("uninitialised", place={"parameter": "features.1.running_var"}, several=True, steps=2)
def nan_running_var_and_lr_10(planted: bool = True) -> Built:
    # Frozen batch norm with a NaN, and lr=10 besides.
    x, y = data.images(64)
    model = Cnn(1, 16, 16, norm=nn.BatchNorm2d)
    model(x)
    if planted:
        model.features[1].running_var[0] = torch.nan
    model.eval()
    return model, (x, y), cross_entropy, adam(model, 10.0 if planted else 1e-3)


@fault("operation", place={"module": "features.0", "op": "log"}, several=True, fixable=False, steps=2)
def log_of_black_pixels_and_zero_head(planted: bool = True) -> Built:
    # -inf from the log layer; the head of zeros would only have slowed the start.
    x, y = data.images(64)
    model = Cnn(1, 16, 16)
    model.features = nn.Sequential(LogImage(0.0 if planted else 0.1), *model.features)
    if planted:
        nn.init.zeros_(model.head.weight)
    return model, (x, y), cross_entropy, adam(model)
