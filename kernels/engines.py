"""Which engine serves a tensor: the only place that decides. And what keeps every engine out of torch.compile."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_R = TypeVar("_R")

ENGINES = ("torch", "numba", "triton")


@functools.cache
def requested() -> str:
    """INITLAB_BACKEND, read once: auto (the default), torch, numba or triton."""
    value = os.environ.get("INITLAB_BACKEND") or "auto"
    if value not in ("auto", *ENGINES):
        raise ValueError(f"INITLAB_BACKEND is {value!r}; it must be one of auto, {', '.join(ENGINES)}")
    return value


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def choose(device: torch.device, offered: tuple[str, ...]) -> str:
    """The engine that serves tensors on `device`, out of those that an op offers.

    Args:
        device: where the tensor lies.
        offered: the op's engines. "torch" is always among them and runs anywhere; "numba" serves CPUs.

    Returns:
        The name of an engine.

    Raises:
        RuntimeError: if INITLAB_BACKEND names an engine that cannot serve this device, or is not installed.
        ValueError: if INITLAB_BACKEND is not a known name.

    Example:
        >>> import torch
        >>> from initlab.kernels import engines
        >>> engines.choose(torch.device("meta"), ("torch", "numba"))
        'torch'
    """
    wanted = requested()
    if wanted == "torch":
        return wanted
    if wanted == "auto":
        return "numba" if device.type == "cpu" and "numba" in offered and _installed("numba") else "torch"
    way_out = "unset INITLAB_BACKEND, or set it to auto or torch"
    if wanted not in offered:
        raise RuntimeError(f"INITLAB_BACKEND={wanted}, but this op has no {wanted} engine; {way_out}")
    if wanted == "numba" and device.type != "cpu":
        raise RuntimeError(f"INITLAB_BACKEND=numba serves CPU tensors only, and this one is on {device}; {way_out}")
    if not _installed(wanted):
        raise RuntimeError(f"INITLAB_BACKEND={wanted}, but {wanted} is not installed; install it, or {way_out}")
    return wanted


def eagerly(function: Callable[..., _R], *args: Any) -> _R:
    """function(*args), as a graph break where torch.compile is tracing: the stream forbids fused arithmetic.

    Example:
        >>> from initlab.kernels import eagerly
        >>> eagerly(max, 2, 3)
        3
    """
    if not torch.compiler.is_dynamo_compiling():
        return function(*args)
    global _uncompiled
    if _uncompiled is None:  # made on first use, since torch.compiler.disable imports all of dynamo
        _uncompiled = torch.compiler.disable(_call)
    return _uncompiled(function, *args)


def _call(function: Callable[..., _R], *args: Any) -> _R:
    return function(*args)


_uncompiled: Callable[..., Any] | None = None
