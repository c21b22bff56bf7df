"""The page of an InitReport: which distribution each parameter gets."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ..languages import translator
from ..plots import plan_panels
from .layout import MAKER, html_page
from .parts import listing, panels, table

if TYPE_CHECKING:
    from ..models import InitReport


def plan_page(report: InitReport, lang: str = "en") -> str:
    """An InitReport as an HTML page.

    Args:
        report: of init_model_ or plan_model.
        lang: "en", or "zh" for Chinese.

    Raises:
        ValueError: for another language.
    """
    say = translator(lang)
    headline, *others = report.summary(lang)
    head, rows = report.cells()
    label = say("Parameters and buffers")
    body = (
        f'<header class="plan">{MAKER}<h1>{escape(headline)}</h1>{listing(others)}</header><main>'
        f"{panels(plan_panels(report, say), say)}<section><h2>{escape(label)}</h2>"
        f"{table([*map(say, head)], rows, label)}</section></main>"
    )
    return html_page(headline, body, lang)
