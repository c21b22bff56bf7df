"""content_sum on the CPU: SplitMix64's finaliser over the elements, in uint64 lanes, summed as it goes.

The sum wraps modulo 2**64, so that its order does not matter: each thread adds up what it claims.
"""

from __future__ import annotations

import functools
import zlib
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from . import checksum
from ._common_numba import SOURCE, add, claim, compiled_job, pointer, run_on_pool
from .region import StridedRun

PIECE_SIZE = 1 << 16  # elements that a thread claims at once
ONE_THREAD = 1 << 18  # elements: up to here a second thread costs more than it gives

_U = np.uint64
_GAMMA = _U(checksum.GAMMA)
(_SHIFT0, _FACTOR0), (_SHIFT1, _FACTOR1) = ((_U(shift), _U(factor)) for shift, factor in checksum.ROUNDS)
_LAST_SHIFT = _U(checksum.LAST_SHIFT)
_CONSTANTS = (checksum.GAMMA, checksum.ROUNDS, checksum.LAST_SHIFT)
_FINGERPRINT = zlib.crc32(repr(_CONSTANTS).encode() + SOURCE)


@njit(forceinline=True)
def _mix(x):
    x = (x ^ (x >> _SHIFT0)) * _FACTOR0
    x = (x ^ (x >> _SHIFT1)) * _FACTOR1
    return x ^ (x >> _LAST_SHIFT)


@functools.cache
def _sum_rows(itemsize: int) -> Any:
    fingerprint, tag = _FINGERPRINT, np.dtype(f"i{itemsize}").type(0)

    def sum_rows(job):
        _ = fingerprint
        x = carray(pointer(job, np.int64(0)), 8)  # the next piece, the sum, address, start, rows, length, stride, size
        start, rows, length, stride, size = x[3], x[4], x[5], x[6], x[7]
        memory = carray(pointer(x[2], tag), rows * length)
        in_row = (length + size - 1) // size  # pieces, where a row is longer than one
        in_piece = max(size // length, 1)  # rows, where it is not
        total = _U(0)
        while True:
            piece = claim(job)
            first = piece // in_row * in_piece
            if first >= rows:
                break
            low = piece % in_row * size
            for row in range(first, min(first + in_piece, rows)):
                part = memory[row * length + low : row * length + min(low + size, length)]
                begin = _U(start + row * stride + low) * _GAMMA
                for i in range(len(part)):
                    total += _mix(_U(np.int64(part[i])) + begin + _U(i) * _GAMMA)
        add(job + 8, np.int64(total))

    return compiled_job(sum_rows)


def total(x: Tensor, runs: Iterable[StridedRun]) -> int:
    """The sum over a contiguous CPU tensor's elements, modulo 2**64.

    Args:
        x: its elements have 1, 2, 4 or 8 bytes.
        runs: which elements of the logical tensor it holds, in the order of its memory.
    """
    address, itemsize, sums = x.data_ptr(), x.element_size(), 0
    for run in runs:
        job = array("q", (0, 0, address, *run, PIECE_SIZE))
        threads = torch.get_num_threads() if run.numel > ONE_THREAD else 1
        run_on_pool(_sum_rows(itemsize), job.buffer_info()[0], threads)
        sums += job[1]
        address += run.numel * itemsize
    return sums & ((1 << 64) - 1)
