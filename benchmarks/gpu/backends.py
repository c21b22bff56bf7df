"""Filling by another backend than the one under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from initlab.kernels import Draw, backends, fill_

from .config import DRY


def fill_on_cpu(draws: list[Draw]) -> None:
    """Fill CPU tensors by the backend that serves them outside of a dry run, whose own is the one under test."""
    with_backend("torch" if DRY else "auto", lambda: fill_(draws))


def with_backend(name: str, call: Callable[[], Any]) -> None:
    """Call with INITLAB_BACKEND as if it were `name`."""
    before = backends.requested
    backends.requested = lambda: name  # type: ignore[assignment]
    try:
        call()
    finally:
        backends.requested = before
