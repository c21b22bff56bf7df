"""Checks for uninitialised values: in parameters, buffers and the optimizer's state before the first step."""

from __future__ import annotations

import math
from typing import Any

from .. import fixes
from ..evidence import Evidence, ParameterStats
from ..limits import LIMITS
from ..report import Kind, Place
from .finding import Finding


def nowhere(evidence: Evidence) -> Finding | None:
    """Parameters on the meta device."""
    meta = [parameter for parameter in evidence.parameters_and_buffers if parameter.ref.tensor.is_meta]
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
    bad = [(one, why) for one in evidence.parameters_and_buffers if (why := _why_garbage(one, evidence))]
    if not bad:
        return None
    parameter, why = bad[0]
    facts: dict[str, Any] = {"tensors": len(bad)}
    if parameter.stats is not None:
        facts |= {"smallest": parameter.stats.low, "largest": parameter.stats.high}
    kind: Kind = "weights" if _is_sane_elsewhere(parameter) else "uninitialised"
    said = "the other rows are in order: vectors that were loaded so, or a checkpoint of a run that had failed."
    if kind == "uninitialised":
        said = "uninitialised memory, or a checkpoint of a run that had failed."
    return Finding(
        kind,
        "broken",
        Place(module=parameter.ref.module_name, parameter=parameter.name),
        f"{parameter.name} {why} before the first step: {said}",
        facts,
        [fixes.fresh(evidence, [one for one, _ in bad], buffer) for buffer in ("zero_()", "fill_(1.0)")],
    )


def _is_sane_elsewhere(parameter: ParameterStats) -> bool:
    """Whether somebody wrote a matrix: most of its rows hold what a distribution draws, or training leaves."""
    weight = parameter.ref.tensor.detach()
    if weight.dim() < 2 or len(weight) < _FEW_ROWS or not parameter.ref.is_parameter:
        return False
    rows = weight.flatten(1).double()
    rows = rows[(rows.isfinite() & (rows.abs() <= LIMITS.garbage)).all(1)]
    if len(rows) <= len(weight) / 2:
        return False
    size = rows.square().mean().sqrt()
    written = (rows.abs() > LIMITS.denormal).double().mean()
    spread = rows.std(1, correction=0) if rows.shape[1] > 1 else rows
    return bool(1e-4 < size < 10.0) and float(written) > 0.5 and float((spread > 0).double().mean()) > 0.5


_FEW_ROWS = 4  # of which nothing can be said


def _why_garbage(parameter: ParameterStats, evidence: Evidence) -> str:
    stats = parameter.stats
    if stats is None:
        return ""
    if not stats.finite:
        origin = evidence.origin
        blamed = origin is not None and origin.source == "parameter" and origin.op in parameter.ref.names
        may_mask = not parameter.ref.is_parameter and stats.low == -math.inf and math.isfinite(stats.high)
        return "" if may_mask and not blamed else "holds NaN or infinities"
    if parameter.ref.attribute == "running_var" and stats.low < 0:
        return "is negative, and no variance is"
    if parameter.ref.attribute == "running_mean" and stats.largest > LIMITS.garbage:
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
        Place(module=parameter.ref.module_name, parameter=parameter.name),
        f"the optimizer's {' and '.join(parameter.state)} of {parameter.name} is not finite, or a negative square, "
        "before the first step, which then writes NaN into the weights.",
        {"parameters": len(bad)},
        [fixes.drop_state(bad)],
    )
