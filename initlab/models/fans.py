"""The fans of a weight, as its layer uses it: inputs that meet in an output, outputs that an input reaches."""

import math
import sys
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..nn import LinearReLU


class Fans(NamedTuple):
    """Connections of a weight: inputs that meet in an output, outputs that an input reaches."""

    fan_in: float
    fan_out: float


_FUSED_QKV = ("c_attn", "qkv", "qkv_proj", "Wqkv", "query_key_value", "in_proj")  # three projections in one weight


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows up in its weight."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer whose weight is (in, out)."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def compute_fans(module: nn.Module, attribute: str, weight: Tensor, module_name: str = "") -> Fans | None:
    """The fans of a weight matrix, as the layer uses it.

    Args:
        module: the layer.
        attribute: the one that holds the weight, "weight" for instance.
        weight: the weight; only its shape is read.
        module_name: the layer's name, which tells a fused query-key-value projection from any other.

    Returns:
        The fans; None where `attribute` is no weight matrix of `module`, or `module` is not known. Where torch.nn.init
        counts otherwise: of a grouped or depthwise convolution fan_out is that of one group; a transposed
        convolution's weight is (in, out, ...), and the stride thins out the inputs that meet in an output; recurrent
        gates and fused projections count one by one. Everywhere else they are torch's.

    Example:
        >>> import torch
        >>> from initlab.models.fans import compute_fans
        >>> conv = torch.nn.Conv2d(64, 64, 3, groups=64)
        >>> compute_fans(conv, "weight", conv.weight)
        Fans(fan_in=9, fan_out=9)
    """
    if weight.dim() < 2:
        return None
    shape = weight.shape
    if isinstance(module, _ConvNd) and attribute == "weight":
        taps, groups = math.prod(module.kernel_size), module.groups
        if isinstance(module, _ConvTransposeNd):
            return Fans(shape[0] // groups * taps / math.prod(module.stride), shape[1] * taps)
        return Fans(shape[1] * taps, shape[0] // groups * taps)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        if not attribute.startswith("weight"):
            return None
        gates = 1 if attribute.startswith("weight_hr") else shape[0] // max(1, module.hidden_size)
        return Fans(shape[1], shape[0] // max(1, gates))
    if isinstance(module, nn.MultiheadAttention):
        if attribute not in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return None
        return Fans(shape[1], shape[0] // 3 if attribute == "in_proj_weight" else shape[0])
    if attribute != "weight" or is_embedding(module):
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
    if module_name.rpartition(".")[2] in _FUSED_QKV and fan_out == 3 * fan_in:
        fan_out = fan_in
    return Fans(fan_in, fan_out)


def has_weight_matrix(module: nn.Module) -> bool:
    """Whether one of a module's own parameters is a weight matrix, one that has fans."""
    own = module._parameters.items()
    return any(tensor is not None and compute_fans(module, attribute, tensor) is not None for attribute, tensor in own)
