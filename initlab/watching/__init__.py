"""Watching a model for its first NaN or infinity, and for the module that produced it."""

from .hooks import Fault, Watch, WatchReport, watch

__all__ = ["Fault", "Watch", "WatchReport", "watch"]
