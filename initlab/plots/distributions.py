"""Histograms: of weights beside the distribution that their layer asks for, and of what layers put out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._console import shortened
from ..languages import Say
from .marks import NAME
from .panel import Panel, number
from .style import FIRST, HEALTHY, INK, SECOND

if TYPE_CHECKING:
    from ..diagnosis import Diagnosis
    from ..diagnosis.histograms import Histogram

_ROW = 112  # pixels of a row of histograms
_LEGEND = 30
_FULL = 10  # elements of a bin on average, as a rule


def weight_histograms(diagnosis: Diagnosis, say: Say) -> Panel | None:
    """How the weights that matter are distributed."""
    weights = () if diagnosis.measurements is None else diagnosis.measurements.weights
    rows = [(row.name, row.histogram, row.std, row.wanted) for row in weights if row.histogram is not None]
    if not rows:
        return None

    def draw(axes: Any, place: int) -> None:
        _, histogram, _, wanted = rows[place]
        peak = _bars(axes, histogram, say("weights"), FIRST)
        if wanted and peak:
            low, high = axes.get_xlim()
            reach = min(4 * wanted, 20 * max(abs(low), abs(high)))
            axes.set_xlim(min(low, -reach), max(high, reach))
            xs = [reach * (at / 60 - 1) for at in range(121)]
            curve = [peak * math.exp(-0.5 * (x / wanted) ** 2) for x in xs]
            axes.plot(xs, curve, color=HEALTHY, linestyle=(0, (4, 2)), label=say("normal, as wide as asked for"))

    return Panel(
        key="weight-histograms",
        title=say("Weights, distributed"),
        about=say("Weights of the layers that matter, before the first step. All curves are scaled to one height."),
        alt=say("; ").join(
            f"{name}{say(': ')}{say('std')} {number(std)}{_wanted(wanted, say)}" for name, _, std, wanted in rows
        ),
        head=tuple(map(say, ("name", "std", "wanted", "lowest", "highest", "not finite"))),
        rows=tuple((name, number(std), number(wanted), *_ends(histogram)) for name, histogram, std, wanted in rows),
        draw=lambda figure: _grid(figure, [name for name, *_ in rows], draw),
        height=_height(len(rows)),
    )


def _wanted(wanted: float | None, say: Say) -> str:
    return "" if wanted is None else f"{say(', ')}{say('wanted')} {number(wanted)}"


def activation_histograms(diagnosis: Diagnosis, say: Say) -> Panel | None:
    """How the outputs of the layers that matter are distributed."""
    rows = () if diagnosis.measurements is None else diagnosis.measurements.activations
    rows = tuple(row for row in rows if row.output is not None)
    if not rows:
        return None

    def draw(axes: Any, place: int) -> None:
        row = rows[place]
        _bars(axes, row.output, say("output"), FIRST)
        if row.activated is not None:
            _outline(axes, row.activated, say("after the activation"))

    names = [f"{row.name or say('(model)')}{f', {row.function}' if row.function else ''}" for row in rows]
    titles = [f"{name}{_bad(row.output, say)}" for name, row in zip(names, rows, strict=True)]
    return Panel(
        key="activation-histograms",
        title=say("Outputs, distributed"),
        about=say(
            "Outputs in the first pass of the layers that matter: those of causes, the first, the last, the extremes. "
            "All curves are scaled to one height."
        ),
        alt=say("; ").join(
            f"{name}{say(': ')}{' .. '.join(_ends(row.output)[:2])}" for name, row in zip(names, rows, strict=True)
        ),
        head=tuple(map(say, ("layer", "activation", "lowest", "highest", "not finite"))),
        rows=tuple((row.name or say("(model)"), row.function, *_ends(row.output)) for row in rows),
        draw=lambda figure: _grid(figure, titles, draw),
        height=_height(len(rows)),
    )


def _ends(histogram: Histogram | None) -> tuple[str, str, str]:
    if histogram is None or not histogram.counts:
        return "", "", "100 %" if histogram is not None else ""
    bad = f"{100 * histogram.bad:.3g} %" if histogram.bad else ""
    return number(histogram.low), number(histogram.high), bad


def _height(count: int) -> int:
    return _LEGEND + _ROW * ((count + 1) // 2)


def _bad(histogram: Histogram | None, say: Say) -> str:
    """How much of a histogram is not finite, for its title."""
    return say(f", {100 * histogram.bad:.2g} % not finite") if histogram is not None and histogram.bad else ""


def _grid(figure: Any, names: Sequence[str], draw: Callable[[Any, int], None]) -> None:
    """Small axes in two columns, with one legend for all."""
    rows, columns = (len(names) + 1) // 2, min(2, len(names))
    known: dict[str, Any] = {}
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        draw(axes, place)
        axes.set_ylim(0, None)
        axes.xaxis.get_major_locator().set_params(nbins=4)
        axes.ticklabel_format(axis="x", scilimits=(-3, 4), useOffset=False)
        axes.set_title(shortened(name, NAME + 2 if columns == 2 else 2 * NAME), fontsize=10)
        known.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if known:
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=2, borderpad=0)


def _bars(axes: Any, histogram: Histogram | None, label: str, color: str) -> float:
    """Filled bars; how high the highest is."""
    if histogram is None or not histogram.counts:
        axes.text(0.5, 0.5, "NaN, inf", transform=axes.transAxes, ha="center", va="center", color=INK)
        axes.plot([0.5], [0.8], transform=axes.transAxes, color=SECOND, marker="X", linestyle="none")
        axes.set_xticks([])
        return 0.0
    axes.stairs(*_steps(histogram), fill=True, color=color, alpha=0.55, label=label)
    return 1.0


def _outline(axes: Any, histogram: Histogram, label: str) -> None:
    if histogram.counts:
        axes.stairs(*_steps(histogram), color=SECOND, linewidth=1.4, label=label)


def _steps(histogram: Histogram) -> tuple[list[float], list[float]]:
    """Heights, the highest 1, and the edges between them: bins that would hold few elements are put together."""
    counts = histogram.counts
    together = next((n for n in (1, 2, 4, 5) if sum(counts) * n >= _FULL * len(counts)), 8)
    sums = [sum(counts[at : at + together]) for at in range(0, len(counts), together)]
    width = (histogram.high - histogram.low) / len(counts)
    edges = [histogram.low + width * min(at * together, len(counts)) for at in range(len(sums) + 1)]
    return [count / max(sums) for count in sums], edges
