"""Sampling on the CPU: the maps of stream.py as scalar code that LLVM vectorises.

One kernel template, `_fill_rows`; the type of its `tag` argument selects the dtype and the type of `m` the map.
Random words stay in uint64 lanes and are masked only before a product, so that it becomes one vpmuludq for eight lanes.
No fast-math: every + - x is rounded on its own, as the stream demands.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import overload
from torch import Tensor

from .._common_numba import SOURCE, TAGS, bits, compiled, pointer, real, rounded, share
from ..region import StridedRun
from . import stream
from .stream import CentreMap, FarMap, Map, NarrowMap, NormalMap, TailMap, UniformMap

_TASK = 1 << 19  # elements: below it a second thread costs more than it gives

_U = np.uint64
_MASK = _U(0xFFFFFFFF)
_32 = _U(32)
_M0, _M1 = (_U(m) for m in stream.PHILOX_M)
_W0, _W1 = (_U(w) for w in stream.PHILOX_W)
_ROUNDS = stream.PHILOX_ROUNDS

_F = np.float32
_LOW_BITS = int(_F(stream.LOG_LOW).view(np.int32))
_LOG = tuple(_F(c) for c in stream.LOG)
_LOG_STEP = _F(stream.LOG_STEP)
_MAGIC = np.int32(stream.ROOT_MAGIC)
_ROOT_A, _ROOT_B = _F(stream.ROOT_A), _F(stream.ROOT_B)
_ANGLE = _F(stream.ANGLE)
_SIN = tuple(_F(c) for c in stream.SIN)
_COS = tuple(_F(c) for c in stream.COS)
_CENTRE = tuple(_F(c) for c in stream.CENTRE)
_TAIL = tuple(_F(c) for c in stream.TAIL)
_FAR = tuple(_F(c) for c in stream.FAR)
_SIGN = np.int32(-(1 << 31))
_EXPONENT = np.int32(-(1 << 23))
_ONE, _TWO, _HALF = _F(1), _F(2), _F(0.5)


@njit(forceinline=True)
def _philox(block, k0, k1):
    c0, c1, c2, c3 = block & _MASK, block >> _32, _U(0), _U(0)
    for _ in range(_ROUNDS):
        p0, p1 = _M0 * (c0 & _MASK), _M1 * (c2 & _MASK)
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1, (p0 >> _32) ^ c3 ^ k1, p0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0 & _MASK, c1 & _MASK, c2 & _MASK, c3 & _MASK


@njit(forceinline=True)
def _word_real(w):
    return np.float32(np.uint32(w))


@njit(forceinline=True)
def _parts(x, unit):
    offset = np.int32(unit << 23)
    b = bits(x)
    k = np.int32(np.int32(b - np.int32(_LOW_BITS + offset)) & _EXPONENT)
    return k, real(np.int32(b - k) - offset) - _ONE


@njit(forceinline=True)
def _log(k, f):
    y = (((((f + _LOG[4]) * f + _LOG[3]) * f + _LOG[2]) * f + _LOG[1]) * f + _LOG[0]) * f
    return y + np.float32(k) * _LOG_STEP


@njit(forceinline=True)
def _scaled_log(x, unit):
    k, f = _parts(x, unit)
    return _log(k, f)


@njit(forceinline=True)
def _roots(x):
    y = real(_MAGIC - np.int32(bits(x) >> np.int32(1)))
    y = y * (_ROOT_A - (x * y) * y)
    t = x * y
    g = t * y - _ROOT_B
    return t * g, y * g


@njit(forceinline=True)
def _box_muller(a, b):
    r, _ = _roots(_scaled_log(_word_real(a) + _HALF, 32))
    low = np.uint32(b)
    x = np.float32(np.int32(low << np.uint32(1))) * _ANGLE
    x2 = x * x
    sine = ((x2 + _SIN[1]) * x2 + _SIN[0]) * x
    cosine = ((x2 + _COS[2]) * x2 + _COS[1]) * x2 + _COS[0]
    r = real(bits(r) ^ (np.int32(low) & _SIGN))
    odd = (low & np.uint32(1)) != 0
    first = sine if odd else cosine
    second = cosine if odd else sine
    return r * first, r * second


@njit(forceinline=True)
def _eight_terms(c, x):
    y = (((c[7] * x + c[6]) * x + c[5]) * x + c[4]) * x + c[3]
    return ((y * x + c[2]) * x + c[1]) * x + c[0]


@njit(forceinline=True)
def _centre(w, m):
    t = _word_real(w) * np.float32(m.scale) + np.float32(m.offset)
    return _eight_terms(_CENTRE, _scaled_log(_ONE - t * t, 0)) * t


@njit(forceinline=True)
def _tail(w, m):
    w = w ^ _U(m.flip)
    below = w < _U(m.split)
    p = _word_real(w if below else w ^ _MASK) * np.float32(m.scale)
    p = p + (np.float32(m.below) if below else np.float32(m.above))
    t = _ONE - p
    k, f = _parts(p * (_TWO - p), 0)
    x = _log(k, -(t * t) if k == 0 else f)  # near 1 the product has lost the low bits of p
    c = _TAIL
    y = ((((c[10] * x + c[9]) * x + c[8]) * x + c[7]) * x + c[6]) * x + c[5]
    y = ((((y * x + c[4]) * x + c[3]) * x + c[2]) * x + c[1]) * x + c[0]
    z = y * _roots(x)[0]
    return -z if below == (m.flip == 0) else z


@njit(forceinline=True)
def _far(w, m):
    q = _word_real(w ^ _U(m.flip) ^ _MASK) * np.float32(m.scale) + np.float32(m.offset)
    root, x = _roots(_scaled_log(q, 0) + np.float32(m.log_scale))
    z = _eight_terms(_FAR, x) * root
    return -z if m.flip != 0 else z


@njit(forceinline=True)
def _narrow(w, m):
    x = _word_real(w) * np.float32(m.scale) + np.float32(m.offset)
    y = ((np.float32(m.c10) * x + np.float32(m.c9)) * x + np.float32(m.c8)) * x + np.float32(m.c7)
    y = (((y * x + np.float32(m.c6)) * x + np.float32(m.c5)) * x + np.float32(m.c4)) * x + np.float32(m.c3)
    return ((y * x + np.float32(m.c2)) * x + _ONE) * x


@njit(forceinline=True)
def _clamp(x, low, high):
    x = low if x < low else x
    return high if x > high else x


def _values(c0: Any, c1: Any, c2: Any, c3: Any, m: Any, tag: Any) -> Any: ...


@overload(_values, jit_options={"forceinline": True})
def _values_overload(c0, c1, c2, c3, m, tag):
    """The four values of a counter block, in float32 (float64 for float64 tensors)."""
    cast = np.float64 if tag == types.float64 else np.float32
    transform = m.instance_class

    if transform is UniformMap:

        def one(w, m):
            x = cast(np.float32(np.int32(w >> _U(8)))) * cast(m.scale) + cast(m.low)
            return cast(m.top) if x > cast(m.top) else x

    elif transform is NarrowMap:

        def one(w, m):
            half = cast(m.half)
            return _clamp(cast(_narrow(w, m)) * half + half + cast(m.low), cast(m.low), cast(m.high))

    elif transform is not NormalMap:
        deviate = {CentreMap: _centre, TailMap: _tail, FarMap: _far}[transform]

        def one(w, m):
            x = cast(deviate(w, m)) * cast(m.std)
            x = x if m.mean == 0.0 else x + cast(m.mean)
            return _clamp(x, cast(m.low), cast(m.high))

    if transform is NormalMap:

        def values(c0, c1, c2, c3, m, tag):
            z0, z1 = _box_muller(c0, c1)
            z2, z3 = _box_muller(c2, c3)
            std, mean = cast(m.std), cast(m.mean)
            x0, x1, x2, x3 = cast(z0) * std, cast(z1) * std, cast(z2) * std, cast(z3) * std
            if m.mean != 0.0:
                x0, x1, x2, x3 = x0 + mean, x1 + mean, x2 + mean, x3 + mean
            return x0, x1, x2, x3

    else:
        one = njit(forceinline=True)(one)

        def values(c0, c1, c2, c3, m, tag):
            return one(c0, m), one(c1, m), one(c2, m), one(c3, m)

    return values


@njit(forceinline=True)
def _block(block, k0, k1, tag, m):
    c0, c1, c2, c3 = _philox(block, k0, k1)
    x0, x1, x2, x3 = _values(c0, c1, c2, c3, m, tag)
    return rounded(x0, tag), rounded(x1, tag), rounded(x2, tag), rounded(x3, tag)


def _make_kernel(fingerprint: int) -> Any:
    """The kernel, cached on disk where numba can write.

    Numba's cache knows this file's date and size, not those of stream.py, whose constants are compiled in: as a free
    variable their fingerprint becomes part of the cache's key.
    """

    def _fill_rows(address, tag, start, rows, length, stride, key, m):
        """Fill rows * length consecutive elements in memory; row r holds the elements from start + r * stride on."""
        _ = fingerprint
        k0, k1 = _U(key) & _MASK, _U(key) >> _32
        memory = carray(pointer(address, tag), rows * length)
        for r in range(rows):
            first = start + r * stride
            end = first + length
            base = r * length - first  # where element 0 would lie
            head = min((first + 3) // 4 * 4, end)  # [first, head) and [tail, end) are parts of a block
            tail = max(end // 4 * 4, head)
            # Slices, indexed from 0: with computed offsets in the index LLVM does not merge the four stores.
            out = memory[base + head : base + tail]
            block = _U(head // 4)
            for i in range((tail - head) // 4):
                x0, x1, x2, x3 = _block(block + _U(i), k0, k1, tag, m)
                out[4 * i] = x0
                out[4 * i + 1] = x1
                out[4 * i + 2] = x2
                out[4 * i + 3] = x3
            for low, high in ((first, head), (tail, end)):
                if low < high:
                    x = _block(_U(low // 4), k0, k1, tag, m)
                    for i in range(low, high):
                        memory[base + i] = x[i % 4]

    return compiled(_fill_rows)


_constants = {name: value for name, value in vars(stream).items() if name.isupper()}
_kernel = _make_kernel(zlib.crc32(repr(_constants).encode() + SOURCE))


def _tasks(runs: Iterable[StridedRun]) -> Iterator[tuple[int, StridedRun]]:
    """(elements before it in memory, run): pieces of about _TASK elements, cut between counter blocks."""
    offset = 0
    for run in runs:
        if run.length >= _TASK:
            for r in range(run.rows):
                first = run.start + r * run.stride
                end = first + run.length
                for low in range(first - first % 4, end, _TASK):
                    begin, stop = max(low, first), min(low + _TASK, end)
                    yield offset, StridedRun(begin, 1, stop - begin, 0)
                    offset += stop - begin
        else:
            step = _TASK // run.length
            for r in range(0, run.rows, step):
                piece = StridedRun(run.start + r * run.stride, min(step, run.rows - r), run.length, run.stride)
                yield offset, piece
                offset += piece.numel


def fill(tensor: Tensor, m: Map, key: int, runs: Iterable[StridedRun]) -> None:
    """Fill a contiguous CPU tensor on torch.get_num_threads() threads.

    Args:
        tensor: float32, bfloat16, float16 or float64, contiguous.
        m: the distribution's map for this dtype.
        key: 64 bits.
        runs: which elements of the stream the tensor holds, in the order of its memory.

    Raises:
        NotImplementedError: for a tensor without memory of its own.
    """
    tag = TAGS[tensor.dtype]
    address, size = tensor.data_ptr(), tensor.element_size()
    if address == 0:  # a functorch wrapper, say: writing there would end the process
        raise NotImplementedError(
            "cannot fill a tensor that has no memory of its own, as torch.func.functionalize makes them"
        )
    key = key - (1 << 64) if key >> 63 else key  # the same bits, as the kernel's int64
    threads = torch.get_num_threads() if tensor.numel() > _TASK else 1
    if threads == 1:
        offset = 0
        for run in runs:
            _kernel(address + offset * size, tag, *run, key, m)
            offset += run.numel
        return

    def work(task: tuple[int, StridedRun]) -> None:
        offset, run = task
        _kernel(address + offset * size, tag, *run, key, m)

    share(_tasks(runs), work, threads)
