"""Sampling on the CPU: the maps of stream.py as scalar code that LLVM vectorises.

One kernel template, `fill_rows`, compiled for each kind of map and dtype. A fill of any number of tensors is one table,
a row for each run of elements, and one call: `fill_table` cuts the rows into pieces, which threads claim.
Random words stay in uint64 lanes and are masked only before a product, so that it becomes one vpmuludq for eight lanes.
No fast-math: every + - x is rounded on its own, as the stream demands.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload
from numba.np.unsafe.ndarray import to_fixed_tuple

from .._common_numba import SOURCE, TAGS, bits, claim, compiled_job, pointer, real, rounded, run_on_pool
from ..region import StridedRun
from ..tensors import INTEGERS
from . import stream
from .stream import CentreMap, FarMap, Map, NarrowMap, NormalMap, TailMap, UniformMap

PIECE_SIZE = 1 << 16  # elements that a thread claims at once; a multiple of a counter block's 4
ONE_THREAD = 1 << 18  # elements: up to here a second thread costs more than it gives

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


# What numba's cache does not see: this op's constants, which are compiled in, and the file whose functions are.
_CONSTANTS = {name: value for name, value in vars(stream).items() if name.isupper()}
_FINGERPRINT = zlib.crc32(repr(_CONSTANTS).encode() + SOURCE)

# (address, start, rows, length, stride, key, address of the map's numbers): fills rows * length consecutive elements in
# memory; row r holds the elements of the stream from start + r * stride on.
_SIGNATURE = "void(int64, int64, int64, int64, int64, int64, int64)"


@functools.cache
def _kernel(transform: Any, dtype: torch.dtype) -> Any:
    fingerprint, tag, count = _FINGERPRINT, TAGS[dtype], len(transform._fields)

    def fill_rows(address, start, rows, length, stride, key, numbers):
        _ = fingerprint
        m = transform(*to_fixed_tuple(carray(pointer(numbers, 0.0), count), count))
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

    return compiled_job(fill_rows, _SIGNATURE)


@functools.cache
def _constant_kernel(itemsize: int) -> Any:
    fingerprint, tag = _FINGERPRINT, np.dtype(f"i{itemsize}").type(0)

    def fill_constant(address, start, rows, length, stride, key, numbers):
        _ = fingerprint
        value = carray(pointer(numbers, tag), 1)[0]
        out = carray(pointer(address, tag), rows * length)
        for i in range(len(out)):
            out[i] = value

    return compiled_job(fill_constant, _SIGNATURE)


@intrinsic
def _call(
    typing_context: Any, kernel: Any, address: Any, start: Any, rows: Any, length: Any, stride: Any, key: Any, m: Any
) -> Any:
    """Calls the kernel that lies at an address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        kernel, *rest = arguments
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(rest))
        builder.call(builder.inttoptr(kernel, function.as_pointer()), rest)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


class _Row(NamedTuple):
    """A row of the table: a run, and what fills it."""

    pieces: int  # of this row and those before it
    kernel: int
    address: int
    itemsize: int
    start: int
    rows: int
    length: int
    stride: int
    key: int
    numbers: int


_HEADER = 3  # the piece to be claimed next, PIECE_SIZE, rows of the table
_COLUMNS = len(_Row._fields)


@functools.cache
def _fill_table() -> Any:
    fingerprint = _FINGERPRINT

    def fill_table(job):
        _ = fingerprint
        header = carray(pointer(job, np.int64(0)), _HEADER)
        size, count = header[1], header[2]
        table = carray(pointer(job + 8 * _HEADER, np.int64(0)), (count, _COLUMNS))
        i, before = 0, 0
        while True:
            piece = claim(job)
            while i < count and table[i, 0] <= piece:
                before = table[i, 0]
                i += 1
            if i == count:
                break
            piece -= before
            kernel, address, itemsize, start = table[i, 1], table[i, 2], table[i, 3], table[i, 4]
            rows, length, stride, key, numbers = table[i, 5], table[i, 6], table[i, 7], table[i, 8], table[i, 9]
            if length > size:  # a part of a row, cut between counter blocks
                in_row = (length + 3 + size - 1) // size
                row = piece // in_row
                first = start + row * stride
                low = first - first % 4 + piece % in_row * size
                begin, end = max(low, first), min(low + size, first + length)
                if begin < end:
                    address += (row * length + begin - first) * itemsize
                    _call(kernel, address, begin, 1, end - begin, 0, key, numbers)
            else:
                in_piece = size // length
                row = piece * in_piece
                address += row * length * itemsize
                rows = min(in_piece, rows - row)
                _call(kernel, address, start + row * stride, rows, length, stride, key, numbers)

    return compiled_job(fill_table)


def _pieces(rows: int, length: int) -> int:
    """Into how many pieces `fill_table` cuts a run."""
    if length > PIECE_SIZE:
        return rows * -(-(length + 3) // PIECE_SIZE)
    return -(-rows // (PIECE_SIZE // length))


class Prepared(NamedTuple):
    """A distribution for a dtype, as the table holds it."""

    kernel: Any
    kernel_address: int
    itemsize: int
    numbers: array[Any]  # of the map; or the bits of a constant
    numbers_address: int
    run: Any  # the kernel, to be called with a run without a table


_RUN = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 7)  # words of 64 bits all; c_void_p is the quickest to convert


def _prepared(kernel: Any, itemsize: int, numbers: array[Any]) -> Prepared:
    return Prepared(kernel, kernel.address, itemsize, numbers, numbers.buffer_info()[0], _RUN(kernel.address))


def prepare(m: Map, dtype: torch.dtype) -> Prepared:
    """What a fill needs of a map; compiles the kernel where it is new."""
    transform: Any = type(m)
    return _prepared(_kernel(transform, dtype), dtype.itemsize, array("d", m))


def prepare_constant(value: complex, dtype: torch.dtype) -> Prepared | None:
    """What a fill needs of a constant; None where elements have another size than integers."""
    scalar = torch.full((), value, dtype=dtype, device="cpu")
    integer = INTEGERS.get(scalar.element_size())
    if integer is None:
        return None
    bits = scalar.view(integer).item()
    return _prepared(_constant_kernel(integer.itemsize), integer.itemsize, array("q", [bits]))


def fills_in_order(elements: int) -> bool:
    """Whether tensors of so many elements together are filled one after the other, also where their memory meets."""
    return elements <= ONE_THREAD or torch.get_num_threads() == 1


# A contiguous tensor to fill: the address and number of its elements (real ones), its distribution, its key, and where
# its runs lie in the stream; None if it is all of the logical tensor.
Entry: TypeAlias = tuple[int, int, Prepared, int, Iterable[StridedRun] | None]


def fill(entries: Sequence[Entry], device: torch.device) -> None:
    """Fill contiguous tensors, on torch.get_num_threads() threads where that is worth it, by one call.

    Args:
        entries: tensors, filled in this order; of more than ONE_THREAD elements together, whose memory does not meet.
        device: the CPU.

    Raises:
        NotImplementedError: for a tensor without memory of its own; nothing is written.
    """
    words = [0, PIECE_SIZE, 0]
    pieces = elements = 0
    for address, numel, prepared, key, runs in entries:
        if address == 0:  # a functorch wrapper, say: writing there would end the process
            raise NotImplementedError(
                "cannot fill a tensor that has no memory of its own, as torch.func.functionalize makes them"
            )
        _, kernel, itemsize, _, numbers, run = prepared
        if runs is None and numel <= PIECE_SIZE and len(entries) == 1:  # a table would cost more than it fills
            run(address, 0, 1, numel, 0, key, numbers)
            return
        elements += numel
        if runs is None:
            pieces += 1 if numel <= PIECE_SIZE else _pieces(1, numel)
            words += (pieces, kernel, address, itemsize, 0, 1, numel, 0, key, numbers)
            continue
        for start, rows, length, stride in runs:
            pieces += _pieces(rows, length)
            words += (pieces, kernel, address, itemsize, start, rows, length, stride, key, numbers)
            address += rows * length * itemsize
    words[2] = len(words) // _COLUMNS
    job = array("Q", words)
    run_on_pool(_fill_table(), job.buffer_info()[0], torch.get_num_threads() if elements > ONE_THREAD else 1)
