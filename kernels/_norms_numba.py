"""The norm and the scaling on the CPU: sums of squares in float64 lanes, which cost no more than float32's.

Tensors are cut into blocks of BLOCK_SIZE elements; each has one sum, and sums are added in order, whatever the threads
are. Sums may be reordered within a block (reassoc), so that LLVM vectorises them, and fused with products (contract):
the same on every run, but not on a CPU with other vectors. No other fast-math flag: NaN and inf must come through.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import overload
from torch import Tensor

from ._common_numba import SOURCE, TAGS, bits, claim, compiled, compiled_job, pointer, real, rounded, run_on_all
from .norms import BIG, DTYPES, GROW, NAN, NEGATIVE_INF, POSITIVE_INF, SHRINK, TINY, Entries

ON_DEVICE = False

BLOCK_SIZE = 1 << 16  # elements
ONE_THREAD = 1 << 18  # elements: up to here a second thread costs more than it gives
_FLOAT64 = DTYPES.index(torch.float64)
_SOUND = 2.0**-960  # for each element: a sum of squares below it may have lost bits, in float64
_HALF_SCALE = np.float32(2.0**112)


def _widened(x: Any, tag: Any) -> Any: ...


@overload(_widened, jit_options={"forceinline": True})
def _widened_overload(x, tag):
    """An element, as the kernel loads it, in float32; in float64 if it is of that."""
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
        flag |= (y != y) * NAN | (y == np.inf) * POSITIVE_INF | (y == -np.inf) * NEGATIVE_INF
    return flag


@njit(forceinline=True)
def _elements(addresses, lengths, ends, tag, block):
    """The elements of a block. ends: of the tensors, in blocks."""
    i = np.searchsorted(ends, block, side="right")
    before = ends[i - 1] if i > 0 else 0
    start = (block - before) * BLOCK_SIZE
    x = carray(pointer(addresses[i], tag), lengths[i])
    return x[start : min(start + BLOCK_SIZE, lengths[i])]


# What numba's cache does not see: the file whose functions are compiled in, and the constants of the op's page.
_CONSTANTS = (NAN, POSITIVE_INF, NEGATIVE_INF, BIG, TINY, SHRINK, GROW)
_FINGERPRINT = zlib.crc32(repr(_CONSTANTS).encode(), zlib.crc32(SOURCE))


@njit(forceinline=True)
def _unpacked(job):
    """What `_DtypeGroup.run` packs: addresses, lengths, ends, the counter's address, two arguments as they are."""
    x = carray(pointer(job, np.int64(0)), 7)
    integers = np.int64(0)
    return (
        carray(pointer(x[0], integers), x[3]),
        carray(pointer(x[1], integers), x[3]),
        carray(pointer(x[2], integers), x[3]),
        job + 32,
        x[5],
        x[6],
    )


# Jobs, compiled for each dtype: all threads run one, and each claims blocks until none is left.


@functools.cache
def _block_sums(code: int) -> Any:
    fingerprint, tag = _FINGERPRINT, TAGS[DTYPES[code]]

    def block_sums(job):
        _ = fingerprint
        addresses, lengths, ends, counter, out_address, _none = _unpacked(job)
        out = carray(pointer(out_address, np.float64(0)), ends[-1])
        while True:
            block = claim(counter)
            if block >= ends[-1]:
                break
            out[block] = _sum_squares(_elements(addresses, lengths, ends, tag, block), tag)

    return compiled_job(block_sums, fastmath={"reassoc", "contract"})


@functools.cache
def _scaled_sums(code: int) -> Any:
    fingerprint, tag = _FINGERPRINT, TAGS[DTYPES[code]]

    def scaled_sums(job):
        _ = fingerprint
        addresses, lengths, ends, counter, out_address, _none = _unpacked(job)
        out = carray(pointer(out_address, np.float64(0)), (ends[-1], 3))
        while True:
            block = claim(counter)
            if block >= ends[-1]:
                break
            x = _elements(addresses, lengths, ends, tag, block)
            big = mid = tiny = 0.0
            for i in range(len(x)):
                y = abs(np.float64(x[i]))
                if y > BIG:
                    big += (y * SHRINK) * (y * SHRINK)
                elif y < TINY:
                    tiny += (y * GROW) * (y * GROW)
                else:
                    mid += y * y
            out[block, 0], out[block, 1], out[block, 2] = big, mid, tiny

    return compiled_job(scaled_sums)


@functools.cache
def _scale(code: int) -> Any:
    fingerprint, tag = _FINGERPRINT, TAGS[DTYPES[code]]

    def scale(job):
        _ = fingerprint
        addresses, lengths, ends, counter, a_bits, b_bits = _unpacked(job)
        a, b = np.int64(a_bits).view(np.float64), np.int64(b_bits).view(np.float64)
        while True:
            block = claim(counter)
            if block >= ends[-1]:
                break
            # From the end: what the norm has read last may still be in the cache.
            x = _elements(addresses, lengths, ends, tag, ends[-1] - 1 - block)
            for i in range(len(x)):
                x[i] = _scaled(x[i], a, b, tag)

    return compiled_job(scale)


def _make_block_flags(fingerprint: int) -> Any:
    def block_flags(addresses, lengths, ends, tag, blocks, out):
        _ = fingerprint
        for i in range(len(blocks)):
            out[i] = _flags(_elements(addresses, lengths, ends, tag, blocks[i]), tag)

    return compiled(block_flags)


_block_flags = _make_block_flags(_FINGERPRINT)


class _DtypeGroup:
    """The tensors of one dtype, cut into blocks. `selected` says which entries they are."""

    def __init__(self, entries: Entries, code: int, selected: np.ndarray[Any, Any]) -> None:
        self.code, self.tag, self.selected = code, TAGS[DTYPES[code]], selected
        self.addresses = np.array(entries.addresses, dtype=np.int64)[selected]
        self.lengths = np.array(entries.lengths, dtype=np.int64)[selected]
        self.indices = np.array(entries.indices, dtype=np.int64)[selected]
        self.ends = ((self.lengths + (BLOCK_SIZE - 1)) // BLOCK_SIZE).cumsum()
        self.blocks = int(self.ends[-1])
        arrays = (self.addresses, self.lengths, self.ends)
        self.job = np.array([*(array.ctypes.data for array in arrays), len(self.ends), 0, 0, 0], dtype=np.int64)

    def per_tensor(self, sums: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Sums of blocks, added up in order: a row for each tensor."""
        return np.add.reduceat(sums, np.concatenate([[0], self.ends[:-1]]))

    def run(self, kernel: Callable[[int], Any], *arguments: Any) -> None:
        """Runs `kernel`'s job, with up to two arrays or floats, on torch.get_num_threads() threads, which claim blocks.

        They claim them inside compiled code: a thread that has to share its core, as with one of torch's that still
        spins, must not hold up the others by holding Python's lock.
        """
        job = self.job.copy()
        for i, x in enumerate(arguments):
            job[5 + i] = x.ctypes.data if isinstance(x, np.ndarray) else np.float64(x).view(np.int64)
        threads = torch.get_num_threads() if int(self.lengths.sum()) > ONE_THREAD else 1
        run_on_all(kernel(self.code), job.ctypes.data, threads)


class _Plan(NamedTuple):
    groups: list[_DtypeGroup]
    disjoint: bool  # whether no two tensors share memory
    entries: Entries


def prepare(entries: Entries, device: torch.device) -> _Plan:
    """What `norm` and `scale` work by."""
    codes = np.array(entries.codes, dtype=np.int8)
    groups = [_DtypeGroup(entries, code, codes == code) for code in sorted(set(entries.codes))]
    start = np.concatenate([group.addresses for group in groups]) if groups else np.empty(0, dtype=np.int64)
    nbytes = [group.lengths * DTYPES[group.code].itemsize for group in groups]
    return _Plan(groups, _disjoint(start, np.concatenate(nbytes) if groups else start), entries)


def _disjoint(start: np.ndarray[Any, Any], nbytes: np.ndarray[Any, Any]) -> bool:
    order = start.argsort()
    return bool(((start + nbytes)[order][:-1] <= start[order][1:]).all())


def norm(plan: _Plan, count: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The 2-norm, its square, the flag and the index of the first tensor with a non-finite value; see norms.Norm.

    count: of all tensors, also those without elements, where the norm of each is asked for too.
    """
    power, flag, first = 0.0, 0, -1
    tensor_norms = None if count is None else np.zeros(count)
    rescanned: _DtypeGroup | None = None
    for group in plan.groups:
        sums = np.empty(group.blocks)
        group.run(_block_sums, sums)
        total = float(sums.sum())
        if tensor_norms is not None:
            tensor_norms[_places(plan.entries, group.selected)] = _tensor_norms(plan.entries, group, sums)
        bad = None if math.isfinite(total) else np.flatnonzero(~np.isfinite(sums))
        if bad is not None:
            flags = np.empty(len(bad), dtype=np.int64)
            _block_flags(group.addresses, group.lengths, group.ends, group.tag, bad, flags)
            flag |= int(np.bitwise_or.reduce(flags, initial=0))
            if flags.any():
                block = bad[flags != 0][0]
                index = int(group.indices[np.searchsorted(group.ends, block, side="right")])
                first = index if first < 0 else min(first, index)
        # In float64 squares of finite elements overflow, or lose bits below the normal range.
        if group.code == _FLOAT64 and not (_SOUND * int(group.lengths.sum()) <= total < math.inf):
            rescanned = group
            continue
        power += total
    if flag:
        power = math.nan if flag & NAN else math.inf
    norm64 = math.sqrt(power)
    if rescanned is not None and not flag:
        sums = np.empty((rescanned.blocks, 3))
        rescanned.run(_scaled_sums, sums)
        big, mid, tiny = sums.sum(0).tolist()
        mid = math.sqrt(mid + power)
        norm64 = math.hypot(math.sqrt(big) / SHRINK, mid) if big > 0.0 else math.hypot(mid, math.sqrt(tiny) / GROW)
        power = norm64 * norm64
    return (
        torch.tensor(norm64, dtype=torch.float64, device="cpu"),
        torch.tensor(power, dtype=torch.float64, device="cpu"),
        torch.tensor(flag, dtype=torch.int32, device="cpu"),
        torch.tensor(first, dtype=torch.int64, device="cpu"),
        None if tensor_norms is None else torch.from_numpy(tensor_norms),
    )


def _places(entries: Entries, selected: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where these entries are among all tensors."""
    return selected.nonzero()[0] if entries.places is None else np.array(entries.places)[selected]


def _tensor_norms(entries: Entries, group: _DtypeGroup, sums: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The norm of each tensor from its blocks' sums. Tensors of float64 whose own sum is not sound are read again."""
    with np.errstate(over="ignore", invalid="ignore"):
        totals = group.per_tensor(sums)
    norms: np.ndarray[Any, Any] = np.sqrt(totals)
    if group.code == _FLOAT64:
        unsound = ~((totals >= _SOUND * group.lengths) & (totals < math.inf))
        if unsound.any():
            norms[unsound] = _scaled_norms(_DtypeGroup(entries, group.code, group.selected.nonzero()[0][unsound]))
    return norms


def _scaled_norms(group: _DtypeGroup) -> np.ndarray[Any, Any]:
    sums = np.empty((group.blocks, 3))
    group.run(_scaled_sums, sums)
    big, mid, tiny = group.per_tensor(sums).T
    middle = np.sqrt(mid)
    with np.errstate(over="ignore"):
        large = np.hypot(np.sqrt(big) / SHRINK, middle)
    norms: np.ndarray[Any, Any] = np.where(big > 0.0, large, np.hypot(middle, np.sqrt(tiny) / GROW))
    norms[np.isnan(mid)] = math.nan  # hypot(inf, NaN) is inf
    return norms


def scale(plan: _Plan, a: float, b: float) -> None:
    """Multiply every element by a and then by b, in float32 (float64 for float64), and round once."""
    for group in reversed(plan.groups):
        group.run(_scale, a, b)
