"""Reads checkpoints without building a model: which tensors are NaN, inf, huge, zero or untouched."""

from .report import CheckpointReport, TensorRow
from .scanning import scan_checkpoint

__all__ = ["CheckpointReport", "TensorRow", "scan_checkpoint"]
