"""What became of a script."""

from __future__ import annotations

import json
import linecache
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._console import plain_data
from ..diagnosis import Diagnosis
from ..languages import translator


@dataclass
class ScriptReport:
    """What became of a script.

    Args:
        script: its path.
        steps: backward passes that were seen.
        first, last: losses; NaN where there were none.
        stopped: why it was stopped, or what is wrong with it, in words; empty where nothing is.
        over: whether it ran to its end.
        place: file and line of the user's code at which it was stopped.
        diagnosis: of the step that failed; None where there was none, or the step could not be run again.
        preamble: code that gives the remedy's names their values in the script.
        error: what the script raised, if it did.
        notes: what else there is to say.
    """

    script: str
    steps: int = 0
    first: float = math.nan
    last: float = math.nan
    stopped: str = ""
    over: bool = False
    place: tuple[str, int] = ("", 0)
    diagnosis: Diagnosis | None = None
    preamble: str = ""
    error: BaseException | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The diagnosis's, or "healthy" where nothing stopped the script."""
        if self.diagnosis is not None:
            return self.diagnosis.verdict
        return "broken" if self.stopped else "healthy"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: numbers or null."""
        return {
            "script": self.script,
            "verdict": self.verdict,
            "steps": self.steps,
            "first_loss": plain_data(self.first),
            "last_loss": plain_data(self.last),
            "stopped": self.stopped,
            "over": self.over,
            "file": self.place[0] or None,
            "line": self.place[1] or None,
            "diagnosis": None if self.diagnosis is None else self.diagnosis.to_dict(),
            "preamble": self.preamble,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        return self.text()

    def text(self, lang: str = "en", width: int | None = None) -> str:
        """The report as it is printed.

        Args:
            lang, width: as of `Diagnosis.text`.
        """
        say = translator(lang)
        lines = self.summary(lang)
        if self.diagnosis is not None:
            lines += ["", self.diagnosis.text(lang, width)]
            if self.shows_preamble:
                lines += ["", say("In the script, the names of the remedy are:"), f"    {self.preamble}"]
        return "\n".join(lines)

    @property
    def shows_preamble(self) -> bool:
        """Whether there is a remedy whose names the preamble gives."""
        return bool(self.preamble) and self.diagnosis is not None and any(c.remedy for c in self.diagnosis.causes)

    def summary(self, lang: str = "en") -> list[str]:
        """The report without its diagnosis: what became of the script, where it was stopped, notes.

        Args:
            lang: as of `text`.
        """
        say = translator(lang)
        name = Path(self.script).name
        notes = [say(note) for note in self.notes]
        if not self.stopped:
            if not self.steps:
                return [say(f"{name}: no backward pass was seen"), *notes]
            fell = f", loss {self.first:.4g} -> {self.last:.4g}" if math.isfinite(self.first) else ""
            return [say(f"{name}: {self.steps} steps{fell}, nothing to report"), *notes]
        file, line = self.place
        if self.over:
            lines = [say(f"{name}: ended after {self.steps} steps: {self.stopped}")]
        else:
            lines = [say(f"{name}: stopped in step {self.steps}: {self.stopped}")]
        if line:
            lines.append(f"  {Path(file).name}:{line}: {linecache.getline(file, line).strip()}")
        return lines + [f"  {note}" for note in notes]

    def save(self, path: str | os.PathLike[str], *, lang: str = "en") -> Path:
        """Write the report as one HTML page, with its diagnosis.

        Args:
            path, lang: as of `Diagnosis.save`.

        Returns:
            The path that was written.

        Raises:
            OSError, ValueError: as of `Diagnosis.save`.
        """
        from ..pages import script_page, write_page

        return write_page(path, lambda: script_page(self, lang))
