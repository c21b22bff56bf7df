"""What a guard has seen: bad steps, each with its reason and its diagnosis, and counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..clipping.report import ClipStats
from ..diagnosis import Diagnosis
from ..languages import translator
from ..watching import WatchReport


@dataclass(frozen=True)
class BadStep:
    """A bad step that was examined.

    Args:
        step: of the optimizer, from 1.
        reason: what was bad, in a few words.
        norm: of all gradients, before clipping.
        loss: the first that was not finite, or else the last; None where none was noted.
        parameter: the first whose gradient was not finite; None if there was none.
        diagnosis: what `initlab.diagnose` found on its batch; None where it did not run.
        watched: where there is no diagnosis, what `initlab.watch` saw when the step ran again; None if it did not.
        saved: the files that were written.
        notes: what else there is to say, a sentence each: why there is no diagnosis, for instance.
        micro_batch: of several whose gradients accumulated, the one that it came from, from 0; None of one.
    """

    step: int
    reason: str
    norm: float
    loss: float | None
    parameter: str | None
    diagnosis: Diagnosis | None = None
    watched: WatchReport | None = None
    saved: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    micro_batch: int | None = None

    @property
    def headline(self) -> str:
        """When and what, and the first cause, in one line."""
        where = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}"
        text = f"step {self.step}{where}: {self.reason}"
        if self.diagnosis is not None and self.diagnosis.causes:
            cause = self.diagnosis.causes[0]
            place = f" at {cause.place}" if str(cause.place) else ""
            return f"{text}; cause: {cause.kind}{place}: {cause.explanation}"
        if self.watched is not None and self.watched.fault is not None:
            fault = self.watched.fault
            return f"{text}; {'' if fault.rank is None else f'rank {fault.rank}, '}{fault.headline}"
        return text

    def __str__(self) -> str:
        return self.text()

    def text(self, lang: str = "en", width: int | None = None) -> str:
        """The step as it is printed.

        Args:
            lang: "en", or "zh" for Chinese.
            width: cells that a line of a table may take; None does not shorten it.

        Raises:
            ValueError: for another language.
        """
        say = translator(lang)
        lines = [say(f"step {self.step}: {self.reason}, gradient norm {self.norm:.4g}")]
        if self.micro_batch is not None:
            lines.append(say(f"micro-batch {self.micro_batch} (from 0) of the step"))
        lines += map(say, self.notes)
        if self.diagnosis is not None:
            lines.append(self.diagnosis.text(lang, width))
        if self.watched is not None:
            lines.append(self.watched.text(lang))
        lines += [say(f"saved: {path}") for path in self.saved]
        return "\n".join(lines)


@dataclass(frozen=True)
class GuardReport:
    """What a guard has seen so far.

    Args:
        steps: of the optimizer, those left out included.
        bad_steps: how many were bad.
        skipped: how many changed nothing: bad ones, and on a GPU the one after each that was on its way already.
        left_to_scaler: steps that a GradScaler left out, and whose gradients were finite at a scale of 1.
        examined: the bad steps that were diagnosed, in order.
        clipping: the counts of the clipper.
        last_bad_step: the number of the last bad step; None if there was none.
    """

    steps: int
    bad_steps: int
    skipped: int
    left_to_scaler: int
    examined: tuple[BadStep, ...]
    clipping: ClipStats
    last_bad_step: int | None = None

    def __str__(self) -> str:
        return self.text()

    def text(self, lang: str = "en", width: int | None = None) -> str:
        """The report as it is printed.

        Args:
            lang: "en", or "zh" for Chinese.
            width: cells that a line of a table may take; None does not shorten it.

        Raises:
            ValueError: for another language.
        """
        say = translator(lang)
        counts = [f"{self.steps} steps: {self.bad_steps} bad, {self.skipped} skipped, {self.clipping.clipped} clipped"]
        if self.left_to_scaler:
            counts.append(f"{self.left_to_scaler} left out by the GradScaler")
        if self.clipping.spikes:
            counts.append(f"{self.clipping.spikes} spikes")
        return "\n\n".join([say(", ").join(map(say, counts)), *(one.text(lang, width) for one in self.examined)])
