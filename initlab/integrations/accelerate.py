"""TrainingGuard in loops of Hugging Face's accelerate."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..diagnosis.probes import LossFn
from ..guarding import TrainingGuard


class AcceleratedGuard(TrainingGuard):
    """A TrainingGuard whose step() leaves the backward pass, accumulation and the GradScaler to an Accelerator.

    A loop of your own needs no such class: `initlab.guard(model, optimizer, loss_fn=..., scaler=accelerator.scaler)`
    with guard.batch(batch) and guard.loss(loss).

    Args:
        accelerator: which has prepared model and optimizer.
        model, optimizer: as prepare() returned them.
        loss_fn: called with the model and the batch, returns the loss.
        options: what else `initlab.guard` takes, but scaler.

    Example::

        with AcceleratedGuard(accelerator, model, optimizer, loss_fn=loss_fn, folder="guard") as guard:
            for batch in loader:
                guard.step(batch)
    """

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: Any, *, loss_fn: LossFn, **options: Any) -> None:
        self._accelerator = accelerator
        super().__init__(model, optimizer, loss_fn=loss_fn, scaler=accelerator.scaler, **options)

    def step(self, batch: Any) -> Tensor:
        """One batch: a training step, or with gradient_accumulation_steps a part of one."""
        with self._accelerator.accumulate(self._model):
            self.batch(batch)
            loss = self.loss(self._loss_fn(self._model, batch))
            self._accelerator.backward(loss)
            for optimizer in self._given:
                optimizer.step()
                optimizer.zero_grad()
        return loss.detach()
