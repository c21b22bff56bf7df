"""What stands in the places of a Linear and its ReLU in a fused model.

The fused layer marks what it puts out, and the stand-in of an activation passes on what is marked. Anything else still
gets the activation: a stand-in is right wherever it is called. Compiled code has no marks; there ReLU runs once more,
which changes nothing.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import LinearReLU
from .usage import RELU, RELU_FUNCTIONS

_MARK = "_initlab_applied"


class FusedLinear(LinearReLU):
    """The LinearReLU in the place of an nn.Linear.

    Attributes:
        in_place: whether the ReLU after it works in place.
    """

    in_place = False

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if not torch.compiler.is_compiling():
            setattr(y, _MARK, _version(y))
        elif self.in_place:  # where ReLU runs once more, on what the gradient of the first one needs
            y = y.clone()
        return y

    def _get_name(self) -> str:
        return "LinearReLU"


class AppliedActivation(nn.Module):
    """In the place of an activation module after a fused layer.

    Args:
        original: the activation module.
        kind: "relu" or "relu_squared".
    """

    original: nn.Module

    def __init__(self, original: nn.Module, kind: str) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a child: the names of modules stay as they are
        self.kind = kind
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:
        if _is_marked(input) or (self.kind != RELU and torch.compiler.is_compiling()):
            return input
        result: Tensor = self.original(input)
        return result

    def extra_repr(self) -> str:
        return repr(self.original)


class AppliedFunction:
    """In the place of a function that applies ReLU.

    Args:
        original: such as torch.nn.functional.relu.
    """

    def __init__(self, original: Callable[..., Tensor]) -> None:
        self.original = original

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input if _is_marked(input) else self.original(input, *args, **kwargs)


class AppliedMethod:
    """In the place of a method of a module, such as its forward, whose code applies ReLU to a fused layer's output.

    The code is the method's own. The names in it by which it finds torch's relu lead to an `AppliedFunction`.

    Args:
        owner: the module.
        name: of the method.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.owner), self.name)
        if not torch.compiler.is_compiling():
            method = _with_relu_applied(method)
        return method(self.owner, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:  # for inspect.signature
        return types.MethodType(getattr(type(self.owner), self.name), self.owner)


def can_be_spliced(function: Any, code: Any) -> bool:
    """Whether code belongs to a plain function and finds torch's relu by global names."""
    if not isinstance(function, types.FunctionType) or function.__code__ is not code:
        return False
    return any(_replacement(function.__globals__.get(name)) is not None for name in code.co_names)


@functools.lru_cache(maxsize=512)
def _with_relu_applied(function: types.FunctionType) -> types.FunctionType:
    names = _Names(function.__globals__)
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class _Names(dict[str, Any]):
    """The global names of a function, but for those that lead to torch's relu."""

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__(__builtins__=names["__builtins__"])
        self.names = names

    def __missing__(self, name: str) -> Any:
        value = self.names[name]
        replacement = _replacement(value)
        return value if replacement is None else replacement


class _Namespace:
    """A module of torch in which the names of relu lead to its stand-in."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        replacement = _replacement(value)
        return value if replacement is None else replacement


def _replacement(value: Any) -> Any:
    if isinstance(value, types.ModuleType):
        return _NAMESPACES.get(value)
    return _FUNCTIONS.get(value) if isinstance(value, types.FunctionType | types.BuiltinFunctionType) else None


_NAMESPACES = {module: _Namespace(module) for module in (torch, nn, F)}
_FUNCTIONS = {
    function: AppliedFunction(function)
    for function in RELU_FUNCTIONS
    if isinstance(function, types.FunctionType | types.BuiltinFunctionType)
}


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_marked(tensor: Tensor) -> bool:
    """Whether a tensor is what a fused layer put out, unchanged."""
    if torch.compiler.is_compiling():
        return False
    mark = getattr(tensor, _MARK, None)
    return mark is not None and mark == _version(tensor)
