"""The norm and the scaling on the GPU: one launch for the tensors of a device, whatever their number and dtypes.

The work is cut into items, which a table describes (_norms_table_triton.py). Every item has one sum; a single program
adds them up in order, so that equal gradients give equal bits. Where the total overflows or vanishes, a
rescan reads again, in float64; its programs are launched always, read the total, and leave at once where it is sound.
So nothing waits for the device. Where the norm of each tensor is asked for, the rescan also reads those items whose own
sum is not sound, and one more kernel adds up the items of each tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common_triton import INTERPRETED, launching, rounded, widened
from ._norms_table_triton import (
    BLOCK_SIZE,
    FIRST_ITEM,
    INDEX,
    NUM_WARPS,
    PLACE,
    Plan,
    prepare,
    table_jit,
    work_item,
)
from .norms import (
    BIG,
    DTYPES,
    EPSILON,
    GROW,
    NAN,
    NEGATIVE_INF,
    POSITIVE_INF,
    SHRINK,
    SPLIT_BELOW,
    SPLIT_FACTOR,
    TINY,
)

__all__ = ["ON_DEVICE", "norm", "prepare", "scale"]

ON_DEVICE = True
RESCAN_BLOCK = 512  # as BLOCK_SIZE, in a rescan
_INTERPRETED = tl.constexpr(INTERPRETED)
_PARTS = tl.constexpr(1 if INTERPRETED else 8)  # of a block that is not full, so that it doesn't set the register count
_SUMMED = tl.constexpr(8)  # squares added in float32 before they go to float64
_ADD_BLOCK = tl.constexpr(1024)  # sums that the last program adds at once

# The constants of the op's page, as kernels take them.
_NAN, _POSITIVE_INF, _NEGATIVE_INF = map(tl.constexpr, (NAN, POSITIVE_INF, NEGATIVE_INF))
_BFLOAT16, _FLOAT16, _FLOAT64 = (
    tl.constexpr(DTYPES.index(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float64)
)
_BIG, _TINY, _SHRINK, _GROW = map(tl.constexpr, (BIG, TINY, SHRINK, GROW))
_SPLIT_BELOW_LOWER, _SPLIT_BELOW = map(tl.constexpr, SPLIT_BELOW)
_SPLIT_FACTOR_LOWER, _SPLIT_FACTOR = map(tl.constexpr, SPLIT_FACTOR)
_EPSILON = tl.constexpr(EPSILON)

# Rows of the scratch, a column for each work item: sums in float64 (the first pass has one, in row 0), then int64.
# Where the norm of each tensor is asked for, the first pass's sums are kept apart.
_BIG_SUM, _MID_SUM, _TINY_SUM, _ITEM_FLAG, _ITEM_INDEX = map(tl.constexpr, range(5))
_NO_INDEX = tl.constexpr((1 << 63) - 1)
# Results, of 64 bits each: the first two float64, the others int64; RESCAN is 1 where the total calls for a rescan.
NORM, SUM_OF_SQUARES, FLAG, FIRST_NONFINITE, RESCAN = map(tl.constexpr, range(5))


@triton.jit
def _sums_of_neighbours(x):
    """(n,) -> (n / 8,): sums of 8 in float32 (float64 of float64), as float64."""
    return tl.sum(x.reshape(x.shape[0] // _SUMMED, _SUMMED), axis=1).to(tl.float64)


@triton.jit
def full_block_squares(address, start, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The sums of squares of a full block at a multiple of 16 bytes: (BLOCK_SIZE / 8,)."""
    ptr = tl.multiple_of((address.to(tl.pointer_type(DTYPE)) + start), 16)
    x = widened(tl.load(ptr + tl.arange(0, BLOCK_SIZE)), _INTERPRETED)
    return _sums_of_neighbours(x * x)


@triton.jit
def _sum_squares(address, start, begin, end, blocks, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """sum(x[i]^2) over those elements i of [begin, end) that lie in `blocks` blocks from `start` on."""
    total = tl.zeros([BLOCK_SIZE // _SUMMED], tl.float64)
    rest = tl.zeros([BLOCK_SIZE // _PARTS // _SUMMED], tl.float64)
    for _ in range(blocks):
        if start < end:
            if (start >= begin) & (start + BLOCK_SIZE <= end):
                total += full_block_squares(address, start, DTYPE, BLOCK_SIZE)
            else:
                for i in range(_PARTS):
                    offsets = start + i * (BLOCK_SIZE // _PARTS) + tl.arange(0, BLOCK_SIZE // _PARTS)
                    mask = (offsets >= begin) & (offsets < end)
                    x = tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0.0)
                    x = widened(x, _INTERPRETED)
                    # Here several threads hold each sum, and one of them is kept. Had they x * x, each would fuse its
                    # own square into the sum, and the norm's bits would depend on whose is kept.
                    rest += _sums_of_neighbours(tl.fma(x, x, 0.0))
        start += BLOCK_SIZE
    return tl.sum(total) + tl.sum(rest)


@table_jit
def norm_kernel(
    table_ptr, columns, blocks, first_item,  # inputs: (7, columns) int64; how the work is cut
    sums_ptr,  # output: float64, one for each item
    FP64: tl.constexpr, BLOCK_SIZE: tl.constexpr,  # meta
):  # fmt: skip
    """sums[item] = sum(x^2) over the item's elements; a program for each item from first_item on.

    FP64: of float64 tensors, whose arithmetic would cost the others registers.
    """
    item = tl.program_id(0).to(tl.int64) + first_item
    _, address, start, begin, end, code = work_item(table_ptr, columns, blocks, item, BLOCK_SIZE)
    if FP64:
        total = _sum_squares(address, start, begin, end, blocks, tl.float64, BLOCK_SIZE)
    else:
        if code == _BFLOAT16:
            total = _sum_squares(address, start, begin, end, blocks, tl.bfloat16, BLOCK_SIZE)
        elif code == _FLOAT16:
            total = _sum_squares(address, start, begin, end, blocks, tl.float16, BLOCK_SIZE)
        else:
            total = _sum_squares(address, start, begin, end, blocks, tl.float32, BLOCK_SIZE)
    tl.store(sums_ptr + item, total)


@triton.jit
def _add_up(sums_ptr, count):
    """sum(sums[:count]), always in the same order."""
    total = tl.zeros([_ADD_BLOCK], tl.float64)
    for i in range(0, count, _ADD_BLOCK):
        offsets = i + tl.arange(0, _ADD_BLOCK)
        total += tl.load(sums_ptr + offsets, mask=offsets < count, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["items", "sound"])
def finish_norm_kernel(
    sums_ptr, items, sound,  # inputs: (items,) float64; the least total that can be trusted
    results_ptr,  # output: (5,) int64
):  # fmt: skip
    """norm = sqrt(sum(sums)); RESCAN where the sum is below `sound`, infinite or NaN. One program."""
    total = _add_up(sums_ptr, items)
    tl.store(results_ptr.to(tl.pointer_type(tl.float64)) + NORM, tl.sqrt(total))
    tl.store(results_ptr.to(tl.pointer_type(tl.float64)) + SUM_OF_SQUARES, total)
    tl.store(results_ptr + FLAG, tl.zeros([], tl.int64))
    tl.store(results_ptr + FIRST_NONFINITE, tl.full([], -1, tl.int64))
    tl.store(results_ptr + RESCAN, tl.where((total >= sound) & (total < float("inf")), 0, 1).to(tl.int64))


@triton.jit
def _scaled_sums(address, start, begin, end, blocks, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Sums of squares in float64, big, middling and tiny ones apart, of finite elements; and the flag."""
    big = tl.zeros([BLOCK_SIZE], tl.float64)
    mid = tl.zeros([BLOCK_SIZE], tl.float64)
    tiny = tl.zeros([BLOCK_SIZE], tl.float64)
    flags = tl.zeros([BLOCK_SIZE], tl.int32)
    for _ in range(blocks):
        if start < end:
            offsets = start + tl.arange(0, BLOCK_SIZE)
            mask = (offsets >= begin) & (offsets < end)
            x = tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0.0)
            x = widened(x, _INTERPRETED).to(tl.float64)
            inf = float("inf")
            flags |= tl.where(x != x, _NAN, tl.where(x == inf, _POSITIVE_INF, tl.where(x == -inf, _NEGATIVE_INF, 0)))
            x = tl.abs(tl.where(tl.abs(x) < inf, x, 0.0))
            up = tl.where(x > _BIG, x * _SHRINK, 0.0)
            down = tl.where(x < _TINY, x * _GROW, 0.0)
            x = tl.where((x > _BIG) | (x < _TINY), 0.0, x)
            big += up * up
            mid += x * x
            tiny += down * down
        start += BLOCK_SIZE
    flag = _or_of(flags)
    return tl.sum(big), tl.sum(mid), tl.sum(tiny), flag


@triton.jit
def _or_of(flags):
    """The or of all flags of a tensor."""
    return tl.max(flags & _NAN) | tl.max(flags & _POSITIVE_INF) | tl.max(flags & _NEGATIVE_INF)


@triton.jit
def _is_sound(sums, blocks, BLOCK_SIZE: tl.constexpr):
    """Whether sums of items can be trusted: as `sound` of finish_norm_kernel, for as many elements as an item has."""
    least = tl.maximum(blocks.to(tl.float32) * (BLOCK_SIZE * 1e-38), 1e-30)
    return (sums >= least) & (sums < float("inf"))


@table_jit
def rescan_kernel(
    table_ptr, columns, blocks, items, results_ptr,  # inputs: as norm_kernel; (5,) int64
    scratch_ptr,  # output: (5, items), float64 and int64
    sums_ptr,  # input: (items,) float64 where the norm of each tensor is asked for, else None
    BLOCK_SIZE: tl.constexpr, RESCAN_BLOCK: tl.constexpr,  # meta
):  # fmt: skip
    """Big, middling and tiny squares, flag and first index of one item; a program for each.

    Of items for which results[RESCAN] calls, and with sums_ptr also of those whose own sum is not sound.
    """
    leave = tl.load(results_ptr + RESCAN) == 0
    if sums_ptr is not None:
        leave = leave & _is_sound(tl.load(sums_ptr + tl.program_id(0)), blocks, BLOCK_SIZE)
    if leave:
        return
    item = tl.program_id(0).to(tl.int64)
    column_ptr, address, start, begin, end, code = work_item(table_ptr, columns, blocks, item, BLOCK_SIZE)
    blocks = blocks * (BLOCK_SIZE // RESCAN_BLOCK)
    if code == _BFLOAT16:
        big, mid, tiny, flag = _scaled_sums(address, start, begin, end, blocks, tl.bfloat16, RESCAN_BLOCK)
    elif code == _FLOAT16:
        big, mid, tiny, flag = _scaled_sums(address, start, begin, end, blocks, tl.float16, RESCAN_BLOCK)
    elif code == _FLOAT64:
        big, mid, tiny, flag = _scaled_sums(address, start, begin, end, blocks, tl.float64, RESCAN_BLOCK)
    else:
        big, mid, tiny, flag = _scaled_sums(address, start, begin, end, blocks, tl.float32, RESCAN_BLOCK)
    tl.store(scratch_ptr + _BIG_SUM * items + item, big)
    tl.store(scratch_ptr + _MID_SUM * items + item, mid)
    tl.store(scratch_ptr + _TINY_SUM * items + item, tiny)
    scratch_ptr = scratch_ptr.to(tl.pointer_type(tl.int64))
    tl.store(scratch_ptr + _ITEM_FLAG * items + item, flag.to(tl.int64))
    index = tl.where(flag != 0, tl.load(column_ptr + INDEX * columns), _NO_INDEX)
    tl.store(scratch_ptr + _ITEM_INDEX * items + item, index)


@triton.jit
def _root(big, mid, tiny, flag):
    """sqrt(big / SHRINK^2 + mid + tiny / GROW^2), or what the flag says."""
    # What is left out beside a larger sum is below half a unit in its last place, or is added with its scale.
    middle = tl.sqrt(mid)
    a = tl.sqrt(big)
    b = middle * _SHRINK
    c = tl.sqrt(tiny)
    large = tl.sqrt(a * a + b * b) / _SHRINK
    small = tl.sqrt(mid + (c / _GROW) * (c / _GROW))
    small = tl.where(mid == 0.0, c / _GROW, small)
    norm = tl.where(big > 0.0, large, small)
    return tl.where(flag == 0, norm, tl.where((flag & _NAN) != 0, float("nan"), float("inf")))


@triton.jit(do_not_specialize=["items"])
def finish_rescan_kernel(
    scratch_ptr, items,  # inputs: (5, items), float64 and int64
    results_ptr,  # input and output: (5,) int64
):  # fmt: skip
    """norm = sqrt(big / SHRINK^2 + mid + tiny / GROW^2), flag and first index, where results[RESCAN]. One program."""
    if tl.load(results_ptr + RESCAN) == 0:
        return
    big = _add_up(scratch_ptr + _BIG_SUM * items, items)
    mid = _add_up(scratch_ptr + _MID_SUM * items, items)
    tiny = _add_up(scratch_ptr + _TINY_SUM * items, items)
    scratch_ptr = scratch_ptr.to(tl.pointer_type(tl.int64))
    flags = tl.zeros([_ADD_BLOCK], tl.int64)
    indices = tl.full([_ADD_BLOCK], _NO_INDEX, tl.int64)
    for i in range(0, items, _ADD_BLOCK):
        offsets = i + tl.arange(0, _ADD_BLOCK)
        mask = offsets < items
        flags |= tl.load(scratch_ptr + _ITEM_FLAG * items + offsets, mask=mask, other=0)
        index = tl.load(scratch_ptr + _ITEM_INDEX * items + offsets, mask=mask, other=_NO_INDEX)
        indices = tl.minimum(indices, index)
    flag = _or_of(flags)
    first = tl.min(indices)
    norm = _root(big, mid, tiny, flag)
    tl.store(results_ptr.to(tl.pointer_type(tl.float64)) + NORM, norm)
    tl.store(results_ptr.to(tl.pointer_type(tl.float64)) + SUM_OF_SQUARES, norm * norm)
    tl.store(results_ptr + FLAG, flag)
    tl.store(results_ptr + FIRST_NONFINITE, tl.where(flag != 0, first, -1))


@table_jit
def tensor_norms_kernel(
    table_ptr, columns, blocks, items, results_ptr,  # inputs: as rescan_kernel
    sums_ptr, scratch_ptr,  # inputs: (items,) float64 of the first pass; (5, items) of the rescan
    norms_ptr,  # output: float64, one for each tensor, in the tensors' order
    BLOCK_SIZE: tl.constexpr,  # meta
):  # fmt: skip
    """norms[PLACE] = sqrt(sum(x^2)) of one column's tensor, from the sums of its items; a program for each column."""
    column_ptr = table_ptr + tl.program_id(0)
    first = tl.load(column_ptr + FIRST_ITEM * columns)
    end = items.to(tl.int64)
    if tl.program_id(0) + 1 < columns:
        end = tl.load(column_ptr + FIRST_ITEM * columns + 1)
    all_again = tl.load(results_ptr + RESCAN) != 0
    flag_ptr = scratch_ptr.to(tl.pointer_type(tl.int64)) + _ITEM_FLAG * items
    big = tl.zeros([_ADD_BLOCK], tl.float64)
    mid = tl.zeros([_ADD_BLOCK], tl.float64)
    tiny = tl.zeros([_ADD_BLOCK], tl.float64)
    flags = tl.zeros([_ADD_BLOCK], tl.int64)
    for i in range(first, end, _ADD_BLOCK):
        offsets = i + tl.arange(0, _ADD_BLOCK)
        mask = offsets < end
        sums = tl.load(sums_ptr + offsets, mask=mask, other=0.0)
        again = mask & (all_again | (_is_sound(sums, blocks, BLOCK_SIZE) == 0))
        big += tl.load(scratch_ptr + _BIG_SUM * items + offsets, mask=again, other=0.0)
        mid += tl.where(again, tl.load(scratch_ptr + _MID_SUM * items + offsets, mask=again, other=0.0), sums)
        tiny += tl.load(scratch_ptr + _TINY_SUM * items + offsets, mask=again, other=0.0)
        flags |= tl.load(flag_ptr + offsets, mask=again, other=0)
    norm = _root(tl.sum(big), tl.sum(mid), tl.sum(tiny), _or_of(flags))
    tl.store(norms_ptr + tl.load(column_ptr + PLACE * columns), norm)


@triton.jit
def _scaled(x, a, b, zero, DTYPE: tl.constexpr):
    """x * a * b, rounded once, or 0."""
    y = widened(x, _INTERPRETED)
    # In float64 the product of the factors is exact enough, in float32 it might be subnormal.
    y = tl.where(zero, 0.0, y * a.to(y.dtype) * b.to(y.dtype))
    return rounded(y, DTYPE, _INTERPRETED)


@triton.jit
def scale_full_block(address, start, a, b, zero, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """x *= a * b for a full block at a multiple of 16 bytes."""
    ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + start, 16)
    ptrs = ptr + tl.arange(0, BLOCK_SIZE)
    tl.store(ptrs, _scaled(tl.load(ptrs), a, b, zero, DTYPE))


@triton.jit
def _scale(
    address, start, begin, end, blocks, a, b, zero,
    DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """x[i] *= a * b, or = 0, for those elements i of [begin, end) that lie in `blocks` blocks from `start` on."""
    for _ in range(blocks):
        if start < end:
            if (start >= begin) & (start + BLOCK_SIZE <= end):
                scale_full_block(address, start, a, b, zero, DTYPE, BLOCK_SIZE)
            else:
                for i in range(_PARTS):
                    offsets = start + i * (BLOCK_SIZE // _PARTS) + tl.arange(0, BLOCK_SIZE // _PARTS)
                    mask = (offsets >= begin) & (offsets < end)
                    ptrs = address.to(tl.pointer_type(DTYPE)) + offsets
                    x = tl.load(ptrs, mask=mask, other=0.0)
                    tl.store(ptrs, _scaled(x, a, b, zero, DTYPE), mask=mask)
        start += BLOCK_SIZE


@table_jit
def scale_kernel(
    table_ptr, columns, blocks, first_item,  # inputs and outputs: the elements that the table points to
    norm_ptr, max_norm_high, max_norm_low,  # inputs: 0-d; max_norm's bits in halves, since a launch takes float32 only
    POLICY: tl.constexpr, FP64: tl.constexpr, BLOCK_SIZE: tl.constexpr,  # meta
):  # fmt: skip
    """x *= min(1, max_norm / (norm + 1e-6)) for one item; leaves at once where that is 1."""
    norm = tl.load(norm_ptr).to(tl.float64)
    bits = (max_norm_high.to(tl.int64) << 32) | (max_norm_low.to(tl.int64) & 0xFFFFFFFF)
    c = bits.to(tl.float64, bitcast=True) / (norm + _EPSILON)
    c = tl.where(c > 1.0, 1.0, c)
    finite = tl.abs(norm) < float("inf")
    zero = finite != finite
    if POLICY != "propagate":
        c = tl.where(finite, c, 1.0)
        if POLICY == "zero":
            zero = finite == 0
    if (c == 1.0) & (zero == 0):
        return
    a = tl.where(c < _SPLIT_BELOW, tl.where(c < _SPLIT_BELOW_LOWER, _SPLIT_FACTOR_LOWER, _SPLIT_FACTOR), 1.0)
    a = tl.where(c == 0.0, 1.0, a.to(tl.float64))
    b = c / a
    item = tl.program_id(0).to(tl.int64) + first_item
    _, address, start, begin, end, code = work_item(table_ptr, columns, blocks, item, BLOCK_SIZE)
    if FP64:
        _scale(address, start, begin, end, blocks, a, b, zero, tl.float64, BLOCK_SIZE)
    else:
        if code == _BFLOAT16:
            _scale(address, start, begin, end, blocks, a, b, zero, tl.bfloat16, BLOCK_SIZE)
        elif code == _FLOAT16:
            _scale(address, start, begin, end, blocks, a, b, zero, tl.float16, BLOCK_SIZE)
        else:
            _scale(address, start, begin, end, blocks, a, b, zero, tl.float32, BLOCK_SIZE)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs > 0:
        kernel[(programs,)](*arguments, **constants, num_warps=NUM_WARPS, enable_fp_fusion=True)


def norm(plan: Plan, count: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The 2-norm, its square, the flag and the index of the first tensor with a non-finite value; see norms.Norm.

    count: of all tensors, also those without elements, where the norm of each is asked for too.
    """
    items, table = plan.items, (plan.table, plan.columns, plan.blocks)
    # Below it, squares that float32 rounds to subnormals could weigh 1e-7 in the total.
    sound = float(np.float32(max(1e-30, plan.elements * 1e-38)))  # as a launch would cut it
    with torch.inference_mode(False), launching(plan.device):
        results = torch.empty(5, dtype=torch.int64, device=plan.device)
        scratch = torch.empty(5 * items, dtype=torch.float64, device=plan.device)
        sums = scratch if count is None else torch.empty(items, dtype=torch.float64, device=plan.device)
        _launch(norm_kernel, plan.narrow, *table, 0, sums, FP64=False, BLOCK_SIZE=BLOCK_SIZE)
        _launch(norm_kernel, items - plan.narrow, *table, plan.narrow, sums, FP64=True, BLOCK_SIZE=BLOCK_SIZE)
        _launch(finish_norm_kernel, 1, sums, items, sound, results)
        _launch(
            rescan_kernel, items, *table, items, results, scratch, None if count is None else sums,
            BLOCK_SIZE=BLOCK_SIZE, RESCAN_BLOCK=RESCAN_BLOCK,
        )  # fmt: skip
        _launch(finish_rescan_kernel, 1, scratch, items, results)
        if count is not None:
            make = torch.empty if plan.full else torch.zeros
            tensor_norms = make(count, dtype=torch.float64, device=plan.device)
            _launch(
                tensor_norms_kernel, plan.columns, *table, items, results, sums, scratch, tensor_norms,
                BLOCK_SIZE=BLOCK_SIZE,
            )  # fmt: skip
        reals = results.view(torch.float64)
        return (
            reals[NORM.value],
            reals[SUM_OF_SQUARES.value],
            results[FLAG.value].to(torch.int32),
            results[FIRST_NONFINITE.value],
            tensor_norms if count is not None else None,
        )


def scale(plan: Plan, norm: Tensor, max_norm: float, policy: str) -> None:
    """Multiply every element by min(1, max_norm / (norm + 1e-6)); `norm` is 0-d, on the device."""
    low, high = np.array([max_norm], dtype="<f8").view("<i4").tolist()
    with launching(plan.device):
        for fp64, first, items in ((False, 0, plan.narrow), (True, plan.narrow, plan.items - plan.narrow)):
            _launch(
                scale_kernel, items, plan.table, plan.columns, plan.blocks, first, norm, high, low,
                POLICY=policy, FP64=fp64, BLOCK_SIZE=BLOCK_SIZE,
            )  # fmt: skip
