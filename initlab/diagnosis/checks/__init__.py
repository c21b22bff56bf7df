"""The checks: each a pure function from the evidence to a finding, or None. No check runs the model."""

from .finding import Finding
from .guess import guesses, of_values
from .interventions import of_little, of_rise, of_standstill, unregistered
from .operations import unexplained
from .order import findings, of_objective

__all__ = [
    "Finding",
    "findings",
    "guesses",
    "of_little",
    "of_objective",
    "of_rise",
    "of_standstill",
    "of_values",
    "unexplained",
    "unregistered",
]
