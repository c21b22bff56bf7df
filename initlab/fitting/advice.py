"""Advice: what each layer of a model has, what it asks for, and what that does to the first loss, as a report."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from initlab.kernels import Distribution

from .._console import plain_data, table
from ..languages import translator


class LayerAdvice(NamedTuple):
    """What a layer has, and what its activation and the data ask for. Scales are standard deviations over a batch.

    Args:
        name: of the weight.
        op: the function that multiplies with it.
        shape: of the weight.
        fan_in: inputs that meet in an output; None where that is not known.
        activation: the function that its output meets first, "" if none was seen.
        scheme: which distribution that asks for: "He, before ReLU".
        is_head: whether its output reaches the loss and no other weight.
        reads_data: whether what it reads has met no weight before.
        input: root mean square of what it reads, as the model is.
        std: standard deviation of the weight, as the model is.
        output: of what it puts out, as the model is.
        wanted: standard deviation of the weight in the recipe.
        expected: of what it should put out with the recipe: root mean square of its input * wanted * sqrt(fan_in).
        measured: of what it did put out with the recipe.
        distribution: of the weight in the recipe; None where the recipe leaves it to its rest.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    fan_in: float | None
    activation: str
    scheme: str
    is_head: bool
    reads_data: bool
    input: float | None
    std: float
    output: float
    wanted: float | None
    expected: float | None
    measured: float | None
    distribution: Distribution | None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, for JSON."""
        return {**self._asdict(), "distribution": None if self.distribution is None else repr(self.distribution)}


class InputAdvice(NamedTuple):
    """A tensor of numbers in the batch.

    Args:
        code: an expression for it, such as "batch[0]".
        mean, std, low, high: of all elements.
    """

    code: str
    mean: float
    std: float
    low: float
    high: float

    @property
    def unscaled(self) -> bool:
        """Whether it is far from mean 0 and standard deviation 1."""
        return abs(self.mean) > max(1.0, self.std) or not 1 / 3 <= math.hypot(self.mean, self.std) <= 3


@dataclass(frozen=True)
class Advice:
    """What a model and a batch ask of a start. Printed, it is a verdict, tables, and a recipe to paste.

    Args:
        layers: one row for each weight, in the order in which they are used.
        inputs: the numbers that the model reads.
        loss: the first loss as the model is; None where there is no loss function.
        expected: the first loss of a model whose outputs say nothing yet: ln(V) of cross_entropy over V classes.
        why: how `expected` comes about.
        predicted: the first loss with the recipe, measured on this batch, and then undone.
        recipe: distributions by name pattern, for init_model_.
        code: the same as code to paste.
        notes: what else is to be said.
        seed: the seed of the recipe.
    """

    layers: tuple[LayerAdvice, ...]
    inputs: tuple[InputAdvice, ...]
    loss: float | None
    expected: float | None
    why: str
    predicted: float | None
    recipe: Mapping[str, Any]
    code: str
    notes: tuple[str, ...]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain data: numbers or null."""
        plain = plain_data(
            {
                "loss": self.loss,
                "expected": self.expected,
                "why": self.why,
                "predicted": self.predicted,
                "layers": [row.to_dict() for row in self.layers],
                "inputs": [row._asdict() for row in self.inputs],
                "notes": list(self.notes),
                "seed": self.seed,
            }
        )
        return {**plain, "code": self.code}

    def to_json(self) -> str:
        """The advice as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        return self.text()

    def text(self, lang: str = "en", width: int | None = None) -> str:
        """The advice as it is printed.

        Args:
            lang: "en", or "zh" for Chinese.
            width: cells that a line of a table may take; None neither shortens it nor leaves columns out.

        Raises:
            ValueError: for another language.
        """
        say = translator(lang)
        blocks = [self._told(say)]
        if self.inputs:
            cells = [[i.code, *map(_number, (i.mean, i.std, i.low, i.high))] for i in self.inputs]
            head = ["input", "mean", "std", "lowest", "highest"]
            blocks.append(table([*map(say, head)], cells, "lrrrr", width=width))
        head = ["weight", "op", "reads", "std", "puts out", "asks for", "wanted", "expected", "measured"]
        rows = [
            [
                row.name,
                row.op,
                _number(row.input),
                _number(row.std),
                _number(row.output),
                say(row.scheme),
                _number(row.wanted),
                _number(row.expected),
                _number(row.measured),
            ]
            for row in self.layers
        ]
        spare = [say("op"), say("reads")]
        blocks.append(table([*map(say, head)], rows, "llrrrlrrr", width=width, spare=spare))
        legend = "std, puts out: as the model is; wanted, expected, measured: with the recipe below"
        blocks[-1] += "\n" + say(legend)
        blocks += [say(f"note: {note}") for note in self.notes]
        blocks.append(say("recipe, tried on this batch:") + "\n" + _indented(say.code(self.code)))
        return "\n\n".join(blocks)

    def _told(self, say: Any) -> str:
        if self.loss is None:
            return str(say("no loss function was passed: the layers alone were looked at"))
        lines = [say(f"first loss as the model is: {self.loss:.4g}")]
        if self.expected is not None:
            lines.append(say(f"expected: {self.expected:.4g}, {self.why}"))
        lines.append(say(f"with the recipe: {self.predicted:.4g}"))
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _indented(code: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in code.splitlines())
