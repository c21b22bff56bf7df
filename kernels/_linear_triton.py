"""linear_relu on the GPU: two candidates for the forward pass.

1. One kernel: a GEMM whose epilogue adds the bias, flags what is not finite, applies ReLU and stores.
   `linear_relu_tma_kernel` reads and writes by bulk copies (compute capability 9.0 and later), `linear_relu_kernel` by
   ordinary loads.
2. cuBLAS through torch.addmm, then `relu_in_place`: one pass that flags what is not finite and applies ReLU.

A kernel like the first reaches 80 to 97 % of cuBLAS on an H100, and the pass costs about 530 / K of the GEMM's time:
`_fits_one_kernel` chooses by K. The table of tiles and that choice come from this model and from compiled code; no GPU
has been measured.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common_triton import INTERPRETED, launching
from ._linear_epilogue_triton import (
    LIMITS,
    SQUARE_LIMITS,
    activated,
    add_bias_and_flag,
    flag_tile,
    mask_and_sum,
    relu_in_place,
    split_columns,
)

__all__ = ["forward", "mask_and_sum"]

ONE_KERNEL_MAX_K = 2048  # up to here the one kernel is expected to be faster: it loses 20 % to cuBLAS, or less
ONE_KERNEL_MAX_SIZE = 2**31 - 256  # rows and columns are counted in 32 bits, up to a tile beyond the last of them
GROUP_SIZE_M = tl.constexpr(8)  # rows of tiles worked on together, so that their operands are found in the L2 cache

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tile(NamedTuple):
    """What a program computes at once, and how."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K_BYTES: int
    num_stages: int
    num_warps: int
    EPILOGUE_SUBTILE: int  # parts in which the tile is stored: fewer registers


# By the major version of the compute capability. Largest first: the first that gives every SM a tile is taken, else
# the last.
TILES = {
    10: (Tile(128, 128, 128, 4, 8, 2), Tile(64, 128, 128, 4, 4, 2)),
    9: (Tile(128, 256, 128, 4, 8, 4), Tile(128, 128, 128, 4, 8, 2), Tile(64, 128, 128, 4, 4, 2)),
    8: (Tile(128, 128, 64, 4, 8, 2), Tile(64, 64, 64, 4, 4, 1)),
}


@triton.jit
def _tile_position(tile_id, num_tiles_m, num_tiles_n):
    """(pid_m, pid_n) of a tile: groups of GROUP_SIZE_M rows of tiles, column by column within them."""
    group_id = tile_id // (GROUP_SIZE_M * num_tiles_n)
    group_size_m = tl.minimum(num_tiles_m - group_id * GROUP_SIZE_M, GROUP_SIZE_M)
    within = tile_id - group_id * (GROUP_SIZE_M * num_tiles_n)
    return group_id * GROUP_SIZE_M + within % group_size_m, within // group_size_m


@triton.jit
def _dot(x, w, acc, INTERPRETED: tl.constexpr):
    """acc + x @ w: (BLOCK_M, BLOCK_K) by (BLOCK_K, BLOCK_N), float32 by TF32."""
    if INTERPRETED:  # where it multiplies the bits of bfloat16 as integers
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision="tf32")


@triton.jit
def _store_activated_tma(
    y_desc, acc, start_m, start_n,
    EPILOGUE_SUBTILE: tl.constexpr, SQUARED: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[start_m :, start_n :] = ReLU of acc, or its square, in EPILOGUE_SUBTILE parts side by side."""
    if EPILOGUE_SUBTILE == 1:
        y_desc.store([start_m, start_n], activated(acc, SQUARED, DTYPE, INTERPRETED))
    else:
        left, right = split_columns(acc)
        middle = start_n + acc.shape[1] // 2
        _store_activated_tma(y_desc, left, start_m, start_n, EPILOGUE_SUBTILE // 2, SQUARED, DTYPE, INTERPRETED)
        _store_activated_tma(y_desc, right, start_m, middle, EPILOGUE_SUBTILE // 2, SQUARED, DTYPE, INTERPRETED)


@triton.jit
def _store_activated(
    y_ptr, acc, start_m, start_n, M, N,
    EPILOGUE_SUBTILE: tl.constexpr, SQUARED: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """As _store_activated_tma, by ordinary stores into a contiguous (M, N)."""
    if EPILOGUE_SUBTILE == 1:
        offs_m = start_m + tl.arange(0, acc.shape[0])
        offs_n = start_n + tl.arange(0, acc.shape[1])
        offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(y_ptr + offsets, activated(acc, SQUARED, DTYPE, INTERPRETED), mask=mask)
    else:
        left, right = split_columns(acc)
        middle = start_n + acc.shape[1] // 2
        _store_activated(y_ptr, left, start_m, start_n, M, N, EPILOGUE_SUBTILE // 2, SQUARED, DTYPE, INTERPRETED)
        _store_activated(y_ptr, right, start_m, middle, M, N, EPILOGUE_SUBTILE // 2, SQUARED, DTYPE, INTERPRETED)


@triton.jit(do_not_specialize=["M", "N", "K", "num_programs"])
def linear_relu_tma_kernel(
    x_desc, w_desc, y_desc,  # inputs (M, K) and (N, K), output (M, N): tensor descriptors
    bias_ptr, flag_ptr,  # input: (N,) or None; output: int32, or-ed into, or None
    M, N, K, num_programs,  # sizes
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EPILOGUE_SUBTILE: tl.constexpr,  # meta
    FLAG_TILE: tl.constexpr, LIMIT: tl.constexpr, POSITIVE_LIMIT: tl.constexpr, FLAG_PRODUCT: tl.constexpr,
    SQUARED: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y = relu(x @ w.T + bias), or its square, flagged before ReLU, by bulk copies. Persistent: a program takes every
    num_programs-th tile."""
    tl.assume(K > 0)  # or the epilogue is compiled once more, for a loop that never runs
    num_tiles_m, num_tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile_id in tl.range(tl.program_id(0), num_tiles_m * num_tiles_n, num_programs, flatten=True):
        pid_m, pid_n = _tile_position(tile_id, num_tiles_m, num_tiles_n)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start_k in range(0, K, BLOCK_K):
            acc = _dot(x_desc.load([start_m, start_k]), w_desc.load([start_n, start_k]).T, acc, INTERPRETED)
        acc = add_bias_and_flag(
            acc, bias_ptr, flag_ptr, start_n + tl.arange(0, BLOCK_N), start_m, start_n, M, N,
            LIMIT, POSITIVE_LIMIT, FLAG_TILE, FLAG_PRODUCT, INTERPRETED,
        )  # fmt: skip
        _store_activated_tma(y_desc, acc, start_m, start_n, EPILOGUE_SUBTILE, SQUARED, DTYPE, INTERPRETED)


@triton.jit(do_not_specialize=["M"])
def linear_relu_kernel(
    x_ptr, w_ptr, y_ptr,  # inputs (M, K) and (N, K), with consecutive elements along K; output (M, N), contiguous
    bias_ptr, flag_ptr,  # input: (N,) or None; output: int32, or-ed into, or None
    M, N, K,  # sizes
    stride_xm, stride_wn,  # strides
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EPILOGUE_SUBTILE: tl.constexpr,  # meta
    FLAG_TILE: tl.constexpr, LIMIT: tl.constexpr, POSITIVE_LIMIT: tl.constexpr, SQUARED: tl.constexpr,
    DTYPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y = relu(x @ w.T + bias), or its square, flagged before ReLU, by ordinary loads; a program for each tile."""
    pid_m, pid_n = _tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_k = tl.arange(0, BLOCK_K)
    # What lies beyond the matrix is computed from its first rows again: there nothing needs a mask but the store.
    offs_m = (start_m + tl.arange(0, BLOCK_M)) % M
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    offs_n = (start_n + tl.arange(0, BLOCK_N)) % N
    w_ptrs = w_ptr + offs_n.to(tl.int64)[None, :] * stride_wn + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=(offs_k < K - start_k)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(offs_k < K - start_k)[:, None], other=0.0)
        acc = _dot(x, w, acc, INTERPRETED)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    acc = add_bias_and_flag(
        acc, bias_ptr, flag_ptr, offs_n, start_m, start_n, M, N,
        LIMIT, POSITIVE_LIMIT, FLAG_TILE, False, INTERPRETED,
    )  # fmt: skip
    _store_activated(y_ptr, acc, start_m, start_n, M, N, EPILOGUE_SUBTILE, SQUARED, DTYPE, INTERPRETED)


def forward(
    x: Tensor, w: Tensor, bias: Tensor | None, flags: Tensor | None, flag_square: bool = False, squared: bool = False
) -> Tensor:
    """relu(x @ w.T + bias), by the candidate that is expected to be faster.

    Args:
        x: (M, K); float32, bfloat16 or float16.
        w: (N, K), of x's dtype.
        bias: (N,), of x's dtype.
        flags: (1,), int32: or-ed into; None checks nothing.
        flag_square: whether an overflow of the square is flagged as +inf too.
        squared: whether the square of ReLU is returned.

    Returns:
        (M, N), contiguous.
    """
    if _fits_one_kernel(x, w):
        return gemm(x, w, bias, flags, flag_square=flag_square, squared=squared)
    y = x @ w.t() if bias is None else torch.addmm(bias, x, w.t())
    return relu_in_place(y, flags, flag_square, squared)


def _fits_one_kernel(x: Tensor, w: Tensor) -> bool:
    (M, K), N = x.shape, w.shape[0]
    if torch.version.hip is not None or not 0 < K <= ONE_KERNEL_MAX_K:
        return False
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return False  # without tensor cores there is nothing to win
    if not (0 < M <= ONE_KERNEL_MAX_SIZE and 0 < N <= ONE_KERNEL_MAX_SIZE):
        return False
    return N * w.itemsize % 16 == 0 and _aligned(x) and _aligned(w)


def _aligned(x: Tensor) -> bool:
    """Whether bulk copies and 16-byte loads can read its rows, which do not overlap."""
    stride = x.stride(0)
    return x.stride(1) == 1 and stride >= x.shape[1] and stride * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


@functools.cache
def _device(index: int | None) -> tuple[int, int]:
    """(capability_major, num_sms) of a GPU; of none, for the interpreter, numbers that exercise the kernels."""
    if index is None:
        return 9, 3
    capability_major = torch.cuda.get_device_capability(index)[0]
    num_sms = torch.cuda.get_device_properties(index).multi_processor_count
    return capability_major if capability_major in TILES else 8, num_sms


def _num_tiles(M: int, N: int, tile: Tile) -> int:
    return triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N)


def _tile(M: int, N: int, capability_major: int, num_sms: int) -> Tile:
    tiles = TILES[capability_major]
    return next((tile for tile in tiles if _num_tiles(M, N, tile) >= num_sms), tiles[-1])


def gemm(
    x: Tensor, w: Tensor, bias: Tensor | None, flags: Tensor | None, capability_major: int | None = None,
    tile: Tile | None = None, flag_square: bool = False, squared: bool = False,
) -> Tensor:  # fmt: skip
    """`forward` by one kernel. For bulk copies x, w and the result must have aligned rows."""
    (M, K), N = x.shape, w.shape[0]
    device_major, num_sms = _device(x.device.index)
    capability_major = capability_major or device_major
    tile = tile or _tile(M, N, capability_major, num_sms)
    BLOCK_K = tile.BLOCK_K_BYTES // x.itemsize
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    meta: dict[str, Any] = {
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "EPILOGUE_SUBTILE": tile.EPILOGUE_SUBTILE,
        "FLAG_TILE": None if flags is None else flag_tile,
        "LIMIT": LIMITS[x.dtype],
        "POSITIVE_LIMIT": (SQUARE_LIMITS if flag_square else LIMITS)[x.dtype],
        "SQUARED": squared,
        "DTYPE": _DTYPES[x.dtype],
        "INTERPRETED": INTERPRETED,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
    num_tiles = _num_tiles(M, N, tile)
    with launching(x.device):
        if capability_major >= 9:
            num_programs = min(num_tiles, num_sms)
            linear_relu_tma_kernel[(num_programs,)](
                TensorDescriptor.from_tensor(x, [tile.BLOCK_M, BLOCK_K]),
                TensorDescriptor.from_tensor(w, [tile.BLOCK_N, BLOCK_K]),
                TensorDescriptor.from_tensor(y, [tile.BLOCK_M, tile.BLOCK_N // tile.EPILOGUE_SUBTILE]),
                bias, flags, M, N, K, num_programs, FLAG_PRODUCT=capability_major >= 10, **meta,
            )  # fmt: skip
        else:
            linear_relu_kernel[(num_tiles,)](x, w, y, bias, flags, M, N, K, x.stride(0), w.stride(0), **meta)
    return y
