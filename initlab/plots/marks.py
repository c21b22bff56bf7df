"""What the plots are drawn with: logarithmic axes on which zeros and values that are not finite have a place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .._console import shortened
from .style import FIRST, HEALTHY, MUTED, SECOND

NAME = 20  # characters of a name in a plot


def subplot(figure: Any, rows: int = 1, columns: int = 1, at: int = 1) -> Any:
    """Axes without vertical grid lines."""
    axes = figure.add_subplot(rows, columns, at)
    axes.grid(axis="x", visible=False)
    return axes


def legend(axes: Any, columns: int = 2) -> None:
    """A legend above the axes."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        borderpad=0.2,
        handlelength=1.6,
        columnspacing=1.2,
    )


def log_limits(axes: Any, values: Sequence[float], always: Sequence[float] = ()) -> None:
    """Make y logarithmic, with room for all positive values below and above.

    Args:
        values: those that are drawn.
        always: what has to be seen beside them, as the ends of a band.
    """
    known = [v for v in values if v > 0 and math.isfinite(v)]
    seen = [math.log10(v) for v in (*known, *always)] or [0.0]
    low, high = min(seen), max(seen)
    room = 0.08 * max(high - low, 1.0)
    axes.set_yscale("log")
    # A float's exponent ends at 308, and so do the ticks.
    axes.set_ylim(10 ** max(low - 1.5 * room, -300), 10 ** min(high + 1.5 * room, 300))
    plain_ticks(axes)


def plain_ticks(axes: Any) -> None:
    """Powers of ten as "1e-3", in plain text: no superscripts, which break text that is text."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    subs = (1.0,) if high > 30 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(_power))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _power(value: float, place: object = None) -> str:
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:g}"
    digits, _, exponent = f"{value:.0e}".partition("e")
    return f"{digits}e{int(exponent)}"


def band(axes: Any, low: float, high: float, label: str) -> None:
    """A healthy range."""
    axes.axhspan(low, high, facecolor=HEALTHY, alpha=0.14, edgecolor="none", label=label, zorder=0.5)


def series(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    label: str,
    *,
    color: str = FIRST,
    marker: str = "o",
    bad: str = SECOND,
    line: bool = True,
    filled: bool = True,
) -> None:
    """Values on logarithmic axes: zeros are triangles at the bottom, what is not finite is a cross at the top."""
    pairs = list(zip(x, y, strict=True))
    known = [(at, v if v > 0 and math.isfinite(v) else math.nan) for at, v in pairs]
    dense = len(pairs) > 60
    axes.plot(
        [at for at, _ in known],
        [v for _, v in known],
        color=color,
        marker=marker,
        markersize=2.5 if dense else 5,
        markerfacecolor=color if filled else "none",
        linestyle="-" if line else "none",
        linewidth=1.2,
        label=label,
    )
    size = 3.5 if dense else 7
    edge(axes, [at for at, v in pairs if v == 0], 0.02, color, "v", size)
    edge(axes, [at for at, v in pairs if not math.isfinite(v)], 0.97, bad, "X", size)


def edge(axes: Any, x: Sequence[float], height: float, color: str, marker: str, size: float = 7) -> None:
    """Marks at the bottom or the top, where the values themselves have no place."""
    if x:
        axes.plot(
            x,
            [height] * len(x),
            transform=axes.get_xaxis_transform(),
            color=color,
            marker=marker,
            markersize=size,
            linestyle="none",
            clip_on=False,
            zorder=4,
        )


def whole_ticks(axes: Any, count: int) -> None:
    """x counts things: from 1, no fractions."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, count + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))


def point_out(axes: Any, places: Sequence[tuple[int, str]], count: int) -> None:
    """A line at what a cause names, with its name; at most two, since names are long."""
    for level, (at, name) in enumerate(places[:2]):
        left = at < 0.5 * (count + 1)
        axes.axvline(at, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0.8)
        axes.annotate(
            shortened(name, NAME),
            (at, 0.04 + 0.09 * level),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4 if left else -4, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            fontsize=10,
            color=MUTED,
        )
