"""What gradient clipping returns: a norm with what was found on the way, a part of a norm, and counts over steps."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.kernels import describe

ON_ANOTHER_RANK = "one on another rank"


@dataclass(frozen=True, eq=False)
class ClipReport:
    """A norm, and what was found on the way. Nothing is read from the device until a property, str() or == asks.

    With DTensors norm and flag are the same on all ranks, and all three are plain tensors. Reports hold no gradients.
    They can be copied, pickled and sent to other ranks; to load one from a checkpoint, torch.load needs
    torch.serialization.safe_globals([initlab.ClipReport]), or weights_only=False.

    Attributes:
        norm: the total norm, 0-d, float32, or float64 where a gradient is float64.
        flag: which non-finite values were seen, on any rank, 0-d, int32: NaN = 1, +inf = 2, -inf = 4, or-ed.
        first_nonfinite_index: index of the first tensor of which this rank holds a non-finite value, in the order in
            which they were passed, 0-d, int64; -1 if there is none.

    Example:
        >>> import torch, initlab
        >>> report = initlab.get_total_norm([torch.ones(2), torch.tensor([0.0, float("inf")])], report=True)
        >>> print(report)
        norm inf; gradient 1 of shape (2,) is the first of those that hold +inf
    """

    norm: Tensor
    flag: Tensor
    first_nonfinite_index: Tensor
    _labels: Sequence[str | torch.Size] = field(repr=False)  # names, or shapes where no names were passed

    @property
    def nonfinite(self) -> bool:
        """Whether a gradient holds NaN or inf."""
        return int(self.flag) != 0

    @property
    def first_bad(self) -> str | None:
        """The first tensor that holds NaN or inf: its name where names were passed, else its index and shape.

        Where this rank holds none of them, it says so: nothing is asked of other ranks.
        """
        first = int(self.first_nonfinite_index)
        if first >= 0:
            return label(self._labels, first)
        return ON_ANOTHER_RANK if self.nonfinite else None

    def __str__(self) -> str:
        norm = f"norm {float(self.norm):.6g}"
        if not self.nonfinite:
            return norm
        return f"{norm}; {self.first_bad} is the first of those that hold {describe(int(self.flag))}"

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, on whatever devices their tensors are; one NaN equals another."""
        if not isinstance(other, ClipReport):
            return NotImplemented
        return self._values() == other._values() and self._labels == other._labels

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[Hashable, ...]:
        norm = float(self.norm)
        norm_or_none = None if math.isnan(norm) else norm
        return self.norm.dtype, norm_or_none, int(self.flag), int(self.first_nonfinite_index)


def label(labels: Sequence[str | torch.Size], index: int) -> str:
    """What to call a tensor: its name, or where it has none its index and shape."""
    name_or_shape = labels[index]
    if isinstance(name_or_shape, torch.Size):
        return f"gradient {index} of shape {tuple(name_or_shape)}"
    return name_or_shape


class PartialNorm(NamedTuple):
    """The part of a norm that these tensors make up, to be reduced over other ranks before the root is taken.

    Of DTensors it is reduced over their own meshes already, and the same on all ranks of these.

    Attributes:
        sum_of_powers: the sum of |g|^p, 0-d, float64: add up over ranks (inf: the largest |g|, take the maximum; -inf:
            the minimum). For float64 gradients beyond 1e154 it overflows.
        flag: the flag word of these tensors, 0-d, int32; 0 if all are finite. Take the maximum, or or them.
        norm_type: p.

    Example:
        >>> import torch, initlab
        >>> ranks = [initlab.get_total_norm([torch.tensor([x])], partial=True) for x in (3.0, 4.0)]
        >>> total = ranks[0].sum_of_powers + ranks[1].sum_of_powers  # torch.distributed.all_reduce does this
        >>> ranks[0]._replace(sum_of_powers=total).norm()
        tensor(5.)
    """

    sum_of_powers: Tensor
    flag: Tensor
    norm_type: float

    def norm(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The norm whose power `sum_of_powers` is, 0-d."""
        if math.isinf(self.norm_type):
            return self.sum_of_powers.to(dtype)
        return self.sum_of_powers.pow(1.0 / self.norm_type).to(dtype)


@dataclass(frozen=True)
class ClipStats:
    """What a GradClipper has seen.

    Attributes:
        steps: how often it ran: once a step, and with closures once for each of their calls.
        clipped: steps whose gradients were scaled down.
        nonfinite: steps with a NaN or inf in a gradient; under nonfinite="skip" they changed nothing.
        first_bad_step: the first of them, counted from 1; None if there was none.
        first_bad_parameter: the first parameter whose gradient held one then; says so where that lies on another rank.
        spikes: steps whose norm the policy for spikes limited or skipped.
        spike_steps: the last of these steps, up to 16, counted from 1.
    """

    steps: int
    clipped: int
    nonfinite: int
    first_bad_step: int | None
    first_bad_parameter: str | None
    spikes: int = 0
    spike_steps: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """Without spikes where there were none: most clippers have no policy for them."""
        shown = [f"{one.name}={getattr(self, one.name)!r}" for one in fields(self)]
        return f"ClipStats({', '.join(shown if self.spikes else shown[:5])})"
