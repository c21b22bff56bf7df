"""GradClipper and TrainingGuard in the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..clipping import ClipReport, GradClipper
from ..guarding import TrainingGuard

# Without transformers this module can be imported, and there is no Trainer to derive from.
try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError:
    ExportableState, TrainerCallback = type("ExportableState", (), {}), type("TrainerCallback", (), {})


class GradClipperMixin:
    """Lets a GradClipper clip in place of the Trainer's own call, in any class derived from transformers.Trainer.

    Name it first. TrainingArguments.max_grad_norm stays what it is, the largest norm; 0 only measures and guards. The
    Trainer reads gradients once instead of twice, logs the same `grad_norm`, and a step with NaN or inf in a gradient
    changes no weight, moment or step count. The learning rate's schedule and global_step go on in such a step.

    Counts are in the checkpoints (trainer_state.json), and go on where train() resumes from one.

    A callback alone could not do this: the Trainer clips before it calls any, and its clip writes NaN into all
    gradients where one holds it, so that no report could name the first.

    Args:
        clipper_options: what `GradClipper` takes beside the optimizer and max_norm, such as {"nonfinite": "raise"}.
        args, kwargs: the Trainer's.

    Attributes:
        clipper: the GradClipper of this training, or of the last one; None before the first step.

    Raises:
        RuntimeError: if the class behind it has no `_clip_grad_norm` and `_get_grad_norm`, which this overrides.

    Example::

        class Trainer(initlab.integrations.transformers.GradClipperMixin, transformers.Trainer): ...
        trainer = Trainer(model, TrainingArguments(max_grad_norm=1.0), train_dataset=data)
    """

    def __init__(self, *args: Any, clipper_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name in ("_clip_grad_norm", "_get_grad_norm"):
            if not hasattr(super(), name):
                raise RuntimeError(
                    f"{type(self).__name__} has no {name} behind GradClipperMixin: name the mixin first, then a "
                    "Trainer that has it, as that of transformers 5.24; or pass an optimizer of your own, and put "
                    "initlab.GradClipper around it"
                )
        super().__init__(*args, **kwargs)
        self.clipper: GradClipper | None = None
        self._clipper_options = clipper_options or {}
        self.add_callback(GradClipperState())  # type: ignore[attr-defined]

    def _clip_grad_norm(self, model: torch.nn.Module) -> None:
        """Nothing: the step will clip."""

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Tensor:
        """What the step is going to fill with the norm. The Trainer reads it when it logs, after the step."""
        trainer: Any = self
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GradClipperState))
        if callback.clipper is None:
            self.clipper = callback.clipper = self._make_clipper(trainer)
        callback.norm = torch.full((), math.nan, device=trainer.args.device)
        return callback.norm

    def _make_clipper(self, trainer: Any) -> GradClipper:
        names, scaler = trainer.model.named_parameters(), trainer.accelerator.scaler
        options: dict[str, Any] = {"named_parameters": names, "scaler": scaler, **self._clipper_options}
        clipper = GradClipper(trainer.optimizer, trainer.args.max_grad_norm or math.inf, **options)
        self._load_counts(trainer, clipper)
        return clipper

    def _load_counts(self, trainer: Any, clipper: GradClipper) -> None:
        # The Trainer itself hands states back only with restore_callback_states_from_checkpoint=True.
        saved = trainer.state.stateful_callbacks.get(GradClipperState.__name__)
        if trainer.state.global_step > 0 and saved is not None and saved["attributes"]["saved"] is not None:
            clipper.load_state_dict(saved["attributes"]["saved"])


class TrainingGuardMixin(GradClipperMixin):
    """Guards the Trainer's steps, as `initlab.guard` does, in any class derived from transformers.Trainer.

    Name it first. It is a GradClipperMixin, and gives the guard each batch, as the model gets it, and its loss. For a
    diagnosis the Trainer's compute_loss runs again. Works with gradient_accumulation_steps, fp16 and bf16.

    Args:
        guard_options: what `initlab.guard` takes but loss_fn, max_norm and scaler, such as {"folder": "guard"}.
        args, kwargs: the Trainer's.

    Attributes:
        guard: the TrainingGuard of this training, or of the last one; None before the first step.

    Example::

        class Trainer(initlab.integrations.transformers.TrainingGuardMixin, transformers.Trainer): ...
        trainer = Trainer(model, arguments, train_dataset=data, guard_options={"folder": "guard"})
    """

    def __init__(self, *args: Any, guard_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard: TrainingGuard | None = None
        self._guard_options = guard_options or {}
        self._guards = False
        self._num_items: Any = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, guarded."""
        self._guards = False
        try:
            result = super().train(*args, **kwargs)  # type: ignore[misc]
            if self._guards and self.guard is not None:
                self.guard.report()  # reads what the device has still to say
            return result
        finally:
            if self._guards and self.guard is not None:
                self.guard.remove()

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's own; the guard is told of the batch and the loss."""
        trainer: Any = self
        if not self._guards:
            self.guard, self._guards = self._make_guard(trainer, model), True
        assert self.guard is not None
        inputs, self._num_items = trainer._prepare_inputs(inputs), num_items_in_batch
        self.guard.batch(dict(inputs))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        return self.guard.loss(loss)

    def _make_guard(self, trainer: Any, model: torch.nn.Module) -> TrainingGuard:
        def loss_fn(model: Any, batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                loss: Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=self._num_items)
            return loss.mean()

        options: dict[str, Any] = {"scaler": trainer.accelerator.scaler, **self._guard_options}
        max_norm = trainer.args.max_grad_norm or math.inf
        guard = TrainingGuard(model, trainer.optimizer, loss_fn=loss_fn, max_norm=max_norm, **options)
        self._load_counts(trainer, guard.clipper)
        return guard

    def _make_clipper(self, trainer: Any) -> GradClipper:
        assert self.guard is not None
        return self.guard.clipper


class GradClipperState(TrainerCallback, ExportableState):
    """What GradClipperMixin adds to its Trainer: keeps the clipper's counts in checkpoints, and fills in the norm.

    Attributes:
        clipper: the GradClipper while training runs.
        norm: where the norm of the step at hand belongs, 0-d; stays NaN if a GradScaler drops the step.
    """

    def __init__(self) -> None:
        self.clipper: GradClipper | None = None
        self.norm: Tensor | None = None
        self.saved: dict[str, Any] | None = None  # where the Trainer puts what state() returned
        self._report: ClipReport | None = None

    def state(self) -> dict[str, Any]:
        """The counts, as plain numbers."""
        return {"args": {}, "attributes": {"saved": None if self.clipper is None else self.clipper.state_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove what a training that was interrupted has left."""
        self._remove()
        # When it saves, the Trainer looks for what the checkpoint that it resumed from says of this callback.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fill in the norm; nothing waits for it."""
        if self.clipper is None or self.norm is None or self.clipper.report is self._report:
            return
        self._report = self.clipper.report
        assert self._report is not None
        self.norm.copy_(self._report.norm)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was before."""
        self._remove()

    def _remove(self) -> None:
        if self.clipper is not None:
            self.clipper.remove()
        self.clipper = self.norm = self._report = None
