"""What a pass over a loader found, and how it is printed."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from .._console import plain_data, table
from ..languages import translator

_ROWS = 30  # of a table; .columns has them all


@dataclass(frozen=True)
class ColumnRow:
    """One column of a floating tensor, or one tensor of integers, over all batches.

    Args:
        code: the tensor, as an expression: "batch[0]".
        column: index into its features or channels; None for the whole tensor.
        mean, std: of the finite values.
        lowest, highest: of the finite values.
        what: "feature", "channel", "values", "labels" or "indices".
    """

    code: str
    column: int | None
    mean: float
    std: float
    lowest: float
    highest: float
    what: str


@dataclass(frozen=True)
class DataFault:
    """One thing that a training run would stumble over.

    Args:
        kind: "not finite", "scale", "constant", "change", "labels", "duplicate" or "empty".
        severity: "broken" where the loss will not be finite or an index is out of range; else "warning".
        code: the tensor, as an expression; "batch" for the batch as a whole.
        explanation: a sentence.
        places: (batch, row) of the first ones, counted from 0; the row is -1 where it is the whole batch.
        columns: the features or channels concerned.
    """

    kind: Literal["not finite", "scale", "constant", "change", "labels", "duplicate", "empty"]
    severity: Literal["warning", "broken"]
    code: str
    explanation: str
    places: tuple[tuple[int, int], ...] = ()
    columns: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """What `scan_data` found.

    Args:
        batches, rows: how many were looked at.
        complete: whether that was all; else the budget ended first.
        columns: statistics of every column.
        faults: the worst first.
        worst: index of the batch to look at first; None where no batch is worse than others.
    """

    batches: int
    rows: int
    complete: bool
    columns: tuple[ColumnRow, ...]
    faults: tuple[DataFault, ...]
    worst: int | None

    @property
    def verdict(self) -> Literal["healthy", "warning", "broken"]:
        """The worst fault's severity."""
        if any(fault.severity == "broken" for fault in self.faults):
            return "broken"
        return "warning" if self.faults else "healthy"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: numbers or null."""
        return {
            "verdict": self.verdict,
            "batches": self.batches,
            "rows": self.rows,
            "complete": self.complete,
            "worst": self.worst,
            "faults": plain_data([vars(fault) for fault in self.faults]),
            "columns": plain_data([vars(row) for row in self.columns]),
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_frame(self) -> Any:
        """The columns as a pandas.DataFrame.

        Raises:
            ImportError: where pandas is not installed.
        """
        return importlib.import_module("pandas").DataFrame([vars(row) for row in self.columns])

    def __str__(self) -> str:
        return self.text()

    def text(self, lang: str = "en", width: int | None = None) -> str:
        """The report as it is printed.

        Args:
            lang, width: as of `Diagnosis.text`.
        """
        say = translator(lang)
        part = "" if self.complete else " (the budget ended before the data)"
        text = say(f"verdict: {self.verdict}, {self.batches:,} batches{part}, {self.rows:,} rows")
        for number, fault in enumerate(self.faults, 1):
            text += f"\n\n{number}. {say(fault.kind)} ({say(fault.severity)}): {say(fault.code)}"
            text += f"\n   {say(fault.explanation)}"
        if self.columns:
            cells = [
                [
                    row.code if row.column is None else f"{row.code} {say(row.what)} {row.column}",
                    *(f"{value:.4g}" for value in (row.mean, row.std, row.lowest, row.highest)),
                ]
                for row in self.columns[:_ROWS]
            ]
            head = [say(name) for name in ("column", "mean", "std", "lowest", "highest")]
            text += "\n\n" + table(head, cells, "lrrrr", width=width)
            if len(self.columns) > _ROWS:
                text += "\n" + say(f"... and {len(self.columns) - _ROWS:,} more columns")
        return text
