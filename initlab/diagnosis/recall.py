"""How far back in time a recurrent model remembers: what its first steps say may not reach the loss at all."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .limits import LIMITS
from .probes import FOR_THE_CALLER, TrainingStep

_LOOPED = (nn.RNNCellBase, nn.Linear)  # what a recurrence by hand calls once in each step


class Forgotten(NamedTuple):
    """A recurrence whose first steps get no gradient to speak of.

    Args:
        module: its path.
        steps: in time.
        ratio: the largest gradient of the first quarter of the steps, against the largest of all.
    """

    module: str
    steps: int
    ratio: float

    @property
    def explanation(self) -> str:
        """What happens, in a sentence."""
        return (
            f"the gradient vanishes in time: in {self.module or 'the model'} the first of {self.steps} steps get "
            f"{self.ratio:.1g} times the gradient of the last ones, so what they say cannot be learned."
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The evidence."""
        return {"steps in time": self.steps, "first steps against last": self.ratio}

    @property
    def remedy(self) -> str:
        """An advice."""
        return (
            "# a shorter way from the first steps to the loss: an average or attention over all outputs, shorter "
            "sequences, nn.LSTM or nn.GRU; and no padding between the last word and the output that is read"
        )


def find_forgotten(training_step: TrainingStep) -> Forgotten | None:
    """Run one pass, and compare the gradients of a recurrence's inputs over time; everything is put back."""
    if not any(isinstance(module, (nn.RNNBase, *_LOOPED)) for module in training_step.model.modules()):
        return None
    sizes: dict[str, dict[int, float]] = defaultdict(dict)
    calls: dict[str, int] = defaultdict(int)

    def note(path: str, step: int, gradient: Tensor) -> None:
        sizes[path][step] = float(gradient.detach().double().norm())

    def note_all(path: str, dim: int, gradient: Tensor) -> None:
        for step, part in enumerate(gradient.detach().double().unbind(dim)):
            sizes[path][step] = float(part.norm())

    def before(path: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return None
        value = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        if isinstance(module, nn.RNNBase):
            value.register_hook(functools.partial(note_all, path, 1 if module.batch_first and value.dim() == 3 else 0))
        else:
            value.register_hook(functools.partial(note, path, calls[path]))
            calls[path] += 1
        return (value, *args[1:])

    training_step.snapshot.restore()
    training_step.clear_gradients()
    handles = [
        module.register_forward_pre_hook(functools.partial(before, path))
        for path, module in training_step.model.named_modules()
        if isinstance(module, (nn.RNNBase, *_LOOPED))
    ]
    try:
        with torch.enable_grad():
            training_step.loss().backward()
    except FOR_THE_CALLER:
        raise
    except Exception:  # it is evidence only where it runs
        sizes.clear()
    finally:
        for handle in handles:
            handle.remove()
        training_step.snapshot.restore()
    for path, by_step in sizes.items():
        count = max(calls[path], len(by_step))
        largest = max(by_step.values())
        if count >= LIMITS.recurrence and largest > 0:
            first = max((size for step, size in by_step.items() if step < count / 4), default=0.0)
            if first < LIMITS.forgotten * largest:
                return Forgotten(path, count, first / largest)
    return None
