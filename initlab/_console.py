"""Everything that is printed: tables, shortened lists, JSON, progress bars, and colour where a terminal shows it.

What a report says must not depend on where it is read. So tables and lists are plain text, the same in a terminal, in a
notebook and in a file; only `say` and `progress`, which write to a stream themselves, ask whether it is a terminal.
rich is imported where it is used: `import initlab` does not load it.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO


def warn(message: str) -> None:
    """A UserWarning that names the line of the caller's own code, however many functions of ours lie between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "initlab":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """An aligned table: the head, a rule, the rows. Never wrapped, cut or coloured, whatever the terminal.

    Columns are as wide as their widest cell, by the cells that a terminal gives to each character. rich.table.Table
    would take milliseconds for a row, and models have thousands.

    Args:
        head: names of the columns.
        rows: cells, as many in each row as the head has.
        align: one letter for each column, "l" or "r"; columns without a letter are aligned left.

    Returns:
        Lines joined by newlines, without trailing spaces.

    Example:
        >>> from initlab._console import table
        >>> print(table(["layer", "gain"], [["encoder", "1.5"], ["head", "12"]], "lr"))
        layer    gain
        -------  ----
        encoder   1.5
        head       12
    """
    from rich.cells import cell_len

    lines = [head, *rows]
    sizes = [[cell_len(cell) for cell in line] for line in lines]
    widths = [max(column) for column in zip(*sizes, strict=True)]
    right = [letter == "r" for letter in align.ljust(len(widths))]

    def aligned(line: Sequence[str], size: Sequence[int]) -> str:
        cells = []
        for cell, used, width, to_right in zip(line, size, widths, right, strict=True):
            blank = " " * (width - used)
            cells.append(blank + cell if to_right else cell + blank)
        return "  ".join(cells).rstrip()

    first, *others = map(aligned, lines, sizes)
    return "\n".join([first, "  ".join("-" * width for width in widths), *others])


def listing(lines: Sequence[str], limit: int = 20) -> str:
    """Lines of a message, each on a line of its own and indented, at most `limit` of them.

    Example:
        >>> from initlab._console import listing
        >>> print("these cannot be filled:" + listing(["a", "b", "c", "d"], limit=2))
        these cannot be filled:
          a
          b
          ... and 2 more
    """
    shown = [*lines[:limit], *([f"... and {len(lines) - limit} more"] if len(lines) > limit else [])]
    return "".join(f"\n  {line}" for line in shown)


def inline_listing(names: Sequence[str], limit: int) -> str:
    """Names within a sentence, at most `limit` of them.

    Example:
        >>> from initlab._console import inline_listing
        >>> inline_listing(["a", "b"], 2), inline_listing(["a", "b", "c", "d"], 2)
        ('a, b', 'a, b and 2 more')
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


@contextmanager
def progress(description: str, total: int, show: bool | None = None) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr, which goes away when the work is done.

    Args:
        description: stands before the bar.
        total: units of work.
        show: whether to show it; None shows it where stderr is a terminal.

    Returns:
        A context manager that gives a function: called with a number of units each time that many more are done.

    Example:
        >>> from initlab._console import progress
        >>> with progress("initlab", total=10, show=False) as advance:
        ...     advance(10)
    """
    if not (_is_terminal(sys.stderr) if show is None else show):
        yield lambda units: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda units: bar.advance(task, units)


def say(text: str, style: str = "", *, stderr: bool = False) -> None:
    """Print a text, in colour if the stream is a terminal; nothing else of the text changes.

    Args:
        text: one line or several.
        style: as rich takes it: "bold red", "green", "dim".
        stderr: whether to print to stderr; stdout otherwise.

    Example:
        >>> from initlab._console import say
        >>> say("verdict: healthy", "green")
        verdict: healthy
    """
    stream = sys.stderr if stderr else sys.stdout
    if not style or not _is_terminal(stream):
        print(text, file=stream, flush=True)
        return
    from rich.console import Console

    console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(text, style=style)


def plain_data(value: Any) -> Any:
    """What json.dumps writes as JSON: lists and dicts with strings as keys, None in the place of NaN and infinities.

    Example:
        >>> from initlab._console import plain_data
        >>> plain_data({"losses": (1.0, float("inf")), 2: "x"})
        {'losses': [1.0, None], '2': 'x'}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    return value


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
