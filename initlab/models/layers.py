"""What torch's layers do to their parameters: the distribution of each, by the reset function of its class.

One function here for each reset_parameters of torch.nn, and for LinearReLU's, with its arithmetic.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.init import calculate_gain

from initlab.kernels import Constant, Distribution, Normal, Uniform

from ..nn import LinearReLU
from .specs import ONES, ZEROS, DimSlice, FillSpec, InitTrace, whole_fill


@functools.lru_cache(maxsize=1024)
def _torch_default(fan_in: int, why: str) -> tuple[FillSpec, FillSpec]:
    """Of a weight and of its bias: kaiming_uniform_(weight, a=sqrt(5)), and uniform within 1 / sqrt(fan_in)."""
    of_weight: Distribution = ZEROS
    of_bias: Distribution = ZEROS
    if fan_in != 0:
        bound = math.sqrt(3.0) * (calculate_gain("leaky_relu", math.sqrt(5.0)) / math.sqrt(fan_in))
        of_weight, of_bias = _symmetric(bound), _symmetric(1 / math.sqrt(fan_in))
    return whole_fill(of_weight, why, fan_in), whole_fill(of_bias, why, fan_in)


def _symmetric(bound: float) -> Distribution:
    return Uniform(-bound, bound) if bound > 0 else ZEROS


def registered(module: nn.Module, *names: str) -> Iterator[Tensor]:
    """The parameters that a module has registered under these names.

    Not read as attributes: those of a parametrised module are computed, and a spectral norm takes a step each time.
    """
    for name in names:
        if (tensor := module._parameters.get(name)) is not None:
            yield tensor


def _linear(module: nn.Linear, trace: InitTrace, why: str) -> None:
    _weight_and_bias(module, module.in_features, trace, why)


def _linear_relu(module: LinearReLU, trace: InitTrace, why: str) -> None:
    fan = module.in_features
    for tensor in registered(module, "weight"):
        trace.write(tensor, Normal(0.0, module.gain() / math.sqrt(fan)) if fan else ZEROS, why, fan=fan)
    for tensor in registered(module, "bias"):
        trace.write(tensor, ZEROS, why)


def _convolution(module: Any, trace: InitTrace, why: str) -> None:
    channels = module.out_channels if module.transposed else module.in_channels
    _weight_and_bias(module, channels // module.groups * math.prod(module.kernel_size), trace, why)


def _weight_and_bias(module: nn.Module, fan_in: int, trace: InitTrace, why: str) -> None:
    for name, spec in zip(("weight", "bias"), _torch_default(fan_in, why), strict=True):
        for tensor in registered(module, name):
            trace.write_whole(tensor, spec)


def _bilinear(module: nn.Bilinear, trace: InitTrace, why: str) -> None:
    fan = module.in1_features
    for tensor in registered(module, "weight", "bias"):
        trace.write(tensor, _symmetric(1 / math.sqrt(fan)), why, fan=fan)


def _running_stats(module: Any, trace: InitTrace, why: str) -> None:
    for name, distribution in (("running_mean", ZEROS), ("running_var", ONES), ("num_batches_tracked", Constant(0))):
        if (buffer := module._buffers.get(name)) is not None:
            trace.write(buffer, distribution, why)


def _ones_and_zeros(module: Any, trace: InitTrace, why: str) -> None:
    _running_stats(module, trace, why)
    for name, distribution in (("weight", ONES), ("bias", ZEROS)):
        for tensor in registered(module, name):
            trace.write(tensor, distribution, why)


def _embedding(module: Any, trace: InitTrace, why: str) -> None:
    for weight in registered(module, "weight"):
        trace.write(weight, Normal(0.0, 1.0), why)
        if module.padding_idx is not None:
            trace.write(weight, ZEROS, why, padding_row(module))


def padding_row(module: Any) -> DimSlice:
    """The row of an embedding that stays zero."""
    return DimSlice(0, module.padding_idx % max(1, module.num_embeddings), 1)


def _recurrent(module: Any, trace: InitTrace, why: str) -> None:
    bound = 1 / math.sqrt(module.hidden_size) if module.hidden_size > 0 else 0.0
    for tensor in module.parameters():
        trace.write(tensor, _symmetric(bound), why, fan=module.hidden_size)


def _attention(module: nn.MultiheadAttention, trace: InitTrace, why: str) -> None:
    for weight in registered(module, "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        trace.write(weight, *_glorot(weight, why))
    for bias in registered(module, "in_proj_bias"):
        trace.write(bias, ZEROS, why)
        for other in registered(module.out_proj, "bias"):
            trace.write(other, ZEROS, why)
    for tensor in registered(module, "bias_k", "bias_v"):
        fan = sum(tensor.shape[:2]) * math.prod(tensor.shape[2:])
        trace.write(tensor, Normal(0.0, math.sqrt(2.0 / fan)) if fan else ZEROS, f"{why}, xavier_normal_")


def _glorot(weight: Tensor, why: str) -> tuple[Distribution, str]:
    """xavier_uniform_(weight), fans as torch counts them."""
    fan = sum(weight.shape[:2]) * math.prod(weight.shape[2:])
    return _symmetric(math.sqrt(3.0) * math.sqrt(2.0 / fan) if fan else 0.0), f"{why}, xavier_uniform_"


def _transformer(module: nn.Transformer, trace: InitTrace, why: str) -> None:
    for tensor in module.parameters():
        if tensor.dim() > 1:
            trace.write(tensor, *_glorot(tensor, why))


def _prelu(module: nn.PReLU, trace: InitTrace, why: str) -> None:
    for weight in registered(module, "weight"):
        trace.write(weight, Constant(module.init), why)


def _nothing(module: nn.Module, trace: InitTrace, why: str) -> None:
    """For a function that resets the module's children only: they have been read already."""


_READERS: dict[Any, Callable[[Any, InitTrace, str], None]] = {
    nn.Linear.reset_parameters: _linear,
    LinearReLU.reset_parameters: _linear_relu,
    nn.Conv2d.reset_parameters: _convolution,
    nn.Bilinear.reset_parameters: _bilinear,
    nn.BatchNorm2d.reset_parameters: _ones_and_zeros,
    nn.LayerNorm.reset_parameters: _ones_and_zeros,
    nn.GroupNorm.reset_parameters: _ones_and_zeros,
    nn.RMSNorm.reset_parameters: _ones_and_zeros,
    nn.Embedding.reset_parameters: _embedding,
    nn.EmbeddingBag.reset_parameters: _embedding,
    nn.RNNBase.reset_parameters: _recurrent,
    nn.RNNCellBase.reset_parameters: _recurrent,
    nn.MultiheadAttention._reset_parameters: _attention,
    nn.Transformer._reset_parameters: _transformer,
    nn.PReLU.reset_parameters: _prelu,
    nn.AdaptiveLogSoftmaxWithLoss.reset_parameters: _nothing,
}


def reset_function(module: nn.Module) -> Callable[..., Any] | None:
    """The function of a module's class that resets its parameters, if it has one; `module` is its only argument."""
    kind = type(module)
    return getattr(kind, "reset_parameters", None) or getattr(kind, "_reset_parameters", None)


def reader(function: Callable[..., Any] | None) -> Callable[[Any, InitTrace, str], None] | None:
    """What records the distributions of a known reset function in a trace; None for any other function."""
    try:
        return _READERS.get(function)
    except TypeError:  # a reset function that has no hash
        return None
