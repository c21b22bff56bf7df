"""What is known of layers: the distribution that each layer gives its parameters, and the fans of its weights."""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.init import calculate_gain
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from initlab.kernels import Constant, Distribution, Normal, Uniform

from ..nn import LinearReLU

ZEROS, ONES = Constant(0.0), Constant(1.0)


class DimSlice(NamedTuple):
    """Part of a tensor: the elements from `start` to `start + length` of dimension `dim`."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class FillSpec:
    """What a parameter is filled with, and why.

    Args:
        fills: distributions in the order of writing, each of the whole tensor (None) or of a block of it.
        fan: the number of connections that the distribution was derived from; None if it was derived from none.
        why: what the spec was read from.
        guess: whether it was guessed from names or from the order of modules.
    """

    fills: tuple[tuple[DimSlice | None, Distribution], ...]
    fan: float | None = None
    why: str = ""
    guess: bool = False

    @property
    def distribution(self) -> Distribution:
        """The distribution of the whole tensor, or of its first block."""
        return self.fills[0][1]


def spec(distribution: Distribution, why: str, fan: float | None = None, guess: bool = False) -> FillSpec:
    """The spec that fills a whole tensor from one distribution."""
    return FillSpec(((None, distribution),), fan, why, guess)


class InitTrace:
    """The specs found so far, by tensor: a later write replaces an earlier one, as in the code it was read from."""

    def __init__(self) -> None:
        self.recorded: dict[int, FillSpec] = {}
        self.unreadable: dict[int, str] = {}  # id of a tensor: why no distribution is known for what is written to it
        self.ignored: frozenset[int] = frozenset()  # ids of tensors whose writes are not entered for now

    def copy(self) -> "InitTrace":
        """A trace that begins with what this one holds."""
        trace = InitTrace()
        trace.recorded, trace.unreadable = dict(self.recorded), dict(self.unreadable)
        return trace

    def write(
        self,
        tensor: Tensor,
        distribution: Distribution,
        why: str,
        block: DimSlice | None = None,
        fan: float | None = None,
    ) -> None:
        """`tensor`, or a block of it, is filled with `distribution`."""
        if id(tensor) in self.ignored:
            return
        if block is None:
            self.unreadable.pop(id(tensor), None)
            self.recorded[id(tensor)] = spec(distribution, why, fan)
        elif (before := self.recorded.get(id(tensor))) is not None:
            self.recorded[id(tensor)] = replace(before, fills=(*before.fills, (block, distribution)), why=why)
        elif id(tensor) not in self.unreadable:
            self.recorded[id(tensor)] = FillSpec(((block, distribution),), fan, why)

    def give_up(self, tensor: Tensor, why: str) -> None:
        """`tensor` is written in a way that no distribution describes."""
        if id(tensor) in self.ignored:
            return
        self.recorded.pop(id(tensor), None)
        self.unreadable[id(tensor)] = why

    def complete(self, tensor: Tensor) -> FillSpec | None:
        """The spec of a tensor, if it fills all of it."""
        found = self.recorded.get(id(tensor))
        if found is None or found.fills[0][0] is None:
            return found
        covered: dict[int, list[tuple[int, int]]] = {}
        for block, _ in found.fills:
            if block is not None:
                covered.setdefault(block.dim, []).append((block.start, block.start + block.length))
        for dim, spans in covered.items():
            at = 0
            for start, end in sorted(spans):
                at = max(at, end) if start <= at else at
            if at == tensor.shape[dim]:
                return found
        return None


# ---------------------------------------------------------------------------------------------------------------
# The distributions of torch.nn, and of LinearReLU: one function for each reset_parameters, with its arithmetic


@functools.lru_cache(maxsize=1024)
def _kaiming_of_torch(fan_in: int) -> tuple[Distribution, Distribution]:
    """The distributions of a weight and of its bias: kaiming_uniform_(weight, a=sqrt(5)), and uniform within 1/sqrt(fan_in)."""
    if fan_in == 0:
        return ZEROS, ZEROS
    bound = math.sqrt(3.0) * (calculate_gain("leaky_relu", math.sqrt(5.0)) / math.sqrt(fan_in))
    return _symmetric(bound), _symmetric(1 / math.sqrt(fan_in))


def _symmetric(bound: float) -> Distribution:
    return Uniform(-bound, bound) if bound > 0 else ZEROS


# Tensors are looked up where parameters are registered: as attributes, parametrised ones are computed, and a spectral
# norm takes a step each time.


def _given(module: nn.Module, *names: str) -> Iterator[Tensor]:
    for name in names:
        if (tensor := module._parameters.get(name)) is not None:
            yield tensor


def _linear(module: nn.Linear, trace: InitTrace, why: str) -> None:
    _weight_and_bias(module, module.in_features, trace, why)


def _linear_relu(module: LinearReLU, trace: InitTrace, why: str) -> None:
    fan = module.in_features
    for tensor in _given(module, "weight"):
        trace.write(tensor, Normal(0.0, calculate_gain("relu") / math.sqrt(fan)) if fan else ZEROS, why, fan=fan)
    for tensor in _given(module, "bias"):
        trace.write(tensor, ZEROS, why)


def _convolution(module: Any, trace: InitTrace, why: str) -> None:
    channels = module.out_channels if module.transposed else module.in_channels
    _weight_and_bias(module, channels // module.groups * math.prod(module.kernel_size), trace, why)


def _weight_and_bias(module: nn.Module, fan_in: int, trace: InitTrace, why: str) -> None:
    of_weight, of_bias = _kaiming_of_torch(fan_in)
    for tensor in _given(module, "weight"):
        trace.write(tensor, of_weight, why, fan=fan_in)
    for tensor in _given(module, "bias"):
        trace.write(tensor, of_bias, why, fan=fan_in)


def _bilinear(module: nn.Bilinear, trace: InitTrace, why: str) -> None:
    fan = module.in1_features
    for tensor in _given(module, "weight", "bias"):
        trace.write(tensor, _symmetric(1 / math.sqrt(fan)), why, fan=fan)


def _running_stats(module: Any, trace: InitTrace, why: str) -> None:
    for name, distribution in (("running_mean", ZEROS), ("running_var", ONES), ("num_batches_tracked", Constant(0))):
        if (buffer := module._buffers.get(name)) is not None:
            trace.write(buffer, distribution, why)


def _ones_and_zeros(module: Any, trace: InitTrace, why: str) -> None:
    _running_stats(module, trace, why)
    for name, distribution in (("weight", ONES), ("bias", ZEROS)):
        for tensor in _given(module, name):
            trace.write(tensor, distribution, why)


def _embedding(module: Any, trace: InitTrace, why: str) -> None:
    for weight in _given(module, "weight"):
        trace.write(weight, Normal(0.0, 1.0), why)
        if module.padding_idx is not None:
            trace.write(weight, ZEROS, why, padding(module))


def padding(module: Any) -> DimSlice:
    """The row of an embedding that stays zero."""
    return DimSlice(0, module.padding_idx % max(1, module.num_embeddings), 1)


def _recurrent(module: Any, trace: InitTrace, why: str) -> None:
    bound = 1 / math.sqrt(module.hidden_size) if module.hidden_size > 0 else 0.0
    for tensor in module.parameters():
        trace.write(tensor, _symmetric(bound), why, fan=module.hidden_size)


def _attention(module: nn.MultiheadAttention, trace: InitTrace, why: str) -> None:
    for weight in _given(module, "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        trace.write(weight, *_glorot(weight, why))
    for bias in _given(module, "in_proj_bias"):
        trace.write(bias, ZEROS, why)
        for other in _given(module.out_proj, "bias"):
            trace.write(other, ZEROS, why)
    for tensor in _given(module, "bias_k", "bias_v"):
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
    for weight in _given(module, "weight"):
        trace.write(weight, Constant(module.init), why)


def _nothing(module: nn.Module, trace: InitTrace, why: str) -> None:
    """It resets its children only, and they have been read already."""


_READERS: dict[Any, Callable[[Any, InitTrace, str], None]] = {
    nn.Linear.reset_parameters: _linear,
    LinearReLU.reset_parameters: _linear_relu,
    _ConvNd.reset_parameters: _convolution,
    nn.Bilinear.reset_parameters: _bilinear,
    _NormBase.reset_parameters: _ones_and_zeros,
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
    """What enters the distributions of a known reset function into a trace; None for any other function."""
    try:
        return _READERS.get(function)
    except TypeError:  # a reset function that has no hash
        return None


# ---------------------------------------------------------------------------------------------------------------
# Fans


class Fans(NamedTuple):
    """Connections of a weight: inputs that meet in an output, outputs that an input reaches."""

    fan_in: float
    fan_out: float


_FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv", "query_key_value", "in_proj")  # three projections in one weight


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows up in its weight."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer whose weight is (in, out)."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def fans(module: nn.Module, leaf: str, weight: Tensor, path: str = "") -> Fans | None:
    """The fans of a weight matrix, as the layer uses it.

    Args:
        module: the layer.
        leaf: the attribute that holds the weight.
        weight: the weight; only its shape is read.
        path: the layer's name, which tells a fused query-key-value projection from any other.

    Returns:
        The fans; None where `leaf` is no weight matrix of `module`, or `module` is not known. Where torch.nn.init
        counts otherwise: of a grouped or depthwise convolution fan_out is that of one group; a transposed
        convolution's weight is (in, out, ...), and the stride thins out the inputs that meet in an output; recurrent
        gates and fused projections count one by one. Everywhere else they are torch's.

    Example:
        >>> import torch
        >>> from initlab.models.layers import fans
        >>> conv = torch.nn.Conv2d(64, 64, 3, groups=64)
        >>> fans(conv, "weight", conv.weight)
        Fans(fan_in=9, fan_out=9)
    """
    if weight.dim() < 2:
        return None
    shape = weight.shape
    if isinstance(module, _ConvNd) and leaf == "weight":
        taps, groups = math.prod(module.kernel_size), module.groups
        if isinstance(module, _ConvTransposeNd):
            return Fans(shape[0] // groups * taps / math.prod(module.stride), shape[1] * taps)
        return Fans(shape[1] * taps, shape[0] // groups * taps)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        if not leaf.startswith("weight"):
            return None
        gates = 1 if leaf.startswith("weight_hr") else shape[0] // max(1, module.hidden_size)
        return Fans(shape[1], shape[0] // max(1, gates))
    if isinstance(module, nn.MultiheadAttention):
        if leaf not in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return None
        return Fans(shape[1], shape[0] // 3 if leaf == "in_proj_weight" else shape[0])
    if leaf != "weight" or is_embedding(module):
        return None
    if isinstance(module, nn.Bilinear):
        return Fans(math.prod(shape[1:]), shape[0] * shape[2])
    if weight.dim() != 2:
        return None
    if is_conv1d(module):
        fan_in, fan_out = shape
    elif isinstance(module, nn.Linear | LinearReLU):
        fan_out, fan_in = shape
    else:
        return None
    if path.rpartition(".")[2] in _FUSED and fan_out == 3 * fan_in:
        fan_out = fan_in
    return Fans(fan_in, fan_out)
