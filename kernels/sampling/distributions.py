"""What tensors are filled with: distributions and their parameters, which know neither tensors nor dtypes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from .stream import LIMIT_SIGMA


def _float(value: Any, name: str) -> float:
    if isinstance(value, str):  # float() would read it
        raise TypeError(f"{name} is {value!r}; it must be a number")
    return float(value) + 0.0  # -0 becomes 0: the two are one distribution, also to a cache


def _finite(value: float, name: str, error: type[Exception]) -> float:
    number = _float(value, name)
    if not math.isfinite(number):
        raise error(f"{name} is {number}; it must be finite")
    return number


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform on [low, high); a constant where low == high.

    Raises:
        RuntimeError: if a bound is not finite, or low > high (the type that torch raises).

    Example:
        >>> from initlab.kernels import Uniform
        >>> print(Uniform(-0.5, 0.5), round(Uniform(-0.5, 0.5).stddev, 4))
        uniform[-0.5, 0.5) 0.2887
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        low, high = _finite(self.low, "low", RuntimeError), _finite(self.high, "high", RuntimeError)
        if low > high:
            raise RuntimeError(f"uniform on [{low}, {high}): low must not exceed high; swap them")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    def __str__(self) -> str:
        return f"uniform[{self.low:.4g}, {self.high:.4g})"

    @property
    def stddev(self) -> float:
        """The standard deviation."""
        return (self.high - self.low) / math.sqrt(12.0)


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal with this mean and standard deviation; a constant where std == 0.

    Raises:
        RuntimeError: if std is negative or NaN (the type that torch raises).
        ValueError: if mean is not finite, or std is infinite.

    Example:
        >>> from initlab.kernels import Normal
        >>> print(Normal(0.0, 0.02))
        normal(0, 0.02)
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        std = _float(self.std, "std")
        if not std >= 0.0:
            raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
        object.__setattr__(self, "mean", _finite(self.mean, "mean", ValueError))
        object.__setattr__(self, "std", _finite(std, "std", ValueError))

    def __str__(self) -> str:
        return f"normal({self.mean:.4g}, {self.std:.4g})"

    @property
    def stddev(self) -> float:
        """The standard deviation: std."""
        return self.std


@dataclass(frozen=True, slots=True)
class TruncatedNormal:
    """Normal with this mean and standard deviation, conditioned on [low, high]; a constant where low == high.

    The bounds are absolute, as in ``torch.nn.init.trunc_normal_``, and may be infinite.

    Raises:
        RuntimeError: if low > high (the type that torch raises).
        ValueError: if mean is not finite, std is not positive and finite, a bound is NaN, or the nearer bound of an
            interval that leaves the mean out lies beyond 12 standard deviations, where hardly any mass is left.

    Example:
        >>> from initlab.kernels import TruncatedNormal
        >>> print(TruncatedNormal(), round(TruncatedNormal().stddev, 4))
        truncated(0, 1, [-2, 2]) 0.8796
    """

    mean: float = 0.0
    std: float = 1.0
    low: float = -2.0
    high: float = 2.0

    def __post_init__(self) -> None:
        mean, std = _finite(self.mean, "mean", ValueError), _finite(self.std, "std", ValueError)
        low, high = _float(self.low, "low"), _float(self.high, "high")
        if std <= 0.0:
            raise ValueError(f"std is {std}; a truncated normal needs std > 0; use constant_ for a single value")
        if math.isnan(low) or math.isnan(high) or low == math.inf or high == -math.inf:
            raise ValueError(f"bounds are [{low}, {high}]; they must be numbers, and only outwards infinite")
        if low > high:
            raise RuntimeError(f"truncated normal on [{low}, {high}]: low must not exceed high; swap them")
        nearer = max((low - mean) / std, (mean - high) / std)
        if low < high and nearer > LIMIT_SIGMA:
            raise ValueError(
                f"the bounds [{low}, {high}] lie {nearer:.3g} standard deviations from the mean {mean} (std {std}); "
                f"{LIMIT_SIGMA:g} is the limit; move the bounds or the mean, or raise std"
            )
        for name, value in (("mean", mean), ("std", std), ("low", low), ("high", high)):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return f"truncated({self.mean:.4g}, {self.std:.4g}, [{self.low:.4g}, {self.high:.4g}])"

    @property
    def stddev(self) -> float:
        """The standard deviation of what is left between the bounds.

        Source:
            N. Johnson, S. Kotz and N. Balakrishnan, "Continuous univariate distributions", 1994, 13.10.1.
        """
        alpha, beta = (self.low - self.mean) / self.std, (self.high - self.mean) / self.std
        if alpha + beta < 0.0:
            alpha, beta = -beta, -alpha  # mirrored, so that a far interval lies in the upper tail, where erfc is exact
        if beta - alpha < 1e-3:
            return (self.high - self.low) / math.sqrt(12.0)  # the differences below would cancel
        mass = (math.erfc(alpha / math.sqrt(2.0)) - math.erfc(beta / math.sqrt(2.0))) / 2
        density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0 for x in (alpha, beta)]
        moments = [x * d if math.isfinite(x) else 0.0 for x, d in zip((alpha, beta), density, strict=True)]
        mean = (density[0] - density[1]) / mass
        variance = 1.0 + (moments[0] - moments[1]) / mass - mean * mean
        return self.std * math.sqrt(max(variance, 0.0))


@dataclass(frozen=True, slots=True)
class Constant:
    """Every element is `value`; takes nothing from the stream and serves every dtype.

    Example:
        >>> from initlab.kernels import Constant
        >>> print(Constant(0.5))
        0.5
    """

    value: complex = 0.0

    def __str__(self) -> str:
        return str(self.value) if isinstance(self.value, complex) else f"{self.value:g}"

    @property
    def stddev(self) -> float:
        """The standard deviation: 0."""
        return 0.0


Distribution: TypeAlias = Uniform | Normal | TruncatedNormal | Constant
