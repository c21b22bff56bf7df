"""Puts a page into a file: all of it, or nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of a page, once it is known to be one.

    Args:
        path: of a file that may or may not exist, in a folder that does.

    Raises:
        ValueError: if it does not end in .html.
        FileNotFoundError: if there is no such folder.
        IsADirectoryError: if it is a folder itself.

    Example:
        >>> from initlab.pages import checked_path
        >>> checked_path("report.html").name
        'report.html'
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise ValueError(f"path is {str(path)!r}; a page is written as HTML, so its name must end in .html")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path is {str(path)!r}; there is no folder {str(path.parent)!r}: create it first")
    if path.is_dir():
        raise IsADirectoryError(f"path is {str(path)!r}, which is a folder; name a file in it")
    return path


def write_page(path: str | os.PathLike[str], make: Callable[[], str]) -> Path:
    """Write a page beside its place, then move it there, so that nobody finds half of one.

    Args:
        path: as of `checked_path`; looked at before the page is made.
        make: returns the page.

    Returns:
        The path.

    Raises:
        OSError, ValueError: as `checked_path`, or if the file cannot be written.
    """
    path = checked_path(path)
    data = make().encode("utf-8", "xmlcharrefreplace")
    place = path.resolve()  # what a link points at is replaced, not the link
    draft = place.with_name(f".initlab-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(draft, "xb") as file:
            file.write(data)
        os.replace(draft, place)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return path
