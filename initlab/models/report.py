"""InitReport: what each parameter was filled with, by which rule, as a table or as plain data."""

import copy
import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from initlab.kernels import STREAM_VERSION, Distribution

from .._console import table
from ..languages import translator
from .digest import ModelDigest, model_digest
from .naming import Names, tensor_refs
from .specs import DimSlice


class Fit(NamedTuple):
    """How a weight was scaled to a batch.

    Args:
        part: which part of the parameter; None for all of it.
        op: the function that multiplies with it, "linear" for instance.
        factor: on the distribution that the recipe began with, a power of 2^(1/32).
        before: variance of the layer's output on the batch with factor 1, all layers before it fitted.
        after: with the factor, all layers fitted; over all uses together.
        calls: how many times a pass uses it.
        branches: of the residual stream that its output is added to as the end of a branch; 1 of any other. The wanted
            variance is 1/branches.
    """

    part: DimSlice | None
    op: str
    factor: float
    before: float
    after: float
    calls: int
    branches: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The fit as plain data, for JSON."""
        return {**self._asdict(), "part": None if self.part is None else self.part._asdict()}


class Row(NamedTuple):
    """What one parameter or buffer is filled with.

    Args:
        name: its canonical name, from which its key comes.
        aliases: its other names, where it is tied.
        shape: its shape.
        dtype: its dtype.
        distribution: the distribution of the whole tensor, or of its first slice; None where none describes its values.
        slices: (slice, distribution) of the parts that differ, such as the padding row of an embedding.
        fan: the connections that the distribution was derived from; None if it was derived from none.
        std: standard deviation of the distribution.
        key: the 64-bit key of its draws; None where nothing is drawn.
        why: what the distribution was read from.
        guess: whether it was guessed from names or from the order of modules.
        source: where values come from that have no distribution: "own code" of a buffer's owner, "computed" by the
            operators that the code called, "given" by the caller, "kept" as they were, or "orthogonal": the matrix that
            normal draws make.
        fits: how it was scaled to a batch, one for each part that is a layer; empty where it was not.
        unfitted: whether it is still to be scaled to a batch, so that std and distribution are not final.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    distribution: Distribution | None
    slices: tuple[tuple[DimSlice, Distribution], ...] = ()
    fan: float | None = None
    std: float | None = None
    key: int | None = None
    why: str = ""
    guess: bool = False
    source: str = "own code"
    fits: tuple[Fit, ...] = ()
    unfitted: bool = False

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, for JSON; the key and the distribution's parameters included."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "distribution": None if self.distribution is None else _distribution_to_dict(self.distribution),
            "slices": [
                {**part._asdict(), "distribution": _distribution_to_dict(distribution)}
                for part, distribution in self.slices
            ],
            "fan": self.fan,
            "std": self.std,
            "key": None if self.key is None else f"{self.key:016x}",
            "why": self.why,
            "guess": self.guess,
            **({"source": self.source} if self.source in ("orthogonal", "kept") else {}),
            **({"unfitted": True} if self.unfitted else {}),
            **({"fits": [fit.to_dict() for fit in self.fits]} if self.fits else {}),
        }


def _no_model() -> None:
    """In the place of a weak reference to a model that is not there."""


@dataclass
class InitReport:
    """What init_model_ did, or plan_model says that it would do. Printed, it is a table.

    It can be pickled, saved and sent to other ranks. The model does not travel with it.

    Args:
        seed: the seed of the keys.
        recipe: the recipe's name.
        rows: one for each parameter that is filled, then one for each buffer, in the order of the model.
        stream: the version of the stream.
    """

    seed: int
    recipe: str
    rows: tuple[Row, ...]
    stream: int = STREAM_VERSION
    digests: ModelDigest | None = None
    _model: Callable[[], nn.Module | None] = field(default=_no_model, repr=False, compare=False)
    _names: Names | None = field(default=None, repr=False, compare=False)

    def digest(self) -> ModelDigest:
        """Digest the model as it is now; the report shows the digests from then on.

        Raises:
            RuntimeError: if the model no longer exists, since the report does not keep it alive, or if the report has
                been unpickled.
            NotImplementedError: if a parameter has no digest; see model_digest.

        Example:
            >>> import torch, initlab
            >>> model = torch.nn.Linear(3, 2)
            >>> report = initlab.init_model_(model, seed=0)
            >>> report.digest() == initlab.model_digest(model)
            True
        """
        model = self._model()
        if model is None:
            raise RuntimeError(
                "the model of this report is not there: it no longer exists, or the report was unpickled, and a model "
                "does not travel with its report. Call initlab.model_digest(model)"
            )
        self.digests = model_digest(model, self._names)
        return self.digests

    def __getstate__(self) -> dict[str, Any]:
        """Without the reference to the model and `names`, which may be a function of the caller's: neither pickles."""
        return {name: value for name, value in vars(self).items() if name not in ("_model", "_names")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _model=_no_model, _names=None)

    def __copy__(self) -> "InitReport":
        return replace(self)  # in this process the model is there, also for a copy

    def __deepcopy__(self, memo: dict[int, Any]) -> "InitReport":
        return replace(self, digests=copy.deepcopy(self.digests, memo))  # all else cannot change

    @property
    def guesses(self) -> tuple[Row, ...]:
        """The rows whose distribution was guessed."""
        return tuple(row for row in self.rows if row.guess)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON; with digests once they have been asked for."""
        rows = [row.to_dict() for row in self.rows]
        for row in rows if self.digests is not None else ():
            row["digest"] = self.digests.parameters.get(row["name"])  # type: ignore[union-attr]
        plain: dict[str, Any] = {"seed": self.seed, "recipe": self.recipe, "stream": self.stream, "rows": rows}
        return plain if self.digests is None else plain | {"digest": self.digests.total}

    def __str__(self) -> str:
        return self.text()

    def text(self, lang: str = "en", width: int | None = None) -> str:
        """The report as it is printed.

        Args:
            lang: "en", or "zh" for Chinese.
            width: cells that a line of the table may take; None neither shortens it nor leaves columns out.

        Raises:
            ValueError: for another language.
        """
        say = translator(lang)
        head, rows = self.cells()
        spare = [say(name) for name in ("digest", "key", "fan", "dtype")]
        return "\n".join([table([*map(say, head)], rows, width=width, spare=spare), *self.summary(lang)])

    def summary(self, lang: str = "en") -> list[str]:
        """What is printed under the table.

        Args:
            lang: as of `text`.
        """
        say = translator(lang)
        total = sum(row.numel for row in self.rows)
        digest = "" if self.digests is None else f", digest {self.digests.total}"
        recipe = f"recipe {self.recipe}, seed {self.seed}, stream {self.stream}{digest}"
        lines = [say(f"{len(self.rows)} tensors, {total:,} elements: {recipe}")]
        if unfitted := sum(row.unfitted for row in self.rows):
            lines.append(say(f"{unfitted} not scaled yet: init_model_ with batch= scales what is a weight"))
        if self.guesses:
            lines.append(say(f"* {len(self.guesses)} guessed, from names or from the order of modules"))
        return lines

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table: its head, in English, and its rows."""
        head = ["name", "shape", "dtype", "distribution", "fan", "std", "key", "why"]
        rows = [self._cells(row) for row in self.rows]
        if any(row.fits for row in self.rows):
            head[7:7] = ["factor", "variance"]
            for cells, row in zip(rows, self.rows, strict=True):
                cells[7:7] = _fit_cells(row.fits)
        if self.digests is not None:
            head.insert(-1, "digest")
            for cells, row in zip(rows, self.rows, strict=True):
                cells.insert(-1, self.digests.parameters.get(row.name, ""))
        return head, rows

    def save(self, path: str | os.PathLike[str], *, lang: str = "en") -> Path:
        """Write the report as one HTML page that needs nothing else.

        Args:
            path: of the page, ending in .html; its folder must exist.
            lang: as of `text`.

        Returns:
            The path that was written.

        Raises:
            ValueError: for another ending, or another language.
            OSError: if it cannot be written; then what was there before is still there.
        """
        from ..pages import plan_page, write_page

        return write_page(path, lambda: plan_page(self, lang))

    def plot(self, *, lang: str = "en") -> Any:
        """The standard deviations by depth, beside what keeps the signal's size, as a matplotlib figure.

        Args:
            lang: as of `text`.

        Returns:
            A matplotlib.figure.Figure, which no window shows. Where the model is there, it also shows the values now.

        Raises:
            ImportError: where matplotlib is not installed.
            ValueError: for another language.
        """
        from ..plots import draw_panels, plan_panels

        return draw_panels(plan_panels(self, translator(lang)))

    def parameters_now(self) -> dict[str, Tensor]:
        """The plain parameters of the report's model by name, as they are; empty where the model is not there."""
        model = self._model()
        if model is None:
            return {}
        parameters, _ = tensor_refs(model, self._names)
        return {ref.name: ref.tensor for ref in parameters if ref.kind == "plain"}

    def _cells(self, row: Row) -> list[str]:
        distribution = row.source if row.distribution is None else str(row.distribution)
        for part, other in row.slices:
            rows = f"{part.start}" if part.length == 1 else f"{part.start}:{part.start + part.length}"
            told = f"{other.stddev:.4g}" if row.source == "orthogonal" else str(other)
            distribution += f"; [{':, ' * part.dim}{rows}] {told}"
        why = (
            row.why
            + (", not scaled yet" if row.unfitted else "")
            + ("".join(f", tied: {alias}" for alias in row.aliases))
        )
        return [
            row.name,
            " x ".join(map(str, row.shape)) or "scalar",
            str(row.dtype).removeprefix("torch."),
            distribution,
            "" if row.fan is None else f"{row.fan:g}",
            "" if row.std is None else f"{row.std:.4g}",
            "" if row.key is None else f"{row.key:016x}",
            f"* {why}" if row.guess else why,
        ]


def _fit_cells(fits: Sequence[Fit]) -> list[str]:
    """Factors and variances as cells; several parts are set apart by semicolons."""
    factors = "; ".join(f"{fit.factor:.4g}" for fit in fits)
    return [factors, "; ".join(f"{fit.before:.3g} -> {fit.after:.3g}" for fit in fits)]


def report_of(model: nn.Module, names: Names | None, seed: int, recipe: str, rows: Sequence[Row]) -> InitReport:
    """The report on a model, which it does not keep alive."""
    return InitReport(seed, recipe, tuple(rows), _model=weakref.ref(model), _names=names)


def _distribution_to_dict(distribution: Distribution) -> dict[str, Any]:
    fields = {name: getattr(distribution, name) for name in distribution.__dataclass_fields__}
    # JSON has neither complex numbers nor infinities.
    strange = {name: str(v) for name, v in fields.items() if isinstance(v, complex) or not math.isfinite(v)}
    return {"kind": type(distribution).__name__} | fields | strange
