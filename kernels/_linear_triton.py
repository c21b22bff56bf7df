"""linear_relu on the GPU: two candidates for the forward pass, and the backward pass's elementwise part.

1. One kernel: a GEMM whose epilogue adds the bias, finds what is not finite, applies ReLU and stores. `tiles` reads
   and writes by bulk copies (compute capability 9.0 and later), `pointers` by ordinary loads.
2. cuBLAS through torch.addmm, then `relu_in_place`: one pass that finds what is not finite and applies ReLU.

A kernel like the first reaches 80 to 97 % of cuBLAS on an H100, and the pass costs about 530 / K of the GEMM's time:
`_fused` chooses by K. The table of tiles and that choice come from this model and from compiled code; no GPU has
been measured.

What is flagged is the value before ReLU as the output's type holds it. Nothing has to be rounded to know it: a value
becomes an infinity exactly where its magnitude reaches LIMITS, half a step beyond the largest finite number. The
magnitudes' maximum, which keeps NaNs, takes about one instruction per element; only a tile where it reaches the limit
is looked at closely.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common_triton import INTERPRETED, launching, rounded

LIMITS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000}  # bits of a float32
PASS = 4096  # elements that a program of the pass takes
SUM_ROWS, SUM_STEP, SUM_COLUMNS = 256, 16, 128  # that a program of the mask takes, rows at once, columns
ONE_KERNEL = 2048  # the depth up to which the one kernel is expected to be faster: it loses 20 % to cuBLAS, or less

_INFINITY = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_GROUP = tl.constexpr(8)  # rows of tiles worked on together, so that their operands are found in the L2 cache


class Tile(NamedTuple):
    """What a program computes at once, and how."""

    rows: int
    columns: int
    step: int  # bytes along the depth
    stages: int  # steps in flight
    warps: int
    parts: int  # in which the tile is stored: fewer registers


# By compute capability. Largest first: the first that gives every processor a tile is taken, else the last.
TILES = {
    10: (Tile(128, 128, 128, 4, 8, 2), Tile(64, 128, 128, 4, 4, 2)),
    9: (Tile(128, 256, 128, 4, 8, 4), Tile(128, 128, 128, 4, 8, 2), Tile(64, 128, 128, 4, 4, 2)),
    8: (Tile(128, 128, 64, 4, 8, 2), Tile(64, 64, 64, 4, 4, 1)),
}


# ---------------------------------------------------------------------------------------------------------------
# The epilogue


@triton.jit
def _halves(v):
    """The left and the right half of a tile's columns."""
    return v.reshape(v.shape[0], 2, v.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _quarters(v):
    left, right = _halves(v)
    a, b = _halves(left)
    c, d = _halves(right)
    return a, b, c, d


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _check(flags, v, row, column, rows, columns, LIMIT: tl.constexpr, LOOK: tl.constexpr):
    """Have a tile of float32 looked at closely where it holds what is not finite."""
    if LOOK is not None:
        a, b, c, d = _quarters(v)
        most = _larger(_larger(tl.abs(a), tl.abs(b)), _larger(tl.abs(c), tl.abs(d)))
        if tl.max(most.to(tl.int32, bitcast=True) & _MAGNITUDE) >= LIMIT:
            LOOK(flags, v, row, column, rows, columns, LIMIT)


@triton.jit
def look(flags, v, row, column, rows, columns, LIMIT: tl.constexpr):
    """Or what a tile of float32 holds into the flag word: NaN 1, +inf 2, -inf 4. What lies beyond the matrix is
    left out: zeros in an operand make NaNs there, and the bias an infinity."""
    i = tl.arange(0, v.shape[0])
    j = tl.arange(0, v.shape[1])
    inside = (i < rows - row)[:, None] & (j < columns - column)[None, :]
    word = 0
    for kind in range(3):  # one after the other: side by side they would need more registers than there are
        magnitude = tl.where(kind == 0, 0x7FFFFFFF, 0xFFFFFFFF).to(tl.uint32)
        minus = tl.where(kind == 2, 0x80000000, 0).to(tl.uint32)
        first = tl.where(kind == 0, 0x7F800001, LIMIT).to(tl.uint32)
        last = tl.where(kind == 0, 0x7FFFFFFF, 0x7F800000).to(tl.uint32)
        bits = (v.to(tl.uint32, bitcast=True) ^ minus) & magnitude
        word |= tl.max((inside & (bits - first <= last - first)).to(tl.int32)) << kind
    if word != 0:
        tl.atomic_or(flags, word, sem="relaxed")


@triton.jit
def _relu(v, ELEMENT: tl.constexpr, INTERPRETED: tl.constexpr):
    """As torch's: a NaN stays one."""
    return rounded(tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL), ELEMENT, INTERPRETED)


@triton.jit
def _with_bias(v, bias, j, columns):
    if bias is not None:
        v += tl.load(bias + j, mask=j < columns, other=0.0).to(tl.float32)[None, :]
    return v


@triton.jit
def _place(tile, down, across):
    """The row and column of a tile, in tiles: groups of _GROUP rows, column by column within them."""
    group = tile // (_GROUP * across)
    height = tl.minimum(down - group * _GROUP, _GROUP)
    within = tile - group * (_GROUP * across)
    return group * _GROUP + within % height, within // height


# ---------------------------------------------------------------------------------------------------------------
# GEMMs with that epilogue. x is (rows, depth), w is (columns, depth), both with consecutive elements along depth.


@triton.jit
def _dot(a, b, v, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # where it multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, v, input_precision="tf32")


@triton.jit
def _store_parts(y, v, row, column, PARTS: tl.constexpr, ELEMENT: tl.constexpr, INTERPRETED: tl.constexpr):
    if PARTS == 1:
        y.store([row, column], _relu(v, ELEMENT, INTERPRETED))
    else:
        left, right = _halves(v)
        _store_parts(y, left, row, column, PARTS // 2, ELEMENT, INTERPRETED)
        _store_parts(y, right, row, column + v.shape[1] // 2, PARTS // 2, ELEMENT, INTERPRETED)


@triton.jit
def _write_parts(
    y, v, row, column, rows, columns, PARTS: tl.constexpr, ELEMENT: tl.constexpr, INTERPRETED: tl.constexpr
):
    if PARTS == 1:
        i = row + tl.arange(0, v.shape[0])
        j = column + tl.arange(0, v.shape[1])
        place = i.to(tl.int64)[:, None] * columns + j[None, :]
        tl.store(y + place, _relu(v, ELEMENT, INTERPRETED), mask=(i < rows)[:, None] & (j < columns)[None, :])
    else:
        left, right = _halves(v)
        _write_parts(y, left, row, column, rows, columns, PARTS // 2, ELEMENT, INTERPRETED)
        _write_parts(y, right, row, column + v.shape[1] // 2, rows, columns, PARTS // 2, ELEMENT, INTERPRETED)


@triton.jit(do_not_specialize=["rows", "columns", "depth", "programs"])
def tiles(
    x, w, y, bias, flags, rows, columns, depth, programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    LOOK: tl.constexpr, LIMIT: tl.constexpr, ELEMENT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Bulk copies; persistent: each of `programs` programs takes every programs-th tile. x, w and y are descriptors."""
    tl.assume(depth > 0)  # or the epilogue is compiled once more, for a loop that never runs
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        i, j = _place(tile, down, across)
        row, column = i * ROWS, j * COLUMNS
        v = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, depth, STEP):
            v = _dot(x.load([row, k]), w.load([column, k]).T, v, INTERPRETED)
        v = _with_bias(v, bias, column + tl.arange(0, COLUMNS), columns)
        _check(flags, v, row, column, rows, columns, LIMIT, LOOK)
        _store_parts(y, v, row, column, PARTS, ELEMENT, INTERPRETED)


@triton.jit(do_not_specialize=["rows"])
def pointers(
    x, w, y, bias, flags, rows, columns, depth, x_stride, w_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    LOOK: tl.constexpr, LIMIT: tl.constexpr, ELEMENT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Ordinary loads; a program for each tile. x and w have consecutive elements along the depth, y is contiguous."""
    i, j = _place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS))
    row, column = i * ROWS, j * COLUMNS
    k = tl.arange(0, STEP)
    # What lies beyond the matrix is computed from its first rows again: there nothing needs a mask but the store.
    from_x = x + ((row + tl.arange(0, ROWS)) % rows).to(tl.int64)[:, None] * x_stride + k[None, :]
    from_w = w + ((column + tl.arange(0, COLUMNS)) % columns).to(tl.int64)[None, :] * w_stride + k[:, None]
    v = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(0, depth, STEP):
        left = tl.load(from_x, mask=(k < depth - at)[None, :], other=0.0)
        right = tl.load(from_w, mask=(k < depth - at)[:, None], other=0.0)
        v = _dot(left, right, v, INTERPRETED)
        from_x += STEP
        from_w += STEP
    v = _with_bias(v, bias, (column + tl.arange(0, COLUMNS)) % columns, columns)
    _check(flags, v, row, column, rows, columns, LIMIT, LOOK)
    _write_parts(y, v, row, column, rows, columns, PARTS, ELEMENT, INTERPRETED)


# ---------------------------------------------------------------------------------------------------------------
# Elementwise passes


@triton.jit
def _rectify(y, flags, place, size, WHOLE: tl.constexpr, LIMIT: tl.constexpr, LOOK: tl.constexpr):
    inside = place < size
    v = tl.load(y + place) if WHOLE else tl.load(y + place, mask=inside, other=0.0)
    wide = v.to(tl.float32)
    if LOOK is not None:  # noqa: SIM102 - the one is decided when compiling, the other when running
        if tl.max(wide.to(tl.int32, bitcast=True) & _MAGNITUDE) >= LIMIT:
            LOOK(flags, wide[None, :], 0, 0, 1, v.shape[0], LIMIT)
    wide = tl.maximum(wide, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if WHOLE:
        tl.store(y + place, wide.to(v.dtype))
    else:
        tl.store(y + place, wide.to(v.dtype), mask=inside)


@triton.jit(do_not_specialize=["size"])
def relu_in_place(y, flags, size, BLOCK: tl.constexpr, LIMIT: tl.constexpr, LOOK: tl.constexpr):
    """ReLU of `size` consecutive elements, flagged before it; one program for each BLOCK of them."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    if first + BLOCK <= size:
        _rectify(y, flags, place, size, True, LIMIT, LOOK)
    else:
        _rectify(y, flags, place, size, False, LIMIT, LOOK)


@triton.jit(do_not_specialize=["rows"])
def mask_and_sum(
    grad, y, out, sums, rows, columns, row_stride, column_stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient where ReLU let the value pass, and its sums over each ROWS rows."""
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    total = tl.zeros((STEP, COLUMNS), dtype=tl.float32)
    for at in range(0, ROWS, STEP):
        i = (part * ROWS + at + tl.arange(0, STEP)).to(tl.int64)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        place = i[:, None] * columns + j[None, :]
        g = tl.load(grad + i[:, None] * row_stride + j.to(tl.int64)[None, :] * column_stride, mask=inside, other=0.0)
        kept = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(kept <= 0.0, 0.0, g.to(tl.float32))  # a NaN passes its gradient on, as in torch
        tl.store(out + place, g.to(out.dtype.element_ty), mask=inside)
        total += g
    tl.store(sums + part * columns + j, tl.sum(total, 0), mask=j < columns)


# ---------------------------------------------------------------------------------------------------------------
# The host's side

_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(x: Tensor, w: Tensor, bias: Tensor | None, flags: Tensor | None) -> Tensor:
    """relu(x @ w.T + bias), by the candidate that is expected to be faster.

    Args:
        x: (rows, depth); float32, bfloat16 or float16.
        w: (columns, depth), of x's dtype.
        bias: (columns,), of x's dtype.
        flags: the word to or into; None checks nothing.

    Returns:
        (rows, columns), contiguous.
    """
    if _fused(x, w):
        return gemm(x, w, bias, flags)
    y = x @ w.t() if bias is None else torch.addmm(bias, x, w.t())
    return rectify_(y, flags)


def _fused(x: Tensor, w: Tensor) -> bool:
    if torch.version.hip is not None or not 0 < x.shape[1] <= ONE_KERNEL:
        return False
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return False  # without tensor cores there is nothing to win
    columns = w.shape[0]
    return x.shape[0] > 0 and columns > 0 and columns * w.itemsize % 16 == 0 and _aligned(x) and _aligned(w)


def _aligned(x: Tensor) -> bool:
    """Whether bulk copies and 16-byte loads can read its rows, which do not overlap."""
    stride = x.stride(0)
    return x.stride(1) == 1 and stride >= x.shape[1] and stride * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


@functools.cache
def _machine(index: int | None) -> tuple[int, int]:
    """(generation, processors) of a GPU; for the interpreter, None."""
    if index is None:
        return 9, 3
    major = torch.cuda.get_device_capability(index)[0]
    return major if major in TILES else 8, torch.cuda.get_device_properties(index).multi_processor_count


def _tile(rows: int, columns: int, generation: int, processors: int) -> Tile:
    for tile in TILES[generation]:
        if triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= processors:
            return tile
    return TILES[generation][-1]


def gemm(
    x: Tensor, w: Tensor, bias: Tensor | None, flags: Tensor | None, generation: int | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """`forward` by one kernel. For bulk copies x, w and the result must have aligned rows."""
    rows, depth = x.shape
    columns = w.shape[0]
    machine, processors = _machine(x.device.index)
    generation = generation or machine
    tile = tile or _tile(rows, columns, generation, processors)
    step = tile.step // x.itemsize
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    tiled = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    common: dict[str, Any] = {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "STEP": step,
        "PARTS": tile.parts,
        "LOOK": None if flags is None else look,
        "LIMIT": LIMITS[x.dtype],
        "ELEMENT": _ELEMENTS[x.dtype],
        "INTERPRETED": INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    with launching(x.device):
        if generation >= 9:
            programs = min(tiled, processors)
            tiles[(programs,)](
                TensorDescriptor.from_tensor(x, [tile.rows, step]),
                TensorDescriptor.from_tensor(w, [tile.columns, step]),
                TensorDescriptor.from_tensor(y, [tile.rows, tile.columns // tile.parts]),
                bias, flags, rows, columns, depth, programs, **common,
            )  # fmt: skip
        else:
            pointers[(tiled,)](x, w, y, bias, flags, rows, columns, depth, x.stride(0), w.stride(0), **common)
    return y


def rectify_(y: Tensor, flags: Tensor | None) -> Tensor:
    """ReLU in place of a contiguous tensor, flagged before it."""
    if y.numel() > 0:
        with launching(y.device):
            relu_in_place[(triton.cdiv(y.numel(), PASS),)](
                y, flags, y.numel(),
                BLOCK=PASS, LIMIT=_INFINITY.value, LOOK=None if flags is None else look, num_warps=8,
            )  # fmt: skip
    return y


def masked(grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(grad where y is not <= 0, the sums of its columns in float32), reading both once.

    Args:
        grad: (rows, columns), any strides.
        y: (rows, columns), contiguous, not empty.
    """
    rows, columns = y.shape
    parts = triton.cdiv(rows, SUM_ROWS)
    out = torch.empty_like(y)
    sums = torch.empty(parts, columns, dtype=torch.float32, device=y.device)
    with launching(y.device):
        mask_and_sum[(triton.cdiv(columns, SUM_COLUMNS), parts)](
            grad, y, out, sums, rows, columns, grad.stride(0), grad.stride(1),
            ROWS=SUM_ROWS, STEP=SUM_STEP, COLUMNS=SUM_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out, sums.sum(0)
