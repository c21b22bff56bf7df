"""The non-finite flag of a tensor on a GPU: one read of its memory, one launch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common_triton import launching
from .nonfinite import NAN, NEGATIVE_INF, POSITIVE_INF

BLOCK_SIZE = 4096  # elements that a program of NUM_WARPS warps reads at once, 32 a thread
NUM_WARPS = 4
PROGRAMS_PER_SM = 8  # enough loads in flight to fill the memory bus
_NAN, _POSITIVE_INF, _NEGATIVE_INF = map(tl.constexpr, (NAN, POSITIVE_INF, NEGATIVE_INF))
_INF = tl.constexpr(float("inf"))


@triton.jit
def flags_of(x):
    """The flag of every element: NaN 1, +inf 2, -inf 4, else 0."""
    if x.dtype != tl.float64:  # the interpreter compares the bits of a bfloat16
        x = x.to(tl.float32)
    infinite = tl.where(x == _INF, _POSITIVE_INF, tl.where(x == -_INF, _NEGATIVE_INF, 0))
    return tl.where(x != x, _NAN, infinite)


@triton.jit(do_not_specialize=["n_elements"])
def add_flag_kernel(
    flag_ptr,  # output: int32, or-ed into
    x_ptr,  # input: (n_elements,)
    n_elements,  # size
    BLOCK_SIZE: tl.constexpr,  # meta
):
    """flag |= or of flags_of(x[i]); the programs share out the blocks, and those that saw nothing write nothing."""
    offsets = tl.arange(0, BLOCK_SIZE)
    flags = tl.zeros([BLOCK_SIZE], tl.int32)
    block = tl.program_id(0).to(tl.int64)
    full_blocks = n_elements // BLOCK_SIZE
    while block < full_blocks:  # nothing is masked here, so that a thread loads 16 bytes at a time
        flags |= flags_of(tl.load(x_ptr + block * BLOCK_SIZE + offsets))
        block += tl.num_programs(0)
    if block == full_blocks:  # the program whose turn it would be takes the tail
        tail = block * BLOCK_SIZE + offsets
        flags |= flags_of(tl.load(x_ptr + tail, mask=tail < n_elements, other=0.0))
    if tl.max(flags, 0) != 0:
        flag = tl.max(flags & _NAN, 0) | tl.max(flags & _POSITIVE_INF, 0) | tl.max(flags & _NEGATIVE_INF, 0)
        tl.atomic_or(flag_ptr, flag)


@functools.cache
def _max_programs(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 2
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def launch(flag: Tensor, tensor: Tensor) -> None:
    """Or the flag of a real floating tensor, whose elements fill their memory in any order, into flag[0]."""
    n_elements, device = tensor.numel(), tensor.device
    programs = min(n_elements // BLOCK_SIZE + 1, _max_programs(device))
    with launching(device):
        add_flag_kernel[(programs,)](
            flag, tensor, n_elements, BLOCK_SIZE=BLOCK_SIZE, num_warps=NUM_WARPS, enable_fp_fusion=True
        )
