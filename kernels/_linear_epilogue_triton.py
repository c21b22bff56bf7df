"""What follows linear_relu's GEMM on the GPU: bias, flag and ReLU, as a tile's epilogue or as passes over memory.

What is flagged is the value before ReLU as the output's type holds it. Nothing has to be rounded to know it: a value
becomes an infinity exactly where its magnitude reaches LIMITS, half a step beyond the largest finite number. Where the
square is to be finite too, a positive value counts from SQUARE_LIMITS on. The magnitudes' maximum, which keeps NaNs,
takes about one instruction per element; only a tile where it reaches the lower limit is scanned for each kind.

Kernels take as FLAG_TILE what scans such a tile: `flag_tile`, or None where nothing is to be flagged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common_triton import INTERPRETED, launching, rounded, widened
from .linear import NAN, NEGATIVE_INF, POSITIVE_INF

LIMITS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000}  # bits of a float32
# A dtype's numbers end at 2^e, e = 128 or 16, and the squares of those from 2^(e/2) on, which are spaced likewise: so
# the limit's exponent is halved, and the half step stays.
SQUARE_LIMITS = {dtype: limit - ((64 if dtype != torch.float16 else 8) << 23) for dtype, limit in LIMITS.items()}
RELU_BLOCK = 4096  # elements that a program of relu_in_place_kernel takes
MASK_ROWS, MASK_BLOCK_M, MASK_BLOCK_N = 256, 16, 128  # rows that a program of mask_and_sum_kernel takes; its block
MAX_GRID_Y = 65535  # CUDA's

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)

assert (NAN, POSITIVE_INF, NEGATIVE_INF) == (1 << 0, 1 << 1, 1 << 2)  # the kinds, in flag_tile's order


@triton.jit
def split_columns(y):
    """(m, n) -> two of (m, n / 2): the left and the right half of a tile's columns."""
    return y.reshape(y.shape[0], 2, y.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(y, INTERPRETED: tl.constexpr):
    """The largest magnitude in a float32 tile or vector; a NaN if there is one."""
    if INTERPRETED:  # it would call `_max` for each number
        return tl.max(y.to(tl.int32, bitcast=True) & _MAGNITUDE).to(tl.float32, bitcast=True)
    else:
        return tl.reduce(tl.abs(y), None, _max)


@triton.jit
def add_bias_and_flag(
    y, bias_ptr, flag_ptr, offs_n, start_m, start_n, M, N,
    LIMIT: tl.constexpr, POSITIVE_LIMIT: tl.constexpr, FLAG_TILE: tl.constexpr, FLAG_PRODUCT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y + bias[offs_n], for a float32 tile of an (M, N) matrix; flag |= the kinds of non-finite values in it: one
    maximum if there are none.

    LIMIT: the bits of the magnitude from which on a value is an infinity; POSITIVE_LIMIT <= LIMIT: a positive one.
    FLAG_PRODUCT: whether the maximum is that of y and that of the bias, whose sum no magnitude exceeds once it is
        rounded like them. On sm_100 the sums' own maximum has the compiler add in pairs, and move them about for it.
    """
    if FLAG_PRODUCT and FLAG_TILE is not None:
        largest = _largest(y, INTERPRETED)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        y += bias[None, :]
        if FLAG_PRODUCT and FLAG_TILE is not None:
            largest += _largest(bias, INTERPRETED)
    if FLAG_TILE is not None:
        if not FLAG_PRODUCT:
            left, right = split_columns(y)
            a, b = split_columns(left)
            c, d = split_columns(right)
            largest = _max(_max(tl.abs(a), tl.abs(b)), _max(tl.abs(c), tl.abs(d)))
            bits = tl.max(largest.to(tl.int32, bitcast=True) & _MAGNITUDE)
        else:
            bits = largest.to(tl.int32, bitcast=True) & _MAGNITUDE
        if bits >= POSITIVE_LIMIT:
            FLAG_TILE(flag_ptr, y, start_m, start_n, M, N, LIMIT, POSITIVE_LIMIT)
    return y


@triton.jit
def flag_tile(flag_ptr, y, start_m, start_n, M, N, LIMIT: tl.constexpr, POSITIVE_LIMIT: tl.constexpr):
    """flag |= the kinds of non-finite values in a float32 tile: NaN 1, +inf 2, -inf 4.

    What lies beyond the matrix is left out: zeros in an operand make NaNs there, and the bias an infinity.
    """
    if y.shape[0] * y.shape[1] > 128 * 128:  # by halves: the whole would need more registers than there are
        left, right = split_columns(y)
        flag_tile(flag_ptr, left, start_m, start_n, M, N, LIMIT, POSITIVE_LIMIT)
        flag_tile(flag_ptr, right, start_m, start_n + y.shape[1] // 2, M, N, LIMIT, POSITIVE_LIMIT)
    else:
        offs_m = tl.arange(0, y.shape[0])
        offs_n = tl.arange(0, y.shape[1])
        mask = (offs_m < M - start_m)[:, None] & (offs_n < N - start_n)[None, :]
        flag = 0
        for kind in range(3):  # one after the other: side by side they would need more registers than there are
            magnitude = tl.where(kind == 0, 0x7FFFFFFF, 0xFFFFFFFF).to(tl.uint32)
            sign = tl.where(kind == 2, 0x80000000, 0).to(tl.uint32)
            first = tl.where(kind == 0, 0x7F800001, tl.where(kind == 1, POSITIVE_LIMIT, LIMIT)).to(tl.uint32)
            last = tl.where(kind == 0, 0x7FFFFFFF, 0x7F800000).to(tl.uint32)
            bits = (y.to(tl.uint32, bitcast=True) ^ sign) & magnitude
            flag |= tl.max((mask & (bits - first <= last - first)).to(tl.int32)) << kind
        if flag != 0:
            tl.atomic_or(flag_ptr, flag, sem="relaxed")


@triton.jit
def activated(y, SQUARED: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """max(y, 0), rounded to the output's type; if SQUARED, its square, rounded again. A NaN stays one, as in torch."""
    y = rounded(tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL), DTYPE, INTERPRETED)
    if SQUARED:
        y = widened(y, INTERPRETED)
        y = rounded(y * y, DTYPE, INTERPRETED)
    return y


@triton.jit
def _relu_block(
    y_ptr, flag_ptr, offsets, n_elements,
    FULL: tl.constexpr, LIMIT: tl.constexpr, POSITIVE_LIMIT: tl.constexpr, SQUARED: tl.constexpr,
    FLAG_TILE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    mask = offsets < n_elements
    x = tl.load(y_ptr + offsets) if FULL else tl.load(y_ptr + offsets, mask=mask, other=0.0)
    y = widened(x, INTERPRETED)
    if FLAG_TILE is not None:  # noqa: SIM102 - the one is decided when compiling, the other when running
        if tl.max(y.to(tl.int32, bitcast=True) & _MAGNITUDE) >= POSITIVE_LIMIT:
            FLAG_TILE(flag_ptr, y[None, :], 0, 0, 1, x.shape[0], LIMIT, POSITIVE_LIMIT)
    y = activated(y, SQUARED, x.dtype, INTERPRETED)
    if FULL:
        tl.store(y_ptr + offsets, y)
    else:
        tl.store(y_ptr + offsets, y, mask=mask)


@triton.jit(do_not_specialize=["n_elements"])
def relu_in_place_kernel(
    y_ptr, flag_ptr,  # input and outputs: (n_elements,), contiguous; int32
    n_elements,  # size
    BLOCK_SIZE: tl.constexpr, LIMIT: tl.constexpr, POSITIVE_LIMIT: tl.constexpr, SQUARED: tl.constexpr,  # meta
    FLAG_TILE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y = max(y, 0), or its square, flagged before it; one program for each block."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    offsets = start + tl.arange(0, BLOCK_SIZE)
    if start + BLOCK_SIZE <= n_elements:
        _relu_block(y_ptr, flag_ptr, offsets, n_elements, True, LIMIT, POSITIVE_LIMIT, SQUARED, FLAG_TILE, INTERPRETED)
    else:
        _relu_block(y_ptr, flag_ptr, offsets, n_elements, False, LIMIT, POSITIVE_LIMIT, SQUARED, FLAG_TILE, INTERPRETED)


@triton.jit(do_not_specialize=["M"])
def mask_and_sum_kernel(
    grad_ptr, y_ptr,  # inputs: (M, N), of any strides and contiguous
    out_ptr, sums_ptr,  # outputs: (M, N), contiguous; (cdiv(M, ROWS), N) float32
    M, N,  # sizes
    stride_grad_m, stride_grad_n,  # strides
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SQUARED: tl.constexpr,  # meta
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = where(y <= 0, 0, grad), of grad * 2y if SQUARED; sums[p] = out[p * ROWS : (p + 1) * ROWS].sum(0).

    A program takes BLOCK_N columns of one p.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1).to(M.dtype)  # of 64 bits where M has them
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        offs_m = (part * ROWS + start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        offsets = offs_m[:, None] * N + offs_n[None, :]
        grad_ptrs = grad_ptr + offs_m[:, None] * stride_grad_m + offs_n.to(tl.int64)[None, :] * stride_grad_n
        grad = tl.load(grad_ptrs, mask=mask, other=0.0)
        y = widened(tl.load(y_ptr + offsets, mask=mask, other=0.0), INTERPRETED)
        grad = widened(grad, INTERPRETED)
        if SQUARED:
            grad = widened(rounded(grad * (2.0 * y), out_ptr.dtype.element_ty, INTERPRETED), INTERPRETED)
        grad = tl.where(y <= 0.0, 0.0, grad)  # a NaN passes its gradient on, as in torch
        tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)  # exact
        total += grad
    tl.store(sums_ptr + part * N + offs_n, tl.sum(total, 0), mask=offs_n < N)


def relu_in_place(y: Tensor, flags: Tensor | None, flag_square: bool = False, squared: bool = False) -> Tensor:
    """ReLU in place of a contiguous tensor, flagged before it.

    Args:
        y: float32, bfloat16 or float16.
        flags: (1,), int32: or-ed into; None checks nothing.
        flag_square: whether an overflow of the square is flagged as +inf too.
        squared: whether the square of ReLU is stored.
    """
    if y.numel() > 0:
        with launching(y.device):
            relu_in_place_kernel[(triton.cdiv(y.numel(), RELU_BLOCK),)](
                y, flags, y.numel(),
                BLOCK_SIZE=RELU_BLOCK, LIMIT=LIMITS[y.dtype],
                POSITIVE_LIMIT=(SQUARE_LIMITS if flag_square else LIMITS)[y.dtype], SQUARED=squared,
                FLAG_TILE=None if flags is None else flag_tile, INTERPRETED=INTERPRETED,
                num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
    return y


def mask_and_sum(grad: Tensor, y: Tensor, squared: bool = False) -> tuple[Tensor, Tensor]:
    """(grad where y is not <= 0, the sums of its columns in float32), reading both once.

    Args:
        grad: (M, N), any strides.
        y: (M, N), contiguous, not empty: what ReLU gave.
        squared: whether grad is of y's square: then it is multiplied by 2y.
    """
    M, N = y.shape
    rows = MASK_ROWS
    while (parts := triton.cdiv(M, rows)) > MAX_GRID_Y:
        rows *= 2
    out = torch.empty_like(y)
    sums = torch.empty(parts, N, dtype=torch.float32, device=y.device)
    with launching(y.device):
        mask_and_sum_kernel[(triton.cdiv(N, MASK_BLOCK_N), parts)](
            grad, y, out, sums, M, N, grad.stride(0), grad.stride(1),
            ROWS=rows, BLOCK_M=MASK_BLOCK_M, BLOCK_N=MASK_BLOCK_N, SQUARED=squared, INTERPRETED=INTERPRETED,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, sums.sum(0)
