"""A panel as SVG within a page: its colours are the page's, its ids its own, its text is text."""

from __future__ import annotations

import io
import re
import warnings
from html import escape

from .figures import draw_panel, drawing
from .panel import Panel
from .style import ROLES, WIDTH

_ROOT = re.compile(r"<svg\b[^>]*>", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_ID = re.compile(r'(\bid="|url\(#|href="#)')
_FONT = re.compile(r"'DejaVu Sans'(, [^;\"]*)?")
_COLOUR = re.compile("|".join(ROLES), re.IGNORECASE)


def panel_svg(panel: Panel) -> str:
    """The picture of a panel, the same text whenever it is drawn.

    Args:
        panel: what to draw.

    Returns:
        An <svg> element, `style.WIDTH` wide, that scales with what holds it. Its label is the panel's alt text.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    with drawing(), warnings.catch_warnings():
        # Who reads the page has other fonts than are here.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        stream = io.StringIO()
        draw_panel(panel).savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = _METADATA.sub("", stream.getvalue())
    root = _ROOT.search(text)
    assert root is not None
    body = _COLOUR.sub(lambda found: f"var(--{ROLES[found[0].lower()]})", text[root.end() :])
    body = _ID.sub(lambda found: f"{found[1]}{panel.key}-", body)
    body = _FONT.sub("var(--font)", body)
    alt = escape(panel.alt, quote=True)
    return f'<svg class="plot" role="img" aria-label="{alt}" viewBox="0 0 {WIDTH} {panel.height}">{body.strip()}'
