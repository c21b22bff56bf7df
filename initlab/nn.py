"""Linear layers with their ReLU: the function and the module. fusing/ puts it into models."""

import torch
from torch import Tensor, nn

from initlab.kernels import linear_relu

from . import init

__all__ = ["LinearReLU", "linear_relu"]


class LinearReLU(nn.Module):
    """relu(x @ weight.T + bias): an nn.Linear and its ReLU in one, with nn.Linear's parameters under the same names.

    Weights start with He's distribution, normal with std = sqrt(2 / in_features), drawn from initlab's stream. It keeps
    the size of the signal through a ReLU. Biases start at 0. (nn.Linear draws both uniformly, the weights with
    1 / sqrt(6) of that std.) It is not a subclass of nn.Linear: code that replaces every nn.Linear in a model would
    lose the ReLU.

    Args:
        in_features: K, the size of the input's last dimension.
        out_features: N, the size of the output's.
        bias: whether there is a bias.
        device: where the parameters lie.
        dtype: the parameters'; float32, bfloat16, float16 or float64.

    Attributes:
        weight: (N, K).
        bias: (N,), or None.
        flags: the flag that `linear_relu` ors into, an int32 tensor of shape (1,) on the input's device; None, the
            default, checks nothing. It is not a buffer: state_dict() and to() leave it out. `watch` takes the flag of
            this layer's calls from here, and does not read its output.

    Source:
        K. He, X. Zhang, S. Ren and J. Sun, "Delving deep into rectifiers", 2015.

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
    ) -> None:
        super().__init__()
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
        init.kaiming_normal_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            init.zeros_(self.bias)

    def write_flag_to(self, flag: Tensor | None) -> None:
        """Or the flag of the calls that follow into `flag` too, int32 of shape (1,); None ends it. For `watch`."""
        self._watch_flag = flag

    def forward(self, input: Tensor) -> Tensor:
        if self._watch_flag is None:
            return linear_relu(input, self.weight, self.bias, flags=self.flags)
        y = linear_relu(input, self.weight, self.bias, flags=self._watch_flag)
        if self.flags is not None:
            self.flags.bitwise_or_(self._watch_flag)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
