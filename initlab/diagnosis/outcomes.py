"""How a run of some steps went, and how two runs compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from .limits import LIMITS

Effect: TypeAlias = Literal["", "breaks", "rises", "stays", "plateau", "falls"]


class Outcome(NamedTuple):
    """How a run went.

    Args:
        losses: before each step and after the last; NaN at the end where an error was raised.
        constant: whether the model puts out the same for every row at the end, though targets differ, and does not
            only begin to learn.
        ran: whether what was to be tried could be run at all.
    """

    losses: tuple[float, ...] = ()
    constant: bool = False
    ran: bool = True

    @property
    def effect(self) -> Effect:
        """What the loss did; "" where nothing ran."""
        if not self.ran or not self.losses:
            return ""
        if not all(map(math.isfinite, self.losses)):
            return "breaks"
        if len(self.losses) < 2:
            return ""
        first, last = self.losses[0], self.losses[-1]
        if self.constant and first - last > LIMITS.stays * abs(first):
            return "plateau"
        if falls(self.losses):
            return "falls" if first - last > LIMITS.stays * abs(first) else "stays"
        return "rises" if max(self.losses) - first > LIMITS.stays * abs(first) else "stays"

    @property
    def fails(self) -> bool:
        """Whether it breaks, rises, or does not move."""
        if self.effect == "rises" and self.fallen > LIMITS.learns:
            return max(self.losses) > LIMITS.passing * abs(self.losses[0])
        return self.effect not in ("", "falls") or (self.steps > 0 and self.losses[-1] > LIMITS.absurd)

    @property
    def fallen(self) -> float:
        """The part of its first loss that is gone at the end; below 0 where it has risen."""
        if self.effect in ("", "breaks"):
            return -math.inf
        first, last = self.losses[0], self.losses[-1]
        return (first - last) / abs(first) if first else -math.inf

    @property
    def steps(self) -> int:
        """How many were taken."""
        return max(0, len(self.losses) - 1)

    def __str__(self) -> str:
        return in_words(self.losses)


def falls(losses: Sequence[float]) -> bool:
    """Whether a loss ends below its start, near the lowest that it has been, and was never far above."""
    first, last, lowest, highest = losses[0], losses[-1], min(losses), max(losses)
    came_back = last - lowest <= LIMITS.given_back * (first - lowest)
    return last < first and came_back and highest - first <= max(LIMITS.given_back * abs(first), first - last)


def settled(losses: Sequence[float | None]) -> bool:
    """Whether a loss fell, and has stopped to."""
    known = [x for x in losses if x is not None and math.isfinite(x)]
    if len(known) < len(losses) or len(known) < _MANY:
        return False
    fallen = known[0] - known[-1]
    return (
        fallen > LIMITS.stays * abs(known[0]) and max(known[-_LAST:]) - min(known[-_LAST:]) <= LIMITS.settled * fallen
    )


_MANY, _LAST = 10, 5  # losses that it takes to see a plateau; and the last of them, which are level


def in_words(losses: Sequence[float | None]) -> str:
    """The course of a loss: its ends, the highest between them, and in how many steps.

    Example:
        >>> from initlab.diagnosis.outcomes import in_words
        >>> in_words([2.3, 2.1, 0.31]), in_words([2.3, 110.0, float("inf")]), in_words([1.0, 4.0, 0.9])
        ('2.3 -> 0.31 in 2 steps', '2.3 -> inf in step 2', '1 -> 4 -> 0.9 in 2 steps')
    """
    if not losses:
        return "none"
    known = [math.nan if x is None else x for x in losses]
    first, last = known[0], known[-1]
    digits = next((n for n in (4, 6, 8) if f"{first:.{n}g}" != f"{last:.{n}g}"), 10)
    if not math.isfinite(first):
        return f"{first:.4g} in step 1"
    if len(known) == 1:
        return f"{first:.4g}"
    finite = [x for x in known[1:-1] if math.isfinite(x)]
    ends = [f"{first:.{digits}g}", f"{last:.{digits}g}"]
    if finite and math.isfinite(last) and max(finite) > max(first, last) + 0.1 * abs(first):
        ends.insert(1, f"{max(finite):.{digits}g}")
    if first == last:
        ends = [f"{first:.4g}"] * 2
    steps, course = len(known) - 1, " -> ".join(ends)
    if not math.isfinite(last):
        return f"{course} in step {steps}"
    return f"{course} in {steps} steps" if steps > 1 else f"{course} in 1 step"


def much_better(treated: Outcome, untreated: Outcome, unit: float = 0.0) -> bool:
    """Whether a run that falls falls much further than one that falls as well.

    Args:
        unit: what the loss is divided by where the change gives it another scale; 0 where it does not.
    """
    if treated.effect != "falls" or not untreated.losses:
        return False
    left, still = treated.losses[-1], untreated.losses[-1] / (unit or 1.0)
    far = min(left, still) > 0 and still > LIMITS.much_better * left
    return (far and (not unit or treated.fallen > LIMITS.slow_fall)) or _many_times_faster(treated, untreated, unit)


def _many_times_faster(treated: Outcome, untreated: Outcome, unit: float) -> bool:
    faster = treated.fallen > max(2 * LIMITS.slow_fall, LIMITS.faster * untreated.fallen)
    return faster and (unit > 0 or treated.losses[-1] < untreated.losses[-1])
