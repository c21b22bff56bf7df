"""Whether a run had left its path before the step that broke: a diagnosis starts at that step, and cannot know."""

from __future__ import annotations

import dataclasses
import math
from collections import deque

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..diagnosis import Cause, Diagnosis, Place
from ..diagnosis.limits import LIMITS
from ..distributed.dtensors import local

_GROWTH = 10.0  # times the norm of all weights; from a usual start a healthy run stays within 3
_KEPT = 16  # losses


class History:
    """The size of the weights when a guard began, and the last losses. Nothing is read from the device until asked.

    Args:
        model: whose weights they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {n: p for n, p in model.named_parameters() if not is_lazy(p) and not p.is_meta}
        self._start = self._norms()
        self._losses: deque[Tensor] = deque(maxlen=_KEPT)

    def record(self, losses: list[Tensor]) -> None:
        """The losses of one more step."""
        self._losses.extend(losses)

    def refined(self, found: Diagnosis, steps: int) -> Diagnosis:
        """A diagnosis with what the history adds.

        Where weights have grown out of all proportion, that comes first, and that they are uninitialised is left out:
        they were in order when the guard began.

        Args:
            found: of the bad step alone.
            steps: that were taken before it.
        """
        cause = self._cause(steps)
        if cause is None:
            return found
        written = [one for one in found.causes if one.kind != "uninitialised" or one.place.parameter not in self._start]
        return dataclasses.replace(found, causes=(cause, *written))

    def _norms(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: torch.linalg.vector_norm(local(p).detach().double()) for name, p in self._parameters.items()}

    def _cause(self, steps: int) -> Cause | None:
        start = {name: float(norm) for name, norm in self._start.items()}
        now = {name: float(norm) for name, norm in self._norms().items()}
        before, after = math.hypot(*start.values()), math.hypot(*now.values())
        losses = [x for x in (float(loss) for loss in self._losses) if math.isfinite(x)]
        rose = len(losses) < 2 or max(losses) >= LIMITS.blow_up * abs(min(losses))
        if not steps or not 0.0 < before < math.inf or after < _GROWTH * before or not rose:
            return None
        name = max(now, key=lambda name: now[name] if now[name] == now[name] else math.inf)
        return Cause(
            "learning rate",
            "broken",
            Place(parameter=name),
            f"the weights grew {after / before:.3g} times in the {steps} steps before this one, {name} most: those "
            "steps were too large, and this one only where it came to light. Go back to weights from before them.",
            {"losses before": [float(f"{loss:.4g}") for loss in losses[-8:]], "norm of weights": after},
            'for group in optimizer.param_groups:\n    group["lr"] *= 0.01  # and load a checkpoint, or start anew',
        )
