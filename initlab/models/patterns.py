"""Name patterns: which names of a model a pattern selects."""

import glob
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase, translate
from typing import Any

_HAS_WILDCARD = re.compile(r"[*?[]").search


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern selects a name: the name itself, a glob, or the name of a module, which selects all within it.

    This knows one name only. Among the names of a model an exact name comes before a glob: see `compile_pattern`.

    Example:
        >>> from initlab.models.patterns import matches
        >>> [matches("h.0.attn.weight", p) for p in ("h.*.weight", "h.0", "h.1", "weight")]
        [True, True, False, False]
    """
    return _is_within(name, pattern) or fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def compile_pattern(pattern: str, names: Collection[str]) -> Callable[[str], Any]:
    """What tells whether a pattern selects a name, among the names of one model: it returns something true if so.

    Names may hold the characters of globs, as in ParameterDict({"w[0]": ...}). Where the beginning of a pattern, up to
    a dot or all of it, is the exact name of a tensor or module, it means that one; only the rest is a glob.

    Args:
        pattern: an exact name, a glob, or the name of a module, which selects everything within it.
        names: all names among which it selects.

    Example:
        >>> from initlab.models.patterns import compile_pattern
        >>> names = ["w[0]", "w0", "h[1].weight", "h1.weight"]
        >>> [list(filter(compile_pattern(pattern, names), names)) for pattern in ("w[0]", "h[1].*", "h[12]*")]
        [['w[0]'], ['h[1].weight'], ['h1.weight']]
    """
    if _HAS_WILDCARD(pattern) and _HAS_WILDCARD("\n".join(names)):
        exact = pattern
        while exact and not any(_is_within(name, exact) for name in names):
            exact = exact.rpartition(".")[0]
        pattern = glob.escape(exact) + pattern[len(exact) :]
    return re.compile(f"{translate(pattern)}|{translate(f'{pattern}.*')}").match


def _is_within(name: str, owner: str) -> bool:
    """Whether a name is `owner`, or that of something within the module `owner`."""
    return name == owner or name.startswith(f"{owner}.")
