"""What 16-bit floats do to single numbers: constants that they cannot hold, results that overflow in them alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .graph import FunctionCall
from .reasons import Operation

HALF = (torch.float16, torch.bfloat16)


class LostConstant(NamedTuple):
    """A number in the code that a dtype cannot hold.

    Args:
        value: as it is written.
        becomes: what the dtype makes of it: 0, 1, or infinity.
        module: path of the module that used it; None for the loss function.
        line: of the user's code.
    """

    value: float
    becomes: float
    dtype: torch.dtype
    module: str | None
    line: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        least = torch.finfo(self.dtype).smallest_normal
        why = f", whose smallest ordinary number is {least:.1g}" if self.becomes == 0 else ""
        return f"the constant {self.value:g} is {self.becomes:g} in {dtype}{why}"


def lost_constants(operation: Operation, dtype: torch.dtype, call: FunctionCall) -> Iterator[LostConstant]:
    """The constants among an operation's arguments that its dtype cannot hold."""
    for value in (*operation.args, *operation.kwargs.values()):
        if isinstance(value, float) and math.isfinite(value) and value not in (0.0, 1.0, -1.0):
            becomes = float(torch.tensor(value, dtype=torch.float64).to(dtype))
            if becomes in (0.0, 1.0, -1.0) or math.isinf(becomes):
                yield LostConstant(value, becomes, dtype, call.module, call.line)


def in_float32(func: Any, operation: Operation, out: Tensor) -> float:
    """The largest magnitude of an operation's result in float32, where its 16-bit result is not finite.

    Returns:
        Infinity where float32's is not finite either.
    """

    def widen(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dtype in HALF:
            return x.float()
        return torch.float32 if x in HALF else x

    try:
        again = func(*tree_map(widen, operation.args), **tree_map(widen, operation.kwargs))
        again = next(x for x in (again if isinstance(again, tuple) else (again,)) if x.shape == out.shape)
        size = again[~out.isfinite()].abs()
        return float(size.max()) if bool(size.isfinite().all()) else math.inf
    except Exception:  # an operation in place: what it got is gone
        return math.inf
