"""Checks of 16-bit floats: what overflows and underflows in them, and not in float32."""

from __future__ import annotations

from typing import Any

import torch

from .. import fixes
from ..evidence import Evidence, ParameterStats, half
from ..limits import LIMITS
from ..report import Place
from .finding import Finding


def overflow(evidence: Evidence) -> Finding | None:
    """A value that 16 bits cannot hold and float32 can."""
    origin, again = evidence.origin, evidence.float32
    hidden = evidence.broke_at is None and origin is not None and half(origin.dtype)
    if again is None or not again.finite or (evidence.broke_at is None and not hidden):
        return None
    facts: dict[str, Any] = {"loss in float32": again.loss}
    if evidence.largest_low:
        facts["largest before it"] = evidence.largest_low
    if torch.float16 in evidence.trace.low or (origin is not None and origin.dtype == torch.float16):
        facts["largest of float16"] = 65504.0
    place = Place()
    if origin is not None:
        place = Place(module=origin.module, op=origin.op)
    elif evidence.error is not None and evidence.trace.failed is not None:
        place = Place(module=evidence.trace.failed[0], op=evidence.trace.failed[1] or None)
    phase = f" in the {origin.phase} pass" if origin is not None else ""
    why = f"a 16-bit value overflows{phase}; the same pass in float32 is finite."
    return Finding("precision", "broken", place, why, facts, fixes.wider(evidence))


def underflow(evidence: Evidence) -> Finding | None:
    """Gradients that are zero in 16 bits and not in float32."""
    again = evidence.float32
    if evidence.broke_at is not None or again is None or not again.finite:
        return None
    lost = []
    for parameter in evidence.parameters:
        if parameter.grad is not None and parameter.name in again.zeros:
            more = zero_share_of(parameter) - again.zeros[parameter.name]
            if more >= LIMITS.zero_gradients:
                lost.append((parameter, more))
    if not lost:
        return None
    parameter, more = max(lost, key=lambda pair: pair[1])
    norm = evidence.steps[0].gradient or 0.0
    return Finding(
        "precision",
        "broken" if norm == 0 else "warning",
        Place(module=parameter.ref.path, parameter=parameter.name),
        "gradients underflow: 16-bit numbers below 6e-8 are zero, and the loss is not scaled.",
        {"zeros in 16 bits": zero_share_of(parameter), "zeros in float32": again.zeros[parameter.name]},
        fixes.scaled(evidence, 14),
    )


def zero_share_of(parameter: ParameterStats) -> float:
    """The share of zeros in a parameter's gradient, by the sample."""
    return parameter.grad.zeros if parameter.grad is not None else 0.0
