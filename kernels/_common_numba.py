"""What the CPU backends share: memory by address, 16-bit floats as their bits, and threads.

Numba has neither bfloat16 nor, on CPUs, float16: kernels see both as integers, told apart by a tag's type.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic, overload

_T = TypeVar("_T")

# The element types, as a kernel sees them.
TAGS = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
}

_HALF = np.float32(0.5)


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """`function` compiled without the GIL, cached on disk where numba can write.

    Numba's cache knows the function's own file, by date and size, and no other: put what else is compiled in (constants
    of another module, this file) into its key by giving the function a free variable `fingerprint`.
    """
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
        return njit(nogil=True, **options)(function)


def called_directly(function: Callable[..., Any], signature: str) -> Any:
    """`function` as by `compiled`, and what numba's dispatcher calls in the end: a call costs half of what it does."""
    return compiled(function).compile(signature)


def compiled_job(function: Callable[..., None], signature: str = "void(intp)", **options: Any) -> Any:
    """`function(address)` compiled for `run_on_all`, or what such a function calls; cached as by `compiled`."""
    try:
        return cfunc(signature, nogil=True, cache=True, **options)(function)
    except RuntimeError:
        return cfunc(signature, nogil=True, **options)(function)


SOURCE = Path(__file__).read_bytes() if Path(__file__).is_file() else b""  # for fingerprints


@intrinsic
def pointer(typing_context: Any, address: Any, tag: Any) -> Any:
    """A pointer to elements of the tag's type."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(tag)(address, tag), generate


@intrinsic
def add(typing_context: Any, address: Any, value: Any) -> Any:
    """Adds to the int64 at an address, whichever threads do, and returns what it was before."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@njit(forceinline=True)
def claim(address):
    """The int64 at an address, and it is one more from then on, whichever threads ask."""
    return add(address, 1)


@njit(forceinline=True)
def real(bits):
    return np.int32(bits).view(np.float32)


@njit(forceinline=True)
def bits(x):
    return np.float32(x).view(np.int32)


def rounded(x: Any, tag: Any) -> Any: ...


@overload(rounded, jit_options={"forceinline": True})
def _rounded(x, tag):
    """x, not NaN, rounded once, to nearest even, and as the element type that a kernel stores."""
    if tag == types.uint16:  # bfloat16

        def rounded(x, tag):
            b = np.uint32(bits(x))
            return np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    elif tag == types.int16:  # float16, in integers: not every CPU that numba serves can convert

        def rounded(x, tag):
            b = np.uint32(bits(x))
            sign = (b >> np.uint32(16)) & np.uint32(0x8000)
            b = b & np.uint32(0x7FFFFFFF)
            odd = (b >> np.uint32(13)) & np.uint32(1)
            normal = (b - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
            # Below 2^-14 the spacing is 2^-24, that of float32 in [1/2, 1): adding 1/2 rounds.
            tiny = np.uint32(bits(real(np.int32(b)) + _HALF)) - np.uint32(0x3F000000)
            half = tiny if b < np.uint32(0x38800000) else normal
            half = np.uint32(0x7C00) if b >= np.uint32(0x47800000) else half
            return np.int16(sign | half)

    else:

        def rounded(x, tag):
            return x

    return rounded


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _openmp_parallel() -> Any:
    """GOMP_parallel(function, data, number of threads, flags) of the OpenMP library that torch runs on, or None.

    GNU's has it, and those of LLVM and Intel for programs built with GNU's. It is looked up where the dynamic linker
    has looked for torch: first among what is preloaded, then in what torch depends on.
    """
    if not torch.backends.openmp.is_available():
        return None
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        with contextlib.suppress(OSError, AttributeError):  # no such file, or not loaded; no such symbol
            found = ctypes.CDLL(library, mode=os.RTLD_NOW | os.RTLD_NOLOAD).GOMP_parallel
            found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
            return found
    return None


_openmp = _openmp_parallel()


def _forget_pool() -> None:
    global _openmp, _pool, _pool_lock
    _openmp, _pool, _pool_lock = None, None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a fork copies pools but not their threads
    # Nor the thread that may be compiling: a fork waits for it, or the child could never compile anything.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def _shared_pool() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:  # it starts threads only as they are needed
            _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="initlab")
        return _pool


def share(tasks: Iterable[_T], run: Callable[[_T], object], threads: int) -> None:
    """run(task) for all tasks, on this thread and threads - 1 others; an error in any of them is raised here.

    A pool of our own: numba's parallel layers dislike concurrent callers and forks.
    """
    if threads <= 1:
        for task in tasks:
            run(task)
        return
    left = iter(tasks)
    lock = threading.Lock()
    done = object()

    def work() -> None:
        while True:
            with lock:
                task = next(left, done)
            if task is done:
                return
            run(task)  # type: ignore[arg-type]

    helpers: list[Future[None]] = []
    try:
        with contextlib.suppress(RuntimeError):  # the interpreter is shutting down: this thread does it all
            helpers.extend(_shared_pool().submit(work) for _ in range(threads - 1))
        work()
    finally:  # also when interrupted: nobody may touch the memory once it can be freed
        for helper in helpers:
            if not helper.cancel():
                helper.result()


_callable = functools.cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))  # of an address; a call releases the GIL


def run_on_all(job: Any, data: int, threads: int) -> None:
    """A `compiled_job` on this thread and up to threads - 1 others at once, which share the work as the job has it.

    On torch's own OpenMP threads where that is possible: they spin for milliseconds after each of torch's calls, on the
    cores that others would need. Elsewhere, and in a forked child, where OpenMP would wait for threads that are gone,
    on the pool.
    """
    if threads > 1 and _openmp is not None:
        _openmp(job.address, data, threads, 0)
    else:
        run_on_pool(job, data, threads)


def run_on_pool(job: Any, data: int, threads: int) -> None:
    """As run_on_all, for what does not follow one of torch's parallel calls: on the pool.

    OpenMP waits at its end for every thread, also for one that another program's work keeps from its core. On a busy
    machine a fill of 2^18 elements then takes 16 ms, and on the pool, where a thread that never began is not waited
    for, 1.2.
    """
    run = _callable(job.address)
    if threads > 1:
        share(range(threads), lambda _: run(data), threads)
    else:
        run(data)
