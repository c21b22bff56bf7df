"""The page of a diagnosis: verdict, causes and remedies first, then what was measured."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ..languages import Say, translator
from ..plots import diagnosis_panels
from .layout import MAKER, html_page
from .parts import code_block, facts, listing, panels, paragraph

if TYPE_CHECKING:
    from ..diagnosis import Cause, Diagnosis


def diagnosis_page(diagnosis: Diagnosis, lang: str = "en") -> str:
    """A diagnosis as an HTML page.

    Args:
        diagnosis: what `diagnose` found.
        lang: "en", or "zh" for Chinese.

    Raises:
        ValueError: for another language.
    """
    say = translator(lang)
    headline = diagnosis.headline(lang)
    return html_page(headline[0], diagnosis_body(diagnosis, lang, say), lang)


def diagnosis_body(diagnosis: Diagnosis, lang: str, say: Say, before: str = "", after: str = "") -> str:
    """What a diagnosis has to show.

    Args:
        before: HTML that comes before the verdict.
        after: HTML that comes after the causes.
    """
    verdict, *course = diagnosis.headline(lang)
    found = diagnosis_panels(diagnosis, say)
    causes = "".join(cause_section(number, cause, say) for number, cause in enumerate(diagnosis.causes, 1))
    loss = [panel for panel in found if panel.key == "loss"]
    others = [panel for panel in found if panel.key != "loss"]
    notes = listing([say(note) for note in diagnosis.notes])
    told = f"<section><h2>{escape(say('Notes'))}</h2>{notes}</section>" if notes else ""
    nothing = paragraph(say("Nothing is wrong."), "cause")
    return (
        f'<header class="{diagnosis.verdict}">{MAKER}<h1>{escape(verdict)}</h1>{listing(course)}</header><main>{before}'
        f'<div class="top"><div>{causes or nothing}{after}</div>'
        f"{panels(loss, say) if loss else ''}</div>{panels(others, say)}{told}</main>"
    )


def cause_section(number: int, cause: Cause, say: Say) -> str:
    """A cause, its evidence and its remedy."""
    title, lines, evidence, remedy = cause.said(say)
    code = code_block(say.code(cause.remedy), remedy, say, f"remedy-{number}", f"{number}. ") if cause.remedy else ""
    return (
        f'<section class="cause {cause.severity}"><h2>{number}. {escape(title)}</h2>'
        f"{''.join(map(paragraph, lines))}{code}{facts(evidence)}</section>"
    )
