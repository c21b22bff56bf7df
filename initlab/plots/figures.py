"""Panels as matplotlib figures. No window, no global state: pyplot is not imported."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .panel import Panel
from .style import DPI, INK, RC, WIDTH


def plots_installed() -> bool:
    """Whether matplotlib is there to draw with."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_panels(panels: Sequence[Panel]) -> Any:
    """One figure of all panels, in two columns.

    Args:
        panels: what to draw.

    Returns:
        A matplotlib.figure.Figure.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    with drawing():
        from matplotlib.figure import Figure

        pairs = [panels[at : at + 2] for at in range(0, len(panels), 2)]
        heights = [max(panel.height for panel in pair) + 40 for pair in pairs] or [100]
        figure = Figure(figsize=(2 * WIDTH / DPI, sum(heights) / DPI), layout="constrained", facecolor="white")
        parts = figure.subfigures(len(pairs) or 1, 2, squeeze=False, height_ratios=heights)
        for pair, row in zip(pairs, parts, strict=False):
            for panel, part in zip(pair, row, strict=False):
                part.suptitle(panel.title, fontweight="bold", color=INK, fontsize=12)
                panel.draw(part)
        figure.canvas.draw()  # while the style is in force
        return figure


def draw_panel(panel: Panel) -> Any:
    """A figure of one panel; `drawing` has to be in force."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, panel.height / DPI), layout="constrained")
    panel.draw(figure)
    return figure


@contextmanager
def drawing() -> Iterator[None]:
    """The style, and no words on glyphs that the fonts here lack: who reads a page has fonts of their own.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError('plots need matplotlib: pip install "initlab[plots]"') from error
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        yield
