"""Sampling on the GPU: one launch for all tensors of one dtype whose distributions have the same kind of map.

A table feeds the launch. It has a column for each strided run of elements: where the run lies in memory, which elements
of the stream it holds, its key and its map's numbers. The work is cut into items of equal size, whatever the tensors'
sizes are, and a program finds the column of its item by bisection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias, get_type_hints

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common_triton import INTERPRETED, find, launching, on_device, rounded, table_jit
from ..region import StridedRun
from ..tensors import INTEGERS
from ._maps_triton import TRANSFORMS, four_values
from .stream import Map, NarrowMap, UniformMap

BLOCK_SIZE = (
    1024  # counter blocks of four elements that a program of NUM_WARPS warps fills at once, 32 elements a thread
)
NUM_WARPS = 4
CHUNKS = 8  # of 4 * BLOCK_SIZE elements that make a work item where there is work for all: one reading of the table
SHORT = 1024  # elements: rows shorter than this are filled element by element, each from a counter block of its own
SHORT_BLOCK_SIZE = BLOCK_SIZE // 4  # elements: there one takes as many registers as a counter block does elsewhere
_BUSY = 2048  # work items from which on a GPU has work for all its processors

_PARTS = tl.constexpr(1 if INTERPRETED else 8)  # of a chunk that is not full


class TableColumn(NamedTuple):
    """What the table says of a run: its first rows, in this order. The map's numbers follow, in the map's order.

    Attributes:
        first_item: the number of its first work item.
        ptr: the address of its first element.
        start: the number of its first element in the stream.
        length: elements in a row of it.
        stride: elements of the stream from one row's start to the next one's.
        size: work items in a row; for short rows, elements in the run.
        key: 64 bits.
    """

    first_item: Any
    ptr: Any
    start: Any
    length: Any
    stride: Any
    size: Any
    key: Any


# The rows' numbers, for the kernels. They load a field where they need it: all at once would cost registers.
_ROW = {field: tl.constexpr(row) for row, field in enumerate(TableColumn._fields)}
_FIRST_ITEM, _PTR, _START, _LENGTH = _ROW["first_item"], _ROW["ptr"], _ROW["start"], _ROW["length"]
_STRIDE, _SIZE, _KEY = _ROW["stride"], _ROW["size"], _ROW["key"]
_NUM_ROWS = tl.constexpr(len(TableColumn._fields))


class ConstantMap(NamedTuple):
    """Every element is these bits."""

    bits: Any


_MAPS = {name: m for m, name in TRANSFORMS.items()} | {"constant": ConstantMap}
# By map, how the table holds each field: as a real number's bits, a random word's integer, or bare bits. A constexpr,
# since Triton's cache on disk knows the values of these and of no other globals.
_FIELDS = tl.constexpr(
    {
        name: {field: {float: "real", int: "word"}.get(kind, "bits") for field, kind in get_type_hints(m).items()}
        for name, m in _MAPS.items()
    }
)


@triton.constexpr_function
def _map_class(transform):
    return _MAPS[transform]


@triton.constexpr_function
def _num_fields(transform):
    return len(_FIELDS.value[transform])


@triton.constexpr_function
def _kind(transform, i):
    return [*_FIELDS.value[transform].values()][i]


@triton.jit
def load_map(ptr, num_columns, TRANSFORM: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """A run's map, from the address of its first number in the table on: scalars COMPUTE_DTYPE, uint32 for words."""
    numbers = ()
    for i in tl.static_range(_num_fields(TRANSFORM)):
        number = _load_number(ptr + i * num_columns, _kind(TRANSFORM, i), COMPUTE_DTYPE)
        numbers = numbers + (number,)  # type: ignore[assignment]  # noqa: RUF005
    return _map_class(TRANSFORM)(*numbers)


@triton.jit
def _load_number(ptr, KIND: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    bits = tl.load(ptr)
    if KIND == "bits":
        return bits
    elif KIND == "word":
        return bits.to(tl.uint32)
    elif COMPUTE_DTYPE == tl.float64:  # noqa: SIM300
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _elements(
    counter_low, counter_high, k0, k1, m,
    TRANSFORM: tl.constexpr, HAS_MEAN: tl.constexpr, OUT_DTYPE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The elements of counter blocks, rounded. counter_low: [N] uint32 -> [N, 4] OUT_DTYPE"""
    x0, x1, x2, x3 = four_values(counter_low, counter_high, k0, k1, m, TRANSFORM, HAS_MEAN, COMPUTE_DTYPE)
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return rounded(x, OUT_DTYPE, INTERPRETED).reshape(counter_low.shape[0], 4)


@triton.jit
def full_chunk(
    # output: the address, a multiple of 16, of 4 * BLOCK_SIZE elements
    ptr,
    # inputs: the number of the first counter block, in halves of 32 bits; the key's halves; the map
    counter_low, counter_high, k0, k1, m,
    # meta
    TRANSFORM: tl.constexpr, HAS_MEAN: tl.constexpr, OUT_DTYPE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out[4 b + i] = element i of counter block b, 0 <= b < BLOCK_SIZE: 128-bit stores, no mask, 32-bit counters."""
    out_ptr = tl.multiple_of(ptr.to(tl.pointer_type(OUT_DTYPE)), 16)
    if TRANSFORM == "constant":
        tl.store(out_ptr + tl.arange(0, BLOCK_SIZE * 4), tl.full([BLOCK_SIZE * 4], 0, OUT_DTYPE) + m.bits.to(OUT_DTYPE))
    elif OUT_DTYPE.primitive_bitwidth == 16:
        # Two counter blocks side by side in a thread are 16 bytes; one each would be exchanged through shared memory.
        even = counter_low + 2 * tl.arange(0, BLOCK_SIZE // 2).to(tl.uint32)
        a = _elements(even, counter_high, k0, k1, m, TRANSFORM, HAS_MEAN, OUT_DTYPE, COMPUTE_DTYPE, INTERPRETED)
        b = _elements(even + 1, counter_high, k0, k1, m, TRANSFORM, HAS_MEAN, OUT_DTYPE, COMPUTE_DTYPE, INTERPRETED)
        x = tl.join(a, b).permute(0, 2, 1).reshape(BLOCK_SIZE * 4)
        tl.store(out_ptr + tl.arange(0, BLOCK_SIZE * 4), x)
    else:
        for half in tl.static_range(2):  # one after the other: fewer registers, and fewer moves between them
            counters = counter_low + half * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2).to(tl.uint32)
            x = _elements(
                counters, counter_high, k0, k1, m, TRANSFORM, HAS_MEAN, OUT_DTYPE, COMPUTE_DTYPE, INTERPRETED
            ).reshape(BLOCK_SIZE * 2)  # fmt: skip
            tl.store(out_ptr + half * (BLOCK_SIZE * 2) + tl.arange(0, BLOCK_SIZE * 2), x)


@triton.jit
def part_chunk(
    # output: a row's address
    row_ptr,
    # inputs: the first counter block's first offset in the row, and number; the key's halves; the map
    start, length, counter, k0, k1, m,
    # meta
    TRANSFORM: tl.constexpr, HAS_MEAN: tl.constexpr, OUT_DTYPE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """row[start + 4 b + i] = element i of counter block b, 0 <= b < BLOCK_SIZE, where 0 <= start + 4 b + i < length."""
    if TRANSFORM == "constant":
        x = tl.full([BLOCK_SIZE * 4], 0, OUT_DTYPE) + m.bits.to(OUT_DTYPE)
    else:
        counters = counter + tl.arange(0, BLOCK_SIZE).to(tl.int64)
        x = _elements(
            counters.to(tl.uint32), (counters >> 32).to(tl.uint32), k0, k1, m,
            TRANSFORM, HAS_MEAN, OUT_DTYPE, COMPUTE_DTYPE, INTERPRETED,
        ).reshape(BLOCK_SIZE * 4)  # fmt: skip
    offsets = start + tl.arange(0, BLOCK_SIZE * 4)
    out_ptr = row_ptr.to(tl.pointer_type(OUT_DTYPE))
    tl.store(out_ptr + offsets, x, mask=(offsets >= 0) & (offsets < length))


@table_jit
def fill_rows(
    # inputs: [7 + the map's numbers, num_columns] int64
    table_ptr,
    # sizes: runs; chunks of 4 * BLOCK_SIZE elements in a work item
    num_columns, chunks,
    # meta
    TRANSFORM: tl.constexpr, HAS_MEAN: tl.constexpr, OUT_DTYPE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    ITEMSIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Fill one work item: `chunks` chunks of one row of one run, cut between counter blocks of the stream.

    row[i] = transform(key, start + row number * stride + i), 0 <= i < length
    """
    item = tl.program_id(0).to(tl.int64)
    column_ptr = table_ptr + find(table_ptr, num_columns, item)
    size = tl.load(column_ptr + _SIZE * num_columns)
    item_of_run = item - tl.load(column_ptr + _FIRST_ITEM * num_columns)
    row = item_of_run // size
    length = tl.load(column_ptr + _LENGTH * num_columns)
    first = tl.load(column_ptr + _START * num_columns) + row * tl.load(column_ptr + _STRIDE * num_columns)
    row_ptr = tl.load(column_ptr + _PTR * num_columns) + row * length * ITEMSIZE
    key = tl.load(column_ptr + _KEY * num_columns)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    m = load_map(column_ptr + _NUM_ROWS * num_columns, num_columns, TRANSFORM, COMPUTE_DTYPE)
    # The offset in the row of the item's first counter block.
    start = (item_of_run - row * size) * chunks * (BLOCK_SIZE * 4) - (first & 3)
    for _ in range(chunks):
        if start < length:
            counter = (first + start) >> 2
            ptr = row_ptr + start * ITEMSIZE
            is_full = (start >= 0) & (start + BLOCK_SIZE * 4 <= length) & (ptr % 16 == 0)
            if is_full & ((counter >> 32) == ((counter + BLOCK_SIZE) >> 32)):
                full_chunk(
                    ptr, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), k0, k1, m,
                    TRANSFORM, HAS_MEAN, OUT_DTYPE, COMPUTE_DTYPE, BLOCK_SIZE, INTERPRETED,
                )  # fmt: skip
            else:
                for i in range(_PARTS):  # piece by piece: masks and wide counters would cost the other path registers
                    part_chunk(
                        row_ptr, start + i * (BLOCK_SIZE * 4 // _PARTS), length, counter + i * (BLOCK_SIZE // _PARTS),
                        k0, k1, m,
                        TRANSFORM, HAS_MEAN, OUT_DTYPE, COMPUTE_DTYPE, BLOCK_SIZE // _PARTS, INTERPRETED,
                    )  # fmt: skip
        start += BLOCK_SIZE * 4


@table_jit
def fill_short_rows(
    # inputs: [7 + the map's numbers, num_columns] int64
    table_ptr,
    # sizes: runs; 1
    num_columns, chunks,
    # meta
    TRANSFORM: tl.constexpr, HAS_MEAN: tl.constexpr, OUT_DTYPE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    ITEMSIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Fill one work item of a run whose rows are short: BLOCK_SIZE elements, each from its own counter block.

    run[j] = transform(key, start + (j div length) * stride + j mod length), 0 <= j < size
    """
    item = tl.program_id(0).to(tl.int64)
    column_ptr = table_ptr + find(table_ptr, num_columns, item)
    length = tl.load(column_ptr + _LENGTH * num_columns)
    offsets = (item - tl.load(column_ptr + _FIRST_ITEM * num_columns)) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    row = offsets // length
    start = tl.load(column_ptr + _START * num_columns)
    element = start + row * tl.load(column_ptr + _STRIDE * num_columns) + (offsets - row * length)
    key = tl.load(column_ptr + _KEY * num_columns)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    m = load_map(column_ptr + _NUM_ROWS * num_columns, num_columns, TRANSFORM, COMPUTE_DTYPE)
    counter = element >> 2
    x0, x1, x2, x3 = four_values(
        counter.to(tl.uint32), (counter >> 32).to(tl.uint32), k0, k1, m, TRANSFORM, HAS_MEAN, COMPUTE_DTYPE
    )
    word = element & 3
    x = tl.where(word < 2, tl.where(word == 0, x0, x1), tl.where(word == 2, x2, x3))
    out_ptr = tl.load(column_ptr + _PTR * num_columns).to(tl.pointer_type(OUT_DTYPE))
    size = tl.load(column_ptr + _SIZE * num_columns)
    tl.store(out_ptr + offsets, rounded(x, OUT_DTYPE, INTERPRETED), mask=offsets < size)


_OUT_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


class Group(NamedTuple):
    """What the tensors of one launch have in common."""

    transform: str
    has_mean: bool
    dtype: torch.dtype


class Prepared(NamedTuple):
    """A distribution for a dtype, as a launch needs it; the numbers are reals' bits, or words."""

    name: str  # the group's: a key that is quick to look up
    group: Group
    numbers: tuple[int, ...]


def _prepared(transform: str, has_mean: bool, dtype: torch.dtype, numbers: Iterable[int]) -> Prepared:
    group = Group(transform, has_mean, dtype)
    return Prepared(f"{transform} {has_mean} {dtype}", group, tuple(map(_signed, numbers)))


def prepare(m: Map, dtype: torch.dtype) -> Prepared:
    """What a launch needs of a map."""
    has_mean = not isinstance(m, UniformMap | NarrowMap) and m.mean != 0.0
    form = "<d" if dtype == torch.float64 else "<f"
    numbers = (int.from_bytes(struct.pack(form, x), "little") if isinstance(x, float) else x for x in m)
    return _prepared(TRANSFORMS[type(m)], has_mean, dtype, numbers)


def prepare_constant(value: complex, dtype: torch.dtype) -> Prepared | None:
    """What a launch needs of a constant; None where elements have another size than integers."""
    scalar = torch.full((), value, dtype=dtype, device="cpu")
    integer = INTEGERS.get(scalar.element_size())
    return None if integer is None else _prepared("constant", False, integer, [int(scalar.view(integer).item())])


def _signed(word: int) -> int:
    """64 bits as a two's complement integer."""
    return word - (1 << 64) if word >> 63 == 1 else word


def fills_in_order(elements: int) -> bool:
    """Whether tensors of so many elements together may meet in memory: no launch's may."""
    return False


# A contiguous tensor to fill: the address and number of its elements (real ones), its distribution, its key, and where
# its runs lie in the stream; None if it is all of the logical tensor.
Entry: TypeAlias = tuple[int, int, Prepared, int, Iterable[StridedRun] | None]


class _Launch:
    """The runs of one launch, and the table that is made of them."""

    def __init__(self, group: Group, short: bool) -> None:
        self.group = group
        self.short = short
        self.ptrs: list[int] = []
        self.runs: list[StridedRun] = []
        self.keys: list[int] = []
        self.numbers: list[tuple[int, ...]] = []

    def add(self, ptr: int, run: StridedRun, key: int, numbers: tuple[int, ...]) -> None:
        self.ptrs.append(ptr)
        self.runs.append(run)
        self.keys.append(key)
        self.numbers.append(numbers)

    def table(self) -> tuple[np.ndarray[Any, Any], int, int]:
        """(the table, its work items, chunks in an item)."""
        run = StridedRun(*np.array(self.runs, dtype=np.int64).T)  # of arrays, [columns] each
        chunks = 1
        if self.short:
            size: Any = run.numel
            items = (size + SHORT_BLOCK_SIZE - 1) // SHORT_BLOCK_SIZE
        else:
            chunks = min(CHUNKS, max(1, int(run.numel.sum()) // (_BUSY * BLOCK_SIZE * 4)))  # type: ignore[attr-defined]
            item_size = chunks * BLOCK_SIZE * 4
            # A row that does not begin with a counter block begins with part of one.
            spill = np.where((run.start | run.stride) & 3, 3, 0)
            size = (run.length + spill + item_size - 1) // item_size
            items = size * run.rows
        ends = items.cumsum()
        column = TableColumn(
            first_item=ends - items,
            ptr=np.array(self.ptrs, dtype=np.int64),
            start=run.start,
            length=run.length,
            stride=run.stride,
            size=size,
            key=np.array(self.keys, dtype=np.uint64).view(np.int64),
        )
        table = np.concatenate([np.stack(column), np.array(self.numbers, dtype=np.int64).T])
        return table, int(ends[-1]), chunks


def fill(entries: Iterable[Entry], device: torch.device) -> None:
    """Fill contiguous tensors on one device: one table, one copy, and one launch per kind of map and dtype.

    Args:
        entries: tensors whose memory does not meet.
        device: where they lie; for the interpreter, the CPU.
    """
    launches: dict[tuple[str, bool], _Launch] = {}
    for ptr, numel, prepared, key, runs in entries:
        for run in (StridedRun(0, 1, numel, 0),) if runs is None else runs:
            short = run.rows > 1 and run.length < SHORT
            launch = launches.get((prepared.name, short))
            if launch is None:
                launch = launches[prepared.name, short] = _Launch(prepared.group, short)
            launch.add(ptr, run, key, prepared.numbers)
            ptr += run.numel * prepared.group.dtype.itemsize
    work = [(launch, *launch.table()) for launch in launches.values()]
    tables = on_device([table for _, table, *_ in work], device)
    start = 0
    for launch, table, items, chunks in work:
        _launch(launch, tables[start : start + table.size], items, chunks, device)
        start += table.size


def _launch(launch: _Launch, table: Tensor, items: int, chunks: int, device: torch.device) -> None:
    transform, has_mean, dtype = launch.group
    kernel = fill_short_rows if launch.short else fill_rows
    with launching(device):
        kernel[(items,)](
            table,
            len(launch.runs),
            chunks,
            TRANSFORM=transform,
            HAS_MEAN=has_mean,
            OUT_DTYPE=_OUT_DTYPES[dtype],
            COMPUTE_DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
            ITEMSIZE=dtype.itemsize,
            BLOCK_SIZE=SHORT_BLOCK_SIZE if launch.short else BLOCK_SIZE,
            INTERPRETED=INTERPRETED,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
