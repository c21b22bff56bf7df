"""Sampling in plain torch: the reference backend, on any device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..region import StridedRun
from . import stream

# Elements to work on at once, by device type; intermediates take about 40 times as much.
CHUNK = {"cpu": 1 << 18}
CHUNK_ELSEWHERE = 1 << 23
_SHORT = 1024  # elements: shorter rows are filled element by element, each from a counter block of its own


def fill(tensor: Tensor, m: stream.Map, key: int, runs: Iterable[StridedRun]) -> None:
    """Fill a contiguous tensor, one chunk of elements after the other.

    Args:
        tensor: float32, bfloat16, float16 or float64, contiguous.
        m: the distribution's map for this dtype.
        key: 64 bits.
        runs: which elements of the stream the tensor holds, in the order of its memory.
    """
    chunk = CHUNK.get(tensor.device.type, CHUNK_ELSEWHERE)
    flat = tensor.detach().view(-1)
    start = 0
    for run in runs:
        if run.rows > 1 and run.length < _SHORT:
            rows = max(1, chunk // (4 * run.length))
            columns = torch.arange(run.length, device=flat.device)
            for r in range(0, run.rows, rows):
                n = min(rows, run.rows - r)
                starts = torch.arange(r, r + n, device=flat.device) * run.stride + run.start
                element = (starts[:, None] + columns).flatten()
                values = stream.block_values(m, key, element >> 2, tensor.dtype)
                flat[start : start + len(element)] = values.gather(1, (element & 3)[:, None])[:, 0]
                start += len(element)
            continue
        for r in range(run.rows):
            first, end = run.start + r * run.stride, run.start + r * run.stride + run.length
            for low in range(first, end, chunk):
                high = min(low + chunk, end)
                blocks = torch.arange(low >> 2, (high + 3) >> 2, device=flat.device)
                values = stream.block_values(m, key, blocks, tensor.dtype).view(-1)
                skip = low & 3
                flat[start : start + high - low] = values[skip : skip + high - low]
                start += high - low
