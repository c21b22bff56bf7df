"""Distributions and specs, scaled by factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from initlab.kernels import Constant, Distribution, Normal, TruncatedNormal, Uniform

from ..models.specs import DimSlice, FillSpec


def scaled(distribution: Distribution, factor: float) -> Distribution:
    """The distribution of `factor` times what another one gives.

    Example:
        >>> from initlab.kernels import Normal
        >>> from initlab.fitting.factors import scaled
        >>> scaled(Normal(0.0, 0.5), 2.0)
        Normal(mean=0.0, std=1.0)
    """
    d = distribution
    if isinstance(d, Normal):
        return Normal(d.mean * factor, d.std * factor)
    if isinstance(d, Uniform):
        return Uniform(d.low * factor, d.high * factor)
    if isinstance(d, TruncatedNormal):
        return TruncatedNormal(d.mean * factor, d.std * factor, d.low * factor, d.high * factor)
    return Constant(d.value * factor)


def scaled_spec(spec: FillSpec, factors: Mapping[DimSlice | None, float]) -> FillSpec:
    """The spec of a weight whose parts are multiplied by factors; None stands for all of it."""
    parts = [(part, factor) for part, factor in factors.items() if part is not None]
    if not parts:
        return dataclasses.replace(spec, fills=tuple((p, scaled(d, factors.get(None, 1.0))) for p, d in spec.fills))
    (first, whole), *others = spec.fills
    assert first is None
    fills = [(part, scaled(whole, factor)) for part, factor in sorted(parts)]
    return dataclasses.replace(spec, fills=((None, scaled(whole, factors.get(None, 1.0))), *fills, *others))
