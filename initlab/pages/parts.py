"""The parts of pages. Every function takes plain text and escapes it: what it returns is HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..languages import Say
from ..plots import Panel, panel_svg, why_not


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, of a CSS class."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def code_block(code: str, label: str, say: Say, key: str, where: str = "") -> str:
    """Code with a button that copies it.

    Args:
        label: what the code is.
        key: identifies it in the page.
        where: tells it from others of that label, for who does not see where it is.
    """
    label, copy, copied = escape(label), escape(say("Copy")), escape(say("Copied"))
    region = f'tabindex="0" role="region" aria-label="{escape(where)}{label}"'
    button = f'<button type="button" class="copy" data-copy="{key}" data-done="{copied}">{copy}</button>'
    return (
        f'<div class="code"><div class="bar"><span>{label}</span>{button}</div>'
        f'<pre {region}><code id="{key}">{escape(code)}</code></pre></div>'
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{items}</dl>" if items else ""


def listing(texts: Sequence[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table that scrolls within itself where it is wide or long."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def panels(found: Sequence[Panel], say: Say) -> str:
    """Panels as figures, each with its numbers; without matplotlib the numbers alone, and a sentence that says so."""
    missing = why_not()
    without = paragraph(say(f"{missing}, so tables stand in place of plots."), "note") if missing else ""
    return without + f'<div class="grid">{"".join(figure(panel, say, not missing) for panel in found)}</div>'


def figure(panel: Panel, say: Say, drawn: bool) -> str:
    """One panel.

    Args:
        drawn: whether as a plot, with its numbers behind a click; else as a table.
    """
    picture = ""
    if drawn:
        try:
            picture = panel_svg(panel)
        except Exception as error:  # a report is not lost with a plot
            drawn = False
            picture = paragraph(say(f"this plot cannot be drawn: {type(error).__name__}: {error}"), "note")
    numbers = table(panel.head, panel.rows, f"{panel.title}{say(': ')}{say('numbers')}")
    opened = "" if drawn else " open"
    return (
        f'<figure id="{panel.key}"><figcaption><h2>{escape(panel.title)}</h2>{paragraph(panel.about)}</figcaption>'
        f"{picture}<details{opened}><summary>{escape(say('Numbers'))}</summary>{numbers}</details></figure>"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
