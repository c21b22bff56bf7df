"""Linear layers with their ReLU: the function, the module, and the swap of Linear + ReLU pairs in a model."""

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from initlab.kernels import linear_relu, register_wrapper

from . import init
from .distributed.dtensors import settle
from .distributed.flags import all_reduce_flags_

__all__ = ["FuseReport", "LinearReLU", "all_reduce_flags_", "fuse_linear_relu", "linear_relu"]

register_wrapper(settle)  # linear_relu can read DTensors


_GAINS = {"relu": math.sqrt(2.0), "relu_squared": (2.0 / 3.0) ** 0.25}


class LinearReLU(nn.Module):
    """relu(x @ weight.T + bias): an nn.Linear and its ReLU in one, with nn.Linear's parameters under the same names.

    Weights start with He's distribution, normal with std = gain / sqrt(in_features), drawn from initlab's stream. It
    keeps the size of the signal: the gain is sqrt(2) before ReLU, (2 / 3)^(1 / 4) before its square. Biases start at 0.
    (nn.Linear draws both uniformly, the weights with std = 1 / sqrt(3 in_features).)

    It is not a subclass of nn.Linear: code that replaces every nn.Linear in a model would lose the ReLU. So such code
    passes over it. Quantisation leaves it as it is: put Linear and ReLU back before (`unfuse(model)`), or
    convert the parameter (torchao's tensor subclasses as `weight` are served). torch.ao.quantization's eager mode is
    warned about; torchao's `quantize_` asks for nn.Linear and cannot be. torch.jit.script compiles it, flags included.

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
        if torch._jit_internal.is_scripting():  # TorchScript knows torch's operations alone
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


class _Pair(NamedTuple):
    """A Linear and the ReLU after it, and what has taken their places."""

    container: nn.Sequential
    name: str  # the Linear's, within the model
    places: tuple[str, str]  # within the container
    before: tuple[nn.Linear, nn.ReLU]
    after: tuple[LinearReLU, nn.Identity]


@dataclass
class FuseReport:
    """What fuse_linear_relu did to a model.

    Attributes:
        fused: names of the Linear layers that are LinearReLU layers now.
        skipped: by the name of a Linear layer that a ReLU follows, why it was left alone.
    """

    fused: tuple[str, ...]
    skipped: dict[str, str]
    _pairs: list[_Pair] = field(repr=False)

    def undo(self) -> None:
        """Put the Linear and ReLU layers back, with the parameters and the mode that the fused ones have by now.

        Raises:
            RuntimeError: if a fused layer is no longer in its place, or has got hooks since; nothing is put back.
        """
        for pair in self._pairs:
            if tuple(pair.container._modules.get(place) for place in pair.places) != pair.after:
                raise RuntimeError(f"{pair.name} has been replaced since it was fused; put the LinearReLU back first")
            if any(map(_has_hooks, pair.after)):
                raise RuntimeError(f"{pair.name} has got hooks since it was fused; remove them first")
        for pair in self._pairs:
            for place, before, after in zip(pair.places, pair.before, pair.after, strict=True):
                before.training = after.training
                for name, parameter in after._parameters.items():  # load_state_dict(assign=True) makes new ones
                    before.register_parameter(name, parameter)
                pair.container._modules[place] = before
        self._pairs = []

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} fused, {len(self.skipped)} left alone"]
        lines += [f"  {name}: LinearReLU" for name in self.fused]
        lines += [f"  {name}: left alone, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def fuse_linear_relu(model: nn.Module) -> FuseReport:
    """Swap every nn.Linear that an nn.ReLU follows in an nn.Sequential for a LinearReLU.

    The LinearReLU takes the Linear's place and parameters, the same objects, so that optimizers and the names in the
    state dict stay as they are; an nn.Identity takes the ReLU's place. A pair is left alone if swapping it could
    change what the model does: if one of the two is of a subclass (parametrised, quantised, wrapped), has hooks, a
    forward or attributes of its own, if the Linear appears elsewhere in the model too, or if the container's forward
    is not nn.Sequential's. Code that calls a container's layers one by one cannot be seen here: check for it yourself.

    Args:
        model: changed in place; it may itself be an nn.Sequential.

    Returns:
        The report, whose `undo()` takes everything back.

    Raises:
        TypeError: if the model is no nn.Module.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = initlab.fuse_linear_relu(model)
        >>> print(report)
        1 fused, 0 left alone
          0: LinearReLU
        >>> report.undo()
        >>> model[1]
        ReLU()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_linear_relu got a {type(model).__name__}; it needs an nn.Module")
    places: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[module] = places.get(module, 0) + 1
    pairs: list[_Pair] = []
    skipped: dict[str, str] = {}
    for container_name, container, first, second in list(_candidates(model)):
        linear, relu = container._modules[first], container._modules[second]
        assert isinstance(linear, nn.Linear)
        assert isinstance(relu, nn.ReLU)
        name = f"{container_name}.{first}" if container_name else first
        why = _why_not(container, linear, relu, places[linear])
        if why is not None:
            skipped[name] = why
        else:
            pairs.append(_Pair(container, name, (first, second), (linear, relu), (_fused(linear), _identity(relu))))
    for pair in pairs:
        pair.container._modules.update(zip(pair.places, pair.after, strict=True))
    return FuseReport(tuple(pair.name for pair in pairs), skipped, pairs)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Sequential, str, str]]:
    """(name of the container, container, name of a Linear in it, of the ReLU after it), subclasses included."""
    for container_name, container in model.named_modules():
        if isinstance(container, nn.Sequential):
            for (first, layer), (second, after) in itertools.pairwise(container._modules.items()):
                if isinstance(layer, nn.Linear) and isinstance(after, nn.ReLU):
                    yield container_name, container, first, second


def _why_not(container: nn.Sequential, linear: nn.Linear, relu: nn.ReLU, places: int) -> str | None:
    """Why a pair must be left alone; None if it can be swapped."""
    if type(container).forward is not nn.Sequential.forward or "forward" in container.__dict__:
        return f"its container, a {type(container).__name__}, has a forward of its own"
    for module, kind in ((linear, nn.Linear), (relu, nn.ReLU)):
        if type(module) is not kind:
            return f"a {type(module).__name__} is more than a {kind.__name__}"
        if _has_hooks(module):
            return f"the {kind.__name__} has hooks"
        if own := sorted(_attributes(module) - _default_attributes(kind)):
            return f"the {kind.__name__} has attributes of its own: {', '.join(own)}"
    if places > 1:
        return f"the Linear appears in {places} places"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return any(value for name, value in module.__dict__.items() if name.endswith("_hooks"))


def _attributes(module: nn.Module) -> set[str]:
    return {*module.__dict__, *module._parameters, *module._buffers, *module._modules}


def _default_attributes(kind: type[nn.Module]) -> set[str]:
    return _attributes(nn.Linear(1, 1, device="meta") if kind is nn.Linear else kind())


def _fused(linear: nn.Linear) -> LinearReLU:
    bias: nn.Parameter | None = linear.bias  # annotated as never None
    fused = LinearReLU(linear.in_features, linear.out_features, bias is not None, device="meta")
    fused._parameters.update(linear._parameters)
    return fused.train(linear.training)


def _identity(relu: nn.ReLU) -> nn.Identity:
    return nn.Identity().train(relu.training)
