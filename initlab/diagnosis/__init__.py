"""The doctor: runs a model on the user's own batch and says why the loss is inf, or NaN, or does not fall.

state.py keeps and restores; trace.py observes a pass, origin.py follows one operation by operation; probes.py runs
them; evidence.py is what they gather, symptoms.py reads it; checks/ judges; fixes.py writes remedies; report.py says
it; ranks.py keeps all of it from communicating; doctor.py is the whole examination.
"""

from .doctor import diagnose, examine, supervised
from .probes import UsageError
from .ranks import CommunicatesError
from .report import Cause, Diagnosis, LayerRow, Place

__all__ = [
    "Cause",
    "CommunicatesError",
    "Diagnosis",
    "LayerRow",
    "Place",
    "UsageError",
    "diagnose",
    "examine",
    "supervised",
]
