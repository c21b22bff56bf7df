"""Checks of the loss function, by the arguments that torch's own were called with."""

from __future__ import annotations

from .. import fixes, rewrites
from ..evidence import Evidence
from ..report import Place, Severity
from .finding import Finding

_PROBLEMS = {
    "cross_entropy, probabilities": "cross_entropy takes logits and gets probabilities: a softmax of a softmax.",
    "nll_loss, probabilities": "nll_loss takes log-probabilities and gets probabilities: it takes no logarithm itself.",
    "nll_loss, logits": "nll_loss takes log-probabilities and gets logits: it has no minimum.",
    "binary_cross_entropy, logits": "binary_cross_entropy takes probabilities and gets raw outputs.",
    "binary_cross_entropy_with_logits, probabilities": "binary_cross_entropy_with_logits applies a sigmoid itself "
    "and gets the output of another.",
    "kl_div, probabilities": "kl_div takes log-probabilities as its input and gets probabilities.",
}


def wrong_space(evidence: Evidence) -> Finding | None:
    """A loss function that gets logits for probabilities, or the other way round."""
    for call in evidence.trace.losses:
        why = _PROBLEMS.get(f"{call.name}, {call.problem}")
        if why is not None:
            written, losses = rewrites.in_right_space(evidence, call)
            severity: Severity = "broken" if call.fatal or evidence.broke_at is not None else "warning"
            return Finding("loss", severity, Place(op=call.name), why, dict(call.facts), written, losses)
    return None


def broadcast(evidence: Evidence) -> Finding | None:
    """A prediction and a target that are broadcast against each other: every row is compared with every other."""
    for call in evidence.trace.losses:
        if call.problem == "shapes":
            prediction, target = call.facts["prediction"], call.facts["target"]
            leaf = next((one for one in evidence.leaves if tuple(one.tensor.shape) == target), None)
            why = (
                f"{call.name} gets shapes {prediction} and {target}, which broadcast to {call.facts['broadcast']}: "
                "every row's prediction is compared with every row's target."
            )
            severity: Severity = "warning" if evidence.broke_at is None else "broken"
            written = fixes.reshape(leaf, evidence.batch, prediction)
            return Finding("loss", severity, Place(op=call.name), why, dict(call.facts), written)
    return None


def empty_reduction(evidence: Evidence) -> Finding | None:
    """A mean over nothing."""
    if evidence.broke_at is None:
        return None
    for call in evidence.trace.losses:
        if call.problem == "empty":
            empty = [leaf.code for leaf in evidence.leaves if leaf.tensor.numel() == 0]
            of = f"{empty[0]} is empty, and " if empty else ""
            if "ignored" in call.facts:
                of = f"all {call.facts['ignored']} labels are {call.facts['ignore_index']}, which is ignore_index: "
            why = f"{of}{call.name} averages over no elements: 0 / 0."
            advice = "# skip such a batch, or give the loss a sum and divide it by max(1, count)"
            return Finding("loss", "broken", Place(op=call.name), why, dict(call.facts), [advice])
    return None
