"""Checks of 16-bit floats: what overflows and underflows in them, and not in float32."""

from __future__ import annotations

import math
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
    place = Place()
    if origin is not None:
        place = Place(module=origin.module, op=origin.op)
        facts |= {name: origin.facts[name] for name in ("line", "divided by") if name in origin.facts}
    elif evidence.error is not None and evidence.trace.failed is not None:
        place = Place(module=evidence.trace.failed[0], op=evidence.trace.failed[1] or None)
    form = origin.reason.form if origin is not None and origin.reason is not None else None
    return Finding("precision", "broken", place, _what(evidence, facts), facts, _remedies(evidence), form=form)


def _what(evidence: Evidence, facts: dict[str, Any]) -> str:
    """What happens in 16 bits; says that a value overflows only where float32's is beyond the end of the dtype."""
    origin = evidence.origin
    finite = " The same pass in float32 is finite."
    if origin is None:
        return f"an error is raised in 16 bits.{finite}"
    dtype = str(origin.dtype).removeprefix("torch.")
    end = torch.finfo(origin.dtype).max if half(origin.dtype) else math.inf
    where = {None: "the loss function", "": "the model's own code"}.get(origin.module, repr(origin.module))
    wide = origin.in_float32
    if wide is not None and math.isfinite(wide) and wide > end:
        facts |= {"in float32": wide, "largest before it": evidence.largest_low, f"largest of {dtype}": end}
        return f"{origin.op} in {where} gives {wide:.4g}, and {dtype} ends at {end:.5g}: it overflows.{finite}"
    if origin.reason is not None:
        why = (
            origin.constant
            or f"numbers below {torch.finfo(origin.dtype).smallest_normal:.1g} are 0 in {dtype}, or nearly"
        )
        return f"{origin.op} in {where} {origin.reason.text}: {why}.{finite}"
    if evidence.largest_low:
        facts["largest before it"] = evidence.largest_low
    if origin.phase == "backward":
        return f"a gradient in {origin.op} in {where} overflows {dtype}.{finite}"
    return f"{origin.op} in {where} makes {origin.facts.get('made', 'inf')} in {dtype}.{finite}"


def _remedies(evidence: Evidence) -> list[str]:
    """Wider numbers; and where a constant is lost, one that 16 bits can hold, as an advice."""
    origin = evidence.origin
    lost = origin.constant if origin is not None and origin.reason is not None else None
    if origin is None or origin.reason is None:
        return fixes.wider(evidence)
    if lost is None or lost.becomes != 0:
        return [*fixes.wider(evidence), *fixes.advice(origin.reason.form, origin.op, origin.module)]
    advice = fixes.larger_constant(lost, origin.module)
    return [*(f"{code}\n{advice}" for code in fixes.wider(evidence)[:-1]), advice]


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
        Place(module=parameter.ref.module_name, parameter=parameter.name),
        "gradients underflow: 16-bit numbers below 6e-8 are zero, and the loss is not scaled.",
        {"zeros in 16 bits": zero_share_of(parameter), "zeros in float32": again.zeros[parameter.name]},
        fixes.scaled(evidence, 14),
    )


def zero_share_of(parameter: ParameterStats) -> float:
    """The share of zeros in a parameter's gradient, by the sample."""
    return parameter.grad.zeros if parameter.grad is not None else 0.0


def vanished_eps(evidence: Evidence) -> Finding | None:
    """An optimizer's eps that is 0, or 0 in 16 bits: where a gradient's square is 0, the update divides by 0."""
    bad = evidence.bad_update
    if bad is None or evidence.optimizer is None or bad.eps is None or bad.eps_in_dtype != 0:
        return None
    name = type(evidence.optimizer).__name__
    dtype = str(bad.dtype).removeprefix("torch.")
    facts: dict[str, Any] = {"eps": bad.eps, "parameters": len(bad.names), "step": bad.step}
    eps = 1e-4 if bad.dtype == torch.float16 else 1e-8
    code = f'for group in optimizer.param_groups:\n    group["eps"] = {eps:g}'
    what = f"{name}'s eps is 0"
    if bad.eps:
        what = f"{name}'s eps of {bad.eps:g} is 0 in {dtype}"
        code += "  # or weights in float32: model.float()"
    why = (
        f"{what}: where the square of a gradient is 0, its update divides by 0. {bad.names[0]} is not finite after "
        f"step {bad.step}; the loss and the gradients before it are."
    )
    place = Place(module=bad.names[0].rpartition(".")[0], parameter=bad.names[0])
    wider = fixes.wider(evidence)[:-1] if bad.eps else []
    return Finding("precision" if bad.eps else "optimizer", "broken", place, why, facts, [code, *wider])
