"""Guarding a training run: bad steps are left out, and diagnosed on the spot.

training.py is guard() and TrainingGuard; clipper.py hears what a GradClipper measures; passes.py keeps what a step
needs to run again; examining.py runs it again; saving.py and report.py are what is left of it; metrics.py writes logs;
ranks.py finds the ranks that must act alike.
"""

from .report import BadStep, GuardReport
from .training import TrainingGuard, guard

__all__ = ["BadStep", "GuardReport", "TrainingGuard", "guard"]
