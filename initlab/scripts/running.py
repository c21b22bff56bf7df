"""run_script(): a training script as it is, watched; the step that fails is examined on the spot."""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import math
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from initlab.kernels import all_finite_fast

from ..diagnosis import Cause, Diagnosis, diagnose_alone, inspect_memory, inspect_objective, inspect_start
from .course import Answers, answers_of, hardly_moves, unrelated_targets, without_gradients
from .history import cause_of
from .loop import EARLY, Line, causes_in_loop, faded_rate, note_faded, raised_rate, stuck_parameters, written_over
from .optimizers import Optimizers
from .report import ScriptReport
from .steps import Start, Step, leaves_of, model_of, names_of, optimizer_of
from .tape import Event, Replay, Tape

PATIENCE = 200  # steps in which a loss should have fallen
_AGAIN = 20  # steps that an examination from the start takes at most
_MODELS = 8  # that one line trains, and are told apart
_SCALED = 50  # steps in a row that a GradScaler may skip before it is a fault


class _Stop(BaseException):
    """Ends the script once the doctor has spoken. No `except Exception` of the script's own catches it."""


def run_script(
    script: str,
    arguments: Sequence[str] = (),
    *,
    patience: int = PATIENCE,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ScriptReport:
    """Run a training script as it is, and examine the first step that fails.

    Losses are recognised where `backward()` is called, the model by what was called on the way to the loss, the
    optimizer by its parameters. The script is stopped by a loss or gradient that is not finite, by an error that a step
    raises, and by a loss that over `patience` steps has risen or not fallen, if the doctor then finds a cause. Else it
    goes on, and ends as it would have: its results are the same, bit for bit.

    Args:
        script: the path of a Python file, which is run as `python script` would.
        arguments: the script's own.
        patience: backward passes from one line of code in which its loss should have fallen.
        on_stage: called with a description of each stage of an examination as it begins.

    Returns:
        A `ScriptReport`.

    Raises:
        FileNotFoundError: where there is no such file.

    Example:
        >>> import pathlib, tempfile, initlab.scripts
        >>> path = pathlib.Path(tempfile.mkdtemp(), "train.py")
        >>> lines = ["import torch", "w = torch.nn.Linear(2, 1)", "loss = w(torch.ones(3, 2)).log().mean() * 0"]
        >>> size = path.write_text("\\n".join([*lines, "(loss + float('nan')).backward()"]))
        >>> report = initlab.scripts.run_script(str(path))
        >>> report.verdict, report.stopped, report.place[1]
        ('broken', 'the loss is nan', 4)
    """
    path = Path(script)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {script}")
    run = _Run(path, patience, on_stage)
    saved = sys.argv[:], sys.path[:]
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with run.watching():
            runpy.run_path(str(path), run_name="__main__")
        run.ended()
    except _Stop:
        pass
    except SystemExit as error:
        if error.code in (None, 0):
            run.ended()
        else:
            run.report.error = error
    except Exception as error:
        run.failed(error)
    finally:
        sys.argv[:], sys.path[:] = saved
    if run.fault is not None:
        raise run.fault
    return run.report


class _Run:
    """A script that is running."""

    def __init__(self, path: Path, patience: int, on_stage: Callable[[str], None]) -> None:
        self.root = str(path.resolve().parent)
        self.path = path
        self.patience = patience
        self.on_stage = on_stage
        self.report = ScriptReport(str(path))
        self.tape = Tape(self.is_users)
        self.lines: dict[tuple[tuple[str, int], tuple[int, ...]], Line] = {}  # by place, and the models that ran
        self.seen: Line | None = None  # of the last backward pass
        self.events_before: dict[tuple[str, int], int] = {}  # on the tape when a line was last reached
        self.idle: dict[int, Cause] = {}  # of optimizers that no gradient reaches, by id
        self.optimizers = Optimizers()
        self.loss: Tensor | None = None  # of the last backward pass
        self.place: tuple[str, int] = ("", 0)
        self.step_events: list[Event] = []
        self.skipped = 0  # steps in a row with gradients that are not finite, under a GradScaler
        self.examining = False
        self.losses_from_start: tuple[float | None, ...] = ()  # of the last examination from there
        self.over = False  # the script has ended: no step is under way
        self.fault: Exception | None = None  # of the watch itself

    def is_users(self, file: str) -> bool:
        """Whether a file is the script or lies beside it, and is no installed package."""
        if file == str(self.path):
            return True
        return file.startswith(self.root) and "site-packages" not in file and not file.startswith("<")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The patches that see a step."""
        backward = torch.autograd.backward
        run = self

        def watched(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            run.seeing(run.before_backward, tensors)
            return backward(tensors, *args, **kwargs)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            run.seeing(run.before_step, optimizer)
            if not any(map(callable, (*args, *kwargs.values()))):  # a closure is a step of its own
                run.tape.rest()

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            run.seeing(run.optimizers.after_step, optimizer)

        handles = register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)
        torch.autograd.backward = watched
        try:
            with self.tape.calls(), self.tape:
                try:
                    yield
                finally:
                    self.tape.resume()  # an error in an optimizer's step
        finally:
            torch.autograd.backward = backward
            for handle in handles:
                handle.remove()

    # One step

    def seeing(self, look: Callable[[Any], None], at: Any) -> None:
        """Look at a part of a step. A fault of the watch's own ends the watch, and not the script."""
        self.tape.resume()  # where a step raised an error that the script has caught
        if self.examining or self.fault is not None:
            return
        lifted = self.tape.lift()  # what the watch calls is no part of the step
        try:
            look(at)
        except Exception as error:
            self.fault = error
        finally:
            self.tape.lay(lifted)
            self.tape.paused = self.fault is not None

    def before_backward(self, tensors: Any) -> None:
        """Look at a loss."""
        loss = tensors if isinstance(tensors, Tensor) else next((t for t in tensors if isinstance(t, Tensor)), None)
        if loss is None or loss.numel() != 1:
            return
        with torch.no_grad():
            value = float(loss.detach())
        self.optimizers.before_backward()
        self.report.steps += 1
        if self.report.steps == 1:
            self.report.first = value
        self.report.last = value
        self.loss, self.place = loss, self.tape.place()
        old = self.events_before.get(self.place, 0)
        self.tape.drop(old)
        self.events_before = {place: max(0, count - old) for place, count in self.events_before.items()}
        self.step_events = list(self.tape.events)
        self.events_before[self.place] = len(self.tape.events)
        self.seen = seen = self.line()
        seen.values.append(value)
        seen.last_events = self.step_events
        note_faded(seen, self.optimizers)
        if len(seen.values) == 1:
            seen.reached, seen.first_step = set(leaves_of(loss)), self.optimizers.steps
            if (step := self.step()) is not None:
                seen.start = Start(step)
        if not math.isfinite(value):
            self.stop(f"the loss is {value:g}")
        self.tape.history.next_step()
        # Where nothing is found, twice as many losses are awaited.
        if len(seen.values) >= max(self.patience, 2 * seen.examined):
            why = seen.stands_still(max(EARLY, self.patience // 10))
            if why and self.judged(seen, why):
                raise _Stop
            seen.examined = len(seen.values)

    def line(self) -> Line:
        """What is known of this line of the script with these models: one that was loaded anew begins anew."""
        roots = {
            id(event.function): None
            for event in self.step_events
            if isinstance(event.function, nn.Module) and next(event.function.parameters(), None) is not None
        }
        if sum(place == self.place for place, _ in self.lines) < _MODELS:
            return self.lines.setdefault((self.place, tuple(roots)), Line())
        return self.lines.get((self.place, tuple(roots))) or self.lines.setdefault((self.place, ()), Line())

    def judged(self, seen: Line, why: str) -> bool:
        """Whether it is known what a loss stands still from, or what is wrong with the loop around it.

        Args:
            why: how the loss stands still, in words; "" where it falls.
        """
        sure = list(causes_in_loop(seen, self.optimizers, "broken" if why else "warning"))
        if not sure and (why or self.over):
            updates = self.optimizers.updates
            sure = [cause for key, cause in self.idle.items() if updates[key].idle == updates[key].steps]
        stuck = stuck_parameters(seen, self.optimizers)
        answers = self.answers(seen) if self.over and not sure else None
        if not why and answers is not None and len(seen.values) >= 2 * EARLY:
            if answers.tell_nothing:
                why = (
                    f"the loss ends at {answers.value:.4g}, where one answer for all rows gives {answers.with_one:.4g}"
                )
            elif not answers.tell_much:
                why = seen.falls_little(max(EARLY, len(seen.values) // 10))
        found = None
        still = hardly_moves(seen, self.optimizers) if not sure and why else None
        if still is not None and still.kind != "learning rate":
            sure = [still]
        if not sure and (why or stuck):
            found = self.examined_from_start(seen) or (None if self.over else self.examined_now(3))
        causes = [*sure, *(found.causes if found is not None else ())] or ([stuck] if stuck is not None else [])
        if why and not sure and (not causes or causes[0].kind == "learning rate"):
            faded = faded_rate(seen, self.optimizers)
            causes = [faded] if faded is not None else causes
        if not causes and still is not None:
            causes = [still]
        if not causes and why:
            found = self.diagnosed_at_start(seen, inspect_memory)
            causes = list(found.causes) if found is not None else []
        if not causes and why and (cause := unrelated_targets(seen, answers, self.losses_from_start)) is not None:
            causes = [cause]
        if not causes and why and self.over and (found := self.diagnosed_at_start(seen, inspect_start)) is not None:
            causes = list(found.causes)
        if not causes:
            return False
        self.report.diagnosis = dataclasses.replace(found or Diagnosis(()), causes=tuple(causes))
        falls = f"the loss falls, and {'the loop around it is wrong' if sure else 'a part does not learn'}"
        self.report.stopped, self.report.place = why or falls, self.place
        return True

    def ended(self) -> None:
        """The script has run to its end: look at what was too short to be looked at before, and at each objective."""
        self.over = self.report.over = True
        if self.fault is not None:
            return
        for (place, _), seen in self.lines.items():
            self.place = place
            why = seen.stands_still(max(EARLY, len(seen.values) // 10)) if len(seen.values) > seen.examined else ""
            if self.judged(seen, why) or self.misses_its_objective(seen):
                return

    def misses_its_objective(self, seen: Line) -> bool:
        """Whether a loss function is called wrongly, whatever the loss does."""
        found = self.diagnosed_at_start(seen, inspect_objective)
        if found is None or not found.causes:
            return False
        self.report.diagnosis, self.report.place = found, self.place
        self.report.stopped = "the loss function is called wrongly"
        return True

    def diagnosed_at_start(self, seen: Line, doctor: Callable[..., Diagnosis]) -> Diagnosis | None:
        """What a doctor who looks at one thing says of a line's first step."""
        if seen.start is None or (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        notes = list(self.report.notes)
        with seen.start.put_back():
            found = self.diagnosed(seen.start.step, 1, doctor)
        if found is None or not found.causes:
            self.report.notes = notes  # nothing failed: that it cannot be examined is no news
        return found

    def before_step(self, optimizer: Optimizer) -> None:
        """Look at the gradients that an optimizer is about to use."""
        gradients = self.optimizers.before_step(optimizer)
        if not gradients and self.optimizers.updates[id(optimizer)].idle == EARLY:
            cause = without_gradients(optimizer, self.tape.events, list(self.users_frames()))
            if cause is not None:
                self.idle[id(optimizer)] = cause
        if all(g.is_sparse or g.device.type != "cpu" or _finite(g) for g in gradients):
            self.skipped = 0
            return
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            self.skipped += 1  # the scaler skips such steps, and halves its scale
            if self.skipped < _SCALED:
                return
        self.stop("a gradient is not finite")

    def failed(self, error: Exception) -> None:
        """The script raised an error: examine the step, if one was under way."""
        self.report.error = error
        frames = [f for f in traceback.extract_tb(error.__traceback__) if self.is_users(f.filename)]
        events = self.tape.events
        stopped = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if frames and (cause := written_over(error, self.optimizers)) is not None:
            self.report.diagnosis, self.report.stopped = Diagnosis((cause,)), stopped
            self.report.place = frames[-1].filename, frames[-1].lineno or 0
            return
        if not events or events[-1].outputs is not None:
            return
        self.loss, self.step_events = None, list(events)
        self.place = (frames[-1].filename, frames[-1].lineno or 0) if frames else events[-1].place
        self.report.steps += 1
        found = self.examined_now(1)
        if found is not None and found.causes:
            self.report.diagnosis, self.report.place = found, self.place
            self.report.stopped = stopped

    # The examination

    def stop(self, why: str) -> NoReturn:
        """Examine the step, and end the script."""
        self.report.stopped, self.report.place = why, self.place
        self.report.diagnosis = self.examined_now(1)
        self.examine_start()
        self.look_back()
        raise _Stop

    def look_back(self) -> None:
        """Where a tensor of the batch is not finite, find the line of the script that made it so."""
        found = self.report.diagnosis
        if found is None or not found.causes or found.causes[0].kind not in ("input", "target"):
            return
        step, history = self.step(), self.tape.history
        for name, tensor in step.replay.batch.items() if step is not None else ():
            if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
                continue
            if (made := history.origin(tensor)) is None:
                continue
            cause = cause_of(made, name)
            if made.number >= history.step:
                rest = [one for one in found.causes if one.kind not in ("input", "target", "weights")]
                found = dataclasses.replace(found, causes=(cause, *rest))
            else:  # the data was prepared so
                first = found.causes[0]
                text = f"{first.explanation} {cause.explanation}"
                first = dataclasses.replace(first, explanation=text, evidence=first.evidence | cause.evidence)
                found = dataclasses.replace(found, causes=(first, *found.causes[1:]))
            self.report.diagnosis = found
            return

    def examine_start(self) -> None:
        """Weights that a run has ruined tell little of why: its start does, where the same steps ruin it again."""
        seen, late = self.seen, self.report.diagnosis
        if seen is None or len(seen.values) < 2:
            return
        found = None
        if late is None or _tells_little(late):
            found = self.examined_from_start(seen, min(len(seen.values), _AGAIN))
            if found is None and late is not None:  # the weights were in order: the run has made them what they are
                late = dataclasses.replace(late, causes=tuple(c for c in late.causes if c.kind != "uninitialised"))
        sure = list(causes_in_loop(seen, self.optimizers, "broken"))
        if sure and found is None:  # what the doctor sees of a late step is what the loop has led to
            late = dataclasses.replace(late or Diagnosis(()), causes=tuple(sure))
        elif found is None and (late is None or _tells_little(late)) and (cause := raised_rate(seen, self.optimizers)):
            late = dataclasses.replace(late or Diagnosis(()), causes=(cause,))
        self.report.diagnosis = found or late

    def examined_now(self, steps: int) -> Diagnosis | None:
        """Let the doctor look at the step as it is now."""
        step = self.step()
        return None if step is None else self.diagnosed(step, steps)

    def examined_from_start(self, seen: Line, steps: int | None = None) -> Diagnosis | None:
        """Let the doctor look at the first step of a line; None where it finds nothing.

        Args:
            steps: to take; None takes as many as it does by itself.
        """
        self.losses_from_start = ()
        if seen.start is None:
            return None
        with seen.start.put_back():
            found = self.diagnosed(seen.start.step, steps)
        self.losses_from_start = found.losses if found is not None else ()
        if found is None or found.verdict == "healthy":
            return None
        taken = max(1, len(found.losses) - 1)
        self.report.notes.append(f"examined from the weights and the batch of step 1, over {taken} steps")
        return found

    def answers(self, seen: Line) -> Answers | None:
        """How the last step of a line rates the model's answers."""
        with self.unwatched(), contextlib.suppress(Exception):  # a criterion that cannot be called again
            return answers_of(seen)
        return None

    def step(self) -> Step | None:
        """The step that is under way; None where it cannot be run again."""
        frames = list(self.users_frames())
        leaves = leaves_of(self.loss)
        reached = set(leaves)
        model, model_name = model_of(self.step_events, frames, leaves)
        if model is None:
            note = "the step cannot be run again: no module with parameters was called on the way to the loss"
            if note not in self.report.notes:
                self.report.notes.append(note)
            return None
        replay = Replay(self.step_events, self.loss, model, names_of(frames))
        optimizer, optimizer_name = optimizer_of(reached or {id(p) for p in model.parameters()}, frames)
        names = [("model", model_name), ("optimizer", optimizer_name)]
        code = [f"{ours} = {theirs}" for ours, theirs in names if theirs not in (ours, "")]
        code += [f"batch = {{{', '.join(f'{name!r}: {name}' for name in replay.batch)}}}"]
        return Step(model, replay, optimizer, "; ".join(code))

    def diagnosed(
        self, step: Step, steps: int | None, doctor: Callable[..., Diagnosis] = diagnose_alone
    ) -> Diagnosis | None:
        """The doctor's word on a step."""
        self.report.preamble = step.preamble
        with self.unwatched():
            try:
                found = doctor(
                    step.model, step.replay.batch, step.replay, step.optimizer, steps=steps, on_stage=self.on_stage
                )
                causes = tuple(_in_script(cause, step.replay) for cause in found.causes)
                return dataclasses.replace(found, causes=causes)
            except Exception as error:
                self.report.notes.append(f"the step could not be examined: {type(error).__name__}: {error}")
                return None

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Inside, what is called is ours, and no part of the script."""
        self.examining = self.tape.paused = True
        try:
            yield
        finally:
            self.examining = self.tape.paused = False

    def users_frames(self) -> Iterator[FrameType]:
        """The frames of the user's own code, the innermost first; of an error those in which it was raised."""
        if self.report.error is not None:
            walked = [frame for frame, _ in traceback.walk_tb(self.report.error.__traceback__)]
            yield from (frame for frame in reversed(walked) if self.is_users(frame.f_code.co_filename))
            return
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if self.is_users(frame.f_code.co_filename):
                yield frame
            frame = frame.f_back


def _finite(gradient: Tensor) -> bool:
    """Whether all is finite, by torch's sum: numba's quicker look takes longer to load than a short script's steps."""
    if gradient.is_floating_point() and math.isfinite(
        gradient.sum(dtype=torch.float32 if gradient.dtype.itemsize <= 2 else None).item()
    ):
        return True
    return all_finite_fast(gradient)


def _in_script(cause: Cause, replay: Replay) -> Cause:
    """A cause whose line of code is the script's, where it is the one that runs the step again."""
    if "line" not in cause.evidence or not cause.evidence["line"].startswith("tape.py"):
        return cause
    evidence = {key: value for key, value in cause.evidence.items() if key != "line"}
    for call in replay.calls:
        if getattr(call.event.function, "__name__", "").strip("_") == cause.place.op:
            file, line = call.event.place
            evidence["line"] = f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"
    return dataclasses.replace(cause, evidence=evidence)


def _tells_little(found: Diagnosis) -> bool:
    """Whether a diagnosis of a late step may only name what the run has done to its weights."""
    kinds = ("learning rate", "gradient", "weights", "uninitialised", "optimizer")
    return not found.causes or found.causes[0].kind in kinds
