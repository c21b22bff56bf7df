"""Symptoms: what the evidence shows, short of a cause. Checks and probes share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .batch import Features, Leaf
from .evidence import Evidence, ParameterStats, half
from .limits import LIMITS
from .trace import Call


def uses_half(evidence: Evidence) -> bool:
    """Whether 16-bit floats were seen."""
    stored = any(half(one.ref.tensor.dtype) for one in evidence.parameters_and_buffers)
    origin = evidence.origin is not None and half(evidence.origin.dtype)
    return stored or origin or bool(evidence.trace.low)


def complains_of_nan(evidence: Evidence) -> bool:
    """Whether an error was raised over numbers that are not finite: what made them came before."""
    text = str(evidence.error).lower()
    if isinstance(evidence.error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        tensors = [x for x in evidence.trace.arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return not all(bool(x.isfinite().all()) for x in tensors)
    return any(words in text for words in ("nan", "not finite", "invalid values", "non-finite", "inf or"))


def lost_gradients(evidence: Evidence) -> bool:
    """Whether gradients are zero, or so small that float16 may have lost them."""
    found = [one.grad for one in evidence.parameters if one.grad is not None]
    return any(g.zeros >= LIMITS.zero_gradients or g.largest < LIMITS.smallest_normal for g in found)


def overflows(evidence: Evidence) -> bool:
    """Whether the first value that is not finite is only a number that has grown too large."""
    origin = evidence.origin
    return evidence.broke_at == 1 and origin is not None and origin.grown


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
        found, shape = _as_it_arrives(evidence, leaf)
        if found is None or _is_normalised_first(evidence, leaf):
            continue
        moving = found.reach > 0
        if not bool(moving.any()):
            continue
        reach = found.reach[moving]
        rms = float(found.rms.square().mean().sqrt())
        columns = shape[-1] if len(shape) > 1 else 1
        if columns > 1 and len(shape) <= 3:
            middle = float(reach.median())
            far = (found.reach / middle).log10().abs() >= math.log10(LIMITS.scale_spread)
            odd = (far & moving).nonzero().flatten().tolist()
            spread = float(reach.max() / reach.min())
            if not odd and spread >= LIMITS.scale_spread:
                odd = [int(found.reach.argmax())]
            quiet = odd and bool((found.reach[odd] < middle).all()) and rms >= LIMITS.input_rms_suspect
            if odd and not quiet:  # a quiet column among loud ones is not what is wrong with them
                strong = spread >= LIMITS.spread_harmful or rms >= LIMITS.input_rms
                text = f"features of {leaf.code} differ in scale by a factor of {spread:.2g}"
                if shape == leaf.tensor.shape:
                    return Scale(leaf, odd, spread, rms, strong, text)
                whose = _whose(evidence, leaf, [float(found.rms[one]) for one in odd])
                if whose is not leaf:
                    text = f"{whose.code} is {spread:.2g} times as large as what it is joined with, or as small"
                return Scale(whose, [], spread, rms, strong, text)
        else:
            spread = 1.0
        offset = float((found.mean.abs() / found.reach.clamp_min(1e-30))[moving].median())
        text = f"{leaf.code} has a root mean square of {rms:.3g}, and the weights in use expect about 1"
        if rms >= LIMITS.input_rms_suspect or 0 < rms <= 1 / LIMITS.input_rms_suspect**3 or offset >= LIMITS.offset:
            return Scale(leaf, [], spread, rms, rms >= LIMITS.input_rms or _is_flat(evidence, leaf, rms), text)
    return None


def _as_it_arrives(evidence: Evidence, leaf: Leaf) -> tuple[Features | None, torch.Size]:
    """The features of a leaf as they reach the first weights; of the leaf itself where no pass could be followed."""
    flow = evidence.trace.flow
    if flow is None or not flow.arrivals:
        return (None if leaf.is_target else leaf.features), leaf.tensor.shape
    arrival = flow.arriving(leaf)
    return (None, leaf.tensor.shape) if arrival is None else (arrival.features, arrival.shape)


def _whose(evidence: Evidence, leaf: Leaf, sizes: Sequence[float]) -> Leaf:
    """Of the tensors that are joined before a first weight, the one that features of some sizes are of."""
    flow = evidence.trace.flow
    arrival = flow.arriving(leaf) if flow is not None else None
    joined = [one for one in evidence.leaves if arrival is not None and one.path in arrival.paths]
    for one in joined if len(joined) > 1 else ():
        columns = one.tensor.detach().float().reshape(len(one.tensor), -1) if one.tensor.dim() else None
        known = columns.square().mean(0).sqrt().tolist() if columns is not None else []
        if all(any(abs(size - own) <= 0.01 * size for own in known) for size in sizes):
            return one
    return leaf


def _is_flat(evidence: Evidence, leaf: Leaf, rms: float) -> bool:
    """Whether an input is so small that a first layer puts out the same for every row."""
    if rms >= 1.0:
        return False
    for call in evidence.layers:
        if leaf.path in call.reads_batch and call.output is not None and call.output.rows > 1:
            return call.output.signal < LIMITS.flat_input * call.output.rms
    return False


def _is_normalised_first(evidence: Evidence, leaf: Leaf) -> bool:
    """Whether the first thing that the model does with an input is to normalise it."""
    for call in evidence.trace.calls:
        if leaf.path in call.reads_batch and not call.module._modules:
            return "norm" in call.kind.lower()
    return False


def gains(evidence: Evidence) -> list[tuple[Call, float, float]]:
    """(layer, its own gain, gain from the input) for each layer, of the signal over the batch."""
    found, base = [], None
    for call in evidence.layers:
        if call.input is None or call.output is None or call.input.rows < 2 or not call.input.finite:
            continue
        if base is None:
            base = call.input.signal
        if base and call.output.finite and call.input.signal:
            found.append((call, call.output.signal / call.input.signal, call.output.signal / base))
        elif base and overflows(evidence):
            found.append((call, math.inf, math.inf))
    return found


def is_zero(parameter: ParameterStats) -> bool:
    """Whether a weight matrix has only zeros."""
    stats = parameter.stats
    return stats is not None and stats.low == 0 == stats.high and parameter.ref.tensor.dim() > 1


def diverges(evidence: Evidence) -> bool:
    """Whether the loss rises along the steps, and does not come back in the further ones."""
    first = evidence.first_loss
    if first is None or not math.isfinite(first) or not evidence.rates:
        return False
    taken, further = evidence.losses[1:], evidence.further[1:]
    losses: Sequence[float | None] = taken if len(taken) > len(further) else further
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
    grown = origin is None or origin.source != "op" or origin.grown
    rose = any(x is not None and x > risen(evidence) for x in evidence.losses[1:])
    return grown or rose or (first.update or 0.0) >= LIMITS.update_ratio


def risen(evidence: Evidence) -> float:
    """The loss above which it has risen, and not just moved."""
    first = evidence.first_loss or 0.0
    return first + max((LIMITS.rise - 1) * abs(first), 0.05 * (evidence.baseline or 0.0))


def blew_up(evidence: Evidence) -> bool:
    """Whether the loss has risen so far that no further steps are needed to see it."""
    first, last = evidence.first_loss or 0.0, evidence.losses[-1]
    far = risen(evidence) + (LIMITS.blow_up - LIMITS.rise) * abs(first)
    return last is None or not last <= far


def suspicious_step(evidence: Evidence) -> bool:
    """Whether the steps that were taken call for a search over learning rates."""
    if evidence.optimizer is None or not evidence.steps or not evidence.steps[0].finite:
        return False
    losses = evidence.losses[1:]
    rises = any(x is None or not x <= risen(evidence) for x in losses)
    return (
        rises or (evidence.broke_at or 1) > 1 or any((s.update or 0.0) >= LIMITS.update_ratio for s in evidence.steps)
    )


def silent(evidence: Evidence) -> bool:
    """Whether no gradient reaches any parameter; or some weights, of a run that does not learn."""
    if evidence.steps[0].gradient == 0:
        return True
    return any(one.grad_norm == 0 and one.ref.tensor.dim() > 1 and not is_zero(one) for one in evidence.parameters)
