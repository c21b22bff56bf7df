"""The norm and the scaling on the GPU: one launch for the tensors of a device, whatever their number and dtypes.

A table has a column for each tensor. The work is cut into units of up to `chunks` chunks of CHUNK elements of one
tensor, from a multiple of 16 bytes on, and a unit finds its column by bisection. Every unit writes one sum; a single
program adds them up in order, so that equal gradients give equal bits. Where the total overflows or vanishes, a second
look reads again, in float64; its programs are launched always, read the total, and leave at once where it is sound. So
nothing waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common_triton import INTERPRETED, find, launching, on_device, rounded, table_jit, widened

ON_DEVICE = True

CHUNK = 4096  # elements that a program of WARPS warps reads at once: 32 a thread
WARPS = 4
SMALL = 512  # as CHUNK, in a second look
UNITS = 1 << 14  # about so many: enough for any GPU, few enough for one program to add up
_INTERPRETED = tl.constexpr(INTERPRETED)
_PARTS = tl.constexpr(1 if INTERPRETED else 8)  # of a chunk that is not full, so that it doesn't set the register count
_SUMMED = tl.constexpr(8)  # squares added in float32 before they go to float64
_BLOCK = tl.constexpr(1024)  # sums that the last program adds at once

_BFLOAT16, _FLOAT16, _FLOAT64 = (tl.constexpr(code) for code in (1, 2, 3))  # float32 is 0
_ITEMSIZE = np.array([4, 2, 2, 8])  # by code

# Anderson's scaled sums: beyond BIG a square is taken of x * SHRINK, below TINY of x * GROW.
_BIG, _TINY = tl.constexpr(2.0**486), tl.constexpr(2.0**-511)
_SHRINK, _GROW = tl.constexpr(2.0**-538), tl.constexpr(2.0**537)

_SMALL, _FIRST = tl.constexpr(2.0**-100), tl.constexpr(2.0**-64)  # as in norms.py
_SMALLER, _LEAST = tl.constexpr(2.0**-164), tl.constexpr(2.0**-126)
_EPSILON = tl.constexpr(1e-6)
_NOWHERE = tl.constexpr((1 << 63) - 1)

# Rows of the table: 0 the tensor's first unit, 1 its address, rounded down to 16 bytes, 2 where its elements begin,
# counted from there, 3 where they end, 4 the dtype's code, 5 its number.


@triton.jit
def _lanes(x):
    """Squares, in sums of neighbours that one thread holds: in float32 (float64 for float64), then in float64."""
    x = widened(x, _INTERPRETED)
    return tl.sum((x * x).reshape(x.shape[0] // _SUMMED, _SUMMED), axis=1).to(tl.float64)


@triton.jit
def full_squares(address, at, ELEMENT: tl.constexpr, CHUNK: tl.constexpr):
    """A whole chunk at a multiple of 16 bytes."""
    start = tl.multiple_of((address.to(tl.pointer_type(ELEMENT)) + at), 16)
    return _lanes(tl.load(start + tl.arange(0, CHUNK)))


@triton.jit
def _sum_squares(address, at, begin, end, chunks, ELEMENT: tl.constexpr, CHUNK: tl.constexpr):
    """The sum of squares of elements [begin, end) that lie in `chunks` chunks from `at` on."""
    total = tl.zeros([CHUNK // _SUMMED], tl.float64)
    rest = tl.zeros([CHUNK // _PARTS // _SUMMED], tl.float64)
    for _ in range(chunks):
        if at < end:
            if (at >= begin) & (at + CHUNK <= end):
                total += full_squares(address, at, ELEMENT, CHUNK)
            else:
                for i in range(_PARTS):
                    place = at + i * (CHUNK // _PARTS) + tl.arange(0, CHUNK // _PARTS)
                    x = tl.load(
                        address.to(tl.pointer_type(ELEMENT)) + place, mask=(place >= begin) & (place < end), other=0.0
                    )
                    rest += _lanes(x)
        at += CHUNK
    return tl.sum(total) + tl.sum(rest)


@triton.jit
def _unit(table, columns, chunks, unit, CHUNK: tl.constexpr):
    """Where a unit's work lies: its column, address, place of its first chunk, begin and end of elements, dtype."""
    entry = table + find(table, columns, unit)
    at = (unit - tl.load(entry)) * chunks * CHUNK
    address = tl.load(entry + columns)
    begin = tl.load(entry + 2 * columns)
    end = tl.load(entry + 3 * columns)
    return entry, address, at, begin, end, tl.load(entry + 4 * columns)


@table_jit
def norm_units(table, columns, chunks, first_unit, sums, WIDE: tl.constexpr, CHUNK: tl.constexpr):
    """The sum of squares of one unit. WIDE: of float64 tensors, whose arithmetic would cost the others registers."""
    unit = tl.program_id(0).to(tl.int64) + first_unit
    _, address, at, begin, end, code = _unit(table, columns, chunks, unit, CHUNK)
    if WIDE:
        total = _sum_squares(address, at, begin, end, chunks, tl.float64, CHUNK)
    else:
        if code == _BFLOAT16:
            total = _sum_squares(address, at, begin, end, chunks, tl.bfloat16, CHUNK)
        elif code == _FLOAT16:
            total = _sum_squares(address, at, begin, end, chunks, tl.float16, CHUNK)
        else:
            total = _sum_squares(address, at, begin, end, chunks, tl.float32, CHUNK)
    tl.store(sums + unit, total)


@triton.jit
def _add_up(sums, count):
    total = tl.zeros([_BLOCK], tl.float64)
    for i in range(0, count, _BLOCK):
        place = i + tl.arange(0, _BLOCK)
        total += tl.load(sums + place, mask=place < count, other=0.0)
    return tl.sum(total)


# `results` are 64-bit words: 0 the norm and 1 its square, as float64; 2 the flag word, 3 the number of the first bad
# tensor, 4 whether the total calls for a second look.


@triton.jit(do_not_specialize=["units", "sound"])
def finish_norm(sums, units, sound, results):
    """Adds up the units' sums; below `sound`, or beyond float64 or not a number, the total is not to be believed."""
    total = _add_up(sums, units)
    tl.store(results.to(tl.pointer_type(tl.float64)), tl.sqrt(total))
    tl.store(results.to(tl.pointer_type(tl.float64)) + 1, total)
    tl.store(results + 2, tl.zeros([], tl.int64))
    tl.store(results + 3, tl.full([], -1, tl.int64))
    tl.store(results + 4, tl.where((total >= sound) & (total < float("inf")), 0, 1).to(tl.int64))


@triton.jit
def _look(address, at, begin, end, chunks, ELEMENT: tl.constexpr, CHUNK: tl.constexpr):
    """Sums of squares in float64, big, middling and tiny ones apart, of finite elements; and the flag word."""
    big = tl.zeros([CHUNK], tl.float64)
    mid = tl.zeros([CHUNK], tl.float64)
    tiny = tl.zeros([CHUNK], tl.float64)
    flag = tl.zeros([CHUNK], tl.int32)
    for _ in range(chunks):
        if at < end:
            place = at + tl.arange(0, CHUNK)
            x = tl.load(address.to(tl.pointer_type(ELEMENT)) + place, mask=(place >= begin) & (place < end), other=0.0)
            x = widened(x, _INTERPRETED).to(tl.float64)
            inf = float("inf")
            flag |= tl.where(x != x, 1, tl.where(x == inf, 2, tl.where(x == -inf, 4, 0)))
            x = tl.abs(tl.where(tl.abs(x) < inf, x, 0.0))
            up = tl.where(x > _BIG, x * _SHRINK, 0.0)
            down = tl.where(x < _TINY, x * _GROW, 0.0)
            x = tl.where((x > _BIG) | (x < _TINY), 0.0, x)
            big += up * up
            mid += x * x
            tiny += down * down
        at += CHUNK
    word = tl.max(flag & 1) | tl.max(flag & 2) | tl.max(flag & 4)
    return tl.sum(big), tl.sum(mid), tl.sum(tiny), word


@table_jit
def look_units(table, columns, chunks, units, results, sums, CHUNK: tl.constexpr, SMALL: tl.constexpr):
    """The second look at one unit, where the first calls for it."""
    if tl.load(results + 4) == 0:
        return
    unit = tl.program_id(0).to(tl.int64)
    entry, address, at, begin, end, code = _unit(table, columns, chunks, unit, CHUNK)
    pieces = chunks * (CHUNK // SMALL)
    if code == _BFLOAT16:
        big, mid, tiny, flag = _look(address, at, begin, end, pieces, tl.bfloat16, SMALL)
    elif code == _FLOAT16:
        big, mid, tiny, flag = _look(address, at, begin, end, pieces, tl.float16, SMALL)
    elif code == _FLOAT64:
        big, mid, tiny, flag = _look(address, at, begin, end, pieces, tl.float64, SMALL)
    else:
        big, mid, tiny, flag = _look(address, at, begin, end, pieces, tl.float32, SMALL)
    tl.store(sums + unit, big)
    tl.store(sums + units + unit, mid)
    tl.store(sums + 2 * units + unit, tiny)
    words = sums.to(tl.pointer_type(tl.int64)) + 3 * units
    tl.store(words + unit, flag.to(tl.int64))
    tl.store(words + units + unit, tl.where(flag != 0, tl.load(entry + 5 * columns), _NOWHERE))


@triton.jit(do_not_specialize=["units"])
def finish_look(sums, units, results):
    """Adds up the second detect_nonfinite, where there was one."""
    if tl.load(results + 4) == 0:
        return
    big = _add_up(sums, units)
    mid = _add_up(sums + units, units)
    tiny = _add_up(sums + 2 * units, units)
    words = sums.to(tl.pointer_type(tl.int64)) + 3 * units
    flags = tl.zeros([_BLOCK], tl.int64)
    firsts = tl.full([_BLOCK], _NOWHERE, tl.int64)
    for i in range(0, units, _BLOCK):
        place = i + tl.arange(0, _BLOCK)
        flags |= tl.load(words + place, mask=place < units, other=0)
        firsts = tl.minimum(firsts, tl.load(words + units + place, mask=place < units, other=_NOWHERE))
    flag = tl.max(flags & 1) | tl.max(flags & 2) | tl.max(flags & 4)
    first = tl.min(firsts)
    # What is left out beside a larger sum is below half a unit in its last place, or is added with its scale.
    middle = tl.sqrt(mid)
    a = tl.sqrt(big)
    b = middle * _SHRINK
    c = tl.sqrt(tiny)
    large = tl.sqrt(a * a + b * b) / _SHRINK
    small = tl.sqrt(mid + (c / _GROW) * (c / _GROW))
    small = tl.where(mid == 0.0, c / _GROW, small)
    norm = tl.where(big > 0.0, large, small)
    norm = tl.where(flag == 0, norm, tl.where((flag & 1) != 0, float("nan"), float("inf")))
    tl.store(results.to(tl.pointer_type(tl.float64)), norm)
    tl.store(results.to(tl.pointer_type(tl.float64)) + 1, norm * norm)
    tl.store(results + 2, flag)
    tl.store(results + 3, tl.where(flag != 0, first, -1))


# ---------------------------------------------------------------------------------------------------------------
# Scaling


@triton.jit
def _times(x, a, b, zero, ELEMENT: tl.constexpr):
    """x * a * b, rounded once, or 0."""
    y = widened(x, _INTERPRETED)
    # In float64 the product of the factors is exact enough, in float32 it might be subnormal.
    y = tl.where(zero, 0.0, y * a.to(y.dtype) * b.to(y.dtype))
    return rounded(y, ELEMENT, _INTERPRETED)


@triton.jit
def full_scale(address, at, a, b, zero, ELEMENT: tl.constexpr, CHUNK: tl.constexpr):
    """A whole chunk at a multiple of 16 bytes."""
    start = tl.multiple_of(address.to(tl.pointer_type(ELEMENT)) + at, 16)
    place = start + tl.arange(0, CHUNK)
    tl.store(place, _times(tl.load(place), a, b, zero, ELEMENT))


@triton.jit
def _scale(
    address, at, begin, end, chunks, a, b, zero,
    ELEMENT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    for _ in range(chunks):
        if at < end:
            if (at >= begin) & (at + CHUNK <= end):
                full_scale(address, at, a, b, zero, ELEMENT, CHUNK)
            else:
                for i in range(_PARTS):
                    place = at + i * (CHUNK // _PARTS) + tl.arange(0, CHUNK // _PARTS)
                    inside = (place >= begin) & (place < end)
                    memory = address.to(tl.pointer_type(ELEMENT)) + place
                    x = tl.load(memory, mask=inside, other=0.0)
                    tl.store(memory, _times(x, a, b, zero, ELEMENT), mask=inside)
        at += CHUNK


@table_jit
def scale_units(
    table, columns, chunks, first_unit, norm, high, low,
    POLICY: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scales one unit by min(1, (high + low) / (norm + 1e-6)); leaves at once where that is 1."""
    n = tl.load(norm).to(tl.float64)
    c = high / (n + _EPSILON) + low / (n + _EPSILON)
    c = tl.where(c > 1.0, 1.0, c)
    good = tl.abs(n) < float("inf")
    zero = good != good
    if POLICY != "propagate":
        c = tl.where(good, c, 1.0)
        if POLICY == "zero":
            zero = good == 0
    if (c == 1.0) & (zero == 0):
        return
    a = tl.where(c < _SMALL, tl.where(c < _SMALLER, _LEAST, _FIRST), 1.0).to(tl.float64)
    a = tl.where(c == 0.0, 1.0, a)
    b = c / a
    unit = tl.program_id(0).to(tl.int64) + first_unit
    _, address, at, begin, end, code = _unit(table, columns, chunks, unit, CHUNK)
    if WIDE:
        _scale(address, at, begin, end, chunks, a, b, zero, tl.float64, CHUNK)
    else:
        if code == _BFLOAT16:
            _scale(address, at, begin, end, chunks, a, b, zero, tl.bfloat16, CHUNK)
        elif code == _FLOAT16:
            _scale(address, at, begin, end, chunks, a, b, zero, tl.float16, CHUNK)
        else:
            _scale(address, at, begin, end, chunks, a, b, zero, tl.float32, CHUNK)


# ---------------------------------------------------------------------------------------------------------------
# The host's side


class _Plan(NamedTuple):
    """Tensors on the device's side, and how the work is cut."""

    device: torch.device
    apart: bool  # whether no two of them share memory
    table: Tensor
    columns: int
    chunks: int
    narrow: int  # units of tensors that are not float64; theirs come first
    units: int
    elements: int


# By device, stream and what was asked: gradients lie where they lay in the step before, nearly always.
_plans: OrderedDict[tuple[torch.device, int, bytes], _Plan] = OrderedDict()
_KEPT = 16


def prepare(entries: Any, device: torch.device) -> _Plan:
    """The plan of an earlier call where addresses, lengths, dtypes and numbers are the same."""
    given = np.array(entries, dtype=np.int64)
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    key = (device, stream, given.tobytes())
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = _make_plan(given, device)
        while len(_plans) > _KEPT:
            _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    return found


def _make_plan(given: np.ndarray[Any, Any], device: torch.device) -> _Plan:
    address, length, code, number = given[:, np.argsort(given[2] == _FLOAT64.value, kind="stable")]
    size = _ITEMSIZE[code]
    order = address.argsort()
    apart = bool(((address + length * size)[order][:-1] <= address[order][1:]).all())
    begin = address % 16 // size
    end = begin + length
    elements = int(length.sum())
    chunks = max(1, elements // (UNITS * CHUNK))
    units = (end + (chunks * CHUNK - 1)) // (chunks * CHUNK)
    ends = units.cumsum()
    table = on_device([np.stack([ends - units, address - begin * size, begin, end, code, number])], device)
    narrow = int(units[code != _FLOAT64.value].sum())
    return _Plan(device, apart, table, len(length), chunks, narrow, int(units.sum()), elements)


def _launch(kernel: Any, units: int, *arguments: Any, **constants: Any) -> None:
    if units > 0:
        kernel[(units,)](*arguments, **constants, num_warps=WARPS)


def norm(plan: _Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 2-norm, its square, the flag word and the number of the first bad tensor; see grad_norm.Norm."""
    units, table = plan.units, (plan.table, plan.columns, plan.chunks)
    # Below it, squares that float32 rounds to subnormals could weigh 1e-7 in the total.
    sound = max(1e-30, plan.elements * 1e-38)
    with torch.inference_mode(False), launching(plan.device):
        results = torch.empty(5, dtype=torch.int64, device=plan.device)
        sums = torch.empty(5 * units, dtype=torch.float64, device=plan.device)
        _launch(norm_units, plan.narrow, *table, 0, sums, WIDE=False, CHUNK=CHUNK)
        _launch(norm_units, units - plan.narrow, *table, plan.narrow, sums, WIDE=True, CHUNK=CHUNK)
        _launch(finish_norm, 1, sums, units, sound, results)
        _launch(look_units, units, *table, units, results, sums, CHUNK=CHUNK, SMALL=SMALL)
        _launch(finish_look, 1, sums, units, results)
        reals = results.view(torch.float64)
        return reals[0], reals[1], results[2].to(torch.int32), results[3]


def scale(plan: _Plan, norm: Tensor, max_norm: float, policy: str) -> None:
    """Multiply every element by min(1, max_norm / (norm + 1e-6)); `norm` is 0-d, on the device."""
    high = float(np.float32(max_norm))  # a launch takes numbers as float32
    low = max_norm - high if abs(high) < float("inf") else 0.0
    with launching(plan.device):
        for wide, first, units in ((False, 0, plan.narrow), (True, plan.narrow, plan.units - plan.narrow)):
            _launch(
                scale_units, units, plan.table, plan.columns, plan.chunks, first, norm, high, low,
                POLICY=policy, WIDE=wide, CHUNK=CHUNK,
            )  # fmt: skip
