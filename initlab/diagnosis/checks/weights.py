"""Checks of starting weights: symmetry, dead units, signals that explode or vanish over depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import fixes
from ..evidence import Evidence, ParameterStats
from ..limits import LIMITS
from ..report import Place, Severity
from ..symptoms import diverges, gains, is_zero
from ..trace import Call
from .finding import Finding


def symmetric(evidence: Evidence) -> Finding | None:
    """Weights whose rows are all equal, and stay so."""
    layers = {call.path for call in evidence.layers}
    alike = [h for h in evidence.parameters if h.alike and h.ref.module_name in layers and h.distribution is not None]
    zero_heads = [h for h in evidence.parameters if is_zero(h) and h.grad is not None and not h.alike]
    weights = [h for h in evidence.parameters if h.distribution is not None]
    mostly = sum(map(is_zero, weights)) > LIMITS.zero_weights * len(weights)
    if zero_heads and not mostly:  # heads and branches that start at zero on purpose: one step lets the others move
        alike = [h for h in alike if not (h.grad_norm == 0 and is_zero(h))]
    if not alike:
        return _nothing_but_zeros(evidence)
    parameter = alike[0]
    assert parameter.stats is not None
    what = "zero" if is_zero(parameter) else "equal"
    norm = evidence.steps[0].gradient if evidence.steps else None
    return Finding(
        "weights",
        "broken" if norm == 0 else "warning",
        Place(module=parameter.ref.module_name, parameter=parameter.name),
        f"all rows of {parameter.name} are {what} and get the same gradient: its units never become different.",
        {"weights": len(alike), "value": parameter.stats.mean},
        fixes.restart(evidence),
    )


def _nothing_but_zeros(evidence: Evidence) -> Finding | None:
    """Weights that a model holds by itself, in no layer that is known, and that are all zero."""
    matrices = [h for h in evidence.parameters if h.ref.tensor.dim() > 1 and h.ref.tensor.requires_grad]
    if len(matrices) < 2 or not all(map(is_zero, matrices)):
        return None
    frozen = any(h.ref.tensor.dim() > 1 and not h.ref.tensor.requires_grad for h in evidence.parameters)
    if frozen and evidence.steps and evidence.steps[0].gradient != 0:
        return None
    return Finding(
        "weights",
        "broken",
        Place(module=matrices[0].ref.module_name, parameter=matrices[0].name),
        f"all {len(matrices)} weight matrices that learn are zero: each keeps the gradient from the others.",
        {"weights": len(matrices)},
        fixes.fresh_matrices(matrices, among_others=frozen),
    )


def dead(evidence: Evidence) -> Finding | None:
    """Rectified units that are zero for every row."""
    for call in evidence.layers:
        out = call.activated
        if call.activation not in ("relu", "relu6") or out is None or out.rows < 8 or out.dead < LIMITS.dead:
            continue
        bias = next(
            (h for h in evidence.parameters if h.ref.module_name == call.path and h.ref.attribute == "bias"), None
        )
        by_bias = bias is not None and bias.stats is not None and bias.stats.mean < -3 * bias.stats.std < 0
        if bias is not None and bias.stats is not None and bias.stats.std == 0 and bias.stats.mean < 0:
            by_bias = True
        weight = next(iter(evidence.weights_of(call.path)), None)
        closed = _closed_norms(evidence)
        blamed = closed[0] if closed else bias if by_bias else weight
        return Finding(
            "weights",
            "broken" if evidence.steps[0].gradient == 0 else "warning",
            _place(call, blamed),
            f"{out.dead:.0%} of the units after {call.path!r} are zero for every row, as are their gradients"
            + (f": the weights of the normalisation, {closed[0].name}, are all 0." if closed else "."),
            {"dead": out.dead, "mean of bias": bias.stats.mean if bias is not None and bias.stats is not None else 0.0},
            [
                *([_opened(closed)] if closed else []),
                *([fixes.fresh(evidence, [bias])] if by_bias and bias is not None else []),
                *fixes.restart(evidence),
            ],
            suspicion=True,
            change="weights of 1 in the normalisation" if closed else "fresh weights",
        )
    return None


def _closed_norms(evidence: Evidence) -> list[ParameterStats]:
    """Weights of normalisation layers that are all 0: nothing passes."""
    of_norms = [one for one in evidence.parameters if one.ref.attribute == "weight" and one.ref.tensor.dim() == 1]
    return [one for one in of_norms if one.stats is not None and not one.stats.largest]


def _opened(closed: list[ParameterStats]) -> str:
    return "\n".join(f"torch.nn.init.ones_(model.get_parameter({one.name!r}))" for one in closed)


def growing(evidence: Evidence) -> Finding | None:
    """A signal that explodes over depth."""
    along = gains(evidence)
    if not along:
        return None
    growth = max(total for _, _, total in along)
    ratios = _distribution_ratios(evidence)
    far = [(call, ratio) for call, ratio in ratios if ratio >= LIMITS.distribution_factor]
    edge = max((c.edge for c in evidence.layers if c.activation == "tanh"), default=0.0)
    hurts = evidence.excess >= LIMITS.loss_excess or diverges(evidence) or evidence.broke_at is not None
    saturates = edge >= LIMITS.saturated and 2 * len(far) >= len(ratios) > 0
    exploding = growth >= LIMITS.growth and (far or _is_deep(evidence))
    if not exploding and not saturates and not (growth >= LIMITS.growth_suspect and far and hurts):
        return None
    if evidence.trace.repeats and not far:
        return None
    call = _blamed(far, [c for c, _, _ in along], max)
    weight = next(iter(evidence.weights_of(call.path)), None)
    severity: Severity = "broken" if evidence.broke_at is not None or diverges(evidence) else "warning"
    return Finding(
        "weights",
        severity,
        _place(call, weight),
        _why_growing(growth, call, weight, edge),
        {"gain": growth, "times too large": max((r for _, r in ratios), default=1.0), "saturated": edge},
        fixes.restart(evidence),
        suspicion=True,
        change="fresh weights",
    )


def _why_growing(growth: float, call: Call, weight: ParameterStats | None, edge: float) -> str:
    name, std = (weight.name, weight.stats.std) if weight is not None and weight.stats is not None else (call.path, 0.0)
    wanted = weight.distribution if weight is not None else None
    size = f"{name} has a standard deviation of {std:.2g}" + (f", and {wanted:.2g} fits" if wanted else "")
    if not math.isfinite(growth):
        return f"the signal grows from layer to layer until it is not finite: {size}."
    if growth < LIMITS.growth_suspect:
        return f"{edge:.0%} of a tanh's outputs are at its ends, where it has no slope: {size}."
    return f"the signal grows {growth:.2g} times from the input to the layer with the largest outputs: {size}."


def shrinking(evidence: Evidence) -> Finding | None:
    """A signal, or a gradient, that vanishes over depth."""
    if evidence.broke_at is not None or len(evidence.layers) < 2:
        return None
    along = [(call, gain, total) for call, gain, total in gains(evidence) if not _zero_layer(evidence, call)]
    forward = min((total for _, _, total in along), default=1.0)
    backward = _backward_ratio(evidence)
    if forward > LIMITS.shrink and backward > LIMITS.shrink:
        return None
    small = [
        (call, ratio) for call, ratio in _distribution_ratios(evidence) if 0 < ratio <= 1 / LIMITS.distribution_factor
    ]
    call = _blamed(small, [c for c, _, _ in along] or evidence.layers, min)
    weight = next(iter(evidence.weights_of(call.path)), None)
    return Finding(
        "weights",
        "warning",
        _place(call, weight),
        f"the signal shrinks to {forward:.2g} of the input's, gradients to {backward:.2g}: nothing arrives at the "
        "other end.",
        {"gain": forward, "gradient first to last": backward},
        fixes.restart(evidence),
        suspicion=True,
        change="fresh weights",
    )


def sure_of_nothing(evidence: Evidence) -> Finding | None:
    """A first loss far above that of a model that knows nothing: a head whose weights are too large for one."""
    loss, known = evidence.first_loss, [call for call in evidence.trace.losses if call.classes > 1]
    if loss is None or len(known) != 1 or evidence.excess < LIMITS.sure_loss or known[0].spread < LIMITS.sure_spread:
        return None
    call = known[0]
    names = [name for name, shape in evidence.trace.products if shape and shape[-1] == call.classes]
    head = next((h for h in evidence.parameters if names and names[-1] in h.ref.names), None)
    if head is None or call.baseline is None or evidence.broke_at == 1:
        return None
    return Finding(
        "weights",
        "broken" if evidence.broke_at is not None or diverges(evidence) else "warning",
        Place(module=head.ref.module_name, parameter=head.name),
        f"the first loss is {loss:.4g}, and a model that knows nothing has {call.baseline:.4g}, for {call.classes} "
        f"classes: the weights of the head, {head.name}, are too large, and it is sure of what it cannot know.",
        {
            "loss": loss,
            "loss of knowing nothing": call.baseline,
            "standard deviation of logits": call.spread,
            "of the weights": head.stats.std if head.stats is not None else None,
        },
        fixes.quieter_head(evidence, head),
        suspicion=True,
        change="a smaller head",
    )


def loud_factors(evidence: Evidence) -> Finding | None:
    """Tables of vectors whose products are far larger than what they are to be: N(0, 1), as nn.Embedding draws."""
    matrices = [h for h in evidence.parameters if h.ref.tensor.dim() > 1 and h.ref.tensor.shape[-1] > 1]
    loud = [h for h in matrices if h.stats is not None and h.stats.finite and h.stats.rms >= _LOUD]
    width = loud[0].ref.tensor.shape[-1] if loud else 0
    if len(loud) < 2 or len(loud) < len(matrices) or any(h.ref.tensor.shape[-1] != width for h in loud):
        return None
    loss, usual = evidence.first_loss, evidence.baseline
    compared = evidence.trace.flow.compared.values() if evidence.trace.flow is not None else ()
    one = next((c for c in compared if c.distance and c.target is not None and c.target.std), None)
    usual = one.unit if one is not None else usual
    if loss is None or not usual or not math.isfinite(loss) or loss < LIMITS.sure_loss * usual:
        return None
    factor = 0.3 / (loud[0].stats.rms * width**0.25) if loud[0].stats is not None else 1.0
    names = ", ".join(repr(h.name) for h in loud)
    code = f"with torch.no_grad():\n    for name in ({names}):\n        model.get_parameter(name).mul_({factor:.1g})"
    return Finding(
        "weights",
        "broken" if evidence.broke_at is not None or diverges(evidence) else "warning",
        Place(module=loud[0].ref.module_name, parameter=loud[0].name),
        f"the first loss is {loss:.4g}, and a model that knows nothing has {usual:.4g}: {loud[0].name} and "
        f"{loud[1].name} have elements of about {loud[0].stats.rms if loud[0].stats else 1.0:.2g}, and products of "
        f"{width} such numbers are far larger than what they are compared with.",
        {"loss": loss, "loss of knowing nothing": usual, "factors of a product": width},
        [code],
        suspicion=True,
        change="smaller vectors",
    )


_LOUD = 0.5  # elements; vectors that are multiplied with each other start at a tenth


def _place(call: Call, weight: ParameterStats | None) -> Place:
    """A layer's module, or the one that holds its parameter."""
    module = weight.ref.module_name if weight is not None else call.path
    return Place(module=module, parameter=weight.name if weight is not None else None)


def _is_deep(evidence: Evidence) -> bool:
    return len(evidence.layers) > 2


def _distribution_ratios(evidence: Evidence) -> list[tuple[Call, float]]:
    """For each layer: the root mean square of its weight against the distribution that its activation wants."""
    found = []
    for call in evidence.layers:
        for parameter in evidence.weights_of(call.path):
            distribution = parameter.distribution
            if distribution and parameter.stats is not None and parameter.stats.finite and parameter.stats.numel >= 16:
                found.append((call, parameter.stats.rms / distribution))
    return found


def _zero_layer(evidence: Evidence, call: Call) -> bool:
    return any(is_zero(parameter) for parameter in evidence.weights_of(call.path))


def _blamed(far: list[tuple[Call, float]], others: list[Call], worst: Callable[..., Any]) -> Call:
    """The first layer that is nearly as far from its distribution as the worst."""
    if not far:
        return others[0]
    extreme = abs(math.log(worst(ratio for _, ratio in far)))
    return next(call for call, ratio in far if abs(math.log(ratio)) >= 0.7 * extreme)


def _backward_ratio(evidence: Evidence) -> float:
    """Gradient times weight of the first layers against the largest: equal over depth where nothing is lost."""
    sizes = []
    for call in evidence.layers:
        for parameter in evidence.weights_of(call.path):
            if parameter.grad_norm is not None and parameter.stats is not None and not is_zero(parameter):
                sizes.append(parameter.grad_norm * parameter.stats.rms * math.sqrt(parameter.stats.numel))
    if len(sizes) < 3 or any(is_zero(h) for h in evidence.parameters):
        return 1.0
    largest = max(sizes)
    return sizes[0] / largest if largest > 0 else 1.0
