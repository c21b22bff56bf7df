"""The norm of many tensors as one vector, and scaling them down to a largest norm: check, choose a backend, run.

One read gives the norm. When nothing is to be clipped, nothing is written: on a CPU the scaling is left out, on a GPU
its kernel reads the norm and leaves at once. Nothing waits for a GPU. What the backends do not serve (other p, devices
and dtypes, subclasses, tracing), plain torch does, further down on this page.

>>> import torch
>>> from initlab.kernels import clip_, grad_norm
>>> gradients = [torch.full((3,), 2.0e30), torch.full((1,), 2.0e30)]
>>> result = grad_norm(gradients)
>>> f"{float(result.norm):.6g}"  # the squares overflow float32; the norm does not
'4e+30'
>>> clip_(gradients, result.norm64, max_norm=2.0)
>>> gradients[0]
tensor([1., 1., 1.])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from ._norms_torch import EPSILON as EPSILON  # for the GPU backend too
from ._norms_torch import clip_coefficient as clip_coefficient
from ._norms_torch import scale_by, tensor_norm, vector_norm
from .nonfinite import NAN as NAN  # for the backends too, which import their own op alone
from .nonfinite import NEGATIVE_INF as NEGATIVE_INF
from .nonfinite import POSITIVE_INF as POSITIVE_INF
from .nonfinite import check_memory, is_dense, nonfinite_flag
from .tensors import PLAIN, all_plain
from .torch_internals import is_transforming, overlap

POLICIES = ("propagate", "keep", "zero")

# What the backends read. A dtype's code, for compiled code, is its place here.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A coefficient below SPLIT_BELOW[i] is applied as two factors, the first SPLIT_FACTOR[i]: as one it might be subnormal
# in float32. A product that the first factor makes subnormal comes to 0.
SPLIT_BELOW = (2.0**-164, 2.0**-100)
SPLIT_FACTOR = (2.0**-126, 2.0**-64)
# Anderson's scaled sums: beyond BIG a square is taken of x * SHRINK, below TINY of x * GROW.
BIG, TINY = 2.0**486, 2.0**-511
SHRINK, GROW = 2.0**-538, 2.0**537

_MODULES = {"numba": "._norms_numba", "triton": "._norms_triton"}
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}
_SERVED = {*_CODES, *_REAL}  # a complex element is read as two real ones
_FLOAT64 = (torch.float64, torch.complex128)


class Norm(NamedTuple):
    """The norm of tensors as one vector, and what was found on the way; all 0-d, on the first tensor's device.

    Attributes:
        norm: float32, or float64 where one of the tensors is float64 or complex128.
        norm64: float64 (float32 on devices without it). The value of `norm` where that is finite; also where float32
            cannot hold it, as with a million elements of 1e38. Clip with this one.
        sum_of_powers: the sum of |x|^p, float64; the largest or smallest |x| where p is inf or -inf. It can overflow.
        flag: the flag of all tensors (NaN = 1, +inf = 2, -inf = 4), int32; None where it was not asked for and would
            have cost reads.
        first_nonfinite_index: the index of the first tensor that holds a non-finite value, -1 if none does; int64;
            None as `flag`.
        tensor_norms: the 2-norm of each tensor, 1-D, in their order and of norm64's dtype; NaN of one that holds NaN,
            otherwise inf of one that holds inf. None where they were not asked for.
    """

    norm: Tensor
    norm64: Tensor
    sum_of_powers: Tensor
    flag: Tensor | None
    first_nonfinite_index: Tensor | None
    tensor_norms: Tensor | None = None


class TensorGroups:
    """Tensors, checked and grouped by device once, for `grad_norm` and then `clip_`.

    Args:
        tensors: floating or complex, strided; any shapes, devices and dtypes, also mixed. They must stay as they are,
            but for their values.
        indices: by which `Norm.first_nonfinite_index` names them, ascending; by default their places in the sequence.

    Raises:
        RuntimeError: for a tensor that is neither floating nor complex.
        NotImplementedError: for a tensor that is not strided.

    Example:
        >>> import torch
        >>> from initlab.kernels import TensorGroups, clip_, grad_norm
        >>> x = torch.tensor([3.0, 4.0])
        >>> both = TensorGroups([x])
        >>> clip_(both, grad_norm(both).norm64, max_norm=2.5)
        >>> x
        tensor([1.5000, 2.0000])
    """

    def __init__(self, tensors: Sequence[Tensor], indices: Sequence[int] | None = None) -> None:
        self.tensors = tensors
        self.dtypes = {t.dtype for t in tensors}
        _check(tensors, self.dtypes)
        served = self.dtypes <= _SERVED
        indices = range(len(tensors)) if indices is None else indices
        devices = [t.device for t in tensors]
        distinct = list(dict.fromkeys(devices))
        if len(distinct) == 1:
            self.groups = [DeviceGroup(tensors, indices, distinct[0], served)]
            return
        self.groups = []
        for device in distinct:
            members = [i for i, d in enumerate(devices) if d == device]
            self.groups.append(
                DeviceGroup([tensors[i] for i in members], [indices[i] for i in members], device, served)
            )


def grad_norm(
    tensors: Sequence[Tensor] | TensorGroups,
    norm_type: float = 2.0,
    *,
    detect_nonfinite: bool = True,
    per_tensor: bool = False,
) -> Norm:
    """The p-norm of tensors, as if they were one vector.

    Args:
        tensors: as for `TensorGroups`. The 2-norm has backends of its own; for others plain torch reads, in float64.
        norm_type: p, any number; inf and -inf give the largest and the smallest |x|, 0 what torch gives: how many
            tensors hold a non-zero.
        detect_nonfinite: whether to return a flag even where it costs reads, as on devices that plain torch serves.
        per_tensor: whether to return the norm of each tensor too, of the same read; of p = 2 alone.

    Returns:
        See Norm. The 2-norm is within 1e-6 of the true one wherever it fits its dtype, also where squares overflow
        or vanish; so is that of each tensor. Equal bits from run to run on one machine, for any number of threads.

    Raises:
        RuntimeError: for a tensor that is neither floating nor complex.
        NotImplementedError: for a tensor that is not strided.
        ValueError: for per_tensor with another p than 2.

    Source:
        On a CPU sums in float64. On a GPU sums of 8 squares in float32, then float64, and a rescan in float64 where
        squares overflow or vanish. Scaled sums for float64: E. Anderson, "Algorithm 978: Safe scaling in the level 1
        BLAS", ACM TOMS 44, 2017.

    Example:
        >>> import torch
        >>> from initlab.kernels import grad_norm
        >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0, 0.0]])]).norm
        tensor(5.)
    """
    p = float(norm_type)
    if per_tensor and p != 2.0:
        raise ValueError(f"per_tensor=True goes with p = 2 alone, and norm_type is {p}; pass each tensor alone")
    prepared = tensors if isinstance(tensors, TensorGroups) else TensorGroups(tensors)
    if not prepared.tensors:
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        none = torch.full((), -1, dtype=torch.int64, device="cpu")
        no_norms = zero.new_zeros(0) if per_tensor else None
        return Norm(zero.to(torch.float32), zero, zero, zero.to(torch.int32), none, no_norms)
    norms = [_group_norm(group, p, detect_nonfinite, per_tensor) for group in prepared.groups]
    total = norms[0]
    if len(norms) > 1:
        norms = [_to_device(norm, prepared.tensors[0].device) for norm in norms]
        total = _combine_groups(norms, p)
        if per_tensor:
            total = total._replace(tensor_norms=_in_order(norms, prepared))
    wide = not prepared.dtypes.isdisjoint(_FLOAT64)
    norm = total.norm64.to(torch.float64 if wide else torch.float32)
    norm64 = total.norm64 if wide else torch.where(norm.isfinite(), norm.to(total.norm64.dtype), total.norm64)
    return Norm(norm, norm64, *total[1:])


def combine_norms(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """The p-norm of a vector whose parts have these p-norms, computed so that no power overflows or vanishes.

    Args:
        norms: one for each part, shape (n,), float64 (float32 on devices without it).
        norm_type: p, any number. For 0, where a norm is a count, the sum.

    Returns:
        0-d, of norms' dtype and on their device. The norm of a single part as it is; 0 of no parts (inf for p < 0).

    Example:
        >>> import torch
        >>> from initlab.kernels import combine_norms
        >>> combine_norms(torch.tensor([3e200, 4e200], dtype=torch.float64))
        tensor(5.0000e+200, dtype=torch.float64)
    """
    if len(norms) == 1:
        return norms[0]
    if norm_type == 0.0:
        return norms.sum()
    return grad_norm([norms], norm_type, detect_nonfinite=False).norm64


def clip_(
    tensors: Sequence[Tensor] | TensorGroups, norm: Tensor, max_norm: float, *, nonfinite: str = "propagate"
) -> None:
    """Multiply tensors in place by min(1, max_norm / (norm + 1e-6)).

    Args:
        tensors: as for `TensorGroups`.
        norm: 0-d, floating, on any device: `Norm.norm64` of these tensors, or of more.
        max_norm: the largest norm that is left as it is.
        nonfinite: the policy where the norm is NaN or infinite. "propagate": what the formula says, so NaN everywhere
            or zeros; "keep": nothing is written; "zero": every element becomes zero, also NaN and infinite ones.

    Raises:
        ValueError: for another policy than these.
        RuntimeError: for a tensor that is neither floating nor complex, an inference tensor outside inference mode, or
            one to be scaled that holds several elements in one place, as expand makes them.
        NotImplementedError: for a tensor that is not strided, or one of float8. Nothing is written when one of these is
            raised.

    Example:
        >>> import torch
        >>> from initlab.kernels import clip_
        >>> x = torch.tensor([3.0, 4.0])
        >>> clip_([x], torch.tensor(5.0), max_norm=2.5)
        >>> x
        tensor([1.5000, 2.0000])
    """
    if nonfinite not in POLICIES:
        raise ValueError(f"nonfinite is {nonfinite!r}; it must be one of {', '.join(POLICIES)}")
    prepared = tensors if isinstance(tensors, TensorGroups) else TensorGroups(tensors)
    tracing = torch.compiler.is_compiling()  # which knows no inference mode
    if not tracing and not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, prepared.tensors)):
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed; "
            "clip inside torch.inference_mode(), or clip clones"
        )
    max_norm = float(max_norm)
    with torch.no_grad():
        norms = [norm.detach().to(group.device) for group in prepared.groups]
        if not tracing:
            _check_scalable(prepared, norms, max_norm)
        for group, group_norm in zip(prepared.groups, norms, strict=True):
            if group.backend is not None and group.backend.ON_DEVICE:
                _scale_on_device(group, group_norm, max_norm, nonfinite)
            elif _host_readable(group_norm):
                _scale_on_host(group, float(group_norm), max_norm, nonfinite)
            else:
                scale_by(group.tensors, group_norm, max_norm, nonfinite)


class Entries(NamedTuple):
    """Tensors as the backends take them: one number each in every list. Elements are real, one after the other."""

    addresses: list[int]
    lengths: list[int]
    codes: list[int]  # of the dtypes
    indices: list[int]
    places: list[int] | None = None  # among the tensors; None where these are all of them


class DeviceGroup:
    """The tensors on one device.

    Attributes:
        backend: None where plain torch serves.
        plan: what the backend works by, made once from the dense tensors.
        strided: the other ones, which do not fill a stretch of memory: the norm reads a copy, torch scales them.
    """

    __slots__ = ("backend", "device", "indices", "plan", "strided", "tensors")

    def __init__(self, tensors: Sequence[Tensor], indices: Sequence[int], device: torch.device, served: bool) -> None:
        self.tensors, self.indices, self.device = tensors, indices, device
        self.backend = _backend(tensors, device) if served else None
        self.strided: Sequence[Tensor] = ()
        self.plan: Any = None
        if self.backend is not None:
            in_place, indices = tensors, list(indices)
            if not all(map(Tensor.is_contiguous, tensors)):
                dense = [is_dense(t) for t in tensors]
                self.strided = [t for t, d in zip(tensors, dense, strict=True) if not d]
                in_place = [t for t, d in zip(tensors, dense, strict=True) if d]
                indices = [i for i, d in zip(indices, dense, strict=True) if d]
            self.plan = self.prepare(in_place, indices)
        if self.backend is None:
            for t in tensors:
                check_memory(t)

    def prepare(self, tensors: Sequence[Tensor], indices: Sequence[int]) -> Any:
        """A plan. None, and plain torch serves, where a tensor has no memory of its own, as in torch.func, or where the
        backend has none for the capture of a CUDA graph."""
        entries = _entries(tensors, indices)
        plan = None if entries is None or self.backend is None else self.backend.prepare(entries, self.device)
        if plan is None:
            self.backend = None
        return plan


def _check(tensors: Sequence[Tensor], dtypes: set[torch.dtype]) -> None:
    if {t.layout for t in tensors} <= {torch.strided} and dtypes <= _SERVED:
        return
    for i, t in enumerate(tensors):
        what = f"tensor {i} of shape {tuple(t.shape)}"
        if t.layout != torch.strided:
            raise NotImplementedError(f"{what} has layout {t.layout}; norms and clipping need strided ones")
        if not (t.is_floating_point() or t.is_complex()):
            raise RuntimeError(f"{what} has dtype {t.dtype}; norms and clipping need floating or complex tensors")


def _backend(tensors: Sequence[Tensor], device: torch.device) -> ModuleType | None:
    """What serves tensors on one device; None for plain torch, which also traces and takes subclasses."""
    if torch.compiler.is_compiling() or not all_plain(tensors):
        return None
    return backends.load(device, _MODULES).module


def _entries(tensors: Sequence[Tensor], indices: Sequence[int]) -> Entries | None:
    """None where one of them has no memory of its own, as in torch.func's transforms."""
    addresses, lengths = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))
    codes: list[Any] = [_CODES.get(t.dtype) for t in tensors]
    indices = list(indices)
    if None in codes:
        for i, t in enumerate(tensors):
            if codes[i] is None:
                codes[i] = _CODES[_REAL[t.dtype]]
                lengths[i] *= 2
    full = None
    if 0 in lengths:
        full = [i for i, n in enumerate(lengths) if n > 0]
        addresses, lengths, codes, indices = ([row[i] for i in full] for row in (addresses, lengths, codes, indices))
    return None if 0 in addresses else Entries(addresses, lengths, codes, indices, full)


def _host_readable(tensor: Tensor) -> bool:
    """Whether Python may read a value without waiting for a device, or breaking a graph."""
    return tensor.device.type == "cpu" and type(tensor) in PLAIN and not torch.compiler.is_compiling()


class _GroupNorm(NamedTuple):
    """A Norm of the tensors on one device, before it is rounded."""

    norm64: Tensor
    sum_of_powers: Tensor
    flag: Tensor | None
    first_nonfinite_index: Tensor | None
    tensor_norms: Tensor | None = None


def _group_norm(group: DeviceGroup, p: float, detect_nonfinite: bool, per_tensor: bool = False) -> _GroupNorm:
    if group.backend is None or p != 2.0:
        return _norm_by_torch(group.tensors, group.indices, p, detect_nonfinite, per_tensor)
    plan, copies = group.plan, group.tensors
    if group.strided:
        copies = [t if is_dense(t) else t.detach().contiguous() for t in group.tensors]
        plan = group.prepare(copies, group.indices)
        if plan is None:
            return _norm_by_torch(copies, group.indices, p, detect_nonfinite, per_tensor)
    norm = _GroupNorm(*group.backend.norm(plan, len(group.tensors) if per_tensor else None))
    del copies  # until here: a plan knows addresses only
    return norm


def _norm_by_torch(
    tensors: Sequence[Tensor], indices: Sequence[int], p: float, detect_nonfinite: bool, per_tensor: bool
) -> _GroupNorm:
    """The reference: float64 (float32 on mps, which has no float64), a norm for each tensor, then the norm of these."""
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    with torch.no_grad():
        full = [t.detach() for t in tensors if t.numel() > 0]
        if full:
            norms = torch.stack([tensor_norm(t, p, wide) for t in full])
        else:  # of nothing
            norms = torch.full((1,), 0.0 if p >= 0.0 else math.inf, dtype=wide, device=tensors[0].device)
        norm64 = vector_norm(norms, p)
        power = norm64 if math.isinf(p) or p == 0.0 else norms.pow(p).sum()
        each = _with_empty(norms, tensors) if per_tensor else None
        if not detect_nonfinite:
            return _GroupNorm(norm64, power, None, None, each)
        if p > 0.0 and _host_readable(norms) and bool(norms.isfinite().all()):
            flags = torch.zeros(len(tensors), dtype=torch.int32, device=norm64.device)
        else:
            flags = torch.stack([nonfinite_flag(t) for t in tensors])
        return _GroupNorm(norm64, power, *_merge_flags(flags, _counted(indices, flags.device)), each)


def _with_empty(norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Norms of the tensors that have elements, with zeros for the others between them."""
    parts, zero = iter(norms.unbind()), norms.new_zeros(())
    return torch.stack([next(parts) if t.numel() > 0 else zero for t in tensors])


def _in_order(norms: Sequence[_GroupNorm], prepared: TensorGroups) -> Tensor:
    """The norms of tensors on several devices, in the tensors' order, without an index that is copied to a device."""
    parts = {
        group.device: iter(norm.tensor_norms.unbind())
        for group, norm in zip(prepared.groups, norms, strict=True)
        if norm.tensor_norms is not None
    }
    return torch.stack([next(parts[t.device]) for t in prepared.tensors])


def _counted(indices: Sequence[int], device: torch.device) -> Tensor:
    """Ascending numbers on a device, without a copy from the host, which the capture of a CUDA graph forbids."""
    starts = [k for k, i in enumerate(indices) if k == 0 or i != indices[k - 1] + 1]
    runs = zip(starts, [*starts[1:], len(indices)], strict=True)
    return torch.cat([torch.arange(indices[a], indices[b - 1] + 1, device=device) for a, b in runs])


def _merge_flags(flags: Tensor, firsts: Tensor) -> tuple[Tensor, Tensor]:
    """The or of flags, and the smallest of `firsts` whose flag is not 0; -1 if there is none."""
    bits = 1 << torch.arange(3, dtype=flags.dtype, device=flags.device)  # NAN, POSITIVE_INF, NEGATIVE_INF
    flag = (((flags[:, None] & bits) != 0).any(0) * bits).sum(dtype=torch.int32)
    nowhere = torch.iinfo(torch.int64).max
    first = torch.where(flags != 0, firsts, nowhere).amin()
    return flag, torch.where(first == nowhere, -1, first)


def _to_device(norm: _GroupNorm, device: torch.device) -> _GroupNorm:
    def moved(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=device.type != "cpu")

    others = (None if x is None else moved(x) for x in norm[2:])
    return _GroupNorm(moved(norm.norm64), moved(norm.sum_of_powers), *others)


def _combine_groups(norms: Sequence[_GroupNorm], p: float) -> _GroupNorm:
    norm64 = combine_norms(torch.stack([norm.norm64 for norm in norms]), p)
    power = norm64
    if p not in (0.0, math.inf, -math.inf):
        power = torch.stack([norm.sum_of_powers for norm in norms]).sum()
    flags = [norm.flag for norm in norms if norm.flag is not None]
    firsts = [norm.first_nonfinite_index for norm in norms if norm.first_nonfinite_index is not None]
    if len(flags) < len(norms):
        return _GroupNorm(norm64, power, None, None)
    return _GroupNorm(norm64, power, *_merge_flags(torch.stack(flags), torch.stack(firsts)))


def _check_scalable(prepared: TensorGroups, norms: Sequence[Tensor], max_norm: float) -> None:
    """Raise what torch's mul_ would raise, before anything is written."""
    if not prepared.dtypes <= _SERVED:
        i, dtype = next((i, t.dtype) for i, t in enumerate(prepared.tensors) if t.dtype not in _SERVED)
        raise NotImplementedError(f"tensor {i} has dtype {dtype}, which torch does not multiply: convert it to clip it")
    if is_transforming():
        return
    for group, norm in zip(prepared.groups, norms, strict=True):
        for t in group.tensors if group.backend is None else group.strided:
            if type(t) not in PLAIN or t.is_contiguous() or overlap(t) != 1:
                continue
            if _host_readable(norm) and not max_norm / (float(norm) + EPSILON) < 1.0:
                break  # it is left as it is
            raise RuntimeError(
                f"a tensor of shape {tuple(t.shape)} and strides {t.stride()} has more than one element that refers to "
                "a single memory location, so scaling would count twice: clone it"
            )


def _scale_on_host(group: DeviceGroup, norm: float, max_norm: float, policy: str) -> None:
    """Where Python reads the norm: no write unless it clips."""
    if not math.isfinite(norm) and policy != "propagate":
        if policy == "zero":
            for t in group.tensors:
                t.zero_()
        return
    c = max_norm / (norm + EPSILON)
    if c >= 1.0:
        return
    pairs = zip(SPLIT_BELOW, SPLIT_FACTOR, strict=True)
    a = next((factor for below, factor in pairs if 0.0 < c < below), 1.0)
    b = c / a
    by_torch = group.tensors
    if group.backend is not None and group.plan.disjoint:
        _increment_versions(group)
        group.backend.scale(group.plan, a, b)
        by_torch = group.strided
    for t in by_torch:
        if a != 1.0:
            t.mul_(a)
        t.mul_(b)


def _scale_on_device(group: DeviceGroup, norm: Tensor, max_norm: float, policy: str) -> None:
    by_torch = group.tensors
    if group.backend is not None and group.plan.disjoint:
        _increment_versions(group)
        group.backend.scale(group.plan, norm, max_norm, policy)
        by_torch = group.strided
    if by_torch:
        scale_by(by_torch, norm, max_norm, policy)


def _increment_versions(group: DeviceGroup) -> None:
    """Tell autograd, which sees nothing of what a backend writes. Inference tensors have no version."""
    tensors = group.tensors
    if torch.is_inference_mode_enabled():
        tensors = [t for t in tensors if not t.is_inference()]
    torch.autograd.graph.increment_version(tensors)
