"""Everything that is printed: tables, shortened lists, JSON, progress bars, and colour where a terminal shows it.

What a report says must not depend on where it is read. So tables and lists are plain text, the same in a terminal, in a
notebook and in a file; only `say` and `progress`, which write to a stream themselves, ask whether it is a terminal.
rich is imported where it is used: `import initlab` does not load it.
"""

from __future__ import annotations

import math
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO


def warn(message: str) -> None:
    """A UserWarning that names the line of the caller's own code, however many functions of ours, or hooks of torch's,
    lie between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("initlab", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    align: str = "",
    *,
    width: int | None = None,
    spare: Collection[str] = (),
) -> str:
    """An aligned table: the head, a rule, the rows. Never wrapped or coloured, and cut only to a width that is given.

    Columns are as wide as their widest cell, by the cells that a terminal gives to each character. rich.table.Table
    would take milliseconds for a row, and models have thousands.

    Args:
        head: names of the columns.
        rows: cells, as many in each row as the head has.
        align: one letter for each column, "l" or "r"; columns without a letter are aligned left.
        width: cells that a line may take. Columns of `spare` are left out, then text is shortened in its middle.
        spare: names of columns that may be left out, the first ones first.

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

    lines = [list(line) for line in (head, *rows)]
    sizes = [[cell_len(cell) for cell in line] for line in lines]
    widths = [max(column) for column in zip(*sizes, strict=True)]
    right = [letter == "r" for letter in align.ljust(len(widths))]
    if width is not None:
        kept = _kept(head, widths, right, width, spare)
        lines = [[line[at] for at in kept] for line in lines]
        widths, right = [widths[at] for at in kept], [right[at] for at in kept]
        _narrow(widths, right, width)
        lines = [[shortened(cell, room) for cell, room in zip(line, widths, strict=True)] for line in lines]
        sizes = [[cell_len(cell) for cell in line] for line in lines]

    def aligned(line: Sequence[str], size: Sequence[int]) -> str:
        cells = []
        for cell, used, wide, to_right in zip(line, size, widths, right, strict=True):
            blank = " " * (wide - used)
            cells.append(blank + cell if to_right else cell + blank)
        return "  ".join(cells).rstrip()

    first, *others = map(aligned, lines, sizes)
    return "\n".join([first, "  ".join("-" * wide for wide in widths), *others])


_READABLE = 24  # cells that a name needs to be told from others


def _kept(head: Sequence[str], widths: list[int], right: list[bool], width: int, spare: Collection[str]) -> list[int]:
    """Which columns a table of that width has room for."""
    kept = list(range(len(head)))
    for name in spare:
        least = sum(widths[at] if right[at] else min(widths[at], _READABLE) for at in kept) + 2 * (len(kept) - 1)
        if least <= width:
            break
        kept = [at for at in kept if head[at] != name]
    return kept


def _narrow(widths: list[int], right: list[bool], width: int) -> None:
    """Take from the widest column of text until a line fits, or none is wide any more."""
    while sum(widths) + 2 * (len(widths) - 1) > width:
        at = max(range(len(widths)), key=lambda place: 0 if right[place] else widths[place])
        if widths[at] <= 4 or right[at]:
            return
        widths[at] -= 1


def shortened(text: str, width: int) -> str:
    """A text in at most so many cells of a terminal: its middle gives way, of a dotted name that of its longest parts.

    Example:
        >>> from initlab._console import shortened
        >>> shortened("encoder.layers.11.attention.weight", 28)
        'en…er.la…rs.11.att…on.weight'
    """
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    parts = text.split(".") if " " not in text else [text]
    rooms = [cell_len(part) for part in parts]
    while sum(rooms) + len(rooms) - 1 > width:
        longest = max(range(len(rooms)), key=rooms.__getitem__)
        if rooms[longest] <= 3:  # many short parts: the name as a whole
            return _middle_cut(text, width)
        rooms[longest] -= 1
    return ".".join(map(_middle_cut, parts, rooms))


def _middle_cut(text: str, width: int) -> str:
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    left = width // 2
    back = set_cell_size(text[::-1], width - 1 - left).rstrip()[::-1]
    return f"{set_cell_size(text, left).rstrip()}\u2026{back}"


def line_width() -> int:
    """Cells of a line where a command prints: COLUMNS, else the terminal's, else 80."""
    return shutil.get_terminal_size().columns


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
