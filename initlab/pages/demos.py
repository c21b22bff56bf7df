"""The page that the demo leaves behind: its claims, whether each held, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..languages import translator
from ..plots import Panel
from .layout import MAKER, html_page
from .parts import listing, panels, paragraph


def demo_page(verdict: str, made: str, claims: Sequence[tuple[str, bool]], found: Sequence[Panel]) -> str:
    """What `initlab demo` showed, as an HTML page.

    Args:
        verdict: its last line.
        made: by what, and where.
        claims: each with whether it held.
        found: its pictures.
    """
    held = [f"{'holds' if holds else 'FAILED'}: {text}" for text, holds in claims]
    body = (
        f'<header class="plan">{MAKER}<h1>{escape(verdict)}</h1>{paragraph(made)}</header><main>'
        f"{panels(found, translator('en'))}<section><h2>Claims</h2>{listing(held)}</section></main>"
    )
    return html_page("initlab demo", body, "en")
