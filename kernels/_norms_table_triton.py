"""How the GPU backend of the norms cuts its work: a table with a column for each tensor, and work items.

An item is up to `blocks` blocks of BLOCK_SIZE elements of one tensor, from a multiple of 16 bytes on. A program finds
its item's column by bisection.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common_triton import find, on_device
from .norms import DTYPES, Entries

BLOCK_SIZE = 4096  # elements that a program of NUM_WARPS warps reads at once: 32 a thread
NUM_WARPS = 4
WORK_ITEMS = 1 << 14  # about so many: enough for any GPU, few enough for one program to add up

# Rows of the table. Elements are counted from ADDRESS, which is rounded down to 16 bytes. `find` looks into row 0.
FIRST_ITEM, ADDRESS, BEGIN, END, CODE, INDEX, PLACE = map(tl.constexpr, range(7))

# One compilation, whatever a table's size and address: Triton would make variants for a size of 1, or 16 divides it.
table_jit = triton.jit(
    do_not_specialize=["columns", "blocks", "first_item", "items", "max_norm_high", "max_norm_low"],
    do_not_specialize_on_alignment=["table_ptr"],
)


@triton.jit
def work_item(table_ptr, columns, blocks, item, BLOCK_SIZE: tl.constexpr):
    """An item's column in the table, address, place of its first block, begin and end of its tensor, dtype's code."""
    column_ptr = table_ptr + find(table_ptr, columns, item)
    start = (item - tl.load(column_ptr + FIRST_ITEM * columns)) * blocks * BLOCK_SIZE
    address = tl.load(column_ptr + ADDRESS * columns)
    begin = tl.load(column_ptr + BEGIN * columns)
    end = tl.load(column_ptr + END * columns)
    return column_ptr, address, start, begin, end, tl.load(column_ptr + CODE * columns)


class Plan(NamedTuple):
    """The table on the device, and how the work is cut."""

    device: torch.device
    disjoint: bool  # whether no two tensors share memory
    table: Tensor
    columns: int
    blocks: int
    narrow: int  # items of tensors that are not float64; theirs come first
    items: int
    elements: int
    full: bool  # whether every tensor has elements


# By device, stream and what was asked: gradients lie where they lay in the step before, nearly always.
_plans: OrderedDict[tuple[torch.device, int, bytes, tuple[int, ...] | None], Plan] = OrderedDict()
_KEPT = 16
_captured: list[Plan] = []  # graphs read these tables whenever they are replayed


def prepare(entries: Entries, device: torch.device) -> Plan | None:
    """The plan of an earlier call where addresses, lengths, dtypes and indices are the same.

    In the capture of a CUDA graph only such a plan, of whatever stream; it is kept for good. None where there is none:
    a table would be copied from memory of the host that is gone when the graph is replayed.
    """
    rows = np.array(entries[:4], dtype=np.int64)
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    key = (device, stream, rows.tobytes(), None if entries.places is None else tuple(entries.places))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A capture begins when the device has done all that was asked of it before: the table has arrived.
        found = next((plan for k, plan in _plans.items() if (k[0], *k[2:]) == (key[0], *key[2:])), None)
        if found is not None and all(plan is not found for plan in _captured):
            _captured.append(found)
        return found
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = make_plan(rows, entries.places, device)
        while len(_plans) > _KEPT:
            _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    return plan


def make_plan(rows: np.ndarray[Any, Any], places: list[int] | None, device: torch.device) -> Plan:
    wide_last = np.argsort(rows[2] == DTYPES.index(torch.float64), kind="stable")
    address, length, code, index = rows[:, wide_last]
    itemsize = np.array([dtype.itemsize for dtype in DTYPES])[code]
    order = address.argsort()
    disjoint = bool(((address + length * itemsize)[order][:-1] <= address[order][1:]).all())
    begin = address % 16 // itemsize
    end = begin + length
    elements = int(length.sum())
    blocks = max(1, elements // (WORK_ITEMS * BLOCK_SIZE))
    items = (end + (blocks * BLOCK_SIZE - 1)) // (blocks * BLOCK_SIZE)
    table = {
        FIRST_ITEM.value: items.cumsum() - items,
        ADDRESS.value: address - begin * itemsize,
        BEGIN.value: begin,
        END.value: end,
        CODE.value: code,
        INDEX.value: index,
        PLACE.value: wide_last if places is None else np.array(places, dtype=np.int64)[wide_last],
    }
    on_gpu = on_device([np.stack([table[row] for row in range(len(table))])], device)
    narrow = int(items[code != DTYPES.index(torch.float64)].sum())
    return Plan(device, disjoint, on_gpu, len(length), blocks, narrow, int(items.sum()), elements, places is None)
