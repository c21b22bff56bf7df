"""The doctor: runs a model on the user's own batch and says why the loss is inf, or NaN, or does not fall.

state.py keeps and restores; trace.py observes a pass, origin.py follows one operation by operation; probes.py runs
them; evidence.py is what they gather, symptoms.py reads it; checks/ judges; fixes.py writes remedies; report.py says it;
ranks.py keeps all of it from communicating.
"""

from __future__ import annotations

import copy
import math
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
from . import checks, probes, ranks, symptoms
from .batch import leaves
from .checks import Finding
from .evidence import Evidence
from .limits import LIMITS
from .probes import LossFn, TrainingStep, UsageError, quiet
from .ranks import CommunicatesError
from .report import Cause, Diagnosis, LayerRow, Place
from .state import companions

__all__ = [
    "Cause",
    "CommunicatesError",
    "Diagnosis",
    "LayerRow",
    "Place",
    "UsageError",
    "diagnose",
    "examine",
    "supervised",
]

_TRIALS = 2  # remedies of a cause that are tried, at two steps each
_NAMED = 8  # parameters that a note lists
_DEPTH = 2  # examinations in a row: a second one where the first's remedy makes the loss finite and no more


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
    steps: int = 1,
    across: Any = None,
) -> Diagnosis:
    """Run a model on a batch, and say what is wrong, or close to it: cause, place, evidence, remedy.

    One pass is observed; closer looks follow only where it leaves a suspicion. Errors that the model, the loss or the
    backward pass raise are evidence. Afterwards everything is as it was, also when something raises: parameters,
    buffers, gradients, modes, attributes, the optimizer and its state, and the random generators.

    Beside other ranks it looks at this rank's model and batch alone, and communicates with none of them: also where DDP
    waits for the gradients of a pass that is half done. A model that cannot run without the others is refused.

    Args:
        model: wrapped (DDP) or compiled ones are looked at unwrapped and uncompiled.
        batch: one real batch: tensors, in tuples, lists and dicts.
        loss_fn: called with the model and the batch, returns the loss, one element.
        optimizer: with one, steps are taken and the learning rate is judged.
        steps: how many.
        across: a ProcessGroup or a DeviceMesh, of which this rank is part, or True for all ranks; every rank of it must
            make the call. One gather then gives all of them the diagnosis of the first bad rank: the worst verdict,
            then the earliest step in which a rank broke, then the lowest rank. As for `Watch.report`.

    Returns:
        A `Diagnosis`, which prints as a verdict, its causes, and a table of the layers.

    Raises:
        TypeError: if model, batch, loss_fn or what it returns is of the wrong kind, or `across` is.
        ValueError: if steps is not positive, or this rank is no part of `across`.
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
        found = examine(model, batch, loss_fn, optimizer, steps=steps)
    except Exception as error:
        if groups:  # the others wait for this rank
            all_gather_object(f"{type(error).__name__}: {error}", groups)
        raise
    return ranks.first_of(all_gather_object(found, groups)) if groups else found


def examine(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    optimizer: Optimizer | None = None,
    *,
    steps: int = 1,
    tell: Callable[[str], None] = lambda stage: None,
) -> Diagnosis:
    """`diagnose`, telling which stage begins."""
    _check(model, batch, loss_fn, optimizer, steps)
    notes: list[str] = []
    inner = unwrapped(model)
    beside = companions(loss_fn)
    ranks.refuse_spread(model, beside, (leaf.tensor for leaf in leaves(batch)))
    if inner is not model:
        notes.append(f"looked at the original module inside {type(model).__name__}")
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        notes.append("compiled modules ran as they were written, uncompiled")
    with quiet(), ranks.alone():
        if any(is_lazy(p) for p in (*inner.parameters(), *inner.buffers())):
            inner, optimizer = _materialised(inner, batch, loss_fn), None
            notes.append("lazy modules: looked at a copy that has seen the batch, without the optimizer")
        tell("taking down what must be restored")
        with ranks.apart((inner, *beside), optimizer):
            training_step = TrainingStep(inner, batch, loss_fn, optimizer)
            try:
                evidence, found = _examined(training_step, steps, tell, _DEPTH)
            finally:
                training_step.snapshot.restore()
    return Diagnosis(
        causes=tuple(found),
        losses=tuple(evidence.losses),
        gradient_norm=evidence.steps[0].gradient if evidence.steps else None,
        broke_at=evidence.broke_at,
        layers=tuple(_rows(evidence)),
        notes=(*notes, *_bad_gradients(evidence), *_close_calls(evidence)),
    )


def _examined(
    training_step: TrainingStep, steps: int, tell: Callable[[str], None], depth: int
) -> tuple[Evidence, list[Cause]]:
    """The evidence, and the causes with their remedies."""
    evidence = probes.gather(training_step)
    if probes.runnable(evidence):
        tell("running the model under observation")
        probes.screen(training_step, evidence, steps)
        _look_closer(training_step, evidence, tell)
    found = checks.findings(evidence)
    written = [_cause(one, (one.remedies or [""])[0]) for one in found]
    if found and depth:
        tell("trying remedies")
        written[0], behind = _tried(training_step, found[0], steps, tell, depth)
        written += [cause for cause in behind if cause.kind not in {one.kind for one in written}]
    return evidence, written


def _tried(
    training_step: TrainingStep, found: Finding, steps: int, tell: Callable[[str], None], depth: int
) -> tuple[Cause, list[Cause]]:
    """The likeliest cause with a remedy that was tried, and what shows itself behind it where that is not enough."""
    effects = {}
    for candidate in found.remedies[:_TRIALS]:
        effects[candidate] = probes.effect(training_step, candidate)
        if effects[candidate] == "falls":
            if found.kind == "weights" and "gain" in found.evidence:
                found.evidence["gain after the remedy"] = probes.growth_under(training_step, candidate)
            return _cause(found, candidate, tried=True), []
    helped = next((candidate for candidate, effect in effects.items() if effect == "finite"), None)
    if helped is None or depth == 1:
        return _cause(found, (found.remedies or [""])[0]), []
    with probes.under(training_step, helped) as cured:
        second = TrainingStep(cured.model, cured.batch, cured.loss_fn, cured.optimizer)
        try:
            behind = _examined(second, steps, tell, depth - 1)[1]
        finally:
            second.snapshot.restore()
    if not behind or not behind[0].remedy:
        return _cause(found, helped), behind
    return _cause(found, f"{helped}\n{behind[0].remedy}", tried=behind[0].tried), behind


def _cause(found: Finding, remedy: str, tried: bool = False) -> Cause:
    return Cause(found.kind, found.severity, found.place, found.explanation, found.evidence, remedy, tried)


def _look_closer(training_step: TrainingStep, evidence: Evidence, tell: Callable[[str], None]) -> None:
    """The probes that the screening calls for."""
    broke = evidence.broke_at is not None
    lost = symptoms.uses_half(evidence) and symptoms.lost_gradients(evidence)
    if (broke and evidence.error is None) or (lost and not broke):
        tell("searching the operation behind the first value that is not finite")
        probes.find_origin(training_step, evidence)
    if lost or (broke and symptoms.uses_half(evidence)):
        tell("running in float32")
        probes.replay_in_float32(training_step, evidence)
    if symptoms.suspicious_step(evidence):
        tell("searching along the update")
        probes.search_rates(training_step, evidence)
        if not symptoms.blew_up(evidence):
            probes.keep_going(training_step, evidence, 3)
    odd = symptoms.odd_scale(evidence)
    if odd is not None and (odd.strong or evidence.broke_at is not None):
        tell("running on standardised inputs")
        probes.replay_standardised(training_step, evidence, odd.leaf)


def _bad_gradients(evidence: Evidence) -> Iterator[str]:
    """The parameters whose gradients are not finite, by name."""
    bad = [held.name for held in evidence.parameters if held.grad is not None and not held.grad.finite]
    if bad:
        yield f"gradients that are not finite in step 1: {inline_listing(bad, _NAMED)}"


def _close_calls(evidence: Evidence) -> Iterator[str]:
    """Layers whose output is finite and close to the end of its dtype's range."""
    for row in _rows(evidence):
        if 0 < row.headroom < LIMITS.headroom:
            name = row.name or "the model itself"
            yield f"{name} puts out {row.largest:.4g}, within a factor of {row.headroom:.2g} of the largest {row.dtype}"


def _rows(evidence: Evidence) -> Iterator[LayerRow]:
    seen = set()
    for call in evidence.trace.calls:
        if call.made is None or call.path in seen:
            continue
        seen.add(call.path)
        gain = None
        if call.is_layer and call.given is not None and call.given.signal:
            gain = call.made.signal / call.given.signal
        norms = [h.grad_norm for h in evidence.parameters if h.ref.module_name == call.path and h.grad_norm is not None]
        gradient = math.hypot(*norms) if norms else None
        dtype = str(call.made.dtype).removeprefix("torch.")
        yield LayerRow(
            call.path, call.kind, dtype, call.made.std, gain, call.made.largest, call.made.headroom, gradient
        )


# ---------------------------------------------------------------------------------------------------------------
# The model


def _check(model: Any, batch: Any, loss_fn: Any, optimizer: Any, steps: Any) -> None:
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
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps is {steps!r}; it must be a positive integer")


def _materialised(model: nn.Module, batch: Any, loss_fn: LossFn) -> nn.Module:
    """A copy of a model with lazy modules, after the pass that gives them their shapes."""
    twin = copy.deepcopy(model)
    with torch.random.fork_rng(), torch.no_grad():
        loss_fn(twin, batch)
    return twin
