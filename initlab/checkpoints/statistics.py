"""What is wrong with a tensor's values, from one pass over its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Statistics:
    """Counts and sizes of a tensor's elements; sums of squares in float64."""

    elements: int = 0
    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    zeros: int = 0
    subnormal: int = 0
    lowest: float = math.inf  # of the finite elements
    highest: float = -math.inf
    squares: float = 0.0  # sum, of the finite elements
    changed: int = 0  # elements that differ from an older checkpoint's
    change_squares: float = 0.0

    @property
    def nonfinite(self) -> int:
        """How many elements are NaN or inf."""
        return self.nan + self.posinf + self.neginf

    @property
    def largest(self) -> float:
        """The largest magnitude of a finite element; 0 if there is none."""
        return max(abs(self.lowest), abs(self.highest)) if self.highest >= self.lowest else 0.0

    @property
    def rms(self) -> float:
        """Root mean square of the finite elements."""
        return math.sqrt(self.squares / max(1, self.elements - self.nonfinite))

    def add(self, part: Tensor, older: Tensor | None = None) -> None:
        """Count a part, and how far it is from the same part of an older checkpoint."""
        if not part.numel():
            return
        self.elements += part.numel()
        if not (part.is_floating_point() or part.is_complex()):
            self.zeros += int((part == 0).sum())
            if older is not None:
                self.changed += int((part != older).sum())
            return
        values = _comparable(part)
        finite = _finite(values)
        if finite.numel() < values.numel():
            self.nan += int(values.isnan().sum())
            self.posinf += int(values.isposinf().sum())
            self.neginf += int(values.isneginf().sum())
        if finite.numel():
            low, high = (float(x) for x in finite.aminmax())
            self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
            self.squares += float(torch.linalg.vector_norm(finite, dtype=torch.float64)) ** 2
            zeros = finite.numel() - int(torch.count_nonzero(finite))
            self.zeros += zeros
            smallest = torch.finfo(part.dtype).smallest_normal
            self.subnormal += int((finite.abs() < smallest).sum()) - zeros
        if older is not None:
            before = _comparable(older)
            same = (values == before) | (values.isnan() & before.isnan())
            if not bool(same.all()):
                self.changed += int((~same).sum())
                self.change_squares += float(
                    torch.linalg.vector_norm(_finite(values.double() - before.double()), dtype=torch.float64) ** 2
                )


def _comparable(part: Tensor) -> Tensor:
    """Real numbers of a dtype that torch computes with."""
    if part.is_complex():
        part = torch.view_as_real(part).reshape(-1)
    return part.float() if part.dtype.itemsize == 1 else part


def _finite(values: Tensor) -> Tensor:
    low, high = values.aminmax()  # NaN wins
    return values if math.isfinite(float(low)) and math.isfinite(float(high)) else values[values.isfinite()]


def statistics_of(parts: Iterable[Tensor], older: Iterable[Tensor] | None = None) -> Statistics:
    """The statistics of all parts, compared with an older checkpoint's, part by part."""
    result = Statistics()
    if older is None:
        for part in parts:
            result.add(part)
    else:
        for part, before in zip(parts, older, strict=True):
            result.add(part, before)
    return result
