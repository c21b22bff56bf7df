"""What a scan found, and how it is printed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .._console import listing, plain_data, table
from ..languages import translator

_ROWS = 40  # of a table; .rows has them all


@dataclass(frozen=True)
class TensorRow:
    """What one tensor, or one shard of it, holds.

    Args:
        name: in the state dict, nested names joined by dots.
        file: the name of the file that it lies in.
        begin: index of the shard's first element in the whole tensor; empty for a whole tensor.
        dtype, shape: of the shard.
        rms: root mean square of the finite elements.
        largest: the largest magnitude of a finite element.
        nonfinite: how many elements are NaN or inf.
        change: norm of the difference to the older checkpoint, over the norm now; None where nothing was compared.
        faults: what is wrong.
        notes: what may be meant.
    """

    name: str
    file: str
    begin: tuple[int, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    rms: float
    largest: float
    nonfinite: int
    change: float | None
    faults: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, for JSON: numbers or null."""
        row: dict[str, Any] = plain_data(vars(self))
        return row | {"dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class CheckpointReport:
    """What `scan_checkpoint` found.

    Args:
        path: what was scanned.
        rows: one for each tensor of each file.
        refused: files that were not read, with the reason.
        since: the older checkpoint.
        missing: names that only the older checkpoint has.
    """

    path: str
    rows: tuple[TensorRow, ...]
    refused: dict[str, str]
    since: str | None = None
    missing: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[TensorRow, ...]:
        """The rows with faults: non-finite ones first, else in the files' order."""
        return tuple(sorted((row for row in self.rows if row.faults), key=lambda row: not row.nonfinite))

    @property
    def verdict(self) -> Literal["healthy", "warning", "broken"]:
        """ "broken" where something is NaN or inf, "warning" for the other faults."""
        if any(row.faults and row.nonfinite for row in self.rows):
            return "broken"
        return "warning" if any(row.faults for row in self.rows) else "healthy"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "path": self.path,
            "verdict": self.verdict,
            "since": self.since,
            "missing": list(self.missing),
            "refused": self.refused,
            "rows": [row.to_dict() for row in self.rows],
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
        elements = sum(math.prod(row.shape) for row in self.rows)
        names = len({row.name for row in self.rows})
        problems = self.problems
        text = say(f"verdict: {self.verdict}, {names:,} tensors, {elements:,} elements, {len(problems):,} with faults")
        noted = [row for row in self.rows if row.notes and not row.faults]
        if shown := [*problems, *noted][:_ROWS]:
            files = len({row.file for row in self.rows}) > 1
            head = ["tensor", *(["file"] if files else []), "rms", "what"]
            cells = [
                [
                    _label(row),
                    *([row.file] if files else []),
                    f"{row.rms:.3g}",
                    "; ".join(map(say, (*row.faults, *row.notes))),
                ]
                for row in shown
            ]
            text += "\n\n" + table([*map(say, head)], cells, "llrl" if files else "lrl", width=width)
            if (more := len(problems) + len(noted) - len(shown)) > 0:
                text += "\n" + say(f"... and {more:,} more rows")
        if self.since is not None:
            changes = [row.change for row in self.rows if row.change is not None and math.isfinite(row.change)]
            if changes:
                largest = say(f"since {self.since}: the largest relative change of a tensor is {max(changes):.3g}")
                text += f"\n\n{largest}"
            if self.missing:
                text += "\n" + say(f"only in {self.since}:") + listing(self.missing)
        if self.refused:
            text += "\n\n" + say("not read:") + listing([*map(say, self.refused.values())])
        return text


def _label(row: TensorRow) -> str:
    return f"{row.name}[{', '.join(map(str, row.begin))}:]" if any(row.begin) else row.name
