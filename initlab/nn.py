"""Linear layers with their ReLU: the function and the module. fusing/ puts it into models."""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from initlab.kernels import linear_relu, register_wrapper

from . import init
from .distributed.dtensors import settle
from .distributed.flags import all_reduce_flags_

__all__ = ["LinearReLU", "all_reduce_flags_", "linear_relu"]

register_wrapper(settle)  # linear_relu can read DTensors


_GAINS = {"relu": math.sqrt(2.0), "relu_squared": (2.0 / 3.0) ** 0.25}


class LinearReLU(nn.Module):
    """relu(x @ weight.T + bias): an nn.Linear and its ReLU in one, with nn.Linear's parameters under the same names.

    Weights start with He's distribution, normal with std = gain / sqrt(in_features), drawn from initlab's stream. It
    keeps the size of the signal: the gain is sqrt(2) before ReLU, (2 / 3)^(1 / 4) before its square. Biases start at 0.
    (nn.Linear draws both uniformly, the weights with std = 1 / sqrt(3 in_features).)

    It is not a subclass of nn.Linear: code that replaces every nn.Linear in a model would lose the ReLU. So such code
    passes over it. Quantisation leaves it as it is: put Linear and ReLU back before (`unfuse(model)`).
    torch.ao.quantization's eager mode is warned about; torchao's `quantize_` asks for nn.Linear and cannot be.
    torch.jit.script compiles it, flags included.

    Args:
        in_features: K, the size of the input's last dimension.
        out_features: N, the size of the output's.
        bias: whether there is a bias.
        device: where the parameters lie.
        dtype: the parameters'; float32, bfloat16, float16 or float64.
        activation: "relu", or "relu_squared", the square of ReLU.

    Attributes:
        weight: (N, K).
        bias: (N,), or None.
        flags: the flag that `linear_relu` ors into, an int32 tensor of shape (1,) on the input's device; None, the
            default, checks nothing. It is not a buffer: state_dict() and to() leave it out. `watch` takes the flag of
            this layer's calls from here, and does not read its output. With DTensor parameters each rank flags what it
            holds; `all_reduce_flags_` ors them.

    Raises:
        ValueError: if activation is unknown.

    Source:
        K. He, X. Zhang, S. Ren and J. Sun, "Delving deep into rectifiers", 2015. D. So et al., "Primer: searching for
        efficient transformers for language modeling", NeurIPS 2021, for squared ReLU.

    Example:
        >>> import torch, initlab
        >>> layer = initlab.LinearReLU(3, 5)
        >>> layer.flags = torch.zeros(1, dtype=torch.int32)
        >>> y = layer(torch.tensor([1.0, 2.0, float("nan")]))
        >>> int(layer.flags)
        1
        >>> missing = torch.nn.Linear(3, 5).load_state_dict(layer.state_dict())
    """

    bias: nn.Parameter | None
    flags: Tensor | None
    _watch_flag: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if activation not in _GAINS:
            raise ValueError(f'activation is {activation!r}; it must be "relu" or "relu_squared"')
        self.activation = activation
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.flags = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, and set the biases to 0."""
        init.normal_(self.weight, std=self.gain() / math.sqrt(max(1, self.in_features)))
        if self.bias is not None:
            init.zeros_(self.bias)

    @torch.jit.unused
    def gain(self) -> float:
        """What the activation asks of the starting weights: std * sqrt(in_features)."""
        return _GAINS[self.activation]

    @torch.jit.unused
    def write_flag_to(self, flag: Tensor | None) -> None:
        """Or the flag of the calls that follow into `flag` too, int32 of shape (1,); None ends it. For `watch`."""
        self._watch_flag = flag

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():  # TorchScript knows torch's operations alone
            return self._scripted(input)
        if self._watch_flag is None:
            return linear_relu(input, self.weight, self.bias, flags=self.flags, activation=self.activation)
        y = linear_relu(input, self.weight, self.bias, flags=self._watch_flag, activation=self.activation)
        if self.flags is not None:
            self.flags.bitwise_or_(self._watch_flag)
        return y

    def _scripted(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        r = F.relu(y)
        out = r.square() if self.activation == "relu_squared" else r
        flags = self.flags
        if flags is not None:
            infinite = y.isposinf().any() | out.isposinf().any()
            flag = y.isnan().any().to(torch.int32) + 2 * infinite.to(torch.int32)
            flags.bitwise_or_(flag + 4 * y.isneginf().any().to(torch.int32))
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":  # torch.ao.quantization marks every module so, and converts those that it knows
            warnings.warn(
                "torch.ao.quantization does not know LinearReLU and leaves it as it is; put Linear and ReLU back "
                "before: initlab.unfuse(model)",
                stacklevel=2,
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return shown if self.activation == "relu" else f"{shown}, activation={self.activation!r}"
