"""Hypotheses for a run that fails where no check knows why: each is only as good as its experiment."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from .. import fixes
from ..evidence import Evidence
from ..limits import LIMITS
from ..outcomes import Outcome
from ..report import Place
from .data import STANDARDISED
from .finding import Finding, parameters_held, severity_of


def guesses(evidence: Evidence) -> list[Finding]:
    """What usually helps, the smallest and likeliest change first: data, targets, the rate, weights."""
    run = evidence.untreated
    if run is None or evidence.error is not None or evidence.broke_at == 1:
        return []
    return [*_inputs(evidence, run), *_targets(evidence, run), *_rates(evidence, run), *_weights(evidence, run)]


def of_values(evidence: Evidence) -> list[tuple[str, str]]:
    """What may keep an operation from the values that it fails on, where only its author can change it.

    Returns:
        Code, and what it does in a few words.
    """
    run = evidence.untreated
    if run is None or evidence.error is not None:
        return []
    reason = evidence.origin.reason if evidence.origin is not None else None
    found = []
    rows = reason.rows if reason is not None else ()
    if not rows and evidence.origin is not None and _are_rows_of_batch(evidence.origin.count, evidence):
        rows = evidence.origin.rows
    if rows:
        found += [(code, "without such rows") for code in fixes.without_rows(evidence.leaves, evidence.batch, rows)]
    if reason is not None and reason.below:
        found.append((fixes.positive_outputs(), "outputs above 0"))
    found += [(one.remedies[0], one.change) for one in (*_inputs(evidence, run), *_targets(evidence, run))]
    if any(isinstance(module, nn.Embedding) for module in evidence.model.modules()):
        found.append((fixes.short_embeddings(), "embeddings of length 1"))
    return [*found, *((code, "fresh weights") for code in (fixes.restart(evidence) if evidence.layers else []))]


def _are_rows_of_batch(count: int, evidence: Evidence) -> bool:
    """Whether a tensor with so many rows has one for each row of the batch."""
    return {len(leaf.tensor) for leaf in evidence.leaves if leaf.tensor.dim()} == {count}


def _inputs(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    flow = evidence.trace.flow
    for leaf in evidence.leaves:
        arrival = flow.arriving(leaf) if flow is not None else None
        if arrival is None or arrival.stats is None or not arrival.stats.std or not leaf.tensor.is_floating_point():
            continue
        rms = arrival.stats.rms
        if 1 / LIMITS.ordinary < rms < LIMITS.ordinary or len(arrival.paths) > 1:
            continue
        yield Finding(
            "input",
            severity_of(run),
            Place(tensor=leaf.code),
            f"{_course(run)}: {leaf.code} reaches the first weights, {arrival.parameter}, with a root mean square of "
            f"{rms:.3g}, and they expect about 1.",
            {"root mean square": rms},
            [fixes.standardise(leaf, evidence.batch)],
            suspicion=True,
            change=f"{leaf.code} standardised",
        )


def _targets(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    flow = evidence.trace.flow
    for leaf in evidence.leaves:
        comparison = flow.compared.get(leaf.path) if flow is not None else None
        if comparison is None or comparison.target is None or leaf.path in (flow.inputs if flow is not None else ()):
            continue
        rms = comparison.target.rms
        if rms < LIMITS.ordinary or not comparison.target.std:
            continue
        yield Finding(
            "target",
            severity_of(run),
            Place(tensor=leaf.code),
            f"{_course(run)}: {leaf.code} has a root mean square of {rms:.3g}, and the gradients grow with it.",
            {"root mean square": rms},
            [fixes.standardise_targets(leaf, evidence.batch)],
            suspicion=True,
            change=STANDARDISED,
            rescales=comparison.unit,
        )


def _rates(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    optimizer = evidence.optimizer
    groups = [group for group in optimizer.param_groups if "lr" in group] if optimizer is not None else []
    rates = [float(group["lr"]) for group in groups]
    if not rates or not max(rates) or any(group.get("initial_lr", 0) > group["lr"] for group in groups):
        return
    rate = max(rates)
    if run.effect == "stays":
        if (evidence.steps[0].update or 0.0) > LIMITS.slow_update:
            return  # slow, and as many tune a trained model
        factors = [x for x in (1e3, 1e5, 10.0) if x * rate <= LIMITS.highest_rate]
        why = f"the loss went {run}: the rate {rate:g} is too low, a step hardly changes the weights."
    else:
        factors = [0.1, 0.01, 1e-3]
        why = f"{_course(run)}: the rate {rate:g} is too large."
        if run.effect == "plateau":
            why = (
                f"the first steps threw the net onto a plateau: the loss went {run} and stays there, and the outputs "
                f"are the same for every row. The rate {rate:g} is too large."
            )
    for factor in factors:
        yield Finding(
            "learning rate",
            severity_of(run),
            Place(),
            why,
            {"rate": rate, "rate that was tried" if factor > 1 else "rate that would not diverge": rate * factor},
            [fixes.smaller_rate(factor, optimizer)],
            suspicion=True,
            change=f"rate {float(f'{rate * factor:.1g}'):g}",
        )


def _weights(evidence: Evidence, run: Outcome) -> Iterator[Finding]:
    far = []
    held = parameters_held(evidence)
    if held and any(one.ref.tensor.dim() > 1 and id(one.ref.tensor) not in held for one in evidence.parameters):
        return  # other networks, or layers that are as they were trained: a fresh start would hide what is wrong
    for call in evidence.layers:
        for one in evidence.weights_of(call.path):
            if one.distribution and one.stats is not None and one.stats.finite and one.stats.rms:
                far.append((abs(math.log(one.stats.rms / one.distribution)), one))
    if not far:
        return
    _, worst = max(far, key=lambda pair: pair[0])
    yield Finding(
        "weights",
        severity_of(run),
        Place(module=worst.ref.module_name, parameter=worst.name),
        f"{_course(run)}; with fresh weights it falls. {worst.name} is furthest from what its layer wants.",
        {"standard deviation": worst.stats.std if worst.stats is not None else None, "wanted": worst.distribution},
        fixes.restart(evidence),
        suspicion=True,
        change="fresh weights",
    )


def _course(run: Outcome) -> str:
    verb = {"breaks": "went", "rises": "rose", "plateau": "settled"}.get(run.effect, "does not fall")
    return f"the loss {verb}, {run}" if verb == "does not fall" else f"the loss {verb} {run}"
