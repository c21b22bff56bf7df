"""What the GPU backends share: tables that feed one launch with many tensors, and rounding (`rounded`)."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED and triton.__version__.startswith("3.6."):
    # Its interpreter has numbers in arrays of one element, and numpy deprecates to make a loop's bound of such a one.
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index

# One compilation, whatever a table's size and address: Triton would make variants for a size of 1, or 16 divides it.
table_jit = triton.jit(
    do_not_specialize=["num_columns", "chunks"],
    do_not_specialize_on_alignment=["table_ptr"],
)


@triton.jit
def find(table_ptr, num_columns, item):
    """The column that a work item belongs to: the last whose first item, in row 0 of the table, is not beyond it.

    table_ptr: [rows, num_columns] int64, item: scalar int64 -> scalar int32
    """
    low = 0
    high = num_columns
    while high - low > 1:
        middle = (low + high) // 2
        beyond = tl.load(table_ptr + middle) > item
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, middle)
    return low


@triton.jit
def rounded(x, OUT_DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x rounded once to OUT_DTYPE, to nearest even."""
    if INTERPRETED and OUT_DTYPE == tl.bfloat16:  # noqa: SIM300 - the interpreter would cut the low bits off
        b = x.to(tl.uint32, bitcast=True)
        b = tl.where(x == x, b + 0x7FFF + ((b >> 16) & 1), b | 0x400000)  # a NaN stays one
        return (b >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(OUT_DTYPE)


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
