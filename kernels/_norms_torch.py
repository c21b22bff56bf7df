"""The norm and the scaling by plain torch: any p, device and dtype that torch has; can be traced and captured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6  # torch's: added to the norm before max_norm is divided by it


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), NaN where that is: what clipping multiplies by.

    Args:
        norm: floating, any shape and device.
        max_norm: the largest norm that is left as it is.

    Example:
        >>> import torch
        >>> from initlab.kernels import clip_coefficient
        >>> clip_coefficient(torch.tensor([0.5, 4.0]), 2.0)
        tensor([1.0000, 0.5000])
    """
    return (max_norm / (norm + EPSILON)).clamp(max=1.0)


def tensor_norm(tensor: Tensor, p: float, wide: torch.dtype) -> Tensor:
    """The p-norm of a tensor that has elements, taken in the dtype `wide`."""
    if tensor.is_complex() and p == 2.0:
        tensor = torch.view_as_real(tensor.resolve_conj())  # |inf + nan i| would be inf
    if tensor.is_complex():
        tensor = tensor.abs() if tensor.dtype == torch.complex128 else tensor.to(torch.complex128).abs()
    return vector_norm(tensor.to(wide).reshape(-1), p)


def vector_norm(x: Tensor, p: float) -> Tensor:
    """The p-norm of a wide vector, scaled by its largest element so that no power overflows or vanishes."""
    if p in (0.0, math.inf, -math.inf):
        return torch.linalg.vector_norm(x, p)
    largest = x.abs().amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return torch.linalg.vector_norm(x / scale, p) * scale


def scale_by(tensors: Sequence[Tensor], norm: Tensor, max_norm: float, policy: str) -> None:
    """Where Python does not read the norm: every tensor is read and written."""
    bad = ~norm.isfinite()
    c = clip_coefficient(norm, max_norm)
    if policy != "propagate":
        c = torch.where(bad, 1.0, c)
    for t in tensors:
        t.mul_(c)
        if policy == "zero":
            t.masked_fill_(bad, 0.0)
