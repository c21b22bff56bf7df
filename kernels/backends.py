"""Which backend serves a tensor, for every op: choose, import, fall back. And what keeps it out of torch.compile."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

_R = TypeVar("_R")

BACKENDS = ("torch", "numba", "triton")
_BEST = {"cpu": "numba", "cuda": "triton"}  # by device type; AMD's GPUs are "cuda" too. Plain torch serves the others


@functools.cache
def requested() -> str:
    """INITLAB_BACKEND, read once: auto (the default), torch, numba or triton."""
    value = os.environ.get("INITLAB_BACKEND") or "auto"
    if value not in ("auto", *BACKENDS):
        raise ValueError(f"INITLAB_BACKEND is {value!r}; it must be one of auto, {', '.join(BACKENDS)}")
    return value


@functools.cache
def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a stand-in without a spec lies in sys.modules: its import shows what it is worth
        return True


@functools.cache
def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter (TRITON_INTERPRET=1), where they serve CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


class Backend(NamedTuple):
    """What serves an op on a device.

    Attributes:
        name: "torch", "numba" or "triton".
        module: the op's module for it; None where plain torch serves, which needs none.
    """

    name: str
    module: Any


def load(device: torch.device, modules: Mapping[str, str | None]) -> Backend:
    """The backend that serves tensors on `device`, imported: the one place where ops choose, import and fall back.

    "numba" serves CPUs, "triton" GPUs of NVIDIA (compute capability 8.0 or later) and AMD, and CPU tensors where it is
    asked for and TRITON_INTERPRET=1. "torch" serves everything else. It also takes the place of a package that is
    installed and cannot be imported, with one warning in a process.

    Args:
        device: where the tensors lie.
        modules: the op's modules by backend, relative to initlab.kernels, "._norms_triton" for instance. None says
            that plain torch is what the op has for that backend.

    Raises:
        RuntimeError: if INITLAB_BACKEND names a backend that the op does not have, that cannot serve this device, is
            not installed, or cannot be imported.
        ValueError: if INITLAB_BACKEND is not a known name.

    Example:
        >>> import torch
        >>> from initlab.kernels import backends
        >>> backends.load(torch.device("meta"), {"numba": ".sampling._numba"})
        Backend(name='torch', module=None)
    """
    name = _choose(device, modules)
    module = None if name == "torch" else modules[name]
    return _TORCH if module is None else _imported(name, module)


_TORCH = Backend("torch", None)
_WAY_OUT = "unset INITLAB_BACKEND, or set it to auto or torch"


def _choose(device: torch.device, modules: Mapping[str, str | None]) -> str:
    wanted = requested()
    if wanted == "torch":
        return wanted
    if wanted == "auto":
        best = _BEST.get(device.type, "torch")
        fits = best in modules and _installed(best) and (best != "triton" or _unfit(device) is None)
        return best if fits else "torch"
    if wanted not in modules:
        raise RuntimeError(f"INITLAB_BACKEND={wanted}, but this op has no {wanted} backend; {_WAY_OUT}")
    if wanted == "numba" and device.type != "cpu":
        raise RuntimeError(f"INITLAB_BACKEND=numba serves CPU tensors only, and this one is on {device}; {_WAY_OUT}")
    if not _installed(wanted):
        raise RuntimeError(f"INITLAB_BACKEND={wanted}, but {wanted} is not installed; install it, or {_WAY_OUT}")
    if wanted == "triton" and (why := _unfit(device)) is not None:
        raise RuntimeError(f"INITLAB_BACKEND=triton, but {why}; {_WAY_OUT}")
    return wanted


@functools.cache
def _imported(name: str, module: str) -> Backend:
    try:
        return Backend(name, importlib.import_module(module, __package__))
    except Exception as error:  # a package that does not fit the numpy, driver or Python at hand raises anything
        why = f"{type(error).__name__}: {error}"
        if requested() == name:
            raise RuntimeError(
                f"INITLAB_BACKEND={name}, but {name} cannot be imported: {why}; repair it, or {_WAY_OUT}"
            ) from error
        if name not in _warned:  # by package: the second import of a broken one may raise something else
            _warned.add(name)
            warnings.warn(f"{name} cannot be imported, so plain torch takes its place, slower: {why}", stacklevel=2)
        return _TORCH


_warned: set[str] = set()


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
