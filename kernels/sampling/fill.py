"""Distributions and draws, and `fill_`, which fills tensors from the stream: check, choose a backend, fill.

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
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from ..region import Region, Run
from . import stream

_MODULES = {"numba": ".sampling._numba", "triton": ".sampling._triton"}
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}
_SLOW = 1 << 24  # elements
_SLAB = 1 << 20  # elements of scratch: what a tensor that is not contiguous is filled through
_CHUNK = {"cpu": 1 << 18}  # elements the torch backend works on at once; intermediates take about 40 times as much
_CHUNK_ELSEWHERE = 1 << 23


def _after_fork() -> None:
    """In a forked child torch's own operations hang where they are large enough for its thread pool (2^15 elements)."""
    global _SLAB
    _SLAB = _CHUNK["cpu"] = 1 << 14


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---------------------------------------------------------------------------------------------------------------
# Distributions


def _float(value: Any, name: str) -> float:
    if isinstance(value, str):  # float() would read it
        raise TypeError(f"{name} is {value!r}; it must be a number")
    return float(value) + 0.0  # -0 becomes 0: the two are one distribution, also to a cache


def _finite(value: float, name: str, error: type[Exception]) -> float:
    number = _float(value, name)
    if not math.isfinite(number):
        raise error(f"{name} is {number}; it must be finite")
    return number


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform on [low, high); a constant where low == high.

    Raises:
        RuntimeError: if a bound is not finite, or low > high (the type that torch raises).
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        low, high = _finite(self.low, "low", RuntimeError), _finite(self.high, "high", RuntimeError)
        if low > high:
            raise RuntimeError(f"uniform on [{low}, {high}): low must not exceed high; swap them")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal with this mean and standard deviation; a constant where std == 0.

    Raises:
        RuntimeError: if std is negative or NaN (the type that torch raises).
        ValueError: if mean is not finite, or std is infinite.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        std = _float(self.std, "std")
        if not std >= 0.0:
            raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
        object.__setattr__(self, "mean", _finite(self.mean, "mean", ValueError))
        object.__setattr__(self, "std", _finite(std, "std", ValueError))


@dataclass(frozen=True, slots=True)
class TruncatedNormal:
    """Normal with this mean and standard deviation, conditioned on [low, high]; a constant where low == high.

    The bounds are absolute, as in ``torch.nn.init.trunc_normal_``, and may be infinite.

    Raises:
        RuntimeError: if low > high (the type that torch raises).
        ValueError: if mean is not finite, std is not positive and finite, a bound is NaN, or the nearer bound of an
            interval that leaves the mean out lies beyond 12 standard deviations, where hardly any mass is left.
    """

    mean: float = 0.0
    std: float = 1.0
    low: float = -2.0
    high: float = 2.0

    def __post_init__(self) -> None:
        mean, std = _finite(self.mean, "mean", ValueError), _finite(self.std, "std", ValueError)
        low, high = _float(self.low, "low"), _float(self.high, "high")
        if std <= 0.0:
            raise ValueError(f"std is {std}; a truncated normal needs std > 0; use constant_ for a single value")
        if math.isnan(low) or math.isnan(high) or low == math.inf or high == -math.inf:
            raise ValueError(f"bounds are [{low}, {high}]; they must be numbers, and only outwards infinite")
        if low > high:
            raise RuntimeError(f"truncated normal on [{low}, {high}]: low must not exceed high; swap them")
        nearer = max((low - mean) / std, (mean - high) / std)
        if low < high and nearer > stream.LIMIT_SIGMA:
            raise ValueError(
                f"the bounds [{low}, {high}] lie {nearer:.3g} standard deviations from the mean {mean} (std {std}); "
                f"{stream.LIMIT_SIGMA:g} is the limit; move the bounds or the mean, or raise std"
            )
        for name, value in (("mean", mean), ("std", std), ("low", low), ("high", high)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class Constant:
    """Every element is `value`; takes nothing from the stream and serves every dtype."""

    value: complex = 0.0


Distribution: TypeAlias = Uniform | Normal | TruncatedNormal | Constant


# ---------------------------------------------------------------------------------------------------------------
# Draws


@dataclass(frozen=True, slots=True)
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


# ---------------------------------------------------------------------------------------------------------------
# fill_


def fill_(draws: Iterable[Draw], progress: Callable[[int], object] | None = None) -> None:
    """Fill tensors in place from the stream. Autograd does not record it; version counters move on.

    Args:
        draws: every one is checked before the first tensor is written. Dtypes: float32, bfloat16, float16 and
            float64; complex ones for Uniform and Normal, part by part, with std / sqrt 2; any for Constant.
            Tensors on the meta device are checked and left alone.
        progress: called with a number of elements each time that many more have been filled.

    Raises:
        NotImplementedError: for a dtype, layout or kind of tensor that its distribution cannot fill.
        RuntimeError: for a tensor that overlaps itself, an inference tensor outside inference mode, or parameters
            that the tensor's dtype cannot hold.
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
    launched: dict[torch.device, list[_Job]] = {}
    for job in jobs:
        if job.backend.name == "triton":
            launched.setdefault(job.tensor.device, []).append(job)
        else:
            _fill_one(job)
            if progress is not None:
                progress(job.tensor.numel())
    for device, group in launched.items():
        for wave in _waves(group):
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
    return backends.load(device, _MODULES).name


class _Mapped:
    """A distribution for a dtype: its map, or the constant that it comes to, and what a launch needs of it."""

    __slots__ = ("dtype", "launch", "map")

    def __init__(self, mapped: stream.Map | Constant, dtype: torch.dtype) -> None:
        self.map, self.dtype = mapped, dtype
        self.launch: Any = None  # worked out when the first launch asks


@functools.lru_cache(maxsize=4096)
def _mapped(distribution: Uniform | Normal | TruncatedNormal, dtype: torch.dtype) -> _Mapped:
    return _Mapped(map_of(distribution, dtype), dtype)


@functools.lru_cache(maxsize=4096)
def _mapped_constant(text: str, distribution: Constant, dtype: torch.dtype) -> _Mapped:
    """`text` tells -0.0 from 0.0, which are one key to a cache."""
    torch.empty((), dtype=dtype, device="cpu").fill_(distribution.value)  # torch's own error, before the first write
    return _Mapped(distribution, dtype)


class _Job(NamedTuple):
    """A checked draw: the backend is chosen, and the distribution mapped for it."""

    tensor: Tensor
    backend: backends.Backend
    mapped: _Mapped
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
    known = type(tensor) in _PLAIN
    if not known and bool(is_traceable_wrapper_subclass(tensor)):
        raise NotImplementedError(f"cannot fill a {type(tensor).__name__}, which wraps other tensors; fill those")
    if tensor.layout != torch.strided:
        raise NotImplementedError(f"cannot fill a tensor of layout {tensor.layout}; fill its dense values")
    if isinstance(distribution, Constant):
        mapped = _mapped_constant(repr(distribution.value), distribution, tensor.dtype)
    else:
        mapped = _mapped(distribution, tensor.dtype)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed; "
            "fill it inside torch.inference_mode(), or fill a clone"
        )
    contiguous = tensor.is_contiguous()
    if not contiguous and _overlaps(tensor):
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} overlaps itself: more than one "
            "element refers to a single memory location; clone() it before filling it"
        )
    device = tensor.device
    if tensor.numel() == 0 or device.type == "meta" or (not known and isinstance(tensor, FakeTensor)):
        return None
    backend = chosen.get(device)
    if backend is None:
        backend = chosen[device] = backends.load(device, _MODULES)
    plain = contiguous and not tensor.is_conj() and not tensor.is_neg()
    return _Job(tensor, backend, mapped, key, region, plain)


_PLAIN = (Tensor, torch.nn.Parameter)


def map_of(distribution: Uniform | Normal | TruncatedNormal, dtype: torch.dtype) -> stream.Map | Constant:
    """What the host works out for a distribution and a dtype; a Constant where all its values are one."""
    real = dtype
    if dtype in _COMPLEX and not isinstance(distribution, TruncatedNormal):  # as torch, which orders no complex numbers
        real = _COMPLEX[dtype]
        if isinstance(distribution, Normal):
            distribution = Normal(distribution.mean, distribution.std / 1.4142135623730951)
    if real not in _LARGEST:
        name = {Uniform: "uniform", Normal: "normal", TruncatedNormal: "truncated normal"}[type(distribution)]
        raise NotImplementedError(
            f"a {name} is not defined for {dtype}; fill a float32, bfloat16, float16 or float64 tensor and convert it"
        )
    if isinstance(distribution, Uniform):
        _check_uniform_range(distribution, real)
        if distribution.low == distribution.high:
            return Constant(complex(distribution.low, distribution.low) if dtype in _COMPLEX else distribution.low)
        return stream.uniform_map(distribution.low, distribution.high, real)
    if real != torch.float64 and math.isinf(stream.fl32(distribution.mean) + stream.fl32(distribution.std)):
        raise RuntimeError(
            f"{distribution} overflows float32, in which {dtype} is drawn; use float64, or smaller parameters"
        )
    if isinstance(distribution, Normal):
        return stream.normal_map(distribution.mean, distribution.std, real)
    if distribution.low == distribution.high:
        return Constant(distribution.low)
    return stream.truncated_normal_map(distribution.mean, distribution.std, distribution.low, distribution.high, real)


def _check_uniform_range(distribution: Uniform, dtype: torch.dtype) -> None:
    largest = _LARGEST[dtype]
    for name, value in (
        ("low", distribution.low),
        ("high", distribution.high),
        ("high - low", distribution.high - distribution.low),
    ):
        if abs(value) > largest:
            raise RuntimeError(
                f"uniform on [{distribution.low}, {distribution.high}): {name} is out of bounds for {dtype}"
            )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements share a memory location. Exact: sizes and strides may be anybody's."""
    if tensor.numel() < 2:
        return False
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach, conflict = 0, False
    for stride, size in dims:
        conflict |= stride <= reach
        reach += stride * (size - 1)
    if not conflict:
        return False
    if dims[0][0] == 0 or reach + 1 < tensor.numel():
        return True
    seen = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dims:  # strides that interleave without meeting, such as (2, 3) by (3, 2): count them out
        seen = (seen[:, None] + torch.arange(size, device="cpu") * stride).flatten()
    return seen.unique().numel() < tensor.numel()


def _fill_one(job: _Job) -> None:
    tensor, mapped = job.tensor, job.mapped.map
    if isinstance(mapped, Constant):
        with torch.no_grad():
            tensor.fill_(mapped.value)
        return
    if job.backend.name == "torch" and tensor.device.type == "cpu" and tensor.numel() > _SLOW:
        _say_that_it_is_slow()
    if job.plain:
        _fill_contiguous(job)
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
        return
    with torch.no_grad():
        _fill_strided(job, tensor, job.region or Region.whole(tensor.shape))


def _fill_strided(job: _Job, part: Tensor, region: Region) -> None:
    """Through contiguous scratch, slab by slab: torch's copy knows every stride."""
    if part.numel() <= _SLAB:
        scratch = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        _fill_contiguous(job._replace(tensor=scratch, region=region))
        part.copy_(scratch)
        return
    dim = next(d for d, size in enumerate(part.shape) if size > 1)
    step = max(1, _SLAB * part.shape[dim] // part.numel())
    for at in range(0, part.shape[dim], step):
        size = min(step, part.shape[dim] - at)
        _fill_strided(job, part.narrow(dim, at, size), region.narrow(dim, at, size))


def _fill_contiguous(job: _Job) -> None:
    if job.backend.name == "triton":
        job.backend.module.fill([_entry(job)], job.tensor.device)
        return
    tensor, runs = _as_real(job)
    runs = [Run(0, 1, tensor.numel(), 0)] if runs is None else runs
    mapped = job.mapped.map
    assert not isinstance(mapped, Constant)
    fill = _fill_torch if job.backend.module is None else job.backend.module.fill
    fill(tensor, mapped, job.key, runs)


def _as_real(job: _Job) -> tuple[Tensor, Iterable[Run] | None]:
    """A job's tensor, with complex elements as two real ones, and its region's runs; None for the whole tensor."""
    tensor, region = job.tensor, job.region
    if tensor.is_complex():  # numbered as the real tensor of its parts
        if region is not None:
            region = Region((*region.shape, 2), (*region.offsets, 0), (*region.sizes, 2))
        tensor = torch.view_as_real(tensor.detach())
    return tensor, None if region is None else region.runs()


# ---------------------------------------------------------------------------------------------------------------
# Many tensors on a GPU: one launch for each kind of distribution and dtype


def _fill_together(jobs: list[_Job], device: torch.device) -> None:
    """Fill tensors whose memory does not meet."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a fill cannot be captured in a CUDA graph: its table would be read again from memory that is gone. "
            "Fill before the capture"
        )
    entries, filled = [], []
    for job in jobs:
        entry = _entry(job) if job.plain else None
        if entry is None:
            _fill_one(job)
            continue
        entries.append(entry)
        if not job.tensor.is_inference():
            filled.append(job.tensor)
    if entries:
        jobs[0].backend.module.fill(entries, device)
    if filled:
        torch.autograd.graph.increment_version(filled)


def _entry(job: _Job) -> Any:
    """What the backend needs of a job; None where it leaves a constant to torch."""
    tensor, region, mapped = job.tensor, job.region, job.mapped
    launch = mapped.launch
    if launch is None:
        triton, m = job.backend.module, mapped.map
        if isinstance(m, Constant):
            launch = triton.prepare_constant(m.value, mapped.dtype)
        else:
            launch = triton.prepare(m, _COMPLEX.get(mapped.dtype, mapped.dtype))
        if launch is None:
            return None
        mapped.launch = launch
    if region is None or isinstance(mapped.map, Constant):
        elements = (
            2 * tensor.numel() if tensor.is_complex() and launch.dtype.itemsize < tensor.itemsize else tensor.numel()
        )
        return tensor.data_ptr(), elements, launch, job.key, None
    real, runs = _as_real(job)
    return real.data_ptr(), real.numel(), launch, job.key, runs


def _waves(jobs: list[_Job]) -> list[list[_Job]]:
    """Jobs in groups to be filled one after the other: in each, no two tensors' memory meets. Nearly always one.

    The row of zeros in an embedding comes after the embedding.
    """
    if len(jobs) < 2:
        return [jobs]
    spans = [_span(job.tensor) for job in jobs]
    order = sorted(range(len(jobs)), key=spans.__getitem__)
    wave = [0] * len(jobs)
    cluster: list[int] = []  # jobs whose spans touch each other
    reach = -1
    for i in order:
        start, end = spans[i]
        if start >= reach:
            cluster = []
        cluster.append(i)
        reach = max(reach, end)
        if len(cluster) > 1:
            ready: list[int] = []
            for j in sorted(cluster):  # in the order of the draws
                met = [wave[k] for k in ready if spans[k][0] < spans[j][1] and spans[j][0] < spans[k][1]]
                wave[j] = max(met, default=-1) + 1
                ready.append(j)
    count = max(wave) + 1
    return [jobs] if count == 1 else [[job for job, w in zip(jobs, wave, strict=True) if w == n] for n in range(count)]


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor's memory and the one after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


@functools.cache  # once in a process
def _say_that_it_is_slow() -> None:
    if backends.requested() == "auto":
        warnings.warn(
            f"filling more than {_SLOW} elements with the plain torch backend, 20 times slower than numba's or worse; "
            "pip install numba, or set INITLAB_BACKEND=torch to say that this is meant",
            stacklevel=2,
        )


def _fill_torch(tensor: Tensor, mapped: stream.Map, key: int, runs: Iterable[Run]) -> None:
    """The reference backend: any device, one chunk of elements after the other."""
    chunk = _CHUNK.get(tensor.device.type, _CHUNK_ELSEWHERE)
    flat = tensor.detach().view(-1)
    at = 0
    for run in runs:
        if run.rows > 1 and run.length < 1024:  # short rows: element by element, and a block for each
            rows = max(1, chunk // (4 * run.length))
            columns = torch.arange(run.length, device=flat.device)
            for r in range(0, run.rows, rows):
                n = min(rows, run.rows - r)
                starts = torch.arange(r, r + n, device=flat.device) * run.stride + run.start
                index = (starts[:, None] + columns).flatten()
                values = stream.block_values(mapped, key, index >> 2, tensor.dtype)
                flat[at : at + len(index)] = values.gather(1, (index & 3)[:, None])[:, 0]
                at += len(index)
            continue
        for r in range(run.rows):
            first, end = run.start + r * run.stride, run.start + r * run.stride + run.length
            for low in range(first, end, chunk):
                high = min(low + chunk, end)
                blocks = torch.arange(low >> 2, (high + 3) >> 2, device=flat.device)
                values = stream.block_values(mapped, key, blocks, tensor.dtype).view(-1)
                skip = low & 3
                flat[at : at + high - low] = values[skip : skip + high - low]
                at += high - low
