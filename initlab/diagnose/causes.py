"""The rules: each a function from the evidence to a finding, or None. No rule runs anything.

They stand in the order in which one cause infects the next: what is not initialised, bad data, low precision, the loss
function, the scale of the data, starting weights, operations, gradients, the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import names, remedies
from .batch import Leaf
from .evidence import Evidence, Held, half
from .limits import LIMITS
from .report import Kind, Place, Severity
from .trace import Call


@dataclass
class Finding:
    """A cause before its remedies have been tried.

    Args:
        remedies: code, best first; the first that lets the loss fall is the one to print.
    """

    kind: Kind
    severity: Severity
    place: Place
    explanation: str
    evidence: dict[str, Any] = field(default_factory=dict)
    remedies: list[str] = field(default_factory=list)


Rule = Callable[[Evidence], "Finding | None"]


# ---------------------------------------------------------------------------------------------------------------
# Nobody wrote it


def nowhere(evidence: Evidence) -> Finding | None:
    """Parameters on the meta device."""
    meta = [held for held in evidence.held if held.slot.tensor.is_meta]
    if not meta:
        return None
    return Finding(
        "uninitialised",
        "broken",
        Place(module=meta[0].slot.path, parameter=meta[0].name),
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
        Place(module=held.slot.path, parameter=held.name),
        f"{held.name} {why} before the first step: memory that nobody wrote, or a checkpoint of a run that had failed.",
        facts,
        [remedies.fresh(evidence, [one for one, _ in bad], buffer) for buffer in ("zero_()", "fill_(1.0)")],
    )


def _why_garbage(held: Held, evidence: Evidence) -> str:
    stats = held.stats
    if stats is None:
        return ""
    if not stats.finite:
        origin = evidence.origin
        blamed = origin is not None and origin.source == "held" and origin.op in held.slot.names
        may_mask = not held.slot.is_parameter and stats.low == -math.inf and math.isfinite(stats.high)
        return "" if may_mask and not blamed else "holds NaN or infinities"
    if held.slot.leaf == "running_var" and stats.low < 0:
        return "is negative, and no variance is"
    if held.slot.leaf == "running_mean" and stats.largest > LIMITS.garbage:
        return "holds means that no activation has"
    if held.slot.is_parameter and (stats.largest > LIMITS.garbage or held.tiny > LIMITS.denormal_share):
        return "holds values that no starting law draws"
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
        Place(module=held.slot.path, parameter=held.name),
        f"the optimizer's {' and '.join(held.state)} of {held.name} is not finite, or a negative square, before the "
        "first step, which then writes NaN into the weights.",
        {"parameters": len(bad)},
        [remedies.forget_state(evidence, bad)],
    )


# ---------------------------------------------------------------------------------------------------------------
# The data


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
            [remedies.impute(leaf, evidence.batch)],
        )
    return None


def _is_to_blame(evidence: Evidence, leaf: Leaf) -> bool:
    """Whether a tensor that is not finite is no mask: it holds more than -inf, or the search ended at it."""
    origin = evidence.origin
    if origin is not None and origin.source == "leaf" and origin.op == leaf.code:
        return True
    low, high = leaf.tensor.detach().aminmax()
    return not (low == -math.inf and high < math.inf)


def bad_index(evidence: Evidence) -> Finding | None:
    """An index of an embedding that is out of range."""
    if evidence.error is None or evidence.trace.failed is None or evidence.trace.failed[1] != "embedding":
        return None
    module = evidence.trace.failed[0]
    ids = [leaf for leaf in evidence.leaves if not leaf.is_target and not leaf.tensor.is_floating_point()]
    facts: dict[str, Any] = {"error": _short(evidence.error)}
    if ids and ids[0].tensor.numel():
        facts |= {"smallest": int(ids[0].tensor.min()), "largest": int(ids[0].tensor.max())}
    return Finding(
        "input",
        "broken",
        Place(module=module, op="embedding"),
        "an index in the batch is outside the embedding's rows.",
        facts,
    )


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
                [code for code in (remedies.drop_rows(leaf, evidence.batch),) if code],
            )
    return None


def target_out_of_range(evidence: Evidence) -> Finding | None:
    """Classes that the model has no output for, and labels outside [0, 1]."""
    target = next((leaf for leaf in evidence.leaves if leaf.is_target), None)
    for call in evidence.trace.losses:
        if call.problem == "classes":
            low, high, count = call.facts["smallest"], call.facts["largest"], call.facts["classes"]
            fix = remedies.shift_classes(target, evidence.batch, low, high, count) if target is not None else ""
            why = (
                f"targets run from {low} to {high}, and a model with {count} outputs has the classes 0 to {count - 1}."
            )
            return Finding("target", "broken", Place(op=call.name), why, dict(call.facts), [fix] if fix else [])
        if call.problem == "range":
            low, high = call.facts["smallest"], call.facts["largest"]
            fix = (
                remedies.into_unit_range(target, evidence.batch, low, high) if target is not None and high > low else ""
            )
            why = f"targets run from {low:g} to {high:g}; {call.name} takes probabilities, and has no minimum outside."
            return Finding("target", "broken", Place(op=call.name), why, dict(call.facts), [fix] if fix else [])
    error, failed = evidence.error, evidence.trace.failed
    if error is None or failed is None or failed[0] is not None or target is None or target.tensor.is_floating_point():
        return None
    text = str(error)
    if not any(words in text for words in ("out of bounds", "out of range", "must be smaller", "non-negative")):
        return None
    facts = {"error": _short(error)}
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
    if not leaf.tensor.is_floating_point():  # counts of classes, say: the loss function's own arithmetic
        return None
    low = float(leaf.tensor.min()) if leaf.tensor.numel() else math.nan
    return Finding(
        "target",
        "broken",
        Place(op=origin.op),
        f"{origin.op} of the targets alone is not finite: {leaf.code} goes down to {low:g}.",
        {"smallest": low, **origin.facts},
        [remedies.positive(leaf, evidence.batch)],
    )


@dataclass
class Scale:
    """What is odd about the scale of an input."""

    leaf: Leaf
    features: list[int]
    spread: float
    rms: float
    strong: bool
    text: str


def odd_scale(evidence: Evidence) -> Scale | None:
    """An input whose features differ by orders of magnitude, or that is far from mean 0 and standard deviation 1."""
    for leaf in evidence.leaves:
        found = leaf.features
        if leaf.is_target or found is None or _is_normalised_first(evidence, leaf):
            continue
        moving = found.reach > 0
        if not bool(moving.any()):
            continue
        reach = found.reach[moving]
        rms = float(found.rms.square().mean().sqrt())
        columns = leaf.tensor.shape[-1] if leaf.tensor.dim() > 1 else 1
        if columns > 1 and leaf.tensor.dim() <= 3:
            middle = float(reach.median())
            far = (found.reach / middle).log10().abs() >= math.log10(LIMITS.scale_spread)
            odd = (far & moving).nonzero().flatten().tolist()
            spread = float(reach.max() / reach.min())
            if not odd and spread >= LIMITS.scale_spread:
                odd = [int(found.reach.argmax())]
            if odd:
                strong = spread >= LIMITS.spread_harmful
                text = f"features of {leaf.code} differ in scale by a factor of {spread:.2g}"
                return Scale(leaf, odd, spread, rms, strong, text)
        else:
            spread = 1.0
        offset = float((found.mean.abs() / found.reach.clamp_min(1e-30))[moving].median())
        text = f"{leaf.code} has a root mean square of {rms:.3g}, and the weights in use expect about 1"
        if rms >= LIMITS.input_rms_suspect or 0 < rms <= 1 / LIMITS.input_rms_suspect**3 or offset >= LIMITS.offset:
            return Scale(leaf, [], spread, rms, rms >= LIMITS.input_rms, text)
    return None


def _is_normalised_first(evidence: Evidence, leaf: Leaf) -> bool:
    """Whether the first thing that the model does with an input is to normalise it."""
    for call in evidence.trace.calls:
        if leaf.path in call.reads_batch and not call.module._modules:
            return "norm" in call.kind.lower()
    return False


def scale(evidence: Evidence) -> Finding | None:
    """Inputs that are not scaled for the weights in use, and what that does."""
    odd = odd_scale(evidence)
    if odd is None:
        return None
    broke, cured = evidence.broke_at is not None, evidence.standardised
    first = next((c for c in evidence.layers if c.activation in ("tanh", "sigmoid")), None)
    saturated = first is not None and first is evidence.layers[0] and first.edge >= LIMITS.saturated
    hurts = saturated or evidence.excess >= LIMITS.loss_excess or diverges(evidence)
    if broke:
        hurts = cured is not None and cured.finite
    if not hurts and not odd.strong:
        return None
    facts: dict[str, Any] = {"factor between features": odd.spread, "root mean square": odd.rms}
    if cured is not None:
        facts["loss"] = evidence.first_loss
        facts["loss if standardised"] = cured.loss
    place = Place(feature=odd.features[0] if len(odd.features) == 1 else odd.features or None)
    why = f"{odd.text}: the largest decide the first step, and saturate or blow up what follows."
    severity: Severity = "broken" if (broke or diverges(evidence)) and hurts else "warning"
    return Finding("input", severity, place, why, facts, [remedies.standardise(odd.leaf, evidence.batch)])


# ---------------------------------------------------------------------------------------------------------------
# Low precision


def uses_half(evidence: Evidence) -> bool:
    """Whether 16-bit floats were seen."""
    held = any(half(h.slot.tensor.dtype) for h in evidence.held)
    origin = evidence.origin is not None and half(evidence.origin.dtype)
    return held or origin or bool(evidence.trace.low)


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
    return Finding("precision", "broken", place, why, facts, remedies.wider(evidence))


def underflow(evidence: Evidence) -> Finding | None:
    """Gradients that are zero in 16 bits and not in float32."""
    again = evidence.float32
    if evidence.broke_at is not None or again is None or not again.finite:
        return None
    lost = []
    for held in evidence.parameters:
        if held.grad is not None and held.name in again.zeros:
            more = zero_share_of(held) - again.zeros[held.name]
            if more >= LIMITS.zero_gradients:
                lost.append((held, more))
    if not lost:
        return None
    held, more = max(lost, key=lambda pair: pair[1])
    norm = evidence.steps[0].gradient or 0.0
    return Finding(
        "precision",
        "broken" if norm == 0 else "warning",
        Place(module=held.slot.path, parameter=held.name),
        "gradients underflow: 16-bit numbers below 6e-8 are zero, and the loss is not scaled.",
        {"zeros in 16 bits": zero_share_of(held), "zeros in float32": again.zeros[held.name]},
        remedies.scaled(evidence, 14),
    )


def zero_share_of(held: Held) -> float:
    """The share of zeros in a parameter's gradient, by the sample."""
    return held.grad.zeros if held.grad is not None else 0.0


# ---------------------------------------------------------------------------------------------------------------
# The loss function


_PROBLEMS = {
    (
        "cross_entropy",
        "probabilities",
    ): "cross_entropy takes logits, and is given probabilities: its softmax is applied "
    "to a softmax, so that the loss hardly moves.",
    ("nll_loss", "probabilities"): "nll_loss takes log-probabilities, and is given probabilities: it has no log in it.",
    ("nll_loss", "logits"): "nll_loss takes log-probabilities, and is given logits: it has no minimum.",
    ("binary_cross_entropy", "logits"): "binary_cross_entropy takes probabilities, and is given raw outputs.",
    (
        "binary_cross_entropy_with_logits",
        "probabilities",
    ): "binary_cross_entropy_with_logits has a sigmoid in it, and is given the output of another.",
    ("kl_div", "probabilities"): "kl_div takes log-probabilities as its input, and is given probabilities.",
}


def wrong_space(evidence: Evidence) -> Finding | None:
    """A loss function that is given logits for probabilities, or the other way round."""
    for call in evidence.trace.losses:
        why = _PROBLEMS.get((call.name, call.problem))
        if why is not None:
            fixes = remedies.stable_losses(evidence, call.name, call.problem)
            severity: Severity = "broken" if call.fatal or evidence.broke_at is not None else "warning"
            return Finding("loss", severity, Place(op=call.name), why, dict(call.facts), fixes)
    return None


def empty_reduction(evidence: Evidence) -> Finding | None:
    """A mean over nothing."""
    if evidence.broke_at is None:
        return None
    for call in evidence.trace.losses:
        if call.problem == "empty":
            why = f"{call.name} averages over no elements: 0 / 0."
            return Finding("loss", "broken", Place(op=call.name), why, dict(call.facts), [])
    return None


# ---------------------------------------------------------------------------------------------------------------
# Starting weights


def symmetric(evidence: Evidence) -> Finding | None:
    """Weights whose rows are all equal, and stay so."""
    layers = {call.path for call in evidence.layers}
    alike = [h for h in evidence.parameters if h.alike and h.slot.path in layers and h.law is not None]
    zero_heads = [h for h in evidence.parameters if _is_zero(h) and h.grad is not None and not h.alike]
    weights = [h for h in evidence.parameters if h.law is not None]
    mostly = sum(map(_is_zero, weights)) > LIMITS.zero_weights * len(weights)
    if zero_heads and not mostly:  # heads and branches that start at zero on purpose: one step lets the others move
        alike = [h for h in alike if not (h.grad_norm == 0 and _is_zero(h))]
    if not alike:
        return None
    held = alike[0]
    assert held.stats is not None
    what = "zero" if _is_zero(held) else "equal"
    norm = evidence.steps[0].gradient if evidence.steps else None
    return Finding(
        "weights",
        "broken" if norm == 0 else "warning",
        Place(module=held.slot.path, parameter=held.name),
        f"all rows of {held.name} are {what} and get the same gradient: its units never become different.",
        {"weights": len(alike), "value": held.stats.mean},
        remedies.restart(evidence),
    )


def _is_zero(held: Held) -> bool:
    return held.stats is not None and held.stats.low == 0 == held.stats.high and held.slot.tensor.dim() > 1


def dead(evidence: Evidence) -> Finding | None:
    """Rectified units that are zero for every row."""
    for call in evidence.layers:
        out = call.activated
        if call.activation not in ("relu", "relu6") or out is None or out.rows < 8 or out.dead < LIMITS.dead:
            continue
        bias = next((h for h in evidence.parameters if h.slot.path == call.path and h.slot.leaf == "bias"), None)
        by_bias = bias is not None and bias.stats is not None and bias.stats.mean < -3 * bias.stats.std < 0
        if bias is not None and bias.stats is not None and bias.stats.std == 0 and bias.stats.mean < 0:
            by_bias = True
        weight = next(iter(evidence.weights_of(call.path)), None)
        blamed = bias if by_bias else weight
        return Finding(
            "weights",
            "broken" if evidence.steps[0].gradient == 0 else "warning",
            Place(module=call.path, parameter=blamed.name if blamed is not None else None),
            f"{out.dead:.0%} of the units after {call.path!r} are zero for every row, as are their gradients.",
            {"dead": out.dead, "mean of bias": bias.stats.mean if bias is not None and bias.stats is not None else 0.0},
            [
                *([remedies.fresh(evidence, [bias])] if by_bias and bias is not None else []),
                *remedies.restart(evidence),
            ],
        )
    return None


def growing(evidence: Evidence) -> Finding | None:
    """A signal that explodes over depth."""
    gains = _gains(evidence)
    if not gains:
        return None
    growth = max(total for _, _, total in gains)
    ratios = _law_ratios(evidence)
    far = [(call, ratio) for call, ratio in ratios if ratio >= LIMITS.law_factor]
    edge = max((c.edge for c in evidence.layers if c.activation == "tanh"), default=0.0)
    hurts = evidence.excess >= LIMITS.loss_excess or diverges(evidence) or evidence.broke_at is not None
    saturates = edge >= LIMITS.saturated and 2 * len(far) >= len(ratios) > 0
    exploding = growth >= LIMITS.growth and (far or _is_deep(evidence))
    if not exploding and not saturates and not (growth >= LIMITS.growth_suspect and far and hurts):
        return None
    if evidence.trace.repeats and not far:
        return None
    call = _blamed(far, [c for c, _, _ in gains], max)
    weight = next(iter(evidence.weights_of(call.path)), None)
    severity: Severity = "broken" if evidence.broke_at is not None or diverges(evidence) else "warning"
    return Finding(
        "weights",
        severity,
        Place(module=call.path, parameter=weight.name if weight is not None else None),
        f"the signal grows {growth:.2g}-fold from the input to the widest layer: the weights are too large for their "
        "fan-in.",
        {"gain": growth, "weights against their law": max((r for _, r in ratios), default=1.0), "saturated": edge},
        remedies.restart(evidence),
    )


def shrinking(evidence: Evidence) -> Finding | None:
    """A signal, or a gradient, that vanishes over depth."""
    if evidence.broke_at is not None or len(evidence.layers) < 2:
        return None
    gains = [(call, gain, total) for call, gain, total in _gains(evidence) if not _zero_layer(evidence, call)]
    forward = min((total for _, _, total in gains), default=1.0)
    backward = _backward_ratio(evidence)
    if forward > LIMITS.shrink and backward > LIMITS.shrink:
        return None
    small = [(call, ratio) for call, ratio in _law_ratios(evidence) if 0 < ratio <= 1 / LIMITS.law_factor]
    call = _blamed(small, [c for c, _, _ in gains] or evidence.layers, min)
    weight = next(iter(evidence.weights_of(call.path)), None)
    return Finding(
        "weights",
        "warning",
        Place(module=call.path, parameter=weight.name if weight is not None else None),
        f"the signal shrinks to {forward:.2g} of the input's, gradients to {backward:.2g}: nothing arrives at the "
        "other end.",
        {"gain": forward, "gradient first to last": backward},
        remedies.restart(evidence),
    )


def _is_deep(evidence: Evidence) -> bool:
    return len(evidence.layers) > 2


def _gains(evidence: Evidence) -> list[tuple[Call, float, float]]:
    """(layer, its own gain, gain from the input) for each layer, of the signal over the batch."""
    found, base = [], None
    for call in evidence.layers:
        if call.given is None or call.made is None or call.given.rows < 2 or not call.given.finite:
            continue
        if base is None:
            base = call.given.signal
        if base and call.made.finite and call.given.signal:
            found.append((call, call.made.signal / call.given.signal, call.made.signal / base))
        elif base and overflows(evidence):
            found.append((call, math.inf, math.inf))
    return found


def overflows(evidence: Evidence) -> bool:
    """Whether the first value that is not finite is only a number that has grown too large."""
    origin = evidence.origin
    return evidence.broke_at == 1 and origin is not None and origin.source == "op" and origin.op not in names.UNSAFE


def _law_ratios(evidence: Evidence) -> list[tuple[Call, float]]:
    """For each layer: the root mean square of its weight against the law that its activation wants."""
    found = []
    for call in evidence.layers:
        for held in evidence.weights_of(call.path):
            law = held.law
            if law and held.stats is not None and held.stats.finite and held.stats.numel >= 16:
                found.append((call, held.stats.rms / law))
    return found


def _zero_layer(evidence: Evidence, call: Call) -> bool:
    return any(_is_zero(held) for held in evidence.weights_of(call.path))


def _blamed(far: list[tuple[Call, float]], others: list[Call], worst: Callable[..., Any]) -> Call:
    """The first layer that is nearly as far from its law as the worst."""
    if not far:
        return others[0]
    extreme = abs(math.log(worst(ratio for _, ratio in far)))
    return next(call for call, ratio in far if abs(math.log(ratio)) >= 0.7 * extreme)


def _backward_ratio(evidence: Evidence) -> float:
    """Gradient times weight of the first layers against the largest: equal over depth where nothing is lost."""
    sizes = []
    for call in evidence.layers:
        for held in evidence.weights_of(call.path):
            if held.grad_norm is not None and held.stats is not None and not _is_zero(held):
                sizes.append(held.grad_norm * held.stats.rms * math.sqrt(held.stats.numel))
    if len(sizes) < 3 or any(_is_zero(h) for h in evidence.parameters):
        return 1.0
    largest = max(sizes)
    return sizes[0] / largest if largest > 0 else 1.0


# ---------------------------------------------------------------------------------------------------------------
# Operations


def unsafe(evidence: Evidence) -> Finding | None:
    """The operation that made the first value that is not finite, in the model or in the loss function."""
    origin = evidence.origin
    if evidence.broke_at is None or origin is None or origin.source != "op" or ran_away(evidence):
        return None
    kind: Kind = "loss" if origin.module is None else "operation"
    only = " only" if origin.phase == "backward" else ""
    where = (
        "the loss function"
        if origin.module is None
        else f"{origin.module!r}"
        if origin.module
        else "the model's own code"
    )
    return Finding(
        kind,
        "broken",
        Place(module=origin.module, op=origin.op),
        f"{origin.op} in {where} makes the first value that is not finite from finite ones, in the {origin.phase} "
        f"pass{only}.",
        dict(origin.facts),
        [
            *(remedies.stable_losses(evidence, origin.op, "") if kind == "loss" else []),
            *([code] if (code := remedies.rewrite(origin.op, origin.module)) else []),
        ],
    )


def raised(evidence: Evidence) -> Finding | None:
    """An exception in the user's code."""
    error, failed = evidence.error, evidence.trace.failed
    if error is None:
        return None
    module, op = failed if failed is not None else (None, "")
    text = _short(error)
    fixes = []
    if "more than 1 value per channel" in text:
        op = "batch_norm"
        fixes = [remedies.drop_batch_statistics(module)] if module else []
    kind: Kind = "loss" if module is None else "operation"
    return Finding(
        kind, "broken", Place(module=module, op=op or None), f"{type(error).__name__}: {text}", {"error": text}, fixes
    )


def unexplained(evidence: Evidence) -> Finding | None:
    """A run that broke, and no other rule knows why."""
    if evidence.broke_at is None or evidence.error is not None:
        return None
    origin = evidence.origin
    place = Place(module=origin.module, op=origin.op) if origin is not None and origin.source == "op" else Place()
    why = "the loss or a gradient is not finite, and it does not show where that begins."
    return Finding("operation", "broken", place, why, {"loss": evidence.first_loss})


# ---------------------------------------------------------------------------------------------------------------
# Gradients and the step


def exploding_gradient(evidence: Evidence) -> Finding | None:
    """Gradients out of proportion, though weights and data are in order."""
    if not evidence.steps:
        return None
    norm, loss, origin = evidence.steps[0].gradient, evidence.first_loss, evidence.origin
    overflowed = (
        origin is not None and origin.source == "op" and origin.op not in names.UNSAFE and evidence.broke_at == 1
    )
    repeats = {path: n for path, n in evidence.trace.repeats.items() if n >= LIMITS.recurrence}
    usual = max(1.0, evidence.baseline or abs(loss or 0.0))
    limit = LIMITS.gradient_norm_in_time if repeats else LIMITS.gradient_norm
    huge = norm is not None and not norm < limit * usual
    if not (huge and evidence.broke_at != 1) and not overflowed:
        return None
    if overflowed and not repeats and origin is not None and origin.phase == "forward":
        return None
    worst = max((h for h in evidence.parameters if h.grad_norm is not None), key=_norm_of, default=None)
    inside = [p for p in repeats if worst is not None and (worst.slot.path == p or worst.slot.path.startswith(f"{p}."))]
    path = inside[0] if inside else worst.slot.path if worst is not None else None
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
        [remedies.clip(evidence.optimizer)],
    )


def _norm_of(held: Held) -> float:
    norm = held.grad_norm or 0.0
    return math.inf if math.isnan(norm) else norm


def diverges(evidence: Evidence) -> bool:
    """Whether the loss rises along the steps, and does not come back in the further ones."""
    first = evidence.first_loss
    if first is None or not math.isfinite(first) or not evidence.rates:
        return False
    losses = max(evidence.losses[1:], list(evidence.further[1:]), key=len)
    known = [x for x in losses if x is not None and math.isfinite(x)]
    if len(known) < len(losses) or not losses:
        return True
    recovered = known[-1] < first - LIMITS.recovery * abs(first)
    return min(known) >= first or (max(known) > risen(evidence) and not recovered)


def ran_away(evidence: Evidence) -> bool:
    """Whether a run that began well broke in a later step because of the steps."""
    if (evidence.broke_at or 1) == 1 or not diverges(evidence):
        return False
    origin, first = evidence.origin, evidence.steps[0]
    grown = origin is None or origin.source != "op" or origin.op not in names.UNSAFE
    rose = any(x is not None and x > risen(evidence) for x in evidence.losses[1:])
    return grown or rose or (first.update or 0.0) >= LIMITS.update_ratio


def risen(evidence: Evidence) -> float:
    """The loss above which it has risen, and not just moved."""
    first = evidence.first_loss or 0.0
    return first + max((LIMITS.rise - 1) * abs(first), 0.05 * (evidence.baseline or 0.0))


def suspicious_step(evidence: Evidence) -> bool:
    """Whether the steps that were taken call for a closer look at the learning rate."""
    if evidence.optimizer is None or not evidence.steps or not evidence.steps[0].finite:
        return False
    losses = evidence.losses[1:]
    rises = any(x is None or not x <= risen(evidence) for x in losses)
    return (
        rises or (evidence.broke_at or 1) > 1 or any((s.update or 0.0) >= LIMITS.update_ratio for s in evidence.steps)
    )


def too_fast(evidence: Evidence) -> Finding | None:
    """A step that is too large."""
    if not diverges(evidence) or evidence.optimizer is None:
        return None
    first = evidence.first_loss
    assert first is not None
    falls = next((factor for factor, loss in evidence.rates if loss < first), None)
    rate = max(float(group["lr"]) for group in evidence.optimizer.param_groups)
    facts: dict[str, Any] = {"rate": rate, "update against weights": evidence.steps[0].update}
    facts["losses"] = " -> ".join(f"{x:.3g}" for x in (first, *(evidence.further[1:] or [evidence.after or math.nan])))
    fixes = []
    if falls is not None:
        factor = falls / 3 if falls < 1 else 0.1
        facts["rate that would not diverge"] = rate * factor
        fixes = [
            remedies.smaller_rate(factor, evidence.optimizer),
            remedies.smaller_rate(factor / 10, evidence.optimizer),
        ]
    return Finding(
        "learning rate",
        "broken",
        Place(),
        "the loss rises along the update, and does not come back: the step is longer than the slope it was taken from.",
        facts,
        fixes,
    )


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


RULES: tuple[Rule, ...] = (
    nowhere,
    never_written,
    spoilt_state,
    bad_input,
    bad_index,
    bad_target,
    target_out_of_range,
    overflow,
    log_of_target,
    wrong_space,
    empty_reduction,
    scale,
    symmetric,
    dead,
    growing,
    exploding_gradient,
    unsafe,
    raised,
    shrinking,
    underflow,
    too_fast,
    unexplained,
)


def findings(evidence: Evidence) -> list[Finding]:
    """What the rules find, what is broken first, and then causes before what they cause; one of each kind and place."""
    found: list[Finding] = []
    for rule in RULES:
        one = rule(evidence)
        if rule is unexplained and any(other.severity == "broken" for other in found):
            continue
        if one is not None and not any(_explains(other, one) for other in found):
            found.append(one)
    return sorted(found, key=lambda one: one.severity != "broken")


_NONFINITE = ("uninitialised", "input", "target", "precision", "loss", "operation", "weights", "gradient")


def _explains(first: Finding, later: Finding) -> bool:
    """Whether a finding is only what another one leads to."""
    if later.kind == first.kind:
        return True
    if first.severity != "broken":
        return False
    if later.kind in ("loss", "operation") and first.kind in _NONFINITE:
        return True  # the one value that is not finite has one origin
    return later.kind in ("gradient", "learning rate") and first.kind != "learning rate"
