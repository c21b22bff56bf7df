"""Why the loss is inf, or NaN, or does not fall: runs a model on the user's own batch, and says.

workflow.py is diagnose(), the whole sequence. state.py takes a snapshot and restores it; probes.py runs passes;
trace.py observes one, origin.py follows one operation by operation; evidence.py is what they observe, symptoms.py what
it shows; checks/ finds causes; fixes.py writes remedies; report.py is what is printed, measurements.py what its page
plots beside that; ranks.py keeps all of it from communicating.
"""

from .measurements import Measurements
from .objectives import inspect_memory, inspect_objective, inspect_start
from .probes import UsageError
from .ranks import CommunicatesError
from .reasons import Operation, reason
from .report import Cause, Diagnosis, LayerRow, Place
from .workflow import diagnose, diagnose_alone, supervised

__all__ = [
    "Cause",
    "CommunicatesError",
    "Diagnosis",
    "LayerRow",
    "Measurements",
    "Operation",
    "Place",
    "UsageError",
    "diagnose",
    "diagnose_alone",
    "inspect_memory",
    "inspect_objective",
    "inspect_start",
    "reason",
    "supervised",
]
