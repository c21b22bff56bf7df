"""Whole models: filling them by name, recipes, redirecting a library's own init calls, reports and digests."""

from . import recipes
from .building import record_build
from .builds import BuildRecord
from .digest import ModelDigest, model_digest
from .initialization import init_model_, not_loaded, plan_model
from .report import InitReport, Row
from .swapping import swap

__all__ = [
    "BuildRecord",
    "InitReport",
    "ModelDigest",
    "Row",
    "init_model_",
    "model_digest",
    "not_loaded",
    "plan_model",
    "recipes",
    "record_build",
    "swap",
]
