"""The GradClipper of a guard: what it measures is judged before anything is decided, and each step's end is heard."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

from ..clipping import GradClipper
from ..clipping.optimizers import hooked_optimizer
from ..clipping.steps import Measurement, runs_inside_another


class Judge(Protocol):
    """Who hears of steps."""

    def judge(self, measured: Measurement) -> Measurement:
        """Called with what was measured, before anything is decided; what is returned decides."""

    def end_step(self) -> None:
        """Called when all optimizers have stepped, or a GradScaler has left a step out."""


class GuardedClipper(GradClipper):
    """A GradClipper that asks a judge in each step. Arguments are those of GradClipper.

    Args:
        judge: kept by a weak reference: a guard that is gone judges nothing.
    """

    def __init__(self, judge: Judge, optimizer: Any, max_norm: float, nonfinite: Any, **options: Any) -> None:
        self._judge = weakref.ref(judge)
        super().__init__(optimizer, max_norm, nonfinite, **options)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("the clipper of a guard cannot be copied nor pickled; save its state_dict()")

    def _measure(self) -> Measurement | None:
        measured, judge = super()._measure(), self._judge()
        return measured if measured is None or judge is None else judge.judge(measured)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._after_step(optimizer, args, kwargs)
        all_stepped = self._round is None or len(self._round.stepped) == len(self._optimizers)
        judge = self._judge()
        if judge is not None and all_stepped and not runs_inside_another(optimizer):
            judge.end_step()

    def _step_of_scaler(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        before, judge = self._hook_runs, self._judge()
        result = super()._step_of_scaler(optimizer, *args, **kwargs)
        # It has left the step out. Of several optimizers the last one ends it.
        if judge is not None and self._hook_runs == before and hooked_optimizer(optimizer) is self._optimizers[-1]:
            with torch.enable_grad():
                judge.end_step()
        return result
