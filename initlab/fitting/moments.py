"""Number, mean and variance of a tensor's elements, and of several tensors together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Number, mean and variance of a tensor's elements."""

    elements: int
    mean: float
    variance: float

    @classmethod
    def of(cls, tensor: Tensor) -> Moments:
        """Those of a tensor, in float64."""
        variance, mean = torch.var_mean(tensor.detach().double(), correction=0)
        return cls(tensor.numel(), float(mean), float(variance))

    @classmethod
    def pooled(cls, parts: Iterable[Moments]) -> Moments:
        """Those of all elements together."""
        parts = list(parts)
        elements = sum(part.elements for part in parts)
        mean = sum(part.elements * part.mean for part in parts) / elements
        square = sum(part.elements * (part.variance + (part.mean - mean) ** 2) for part in parts)
        return cls(elements, mean, square / elements)
