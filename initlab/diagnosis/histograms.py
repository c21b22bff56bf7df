"""Histograms of tensors: counted where the tensor lies, and read back together, in one transfer for each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from initlab.kernels.torch_internals import physical

from .limits import LIMITS
from .stats import sample, spread_out


@dataclass(frozen=True)
class Histogram:
    """How the elements of a tensor are distributed, by a sample of them.

    Args:
        low: where the first bin begins: at the tensor's smallest finite element, but for a few far ones.
        high: where the last bin ends, likewise.
        counts: of elements, for bins of equal width; empty where no element is finite.
        outside: share of elements that are finite and in no bin.
        bad: share of elements that are NaN or infinite.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    outside: float = 0.0
    bad: float = 0.0


def some(tensor: Tensor) -> Tensor | None:
    """A copy of some of a tensor's elements, for `count`; None where it has no histogram."""
    tensor = physical(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta or tensor.layout != torch.strided:
        return None
    x = tensor.detach()
    x = x.reshape(-1) if x.is_contiguous() else sample(x).reshape(-1)
    return x.clone() if x.numel() <= LIMITS.counted else x[spread_out(x.numel(), LIMITS.counted).to(x.device)]


def count(elements: Tensor | None) -> Tensor | None:
    """The histogram of what `some` has kept, as numbers on its device, for `read`; None of None.

    Elements are sorted and the ends of the bins looked up among them: no atomics, the same numbers on every run, and
    nothing waits for the device.
    """
    if elements is None:
        return None
    x = elements.double()
    finite = x.isfinite().sum()
    x = torch.where(x.isnan(), torch.inf, x).sort().values
    begin, last = (x == -torch.inf).sum(), (finite - 1).clamp_min(0)
    few = (last * LIMITS.far_share).long()
    ends = torch.stack([begin + few, begin + last - few, begin, begin + last]).clamp_max(x.numel() - 1)
    low, high, lowest, highest = x.gather(0, ends).unbind()
    alike = low == high  # nearly all are: then the few are what there is to see
    low, high = torch.where(alike, lowest, low), torch.where(alike, highest, high)
    margin = torch.where(low == high, 0.5 * low.abs().clamp_min(1e-3), 0.0)
    low, high = low - margin, high + margin
    at = torch.arange(LIMITS.bins + 1, device=x.device, dtype=x.dtype) / LIMITS.bins
    edges = low * (1 - at) + high * at
    edges[-1], edges[0] = high, low  # without what rounding does to them
    places = torch.cat([torch.searchsorted(x, edges[:-1]), torch.searchsorted(x, edges[-1:], right=True)])
    size = torch.full_like(low, x.numel())
    return torch.cat([torch.stack([low, high, finite.to(x.dtype), size]), places.diff().to(x.dtype)])


def read(counted: Sequence[Tensor | None]) -> list[Histogram | None]:
    """The histograms that `count` has counted, in their order."""
    found: list[Histogram | None] = [None] * len(counted)
    devices: dict[torch.device, list[int]] = {}
    for place, numbers in enumerate(counted):
        if numbers is not None:
            devices.setdefault(numbers.device, []).append(place)
    for places in devices.values():
        rows = torch.stack([numbers for place in places if (numbers := counted[place]) is not None]).tolist()
        for place, row in zip(places, rows, strict=True):
            low, high, finite, size, *counts = row
            found[place] = _histogram(low, high, finite, size, counts)
    return found


def _histogram(low: float, high: float, finite: float, size: float, counts: Sequence[float]) -> Histogram:
    bad = 1.0 - finite / size
    if not finite:
        return Histogram(0.0, 0.0, (), bad=bad)
    return Histogram(low, high, tuple(map(int, counts)), (finite - sum(counts)) / size, bad)
