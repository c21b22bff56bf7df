"""Draws, and `fill_`, which fills tensors from the stream: check, choose a backend, fill.

>>> import torch
>>> from initlab.kernels import Draw, Normal, Region, fill_, named_key
>>> key = named_key(0, "head.weight")
>>> whole = torch.empty(6, 4)
>>> fill_([Draw(whole, Normal(0.0, 0.02), key)])
>>> shard = torch.empty(2, 4, dtype=torch.bfloat16)  # rows 4 and 5, as another rank would hold them
>>> fill_([Draw(shard, Normal(0.0, 0.02), key, Region(shape=(6, 4), offsets=(4, 0), sizes=(2, 4)))])
>>> torch.equal(shard, whole[4:].bfloat16())
True
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..region import Region, StridedRun
from ..tensors import PLAIN, is_freed
from ..torch_internals import FakeTensor, count_dispatch_modes, is_functional, is_transformed, is_wrapper
from . import _memory, _torch
from ._maps import Mapped, mapped
from .distributions import Constant, Distribution

_MODULES = {"numba": ".sampling._numba", "triton": ".sampling._triton"}
_SLOW = 1 << 24  # elements
_SLAB = 1 << 20  # elements of scratch: what a tensor that is not contiguous is filled through
_BATCH = 1 << 24  # elements: a progress bar moves about as often on a CPU


def _after_fork() -> None:
    """In a forked child torch's own operations hang where they are large enough for its thread pool (2^15 elements)."""
    global _SLAB
    _SLAB = _torch.CHUNK["cpu"] = 1 << 14


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(eq=False, slots=True)  # not frozen, which would make it three times as slow to build
class Draw:
    """What `fill_` does to one tensor.

    Args:
        tensor: to fill in place; any strides, any device.
        distribution: what to fill it with.
        key: 64 bits, from `named_key` or `generator_key`; a Constant does not use it.
        region: the block of the logical tensor that `tensor` holds; None if it holds all of it.
    """

    tensor: Tensor
    distribution: Distribution
    key: int = 0
    region: Region | None = None


def fill_(draws: Iterable[Draw], progress: Callable[[int], object] | None = None) -> None:
    """Fill tensors in place from the stream. Autograd does not record it; version counters move on.

    Args:
        draws: every one is checked before the first tensor is written. Dtypes: float32, bfloat16, float16 and
            float64; complex ones for Uniform and Normal, part by part, with std / sqrt 2; any for Constant.
            Tensors on the meta device are checked and left alone.
        progress: called with a number of elements each time that many more have been filled.

    Raises:
        NotImplementedError: for a dtype, layout or kind of tensor that its distribution cannot fill.
        RuntimeError: for a tensor that overlaps itself, whose storage was freed, or an inference tensor outside
            inference mode; and for a distribution
            that the tensor's dtype cannot hold: one of the values that it can draw, however rarely, would be rounded
            to infinity (a normal's largest is 6.77 standard deviations from the mean). A Constant is judged by torch's
            fill_.
        ValueError: for a key that is not 64 bits, or a region of another shape than the tensor's.

    Source: docs/stream.md.

    Example:
        >>> import torch
        >>> from initlab.kernels import Draw, Uniform, fill_, named_key
        >>> weight = torch.empty(2, 3)
        >>> fill_([Draw(weight, Uniform(-1.0, 1.0), named_key(0, "weight"))])
        >>> bool((weight.abs() <= 1).all())
        True
    """
    backends.eagerly(_fill_all, draws, progress)


def _fill_all(draws: Iterable[Draw], progress: Callable[[int], object] | None) -> None:
    chosen: dict[torch.device, backends.Backend] = {}
    jobs = [job for draw in draws if (job := _checked(draw, chosen)) is not None]
    if len(jobs) == 1 and progress is None and jobs[0].plain and jobs[0].backend.module is not None:
        _fill_together(jobs, jobs[0].tensor.device)
        return
    batches: dict[torch.device, list[_Job]] = {}
    elements = 0  # of the batch on the CPU
    for job in jobs:
        device, name, numel = job.tensor.device, job.backend.name, job.tensor.numel()
        batch = batches.setdefault(device, [])
        if name == "triton" or (name == "numba" and job.plain and elements < _BATCH):
            batch.append(job)
            elements += numel if name == "numba" else 0
            continue
        _fill_batch(batch, device, progress)  # in the order of the draws, which may meet in memory
        batches[device], elements = [], 0
        _fill_one(job)
        if progress is not None:
            progress(numel)
    for device, batch in batches.items():
        _fill_batch(batch, device, progress)


def _fill_batch(jobs: list[_Job], device: torch.device, progress: Callable[[int], object] | None) -> None:
    """Fill tensors that one backend fills together, those that meet in memory in their order."""
    if len(jobs) < 2 or jobs[0].backend.module.fills_in_order(sum(2 * job.tensor.numel() for job in jobs)):
        waves = [jobs] if jobs else []
    else:
        wave_of = _memory.waves([job.tensor for job in jobs])
        waves = [[job for job, n in zip(jobs, wave_of, strict=True) if n == wave] for wave in range(max(wave_of) + 1)]
    for wave in waves:
        _fill_together(wave, device)
        for job in wave if progress is not None else ():
            progress(job.tensor.numel())  # type: ignore[misc]


def backend_of(device: torch.device) -> str:
    """The backend that fills tensors on `device`: "torch", "numba" or "triton".

    Raises:
        RuntimeError: if INITLAB_BACKEND names a backend that cannot serve this device, or is not installed.
        ValueError: if INITLAB_BACKEND is not a known name.

    Example:
        >>> import torch
        >>> from initlab.kernels import backend_of
        >>> backend_of(torch.device("cpu")) in ("torch", "numba")
        True
    """
    return _backend(device, backends.requested()).name


@functools.cache
def _backend(device: torch.device, requested: str) -> backends.Backend:
    """What serves a device. To look it up anew would take a sixth of a small fill's time."""
    return backends.load(device, _MODULES)


class _Job(NamedTuple):
    """A checked draw: the backend is chosen, and the distribution mapped for it."""

    tensor: Tensor
    backend: backends.Backend
    mapped: Mapped
    key: int
    region: Region | None
    plain: bool  # whether memory holds the elements as they are, one after the other


def _checked(draw: Draw, chosen: dict[torch.device, backends.Backend]) -> _Job | None:
    """What is left to do for a draw; None where there is nothing to write. `chosen` remembers backends by device."""
    tensor, distribution, key, region = draw.tensor, draw.distribution, draw.key, draw.region
    if not 0 <= key < 2**64:
        raise ValueError(f"key is {key}; a key is 64 bits: 0 <= key < 2**64")
    if region is not None:
        if region.sizes != tensor.shape:
            raise ValueError(f"the tensor's shape is {tuple(tensor.shape)}, its region's sizes are {region.sizes}")
        if math.prod(region.shape) * (2 if tensor.is_complex() else 1) >= 2**63:
            raise ValueError(f"{region}: a logical tensor has fewer than 2**63 elements, or half as many complex ones")
    known = type(tensor) in PLAIN
    if not known and bool(is_wrapper(tensor)):
        raise NotImplementedError(f"cannot fill a {type(tensor).__name__}, which wraps other tensors; fill those")
    if tensor.layout != torch.strided:
        raise NotImplementedError(f"cannot fill a tensor of layout {tensor.layout}; fill its dense values")
    of_dtype = mapped(distribution, tensor.dtype)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed; "
            "fill it inside torch.inference_mode(), or fill a clone"
        )
    contiguous = tensor.is_contiguous()
    if not contiguous and _memory.overlaps_itself(tensor):
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} overlaps itself: more than one "
            "element refers to a single memory location; clone() it before filling it"
        )
    if tensor.numel() == 0 or tensor.is_meta or (not known and isinstance(tensor, FakeTensor)):
        return None
    if known and is_freed(tensor):
        raise RuntimeError(
            f"the storage of a tensor of shape {tuple(tensor.shape)} is smaller than its elements: it was freed or "
            "resized, as sharding libraries do between steps; fill it while its storage is there"
        )
    device = tensor.device
    backend = chosen.get(device)
    if backend is None:
        backend = chosen[device] = _backend(device, backends.requested())
    plain = contiguous and not tensor.is_conj() and not tensor.is_neg()
    return _Job(tensor, backend, of_dtype, key, region, plain)


def _fill_one(job: _Job) -> None:
    """Fill a tensor by itself: one that is not plain, or that plain torch serves."""
    tensor, m = job.tensor, job.mapped.map
    with torch.no_grad():
        if isinstance(m, Constant):
            tensor.fill_(m.value)
            return
        if job.backend.name == "torch" and tensor.device.type == "cpu" and tensor.numel() > _SLOW:
            _say_that_it_is_slow()
        if not job.plain:
            _fill_strided(job, tensor, job.region or Region.whole(tensor.shape))
            return
    _fill_contiguous(job)
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _fill_strided(job: _Job, part: Tensor, region: Region) -> None:
    """Through contiguous scratch, slab by slab: torch's copy knows every stride."""
    if part.numel() <= _SLAB:
        scratch = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        _fill_contiguous(job._replace(tensor=scratch, region=region))
        part.copy_(scratch)
        return
    dim = next(d for d, size in enumerate(part.shape) if size > 1)
    step = max(1, _SLAB * part.shape[dim] // part.numel())
    for start in range(0, part.shape[dim], step):
        size = min(step, part.shape[dim] - start)
        _fill_strided(job, part.narrow(dim, start, size), region.narrow(dim, start, size))


def _fill_contiguous(job: _Job) -> None:
    if job.backend.module is not None:
        job.backend.module.fill([_entry(job)], job.tensor.device)
        return
    tensor, runs = _as_real(job)
    assert not isinstance(job.mapped.map, Constant)  # which torch's own fill_ serves
    _torch.fill(tensor, job.mapped.map, job.key, [StridedRun(0, 1, tensor.numel(), 0)] if runs is None else runs)


def _as_real(job: _Job) -> tuple[Tensor, Iterable[StridedRun] | None]:
    """A job's tensor, with complex elements as two real ones, and its region's runs; None for the whole tensor."""
    tensor, region = job.tensor, job.region
    if tensor.is_complex():  # numbered as the real tensor of its parts
        if region is not None:
            region = region.as_real()
        tensor = torch.view_as_real(tensor.detach())
    return tensor, None if region is None else region.runs()


def _fill_together(jobs: list[_Job], device: torch.device) -> None:
    """Fill tensors by one call of their backend; where their memory meets, it fills them in order."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a fill cannot be captured in a CUDA graph: its table would be read again from memory that is gone. "
            "Fill before the capture"
        )
    module = jobs[0].backend.module
    entries: list[Any] = []
    filled: list[Tensor] = []
    for job in jobs:
        entry = _entry(job) if job.plain else None
        if entry is None:
            if job.plain and entries:  # a constant of 16 bytes, which may meet in memory what comes before it
                module.fill(entries, device)
                entries = []
            _fill_one(job)
            continue
        entries.append(entry)
        if not job.tensor.is_inference():
            filled.append(job.tensor)
    if entries:
        module.fill(entries, device)
    if filled:
        torch.autograd.graph.increment_version(filled)


def _entry(job: _Job) -> Any:
    """What the backend's module needs of a job; None where it leaves a constant to torch."""
    tensor, of_dtype, key, region = job.tensor, job.mapped, job.key, job.region
    if isinstance(of_dtype.map, Constant) and _is_followed(tensor):
        return None
    prepared = of_dtype.prepared.get(job.backend.name)
    if prepared is None:
        m, dtype, module = of_dtype.map, of_dtype.dtype, job.backend.module
        if isinstance(m, Constant):
            prepared = module.prepare_constant(m.value, dtype)
        else:
            prepared = module.prepare(m, dtype.to_real() if dtype.is_complex else dtype)
        if prepared is None:
            return None
        of_dtype.prepared[job.backend.name] = prepared
    if isinstance(of_dtype.map, Constant):
        return tensor.data_ptr(), tensor.numel(), prepared, key, None
    if region is None and not of_dtype.dtype.is_complex:
        return tensor.data_ptr(), tensor.numel(), prepared, key, None
    real, runs = _as_real(job)
    return real.data_ptr(), real.numel(), prepared, key, runs


def _is_followed(tensor: Tensor) -> bool:
    """Whether a dispatch mode or a torch.func transform follows what is done to a tensor."""
    return count_dispatch_modes() > 0 or is_transformed(tensor) or is_functional(tensor)


@functools.cache  # once in a process
def _say_that_it_is_slow() -> None:
    if backends.requested() == "auto":
        warnings.warn(
            f"filling more than {_SLOW} elements with the plain torch backend, 20 times slower than numba's or worse; "
            "pip install numba, or set INITLAB_BACKEND=torch to say that this is meant",
            stacklevel=2,
        )
