"""Checks of the batch: values that are not finite, targets out of range, odd scales."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import fixes
from ..batch import Leaf
from ..evidence import Evidence
from ..limits import LIMITS
from ..report import Place, Severity
from ..safe_forms import SafeForm
from ..stats import rows_equal
from ..symptoms import diverges, odd_scale
from .finding import Finding, course, severity_of, short, target_of


def bad_input(evidence: Evidence) -> Finding | None:
    """NaN and infinities in what the model reads."""
    if evidence.broke_at is None:
        return None
    for leaf in evidence.leaves:
        if leaf.is_target or leaf.features is None or not leaf.features.bad or not _is_to_blame(evidence, leaf):
            continue
        found = leaf.features
        facts = {"rows": f"{found.bad_rows} of {found.rows}", "features": len(found.bad)}
        return Finding(
            "input",
            "broken",
            Place(feature=found.bad[0] if len(found.bad) == 1 else found.bad),
            f"{leaf.code} holds NaN or infinities; every row that has one becomes NaN, and with it the mean loss.",
            facts,
            [fixes.impute(leaf, evidence.batch)],
        )
    return None


def _is_to_blame(evidence: Evidence, leaf: Leaf) -> bool:
    """Whether a tensor that is not finite is no mask: it holds more than -inf, or the search ended at it."""
    origin = evidence.origin
    if origin is not None and origin.source == "leaf" and origin.op == leaf.code:
        return True
    low, high = leaf.tensor.detach().aminmax()
    return not (low == -math.inf and high < math.inf)


def same_rows(evidence: Evidence) -> Finding | None:
    """Inputs that are the same in every row, of rows whose targets differ."""
    flow, run = evidence.trace.flow, evidence.untreated
    if flow is None or evidence.broke_at is not None or (run is not None and run.fallen > LIMITS.learns):
        return None
    inputs = [leaf for leaf in evidence.leaves if leaf.path in flow.inputs and leaf.tensor.dim()]
    targets = [leaf for leaf in evidence.leaves if leaf.path in flow.compared and leaf not in inputs]
    rows = {len(leaf.tensor) for leaf in (*inputs, *targets) if leaf.tensor.dim()}
    if not inputs or not targets or len(rows) != 1 or rows.pop() < LIMITS.several_rows or flow.draws:
        return None
    if not all(rows_equal(leaf.tensor) for leaf in inputs) or all(rows_equal(leaf.tensor) for leaf in targets):
        return None
    leaf = inputs[0]
    value = f", {leaf.tensor.flatten()[0].item():g}" if bool((leaf.tensor == leaf.tensor.flatten()[0]).all()) else ""
    return Finding(
        "input",
        "warning",
        Place(tensor=leaf.code),
        f"every row of {leaf.code} is the same{value}, and the targets differ: the model cannot tell one row from "
        "another.",
        {"rows": len(leaf.tensor)},
        [f"# look at how {leaf.code} is made: another tokenizer's numbers, an index that was left out"],
    )


def inverted_mask(evidence: Evidence) -> Finding | None:
    """A mask that may hide what it is to show, in a run that learns little: True is "ignore" to one function only."""
    run = evidence.untreated
    if run is None or evidence.broke_at is not None or (run.fallen > LIMITS.learns and not run.constant):
        return None
    for leaf in evidence.leaves:
        x = leaf.tensor
        if leaf.is_target or x.is_floating_point() or x.is_complex() or x.dim() < 2 or not x.numel():
            continue
        if not bool(((x == 0) | (x == 1)).all()) or bool((x == x.flatten()[0]).all()):
            continue
        return Finding(
            "input",
            severity_of(run),
            Place(tensor=leaf.code),
            f"{course(run)}; with {leaf.code} inverted it falls: it says of every place the opposite of what is meant. "
            "key_padding_mask and src_key_padding_mask are True where a key is left out, attention_mask is where it "
            "is kept.",
            {"share of True": float(x.float().mean())},
            [leaf.rebind(evidence.batch, f"{leaf.value} == 0" if x.dtype == torch.bool else f"1 - {leaf.value}")],
            suspicion=True,
            change=f"{leaf.code} inverted",
        )
    return None


def bad_target(evidence: Evidence) -> Finding | None:
    """NaN and infinities in what the loss compares with."""
    if evidence.broke_at is None:
        return None
    for leaf in evidence.leaves:
        if leaf.is_target and leaf.features is not None and leaf.features.bad and _is_to_blame(evidence, leaf):
            return Finding(
                "target",
                "broken",
                Place(),
                f"{leaf.code}, which the model does not read, holds NaN or infinities: so does the loss.",
                {"rows": f"{leaf.features.bad_rows} of {leaf.features.rows}"},
                [code for code in (fixes.drop_rows(leaf, evidence.batch),) if code],
            )
    return None


def target_out_of_range(evidence: Evidence) -> Finding | None:
    """Classes that the model has no output for, and labels outside [0, 1]."""
    for call in evidence.trace.losses:
        target = target_of(evidence, call.name)
        place = Place(op=call.name, tensor=target.code if target is not None else None)
        if call.problem == "classes":
            low, high, count = call.facts["smallest"], call.facts["largest"], call.facts["classes"]
            fix = fixes.shift_classes(target, evidence.batch, call.facts) if target is not None else ""
            why = (
                f"targets run from {low} to {high}, and a model with {count} outputs has the classes 0 to {count - 1}."
            )
            return Finding("target", "broken", place, why, dict(call.facts), [fix] if fix else [])
        if call.problem == "range":
            low, high = call.facts["smallest"], call.facts["largest"]
            fix = fixes.into_unit_range(target, evidence.batch, low, high) if target is not None and high > low else ""
            why = f"targets run from {low:g} to {high:g}; {call.name} takes probabilities, and has no minimum outside."
            return Finding("target", "broken", place, why, dict(call.facts), [fix] if fix else [])
        if call.problem == "signs":
            fix = target.rebind(evidence.batch, f"{target.value} * 2 - 1") if target is not None else ""
            why = "targets are 0 and 1, and a loss of y * z takes -1 and 1: a target of 0 leaves nothing of z."
            return Finding("target", "warning", place, why, dict(call.facts), [fix] if fix else [])
    target = next((leaf for leaf in evidence.leaves if leaf.is_target), None)
    error, failed = evidence.error, evidence.trace.failed
    if error is None or failed is None or failed[0] is not None or target is None or target.tensor.is_floating_point():
        return None
    text = str(error)
    if not any(words in text for words in ("out of bounds", "out of range", "must be smaller", "non-negative")):
        return None
    facts = {"error": short(error)}
    if target.tensor.numel():
        facts |= {"smallest": str(int(target.tensor.min())), "largest": str(int(target.tensor.max()))}
    return Finding("target", "broken", Place(op=failed[1]), "a target is used as an index, and is out of range.", facts)


def log_of_target(evidence: Evidence) -> Finding | None:
    """An operation on targets alone makes the first value that is not finite."""
    origin = evidence.origin
    if origin is None or origin.source != "op" or origin.weights or origin.module is not None or not origin.sources:
        return None
    targets = {leaf.code: leaf for leaf in evidence.leaves if leaf.is_target}
    if not origin.sources <= targets.keys() or origin.op in ("mean", "std", "var"):
        return None
    leaf = targets[min(origin.sources)]
    # Of a count, or a spread, or whatever else it is that has another size: the targets are what they are.
    if origin.facts.get("divided by", "0") != "0" or origin.elements != leaf.tensor.numel():
        return None
    if not leaf.tensor.is_floating_point():  # counts of classes, say: the loss function's own arithmetic
        return None
    low = float(leaf.tensor.min()) if leaf.tensor.numel() else math.nan
    if origin.op == "lgamma":  # of a count, whose factorial is meant
        return Finding(
            "operation",
            "broken",
            Place(op="lgamma"),
            f"lgamma of the targets alone is not finite: {leaf.code} goes down to {low:g}. The logarithm of y! is "
            "lgamma(y + 1).",
            {"smallest": low, **origin.facts},
            fixes.advice(_LOG_FACTORIAL, "lgamma", None),
            form=_LOG_FACTORIAL,
            values_are_right=True,
        )
    return Finding(
        "target",
        "broken",
        Place(op=origin.op),
        f"{origin.op} of the targets alone is not finite: {leaf.code} goes down to {low:g}.",
        {"smallest": low, **origin.facts},
        [fixes.positive(leaf, evidence.batch)],
    )


_LOG_FACTORIAL = SafeForm("torch.lgamma(y + 1)", lambda func, args, kwargs: func(args[0] + 1, *args[1:], **kwargs))


def scale(evidence: Evidence) -> Finding | None:
    """Inputs that are not scaled for the weights in use, and what that does."""
    odd = odd_scale(evidence)
    if odd is None:
        return None
    broke, replay = evidence.broke_at is not None, evidence.standardised
    first = next((c for c in evidence.layers if c.activation in ("tanh", "sigmoid")), None)
    saturated = first is not None and first is evidence.layers[0] and first.edge >= LIMITS.saturated
    hurts = saturated or evidence.excess >= LIMITS.loss_excess or diverges(evidence)
    if broke:
        hurts = replay is not None and replay.finite
    if replay is not None and evidence.broke_at != 1:  # where the first pass is in order, this one has to be better
        before, after = evidence.first_loss, replay.loss
        hurts = hurts and after is not None and (before is None or after <= before)
    if not hurts and not odd.strong:
        return None
    facts: dict[str, Any] = {"factor between features": odd.spread, "root mean square": odd.rms}
    if replay is not None:
        facts["loss"] = evidence.first_loss
        facts["loss if standardised"] = replay.loss
    place = Place(feature=odd.features[0] if len(odd.features) == 1 else odd.features or None, tensor=odd.leaf.code)
    leads_to = "numbers as large as these make the first steps too large."
    if odd.spread >= LIMITS.scale_spread:
        leads_to = "the largest decide the first steps, and the others hardly count."
    elif saturated and first is not None:
        leads_to = f"{first.edge:.0%} of the first {first.activation}'s outputs are at its ends, where it has no slope."
    elif odd.rms < 1:
        leads_to = "the model hardly sees the difference between one row and another."
    severity: Severity = "broken" if (broke or diverges(evidence)) and hurts else "warning"
    return Finding(
        "input",
        severity,
        place,
        f"{odd.text}: {leads_to}",
        facts,
        [fixes.standardise(odd.leaf, evidence.batch)],
        suspicion=odd.rms < LIMITS.input_rms_sure and not (saturated and odd.strong and _learns_little(evidence)),
        change=f"{odd.leaf.code} standardised",
    )


def _learns_little(evidence: Evidence) -> bool:
    """Whether a run that goes on loses little."""
    run = evidence.untreated
    return run is not None and evidence.broke_at is None and abs(run.fallen) < LIMITS.learns


STANDARDISED = "targets standardised, which divides the loss as well"


def target_scale(evidence: Evidence) -> Finding | None:
    """Targets that are compared with what a model puts out, and are far larger."""
    flow = evidence.trace.flow
    for leaf in evidence.leaves:
        comparison = flow.compared.get(leaf.path) if flow is not None else None
        if flow is None or comparison is None or leaf.path in flow.inputs or not leaf.tensor.is_floating_point():
            continue
        target, output = comparison.target, comparison.prediction
        if target is None or output is None or not target.finite or not target.std or not comparison.distance:
            continue
        offset = abs(target.mean) / target.std
        if target.rms < LIMITS.target_rms and not (offset >= LIMITS.offset and target.rms >= LIMITS.target_offset):
            continue
        if output.finite and 1 / LIMITS.reaches < output.rms / target.rms < LIMITS.reaches:
            continue  # it puts out numbers of that size: by a last layer of its own, or because it has learned
        facts = {
            "mean": target.mean,
            "standard deviation": target.std,
            "root mean square of the outputs": output.rms,
        }
        return Finding(
            "target",
            "broken" if evidence.broke_at is not None or diverges(evidence) else "warning",
            Place(tensor=leaf.code),
            f"{leaf.code} has a mean of {target.mean:.4g} and a standard deviation of {target.std:.4g}, and the model "
            f"starts at about {output.mean:.2g}: the loss and its gradients are as large as that difference.",
            facts,
            [fixes.standardise_targets(leaf, evidence.batch)],
            suspicion=True,
            change=STANDARDISED,
            rescales=comparison.unit,
        )
    return None
