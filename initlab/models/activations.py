"""The start that each activation function wants from the weight before it: one table, and what follows a weight."""

import math
from typing import Literal, NamedTuple

from torch import nn

from ..nn import LinearReLU
from .fans import has_weight_matrix
from .naming import walk


class Start(NamedTuple):
    """How a weight starts so that an activation function after it keeps the size of the signal.

    Args:
        recipe: "he", std = gain / sqrt(fan_in), normal; "lecun", the same with gain 1; "xavier",
            std = gain * sqrt(2 / (fan_in + fan_out)), uniform.
        gain: factor on the standard deviation, for a function without a negative slope.
    """

    recipe: Literal["he", "xavier", "lecun"]
    gain: float


# ReLU zeroes half of the inputs, and with them half of the mean square: He et al., "Delving deep into rectifiers",
# 2015. The smooth ones are taken for ReLU, which they equal away from 0. With a slope s below 0 it is
# sqrt(2 / (1 + s^2)): start_before.
_RELU = Start("he", math.sqrt(2.0))
# Of the sigmoid kind, nearly linear around 0 with slope 1: Glorot and Bengio, 2010. torch.nn.init.calculate_gain has
# 5 / 3 for tanh, which lets its outputs keep their size over many layers; those built like it are taken for tanh.
_TANH = Start("xavier", 5.0 / 3.0)
# calculate_gain has 1 for sigmoid, which makes up for none of its slope of 1 / 4; likewise those that end in a sigmoid.
_SIGMOID = Start("xavier", 1.0)
# SELU keeps mean 0 and variance 1 by itself, given weights of variance 1 / fan_in: Klambauer et al., "Self-normalizing
# neural networks", 2017. (calculate_gain has 3 / 4, chosen by experiment, without self-normalisation.)
_SELU = Start("lecun", 1.0)

ACTIVATIONS: dict[str, Start] = {
    **dict.fromkeys(("relu", "relu6", "elu", "celu", "gelu", "silu", "mish", "hardswish", "softplus"), _RELU),
    **dict.fromkeys(("leaky_relu", "prelu", "rrelu"), _RELU),
    **dict.fromkeys(("tanh", "hardtanh", "tanhshrink", "softsign"), _TANH),
    **dict.fromkeys(("sigmoid", "hardsigmoid", "logsigmoid", "softmax", "log_softmax"), _SIGMOID),
    "selu": _SELU,
}
"""By the name of the function in torch.nn.functional."""

_FUNCTIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Softplus: "softplus",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.RReLU: "rrelu",
    nn.Tanh: "tanh",
    nn.Hardtanh: "hardtanh",
    nn.Tanhshrink: "tanhshrink",
    nn.Softsign: "softsign",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.LogSigmoid: "logsigmoid",
    nn.Softmax: "softmax",
    nn.LogSoftmax: "log_softmax",
    nn.SELU: "selu",
}


def start_before(activation: nn.Module) -> Start | None:
    """What the weight before an activation module wants; None if it is no activation module of torch.

    Example:
        >>> from torch import nn
        >>> from initlab.models.activations import start_before
        >>> start_before(nn.SELU()), start_before(nn.Linear(2, 2))
        (Start(recipe='lecun', gain=1.0), None)
    """
    function = next((_FUNCTIONS[kind] for kind in type(activation).__mro__ if kind in _FUNCTIONS), None)
    if function is None:
        return None
    start, slope = ACTIVATIONS[function], _negative_slope(activation)
    return start._replace(gain=math.sqrt(2.0 / (1 + slope**2))) if slope else start


def _negative_slope(activation: nn.Module) -> float:
    if isinstance(activation, nn.LeakyReLU):
        return activation.negative_slope
    if isinstance(activation, nn.PReLU):
        return activation.init
    if isinstance(activation, nn.RReLU):
        return (activation.lower + activation.upper) / 2
    return 0.0


# Files of torch.nn.modules whose layers scale, drop, pool or reshape, and leave the next activation the next.
_SKIPPED = (
    *("batchnorm", "channelshuffle", "dropout", "flatten", "fold", "instancenorm", "normalization", "padding"),
    *("pixelshuffle", "pooling", "upsampling"),
)


def activations_after(model: nn.Module) -> dict[int, tuple[nn.Module, bool]]:
    """Which activation module comes after each module with a weight matrix, and before the next one.

    Args:
        model: read in the order in which it registers its modules.

    Returns:
        By the id of a module: the activation, and whether that is certain. It is where both lie in one nn.Sequential,
        next to each other but for normalisation, dropout, pooling and reshaping.
    """
    parents = {id(child): module for _, module in walk(model) for child in module.children()}
    found: dict[int, tuple[nn.Module, bool]] = {}
    waiting: tuple[nn.Module, nn.Module | None] | None = None  # a module with a weight matrix, and its parent
    certain = True
    for _, module in walk(model):
        parent = parents.get(id(module))
        if start_before(module) is not None:
            if waiting is not None:
                layer, container = waiting
                in_order = isinstance(container, nn.Sequential) and type(container).forward is nn.Sequential.forward
                found.setdefault(id(layer), (module, certain and in_order and container is parent))
                waiting = None
        elif isinstance(module, LinearReLU):
            found[id(module)], waiting = (nn.ReLU(), True), None
        elif has_weight_matrix(module):
            waiting, certain = (module, parent), True
        else:
            file = type(module).__module__.removeprefix("torch.nn.modules.")
            certain &= file in _SKIPPED or type(module) is nn.Identity
    return found
