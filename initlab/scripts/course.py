"""What a run as a whole shows, and none of its steps: an optimizer without gradients, weights that hardly move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..diagnosis import Cause
from ..diagnosis.report import Place
from .loop import EARLY, Line, parameters_of, rates_of
from .optimizers import Optimizers, Updates, held_by
from .steps import names_of_values, variables
from .tape import Event

_HARDLY = 0.02  # of the weights' size: what a run of a hundred steps moves them by, and more
_TAKEN_BACK = 0.5  # of each step
_NO_BETTER = 0.98  # of the loss with one answer for all rows
_MUCH_BETTER = 0.7
_BY_HEART = 0.9  # of the first loss, left after some steps on one batch: its rows can be told apart


def without_gradients(optimizer: Optimizer, events: Sequence[Event], frames: list[FrameType]) -> Cause | None:
    """An optimizer none of whose parameters gets a gradient: what it holds, and why, as far as the step shows it."""
    parameters = {id(p): p for p in held_by((optimizer,)) if p.requires_grad}
    if not parameters:
        return None  # frozen for now
    known = names_of_values(frames)
    holders = [v for _, v in variables(frames) if isinstance(v, nn.Module) and parameters.keys() & _ids(v)]
    holder = min(holders, key=lambda module: len(_ids(module) - parameters.keys()), default=None)
    name = known.get(id(holder), "") or "a model"
    why = "no loss depends on them"
    facts: dict[str, Any] = {"parameters": len(parameters)}
    for event in events:
        if isinstance(event.function, nn.Module) and parameters.keys() & _ids(event.function):
            if not event.grad:
                file, line = event.place
                why = f"{name} ran under torch.no_grad() or in inference mode"
                facts["line"] = f"{Path(file).name}:{line}"
            else:
                why = f"what {name} puts out is detached before the loss"
    return Cause(
        "gradient",
        "broken",
        Place(),
        f"{known.get(id(optimizer), 'an optimizer')} takes steps, and no parameter of {name} that it has gets a "
        f"gradient: {why}.",
        facts,
        "# run it outside of torch.no_grad(), and take out .detach() between it and its loss",
    )


def hardly_moves(line: Line, optimizers: Optimizers) -> Cause | None:
    """Weights that a whole run has hardly moved: what takes its steps back, or makes them small."""
    _, reached = parameters_of(line)
    held = {id(p) for p in held_by(optimizers.seen)}
    learning = {name: p for name, p in reached.items() if id(p) in held}
    if line.start is None or not learning or not all(p.is_floating_point() for p in learning.values()):
        return None
    start = line.start.values
    moved = _norm([p.detach() - start[id(p)] for p in learning.values()])
    share = moved / (_norm([start[id(p)] for p in learning.values()]) or math.inf)
    if not share < _HARDLY:
        return None
    steps = optimizers.steps - line.first_step
    facts: dict[str, Any] = {"moved, of their size": share, "steps": steps}
    about = f"{steps} steps have moved the weights by {share:.2g} of their size"
    for updates in _updates_of(optimizers, learning):
        if updates.taken_back > _TAKEN_BACK:
            return Cause(
                "optimizer",
                "broken",
                Place(),
                f"something else writes to the weights between steps, and takes back {updates.taken_back:.0%} of "
                f"each: {about}.",
                facts | {"taken back": updates.taken_back},
                "# look for what writes to the model's parameters after optimizer.step(): an average of weights that "
                "goes to the model and not to its copy, load_state_dict() in the loop, a clamp",
            )
    groups = rates_of(optimizers.seen, learning)
    rate = max((rate for _, rate in groups), default=0.0)
    scales = any("betas" in group for group, _ in groups)  # Adam's kind: its steps do not depend on the norm
    for updates in _updates_of(optimizers, learning):
        if (norm := updates.clipped_to) is not None and not scales:
            return Cause(
                "gradient",
                "broken",
                Place(),
                f"gradients are clipped to a norm of {norm:.3g} in every step, and with the rate {rate:g} {about}.",
                facts | {"norm": norm, "rate": rate},
                "# clip to a larger norm: 1.0 is usual; the norm that torch.nn.utils.clip_grad_norm_ returns is the "
                "one before clipping",
            )
    planned = max((float(g.get("initial_lr", 0.0)) for g, _ in groups), default=0.0)
    whence = f" The optimizer was made with {planned:g}, and its schedule multiplies that." if planned else ""
    return Cause(
        "learning rate",
        "warning",
        Place(),
        f"the rate {rate:.3g} is too low: {about}.{whence}",
        facts | {"rate": rate, "initial rate": planned},
        "# look at print(scheduler.get_last_lr()): a lambda of LambdaLR gives a factor, not a rate"
        if planned
        else "for group in optimizer.param_groups:\n    group['lr'] *= 100",
    )


@dataclass
class Answers:
    """How a criterion rates a model's answers at the end of a run.

    Args:
        value: of the criterion, the mean of the last steps.
        with_one: of the last step, if all its rows got one answer: the mean, or logits of 0 if better.
    """

    value: float
    with_one: float

    @property
    def tell_nothing(self) -> bool:
        """Whether they are no better than one answer."""
        return self.with_one > 0 and self.value >= _NO_BETTER * self.with_one

    @property
    def tell_much(self) -> bool:
        """Whether they are far better than one answer."""
        return self.value < _MUCH_BETTER * self.with_one or self.with_one <= 0


def answers_of(line: Line) -> Answers | None:
    """How the first criterion of the last step rates the model's answers; None where it calls none of torch's.

    For a class, a number and a probability alike, a model that has learned nothing about its inputs does as well as
    the mean of its own answers.
    """
    last = line.values[-max(EARLY, len(line.values) // 10) :]
    for event in line.last_events:
        if not (
            isinstance(event.function, nn.modules.loss._Loss) or getattr(event.function, "__name__", "") in _CRITERIA
        ):
            continue
        if len(event.args) < 2 or not all(isinstance(x, Tensor) for x in event.args[:2]):
            continue
        answer, target = (x.detach() for x in event.args[:2])
        if answer.dim() < 1 or len(answer) < 2 or not answer.is_floating_point():
            continue
        with torch.no_grad():
            ones = [answer.mean(0, keepdim=True).expand_as(answer)]
            if getattr(event.function, "__name__", type(event.function).__name__) in _OF_LOGITS:
                ones.append(torch.zeros_like(answer))
            values = [event.function(x, target, *event.args[2:], **event.kwargs) for x in (answer, *ones)]
        if all(v.numel() == 1 and bool(v.isfinite()) for v in values):
            share = sum(last) / len(last) / last[-1] if last[-1] else 1.0  # a single batch says little
            return Answers(float(values[0]) * share, min(map(float, values[1:])))
    return None


_OF_LOGITS = {"cross_entropy", "CrossEntropyLoss", "binary_cross_entropy_with_logits", "BCEWithLogitsLoss"}
_CRITERIA = {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"}
_CRITERIA |= {"binary_cross_entropy_with_logits", "multi_margin_loss", "soft_margin_loss"}


def unrelated_targets(line: Line, answers: Answers | None, losses: Sequence[float | None]) -> Cause | None:
    """A net that learns the rows of one batch by heart, in a run that learns nothing from batch to batch.

    Args:
        losses: of steps on one batch.
    """
    known = [x for x in losses if x is not None and math.isfinite(x)]
    if answers is None or not answers.tell_nothing or len(known) < 2 or not known[0] > 0:
        return None
    if known[-1] > _BY_HEART * known[0] or len(line.values) < 4 * len(known):
        return None
    return Cause(
        "target",
        "warning",
        Place(),
        f"on one batch the loss falls from {known[0]:.4g} to {known[-1]:.4g} in {len(known) - 1} steps, and over "
        f"{len(line.values)} steps on all of them it is {line.values[-1]:.4g}, where one answer for all rows gives "
        f"{answers.with_one:.4g}: from batch to batch, the targets do not follow from the inputs. Do they belong "
        "together?",
        {"with one answer": answers.with_one},
        "# compare some rows with the raw data after shuffling, sorting, splitting and joining: inputs and targets "
        "must go through the same permutation",
    )


def _updates_of(optimizers: Optimizers, parameters: dict[str, Tensor]) -> list[Updates]:
    wanted = set(map(id, parameters.values()))
    having = [o for o in optimizers.seen if any(id(p) in wanted for p in held_by((o,)))]
    return [optimizers.updates[id(o)] for o in having if id(o) in optimizers.updates]


def _ids(module: nn.Module) -> set[int]:
    return set(map(id, module.parameters()))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
