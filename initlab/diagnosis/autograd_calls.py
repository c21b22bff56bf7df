"""Seeing calls of torch.autograd.Function.apply, which is no function of torch's that a mode would see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

Run = Callable[..., Any]
Around = Callable[[type[torch.autograd.Function], Run, tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def function_calls(around: Around) -> Iterator[None]:
    """Inside the block, hand each call of an autograd function to `around`.

    Args:
        around: called with the function's class, what runs it, and the arguments; returns what the call gives.
    """
    inherited = torch.autograd.Function.__dict__["apply"]

    def apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        return around(function, inherited.__get__(None, function), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = inherited  # type: ignore[method-assign]
