"""Panels of results: series by step or depth, and ratios as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .marks import legend, log_limits, series, subplot, whole_ticks
from .panel import Panel, number
from .style import FIRST, HEALTHY, MUTED, SECOND, THIRD

LOOKS = [(FIRST, "o"), (SECOND, "s"), (HEALTHY, "^"), (THIRD, "D")]
_SPREAD = 3  # a median with the ends of its spread


def curves_panel(
    key: str, title: str, about: str, x_label: str, y_label: str, found: Mapping[str, Sequence[float]]
) -> Panel:
    """A panel of up to four series by step or depth, on a logarithmic axis.

    Args:
        key, title, about: of the panel.
        x_label, y_label: of the axes.
        found: values by the name of their series; the first of each is that of step 1.
    """

    def draw(figure: Any) -> None:
        axes = subplot(figure)
        log_limits(axes, [v for values in found.values() for v in values])
        for (label, values), (color, marker) in zip(found.items(), LOOKS, strict=False):
            series(axes, range(1, len(values) + 1), values, label, color=color, marker=marker, bad=color)
        whole_ticks(axes, max(map(len, found.values())))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        legend(axes, 4 if sum(map(len, found)) < 32 else 2)

    ends = "; ".join(f"{name}: {number(values[0])} first, {number(values[-1])} last" for name, values in found.items())
    longest = max(map(len, found.values()))
    rows = tuple(
        (str(at + 1), *(number(values[at]) if at < len(values) else "" for values in found.values()))
        for at in range(longest)
    )
    return Panel(key, title, about, f"{about} {ends}.", (x_label, *found), rows, draw, 250)


def ratios_panel(key: str, title: str, about: str, label: str, found: Mapping[str, Sequence[float]]) -> Panel:
    """A panel of ratios as bars from 1, on a logarithmic axis.

    Args:
        key, title, about: of the panel.
        label: of the axis.
        found: by the name of its bar a ratio alone, or with the ends of its spread: median, lowest, highest.
    """
    names = list(found)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        axes.set_xscale("log")
        places = range(len(names))[::-1]
        middles = [values[0] for values in found.values()]
        # From 1 to either side: what is slower than its peer lies to the left.
        lefts, widths = [min(v, 1.0) for v in middles], [abs(v - 1.0) for v in middles]
        colors = [FIRST if v >= 1 else SECOND for v in middles]
        axes.barh(places, widths, left=lefts, height=0.62, color=colors)
        for place, values in zip(places, found.values(), strict=True):
            if len(values) == _SPREAD:
                axes.plot(values[1:], [place, place], color=MUTED, linewidth=2.2, solid_capstyle="butt")
            end = max(*values, 1.0)
            axes.annotate(
                f"{number(values[0])}x", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=10
            )
        low, high = min(*map(min, found.values()), 1.0), max(*map(max, found.values()), 1.0)
        axes.set_xlim(low / 1.15, high * (high / low) ** 0.25 * 1.3)
        axes.axvline(1.0, color=MUTED, linewidth=1.0)
        axes.set_yticks(places, names)
        _plain(axes)
        axes.set_xlabel(label)

    said = "; ".join(f"{name}: {number(values[0])}" for name, values in found.items())
    spread = any(len(values) == _SPREAD for values in found.values())
    rows = tuple((name, *map(number, values)) for name, values in found.items())
    head = ("", label, *(("lowest", "highest") if spread else ()))
    return Panel(key, title, about, f"{about} {said}.", head, rows, draw, 70 + 26 * len(names))


def _plain(axes: Any) -> None:
    """1, 2, 5 and 10 as such, where powers of ten alone would be few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
