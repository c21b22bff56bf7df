"""The time that a diagnosis may take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack

from .._console import progress
from .limits import LIMITS

_PARTS = 100  # of a progress bar
_SILENT = 2.0  # seconds before the bar appears


class Budget:
    """Seconds that are left, and how many steps one run gets of them. Use as a context manager.

    Args:
        seconds: for all runs together.
        show: whether to show a progress bar after two seconds; None shows it in a terminal, on stderr.
    """

    def __init__(self, seconds: float, show: bool | None = None) -> None:
        self.seconds = seconds
        self.steps = LIMITS.trial_steps  # of the runs that are compared; fewer where the untreated one took fewer
        self.step_time = 0.0
        self._show, self._done = show, 0
        self._advance: Callable[[int], object] | None = None
        self._start = time.monotonic()
        self._bar = ExitStack()

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left; 0 at least."""
        return max(0.0, self.seconds - self.used)

    @property
    def per_run(self) -> float:
        """Seconds that one run gets."""
        return min(self.left, self.seconds * LIMITS.share_of_run)

    def allows_a_run(self) -> bool:
        """Whether there is time for one more run, of two steps at least."""
        return self.left > LIMITS.trial_least * self.step_time

    def tick(self) -> None:
        """Some work was done: the bar moves, if there is one."""
        if self._show is False or self.used < _SILENT:
            return
        if self._advance is None:
            self._advance = self._bar.enter_context(progress("initlab doctor", _PARTS, self._show))
        now = min(_PARTS, math.floor(_PARTS * self.used / max(self.seconds, 1e-9)))
        if now > self._done:
            self._advance(now - self._done)
            self._done = now
