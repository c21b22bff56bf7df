"""What stands in the places of a Linear and its ReLU in a fused model.

The fused layer marks what it puts out, and the stand-in of a ReLU passes on what is marked, once. Anything else still
gets its ReLU. So a stand-in is right wherever it is called, and where there are no marks (compiled code, inference
mode, torch.func) ReLU runs once more, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.jit import is_scripting  # type: ignore[attr-defined]

from initlab.kernels.torch_internals import is_transforming

from ..nn import LinearReLU


class FusedLinear(LinearReLU):
    """The LinearReLU in the place of an nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted(input)
        y = LinearReLU.forward(self, input)
        _mark(y)
        return y

    def _get_name(self) -> str:
        return "LinearReLU"


class AppliedReLU(nn.ReLU):
    """In the place of an nn.ReLU after a fused layer."""

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return F.relu(input)
        if is_dynamo_compiling():  # in place it would change what the gradient of the first one needs
            return F.relu(input)
        return input if _take_mark(input) else F.relu(input, self.inplace)


class AppliedFunction:
    """In the place of a function that applies ReLU, where a module holds one.

    Args:
        original: such as torch.nn.functional.relu.
    """

    def __init__(self, original: Callable[..., Tensor]) -> None:
        self.original = original

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input if _take_mark(input) else self.original(input, *args, **kwargs)


@torch.jit.unused
def _mark(y: Tensor) -> None:
    """Note on a tensor that it has been through ReLU, and in which version."""
    if is_dynamo_compiling() or is_transforming() or not isinstance(y, Tensor) or y.is_inference():
        return  # symbols have no versions, nor have inference tensors; torch.func counts none
    y._initlab_applied = y._version  # type: ignore[attr-defined]


@torch.jit.unused
def _take_mark(y: Tensor) -> bool:
    """Whether a tensor is what a fused layer put out, unchanged and for the first time."""
    if is_dynamo_compiling() or not isinstance(y, Tensor):
        return False
    version = y.__dict__.pop("_initlab_applied", None)
    return version is not None and version == y._version
