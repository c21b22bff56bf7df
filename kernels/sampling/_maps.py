"""What a distribution comes to for a dtype: a map of the stream, or one value; and whether the dtype can hold it."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from ..torch_internals import without_dispatch_modes
from . import stream
from .distributions import Constant, Distribution, Normal, TruncatedNormal, Uniform

DRAWN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVIATE_BOUND = 16.0  # above every deviate of every map: docs/stream.md, section 6


class Mapped:
    """A distribution for a dtype.

    Attributes:
        map: its map, or the constant that it comes to.
        dtype: of the tensor.
        prepared: what a backend makes of it, by the backend's name; worked out when its first fill asks.
    """

    __slots__ = ("dtype", "map", "prepared")

    def __init__(self, m: stream.Map | Constant, dtype: torch.dtype) -> None:
        self.map, self.dtype = m, dtype
        self.prepared: dict[str, Any] = {}


def mapped(distribution: Distribution, dtype: torch.dtype) -> Mapped:
    """A distribution for a dtype, worked out once. Raises as `map_of`, and what torch's fill_ raises for a constant."""
    # The text tells -0.0 from 0.0, and True from 1, which are one key to a cache.
    return _mapped(distribution, dtype, repr(distribution.value) if isinstance(distribution, Constant) else "")


@functools.lru_cache(maxsize=4096)
def _mapped(distribution: Distribution, dtype: torch.dtype, text: str) -> Mapped:
    if not isinstance(distribution, Constant):
        return Mapped(map_of(distribution, dtype), dtype)
    with without_dispatch_modes():  # torch's own error, before the first write; a fake tensor would not raise it
        torch.empty((), dtype=dtype, device="cpu").fill_(distribution.value)
    return Mapped(distribution, dtype)


def map_of(distribution: Uniform | Normal | TruncatedNormal, dtype: torch.dtype) -> stream.Map | Constant:
    """What the host works out for a distribution and a dtype.

    Returns:
        Its map; a Constant where it has no width.

    Raises:
        NotImplementedError: for a dtype that the distribution is not defined for.
        RuntimeError: if the distribution can draw a value that the dtype would round to infinity.
    """
    real, of_a_part = dtype, distribution
    if dtype.is_complex and not isinstance(distribution, TruncatedNormal):  # as torch, which orders no complex numbers
        real = dtype.to_real()
        if isinstance(distribution, Normal):
            of_a_part = Normal(distribution.mean, distribution.std / 1.4142135623730951)
    if real not in DRAWN_DTYPES:
        name = {Uniform: "uniform", Normal: "normal", TruncatedNormal: "truncated normal"}[type(distribution)]
        raise NotImplementedError(
            f"a {name} is not defined for {dtype}; fill a float32, bfloat16, float16 or float64 tensor and convert it"
        )
    if isinstance(of_a_part, Uniform):
        _check_bounds(of_a_part, real)
        low, high = of_a_part.low, of_a_part.high
        if low == high:
            return Constant(complex(low, low) if dtype.is_complex else low)
        return stream.uniform_map(low, high, real)
    if real != torch.float64 and math.isinf(stream.fl32(of_a_part.mean) + stream.fl32(of_a_part.std)):
        raise RuntimeError(
            f"{distribution!r}: its mean or std overflows float32, in which {dtype} is drawn; "
            "use float64, or smaller parameters"
        )
    m = _normal_map(of_a_part, real)
    if _can_overflow(of_a_part, m, real):
        raise RuntimeError(
            f"{distribution!r} can draw a value beyond {torch.finfo(real).max:.6g}, the largest of {dtype}, which "
            "would become infinite; use smaller parameters, a truncated normal whose bounds fit, or a wider dtype"
        )
    return m


def _normal_map(distribution: Normal | TruncatedNormal, dtype: torch.dtype) -> stream.Map | Constant:
    if isinstance(distribution, Normal):
        return stream.normal_map(distribution.mean, distribution.std, dtype)
    if distribution.low == distribution.high:
        return Constant(distribution.low)
    return stream.truncated_normal_map(distribution.mean, distribution.std, distribution.low, distribution.high, dtype)


def _check_bounds(distribution: Uniform, dtype: torch.dtype) -> None:
    low, high = distribution.low, distribution.high
    largest = torch.finfo(dtype).max
    for name, value in (("low", low), ("high", high), ("high - low", high - low)):
        if abs(value) > largest:
            raise RuntimeError(
                f"uniform on [{low}, {high}): {name} is out of bounds for {dtype}, whose largest number is "
                f"{largest:.6g}; use smaller bounds, or a dtype of wider range"
            )


def _can_overflow(distribution: Normal | TruncatedNormal, m: stream.Map | Constant, dtype: torch.dtype) -> bool:
    """Whether the dtype would round a value of the map to infinity."""
    largest = torch.finfo(dtype).max
    if abs(distribution.mean) + _DEVIATE_BOUND * distribution.std < largest:
        return False
    if isinstance(distribution, TruncatedNormal) and max(abs(distribution.low), abs(distribution.high)) <= largest:
        return False  # values are clamped to the bounds
    if isinstance(m, Constant):
        with without_dispatch_modes():
            return math.isinf(torch.tensor(m.value, dtype=torch.float64, device="cpu").to(dtype).item())
    return not all(map(math.isfinite, stream.extremes(m, dtype)))
