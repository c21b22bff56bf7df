"""The page of a script that ran under the doctor."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ..languages import translator
from .diagnoses import diagnosis_body
from .layout import MAKER, html_page
from .parts import code_block, paragraph

if TYPE_CHECKING:
    from ..scripts.report import ScriptReport


def script_page(report: ScriptReport, lang: str = "en") -> str:
    """A ScriptReport as an HTML page.

    Args:
        report: what `run_script` returned.
        lang: "en", or "zh" for Chinese.

    Raises:
        ValueError: for another language.
    """
    say = translator(lang)
    headline, *lines = report.summary(lang)
    told = "".join(paragraph(line.strip()) for line in lines)
    if report.diagnosis is None:
        header = f'<header class="{report.verdict}">{MAKER}<h1>{escape(headline)}</h1></header>'
        return html_page(headline, f"{header}<main><section>{told}</section></main>", lang)
    preamble = ""
    if report.shows_preamble:
        preamble = code_block(report.preamble, say("In the script, the names of the remedy are:"), say, "preamble")
    before = f"<section><h2>{escape(headline)}</h2>{told}</section>"
    return html_page(headline, diagnosis_body(report.diagnosis, lang, say, before, preamble), lang)
