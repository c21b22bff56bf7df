"""Which engine serves a tensor: the only place that decides. And what keeps every engine out of torch.compile."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
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


@functools.cache
def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter (TRITON_INTERPRET=1), where they serve CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def choose(device: torch.device, offered: tuple[str, ...]) -> str:
    """The engine that serves tensors on `device`, out of those that an op offers.

    Args:
        device: where the tensor lies.
        offered: the op's engines. "torch" is always among them and runs anywhere; "numba" serves CPUs, "triton" GPUs
            of NVIDIA (compute capability 8.0 or later) and AMD. "triton" serves CPU tensors where it is asked for and
            TRITON_INTERPRET=1.

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
        best = {"cpu": "numba", "cuda": "triton"}.get(device.type, "torch")  # AMD's GPUs are "cuda" too
        fits = best in offered and _installed(best) and (best != "triton" or _unfit(device) is None)
        return best if fits else "torch"
    way_out = "unset INITLAB_BACKEND, or set it to auto or torch"
    if wanted not in offered:
        raise RuntimeError(f"INITLAB_BACKEND={wanted}, but this op has no {wanted} engine; {way_out}")
    if wanted == "numba" and device.type != "cpu":
        raise RuntimeError(f"INITLAB_BACKEND=numba serves CPU tensors only, and this one is on {device}; {way_out}")
    if not _installed(wanted):
        raise RuntimeError(f"INITLAB_BACKEND={wanted}, but {wanted} is not installed; install it, or {way_out}")
    if wanted == "triton" and (why := _unfit(device)) is not None:
        raise RuntimeError(f"INITLAB_BACKEND=triton, but {why}; {way_out}")
    return wanted


def load(device: torch.device, loaders: Mapping[str, Callable[[], ModuleType]]) -> ModuleType | None:
    """The module of the engine that serves tensors on `device`, or None where plain torch does.

    Args:
        device: where the tensors lie.
        loaders: what imports the op's engine of that name.

    Raises:
        RuntimeError: if INITLAB_BACKEND names an engine that cannot serve this device, or cannot be imported.
        ValueError: if INITLAB_BACKEND is not a known name.

    Example:
        >>> import torch
        >>> from initlab.kernels import engines
        >>> engines.load(torch.device("meta"), {}) is None
        True
    """
    name = choose(device, ("torch", *loaders))
    return None if name == "torch" else _imported(name, loaders[name])


@functools.cache
def _imported(name: str, loader: Callable[[], ModuleType]) -> ModuleType | None:
    try:
        return loader()
    except ImportError as error:  # it does not fit the numpy or Python at hand, say
        if requested() == name:
            raise RuntimeError(f"INITLAB_BACKEND={name}, but {name} cannot be imported: {error}") from error
        warnings.warn(f"{name} cannot be imported, so plain torch takes its place: {error}", stacklevel=2)
        return None


def _unfit(device: torch.device) -> str | None:
    """Why Triton cannot serve a device; None if it can."""
    if device.type == "cpu":
        return None if interpreted() else f"a tensor on {device} needs its interpreter: set TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"it serves CUDA and ROCm devices only, and this tensor is on {device}"
    return _too_old(device.index or 0)


@functools.cache
def _too_old(index: int) -> str | None:
    if not torch.cuda.is_available():
        return "this torch sees no GPU"
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"cuda:{index} has compute capability {major}.{minor}, and it needs 8.0"


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
