"""The first loss of a model whose outputs say nothing yet, and the bias of the head that it wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..models.refusals import only_value
from .advice import InputAdvice
from .moments import Moments

HEAD = 0.1  # of a head's outputs: cross_entropy is then ln(V) + 0.005
_DISTANCES = frozenset(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"))
_RARE = 0.1  # a base rate so far from 0 or 1 needs no bias of its own


class Loss(NamedTuple):
    """A call of a loss function: its short name, and its tensors, of which the first are prediction and target."""

    name: str
    tensors: list[Tensor]


class Objective(NamedTuple):
    """What the loss asks of the head.

    Args:
        size: the standard deviation of a head's outputs that does not matter to the loss.
        bias: of the head; None leaves it to the recipe.
        why: how the expected loss comes about, if it is `value`.
        value: the loss that `why` stands for; None if `why` is true of any.
        notes: on the targets.
    """

    size: float = HEAD
    bias: float | None = None
    why: str = ""
    value: float | None = None
    notes: tuple[str, ...] = ()

    def told(self, expected: float | None) -> str:
        """How the expected loss comes about: no more than what is known to be true."""
        if self.why and (self.value is None or (expected is not None and is_close(expected, self.value, 1e-2))):
            return self.why
        return "the loss of outputs that are 0" if not self.bias else f"the loss of outputs that are {self.bias:.4g}"


def is_close(loss: float, expected: float, tolerance: float) -> bool:
    """Whether a loss is the expected one, relative to it; where that is 0, within 0.001."""
    return abs(loss - expected) <= (tolerance * abs(expected) if abs(expected) > 1e-12 else 1e-3)


def objective(losses: Sequence[Loss], bias: Tensor | None) -> Objective:
    """What a loss asks of the head.

    Args:
        losses: all calls of loss functions of a pass.
        bias: of the only head, as the model is; None where there is none or several.
    """
    if len(losses) != 1 or len(losses[0].tensors) < 2:
        return Objective()
    name, (prediction, target, *weights) = losses[0]
    one_column = bias is not None and bias.numel() == 1
    if name == "cross_entropy":
        classes = prediction.shape[1 if prediction.dim() > 1 else 0]
        return Objective(why=f"ln {classes} for cross_entropy over {classes} classes", value=math.log(classes))
    if name == "binary_cross_entropy_with_logits":
        return _of_logits(target, bias, one_column and not weights)
    if name not in _DISTANCES or target.numel() < 2:
        return Objective()
    moments = Moments.of(target)
    std = math.sqrt(moments.variance)
    notes = _on_targets(target, moments.mean, std)
    if name != "mse_loss":
        return Objective(HEAD * std or HEAD, notes=notes)
    if one_column and abs(moments.mean) > 0.1 * std:
        return Objective(HEAD * std or HEAD, moments.mean, "the variance of the targets", moments.variance, notes)
    square = moments.variance + moments.mean**2
    return Objective(HEAD * std or HEAD, None, "the mean square of the targets", square, notes)


def _of_logits(target: Tensor, bias: Tensor | None, may_fit: bool) -> Objective:
    """Of binary cross entropy: a bias that was set stays; where positives or negatives are rare, their log odds."""
    rate = Moments.of(target).mean
    own = None if bias is None or (bias.numel() == 1 and 0.0 < rate < 1.0) else only_value(bias)
    if own is not None and float(own) != 0.0:
        value = float(own)
        return Objective(bias=value, why=f"the loss of outputs that are {value:.4g}, the head's own bias")
    if may_fit and 0.0 < min(rate, 1.0 - rate) < _RARE:
        entropy = -rate * math.log(rate) - (1.0 - rate) * math.log1p(-rate)
        why = f"the entropy of a base rate of {rate:.3g}, whose log odds are the head's bias"
        return Objective(bias=math.log(rate / (1.0 - rate)), why=why, value=entropy)
    return Objective(why="ln 2 for binary cross entropy", value=math.log(2.0))


def _on_targets(target: Tensor, mean: float, std: float) -> tuple[str, ...]:
    row = InputAdvice("targets", mean, std, float(target.min()), float(target.max()))
    if std == 0.0 or not row.unscaled:
        return ()
    return (
        f"data: the targets have mean {row.mean:.4g} and standard deviation {row.std:.4g}, from {row.low:.4g} to "
        f"{row.high:.4g}: subtract the mean, divide by the deviation, and take predictions back by the same numbers",
    )
