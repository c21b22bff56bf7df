"""What the GPU backends share: tables that feed one launch with many tensors, and rounding in the interpreter."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

# One compilation, whatever a table's size and address: Triton would make variants for a size of 1, or 16 divides it.
table_jit = triton.jit(
    do_not_specialize=["columns", "chunks", "first_unit", "units", "high", "low"],
    do_not_specialize_on_alignment=["table"],
)


@triton.jit
def find(table, columns, unit):
    """The column whose units include this one: the last whose first unit, in row 0, is not beyond it."""
    low = 0
    high = columns
    while high - low > 1:
        middle = (low + high) // 2
        beyond = tl.load(table + middle) > unit
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, middle)
    return low


@triton.jit
def rounded(x, ELEMENT: tl.constexpr, INTERPRETED: tl.constexpr):
    """x rounded once to the element type, to nearest even."""
    if INTERPRETED and ELEMENT == tl.bfloat16:  # noqa: SIM300 - the interpreter would cut the low bits off
        b = x.to(tl.uint32, bitcast=True)
        b = tl.where(x == x, b + 0x7FFF + ((b >> 16) & 1), b | 0x400000)  # a NaN stays one
        return (b >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(ELEMENT)


@triton.jit
def widened(x, INTERPRETED: tl.constexpr):
    """x in float32, or as it is in float64."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # whose subnormals the interpreter gets wrong
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


def launching(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where kernels on a device are launched from; the interpreter's is the CPU."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def on_device(tables: list[np.ndarray[Any, Any]], device: torch.device) -> Tensor:
    """All tables in one tensor on the device, by one asynchronous copy."""
    size = sum(table.size for table in tables)
    with torch.inference_mode(False):
        host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=device.type != "cpu")
        np.concatenate([table.ravel() for table in tables], out=host.numpy())
        return host if device.type == "cpu" else host.to(device, non_blocking=True)
