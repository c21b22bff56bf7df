"""What a script's loop does between its steps, and what is wrong with it that no single step shows.

Gradients that nobody sets to zero, a loss that depends on no parameter, parameters that no optimizer holds, a rate that
stays 0, a step() that is never called: the doctor, who takes steps of its own, sees none of it. It shows in what the
loop leaves: parameters that have not moved, gradients that are still there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..diagnosis import Cause
from ..diagnosis.checks.finding import short
from ..diagnosis.checks.operations import shape_written_over
from ..diagnosis.report import Place, Severity
from .optimizers import Optimizers, held_by
from .steps import Start
from .tape import Event

EARLY = 10  # steps whose mean is compared
_RAISED = 2.0  # times the rate that an optimizer was made with; a warm-up ends at 1
_FADED = 1e-3  # of the rate that an optimizer was made with
_FALL = 0.99  # of the first steps' mean: what counts as fallen
_RISE = 2.0  # times the first steps' mean: what counts as risen
_LITTLE = 0.9  # of the first steps' mean: what is left of a loss that may be held back
_BOTTOMLESS = 1e4  # times the first loss, below 0: no likelihood, reward or margin gets there
_AGAIN = 5  # steps in a row that use the gradients of those before
_SHARE = 0.25  # of the elements that a loss reaches: so many do not stand still by design


@dataclass
class Line:
    """The losses of one line of the script.

    Args:
        values: of the losses.
        start: the first step, with its weights.
        reached: ids of the tensors that the first loss's graph ends in.
        last_events: of the last step.
        examined: how many losses there were when the doctor last found nothing.
        first_step: how many steps optimizers had taken at the first loss.
        faded_at: how many losses there were when a schedule had taken the rate away; 0 before that.
    """

    values: list[float] = field(default_factory=list)
    start: Start | None = None
    reached: set[int] = field(default_factory=set)
    last_events: list[Event] = field(default_factory=list)
    examined: int = 0
    first_step: int = 0
    faded_at: int = 0

    def stands_still(self, window: int) -> str:
        """Whether the loss has risen or not fallen, in words; "" where it has fallen, or there are too few."""
        count = len(self.values)
        if count < 2 * EARLY:
            return ""
        first = min(self.values[0], sum(self.values[:EARLY]) / EARLY)
        last = sum(self.values[-window:]) / len(self.values[-window:])
        if last > first + abs(first) * (_RISE - 1):
            return f"the loss has risen from {first:.4g} to {last:.4g} in {count} steps"
        if first > 0 and last > _FALL * first:
            return f"the loss has not fallen in {count} steps: {first:.4g} to {last:.4g}"
        middle = self.values[count * 3 // 4]
        if -last > max(_BOTTOMLESS * max(abs(first), 1.0), -_RISE * middle):
            return f"the loss has no lower bound: {first:.4g} to {last:.4g} in {count} steps"
        return ""

    def falls_little(self, window: int) -> str:
        """Whether the loss has lost so little that something may hold it back, in words; "" where it has not."""
        count = len(self.values)
        first = sum(self.values[:EARLY]) / EARLY
        last = sum(self.values[-window:]) / len(self.values[-window:])
        if count < 5 * EARLY or not first > 0 or last < _LITTLE * first:
            return ""
        return f"the loss has fallen by {1 - last / first:.1%} in {count} steps: {first:.4g} to {last:.4g}"


def causes_in_loop(line: Line, optimizers: Optimizers, severity: Severity) -> Iterator[Cause]:
    """What is wrong with the loop around a loss, for certain.

    Args:
        severity: of what need not keep a run from learning.
    """
    if (again := optimizers.used_again(line)) >= _AGAIN:
        yield Cause(
            "gradient",
            severity,
            Place(),
            "gradients are not set to zero between steps: each backward pass adds to the sum of all before it.",
            {"steps": again},
            "optimizer.zero_grad()  # before each backward(), or after each step()",
        )
    own, reached = parameters_of(line)
    if not own:
        return
    held = {id(p) for p in held_by(optimizers.seen)}
    if not reached and not held & line.reached:
        yield Cause(
            "gradient",
            "broken",
            Place(),
            "the loss depends on no parameter: it is made of numbers that were taken out of the graph.",
            {"parameters": len(own)},
            "# in the loss: add the tensors themselves; no .item(), .detach(), float() or torch.tensor() of them",
        )
        return
    first, count = next(iter(reached), ""), len(line.values)
    if line.start is None or not reached or any(map(line.start.moved, reached.values())):
        return
    if not optimizers.steps:
        yield Cause(
            "optimizer",
            "broken",
            Place(),
            f"no optimizer has taken a step in {count} backward passes, and {first} is what it was.",
            {"parameters": len(reached)},
            "optimizer.step()  # after backward()",
        )
    elif optimizers.steps - line.first_step < EARLY:
        return
    elif not any(id(p) in held for p in reached.values()):
        yield Cause(
            "optimizer",
            "broken",
            Place(parameter=first),
            f"no optimizer that takes steps has {first}, nor any other parameter that this loss reaches: it was made "
            "with the parameters of another model.",
            {"parameters": len(reached)},
            "# give the optimizer of this loss the parameters that it reaches: model.parameters()",
        )
    elif not any(rate for _, rate in rates_of(optimizers.seen, reached)):
        planned = max(float(group.get("initial_lr", 0.0)) for group, _ in rates_of(optimizers.seen, reached))
        whence = f" The optimizer was made with {planned:g}: its schedule multiplies it by 0." if planned else ""
        look = "# look at the schedule: print(scheduler.get_last_lr()); // of two integers is 0 until it is 1"
        yield Cause(
            "learning rate",
            "broken",
            Place(),
            f"the learning rate was 0 in all {count} steps: no parameter has changed.{whence}",
            {"rate": 0.0, "initial rate": planned},
            look if planned else "# give the optimizer a rate above 0",
        )


def raised_rate(line: Line, optimizers: Optimizers) -> Cause | None:
    """A schedule that has raised the rate far above what the optimizer was made with, or is to reach."""
    _, reached = parameters_of(line)
    for group, rate in rates_of(optimizers.seen, reached):
        planned = max(float(group.get("initial_lr", 0.0)), float(group.get("max_lr", 0.0)))
        if 0 < _RAISED * planned < rate:
            return Cause(
                "learning rate",
                "broken",
                Place(),
                f"the rate is {rate:.3g} in the step that broke, and the optimizer was made with {planned:g}: its "
                "schedule has raised it, and the steps with it.",
                {"rate": rate, "initial rate": planned},
                "# look at the schedule: print(scheduler.get_last_lr()); a warm-up's factor ends at 1: "
                "min(1.0, (step + 1) / warmup)",
            )
    return None


def note_faded(line: Line, optimizers: Optimizers) -> None:
    """Note where a schedule takes the rate to next to nothing: looked at every tenth step."""
    if not line.faded_at and len(line.values) % EARLY == 0 and _faded(line, optimizers) is not None:
        line.faded_at = len(line.values)


def _faded(line: Line, optimizers: Optimizers) -> tuple[float, float] | None:
    """A rate that is next to nothing, and what the optimizer was made with."""
    for group, rate in rates_of(optimizers.seen, parameters_of(line)[1]):
        planned = float(group.get("initial_lr", 0.0))
        if 0 <= rate < _FADED * planned:
            return rate, planned
    return None


def faded_rate(line: Line, optimizers: Optimizers) -> Cause | None:
    """A schedule that has taken the rate away in the first half of a run that has not learned."""
    faded = _faded(line, optimizers)
    if faded is None or not 0 < 2 * line.faded_at < len(line.values):
        return None
    rate, planned = faded
    return Cause(
        "learning rate",
        "warning",
        Place(),
        f"the rate is {rate:.3g}, and the optimizer was made with {planned:g}: its schedule has taken it away before "
        "the run had learned.",
        {"rate": rate, "initial rate": planned, "from step": line.faded_at},
        "# look at the schedule: print(scheduler.get_last_lr()); step_size and T_max count calls of "
        "scheduler.step(): one for each epoch, or the number of batches times as large",
    )


def written_over(error: BaseException, optimizers: Optimizers) -> Cause | None:
    """A backward pass that goes through weights which an optimizer's step has changed since they were used."""
    shape = shape_written_over(str(error))
    if shape is None or not optimizers.steps:
        return None
    if not any(sorted(p.shape) == sorted(shape) for p in held_by(optimizers.seen)):  # a weight is used transposed
        return None
    return Cause(
        "optimizer",
        "broken",
        Place(),
        f"an optimizer's step() has changed weights of the shape {tuple(shape)} between the "
        "forward pass and this backward(), which needs them as they were.",
        {"error": short(error)},
        "# call every backward() that goes through these weights before the optimizer's step(), or run the model once "
        "more after it",
    )


def stuck_parameters(line: Line, optimizers: Optimizers) -> Cause | None:
    """Parameters that an optimizer has, with gradients of exactly 0 and the values of the first step.

    Only what it leads to: the doctor may know why.
    """
    _, reached = parameters_of(line)
    held = {id(p) for p in held_by(optimizers.seen)}
    if line.start is None or optimizers.steps - line.first_step < EARLY:
        return None
    still = {
        name: p
        for name, p in reached.items()
        if id(p) in held and (p.grad is None or not bool(p.grad.any())) and not line.start.moved(p)
    }
    share = sum(p.numel() for p in still.values()) / max(1, sum(p.numel() for p in reached.values()))
    if share < _SHARE or not all(rate for _, rate in rates_of(optimizers.seen, still)):
        return None
    first = next(iter(still))
    return Cause(
        "gradient",
        "warning",
        Place(parameter=first),
        f"the gradient of {first} is exactly 0, and it is what it was {len(line.values)} steps ago: so are "
        f"{len(still)} of the {len(reached)} parameters that the loss reaches. What follows it is dead, or cut off.",
        {"parameters": len(still)},
        "# look at what follows: a ReLU whose inputs are all negative, a large negative bias, a saturated sigmoid",
    )


def parameters_of(line: Line) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the model of a line has to learn, by name; and what of it the loss reaches."""
    model = line.start.step.model if line.start is not None else None
    own: dict[str, Tensor] = (
        {name: p for name, p in model.named_parameters() if p.requires_grad} if model is not None else {}
    )
    return own, {name: p for name, p in own.items() if id(p) in line.reached}


def rates_of(optimizers: Iterable[Optimizer], parameters: dict[str, Tensor]) -> list[tuple[dict[str, Any], float]]:
    """The groups that hold some of these parameters, with their rates."""
    wanted = set(map(id, parameters.values()))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [(g, float(g.get("lr", 1.0))) for g in groups if any(id(p) in wanted for p in g["params"])]
