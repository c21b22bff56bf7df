"""Checks for uninitialised values: in parameters, buffers and the optimizer's state before the first step."""

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
    meta = [parameter for parameter in evidence.parameters_and_buffers if parameter.ref.tensor.is_meta]
    if not meta:
        return None
    return Finding(
        "uninitialised",
        "broken",
        Place(module=meta[0].ref.path, parameter=meta[0].name),
        f"{len(meta)} parameters and buffers are on the meta device: they have shapes, and no values.",
        {"tensors": len(meta)},
        ['initlab.init_model_(model, seed=0, device="cpu")  # or load a checkpoint with load_state_dict(assign=True)'],
    )


def never_written(evidence: Evidence) -> Finding | None:
    """NaN, infinities or leftovers of memory in parameters and buffers before the first step."""
    bad = [(one, why) for one in evidence.parameters_and_buffers if (why := _why_garbage(one, evidence))]
    if not bad:
        return None
    parameter, why = bad[0]
    facts: dict[str, Any] = {"tensors": len(bad)}
    if parameter.stats is not None:
        facts |= {"smallest": parameter.stats.low, "largest": parameter.stats.high}
    return Finding(
        "uninitialised",
        "broken",
        Place(module=parameter.ref.path, parameter=parameter.name),
        f"{parameter.name} {why} before the first step: uninitialised memory, or a checkpoint of a run that had "
        "failed.",
        facts,
        [fixes.fresh(evidence, [one for one, _ in bad], buffer) for buffer in ("zero_()", "fill_(1.0)")],
    )


def _why_garbage(parameter: ParameterStats, evidence: Evidence) -> str:
    stats = parameter.stats
    if stats is None:
        return ""
    if not stats.finite:
        origin = evidence.origin
        blamed = origin is not None and origin.source == "parameter" and origin.op in parameter.ref.names
        may_mask = not parameter.ref.is_parameter and stats.low == -math.inf and math.isfinite(stats.high)
        return "" if may_mask and not blamed else "holds NaN or infinities"
    if parameter.ref.leaf == "running_var" and stats.low < 0:
        return "is negative, and no variance is"
    if parameter.ref.leaf == "running_mean" and stats.largest > LIMITS.garbage:
        return "holds means that no activation has"
    if parameter.ref.is_parameter and (stats.largest > LIMITS.garbage or parameter.tiny > LIMITS.denormal_share):
        return "holds values that no starting distribution draws"
    return ""


def spoilt_state(evidence: Evidence) -> Finding | None:
    """NaN or infinities in the optimizer's state."""
    bad = [parameter for parameter in evidence.parameters_and_buffers if parameter.state]
    if not bad:
        return None
    parameter = bad[0]
    return Finding(
        "uninitialised",
        "broken",
        Place(module=parameter.ref.path, parameter=parameter.name),
        f"the optimizer's {' and '.join(parameter.state)} of {parameter.name} is not finite, or a negative square, "
        "before the first step, which then writes NaN into the weights.",
        {"parameters": len(bad)},
        [fixes.drop_state(bad)],
    )
