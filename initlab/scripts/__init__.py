"""Runs a user's training script under a light watch, and examines the step that fails."""

from .report import ScriptReport
from .running import PATIENCE, run_script

__all__ = ["PATIENCE", "ScriptReport", "run_script"]
