"""Which way a loss pushes: towards what it is compared with, or away from it.

A hook on a known quantity reads the gradient that the backward pass brings to it. A distance that the loss subtracts, a
likelihood that it adds, and a divergence with the wrong sign all have a slope of the wrong sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from initlab.kernels.torch_internals import without_functions

Quantity = Literal["distance", "loss", "likelihood", "divergence"]

_MOST = 64  # quantities that are watched
_KEPT = 16  # tensors of each sort that are compared with what comes later
_LARGEST = 1 << 20  # elements of a tensor that is kept for a comparison
_SIDES = 0.999  # share of a slope that has one sign
_FACTORS = (-0.5, 0.5, 1.0, -1.0)


@dataclass
class Slope:
    """How a loss changes with a quantity that it is to make smaller.

    Args:
        what: "distance" from a target, the value of a "loss" function, the negative of a "likelihood", or a
            "divergence" of Gaussians.
        op: the function of torch that gave it.
        away: the share of the slope that makes it larger; None where no gradient came.
    """

    what: Quantity
    op: str
    away: float | None = None

    @property
    def is_away(self) -> bool:
        """Whether a smaller loss asks for more of it, in every element."""
        return self.away is not None and self.away > _SIDES


class Slopes:
    """Watches the quantities of one pass; the backward pass fills in their slopes."""

    def __init__(self) -> None:
        self.found: list[Slope] = []
        self._handles: list[Any] = []
        self._logs: list[tuple[Tensor, Tensor]] = []  # a logarithm, and what it is of
        self._squares: list[Tensor] = []
        self._normalisers: list[Tensor] = []  # results of logsumexp
        self._likelihoods: list[Tensor] = []  # log-probabilities of classes

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        for kept in (self._handles, self._logs, self._squares, self._normalisers, self._likelihoods):
            kept.clear()

    @property
    def wrong(self) -> Slope | None:
        """The first that is away, where no other of its sort is not: losses may also tell things apart."""
        for one in self.found:
            alike = [other for other in self.found if other.what == one.what and other.away is not None]
            if one.is_away and all(other.is_away for other in alike):
                return one
        return None

    def called(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        """A function of torch has returned."""
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.numel() > _LARGEST:
            return
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None:
            return
        if name == "exp":
            self._keep(self._logs, (first.detach(), out.detach()))
        elif name == "log":
            self._keep(self._logs, (out.detach(), first.detach()))
        elif name in ("pow", "square") or (name == "mul" and len(args) > 1 and args[0] is args[1]):
            self._keep(self._squares, out.detach())
        elif name == "logsumexp":
            self._keep(self._normalisers, out)
        elif name in ("sum", "mean") and first.requires_grad:
            sign = self._divergence(first)
            if sign:
                self._watch(Slope("divergence", name), out, lambda g: sign * g)
        elif not out.requires_grad:
            return
        elif name == "log_softmax" or (name == "sub" and len(args) > 1 and _is_one_of(args[1], self._normalisers)):
            self._keep(self._likelihoods, out)
            self._watch(Slope("likelihood", "log_softmax"), out, _of_one_class)
        elif name in ("gather", "index") and _is_one_of(first, self._likelihoods):
            self._watch(Slope("likelihood", name), out, lambda g: -g)

    def _keep(self, those: list[Any], one: Any) -> None:
        those.append(one)
        del those[:-_KEPT]

    def compared(self, op: str, difference: Tensor) -> None:
        """A difference between what the model puts out and a target of the batch."""
        if difference.requires_grad:
            kept = difference.detach()
            self._watch(Slope("distance", op), difference, lambda g: g * kept)

    def of_loss(self, op: str, value: Tensor) -> None:
        """The value of a loss function of torch's."""
        if value.requires_grad:
            self._watch(Slope("loss", op), value, lambda g: g)

    def _watch(self, slope: Slope, tensor: Tensor, towards: Any) -> None:
        if len(self.found) >= _MOST:
            return
        self.found.append(slope)

        def read(gradient: Tensor) -> None:
            with torch.no_grad(), without_functions():
                along = towards(gradient.detach()).double()
                total = float(along.abs().sum())
                slope.away = float(along.clamp_max(0).abs().sum()) / total if total > 0 else None

        self._handles.append(tensor.register_hook(read))

    def _divergence(self, terms: Tensor) -> float:
        """The sign of a divergence of Gaussians in what is summed, 1 + log(v) - m ** 2 - v; 0.0 if it is none."""
        if terms.numel() > _LARGEST:
            return 0.0
        x = terms.detach().double()
        for log, value in self._logs:
            if value.shape != x.shape:
                continue
            rest = 1 + log.double() - value.double()
            for square in self._squares:
                if square.shape != x.shape:
                    continue
                whole = rest - square.double()
                for factor in _FACTORS:
                    if torch.allclose(x, factor * whole, rtol=1e-3, atol=1e-5):
                        return -1.0 if factor > 0 else 1.0
        return 0.0


def _is_one_of(value: Any, tensors: list[Tensor]) -> bool:
    return any(value is one for one in tensors)


def _of_one_class(gradient: Tensor) -> Tensor:
    """The slope of minus the log-probability of one class in each row; nothing of it where a row has more."""
    if gradient.dim() < 2:
        return torch.zeros_like(gradient)
    few = (gradient != 0).sum(-1) <= max(1, gradient.shape[-1] // 2)
    if bool(few.all()) and bool(gradient.any()):
        return -gradient
    return torch.zeros_like(gradient)
