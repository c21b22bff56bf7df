"""Sampling on the GPU: the maps of stream.py as one Triton kernel, and one launch for many tensors.

A launch serves all tensors of one dtype whose distributions have the same kind of map. It is fed by a table with a column for
each run of elements: where it lies, which elements of the stream it holds, its key and its map's numbers. The work is
cut into units of equal size, whatever the tensors' sizes are, and a unit finds its column by bisection.

Every + - x is rounded on its own, as the stream demands: compiled with enable_fp_fusion=False, no libdevice.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common_triton import INTERPRETED, find, launching, on_device, rounded, table_jit
from . import stream
from .stream import CentreMap, FarMap, Map, NarrowMap, NormalMap, TailMap, UniformMap

Run: TypeAlias = tuple[int, int, int, int]  # start, rows, length, stride

BLOCKS = 1024  # of four elements: what a program of WARPS warps fills at once, 32 elements a thread
WARPS = 4
CHUNKS = 8  # that a program fills one after the other where there is work for all: the table is read once for all
SHORT = 1024  # elements: rows shorter than this are filled element by element, each for a block of its own
_SHORT_PARTS = 4  # of a chunk: there an element takes as many registers as a block does elsewhere
_BUSY = 2048  # units from which on a GPU has work for all its processors

_PHILOX_M0, _PHILOX_M1 = (tl.constexpr(m) for m in stream.PHILOX_M)
_PHILOX_W0, _PHILOX_W1 = (tl.constexpr(w) for w in stream.PHILOX_W)
_ROUNDS = tl.constexpr(stream.PHILOX_ROUNDS)
_LOG_LOW = tl.constexpr(stream._float_bits(stream.LOG_LOW))
_LOG = tl.constexpr(stream.LOG)
_LOG_STEP = tl.constexpr(stream.LOG_STEP)
_ROOT_MAGIC = tl.constexpr(stream.ROOT_MAGIC)
_ROOT_A, _ROOT_B = tl.constexpr(stream.ROOT_A), tl.constexpr(stream.ROOT_B)
_ANGLE = tl.constexpr(stream.ANGLE)
_SIN, _COS = tl.constexpr(stream.SIN), tl.constexpr(stream.COS)
_CENTRE, _TAIL, _FAR = tl.constexpr(stream.CENTRE), tl.constexpr(stream.TAIL), tl.constexpr(stream.FAR)
_PARTS = tl.constexpr(1 if INTERPRETED else 8)  # of a chunk that is not full
_EXPONENT = tl.constexpr(-(1 << 23))
_SIGN = tl.constexpr(1 << 31)
_ALL = tl.constexpr((1 << 32) - 1)


# ---------------------------------------------------------------------------------------------------------------
# Words


@triton.jit
def _philox(low, high, k0, k1):
    """The four words of the blocks whose numbers have these halves, all uint32."""
    c0 = low
    c1 = tl.zeros_like(low) + high
    c2 = tl.zeros_like(low)
    c3 = tl.zeros_like(low)
    for _ in tl.static_range(_ROUNDS):
        p0 = c0.to(tl.uint64) * _PHILOX_M0
        p1 = c2.to(tl.uint64) * _PHILOX_M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = (k0 + _PHILOX_W0).to(tl.uint32)
        k1 = (k1 + _PHILOX_W1).to(tl.uint32)
    return c0, c1, c2, c3


# ---------------------------------------------------------------------------------------------------------------
# Shared arithmetic


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _real(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _horner(C: tl.constexpr, TERMS: tl.constexpr, x):
    y = x * C[TERMS - 1] + C[TERMS - 2]
    for i in tl.static_range(TERMS - 3, -1, -1):
        y = y * x + C[i]
    return y


@triton.jit
def _log(k, f):
    y = f + _LOG[4]
    for i in tl.static_range(3, -1, -1):
        y = y * f + _LOG[i]
    return y * f + k.to(tl.float32) * _LOG_STEP


@triton.jit
def _scaled_log(x, UNIT: tl.constexpr):
    k = (_bits(x) - (_LOG_LOW + (UNIT << 23))) & _EXPONENT
    return _log(k, _real(_bits(x) - k - (UNIT << 23)) - 1.0)


@triton.jit
def _roots(x):
    # Not ROOT_MAGIC - ...: in the interpreter a constexpr on the left makes a constexpr of the difference.
    y = _real(-(_bits(x) >> 1) + _ROOT_MAGIC)
    y = y * (-((x * y) * y) + _ROOT_A)
    t = x * y
    g = t * y - _ROOT_B
    return t * g, y * g


# ---------------------------------------------------------------------------------------------------------------
# Maps. `m` holds a map's numbers in the order of its fields, reals in the type of the arithmetic.


@triton.jit
def _box_muller(a, b):
    r, _ = _roots(_scaled_log(a.to(tl.float32) + 0.5, 32))
    x = (b << 1).to(tl.int32, bitcast=True).to(tl.float32) * _ANGLE
    x2 = x * x
    sine = ((x2 + _SIN[1]) * x2 + _SIN[0]) * x
    cosine = ((x2 + _COS[2]) * x2 + _COS[1]) * x2 + _COS[0]
    r = (r.to(tl.uint32, bitcast=True) ^ (b & _SIGN)).to(tl.float32, bitcast=True)
    odd = (b & 1) != 0
    return r * tl.where(odd, sine, cosine), r * tl.where(odd, cosine, sine)


@triton.jit
def _centre(w, scale, offset):
    t = w.to(tl.float32) * scale + offset
    return _horner(_CENTRE, 8, _scaled_log(1.0 - t * t, 0)) * t


@triton.jit
def _tail(w, scale, below_start, above_start, split, flip):
    w = w ^ flip
    below = w < split
    p = tl.where(below, w, w ^ _ALL).to(tl.float32) * scale + tl.where(below, below_start, above_start)
    t = 1.0 - p
    b = _bits(p * (2.0 - p))
    k = (b - _LOG_LOW) & _EXPONENT
    f = tl.where(k == 0, -(t * t), _real(b - k) - 1.0)  # near 1 the product has lost the low bits of p
    x = _log(k, f)
    z = _horner(_TAIL, 11, x) * _roots(x)[0]
    return tl.where(below == (flip == 0), -z, z)


@triton.jit
def _far(w, scale, offset, log_scale, flip):
    q = (w ^ flip ^ _ALL).to(tl.float32) * scale + offset
    root, x = _roots(_scaled_log(q, 0) + log_scale)
    z = _horner(_FAR, 8, x) * root
    return tl.where(flip != 0, -z, z)


@triton.jit
def _clamp(x, low, high):
    # Not tl.maximum: of two zeros it takes the positive one, the stream the element's own.
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _value(w, m, MAP: tl.constexpr, SHIFTED: tl.constexpr, KIND: tl.constexpr):
    """The value of a word, in float32, or float64 for float64 tensors."""
    if MAP == "uniform":
        return tl.minimum((w >> 8).to(tl.int32).to(tl.float32).to(KIND) * m[0] + m[1], m[2])
    elif MAP == "narrow":
        x = w.to(tl.float32) * m[3].to(tl.float32) + m[4].to(tl.float32)
        y = x * m[13].to(tl.float32) + m[12].to(tl.float32)
        for i in tl.static_range(11, 4, -1):
            y = y * x + m[i].to(tl.float32)
        y = (y * x + 1.0) * x
        return _clamp(y.to(KIND) * m[2] + m[2] + m[0], m[0], m[1])
    else:
        if MAP == "centre":
            z = _centre(w, m[4].to(tl.float32), m[5].to(tl.float32))
        elif MAP == "tail":
            z = _tail(w, m[4].to(tl.float32), m[5].to(tl.float32), m[6].to(tl.float32), m[7], m[8])
        else:
            z = _far(w, m[4].to(tl.float32), m[5].to(tl.float32), m[6].to(tl.float32), m[7])
        x = z.to(KIND) * m[0]
        if SHIFTED:
            x = x + m[1]
        return _clamp(x, m[2], m[3])


@triton.jit
def _normal_pair(a, b, m, SHIFTED: tl.constexpr, KIND: tl.constexpr):
    x, y = _box_muller(a, b)
    x, y = x.to(KIND) * m[0], y.to(KIND) * m[0]
    if SHIFTED:
        x, y = x + m[1], y + m[1]
    return x, y


@triton.jit
def _four(low, high, k0, k1, m, MAP: tl.constexpr, SHIFTED: tl.constexpr, KIND: tl.constexpr):
    """The four values of blocks."""
    w0, w1, w2, w3 = _philox(low, high, k0, k1)
    if MAP == "normal":
        x0, x1 = _normal_pair(w0, w1, m, SHIFTED, KIND)
        x2, x3 = _normal_pair(w2, w3, m, SHIFTED, KIND)
    else:
        x0 = _value(w0, m, MAP, SHIFTED, KIND)
        x1 = _value(w1, m, MAP, SHIFTED, KIND)
        x2 = _value(w2, m, MAP, SHIFTED, KIND)
        x3 = _value(w3, m, MAP, SHIFTED, KIND)
    return x0, x1, x2, x3


# ---------------------------------------------------------------------------------------------------------------
# The kernel

# The table has a column for each run, and these rows: 0 the run's first unit, 1 its address, 2 its first element in the
# stream, 3 the length of its rows, 4 the elements from one row's beginning to the next one's, 5 the units of a row,
# 6 the key, and from 7 on the map's numbers.


@triton.jit
def _number(numbers, columns, i: tl.constexpr, KIND: tl.constexpr):
    bits = tl.load(numbers + i * columns)
    if KIND == tl.float64:  # noqa: SIM300
        return bits.to(tl.float64, bitcast=True)
    else:  # without it both returns are compiled, and their types differ
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _word(numbers, columns, i: tl.constexpr):
    return tl.load(numbers + i * columns).to(tl.uint32)


@triton.jit
def _numbers(numbers, columns, MAP: tl.constexpr, KIND: tl.constexpr):
    """A map's numbers, as a tuple in the order of its fields; a constant is its bits."""
    if MAP == "constant":
        return (tl.load(numbers), tl.load(numbers))
    else:
        return _map_numbers(numbers, columns, MAP, KIND)


@triton.jit
def _map_numbers(numbers, columns, MAP: tl.constexpr, KIND: tl.constexpr):
    a = _number(numbers, columns, 0, KIND)
    b = _number(numbers, columns, 1, KIND)
    if MAP == "normal":
        return a, b
    else:
        c = _number(numbers, columns, 2, KIND)
        if MAP == "uniform":
            return a, b, c
        else:
            d = _number(numbers, columns, 3, KIND)
            e = _number(numbers, columns, 4, KIND)
            f = _number(numbers, columns, 5, KIND)
            if MAP == "centre":
                return a, b, c, d, e, f
            else:
                g = _number(numbers, columns, 6, KIND)
                if MAP == "tail":
                    return a, b, c, d, e, f, g, _word(numbers, columns, 7), _word(numbers, columns, 8)
                elif MAP == "far":
                    return a, b, c, d, e, f, g, _word(numbers, columns, 7)
                else:
                    h = _number(numbers, columns, 7, KIND)
                    i = _number(numbers, columns, 8, KIND)
                    j = _number(numbers, columns, 9, KIND)
                    k = _number(numbers, columns, 10, KIND)
                    l = _number(numbers, columns, 11, KIND)  # noqa: E741
                    m = _number(numbers, columns, 12, KIND)
                    n = _number(numbers, columns, 13, KIND)
                    return a, b, c, d, e, f, g, h, i, j, k, l, m, n


@triton.jit
def _packed(
    low, high, k0, k1, m,
    MAP: tl.constexpr, SHIFTED: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The elements of blocks, four in a row, rounded."""
    x0, x1, x2, x3 = _four(low, high, k0, k1, m, MAP, SHIFTED, KIND)
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return rounded(x, ELEMENT, INTERPRETED).reshape(low.shape[0], 4)


@triton.jit
def full_chunk(
    address, low, high, k0, k1, m,
    MAP: tl.constexpr, SHIFTED: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Whole blocks into memory at a multiple of 16 bytes: 128-bit stores, nothing masked, 32-bit block numbers."""
    out = tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), 16)
    if MAP == "constant":
        tl.store(out + tl.arange(0, BLOCKS * 4), tl.full([BLOCKS * 4], 0, ELEMENT) + m[0].to(ELEMENT))
    elif ELEMENT.primitive_bitwidth == 16:
        # Two blocks side by side in a thread are 16 bytes; one each would be exchanged through shared memory.
        even = low + 2 * tl.arange(0, BLOCKS // 2).to(tl.uint32)
        a = _packed(even, high, k0, k1, m, MAP, SHIFTED, ELEMENT, KIND, INTERPRETED)
        b = _packed(even + 1, high, k0, k1, m, MAP, SHIFTED, ELEMENT, KIND, INTERPRETED)
        tl.store(out + tl.arange(0, BLOCKS * 4), tl.join(a, b).permute(0, 2, 1).reshape(BLOCKS * 4))
    else:
        for half in tl.static_range(2):  # one after the other: fewer registers, and fewer moves between them
            blocks = low + half * (BLOCKS // 2) + tl.arange(0, BLOCKS // 2).to(tl.uint32)
            x = _packed(blocks, high, k0, k1, m, MAP, SHIFTED, ELEMENT, KIND, INTERPRETED).reshape(BLOCKS * 2)
            tl.store(out + half * (BLOCKS * 2) + tl.arange(0, BLOCKS * 2), x)


@triton.jit
def part_chunk(
    row, at, length, block, k0, k1, m,
    MAP: tl.constexpr, SHIFTED: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Blocks from number `block` on into the row at address `row`, from its place `at` on, as far as they lie in it."""
    if MAP == "constant":
        x = tl.full([BLOCKS * 4], 0, ELEMENT) + m[0].to(ELEMENT)
    else:
        blocks = block + tl.arange(0, BLOCKS).to(tl.int64)
        x = _packed(
            blocks.to(tl.uint32), (blocks >> 32).to(tl.uint32), k0, k1, m, MAP, SHIFTED, ELEMENT, KIND, INTERPRETED
        ).reshape(BLOCKS * 4)  # fmt: skip
    place = at + tl.arange(0, BLOCKS * 4)
    out = row.to(tl.pointer_type(ELEMENT))
    tl.store(out + place, x, mask=(place >= 0) & (place < length))


@table_jit
def fill_units(
    table, columns, chunks,
    MAP: tl.constexpr, SHIFTED: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One unit: `chunks` chunks of 4 * BLOCKS elements of one row of one run, cut between blocks of the stream."""
    unit = tl.program_id(0).to(tl.int64)
    column = find(table, columns, unit)
    entry = table + column
    units = tl.load(entry + 5 * columns)
    index = unit - tl.load(entry)
    number = index // units  # of the row
    length = tl.load(entry + 3 * columns)
    first = tl.load(entry + 2 * columns) + number * tl.load(entry + 4 * columns)
    row = tl.load(entry + columns) + number * length * SIZE
    key = tl.load(entry + 6 * columns)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    m = _numbers(entry + 7 * columns, columns, MAP, KIND)
    at = (index - number * units) * chunks * (BLOCKS * 4) - (first & 3)  # place in the row of the first block
    for _ in range(chunks):
        if at < length:
            block = (first + at) >> 2
            address = row + at * SIZE
            whole = (at >= 0) & (at + BLOCKS * 4 <= length) & (address % 16 == 0)
            if whole & ((block >> 32) == ((block + BLOCKS) >> 32)):
                full_chunk(
                    address, block.to(tl.uint32), (block >> 32).to(tl.uint32), k0, k1, m,
                    MAP, SHIFTED, ELEMENT, KIND, BLOCKS, INTERPRETED,
                )  # fmt: skip
            else:
                for i in range(_PARTS):  # piece by piece: masks and wide counters would cost the other path registers
                    part_chunk(
                        row, at + i * (BLOCKS * 4 // _PARTS), length, block + i * (BLOCKS // _PARTS), k0, k1, m,
                        MAP, SHIFTED, ELEMENT, KIND, BLOCKS // _PARTS, INTERPRETED,
                    )  # fmt: skip
        at += BLOCKS * 4


@table_jit
def fill_short_rows(
    table, columns, chunks,
    MAP: tl.constexpr, SHIFTED: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One unit of a run whose rows are short: BLOCKS elements, each of which makes its block and takes its word.

    In place of a row's units the table holds the run's elements.
    """
    unit = tl.program_id(0).to(tl.int64)
    column = find(table, columns, unit)
    entry = table + column
    length = tl.load(entry + 3 * columns)
    place = (unit - tl.load(entry)) * BLOCKS + tl.arange(0, BLOCKS)
    number = place // length
    element = tl.load(entry + 2 * columns) + number * tl.load(entry + 4 * columns) + (place - number * length)
    key = tl.load(entry + 6 * columns)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    m = _numbers(entry + 7 * columns, columns, MAP, KIND)
    block = element >> 2
    x0, x1, x2, x3 = _four(block.to(tl.uint32), (block >> 32).to(tl.uint32), k0, k1, m, MAP, SHIFTED, KIND)
    which = element & 3
    x = tl.where(which < 2, tl.where(which == 0, x0, x1), tl.where(which == 2, x2, x3))
    out = tl.load(entry + columns).to(tl.pointer_type(ELEMENT))
    tl.store(out + place, rounded(x, ELEMENT, INTERPRETED), mask=place < tl.load(entry + 5 * columns))


# ---------------------------------------------------------------------------------------------------------------
# The host's side

_KINDS = {
    UniformMap: "uniform",
    NormalMap: "normal",
    CentreMap: "centre",
    TailMap: "tail",
    FarMap: "far",
    NarrowMap: "narrow",
}
_ELEMENTS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
_INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_INTEGER_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Group(NamedTuple):
    """What the tensors of one launch have in common."""

    kind: str
    shifted: bool
    dtype: torch.dtype


class Prepared(NamedTuple):
    """A distribution for a dtype, as a launch needs it; the numbers are reals' bits, or words."""

    group: str  # the group's name: a key that is quick to look up
    of: Group
    dtype: torch.dtype
    numbers: tuple[int, ...]


def _prepared(kind: str, shifted: bool, dtype: torch.dtype, numbers: Iterable[int]) -> Prepared:
    return Prepared(f"{kind} {shifted} {dtype}", Group(kind, shifted, dtype), dtype, tuple(map(_signed, numbers)))


def prepare(m: Map, dtype: torch.dtype) -> Prepared:
    """What a launch needs of a map."""
    shifted = not isinstance(m, UniformMap | NarrowMap) and m.mean != 0.0
    form = "<d" if dtype == torch.float64 else "<f"
    numbers = (int.from_bytes(struct.pack(form, x), "little") if isinstance(x, float) else x for x in m)
    return _prepared(_KINDS[type(m)], shifted, dtype, numbers)


def prepare_constant(value: complex, dtype: torch.dtype) -> Prepared | None:
    """What a launch needs of a constant; None where elements have another size than integers."""
    scalar = torch.full((), value, dtype=dtype, device="cpu")
    integer = _INTEGER_DTYPES.get(scalar.element_size())
    return None if integer is None else _prepared("constant", False, integer, [int(scalar.view(integer).item())])


def _signed(word: int) -> int:
    """64 bits as a two's complement integer."""
    return word - (1 << 64) if word >> 63 == 1 else word


# A contiguous tensor to fill: the address and number of its elements (real ones), its distribution, its key, and where its runs
# lie in the stream; None if it is all of the logical tensor.
Entry: TypeAlias = tuple[int, int, Prepared, int, Iterable[Run] | None]


class _Columns:
    """The table of one launch, column by column."""

    def __init__(self, group: Group, short: bool) -> None:
        self.group = group
        self.short = short
        self.address: list[int] = []
        self.start: list[int] = []
        self.rows: list[int] = []
        self.length: list[int] = []
        self.stride: list[int] = []
        self.key: list[int] = []
        self.numbers: list[tuple[int, ...]] = []

    def add(self, address: int, run: Run, key: int, numbers: tuple[int, ...]) -> None:
        start, rows, length, stride = run
        self.address.append(address)
        self.start.append(start)
        self.rows.append(rows)
        self.length.append(length)
        self.stride.append(stride)
        self.key.append(key)
        self.numbers.append(numbers)

    def table(self) -> tuple[np.ndarray[Any, Any], int, int]:
        """(the table, its units, chunks a unit)."""
        columns = np.array([self.address, self.start, self.length, self.stride, self.rows], dtype=np.int64)
        address, start, length, stride, rows = columns
        key = np.array(self.key, dtype=np.uint64).view(np.int64)
        numbers = np.array(self.numbers, dtype=np.int64).T
        chunks = 1
        if self.short:
            size, unit = rows * length, BLOCKS // _SHORT_PARTS
            per_row, units = size, (size + unit - 1) // unit
        else:
            total = int((rows * length).sum())
            chunks = min(CHUNKS, max(1, total // (_BUSY * BLOCKS * 4)))
            unit = chunks * BLOCKS * 4
            # A row that does not begin with a block begins with part of one.
            spill = np.where((start | stride) & 3, 3, 0)
            per_row = (length + spill + unit - 1) // unit
            units = per_row * rows
        ends = units.cumsum()
        table = np.concatenate([np.stack([ends - units, address, start, length, stride, per_row, key]), numbers])
        return table, int(ends[-1]), chunks


def fill(entries: Iterable[Entry], device: torch.device) -> None:
    """Fill contiguous tensors on one device: one table, one copy, and one launch per kind of map and dtype.

    Args:
        entries: tensors whose memory does not meet.
        device: where they lie; for the interpreter, the CPU.
    """
    groups: dict[str, _Columns] = {}
    short: dict[str, _Columns] = {}
    for address, numel, prepared, key, runs in entries:
        if runs is None:
            columns = groups.get(prepared.group)
            if columns is None:
                columns = groups[prepared.group] = _Columns(prepared.of, False)
            columns.add(address, (0, 1, numel, 0), key, prepared.numbers)
            continue
        for run in runs:
            rows_are_short = run[1] > 1 and run[2] < SHORT
            into = short if rows_are_short else groups
            if prepared.group not in into:
                into[prepared.group] = _Columns(prepared.of, rows_are_short)
            into[prepared.group].add(address, run, key, prepared.numbers)
            address += run[1] * run[2] * prepared.dtype.itemsize
    launches = [(columns, *columns.table()) for columns in (*groups.values(), *short.values())]
    whole = on_device([table for _, table, *_ in launches], device)
    at = 0
    for columns, table, units, chunks in launches:
        _launch(columns, whole[at : at + table.size], units, chunks, device)
        at += table.size


def _launch(columns: _Columns, table: Tensor, units: int, chunks: int, device: torch.device) -> None:
    kind, shifted, dtype = columns.group
    kernel = fill_short_rows if columns.short else fill_units
    with launching(device):
        kernel[(units,)](
            table,
            len(columns.key),
            chunks,
            MAP=kind,
            SHIFTED=shifted,
            ELEMENT=_INTEGERS[dtype.itemsize] if kind == "constant" else _ELEMENTS[dtype],
            KIND=tl.float64 if dtype == torch.float64 else tl.float32,
            SIZE=dtype.itemsize,
            BLOCKS=BLOCKS // _SHORT_PARTS if columns.short else BLOCKS,
            INTERPRETED=INTERPRETED,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
