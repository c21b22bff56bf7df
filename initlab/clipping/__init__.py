"""Gradient clipping: drop-ins for torch.nn.utils, and GradClipper, which lets a fused optimizer do the scaling."""

from .clipper import (
    ClipReport,
    ClipStats,
    GradClipper,
    PartialNorm,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)

__all__ = [
    "ClipReport",
    "ClipStats",
    "GradClipper",
    "PartialNorm",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]
