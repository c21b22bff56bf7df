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

_ROW = 130  # pixels of a row of histograms
_LEGEND = 30


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
        draw=lambda figure: _grid(figure, names, draw),
        height=_height(len(rows)),
    )


def _ends(histogram: Histogram | None) -> tuple[str, str, str]:
    if histogram is None or not histogram.counts:
        return "", "", "100 %" if histogram is not None else ""
    bad = f"{100 * histogram.bad:.3g} %" if histogram.bad else ""
    return number(histogram.low), number(histogram.high), bad


def _height(count: int) -> int:
    return _LEGEND + _ROW * ((count + 1) // 2)


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
        axes.set_xticks([])
        return 0.0
    counts, edges = histogram.counts, _edges(histogram)
    peak = max(counts)
    axes.stairs([count / peak for count in counts], edges, fill=True, color=color, alpha=0.55, label=label)
    return 1.0


def _outline(axes: Any, histogram: Histogram, label: str) -> None:
    if histogram.counts:
        peak = max(histogram.counts)
        heights = [count / peak for count in histogram.counts]
        axes.stairs(heights, _edges(histogram), color=SECOND, linewidth=1.4, label=label)


def _edges(histogram: Histogram) -> list[float]:
    bins = len(histogram.counts)
    return [histogram.low + (histogram.high - histogram.low) * at / bins for at in range(bins + 1)]
