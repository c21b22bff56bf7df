"""The start that each activation function wants from the weight before it: one table, and what follows a weight."""

import math
from typing import Literal, NamedTuple

from torch import nn

from ..nn import LinearReLU
from .fans import compute_fans, has_weight_matrix
from .forwards import Reader
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

# The mean square of relu(x)^2 is 3 / 2 of the fourth power of its input's std: Primer, So et al., 2021.
_SQUARED_RELU = Start("he", (2.0 / 3.0) ** 0.25)

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


# What others call their own: transformers' activations.py, timm's layers. A name is taken for the first of these that
# it contains; of two at one place, the longer.
_OTHERS: dict[str, Start] = {
    **ACTIVATIONS,
    **dict.fromkeys(("swish", "leakyrelu", "xielu"), _RELU),
    **dict.fromkeys(("relusquared", "squaredrelu", "relu2", "relu^2"), _SQUARED_RELU),
    **dict.fromkeys(("laplace", "logsigmoid"), _SIGMOID),
}


def start_by_name(name: str) -> Start | None:
    """What the weight before an activation of this name wants; None where the name says none.

    Example:
        >>> from initlab.models.activations import start_by_name
        >>> [start_by_name(name) for name in ("NewGELUActivation", "PytorchGELUTanh", "LinearActivation")]
        [Start(recipe='he', gain=1.4142135623730951), Start(recipe='he', gain=1.4142135623730951), None]
    """
    plain = name.lower().replace("_", "").removesuffix("activation")
    places = [(plain.find(known), -len(known), known) for known in _OTHERS if known in plain]
    return _OTHERS[min(places)[2]] if places else None


def start_before(activation: nn.Module) -> Start | None:
    """What the weight before an activation module wants; None if it is none.

    Those that are not torch's are known by their class's name, where they hold no parameters and no other modules.

    Example:
        >>> from torch import nn
        >>> from initlab.models.activations import start_before
        >>> start_before(nn.SELU()), start_before(nn.Linear(2, 2))
        (Start(recipe='lecun', gain=1.0), None)
    """
    function = next((_FUNCTIONS[kind] for kind in type(activation).__mro__ if kind in _FUNCTIONS), None)
    if function is None:
        plain = not activation._parameters and not activation._modules
        is_torchs = type(activation).__module__.startswith("torch.")
        return start_by_name(type(activation).__name__) if plain and not is_torchs else None
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


class Activation(NamedTuple):
    """The activation that a weight's output meets.

    Args:
        name: of its class, or of the function.
        start: what it wants of the weight.
        certain: whether that is certain. It is where both lie in one nn.Sequential, next to each other but for
            normalisation, dropout, pooling and reshaping.
    """

    name: str
    start: Start
    certain: bool = False


def activations_after(model: nn.Module) -> dict[tuple[int, str], Activation]:
    """Which activation each weight's output meets first.

    In an nn.Sequential it is read off the order of modules. Elsewhere off the source of forward functions: modules and
    functions of torch, by whatever name a module holds them. Where those do not show the use of a weight, it is the
    next activation in the order in which the model registers its modules.

    Returns:
        By the id of a module and the attribute that holds the weight.
    """
    in_order = _activations_in_order(model)
    found = {weight: activation for weight, activation in in_order.items() if activation.certain}
    reader = Reader(_activation_of)
    reader.read(model)
    found = {**reader.found, **found}
    for weight, activation in in_order.items():
        if weight not in reader.called:
            found.setdefault(weight, activation)
    return found


def _activation_of(what: nn.Module | str) -> Activation | None:
    """An activation by its module, or by the name of a function."""
    if isinstance(what, str):
        start = ACTIVATIONS.get(what)
        return None if start is None else Activation(what, start)
    start = start_before(what)
    return None if start is None else Activation(type(what).__name__, start)


def _activations_in_order(model: nn.Module) -> dict[tuple[int, str], Activation]:
    """Which activation module comes after each module with a weight matrix, and before the next one."""
    parents = {id(child): module for _, module in walk(model) for child in module.children()}
    found: dict[tuple[int, str], Activation] = {}
    waiting: tuple[nn.Module, nn.Module | None] | None = None  # a module with a weight matrix, and its parent
    certain = True

    def meets(layer: nn.Module, activation: Activation) -> None:
        for name, tensor in layer._parameters.items():
            if tensor is not None and compute_fans(layer, name, tensor) is not None:
                found.setdefault((id(layer), name), activation)

    for _, module in walk(model):
        parent = parents.get(id(module))
        if (activation := _activation_of(module)) is not None:
            if waiting is not None:
                layer, container = waiting
                in_order = isinstance(container, nn.Sequential) and type(container).forward is nn.Sequential.forward
                known = any(kind in _FUNCTIONS for kind in type(module).__mro__)
                meets(layer, activation._replace(certain=known and certain and in_order and container is parent))
                waiting = None
        elif isinstance(module, LinearReLU):
            name, start = ("ReLU", _RELU) if module.activation == "relu" else ("ReLUSquared", _SQUARED_RELU)
            meets(module, Activation(name, start, certain=True))
            waiting = None
        elif has_weight_matrix(module):
            waiting, certain = (module, parent), True
        else:
            file = type(module).__module__.removeprefix("torch.nn.modules.")
            certain &= file in _SKIPPED or type(module) is nn.Identity
    return found
