"""The optimizers of a script: the gradients that they use and leave, and what becomes of their updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from .loop import Line

_SAMPLED = 64  # elements of one parameter, which stand for all
_NORMS = 20  # first steps of which the gradients' norm is kept, and then of every 25th
_EVERY = 25
_SAME = 1e-3  # relative, of norms that a clipping has made equal


@dataclass
class _Left:
    """The gradient that a step of an optimizer has used: of one parameter, which stands for all.

    Args:
        kept: whether every backward pass since then has found it as it was, or with something added.
        passes: backward passes since then.
        steps: in a row that used the gradients of the step before once more.
    """

    parameter: Tensor
    gradient: Tensor
    kept: bool = True
    passes: int = 0
    steps: int = 0


@dataclass
class Updates:
    """What one optimizer's steps did.

    Args:
        steps: that it took.
        idle: of them, those before which none of its parameters had a gradient.
        norms: of all its gradients, in some of the steps.
        changed: how often a parameter was not what the last step had made it when the next one began.
        undone: what of the last step was taken back then, summed over these times; 1 is all of it.
    """

    steps: int = 0
    idle: int = 0
    norms: list[float] = field(default_factory=list)
    changed: int = 0
    undone: float = 0.0
    _parameter: Tensor | None = None
    _before: Tensor | None = None
    _after: Tensor | None = None

    @property
    def clipped_to(self) -> float | None:
        """The norm that the gradients have in every step that was looked at; None where it varies."""
        if len(self.norms) < _NORMS // 4 or not max(self.norms) or not math.isfinite(max(self.norms)):
            return None
        return max(self.norms) if min(self.norms) > (1 - _SAME) * max(self.norms) else None

    @property
    def taken_back(self) -> float:
        """The share of a step that something else undoes before the next one, where it does so nearly always."""
        return self.undone / self.changed if self.steps > 1 and self.changed > 0.9 * (self.steps - 1) else 0.0

    def before(self, gradients: list[Tensor], parameters: list[Tensor]) -> None:
        """Note what a step begins with."""
        self.steps += 1
        self.idle += not gradients
        plain = [g for g in gradients if _is_plain(g) and g.device.type == "cpu"]
        if plain and (len(self.norms) < _NORMS or self.steps % _EVERY == 0):
            self.norms.append(float(torch.nn.utils.get_total_norm(plain)))
        if self._parameter is None or self._parameter.grad is None:
            own = [p for p in parameters if _is_plain(p.grad) and p.device.type == "cpu" and p.is_floating_point()]
            self._parameter, self._after = min(own, key=Tensor.numel, default=None), None
        if self._parameter is None:
            return
        now = _sample(self._parameter)
        if self._after is not None and self._before is not None and not torch.equal(now, self._after):
            step = self._after - self._before
            size = float(step.square().sum())
            self.changed += 1
            self.undone += float(((self._after - now) * step).sum()) / size if size else 0.0
        self._before = now

    def after(self) -> None:
        """Note what a step has made of it."""
        self._after = None if self._parameter is None else _sample(self._parameter)


class Optimizers:
    """The optimizers of a script that take steps."""

    def __init__(self) -> None:
        self.seen: list[Optimizer] = []
        self.steps = 0
        self.left: dict[int, _Left] = {}  # by the optimizer's id, as what follows
        self.updates: dict[int, Updates] = {}

    def before_backward(self) -> None:
        """Note which gradients are to be added to."""
        for left in self.left.values():
            left.passes += 1
            left.kept = left.kept and left.parameter.grad is left.gradient and bool(left.gradient.any())

    def before_step(self, optimizer: Optimizer) -> list[Tensor]:
        """Note a step; returns the gradients that it is about to use."""
        if not any(optimizer is other for other in self.seen):
            self.seen.append(optimizer)
        self.steps += 1
        parameters = list(held_by((optimizer,)))
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.updates.setdefault(id(optimizer), Updates()).before(gradients, parameters)
        last = self.left.pop(id(optimizer), None)
        parameter = last.parameter if last is not None else None
        if parameter is None or parameter.grad is None:
            parameter = min((p for p in parameters if _is_plain(p.grad)), key=Tensor.numel, default=None)
        if parameter is not None and parameter.grad is not None:
            again = last is not None and last.kept and last.passes > 0
            steps = last.steps + 1 if last is not None and again else 0
            self.left[id(optimizer)] = _Left(parameter, parameter.grad, steps=steps)
        return gradients

    def after_step(self, optimizer: Optimizer) -> None:
        """Note what a step has done."""
        if (updates := self.updates.get(id(optimizer))) is not None:
            updates.after()

    def used_again(self, line: Line) -> int:
        """How many steps in a row have used the gradients of those before, of what a loss reaches."""
        return max((one.steps for one in self.left.values() if id(one.parameter) in line.reached), default=0)


def held_by(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    """All parameters of some optimizers."""
    return (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])


def _is_plain(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout == torch.strided and not gradient.is_inference()


def _sample(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:_SAMPLED].double()
