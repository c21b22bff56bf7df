"""GradClipper and TrainingGuard as callbacks of Lightning's Trainer."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..clipping import GradClipper
from ..guarding import GuardReport, TrainingGuard

# lightning and pytorch_lightning hold the same code twice: derive from the one that the program uses. Without either
# this module can be imported, and no Trainer would take its callback.
try:
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import Callback
    else:
        from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        Callback = object


class GradClipperCallback(Callback):
    """Clips gradients in every step of the Trainer's optimizers, and keeps steps with NaN or inf out of the weights.

    Makes a GradClipper for each optimizer when training starts, and removes them when it ends, also where it ends by
    an exception. Under automatic optimization there is one optimizer. Under manual optimization several mostly step
    apart, as those of a GAN do, so each has a norm of its own. Works with precision="16-mixed" and its GradScaler.

    Counts are in the Trainer's checkpoints, and go on where fit() resumes from one.

    Args:
        max_norm: more than 0; inf only measures and guards.
        nonfinite: what to do in a step with NaN or inf in a gradient: "skip", "raise", "zero" or "propagate".
        together: take one norm over all optimizers, and one decision, as for Muon beside AdamW.
        options: what else `GradClipper` takes.

    Attributes:
        clippers: the GradClippers, in the order of configure_optimizers(), or one with together=True. Empty before
            training; kept when it is over, for their stats().

    Raises:
        RuntimeError: when training starts, if the Trainer clips too (gradient_clip_val).
        ValueError: then, for what `GradClipper` does not take, or a checkpoint of another number of optimizers.

    Example::

        from initlab.integrations.lightning import GradClipperCallback
        trainer = lightning.Trainer(callbacks=[GradClipperCallback(max_norm=1.0)])
    """

    def __init__(self, max_norm: float, nonfinite: str = "skip", *, together: bool = False, **options: Any) -> None:
        super().__init__()
        self.clippers: list[GradClipper] = []
        self._max_norm, self._together = max_norm, together
        self._options: dict[str, Any] = {"nonfinite": nonfinite, **options}
        self._loaded: list[dict[str, Any]] | None = None  # of a checkpoint, which is read before there are optimizers

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the GradClippers."""
        if trainer.gradient_clip_val:
            raise RuntimeError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips before GradClipperCallback measures: "
                "each gradient would be read twice, and one NaN be spread over all; leave gradient_clip_val out"
            )
        optimizers = [trainer.optimizers] if self._together else trainer.optimizers
        loaded, self._loaded = self._loaded, None
        if loaded is not None and len(loaded) != len(optimizers):
            raise ValueError(f"the checkpoint holds {len(loaded)} GradClippers, and here are {len(optimizers)}")
        names, scaler = list(pl_module.named_parameters()), getattr(trainer.precision_plugin, "scaler", None)
        options: dict[str, Any] = {"named_parameters": names, "scaler": scaler, **self._options}
        self.clippers = []  # one by one: those that were made are removed if the next one cannot be
        for optimizer in optimizers:
            self.clippers.append(GradClipper(optimizer, self._max_norm, **options))
        for clipper, state in zip(self.clippers, loaded or (), strict=False):
            clipper.load_state_dict(state)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the optimizers as they were before."""
        for clipper in reversed(self.clippers):
            clipper.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the optimizers as they were before."""
        for clipper in reversed(self.clippers):
            clipper.remove()

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain numbers; Lightning puts them into its checkpoints."""
        return {"clippers": [clipper.state_dict() for clipper in self.clippers]} if self.clippers else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these counts when training starts."""
        self._loaded = state_dict["clippers"]


class TrainingGuardCallback(Callback):
    """Guards the Trainer's steps, as `initlab.guard` does: bad ones are left out, diagnosed and saved.

    It gives the guard each batch and its loss. For a diagnosis the module's training_step runs again on the batch; what
    it logs then is dropped. Works with accumulate_grad_batches, and with precision="16-mixed" and its GradScaler.

    Args:
        max_norm: as for GradClipper; inf only measures and guards.
        options: what else `initlab.guard` takes, but loss_fn and scaler.

    Attributes:
        guard: the TrainingGuard; None before training, kept when it is over.

    Raises:
        RuntimeError: when training starts, if the Trainer clips too (gradient_clip_val).
        NotImplementedError: then, under manual optimization, where training_step itself steps.

    Example::

        from initlab.integrations.lightning import TrainingGuardCallback
        trainer = lightning.Trainer(callbacks=[TrainingGuardCallback(folder="guard")])
    """

    def __init__(self, max_norm: float = math.inf, **options: Any) -> None:
        super().__init__()
        self.guard: TrainingGuard | None = None
        self._options: dict[str, Any] = {"max_norm": max_norm, **options}
        self._position = {"batch_idx": 0}  # apart from the callback: a diagnosis copies what it reaches
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the guard."""
        if trainer.gradient_clip_val:
            raise RuntimeError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips before TrainingGuardCallback measures; "
                "leave it out, and pass max_norm to the callback"
            )
        if not pl_module.automatic_optimization:
            raise NotImplementedError(
                "under manual optimization training_step itself steps, so it cannot run again for a diagnosis; use "
                "initlab.guard in training_step, with guard.batch(batch) and guard.loss(loss)"
            )

        context, position = trainer.precision_plugin.train_step_context, self._position

        def loss_fn(module: Any, batch: Any) -> Tensor:
            takes_index = "batch_idx" in inspect.signature(module.training_step).parameters
            with _without_logging(module), context():
                output = module.training_step(batch, *([position["batch_idx"]] if takes_index else []))
            loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
            return loss

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        options = {"scaler": scaler, "across": True if trainer.world_size > 1 else None, **self._options}
        self.guard = TrainingGuard(pl_module, trainer.optimizers, loss_fn=loss_fn, **options)
        if self._loaded is not None:
            self.guard.clipper.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the batch."""
        assert self.guard is not None
        self._position["batch_idx"] = batch_idx
        self.guard.batch(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Note the loss, which a GradScaler has scaled."""
        assert self.guard is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = loss.detach()
        self.guard.loss(loss if scaler is None else loss / scaler.scale(loss.new_ones(())))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the optimizer as it was before."""
        if self.guard is not None:
            self.guard.__exit__(None, None, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the optimizer as it was before."""
        if self.guard is not None:
            self.guard.remove()

    def report(self) -> GuardReport:
        """What the guard has seen.

        Raises:
            RuntimeError: before training.
        """
        if self.guard is None:
            raise RuntimeError("there is no report before training; call trainer.fit first")
        return self.guard.report()

    def state_dict(self) -> dict[str, Any]:
        """The clipper's counts, as plain numbers; Lightning puts them into its checkpoints."""
        return {} if self.guard is None else {"clipper": self.guard.clipper.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these counts when training starts."""
        self._loaded = state_dict.get("clipper")


@contextlib.contextmanager
def _without_logging(module: Any) -> Iterator[None]:
    """Lets a module's log() and log_dict() do nothing: what runs again was logged the first time."""
    names = [name for name in ("log", "log_dict") if name not in vars(module)]
    for name in names:
        vars(module)[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in names:
            vars(module).pop(name, None)
