"""Looks at one thing only, whatever the loss does: the calls of loss functions, the gradient in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from . import hypotheses, probes, ranks
from .budget import Budget
from .checks import findings, of_objective
from .evidence import Evidence
from .limits import LIMITS
from .probes import LossFn, TrainingStep, quiet
from .recall import find_forgotten
from .report import Cause, Diagnosis, Place


def inspect_objective(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    optimizer: Optimizer | None = None,
    *,
    steps: int = 1,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Diagnosis:
    """Look at the calls of torch's loss functions in a step: probabilities for logits, shapes that are broadcast.

    These are facts of one forward pass. No remedy is tried where there are none, so that it takes about two steps.

    Args:
        model, batch, loss_fn, optimizer: as for `diagnose`.
        steps: of training to take.
        on_stage: called with a description of each stage as it begins.

    Returns:
        A `Diagnosis`, with no causes where the objective is in order.
    """
    causes: list[Cause] = []
    with _first_steps(model, batch, loss_fn, optimizer, steps) as (training_step, evidence, budget):
        found = of_objective(evidence)
        if found:
            on_stage("trying remedies")
            causes = hypotheses.judge(training_step, evidence, found, budget, lambda step, further: [], 0)
    return Diagnosis(tuple(causes), losses=tuple(evidence.losses))


def inspect_start(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    optimizer: Optimizer | None = None,
    *,
    steps: int = 1,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Diagnosis:
    """Look at data and weights of a first step, for a run that is known to have learned nothing.

    What is odd there is told without an experiment: a run of some steps may be too short to show what it does.

    Args:
        model, batch, loss_fn, optimizer: as for `diagnose`.
        steps: of training to take.
        on_stage: called with a description of each stage as it begins.

    Returns:
        A `Diagnosis`, with at most one cause, of which no remedy was tried.
    """
    on_stage("running the model under observation")
    with _first_steps(model, batch, loss_fn, optimizer, steps) as (_, evidence, _):
        found = findings(evidence) if evidence.steps else []
        odd = [one for one in found if one.kind in ("input", "target", "weights")]
    causes = [hypotheses.untried(one) for one in odd[:1]]
    return Diagnosis(tuple(causes), losses=tuple(evidence.losses))


@contextmanager
def _first_steps(
    model: nn.Module, batch: Any, loss_fn: LossFn, optimizer: Optimizer | None, steps: int
) -> Iterator[tuple[TrainingStep, Evidence, Budget]]:
    """What some steps show; none are taken where the model cannot run. All is put back at the end."""
    with quiet(), ranks.without_collectives(), Budget(LIMITS.budget) as budget:
        training_step = TrainingStep(model, batch, loss_fn, optimizer)
        try:
            evidence = probes.observe_at_rest(training_step)
            if probes.runnable(evidence):
                probes.observe_steps(training_step, evidence, steps, math.inf, budget.tick)
            yield training_step, evidence, budget
        finally:
            training_step.snapshot.restore()


def inspect_memory(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    optimizer: Optimizer | None = None,
    *,
    steps: int | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Diagnosis:
    """Look at how far back in time the gradient of a recurrent model goes, for a run that is known to learn nothing.

    Args:
        model, batch, loss_fn, optimizer: as for `diagnose`.
        steps: not used; one pass is enough.
        on_stage: called with a description of each stage as it begins.

    Returns:
        A `Diagnosis`, with no causes where the first steps in time are not forgotten.
    """
    on_stage("following the gradient in time")
    with quiet(), ranks.without_collectives():
        training_step = TrainingStep(model, batch, loss_fn, optimizer)
        try:
            found = find_forgotten(training_step)
        finally:
            training_step.snapshot.restore()
    if found is None:
        return Diagnosis(())
    return Diagnosis(
        (Cause("gradient", "warning", Place(module=found.module), found.explanation, found.facts, found.remedy),)
    )
