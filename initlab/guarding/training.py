"""guard(): a training loop whose bad steps are left out, diagnosed on the spot and saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from initlab.kernels import eagerly

from .._console import warn
from ..clipping import GradClipper, SpikePolicy
from ..clipping.optimizers import hooked_optimizer
from ..clipping.steps import Measurement
from ..diagnosis import Diagnosis
from ..diagnosis.limits import LIMITS
from ..diagnosis.probes import LossFn
from ..diagnosis.state import referenced_modules
from ..languages import translator
from ..models.naming import unwrapped
from .arguments import Policy, check, needs_closure
from .clipper import GuardedClipper
from .divergence import History
from .examining import Examiner
from .metrics import Metrics
from .passes import ForwardPass, HostFlags, StateKeeper, StepRecord
from .ranks import any_rank_, ranks_of
from .report import BadStep, GuardReport
from .saving import save

T = TypeVar("T")

_LAG = 1  # steps that a GPU may be behind before the host waits for its flags


class TrainingGuard:
    """A guard over a training loop: what `initlab.guard` returns, which has the arguments. A context manager.

    It guards from the moment it is made until the `with` block ends, or `remove` is called.

    Attributes:
        clipper: the GradClipper that measures and skips, for its stats(), norms(), top() and state_dict().
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        loss_fn: LossFn,
        nonfinite: Policy = "skip",
        max_norm: float = math.inf,
        spikes: SpikePolicy | None = None,
        scaler: torch.amp.GradScaler | None = None,
        folder: str | Path | None = None,
        budget: float = LIMITS.budget,
        limit: int = 3,
        across: Any = None,
        log: Any = None,
        log_every: int = 50,
        lang: str = "en",
    ) -> None:
        translator(lang)  # raises for another language
        check(model, loss_fn, nonfinite, budget, limit)
        self._given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        for one in map(hooked_optimizer, self._given):
            if isinstance(getattr(one, "_initlab_clipper", None), GuardedClipper):
                raise RuntimeError("this optimizer is guarded already; leave that guard's `with` block first")
            if getattr(one, "_initlab_clipper", None) is not None:
                raise RuntimeError(
                    "this optimizer has a GradClipper, and a guard makes its own; remove() that one, and pass its "
                    "max_norm and spikes to guard"
                )
        self._model, self._loss_fn = model, loss_fn
        self._nonfinite, self._limit, self._scaler, self._lang = nonfinite, limit, scaler, lang
        self._folder = None if folder is None else Path(folder)
        across = ranks_of(model, across)
        self._metrics = Metrics(log, log_every)
        models = [model, *referenced_modules(loss_fn)]
        self._keeper = StateKeeper(models)
        self.clipper: GradClipper = GuardedClipper(
            self,
            self._given,
            max_norm,
            "propagate" if nonfinite == "propagate" else "skip",
            named_parameters=unwrapped(model).named_parameters(),
            scaler=scaler,
            per_parameter=True,
            spikes=spikes,
        )
        optimizers = list(dict.fromkeys(map(hooked_optimizer, self._given)))
        self._examiner = Examiner(model, loss_fn, optimizers, self._keeper, budget, across)
        self._optimizers = optimizers
        self._history = History(unwrapped(model))
        self._busy = False  # while a step runs again, whose steps and measurements are none of the run's
        self._passes: list[ForwardPass] = []  # since the last step
        self._flags: list[Tensor] = []  # of the step at hand; more than one where a closure runs again
        self._scaled = False
        self._pending: list[StepRecord] = []
        self._held: Tensor | None = None  # on a GPU: whether a bad step is on its way to the host
        self._lag = 0
        self._steps = self._bad = self._skipped = self._left_to_scaler = 0
        self._last: int | None = None
        self._examined: list[BadStep] = []

    # The loop

    def step(self, batch: Any) -> Tensor:
        """One training step: zero_grad, loss, backward, clipping, the optimizer's step.

        With a scaler the loss is scaled, and the scaler steps and is updated. An optimizer whose step() needs a
        closure, as LBFGS, gets one.

        Args:
            batch: what loss_fn takes.

        Returns:
            The loss, detached.

        Raises:
            FloatingPointError: for a bad step, with nonfinite="raise".
            TypeError: if loss_fn returns something else than a tensor with one element.
        """
        before = len(self._passes)
        self.batch(batch)
        try:
            return self._step(batch)
        except BaseException:
            del self._passes[before:]  # whoever catches it goes on with another batch
            raise

    def _step(self, batch: Any) -> Tensor:
        if any(map(needs_closure, self._optimizers)):
            if len(self._optimizers) > 1 or self._scaler is not None:
                raise NotImplementedError(
                    "step() runs an optimizer that needs a closure by itself, without other optimizers or a scaler; "
                    "write that loop yourself, with guard.batch(batch)"
                )
            first: Any = self._given[0].step(lambda: self._forward_backward(batch))  # type: ignore[arg-type,return-value]
            return torch.as_tensor(first).detach()
        loss = self._forward_backward(batch)
        self._step_optimizers()
        return loss.detach()

    def batch(self, batch: T) -> T:
        """Say that a batch is about to run, in a loop of your own: `for batch in map(guard.batch, loader):`.

        Call it before each forward pass whose gradients accumulate, once. The optimizer's step ends them.

        Args:
            batch: what loss_fn takes. It is kept until the step is known to be good.

        Returns:
            The batch.
        """
        self._refuse_removed()
        eagerly(self._note_batch, batch)
        return batch

    def _note_batch(self, batch: Any) -> None:
        self._passes.append(ForwardPass(batch, self._keeper.take()))

    def loss(self, loss: Tensor) -> Tensor:
        """Say what the loss of the batch is, in a loop of your own: `guard.loss(loss).backward()`.

        Without it a step is judged by its gradients alone. Nothing waits for the device.

        Args:
            loss: before a GradScaler scales it.

        Returns:
            The loss.
        """
        eagerly(self._note_loss, loss)
        return loss

    def _note_loss(self, loss: Tensor) -> None:
        if self._passes and not self._busy:
            self._passes[-1].note_loss(loss)

    def _forward_backward(self, batch: Any) -> Tensor:
        for one in self._given:
            one.zero_grad()
        with torch.enable_grad():
            loss = self._loss_fn(self._model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise TypeError(f"loss_fn returned {what}; it must return the loss, a tensor with one element")
            self._backward(self.loss(loss))
        return loss

    def _backward(self, loss: Tensor) -> None:
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def _step_optimizers(self) -> None:
        for one in self._given:
            one.step() if self._scaler is None else self._scaler.step(one)
        if self._scaler is not None:
            self._scaler.update()

    # What has been seen

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The first diagnosis; None without one."""
        return next((found.diagnosis for found in self._examined if found.diagnosis is not None), None)

    @property
    def saved(self) -> tuple[Path, ...]:
        """The files that were written, in order."""
        return tuple(path for found in self._examined for path in found.saved)

    def report(self) -> GuardReport:
        """What has been seen so far; waits for the device."""
        self._settle_all()
        return GuardReport(
            self._steps,
            self._bad,
            self._skipped,
            self._left_to_scaler,
            tuple(self._examined),
            self.clipper.stats(),
            self._last,
        )

    def __enter__(self) -> TrainingGuard:
        self._refuse_removed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._settle_all()
        finally:
            self.remove()

    def remove(self) -> None:
        """Leave the optimizers, and the scaler, as they were before; what was seen can still be reported."""
        self.clipper.remove()
        self._metrics.close()
        self._pending, self._passes, self._flags = [], [], []
        self._removed = True

    _removed = False

    def _refuse_removed(self) -> None:
        if self._removed:
            raise RuntimeError("this guard has been removed from its optimizer; call initlab.guard again for another")

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a guard cannot be copied nor pickled; save guard.clipper.state_dict()")

    # One step: called by the clipper

    def judge(self, measured: Measurement) -> Measurement:
        """Add the loss, and what other ranks say, to what was measured."""
        if self._busy:
            return measured
        # A batch that the loop itself has left out, after an error or a look at the loss, is not in this step.
        self._passes = [ran for ran in self._passes if ran.went_back] or self._passes
        bad = measured.nonfinite
        losses = [loss.reshape(()) for ran in self._passes for loss in ran.losses]
        loss_bad = torch.zeros_like(bad)
        for loss in losses:
            loss_bad = loss_bad | ~loss.isfinite().to(bad.device)
        skips = torch.zeros_like(bad)
        if measured.spike is not None and self._skips_spikes:
            skips = measured.spike.spike
        flags = any_rank_(torch.stack([bad, loss_bad, skips]).to(torch.int32), self._examiner.groups)
        self._scaled |= any(getattr(one, "found_inf", None) is not None for one in self._optimizers)
        self._flags.append(flags)
        if self._nonfinite == "propagate":  # afterwards the weights would be others
            self._settle(self._record(self._steps + 1, flags))
        self._lag = _LAG if self._is_behind(bad.device) else 0
        bad = flags.amax() > 0 if self._examiner.groups else bad | loss_bad
        if self._lag and not self._is_scaled():
            # Until the host knows of a bad step the device skips those that follow: weights stay what they were.
            bad = bad if self._held is None else bad | self._held
            self._held = bad | flags[2].to(torch.bool)
        return measured._replace(nonfinite=bad)

    def end_step(self) -> None:
        """The optimizers have stepped: queue what there is to know, and read what has arrived."""
        if self._busy:
            return
        self._steps += 1
        if self._flags:
            flags = self._flags[0] if len(self._flags) == 1 else torch.stack(self._flags).amax(0)
            if self._nonfinite != "propagate":
                self._pending.append(self._record(self._steps, flags))
            losses = [loss for ran in self._passes for loss in ran.losses]
            self._history.record(losses)
            self._metrics.record(self._steps, self.clipper, flags, losses)
        self._passes, self._flags, self._scaled = [], [], False
        while len(self._pending) > self._lag:
            self._settle(self._pending.pop(0))

    def _record(self, step: int, flags: Tensor) -> StepRecord:
        assert self.clipper.report is not None
        return StepRecord(step, self._passes, HostFlags(flags), self.clipper.report, self._is_scaled())

    @staticmethod
    def _is_behind(device: torch.device) -> bool:
        """Whether the host would wait for a device that has just been given a step."""
        return device.type != "cpu"

    @property
    def _skips_spikes(self) -> bool:
        return self.clipper._counts.skips_spikes

    def _is_scaled(self) -> bool:
        return self._scaled or (self._scaler is not None and self._scaler.is_enabled())

    def _settle_all(self) -> None:
        while self._pending:
            self._settle(self._pending.pop(0))

    def _settle(self, record: StepRecord) -> None:
        """Read a step's flags, and act."""
        gradient, loss, spike = record.flags.read()
        if not (gradient or loss or spike):
            return
        self._busy = True
        try:
            by_scale = gradient and not loss and record.scaled and record.passes
            if by_scale and self._examiner.culprit(record.passes) is None:
                self._left_to_scaler += 1
                return
            found = self._handle(record, bool(loss), bool(spike))
        finally:
            self._busy = False
        taken = self._nonfinite == "propagate" and not spike
        what = "the step was taken as it was" if taken else "the step was skipped"
        if self._nonfinite == "raise":
            raise FloatingPointError(f"{found.headline}\n  raised by initlab.guard; {what}{_saved(found)}")
        if found in self._examined:
            warn(f"{found.headline}; {what}{_saved(found)}")

    def _handle(self, record: StepRecord, loss: bool, spike: bool) -> BadStep:
        self._bad, self._last = self._bad + 1, record.step
        if self._nonfinite != "propagate" or spike:
            self._skipped += 1
            if self._held is not None:  # what followed was skipped as well
                self._skipped += len(self._pending)
                self._pending, self._held = [], None
            if record.passes:
                record.passes[0].state.restore_buffers()
        found = self._described(record, loss)
        due = self._bad == 10 ** len(self._examined) and len(self._examined) < self._limit
        if due or (self._nonfinite == "raise" and not self._examined):
            found = self._examine(record, found)
            self._examined.append(found)
        return found

    def _described(self, record: StepRecord, loss: bool) -> BadStep:
        """A bad step before it is examined."""
        report, losses = record.report, [float(x) for ran in record.passes for x in ran.losses]
        shown = next((x for x in losses if not math.isfinite(x)), losses[-1] if losses else None)
        parameter = report.first_bad
        if loss:
            own = shown is not None and not math.isfinite(shown)
            reason = f"the loss is {shown}" if own else "the loss is not finite on another rank"
        elif parameter is not None:
            reason = f"the gradient of {parameter} is not finite"
        else:
            reason = f"the gradient norm {float(report.norm):.4g} is a spike"
        return BadStep(record.step, reason, float(report.norm), shown, parameter)

    def _examine(self, record: StepRecord, found: BadStep) -> BadStep:
        """Run a bad step again, and save what it was."""
        fields = {"step": found.step, "reason": found.reason, "norm": found.norm, "loss": found.loss}
        fields["parameter"] = found.parameter
        if not record.passes:
            note = "no diagnosis: no batch was noted; call guard.batch(batch) before each forward pass"
            return BadStep(**fields, notes=(note,))  # type: ignore[arg-type]
        notes: list[str] = []
        place: int | None = 0
        if len(record.passes) > 1:
            place = self._examiner.culprit(record.passes)
            if place is None:
                notes.append(f"none of its {len(record.passes)} micro-batches is bad by itself; this is the first")
        ran = record.passes[place or 0]
        diagnosis, watched, more = self._examiner.diagnose(ran)
        if diagnosis is not None:
            diagnosis = self._history.refined(diagnosis, record.step - 1)
        fields |= {"diagnosis": diagnosis, "watched": watched, "notes": (*notes, *more)}
        fields["micro_batch"] = place if len(record.passes) > 1 else None
        found = BadStep(**fields)  # type: ignore[arg-type]
        if self._folder is None:
            return found
        rank = torch.distributed.get_rank() if self._examiner.groups else None
        first = rank is None or rank == min(
            min(torch.distributed.get_process_group_ranks(group)) for group in self._examiner.groups
        )
        models = {"": unwrapped(self._model)} | {
            f"loss_fn.{i}.": one for i, one in enumerate(referenced_modules(self._loss_fn))
        }
        try:
            saved = save(self._folder, found, ran, models, rank, first, self._lang)
        except OSError as error:
            return BadStep(**fields | {"notes": (*found.notes, f"could not be saved: {error}")})  # type: ignore[arg-type]
        return BadStep(**fields | {"saved": saved})  # type: ignore[arg-type]


def guard(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    loss_fn: LossFn,
    nonfinite: Policy = "skip",
    max_norm: float = math.inf,
    spikes: SpikePolicy | None = None,
    scaler: torch.amp.GradScaler | None = None,
    folder: str | Path | None = None,
    budget: float = LIMITS.budget,
    limit: int = 3,
    across: Any = None,
    log: Any = None,
    log_every: int = 50,
    lang: str = "en",
) -> TrainingGuard:
    """Guard a training loop: a bad step is left out, and diagnosed on the spot.

    A step is bad if a loss that was noted or a gradient holds NaN or inf, on any rank, or if its norm is a spike that
    `spikes` skips. Then no weight, moment, counter or buffer changes. The batch runs again from the buffers and random
    numbers that it had, as `initlab.diagnose` runs it, and the diagnosis and the batch are saved. The first bad step is
    examined, then the tenth and the hundredth, up to `limit`; the others are skipped and counted.

    A healthy run is that of the same loop with `initlab.GradClipper`, bit for bit. Nothing waits for a GPU, but that
    the host gets no more than a step ahead of it: so there the step that follows a bad one is skipped too.

    Under a GradScaler gradients overflow now and then, and the scaler leaves such steps out. The batch then runs once
    more without a scale; only where its gradients are not finite even so is the step bad.

    Args:
        model: as it trains, in its wrappers (DDP, FSDP2, torch.compile) or not.
        optimizer: one, or several that step after one backward pass.
        loss_fn: called with the model and the batch, returns the loss, one element; autocast belongs in it.
        nonfinite: what to do in a bad step. "skip": leave it out, warn, go on; "raise": leave it out and raise;
            "propagate": warn and take it as it is.
        max_norm: as for GradClipper; inf only measures.
        spikes: as for GradClipper. With action="skip" spikes are bad steps.
        scaler: the GradScaler whose step() steps the optimizer.
        folder: where diagnoses and batches are saved; None writes nothing.
        budget: seconds for a diagnosis.
        limit: how many bad steps are diagnosed.
        across: ranks that step together, as for `initlab.diagnose`; found by itself where the model is in DDP or FSDP.
            False where each rank trains by itself.
        log: where to log norm, loss, clipped share, spikes and the largest gradients: the path of a CSV file,
            TensorBoard's SummaryWriter, a run of W&B, a function of a dict, or a list of these.
        log_every: steps between two rows; only then is anything read from the device.
        lang: of the text and the page that are saved: "en", or "zh" for Chinese. Warnings and errors are English.

    Returns:
        A `TrainingGuard`: a context manager with step(batch), or batch(batch) and loss(loss) for a loop of your own.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: for what GradClipper does not take, for another language, or where other ranks are there and
            `across` must say which.
        RuntimeError: if the optimizer is guarded, or has a GradClipper, already.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> batches = [(torch.tensor([[1.0, x]]), torch.zeros(1, 1)) for x in (1.0, 2.0)]
        >>> with initlab.guard(model, optimizer, loss_fn=initlab.supervised(torch.nn.MSELoss())) as guard:
        ...     losses = [guard.step(batch) for batch in batches]
        >>> print(guard.report())
        2 steps: 0 bad, 0 skipped, 0 clipped
    """
    return TrainingGuard(
        model,
        optimizer,
        loss_fn=loss_fn,
        nonfinite=nonfinite,
        max_norm=max_norm,
        spikes=spikes,
        scaler=scaler,
        folder=folder,
        budget=budget,
        limit=limit,
        across=across,
        log=log,
        log_every=log_every,
        lang=lang,
    )


def _saved(found: BadStep) -> str:
    return f"; saved: {found.saved[0].parent}" if found.saved else ""
