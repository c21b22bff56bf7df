"""A panel: one plot, what it says in words, and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Panel:
    """One plot of a report.

    Args:
        key: identifies it in its page.
        title: a few words.
        about: how to read it, in a sentence or two.
        alt: what it shows, for who does not see it.
        head: names of the columns of its numbers.
        rows: the numbers, as cells.
        draw: draws it into a matplotlib figure or subfigure.
        height: of the figure, in pixels; each is `style.WIDTH` wide.
    """

    key: str
    title: str
    about: str
    alt: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    draw: Callable[[Any], None]
    height: int


def number(value: float | None) -> str:
    """A number in three digits; nothing for None.

    Example:
        >>> from initlab.plots.panel import number
        >>> number(0.012345), number(None), number(float("inf"))
        ('0.0123', '', 'inf')
    """
    return "" if value is None else f"{value:.3g}"


def span(values: Sequence[float]) -> str:
    """The smallest and the largest of some numbers, in words: "0.1 to 12"; "none" of none.

    Example:
        >>> from initlab.plots.panel import span
        >>> span([2.0, 1.0]), span([1.0])
        ('1 to 2', '1')
    """
    if not values:
        return "none"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"
