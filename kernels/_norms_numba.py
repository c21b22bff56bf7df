"""The norm and the scaling on the CPU: sums of squares in float64 lanes, which cost no more than float32's.

Tensors are cut into units of _UNIT elements; each has one sum, and sums are added in order, whatever the threads are.
Sums may be reordered within a unit (reassoc), so that LLVM vectorises them, and fused with products (contract): the
same on every run, but not on a CPU with other vectors. No other fast-math flag: NaN and inf must come through.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import overload
from torch import Tensor

from ._common_numba import SOURCE, TAGS, bits, claim, compiled, pointer, real, rounded, share

ON_DEVICE = False

_UNIT = 1 << 16  # elements
_ALONE = 1 << 18  # elements: up to here a second thread costs more than it gives
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # by code
_WIDE = 3  # the code of float64

# Anderson's scaled sums: beyond BIG a square is taken of x * SHRINK, below TINY of x * GROW.
_BIG, _TINY = 2.0**486, 2.0**-511
_SHRINK, _GROW = 2.0**-538, 2.0**537

_F = np.float32
_HALF_SCALE = _F(2.0**112)


def _widened(x: Any, tag: Any) -> Any: ...


@overload(_widened, jit_options={"forceinline": True})
def _widened_overload(x, tag):
    """An element as the kernel holds it, as float32, or float64."""
    if tag == types.uint16:  # bfloat16

        def widened(x, tag):
            return real(np.int32(np.uint32(x) << np.uint32(16)))

    elif tag == types.int16:  # float16: moved into place, then scaled, which gets subnormals right

        def widened(x, tag):
            h = np.uint32(np.uint16(x))
            b = (h & np.uint32(0x7FFF)) << np.uint32(13)
            y = real(np.int32(b)) * _HALF_SCALE
            special = real(np.int32(b | np.uint32(0x7F800000)))
            y = special if (h & np.uint32(0x7C00)) == np.uint32(0x7C00) else y
            return real(np.int32(np.uint32(bits(y)) | ((h & np.uint32(0x8000)) << np.uint32(16))))

    else:

        def widened(x, tag):
            return x

    return widened


def _scaled(x: Any, a: Any, b: Any, tag: Any) -> Any: ...


@overload(_scaled, jit_options={"forceinline": True})
def _scaled_overload(x, a, b, tag):
    """x * a * b, rounded to the element type. NaN stays NaN."""
    if tag == types.float64:

        def scaled(x, a, b, tag):
            return x * a * b

    elif tag == types.float32:

        def scaled(x, a, b, tag):
            return x * np.float32(a) * np.float32(b)

    else:
        quiet = np.uint16(0x7FC0) if tag == types.uint16 else np.int16(0x7E00)

        def scaled(x, a, b, tag):
            y = _widened(x, tag) * np.float32(a) * np.float32(b)
            return quiet if y != y else rounded(y, tag)

    return scaled


@njit(forceinline=True)
def _sum_squares(x, tag):
    total = 0.0
    for i in range(len(x)):
        y = np.float64(_widened(x[i], tag))
        total += y * y
    return total


@njit(forceinline=True)
def _flags(x, tag):
    flag = 0
    for i in range(len(x)):
        y = _widened(x[i], tag)
        flag |= (y != y) * 1 | (y == np.inf) * 2 | (y == -np.inf) * 4
    return flag


@njit(forceinline=True)
def _unit(address, count, ends, tag, unit):
    """The elements of a unit."""
    column = np.searchsorted(ends, unit, side="right")
    before = ends[column - 1] if column > 0 else 0
    low = (unit - before) * _UNIT
    memory = carray(pointer(address[column], tag), count[column])
    return memory[low : min(low + _UNIT, count[column])]


_MADE_OF = zlib.crc32(SOURCE)  # what numba's cache does not see: the file whose functions are compiled in


def _make_sums(fingerprint: int) -> Any:
    def sums(address, count, ends, tag, counter, out):
        _ = fingerprint
        while True:
            unit = claim(counter)
            if unit >= ends[-1]:
                break
            out[unit] = _sum_squares(_unit(address, count, ends, tag, unit), tag)

    return compiled(sums, fastmath={"reassoc", "contract"})


def _make_looks(fingerprint: int) -> Any:
    def looks(address, count, ends, tag, units, out):
        _ = fingerprint
        for i in range(len(units)):
            out[i] = _flags(_unit(address, count, ends, tag, units[i]), tag)

    return compiled(looks)


def _make_safe_sums(fingerprint: int) -> Any:
    def safe_sums(address, count, ends, tag, counter, out):
        _ = fingerprint
        while True:
            unit = claim(counter)
            if unit >= ends[-1]:
                break
            x = _unit(address, count, ends, tag, unit)
            big = mid = tiny = 0.0
            for i in range(len(x)):
                y = abs(np.float64(x[i]))
                if y > _BIG:
                    big += (y * _SHRINK) * (y * _SHRINK)
                elif y < _TINY:
                    tiny += (y * _GROW) * (y * _GROW)
                else:
                    mid += y * y
            out[unit, 0], out[unit, 1], out[unit, 2] = big, mid, tiny

    return compiled(safe_sums)


def _make_scale(fingerprint: int) -> Any:
    def scale(address, count, ends, tag, counter, a, b):
        _ = fingerprint
        while True:
            unit = claim(counter)
            if unit >= ends[-1]:
                break
            # From the end: what the norm has read last may still be in the cache.
            x = _unit(address, count, ends, tag, ends[-1] - 1 - unit)
            for i in range(len(x)):
                x[i] = _scaled(x[i], a, b, tag)

    return compiled(scale)


_sums, _looks = _make_sums(_MADE_OF), _make_looks(_MADE_OF)
_safe_sums, _scale = _make_safe_sums(_MADE_OF), _make_scale(_MADE_OF)


class _Group:
    """The tensors of one dtype, cut into units."""

    def __init__(self, entries: Any, code: int) -> None:
        codes = np.array(entries.code, dtype=np.int8)
        mine = codes == code
        self.code, self.tag = code, TAGS[_DTYPES[code]]
        self.address = np.array(entries.address, dtype=np.int64)[mine]
        self.count = np.array(entries.length, dtype=np.int64)[mine]
        self.number = np.array(entries.number, dtype=np.int64)[mine]
        self.ends = ((self.count + (_UNIT - 1)) // _UNIT).cumsum()
        self.units = int(self.ends[-1])

    def run(self, kernel: Callable[..., object], *arguments: Any) -> None:
        """kernel(address, count, ends, tag, counter, ...) on torch.get_num_threads() threads, which claim units.

        They claim them inside compiled code: a thread that has to share its core, as with one of torch's that still
        spins, must not hold up the others by holding Python's lock.
        """
        counter = np.zeros(1, dtype=np.int64)

        def work(_: int) -> None:
            kernel(self.address, self.count, self.ends, self.tag, counter.ctypes.data, *arguments)

        threads = torch.get_num_threads() if int(self.count.sum()) > _ALONE else 1
        share(range(threads), work, threads)


def _apart(start: np.ndarray[Any, Any], nbytes: np.ndarray[Any, Any]) -> bool:
    order = start.argsort()
    return bool(((start + nbytes)[order][:-1] <= start[order][1:]).all())


class _Plan(NamedTuple):
    groups: list[_Group]
    apart: bool  # whether no two tensors share memory


def prepare(entries: Any, device: torch.device) -> _Plan:
    """What `norm` and `scale` work by."""
    groups = [_Group(entries, code) for code in sorted(set(entries.code))]
    start = np.concatenate([group.address for group in groups]) if groups else np.empty(0, dtype=np.int64)
    nbytes = [group.count * _DTYPES[group.code].itemsize for group in groups]
    return _Plan(groups, _apart(start, np.concatenate(nbytes) if groups else start))


def norm(plan: _Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 2-norm, its square, the flag word and the number of the first bad tensor; see grad_norm.Norm."""
    power, flag, first = 0.0, 0, -1
    wide: _Group | None = None
    for group in plan.groups:
        sums = np.empty(group.units)
        group.run(_sums, sums)
        total = float(sums.sum())
        bad = None if math.isfinite(total) else np.flatnonzero(~np.isfinite(sums))
        if bad is not None:
            flags = np.empty(len(bad), dtype=np.int64)
            _looks(group.address, group.count, group.ends, group.tag, bad, flags)
            flag |= int(np.bitwise_or.reduce(flags, initial=0))
            if flags.any():
                unit = bad[flags != 0][0]
                number = int(group.number[np.searchsorted(group.ends, unit, side="right")])
                first = number if first < 0 else min(first, number)
        # In float64 squares of finite elements overflow, or lose bits below the normal range.
        if group.code == _WIDE and not (2.0**-960 * int(group.count.sum()) <= total < math.inf):
            wide = group
            continue
        power += total
    if flag:
        power = math.nan if flag & 1 else math.inf
    exact = math.sqrt(power)
    if wide is not None and not flag:
        parts = np.empty((wide.units, 3))
        wide.run(_safe_sums, parts)
        big, mid, tiny = parts.sum(0).tolist()
        mid = math.sqrt(mid + power)
        exact = math.hypot(math.sqrt(big) / _SHRINK, mid) if big > 0.0 else math.hypot(mid, math.sqrt(tiny) / _GROW)
        power = exact * exact
    return (
        torch.tensor(exact, dtype=torch.float64, device="cpu"),
        torch.tensor(power, dtype=torch.float64, device="cpu"),
        torch.tensor(flag, dtype=torch.int32, device="cpu"),
        torch.tensor(first, dtype=torch.int64, device="cpu"),
    )


def scale(plan: _Plan, a: float, b: float) -> None:
    """Multiply every element by a and then by b, in float32 (float64 for float64), and round once."""
    for group in reversed(plan.groups):
        group.run(_scale, a, b)
