"""Trials: a remedy is run as it is printed, and then the model is trained, on the user's own objective."""

from __future__ import annotations

import ast
import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .budget import Budget
from .limits import LIMITS
from .outcomes import Outcome
from .probes import LossFn, TrainingStep, norm_of, observe_at_rest, take_step
from .rewrites import Rewrite
from .symptoms import gains

_NAMES = ("model", "batch", "loss_fn", "optimizer")  # what a remedy may change, beside using torch and initlab


def is_code(remedy: str) -> bool:
    """Whether a remedy does something: comments do not.

    Example:
        >>> from initlab.diagnosis.trials import is_code
        >>> is_code("# in forward(): x.clamp_min(eps).log()"), is_code("model.float()  # or bfloat16")
        (False, True)
    """
    try:
        return bool(ast.parse(remedy).body)
    except SyntaxError:
        return False


@contextmanager
def after_remedy(training_step: TrainingStep, remedy: str) -> Iterator[TrainingStep]:
    """The training step after a remedy is run as it is printed; everything is restored afterwards."""
    import initlab

    training_step.snapshot.restore()
    scope: dict[str, Any] = {
        "torch": torch,
        "initlab": initlab,
        **{name: getattr(training_step, name) for name in _NAMES},
    }
    try:
        exec(remedy, scope)
        changed = copy.copy(training_step)
        changed.model, changed.batch, changed.loss_fn, changed.optimizer = (scope[name] for name in _NAMES)
        yield changed
    finally:
        training_step.snapshot.restore()


def run(training_step: TrainingStep, remedy: str, budget: Budget, rewritten: bool = False) -> Outcome:
    """Try a remedy: run it as it is printed, and train.

    Args:
        remedy: code.
        budget: how long, and how many steps.
        rewritten: whether its loss function is known to be the user's own objective. Otherwise that one is measured,
            whatever the remedy puts in its place.

    Returns:
        How the user's own objective went.
    """
    if not is_code(remedy):
        return Outcome(ran=False)
    try:
        with after_remedy(training_step, remedy) as changed:
            return train(changed, changed.loss_fn if rewritten else training_step.loss_fn, budget)
    except Exception:
        return Outcome(ran=False)


def run_untreated(training_step: TrainingStep, budget: Budget, steps: int | None = None) -> Outcome:
    """The run as it is, from the start, in as many steps as the budget has, or fewer."""
    training_step.snapshot.restore()
    try:
        return train(training_step, training_step.loss_fn, budget, steps)
    finally:
        training_step.snapshot.restore()


def train(training_step: TrainingStep, objective: LossFn, budget: Budget, steps: int | None = None) -> Outcome:
    """Take steps, and measure an objective before each and after the last.

    Its values end with NaN where an error is raised, and at the first that is not finite. Steps stop when the time is
    up, but not before the second, and where the loss is beyond hope.
    """
    measured = copy.copy(training_step)
    measured.loss_fn = objective
    same = objective is training_step.loss_fn
    losses: list[float] = []
    end = time.monotonic() + budget.per_run
    try:
        for number in range(min(steps or budget.steps, budget.steps)):
            budget.tick()
            if number >= LIMITS.trial_least and time.monotonic() > end:
                break
            if not same:
                losses.append(_value(measured))
            loss = float(training_step.loss_with_gradients().detach())
            if same:
                losses.append(loss)
            if not math.isfinite(losses[-1]) or not math.isfinite(loss):
                return Outcome((*losses[:-1], losses[-1] if not math.isfinite(losses[-1]) else math.nan))
            if abs(losses[-1]) > LIMITS.hopeless * max(1.0, abs(losses[0])):
                return Outcome(tuple(losses))
            if training_step.optimizer is not None:
                take_step(training_step.optimizer, training_step.loss_with_gradients)
            else:
                _small_step(training_step.model)
        losses.append(_value(measured))
    except Exception:
        losses.append(math.nan)
    return Outcome(tuple(losses), is_constant(measured))


def is_constant(training_step: TrainingStep) -> bool:
    """Whether a model, as it is now, puts out the same for every row, where targets differ."""
    evidence = observe_at_rest(training_step)
    try:
        with evidence.trace, torch.no_grad():
            training_step.loss()
    except Exception:
        return False
    flow = evidence.trace.flow
    pairs = [(one.prediction, one.target) for one in flow.compared.values()] if flow is not None else []
    known = [(p, t) for p, t in pairs if p is not None and p.rows > 2]
    return bool(known) and all(
        p.signal <= LIMITS.same_output * (t.signal if t is not None else p.rms) for p, t in known
    )


def _value(training_step: TrainingStep) -> float:
    return float(training_step.loss().detach())


@torch.no_grad()
def _small_step(model: nn.Module) -> None:
    """A step down the gradient by a thousandth of the weights' norm."""
    pairs = [(p, p.grad) for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
    size, slope = norm_of([p for p, _ in pairs]), norm_of([g for _, g in pairs])
    if size and slope:
        for p, g in pairs:
            p.sub_(g, alpha=1e-3 * size / slope)


def growth_after(training_step: TrainingStep, remedy: str) -> float | None:
    """How far the signal grows from the input to the worst layer after a remedy; None where that cannot be said."""
    with after_remedy(training_step, remedy) as changed:
        evidence = observe_at_rest(changed)
        with evidence.trace:
            changed.loss()
        return max((total for _, _, total in gains(evidence)), default=None)


def same_objective(training_step: TrainingStep, rewrite: Rewrite) -> str:
    """A rewritten loss if it has the values of the user's own, on ordinary outputs in place of the model's; else ""."""
    try:
        if _agree(training_step, rewrite.same_as or rewrite.code, rewrite.at, 1.0):
            return rewrite.code
        if rewrite.divided and not rewrite.same_as:
            by = _temperature(training_step, rewrite)
            code = rewrite.divided.format(by)
            return code if by and _agree(training_step, code, rewrite.at, abs(by)) else ""
    except Exception:
        pass
    return ""


def _agree(training_step: TrainingStep, code: str, at: str, size: float) -> bool:
    own, new = (_on_ordinary(training_step, remedy, at, size) for remedy in ("", code))
    alike = all(abs(a - b) <= LIMITS.same_value * max(1.0, abs(a)) for a, b in zip(own, new, strict=True))
    return all(map(math.isfinite, own)) and alike and max(own) - min(own) > LIMITS.same_value


def _temperature(training_step: TrainingStep, rewrite: Rewrite) -> float:
    """What the user's loss divides the model's output by, from its slope at 0; 0.0 where that is nothing."""
    rises = []
    for remedy in ("", rewrite.code):
        (start, *_), (end, *_) = (_on_ordinary(training_step, remedy, rewrite.at, size) for size in (0.0, 1e-8))
        rises.append(end - start)
    return float(f"{rises[1] / rises[0]:.3g}") if rises[0] and math.isfinite(rises[0]) else 0.0


def _on_ordinary(training_step: TrainingStep, remedy: str, at: str, size: float) -> list[float]:
    """A loss function's values where a module's output is replaced: at "" the model's, elsewhere what a module gets."""
    values = []
    for seed in range(2):
        with after_remedy(training_step, remedy) as changed:
            generator = torch.Generator().manual_seed(seed)

            def logits(like: Tensor, generator: torch.Generator = generator) -> Tensor:
                return size * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

            def replace(module: nn.Module, args: Any, out: Any, logits: Callable[..., Tensor] = logits) -> Tensor:
                return _ordinary(out, logits)

            def enter(module: nn.Module, args: Any, logits: Callable[..., Tensor] = logits) -> Any:
                return logits(args[0]), *args[1:]

            place = changed.model.get_submodule(at)
            hook = place.register_forward_pre_hook(enter) if at else place.register_forward_hook(replace)
            try:
                values.append(_value(changed))
            finally:
                hook.remove()
    return values


def _ordinary(out: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """Numbers of the sort that a model puts out: distributions, probabilities, or logits."""
    made = logits(out)
    if not bool(((out >= 0) & (out <= 1)).all()):
        return made
    distributions = out.dim() > 1 and bool(((out.sum(-1) - 1).abs() < 1e-2).all())
    return made.softmax(-1) if distributions else made.sigmoid()
