"""Gradient clipping: drop-ins for torch.nn.utils, and GradClipper, which lets a fused optimizer do the scaling.

Gradients are read once; when nothing is clipped they are not written. Norms are true ones, also where squares overflow
float32. A NaN or inf is found in the same read, named, and handled as asked.
"""

from .clipper import GradClipper
from .functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .report import ClipReport, ClipStats, PartialNorm
from .spikes import MedianSpikes, QuantileSpikes, SpikePolicy, SpikeStep, ZScoreSpikes, spike_differences

__all__ = [
    "ClipReport",
    "ClipStats",
    "GradClipper",
    "MedianSpikes",
    "PartialNorm",
    "QuantileSpikes",
    "SpikePolicy",
    "SpikeStep",
    "ZScoreSpikes",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "spike_differences",
]
