"""Rules about what nobody wrote: parameters, buffers and the optimizer's state before the first step."""

from __future__ import annotations

import math
from typing import Any

from .. import fixes
from ..evidence import Evidence, ParameterStats
from ..limits import LIMITS
from ..report import Place
from .finding import Finding


def nowhere(evidence: Evidence) -> Finding | None:
    """Parameters on the meta device."""
    meta = [held for held in evidence.held if held.ref.tensor.is_meta]
    if not meta:
        return None
    return Finding(
        "uninitialised",
        "broken",
        Place(module=meta[0].ref.module_name, parameter=meta[0].name),
        f"{len(meta)} parameters and buffers are on the meta device: they have shapes, and no values.",
        {"tensors": len(meta)},
        ['initlab.init_model_(model, seed=0, device="cpu")  # or load a checkpoint with load_state_dict(assign=True)'],
    )


def never_written(evidence: Evidence) -> Finding | None:
    """NaN, infinities or leftovers of memory in parameters and buffers before the first step."""
    bad = [(held, why) for held in evidence.held if (why := _why_garbage(held, evidence))]
    if not bad:
        return None
    held, why = bad[0]
    facts: dict[str, Any] = {"tensors": len(bad)}
    if held.stats is not None:
        facts |= {"smallest": held.stats.low, "largest": held.stats.high}
    return Finding(
        "uninitialised",
        "broken",
        Place(module=held.ref.module_name, parameter=held.name),
        f"{held.name} {why} before the first step: memory that nobody wrote, or a checkpoint of a run that had failed.",
        facts,
        [fixes.fresh(evidence, [one for one, _ in bad], buffer) for buffer in ("zero_()", "fill_(1.0)")],
    )


def _why_garbage(held: ParameterStats, evidence: Evidence) -> str:
    stats = held.stats
    if stats is None:
        return ""
    if not stats.finite:
        origin = evidence.origin
        blamed = origin is not None and origin.source == "held" and origin.op in held.ref.names
        may_mask = not held.ref.is_parameter and stats.low == -math.inf and math.isfinite(stats.high)
        return "" if may_mask and not blamed else "holds NaN or infinities"
    if held.ref.attribute == "running_var" and stats.low < 0:
        return "is negative, and no variance is"
    if held.ref.attribute == "running_mean" and stats.largest > LIMITS.garbage:
        return "holds means that no activation has"
    if held.ref.is_parameter and (stats.largest > LIMITS.garbage or held.tiny > LIMITS.denormal_share):
        return "holds values that no starting distribution draws"
    return ""


def spoilt_state(evidence: Evidence) -> Finding | None:
    """NaN or infinities in the optimizer's state."""
    bad = [held for held in evidence.held if held.state]
    if not bad:
        return None
    held = bad[0]
    return Finding(
        "uninitialised",
        "broken",
        Place(module=held.ref.module_name, parameter=held.name),
        f"the optimizer's {' and '.join(held.state)} of {held.name} is not finite, or a negative square, before the "
        "first step, which then writes NaN into the weights.",
        {"parameters": len(bad)},
        [fixes.forget_state(evidence, bad)],
    )
