"""The flag word of a tensor on a GPU: one read of its memory, one launch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common_triton import launching

CHUNK = 4096  # elements that a program of WARPS warps looks at together, 32 a thread
WARPS = 4
_BUSY = 8  # programs for each processor: enough loads in flight to fill the memory bus
_NAN, _POSITIVE_INF, _NEGATIVE_INF = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
_INF = tl.constexpr(float("inf"))


@triton.jit
def flags_of(x):
    """The flag word of every element."""
    if x.dtype != tl.float64:  # the interpreter compares the bits of a bfloat16
        x = x.to(tl.float32)
    infinite = tl.where(x == _INF, _POSITIVE_INF, tl.where(x == -_INF, _NEGATIVE_INF, 0))
    return tl.where(x != x, _NAN, infinite)


@triton.jit(do_not_specialize=["elements"])
def add_flag(flags, x, elements, CHUNK: tl.constexpr):
    """Or the flag word of x[:elements] into flags[0]; programs that saw nothing write nothing."""
    place = tl.arange(0, CHUNK)
    seen = tl.zeros([CHUNK], tl.int32)
    chunk = tl.program_id(0).to(tl.int64)
    whole = elements // CHUNK
    while chunk < whole:  # nothing is masked here, so that a thread loads 16 bytes at a time
        seen |= flags_of(tl.load(x + chunk * CHUNK + place))
        chunk += tl.num_programs(0)
    if chunk == whole:  # the program whose turn it would be takes the tail
        at = chunk * CHUNK + place
        seen |= flags_of(tl.load(x + at, mask=at < elements, other=0.0))
    if tl.max(seen, 0) != 0:
        word = tl.max(seen & _NAN, 0) | tl.max(seen & _POSITIVE_INF, 0) | tl.max(seen & _NEGATIVE_INF, 0)
        tl.atomic_or(flags, word)


@functools.cache
def _programs(device: torch.device) -> int:
    return 2 if device.type == "cpu" else _BUSY * torch.cuda.get_device_properties(device).multi_processor_count


def launch(flags: Tensor, tensor: Tensor) -> None:
    """Or the flag word of a real floating tensor, whose elements fill their memory in any order, into flags[0]."""
    elements, device = tensor.numel(), tensor.device
    programs = min(elements // CHUNK + 1, _programs(device))
    with launching(device):
        add_flag[(programs,)](flags, tensor, elements, CHUNK=CHUNK, num_warps=WARPS)
