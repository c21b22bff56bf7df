"""The parts of pages. Every function takes plain text and escapes it: what it returns is HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..languages import Say
from ..plots import Panel, panel_svg, plots_installed


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, of a CSS class."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def code_block(code: str, label: str, say: Say, key: str) -> str:
    """Code with a button that copies it.

    Args:
        label: what the code is.
        key: identifies it in the page.
    """
    label, copy, copied = escape(label), escape(say("Copy")), escape(say("Copied"))
    button = f'<button type="button" class="copy" data-copy="{key}" data-done="{copied}">{copy}</button>'
    return (
        f'<div class="code"><div class="bar"><span>{label}</span>{button}</div>'
        f'<pre tabindex="0" role="region" aria-label="{label}"><code id="{key}">{escape(code)}</code></pre></div>'
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
    drawn = plots_installed()
    without = "" if drawn else paragraph(say("matplotlib is not installed, so tables stand in place of plots."), "note")
    return without + f'<div class="grid">{"".join(figure(panel, say, drawn) for panel in found)}</div>'


def figure(panel: Panel, say: Say, drawn: bool) -> str:
    """One panel.

    Args:
        drawn: whether as a plot, with its numbers behind a click; else as a table.
    """
    picture = panel_svg(panel) if drawn else ""
    numbers = table(panel.head, panel.rows, f"{panel.title}{say(': ')}{say('numbers')}")
    opened = "" if drawn else " open"
    return (
        f'<figure id="{panel.key}"><figcaption><h2>{escape(panel.title)}</h2>{paragraph(panel.about)}</figcaption>'
        f"{picture}<details{opened}><summary>{escape(say('Numbers'))}</summary>{numbers}</details></figure>"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
