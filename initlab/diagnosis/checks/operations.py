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
    return Finding(
        kind, "broken", Place(module=module, op=op or None), f"{type(error).__name__}: {text}", {"error": text}, written
    )


def unexplained(evidence: Evidence) -> Finding | None:
    """A run that broke, and no other check knows why."""
    if evidence.broke_at is None or evidence.error is not None:
        return None
    origin = evidence.origin
    place = Place(module=origin.module, op=origin.op) if origin is not None and origin.source == "op" else Place()
    why = "the loss or a gradient is not finite, and nothing shows where that begins."
    return Finding("operation", "broken", place, why, {"loss": evidence.first_loss})
