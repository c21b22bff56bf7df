"""Checks of gradients, and of the step that is taken along them."""

from __future__ import annotations

import math
from typing import Any

from .. import fixes
from ..evidence import Evidence, ParameterStats
from ..limits import LIMITS
from ..report import Place
from ..symptoms import diverges, overflows
from . import recurrence
from .finding import Finding


def exploding_gradient(evidence: Evidence) -> Finding | None:
    """Gradients out of proportion, though weights and data are in order."""
    if not evidence.steps:
        return None
    norm, loss, origin = evidence.steps[0].gradient, evidence.first_loss, evidence.origin
    overflowed = overflows(evidence)
    repeats = {path: n for path, n in evidence.trace.repeats.items() if n >= LIMITS.recurrence}
    usual = max(1.0, evidence.baseline or abs(loss or 0.0))
    limit = LIMITS.gradient_norm_in_time if repeats else LIMITS.gradient_norm
    huge = norm is not None and not norm < limit * usual
    if not (huge and evidence.broke_at != 1) and not overflowed:
        return None
    if overflowed and origin is not None and origin.phase == "forward":  # what clipping does not reach
        return None
    worst = max((h for h in evidence.parameters if h.grad_norm is not None), key=_norm_of, default=None)
    inside = [
        p
        for p in repeats
        if worst is not None and (worst.ref.module_name == p or worst.ref.module_name.startswith(f"{p}."))
    ]
    path = inside[0] if inside else worst.ref.module_name if worst is not None else None
    steps = max(repeats.values(), default=0)
    facts: dict[str, Any] = {"norm": norm}
    if worst is not None:
        facts |= {"worst": worst.name, "its norm": worst.grad_norm}
    if steps:
        facts["steps in time"] = steps
    if norm and math.isfinite(norm):
        facts["factor at max_norm 1"] = 1.0 / norm
    why = "gradients explode" + (f" over {steps} steps in time: each multiplies them again." if steps else ".")
    return Finding(
        "gradient",
        "broken" if evidence.broke_at is not None or diverges(evidence) else "warning",
        Place(module=path, parameter=worst.name if worst is not None else None),
        why,
        facts,
        [fixes.clip(evidence.optimizer)] if norm is None or math.isfinite(norm) else _smaller_matrices(evidence),
        suspicion=evidence.broke_at != 1 and not _throws(evidence, norm, usual),
        change="gradients clipped",
    )


def _smaller_matrices(evidence: Evidence) -> list[str]:
    """For gradients that are not finite, of which clipping makes nothing: recurrent matrices that do not multiply."""
    found = [one for one, _, radius in recurrence.recurrent(evidence) if radius > 1]
    return [*(recurrence.remedies(evidence, found) if found else []), fixes.clip(evidence.optimizer)]


def _throws(evidence: Evidence, norm: float | None, usual: float) -> bool:
    """Whether such a gradient throws the weights far away, wherever that happens to lead."""
    update = evidence.steps[0].update
    return norm is not None and norm > LIMITS.gradient_norm * usual and (update or 0.0) >= LIMITS.update_ratio


def _norm_of(parameter: ParameterStats) -> float:
    norm = parameter.grad_norm or 0.0
    return math.inf if math.isnan(norm) else norm


def too_fast(evidence: Evidence) -> Finding | None:
    """A step that is too large."""
    if not diverges(evidence) or evidence.optimizer is None:
        return None
    first = evidence.first_loss
    assert first is not None
    falls = next((factor for factor, loss in evidence.rates if loss < first), None)
    rate = max(float(group["lr"]) for group in evidence.optimizer.param_groups)
    facts: dict[str, Any] = {"rate": rate, "update against weights": evidence.steps[0].update}
    written, change = [], ""
    if falls is not None:
        factor = falls / 3 if falls < 1 else 0.1
        facts["rate that would not diverge"] = float(f"{rate * factor:.1g}")
        change = f"rate {float(f'{rate * factor:.1g}'):g}"
        written = [
            fixes.smaller_rate(factor, evidence.optimizer),
            fixes.smaller_rate(factor / 10, evidence.optimizer),
        ]
    longer = len(evidence.losses) >= len(evidence.further)
    losses: list[float | None] = evidence.losses if longer else [*evidence.further]
    known = [math.inf if x is None or math.isnan(x) else x for x in losses]
    worst = known.index(max(known))
    last = losses[worst]
    end = math.nan if last is None else last
    what = f"{'rose' if math.isfinite(known[worst]) else 'went'} from {known[0]:.4g} to {end:.4g}"
    return Finding(
        "learning rate",
        "broken",
        Place(),
        f"the loss {what} in {worst} step{'s' if worst > 1 else ''}: the rate {rate:g} is too large.",
        facts,
        written,
        suspicion=True,
        change=change,
    )
