"""What in-place arithmetic makes of a distribution: scaling, shifting, clamping and the inverse error function."""

import math
from statistics import NormalDist

from initlab.kernels import Constant, Distribution, Normal, TruncatedNormal, Uniform


def inverse_error(distribution: Distribution) -> Distribution | None:
    """The distribution of erfinv(x): a normal cut by the uniform's bounds, as timm's trunc_normal_ makes it."""
    if not isinstance(distribution, Uniform) or not -1.0 <= distribution.low < distribution.high <= 1.0:
        return None
    normal = NormalDist(0.0, 0.5**0.5)
    low, high = (
        math.copysign(math.inf, x) if abs(x) == 1.0 else normal.inv_cdf((x + 1.0) / 2.0)
        for x in (distribution.low, distribution.high)
    )
    return TruncatedNormal(0.0, normal.stdev, low, high)


def clamped(distribution: Distribution, low: float, high: float) -> Distribution | None:
    """The distribution of a truncated normal after a clamp that moves next to none of it."""
    if not isinstance(distribution, TruncatedNormal) or not low < high:
        return None
    normal = NormalDist(distribution.mean, distribution.std)
    outside = max(0.0, normal.cdf(low) - normal.cdf(distribution.low)) + max(
        0.0, normal.cdf(distribution.high) - normal.cdf(high)
    )
    inside = normal.cdf(min(high, distribution.high)) - normal.cdf(max(low, distribution.low))
    if not outside <= 1e-6 * inside:
        return None
    return TruncatedNormal(
        distribution.mean, distribution.std, max(low, distribution.low), min(high, distribution.high)
    )


def affine(distribution: Distribution, factor: float, shift: float) -> Distribution:
    """The distribution of x * factor + shift."""
    if isinstance(distribution, Constant):
        return Constant(distribution.value * factor + shift)
    if isinstance(distribution, Normal):
        return Normal(distribution.mean * factor + shift, distribution.std * abs(factor))
    low, high = sorted((distribution.low * factor + shift, distribution.high * factor + shift))
    if isinstance(distribution, Uniform) or factor == 0:
        return Uniform(low, high) if factor else Constant(shift)
    return TruncatedNormal(distribution.mean * factor + shift, distribution.std * abs(factor), low, high)
