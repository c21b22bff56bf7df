"""Checks of what ran when something broke: an operation, an exception, something unknown."""

from __future__ import annotations

from .. import fixes, rewrites
from ..evidence import Evidence
from ..report import Kind, Place
from ..symptoms import ran_away
from .finding import Finding, short


def unsafe(evidence: Evidence) -> Finding | None:
    """The operation that made the first value that is not finite, in the model or in the loss function."""
    origin = evidence.origin
    if evidence.broke_at is None or origin is None or origin.source != "op" or ran_away(evidence):
        return None
    kind: Kind = "loss" if origin.module is None else "operation"
    only = " only" if origin.phase == "backward" else ""
    where = {None: "the loss function", "": "the model's own code"}.get(origin.module, repr(origin.module))
    if "divided by" in origin.facts:
        return _division(evidence, kind, where)
    return Finding(
        kind,
        "broken",
        Place(module=origin.module, op=origin.op),
        f"{origin.op} in {where} produces the first non-finite value from finite inputs, in the {origin.phase} "
        f"pass{only}.",
        dict(origin.facts),
        [*_bias_of_head(evidence, origin.op), *([code] if (code := fixes.rewrite(origin.op, origin.module)) else [])],
        rewrites.equivalents(evidence) if kind == "loss" else [],
    )


def _division(evidence: Evidence, kind: Kind, where: str) -> Finding:
    """A division by one number that is 0 for this batch: a count of nothing, or the spread of equal numbers."""
    origin = evidence.origin
    assert origin is not None
    made = str(origin.facts["divided by"]).rpartition(" ")[2]
    what = "a number that is 0"
    if made in fixes.SPREADS:
        what = f"0, the {made} of equal numbers, or of zeros"
    elif made in fixes.COUNTS:
        what = "0, a count or a sum of nothing"
    return Finding(
        kind,
        "broken",
        Place(module=origin.module, op=origin.op),
        f"{origin.op} in {where} divides by {what}, in this batch.",
        dict(origin.facts),
        [fixes.guard_division(made, origin.module)],
        rewrites.equivalents(evidence) if kind == "loss" else [],
    )


def _bias_of_head(evidence: Evidence, op: str) -> list[str]:
    """A bias at which the exponential of what comes out is too large, before any training."""
    if op not in ("exp", "poisson_nll_loss") or not evidence.layers:
        return []
    path = evidence.layers[-1].path
    large = [
        one
        for one in evidence.parameters
        if one.ref.module_name == path and one.ref.attribute == "bias" and one.stats and one.stats.largest > _LARGE_BIAS
    ]
    return [fixes.fresh(evidence, large)] if large else []


_LARGE_BIAS = 20.0  # its exponential is 5e8


def raised(evidence: Evidence) -> Finding | None:
    """An exception in the user's code."""
    error, failed = evidence.error, evidence.trace.failed
    if error is None:
        return None
    module, op = failed if failed is not None else (None, "")
    text = short(error)
    written = []
    if "more than 1 value per channel" in text:
        op = "batch_norm"
        written = [fixes.drop_batch_statistics(module)] if module else []
    kind: Kind = "loss" if module is None else "operation"
    why = f"{type(error).__name__}: {text}"
    if "does not require grad" in text:
        return _without_gradients(evidence, text)
    leaf, casts = fixes.casts(evidence, text)
    if leaf is not None:
        kind, written = "target" if leaf.is_target else "input", casts
        why = f"{why} ({leaf.code} is {str(leaf.tensor.dtype).removeprefix('torch.')})"
    elif "shapes cannot be multiplied" in text and module is not None:
        written = [fixes.width(evidence.model, module, text)]
    return Finding(kind, "broken", Place(module=module, op=op or None), why, {"error": text}, written)


def _without_gradients(evidence: Evidence, text: str) -> Finding:
    """A loss that no parameter can learn from."""
    frozen = [one for one in evidence.parameters if not one.ref.tensor.requires_grad]
    if frozen and len(frozen) == len(evidence.parameters):
        why = "no parameter of the model requires a gradient: there is nothing to learn."
        first = frozen[0]
        place = Place(module=first.ref.module_name, parameter=first.name)
        return Finding("gradient", "broken", place, why, {"error": text}, ["model.requires_grad_(True)"])
    why = "the loss has no gradient: it is detached from every parameter."
    advice = "# in the loss function or forward(): take out .detach(), .item(), .data or torch.no_grad()"
    return Finding("loss", "broken", Place(), why, {"error": text}, [advice])


def unexplained(evidence: Evidence) -> Finding | None:
    """A run that broke, and no other check knows why."""
    if evidence.broke_at is None or evidence.error is not None:
        return None
    origin = evidence.origin
    place = Place(module=origin.module, op=origin.op) if origin is not None and origin.source == "op" else Place()
    why = "the loss or a gradient is not finite, and nothing shows where that begins."
    return Finding("operation", "broken", place, why, {"loss": evidence.first_loss})
