"""Which tensors meet in memory: with themselves, and with each other in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share a memory location. Exact: sizes and strides may be anybody's."""
    if tensor.numel() < 2:
        return False
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach, conflict = 0, False
    for stride, size in dims:
        conflict |= stride <= reach
        reach += stride * (size - 1)
    if not conflict:
        return False
    if dims[0][0] == 0 or reach + 1 < tensor.numel():
        return True
    seen = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dims:  # strides that interleave without meeting, such as (2, 3) by (3, 2): count them out
        seen = (seen[:, None] + torch.arange(size, device="cpu") * stride).flatten()
    return seen.unique().numel() < tensor.numel()


def waves(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor the wave in which to write it: in a wave no two meet in memory; those that meet keep their order.

    Nearly always all are 0. The row of zeros in an embedding comes after the embedding.
    """
    if len(tensors) < 2:
        return [0] * len(tensors)
    spans = list(map(_span, tensors))
    wave = [0] * len(spans)
    cluster: list[int] = []  # tensors whose spans touch each other
    reach = -1
    for i in sorted(range(len(spans)), key=spans.__getitem__):
        start, end = spans[i]
        if start >= reach:
            cluster = []
        cluster.append(i)
        reach = max(reach, end)
        if len(cluster) > 1:
            ready: list[int] = []
            for j in sorted(cluster):  # in the order of writing
                met = [wave[k] for k in ready if spans[k][0] < spans[j][1] and spans[j][0] < spans[k][1]]
                wave[j] = max(met, default=-1) + 1
                ready.append(j)
    return wave


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor's memory and the one after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
