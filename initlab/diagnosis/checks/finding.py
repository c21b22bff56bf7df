"""What a check finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..batch import Leaf
from ..evidence import Evidence
from ..limits import LIMITS
from ..outcomes import Outcome
from ..report import Kind, Place, Severity
from ..rewrites import Rewrite
from ..safe_forms import SafeForm


@dataclass
class Finding:
    """A cause before its remedies have been tried.

    Args:
        remedies: code, best first; the first that lets the loss fall is the one to print.
        rewrites: loss functions that come before them where they are the user's own objective.
        suspicion: whether it needs an experiment to be believed: its remedy has to make a difference.
        change: what the first remedy does, in a few words, as "targets standardised".
        form: the safe form of the operation at the place, for the user's own code. Of a suspicion without code it is
            the experiment: the run is emulated with it.
        structural: of a suspicion: whether what it says holds in any case, and the experiment only has to end no worse.
        tries: how many of the remedies are tried.
        within: where the form is put: at the place, or `safe_forms.EVERYWHERE`.
        values_are_right: whether it is the operation that is wrong: then other values for it are no remedy.
        rescales: what the remedy divides the loss by, where it gives it another scale; 0 where it does not.
    """

    kind: Kind
    severity: Severity
    place: Place
    explanation: str
    evidence: dict[str, Any] = field(default_factory=dict)
    remedies: list[str] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    suspicion: bool = False
    change: str = ""
    rescales: float = 0.0
    form: SafeForm | None = None
    within: str | None = None
    structural: bool = False
    values_are_right: bool = False
    tries: int = LIMITS.tried


Check: TypeAlias = Callable[[Evidence], Finding | None]


def target_of(evidence: Evidence, function: str) -> Leaf | None:
    """The tensor of the batch that a loss function compares with what the model puts out; else what looks like it."""
    flow = evidence.trace.flow
    path = flow.comparing.get(function) if flow is not None else None
    targets = [leaf for leaf in evidence.leaves if leaf.path == path or (path is None and leaf.is_target)]
    return targets[0] if targets else None


def severity_of(run: Outcome) -> Severity:
    """How bad a run is, where the run as it is is all there is to go by."""
    return "broken" if run.effect in ("breaks", "rises") else "warning"


def severity_of_step(evidence: Evidence) -> Severity:
    """How bad a step is, where it breaks or does not."""
    return "warning" if evidence.broke_at is None else "broken"


def parameters_held(evidence: Evidence) -> set[int]:
    """The ids of what the optimizer has; none without one."""
    groups = evidence.optimizer.param_groups if evidence.optimizer is not None else []
    return {id(p) for group in groups for p in group["params"]}


def course(run: Outcome) -> str:
    """How the run as it is went, as a clause."""
    return f"the loss went {run}" if run.effect in ("breaks", "rises") else f"the loss hardly falls, {run}"


def short(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
