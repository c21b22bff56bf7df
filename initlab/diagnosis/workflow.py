"""diagnose(): runs a model on the user's own batch and says why the loss is inf, or NaN, or does not fall."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .._console import inline_listing
from ..distributed.collectives import all_gather_object
from ..distributed.groups import groups_of
from ..models.naming import unwrapped
from . import checks, connections, hypotheses, loaders, probes, ranks, symptoms, trials
from .batch import leaves
from .budget import Budget
from .emulation import emulated
from .evidence import Evidence
from .limits import LIMITS
from .measurements import collect
from .outcomes import Outcome
from .probes import LossFn, TrainingStep, UsageError, quiet
from .recall import find_forgotten
from .report import Cause, Diagnosis, LayerRow
from .state import referenced_modules

_NAMED = 8  # parameters that a note lists
_DEPTH = 2  # diagnoses in a row: a second one where the first's remedy makes the loss finite and no more


def supervised(criterion: Callable[[Any, Any], Tensor]) -> LossFn:
    """A loss_fn for batches of inputs and targets.

    Args:
        criterion: called with the model's output and the target, as torch.nn.CrossEntropyLoss() is.

    Returns:
        A function of model and batch; the batch is a pair (x, y).

    Raises:
        TypeError: when it is called, for a batch that is no pair.

    Example:
        >>> import torch, initlab
        >>> loss_fn = initlab.supervised(torch.nn.MSELoss())
        >>> float(loss_fn(torch.nn.Identity(), (torch.ones(2), torch.zeros(2))))
        1.0
    """

    def loss_fn(model: Any, batch: Any) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            what = f"{len(batch)} items" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
            raise UsageError(
                f"the batch is {what}; supervised() takes pairs (x, y), so write loss_fn(model, batch) yourself"
            )
        return criterion(model(batch[0]), batch[1])

    return loss_fn


def diagnose(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    optimizer: Optimizer | None = None,
    *,
    steps: int | None = None,
    budget: float = LIMITS.budget,
    across: Any = None,
) -> Diagnosis:
    """Run a model on a batch, and say what is wrong, or close to it: cause, place, evidence, remedy.

    The first step is observed, and further ones show whether the loss falls. Where it does not, or something is odd,
    each hypothesis is tried: the same run, from the same start, with one change. What turns a run that fails into one
    that falls is the cause. Errors that the model, the loss or the
    backward pass raise are evidence. Afterwards everything is as it was, also when something raises: parameters,
    buffers, gradients, modes, attributes, the optimizer and its state, and the random generators.

    Of a DataLoader, or of an iterator of batches, one pass is taken first, as `initlab.scan_data` does, within half the
    budget: then the batches with something extreme are run, and a plain one, until one of them breaks. With `across`
    each rank reads its own loader.

    Beside other ranks it runs this rank's model and batch alone and never communicates, not even where DDP waits for
    the gradients of a pass that is half done. A model that cannot run without the others is refused.

    Args:
        model: wrapped (DDP) or compiled ones run unwrapped and uncompiled.
        batch: one real batch: tensors, or arrays of numpy's, in tuples, lists, dicts and dataclasses; or a DataLoader
            or an iterator of such batches.
        loss_fn: called with the model and the batch, returns the loss, one element.
        optimizer: with one, steps are taken and the learning rate is judged.
        steps: how many of training to take as it is. None takes 25, or as many as a fifth of the budget allows.
        budget: seconds for all runs together. A run that is under way is not cut short before its second step.
        across: a ProcessGroup or a DeviceMesh, of which this rank is part, or True for all ranks; every rank of it must
            make the call. One gather then gives all of them the diagnosis of the first bad rank: the worst verdict,
            then the earliest step in which a rank broke, then the lowest rank. As for `Watch.report`.

    Returns:
        A `Diagnosis`, which prints as a verdict, its causes, and a table of the layers.

    Raises:
        TypeError: if model, batch, loss_fn or what it returns is of the wrong kind, or `across` is.
        ValueError: if steps is not positive, or this rank is not part of `across`.
        NotImplementedError: if a pass would communicate: a model with DTensors, under FSDP, with DDP inside of it; or,
            where there are other ranks, anything that calls a collective.
        RuntimeError: if `across` is given and torch.distributed is not initialised, or the diagnosis raises an error on
            another rank.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
        >>> batch = torch.tensor([[0.0, 1.0], [1.0, float("nan")]]), torch.zeros(2, 1)
        >>> found = initlab.diagnose(model, batch, initlab.supervised(torch.nn.MSELoss()))
        >>> found.verdict, found.causes[0].kind, found.causes[0].place.feature
        ('broken', 'input', 1)
    """
    groups = groups_of(across)
    try:
        if loaders.is_loader(batch):
            found = loaders.worst_of(
                batch,
                budget,
                lambda one, seconds: diagnose_alone(model, one, loss_fn, optimizer, steps=steps, budget=seconds),
            )
        else:
            found = diagnose_alone(model, batch, loss_fn, optimizer, steps=steps, budget=budget)
    except Exception as error:
        if groups:  # the others wait for this rank
            all_gather_object(f"{type(error).__name__}: {error}", groups)
        raise
    return ranks.merge(all_gather_object(found, groups)) if groups else found


def diagnose_alone(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    optimizer: Optimizer | None = None,
    *,
    steps: int | None = None,
    budget: float = LIMITS.budget,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Diagnosis:
    """`diagnose` on this rank alone; `on_stage` is called with a description of each stage as it begins."""
    _check(model, batch, loss_fn, optimizer, steps, budget)
    notes: list[str] = []
    inner = unwrapped(model)
    others = referenced_modules(loss_fn)
    ranks.refuse_sharded(model, others, (leaf.tensor for leaf in leaves(batch)))
    if inner is not model:
        notes.append(f"ran the original module inside {type(model).__name__}")
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        notes.append("compiled modules ran as they were written, uncompiled")
    with quiet(), ranks.without_collectives(), Budget(budget) as time_left:
        if any(is_lazy(p) for p in (*inner.parameters(), *inner.buffers())):
            inner, optimizer = _materialised(inner, batch, loss_fn), None
            notes.append("lazy modules: ran a copy that has seen the batch, without the optimizer")
        on_stage("copying what must be restored")
        with ranks.parameter_aliases((inner, *others), optimizer):
            training_step = TrainingStep(inner, batch, loss_fn, optimizer)
            try:
                evidence, found = _observed(training_step, steps, time_left, on_stage)
            finally:
                training_step.snapshot.restore()
            measurements = collect(evidence, found)
    return Diagnosis(
        causes=tuple(found),
        losses=tuple(evidence.losses),
        gradient_norm=evidence.steps[0].gradient if evidence.steps else None,
        broke_at=evidence.broke_at,
        layers=tuple(_rows(evidence)),
        notes=(
            *notes,
            *_begins_at_0(evidence),
            *_bad_gradients(evidence),
            *_without_gradients(evidence),
            *_in_plain_lists(evidence),
            *_sparse(evidence),
            *_close_calls(evidence),
        ),
        measurements=measurements,
    )


def _observed(
    training_step: TrainingStep, steps: int | None, budget: Budget, on_stage: Callable[[str], None], depth: int = _DEPTH
) -> tuple[Evidence, list[Cause]]:
    """The evidence, and the causes with their remedies."""
    evidence = probes.observe_at_rest(training_step, histograms=depth == _DEPTH)
    if probes.runnable(evidence):
        on_stage("running the model under observation")
        start = time.monotonic()
        probes.observe_steps(
            training_step,
            evidence,
            steps or LIMITS.trial_steps,
            math.inf if steps else start + budget.per_run,
            budget.tick,
        )
        taken = len(evidence.steps)
        budget.step_time = (time.monotonic() - start) / taken
        if steps is None and training_step.optimizer is not None:
            if evidence.broke_at is None:
                budget.steps = min(budget.steps, max(taken, LIMITS.trial_least))
            losses = tuple(math.nan if x is None else x for x in evidence.losses)
            losses = losses if len(losses) > taken or not math.isfinite(losses[-1]) else (*losses, math.nan)
            evidence.untreated = Outcome(losses, evidence.broke_at is None and trials.is_constant(training_step))
        _probe_further(training_step, evidence, budget, on_stage)
        if steps is not None and 1 < steps < LIMITS.trial_steps and evidence.broke_at is None:
            evidence.untreated = trials.run_untreated(training_step, budget)
    found = checks.findings(evidence)
    on_stage("trying remedies")

    def behind(other: TrainingStep, further: int) -> list[Cause]:
        return _observed(other, steps, budget, on_stage, further)[1]

    causes = hypotheses.judge(training_step, evidence, found, budget, behind, depth)
    if not causes and (last := checks.unexplained(evidence)) is not None:  # no experiment spoke for a suspicion
        causes = hypotheses.judge(training_step, evidence, [last], budget, behind, 0)
    return evidence, emulated(training_step, found, causes, budget)


def _probe_further(
    training_step: TrainingStep, evidence: Evidence, budget: Budget, on_stage: Callable[[str], None]
) -> None:
    """The probes that the screening calls for."""
    broke = evidence.broke_at is not None
    lost = symptoms.uses_half(evidence) and symptoms.lost_gradients(evidence)
    if (broke and (evidence.error is None or symptoms.complains_of_nan(evidence))) or (lost and not broke):
        on_stage("searching the operation behind the first value that is not finite")
        probes.find_origin(training_step, evidence)
    if lost or (broke and symptoms.uses_half(evidence)):
        on_stage("running in float32")
        probes.replay_in_float32(training_step, evidence)
    if symptoms.suspicious_step(evidence):
        on_stage("searching along the update")
        probes.search_rates(training_step, evidence)
        if not symptoms.blew_up(evidence) and len(evidence.losses) <= 3:
            evidence.further = list(trials.run_untreated(training_step, budget, 3).losses)
    if not broke and evidence.steps and evidence.first_loss and symptoms.silent(evidence):
        on_stage("searching the operation whose derivative is 0")
        connections.find_silent(training_step, evidence)
    if evidence.error is not None and "does not require grad" in str(evidence.error):
        connections.find_cut(training_step, evidence)
    if evidence.movement is not None and evidence.movement.without and not broke:
        on_stage("moving the parameters that no gradient reaches")
        connections.find_detached(training_step, evidence)
    run = evidence.untreated
    if not broke and evidence.error is None:
        on_stage("moving what the model puts out")
        connections.find_deaf_output(training_step, evidence)
    if evidence.custom and (broke or run is None or run.fallen < LIMITS.learns):
        on_stage("running backward() of autograd functions")
        connections.find_bad_backward(training_step, evidence)
    recurs = max(evidence.trace.repeats.values(), default=0) >= LIMITS.recurrence
    if recurs and not broke and run is not None and run.fallen < LIMITS.stands_still:
        on_stage("following the gradient in time")
        evidence.forgotten = find_forgotten(training_step)
    if any(call.takes_time_first for call in evidence.trace.calls):
        on_stage("changing one row of the batch")
        connections.find_mixed(training_step, evidence)
    odd = symptoms.odd_scale(evidence)
    if odd is not None and (odd.strong or evidence.broke_at is not None):
        on_stage("running on standardised inputs")
        probes.replay_standardised(training_step, evidence, odd.leaf)


def _begins_at_0(evidence: Evidence) -> Iterator[str]:
    """A warm-up that stands at 0."""
    groups = evidence.optimizer.param_groups if evidence.optimizer is not None else []
    planned = max((float(group.get("initial_lr", 0.0)) for group in groups), default=0.0)
    if planned and not any(float(group.get("lr", 1.0)) for group in groups):
        yield (
            f"the learning rate is 0, where a schedule may begin; it was made with {planned:g}. No step changes "
            "anything until scheduler.step() raises it: call it after every optimizer.step()"
        )


def _bad_gradients(evidence: Evidence) -> Iterator[str]:
    """The parameters whose gradients are not finite, by name."""
    bad = [one.name for one in evidence.parameters if one.grad is not None and not one.grad.finite]
    if bad:
        yield f"gradients that are not finite in step 1: {inline_listing(bad, _NAMED)}"


def _without_gradients(evidence: Evidence) -> Iterator[str]:
    """The optimizer's parameters in modules that run under no_grad()."""
    if evidence.movement is not None and evidence.movement.without:
        silent = {call.path for call in evidence.trace.calls if not call.recorded}
        names = [name for name in evidence.movement.without if name.rpartition(".")[0] in silent]
        if names:
            yield f"under no_grad(), so no gradient reaches what the optimizer has: {inline_listing(names, _NAMED)}"


def _in_plain_lists(evidence: Evidence) -> Iterator[str]:
    """Parameters of modules that a list or dict hides from model.parameters()."""
    names = [name for name, code in checks.unregistered(evidence).items() if code.startswith("*")]
    if names:
        yield (
            f"in a plain list or dict, so neither model.parameters() nor the optimizer has them: "
            f"{inline_listing(names, _NAMED)}; an nn.ModuleList or nn.ModuleDict registers them"
        )


def _sparse(evidence: Evidence) -> Iterator[str]:
    """Tensors of the batch that no check reads."""
    names = [leaf.code for leaf in leaves(evidence.batch) if leaf.tensor.layout != torch.strided]
    if names:
        yield f"sparse, so that their values were not looked at: {inline_listing(names, _NAMED)}"


def _close_calls(evidence: Evidence) -> Iterator[str]:
    """Layers whose output is finite and close to the end of its dtype's range."""
    for row in _rows(evidence):
        if 0 < row.headroom < LIMITS.headroom:
            name = row.name or "the model itself"
            yield f"{name} puts out {row.largest:.4g}, within a factor of {row.headroom:.2g} of the largest {row.dtype}"


def _rows(evidence: Evidence) -> Iterator[LayerRow]:
    seen = set()
    for call in evidence.trace.calls:
        if call.output is None or call.path in seen:
            continue
        seen.add(call.path)
        gain = None
        if call.is_layer and call.input is not None and call.input.signal:
            gain = call.output.signal / call.input.signal
        norms = [h.grad_norm for h in evidence.parameters if h.ref.module_name == call.path and h.grad_norm is not None]
        gradient = math.hypot(*norms) if norms else None
        dtype = str(call.output.dtype).removeprefix("torch.")
        out = call.output
        yield LayerRow(call.path, call.kind, dtype, out.std, gain, out.largest, out.headroom, gradient)


def _check(model: Any, batch: Any, loss_fn: Any, optimizer: Any, steps: Any, budget: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if isinstance(batch, Iterator):
        raise UsageError(f"batch is a {type(batch).__name__}, which can be read once only; pass next(...) of it")
    if not callable(loss_fn):
        raise UsageError(f"loss_fn is a {type(loss_fn).__name__}; it must be a function of model and batch")
    if isinstance(loss_fn, nn.modules.loss._Loss):
        raise UsageError(f"loss_fn is {type(loss_fn).__name__}, a criterion; pass initlab.supervised(criterion)")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise UsageError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer, or None")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"steps is {steps!r}; it must be a positive integer, or None")
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not budget > 0:
        raise ValueError(f"budget is {budget!r}; it must be a positive number of seconds")


def _materialised(model: nn.Module, batch: Any, loss_fn: LossFn) -> nn.Module:
    """A copy of a model with lazy modules, after the pass that gives them their shapes."""
    twin = copy.deepcopy(model)
    with torch.random.fork_rng(), torch.no_grad():
        loss_fn(twin, batch)
    return twin
