"""What a diagnosis consists of, and how it is printed: places, causes, layers."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from .._console import inline_listing, plain_data, table
from ..distributed.collectives import listed
from ..languages import Say, translator
from .measurements import Measurements
from .outcomes import in_words

Kind: TypeAlias = Literal[
    "input",
    "target",
    "weights",
    "operation",
    "precision",
    "gradient",
    "learning rate",
    "optimizer",
    "loss",
    "uninitialised",
]
"""Which sort of cause.

"operation" is one that fails on what it gets, in the model or in the user's own loss function. "loss" is an objective
that is wrong or unstable: a loss function of torch's that gets what it does not take, a formula that torch has in a
stable form (the log of a softmax, of a sigmoid, of a sum of exponentials), a head, labels or shapes that do not fit.
"weights" are values that no run starts well from; "uninitialised" is memory that nobody wrote.
"""
Severity: TypeAlias = Literal["warning", "broken"]
Verdict: TypeAlias = Literal["healthy", "warning", "broken"]


_ROWS = 32  # of a table; .layers has them all
_FAR = 1e6  # times larger, and still finite: not worth a number
_WHERE = {  # where a cause lies that has no place in the model
    "input": "batch",
    "target": "batch",
    "loss": "the loss function",
    "learning rate": "optimizer",
    "optimizer": "optimizer",
}


@dataclass(frozen=True)
class Place:
    """Where a cause lies; what does not apply is None.

    Args:
        module: path of a module in the model, "" for the model itself.
        parameter: full name of a parameter or buffer.
        feature: index into the last dimension of the input; a list where there are several.
        op: name of a torch function, as "log" or "div".
        tensor: a tensor of the batch, as code: "batch[0]".

    Example:
        >>> from initlab.diagnosis.report import Place
        >>> print(Place(module="encoder.2", op="sqrt"))
        sqrt in encoder.2
    """

    module: str | None = None
    parameter: str | None = None
    feature: int | list[int] | None = None
    op: str | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        parts = []
        if self.op is not None:
            parts.append(self.op)
        if self.parameter is not None:
            parts.append(self.parameter)
        elif self.module is not None:
            parts.append(f"{'in ' if self.op else ''}{self.module or 'the model itself'}")
        if self.tensor is not None:
            parts.append(self.tensor)
        if isinstance(self.feature, list):
            parts.append(f"features {inline_listing([str(feature) for feature in self.feature], 6)}")
        elif self.feature is not None:
            parts.append(f"feature {self.feature}")
        return " ".join(parts)


class Said(NamedTuple):
    """A cause in a language.

    Args:
        title: kind, severity and place.
        lines: what happens, and how runs with and without a change went.
        evidence: names and values.
        remedy: what its remedy's code is called.
    """

    title: str
    lines: list[str]
    evidence: list[tuple[str, str]]
    remedy: str


@dataclass(frozen=True)
class Cause:
    """One thing that is wrong, or about to go wrong.

    Args:
        kind: which sort of cause.
        severity: "broken" where the loss or a gradient is not finite or training cannot go on; else "warning".
        place: where it lies.
        explanation: what happens, in a sentence or two.
        evidence: numbers and short strings.
        remedy: code to paste, with model, batch, loss_fn, optimizer, torch and initlab in scope; may be empty.
        tried: whether the remedy, as it is printed, was run on the user's own batch, and the user's loss stayed finite
            and fell over all the steps of a trial.
        trial: that loss, before each of those steps and after the last; empty where nothing was tried.
        untreated: likewise, of the run as it is.
        change: what the remedy does, in a few words; may be empty.
        emulated: that loss where the place's operation was replaced by its safe form while the user's code ran: what
            the remedy, an advice, would do. Nothing of it was tried as it is printed. Empty where it does not fall.
    """

    kind: Kind
    severity: Severity
    place: Place
    explanation: str
    evidence: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""
    tried: bool = False
    trial: tuple[float, ...] = ()
    untreated: tuple[float, ...] = ()
    change: str = ""
    emulated: tuple[float, ...] = ()

    def said(self, say: Say) -> Said:
        """The cause as it is printed, without its remedy's code.

        Args:
            say: translates it.
        """
        where = str(self.place) or _WHERE.get(self.kind, "the model")
        lines = [say(self.explanation)]
        if self.emulated:
            lines.append(say(_emulated(self)))
        if self.trial:
            lines.append(say(_compared(self)))
        evidence = [(say(name), _short(value)) for name, value in self.evidence.items() if name != "error"]
        how = ", tried" if self.tried else ", emulated: finite and falling" if self.emulated else ""
        title = f"{say(self.kind)} ({say(self.severity)}): {say(where)}"
        return Said(title, lines, evidence, say(f"remedy{how}:"))

    def to_dict(self) -> dict[str, Any]:
        """The cause as plain data, for JSON."""
        place = {name: getattr(self.place, name) for name in ("module", "parameter", "feature", "op", "tensor")}
        return {
            "kind": self.kind,
            "severity": self.severity,
            "place": place,
            "explanation": self.explanation,
            "evidence": plain_data(self.evidence),
            "remedy": self.remedy,
            "tried": self.tried,
            "trial": plain_data(self.trial),
            "emulated": plain_data(self.emulated),
            "untreated": plain_data(self.untreated),
            "change": self.change,
        }


@dataclass(frozen=True)
class LayerRow:
    """What one module did with the signal.

    Args:
        name: its path in the model.
        kind: its class.
        dtype: of its output.
        std: of its output.
        gain: standard deviation over the batch, out over in; None where that makes no sense.
        largest: the largest magnitude in its output.
        headroom: how many times larger it could get before the dtype overflows; 0 where it has.
        gradient: norm of the gradient of its own parameters; None where it has none.
    """

    name: str
    kind: str
    dtype: str
    std: float
    gain: float | None
    largest: float
    headroom: float
    gradient: float | None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, for JSON."""
        return plain_data(dict(self.__dict__))


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. Printed, it is a verdict, the causes, and a table of the layers.

    Args:
        causes: most likely first; empty where nothing is wrong.
        losses: before the first step and after each step that was taken; None where it could not be computed.
        gradient_norm: of all gradients of the first step; None where there was no backward pass.
        broke_at: the step, from 1, in which the loss or a gradient was not finite or an error was raised; None if none.
        layers: one row for each module that put out a floating tensor, in the order of execution.
        notes: what else there is to say.
        rank: across ranks, the global rank whose diagnosis it is; None otherwise.
        verdicts: across ranks, the verdict of each, by global rank; empty otherwise.
        data: of a loader, what the scan of its batches found; None otherwise.
        batch_index: of a loader, the batch whose diagnosis it is, from 0; None otherwise.
        measurements: what `save` and `plot` show beside the layers; None in a diagnosis that was made without them.
    """

    causes: tuple[Cause, ...]
    losses: tuple[float | None, ...] = ()
    gradient_norm: float | None = None
    broke_at: int | None = None
    layers: tuple[LayerRow, ...] = ()
    notes: tuple[str, ...] = ()
    rank: int | None = None
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)
    data: Any = None  # a DataReport
    batch_index: int | None = None
    measurements: Measurements | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst severity of the causes, or "healthy"; "broken" wherever there is a cause and a loss is not finite."""
        if not self.causes:
            return "healthy"
        broken = self.broke_at is not None or any(cause.severity == "broken" for cause in self.causes)
        return "broken" if broken else "warning"

    @property
    def tightest(self) -> LayerRow | None:
        """The layer that is closest to overflow."""
        return min(self.layers, key=lambda row: row.headroom, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data, for JSON: numbers that it does not have are None."""
        return {
            "verdict": self.verdict,
            "causes": [cause.to_dict() for cause in self.causes],
            "losses": plain_data(list(self.losses)),
            "gradient_norm": plain_data(self.gradient_norm),
            "broke_at": self.broke_at,
            "layers": [row.to_dict() for row in self.layers],
            "notes": list(self.notes),
            "rank": self.rank,
            "verdicts": plain_data(dict(self.verdicts)),
            "batch_index": self.batch_index,
            "data": None if self.data is None else self.data.to_dict(),
            "measurements": None if self.measurements is None else self.measurements.to_dict(),
        }

    def to_json(self) -> str:
        """The diagnosis as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def save(self, path: str | os.PathLike[str], *, lang: str = "en") -> Path:
        """Write the diagnosis as one HTML page that needs nothing else: no network, no other file.

        Plots need matplotlib (pip install "initlab[plots]"); without it the page has tables in their places, and says
        so.

        Args:
            path: of the page, ending in .html; its folder must exist. A file of that name is replaced.
            lang: as of `text`.

        Returns:
            The path that was written.

        Raises:
            ValueError: for another ending, or another language.
            OSError: if it cannot be written; then what was there before is still there.

        Example:
            >>> import tempfile, torch, initlab
            >>> model, batch = torch.nn.Linear(2, 1), (torch.ones(4, 2), torch.zeros(4, 1))
            >>> found = initlab.diagnose(model, batch, initlab.supervised(torch.nn.MSELoss()))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     found.save(f"{folder}/report.html").name
            'report.html'
        """
        from ..pages import diagnosis_page, write_page

        return write_page(path, lambda: diagnosis_page(self, lang))

    def plot(self, *, lang: str = "en") -> Any:
        """The plots of the page, as one matplotlib figure.

        Args:
            lang: as of `text`.

        Returns:
            A matplotlib.figure.Figure, which no window shows: `.savefig("report.png")`, or the last line of a cell.

        Raises:
            ImportError: where matplotlib is not installed.
            ValueError: for another language.
        """
        from ..plots import diagnosis_panels, draw_panels

        return draw_panels(diagnosis_panels(self, translator(lang)))

    def __str__(self) -> str:
        return self.text()

    def text(self, lang: str = "en", width: int | None = None) -> str:
        """The diagnosis as it is printed.

        Args:
            lang: "en", or "zh" for Chinese. Numbers, names and code are the same; the comments of a remedy are not.
            width: cells that a line of the table may take; None does not shorten it.

        Raises:
            ValueError: for another language.
        """
        say = translator(lang)
        verdict, *course = self.headline(lang)
        ranks = [course.pop()] if self.verdicts else []
        lines = [say(", ").join((verdict, *course)), *ranks]
        for number, cause in enumerate(self.causes, 1):
            said = cause.said(say)
            lines += ["", f"{number}. {said.title}", *(f"   {line}" for line in said.lines)]
            if said.evidence:
                lines.append("   " + say(", ").join(f"{name} {value}" for name, value in said.evidence))
            if cause.remedy:
                lines += [f"   {said.remedy}", *(f"       {line}" for line in say.code(cause.remedy).splitlines())]
        if self.layers:
            lines += ["", self._table(say, width)]
        lines += [say(f"note: {note}") for note in self.notes]
        return "\n".join(lines)

    def headline(self, lang: str = "en") -> list[str]:
        """What comes first, part by part: the verdict, the course of the loss, the ranks.

        Args:
            lang: as of `text`.
        """
        say = translator(lang)
        parts = [say(f"{'' if self.rank is None else f'rank {self.rank}, '}verdict: {self.verdict}")]
        if self.broke_at is not None:
            parts.append(say(f"broke in step {self.broke_at}"))
        if self.losses:
            parts.append(f"{say('loss')} {say(in_words(self.losses))}")
        if self.gradient_norm is not None:
            parts.append(say(f"gradient norm {self.gradient_norm:.3g}"))
        return [*parts, *self._ranks(say)]

    def _ranks(self, say: Say) -> Iterator[str]:
        alike: dict[Verdict, list[int]] = {}
        for rank, verdict in self.verdicts.items():
            alike.setdefault(verdict, []).append(rank)
        if alike:
            parts = (f"{verdict} on {listed(ranks)}" for verdict, ranks in sorted(alike.items(), key=itemgetter(1)))
            yield say(f"of {len(self.verdicts)} ranks: {'; '.join(parts)}")

    def _table(self, say: Say, width: int | None) -> str:
        head = ["layer", "kind", "dtype", "std", "gain", "largest", "headroom", "gradient"]
        if all(row.headroom > _FAR for row in self.layers):
            head.remove("headroom")
        rows: list[tuple[str, ...]] = []
        last = -1
        for place in _shown(self.layers):
            if place > last + 1:
                rows.append((say(f"... {place - last - 1} more"), *[""] * (len(head) - 1)))
            row, last = self.layers[place], place
            cells = [
                _cell(None if name == "headroom" and row.headroom > _FAR else getattr(row, name)) for name in head[3:]
            ]
            rows.append((row.name or say("(model)"), row.kind, row.dtype, *cells))
        spare = [say(name) for name in ("dtype", "kind")]
        return table([*map(say, head)], rows, "lll" + "r" * (len(head) - 3), width=width, spare=spare)


def _compared(cause: Cause) -> str:
    """The run as it is, and with the remedy."""
    as_it_is = f"as it is: {in_words(cause.untreated)}; " if cause.untreated else ""
    return f"{as_it_is}{cause.change or 'with the remedy'}: {in_words(cause.trial)}"


def _emulated(cause: Cause) -> str:
    """The run with another form of an operation, and as it is where that is a comparison."""
    as_it_is = f"as it is: {in_words(cause.untreated)}; " if cause.untreated and cause.change else ""
    return f"{as_it_is}{cause.change or f'with the safe form of {cause.place.op}'}: {in_words(cause.emulated)}"


def _shown(layers: Sequence[LayerRow]) -> list[int]:
    """Which rows of a long table are worth a line: its ends, and what lies about the layer closest to overflow."""
    if len(layers) <= _ROWS:
        return list(range(len(layers)))
    tightest = min(range(1, len(layers)), key=lambda place: layers[place].headroom)  # the first row is the model's own
    ends = {*range(8), *range(len(layers) - 4, len(layers))}
    return sorted(ends | set(range(max(0, tightest - 8), min(len(layers), tightest + 4))))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
