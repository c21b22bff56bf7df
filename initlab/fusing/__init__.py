"""Linear layers and the ReLUs after them, fused into LinearReLU layers wherever a model has them."""

from .report import FuseReport
from .swapping import fuse_linear_relu, unfuse

__all__ = ["FuseReport", "fuse_linear_relu", "unfuse"]
