"""Panels as matplotlib figures. No window, no global state: pyplot is not imported."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .panel import Panel
from .style import CHINESE, DPI, INK, RC, WIDTH


def why_not() -> str:
    """Why there is nothing to draw with, in words; "" where there is."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "matplotlib"
        return "matplotlib is not installed" if missing else f"matplotlib cannot be imported ({error})"
    return ""


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
        from matplotlib import font_manager, rcParams
        from matplotlib.figure import Figure

        known = set(font_manager.get_font_names())
        rcParams["font.family"] = [*RC["font.family"], *(font for font in CHINESE if font in known)]
        pairs = [panels[at : at + 2] for at in range(0, len(panels), 2)]
        heights = [max(panel.height for panel in pair) + 40 for pair in pairs] or [100]
        figure = Figure(figsize=(2 * WIDTH / DPI, sum(heights) / DPI), layout="constrained", facecolor="white")
        parts = figure.subfigures(len(pairs) or 1, 2, squeeze=False, height_ratios=heights)
        for pair, row in zip(pairs, parts, strict=False):
            for panel, part in zip(pair, row, strict=False):
                part.suptitle(panel.title, color=INK, fontsize=13)
                panel.draw(part)
        figure.canvas.draw()  # while the style is in force
        # Without pyplot's inline backend IPython knows no picture of a Figure, and shows its size.
        figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
        return figure


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def draw_panel(panel: Panel) -> Any:
    """A figure of one panel; `drawing` has to be in force."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, panel.height / DPI), layout="constrained")
    panel.draw(figure)
    return figure


@contextmanager
def drawing() -> Iterator[None]:
    """The style.

    Raises:
        ImportError: where matplotlib cannot be imported.
    """
    missing = why_not()
    if missing:
        raise ImportError(f'plots need matplotlib, and {missing}: pip install "initlab[plots]"')
    import matplotlib

    with matplotlib.rc_context(RC):
        yield
