"""Watching a model for its first NaN or infinity, and for the module that produced it."""

from .report import Fault, WatchReport
from .watcher import Watch, watch

__all__ = ["Fault", "Watch", "WatchReport", "watch"]
