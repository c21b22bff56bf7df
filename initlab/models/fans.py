"""The fans of a weight, as its layer uses it: inputs that meet in an output, outputs that an input reaches."""

import math
import sys
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from initlab.kernels.torch_internals import Convolution, TransposedConvolution

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
        gates, fused projections and experts count one by one. Everywhere else they are torch's.

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
    if isinstance(module, Convolution) and attribute == "weight":
        taps, groups = math.prod(module.kernel_size), module.groups
        if isinstance(module, TransposedConvolution):
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
    if is_embedding(module):
        return None
    if (experts := _number_of_experts(module)) > 1:
        return _expert_fans(module, attribute, weight, experts)
    if attribute != "weight":
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
    if is_fused_qkv(module, attribute, module_name) and fan_out == 3 * fan_in:
        fan_out = fan_in
    return Fans(fan_in, fan_out)


def is_fused_qkv(module: nn.Module, attribute: str, module_name: str) -> bool:
    """Whether a weight is called a fused query-key-value projection."""
    if isinstance(module, nn.MultiheadAttention):
        return attribute == "in_proj_weight"
    return module_name.rpartition(".")[2] in _FUSED_QKV


_EXPERTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("hidden_size", "hidden_dim", "d_model", "embed_dim", "dim")


def _first_int(module: nn.Module, names: Iterable[str]) -> int:
    values = (vars(module).get(name) for name in names)
    return next((value for value in values if type(value) is int), 0)


def _number_of_experts(module: nn.Module) -> int:
    """Of a module that is not torch's and keeps the weights of several experts, how many; 0 of any other."""
    if not module._parameters or type(module).__module__.startswith("torch.nn."):
        return 0
    return _first_int(module, _EXPERTS)


def holds_experts(module: nn.Module, attribute: str, weight: Tensor) -> bool:
    """Whether a parameter holds the weights of several experts, or of the router to them."""
    if weight.dim() < 2 or "bias" in attribute:
        return False
    experts = _number_of_experts(module)
    return experts > 1 and weight.shape[0] % experts == 0


def _expert_fans(module: nn.Module, attribute: str, weight: Tensor, experts: int) -> Fans | None:
    """Fans of one expert, of weights (experts, in, out) or (experts, out, in), and of a router's (experts, in).

    Which it is says `is_transposed`, as transformers has it, or else the one dimension that is as long as the model is
    wide: the input of what is called up or gate, the output of what is called down.
    """
    if not holds_experts(module, attribute, weight):
        return None
    if weight.dim() == 2:
        is_router = attribute == "weight" and weight.shape[0] == experts
        return Fans(weight.shape[1], experts) if is_router else None
    if weight.dim() != 3 or weight.shape[0] != experts:
        return None
    first, second = weight.shape[1:]
    down = attribute.startswith(("down", "w2", "wo", "output"))
    up = not down and attribute.startswith(("gate", "up", "w1", "w3", "wi", "input"))
    transposed = vars(module).get("is_transposed")
    if not isinstance(transposed, bool):
        sizes = (_first_int(module, ("input_size", "in_features")), _first_int(module, ("output_size", "out_features")))
        width = _first_int(module, _WIDTHS)
        if first != second and sizes in ((first, second), (second, first)):
            transposed = sizes == (first, second)
        elif (up or down) and first != second and width in (first, second):
            transposed = (width == first) == up
        else:
            return None
    fan_in, fan_out = (first, second) if transposed else (second, first)
    return Fans(fan_in, fan_out // 2 if "gate_up" in attribute else fan_out)


def has_weight_matrix(module: nn.Module) -> bool:
    """Whether one of a module's own parameters is a weight matrix, one that has fans."""
    own = module._parameters.items()
    return any(tensor is not None and compute_fans(module, attribute, tensor) is not None for attribute, tensor in own)
