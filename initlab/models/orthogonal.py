"""Weights that start as orthogonal matrices, made of the draws that fill them."""

import math

import torch
from torch import Tensor

from initlab.kernels import Normal

from .._init_draws import orthogonal_factor
from .specs import FillSpec


def make_orthogonal_(tensor: Tensor, spec: FillSpec) -> None:
    """Replace the draws of a weight by the orthogonal matrix that they make, of entries with the same deviation.

    Args:
        tensor: filled by `spec`; (rows, *columns), columns count as flattened.
        spec: of its parts each is a matrix of its own, where it has any.

    Example:
        >>> import torch
        >>> from initlab.kernels import Normal
        >>> from initlab.models.orthogonal import make_orthogonal_
        >>> from initlab.models.specs import whole_fill
        >>> w = torch.randn(3, 12)
        >>> make_orthogonal_(w, whole_fill(Normal(0.0, 0.5), ""))
        >>> torch.allclose(w @ w.T, 3 * torch.eye(3), atol=1e-5)  # 12 * 0.5^2
        True
    """
    parts = [fill for fill in spec.fills if fill[0] is not None and isinstance(fill[1], Normal)] or spec.fills[:1]
    with torch.no_grad():
        for part, distribution in parts:
            assert isinstance(distribution, Normal)
            weight = tensor if part is None else tensor.narrow(*part)
            flat = weight.reshape(weight.shape[0], -1)
            wide = flat.to(torch.float32 if flat.element_size() < 4 else flat.dtype)
            made = orthogonal_factor(wide) * (distribution.std * math.sqrt(max(flat.shape)))
            weight.copy_(made.reshape(weight.shape))
