"""Filling tensors from initlab's stream: distributions, draws and `fill_`.

`stream` is the reference that docs/stream.md describes, `keys` its first section; `fill` checks draws and chooses a
backend.
"""

from .distributions import Constant, Distribution, Normal, TruncatedNormal, Uniform
from .fill import Draw, backend_of, fill_
from .keys import STREAM_VERSION, generator_key, named_key

__all__ = [
    "STREAM_VERSION",
    "Constant",
    "Distribution",
    "Draw",
    "Normal",
    "TruncatedNormal",
    "Uniform",
    "backend_of",
    "fill_",
    "generator_key",
    "named_key",
]
