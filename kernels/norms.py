"""The norm of many tensors as one vector, and scaling them down to a largest norm: check, choose a backend, run.

One read gives the norm. When nothing is to be clipped, nothing is written: on a CPU the scaling is left out, on a GPU
its kernel reads the norm and leaves at once. Nothing waits for a GPU.

>>> import torch
>>> from initlab.kernels import clip_, grad_norm
>>> gradients = [torch.full((3,), 2.0e30), torch.full((1,), 2.0e30)]
>>> found = grad_norm(gradients)
>>> f"{float(found.norm):.6g}"  # the squares overflow float32; the norm does not
'4e+30'
>>> clip_(gradients, found.norm64, max_norm=2.0)
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
from .nonfinite import NAN, NEGATIVE_INF, POSITIVE_INF, is_dense, nonfinite_flag

EPSILON = 1e-6  # torch's: added to the norm before max_norm is divided by it
POLICIES = ("propagate", "skip", "zero")

# What the backends read, and the real dtype of complex elements, which are read as two.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}
_KNOWN = {*_CODES, *_PARTS}
_PLAIN = {Tensor, torch.nn.Parameter}
# A coefficient below one of these is applied as two factors, the first this power of two: as one it might be subnormal
# in float32. A product that the first factor makes subnormal comes to 0.
_FIRST = {2.0**-164: 2.0**-126, 2.0**-100: 2.0**-64}


class Norm(NamedTuple):
    """The norm of tensors as one vector, and what was found on the way; all 0-d, on the first tensor's device.

    Attributes:
        norm: float32, or float64 where one of the tensors is float64 or complex128.
        norm64: float64 (float32 on devices without it). The value of `norm` where that is finite; also where float32
            cannot hold it, as with a million elements of 1e38. Clip with this one.
        sum_of_powers: the sum of |x|^p, float64; the largest or smallest |x| where p is inf or -inf. It can overflow.
        flag: the flag word of all tensors (NaN = 1, +inf = 2, -inf = 4), int32; None where it was not asked for and
            would have cost reads.
        first_nonfinite_index: the number of the first tensor that holds a non-finite value, -1 if none does; int64; None as `flag`.
    """

    norm: Tensor
    norm64: Tensor
    sum_of_powers: Tensor
    flag: Tensor | None
    first_nonfinite_index: Tensor | None


class _Part(NamedTuple):
    """A Norm of the tensors on one device, before it is rounded."""

    norm64: Tensor
    sum_of_powers: Tensor
    flag: Tensor | None
    first_nonfinite_index: Tensor | None


class Entries(NamedTuple):
    """Tensors as the backends take them, a number each in every list; elements are real, one after the other."""

    address: list[int]
    length: list[int]
    code: list[int]  # of the dtype
    number: list[int]  # by which the caller knows the tensor


class _Here:
    """The tensors on one device."""

    __slots__ = ("backend", "device", "numbers", "plan", "rest", "tensors")

    def __init__(self, tensors: Sequence[Tensor], numbers: Sequence[int], device: torch.device, known: bool) -> None:
        self.tensors, self.numbers, self.device = tensors, numbers, device
        self.backend = _backend(tensors, device) if known else None  # torch reads dtypes that the backends do not
        # Tensors that fill a stretch of memory are the backend's to read and write as they lie; the rest is not.
        self.rest: Sequence[Tensor] = ()
        self.plan: Any = None
        if self.backend is not None:
            mine, numbers = tensors, list(numbers)
            if not all(map(Tensor.is_contiguous, tensors)):
                dense = [is_dense(t) for t in tensors]
                self.rest = [t for t, whole in zip(tensors, dense, strict=True) if not whole]
                mine = [t for t, whole in zip(tensors, dense, strict=True) if whole]
                numbers = [n for n, whole in zip(numbers, dense, strict=True) if whole]
            self.plan = self.plan_of(mine, numbers)

    def plan_of(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Any:
        """What the backend works by. None where a tensor has no memory of its own, as in torch.func's transforms."""
        entries = _entries(tensors, numbers)
        if entries is None or self.backend is None:
            self.backend = None
            return None
        return self.backend.prepare(entries, self.device)


class TensorGroups:
    """Tensors, checked and sorted out once, for `grad_norm` and then `clip_`.

    Args:
        tensors: floating or complex, strided; any shapes, devices and dtypes, also mixed. They must stay as they are,
            but for their values.
        numbers: by which `Norm.first_nonfinite_index` names them, ascending; by default their places in the sequence.

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

    def __init__(self, tensors: Sequence[Tensor], numbers: Sequence[int] | None = None) -> None:
        self.tensors = tensors
        self.dtypes = {t.dtype for t in tensors}
        _check(tensors, self.dtypes)
        known = self.dtypes <= _KNOWN
        numbers = range(len(tensors)) if numbers is None else numbers
        devices = [t.device for t in tensors]
        distinct = list(dict.fromkeys(devices))
        if len(distinct) == 1:
            self.here = [_Here(tensors, numbers, distinct[0], known)]
            return
        self.here = []
        for device in distinct:
            places = [i for i, d in enumerate(devices) if d == device]
            self.here.append(_Here([tensors[i] for i in places], [numbers[i] for i in places], device, known))


def grad_norm(
    tensors: Sequence[Tensor] | TensorGroups, norm_type: float = 2.0, *, detect_nonfinite: bool = True
) -> Norm:
    """The p-norm of tensors, as if they were one vector.

    Args:
        tensors: as for `TensorGroups`. The 2-norm has backends of its own; for others plain torch reads, in float64.
        norm_type: p, any number; inf and -inf give the largest and the smallest |x|, 0 what torch gives: how many
            tensors hold a non-zero.
        detect_nonfinite: whether the flag word is wanted even where it costs reads, as on devices that plain torch serves.

    Returns:
        See Norm. The 2-norm is within 1e-6 of the true one wherever it fits its dtype, also where squares overflow
        or vanish. Equal bits from run to run on one machine, for any number of threads.

    Raises:
        RuntimeError: for a tensor that is neither floating nor complex.
        NotImplementedError: for a tensor that is not strided.

    Source:
        On a CPU sums in float64. On a GPU sums of 8 squares in float32, then float64, and a second look in float64
        where squares overflow or vanish. Scaled sums for float64: E. Anderson, "Algorithm 978: Safe scaling in the
        level 1 BLAS", ACM TOMS 44, 2017.

    Example:
        >>> import torch
        >>> from initlab.kernels import grad_norm
        >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0, 0.0]])]).norm
        tensor(5.)
    """
    p = float(norm_type)
    gathered = tensors if isinstance(tensors, TensorGroups) else TensorGroups(tensors)
    if not gathered.tensors:
        zero = torch.zeros((), dtype=torch.float64)
        none = torch.full((), -1, dtype=torch.int64)
        return Norm(zero.to(torch.float32), zero, zero, torch.zeros((), dtype=torch.int32), none)
    parts = [_norm_here(here, p, detect_nonfinite) for here in gathered.here]
    total = parts[0]
    if len(parts) > 1:
        home = gathered.tensors[0].device
        total = _combined([_moved(part, home) for part in parts], p)
    wide = not gathered.dtypes.isdisjoint((torch.float64, torch.complex128))
    norm = total.norm64.to(torch.float64 if wide else torch.float32)
    exact = total.norm64 if wide else torch.where(norm.isfinite(), norm.to(total.norm64.dtype), total.norm64)
    return Norm(norm, exact, total.sum_of_powers, total.flag, total.first_nonfinite_index)


def clip_(
    tensors: Sequence[Tensor] | TensorGroups, norm: Tensor, max_norm: float, *, nonfinite: str = "propagate"
) -> None:
    """Multiply tensors in place by min(1, max_norm / (norm + 1e-6)).

    Args:
        tensors: as for `TensorGroups`.
        norm: 0-d, floating, on any device: `Norm.norm64` of these tensors, or of more.
        max_norm: the largest norm that is left as it is.
        nonfinite: what a norm that is NaN or infinite does. "propagate": what the formula says, so NaN everywhere or
            zeros; "skip": nothing is written; "zero": every element becomes zero, also NaN and infinite ones.

    Raises:
        ValueError: for another word than these.
        RuntimeError: for a tensor that is neither floating nor complex, or an inference tensor outside inference mode.
        NotImplementedError: for a tensor that is not strided. Nothing is written when an error is raised.

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
    gathered = tensors if isinstance(tensors, TensorGroups) else TensorGroups(tensors)
    tracing = torch.compiler.is_compiling()  # which knows no inference mode
    if not tracing and not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, gathered.tensors)):
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed; "
            "clip inside torch.inference_mode(), or clip clones"
        )
    max_norm = float(max_norm)
    with torch.no_grad():
        for here in gathered.here:
            there = norm.detach().to(here.device)
            if here.backend is not None and here.backend.ON_DEVICE:
                _scale_on_device(here, there, max_norm, nonfinite)
            elif _visible(there):
                _scale_seen(here, float(there), max_norm, nonfinite)
            else:
                _scale_unseen(here.tensors, there, max_norm, nonfinite)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), NaN where that is: what clipping multiplies by.

    Args:
        norm: floating, any shape and device.
        max_norm: the largest norm that is left as it is.

    Example:
        >>> import torch
        >>> from initlab.kernels import clip_coefficient
        >>> clip_coefficient(torch.tensor([0.5, 4.0]), 2.0)
        tensor([1.0000, 0.5000])
    """
    return (max_norm / (norm + EPSILON)).clamp(max=1.0)


# ---------------------------------------------------------------------------------------------------------------
# Checks and choices


def _check(tensors: Sequence[Tensor], dtypes: set[torch.dtype]) -> None:
    if {t.layout for t in tensors} <= {torch.strided} and dtypes <= _KNOWN:
        return
    for i, t in enumerate(tensors):
        what = f"tensor {i} of shape {tuple(t.shape)}"
        if t.layout != torch.strided:
            raise NotImplementedError(f"{what} has layout {t.layout}; norms and clipping need strided ones")
        if not (t.is_floating_point() or t.is_complex()):
            raise RuntimeError(f"{what} has dtype {t.dtype}; norms and clipping need floating or complex tensors")


def _backend(tensors: Sequence[Tensor], device: torch.device) -> ModuleType | None:
    """What serves tensors on one device; None for plain torch, which also traces, captures and takes subclasses."""
    if torch.compiler.is_compiling() or not set(map(type, tensors)) <= _PLAIN:
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # a graph would read the backend's table again from memory that is gone
    return backends.load(device, _MODULES).module


_MODULES = {"numba": "._norms_numba", "triton": "._norms_triton"}


def _visible(tensor: Tensor) -> bool:
    """Whether Python may look at a value without waiting for a device, or breaking a graph."""
    return tensor.device.type == "cpu" and type(tensor) in _PLAIN and not torch.compiler.is_compiling()


def _entries(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Entries | None:
    """None where one of them has no memory of its own, as in torch.func's transforms."""
    address, count = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))
    code: list[Any] = [_CODES.get(t.dtype) for t in tensors]
    number = list(numbers)
    if None in code:
        for i, t in enumerate(tensors):
            if code[i] is None:
                code[i] = _CODES[_PARTS[t.dtype]]
                count[i] *= 2
    if 0 in count:
        full = [i for i, n in enumerate(count) if n > 0]
        address, count, code, number = ([column[i] for i in full] for column in (address, count, code, number))
    return None if 0 in address else Entries(address, count, code, number)


# ---------------------------------------------------------------------------------------------------------------
# The norm


def _norm_here(here: _Here, p: float, detect_nonfinite: bool) -> _Part:
    if here.backend is None or p != 2.0:
        return _norm_by_torch(here.tensors, here.numbers, p, detect_nonfinite)
    plan, copies = here.plan, here.tensors
    if here.rest:
        copies = [t if is_dense(t) else t.detach().contiguous() for t in here.tensors]
        plan = here.plan_of(copies, here.numbers)
    part = _Part(*here.backend.norm(plan))
    del copies  # until here: a plan knows addresses only
    return part


def _norm_by_torch(tensors: Sequence[Tensor], numbers: Sequence[int], p: float, detect_nonfinite: bool) -> _Part:
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64  # which has no float64
    with torch.no_grad():
        full = [t.detach() for t in tensors if t.numel() > 0]
        if full:
            norms = torch.stack([_one_norm(t, p, wide) for t in full])
        else:  # of nothing
            norms = torch.full((1,), 0.0 if p >= 0.0 else math.inf, dtype=wide, device=tensors[0].device)
        exact = _norm_of_norms(norms, p)
        power = exact if math.isinf(p) or p == 0.0 else norms.pow(p).sum()
        if not detect_nonfinite:
            return _Part(exact, power, None, None)
        if p > 0.0 and _visible(norms) and bool(norms.isfinite().all()):
            flags = torch.zeros(len(tensors), dtype=torch.int32, device=exact.device)
        else:
            flags = torch.stack([nonfinite_flag(t) for t in tensors])
        return _Part(exact, power, *_merged(flags, torch.tensor(numbers, device=flags.device)))


def _one_norm(tensor: Tensor, p: float, wide: torch.dtype) -> Tensor:
    if tensor.is_complex():
        tensor = tensor.abs() if tensor.dtype == torch.complex128 else tensor.to(torch.complex128).abs()
    return _norm_of_norms(tensor.to(wide).reshape(-1), p)


def _norm_of_norms(x: Tensor, p: float) -> Tensor:
    """The p-norm of a wide vector, scaled by its largest element so that no power overflows or vanishes."""
    if p in (0.0, math.inf, -math.inf):
        return torch.linalg.vector_norm(x, p)
    largest = x.abs().amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return torch.linalg.vector_norm(x / scale, p) * scale


def _merged(flags: Tensor, firsts: Tensor) -> tuple[Tensor, Tensor]:
    """The or of flag words, and the first of `firsts` whose word is not 0; -1 if there is none."""
    bits = torch.tensor([NAN, POSITIVE_INF, NEGATIVE_INF], dtype=flags.dtype, device=flags.device)
    flag = (((flags[:, None] & bits) != 0).any(0) * bits).sum(dtype=torch.int32)
    nowhere = torch.iinfo(torch.int64).max
    first = torch.where(flags != 0, firsts, nowhere).amin()
    return flag, torch.where(first == nowhere, -1, first)


def _moved(part: _Part, device: torch.device) -> _Part:
    def moved(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=device.type != "cpu")

    flag, first = (None if x is None else moved(x) for x in part[2:])
    return _Part(moved(part.norm64), moved(part.sum_of_powers), flag, first)


def _combined(parts: Sequence[_Part], p: float) -> _Part:
    exact = _norm_of_norms(torch.stack([part.norm64 for part in parts]), p)
    power = exact
    if p not in (0.0, math.inf, -math.inf):
        power = torch.stack([part.sum_of_powers for part in parts]).sum()
    flags = [part.flag for part in parts if part.flag is not None]
    firsts = [part.first_nonfinite_index for part in parts if part.first_nonfinite_index is not None]
    if len(flags) < len(parts):
        return _Part(exact, power, None, None)
    return _Part(exact, power, *_merged(torch.stack(flags), torch.stack(firsts)))


# ---------------------------------------------------------------------------------------------------------------
# Scaling


def _scale_seen(here: _Here, norm: float, max_norm: float, nonfinite: str) -> None:
    """Where the norm can be looked at."""
    if not math.isfinite(norm) and nonfinite != "propagate":
        if nonfinite == "zero":
            for t in here.tensors:
                t.zero_()
        return
    c = max_norm / (norm + EPSILON)
    if c >= 1.0:
        return
    a = next((first for limit, first in _FIRST.items() if 0.0 < c < limit), 1.0)
    b = c / a
    rest = here.tensors
    if here.backend is not None and here.plan.apart:
        _count_as_written(here)
        here.backend.scale(here.plan, a, b)
        rest = here.rest
    for t in rest:
        if a != 1.0:
            t.mul_(a)
        t.mul_(b)


def _scale_on_device(here: _Here, norm: Tensor, max_norm: float, nonfinite: str) -> None:
    rest = here.tensors
    if here.backend is not None and here.plan.apart:
        _count_as_written(here)
        here.backend.scale(here.plan, norm, max_norm, nonfinite)
        rest = here.rest
    if rest:
        _scale_unseen(rest, norm, max_norm, nonfinite)


def _count_as_written(here: _Here) -> None:
    """Move version counters on, as autograd sees nothing of what a backend writes. Inference tensors have none."""
    tensors = here.tensors
    if torch.is_inference_mode_enabled():
        tensors = [t for t in tensors if not t.is_inference()]
    torch.autograd.graph.increment_version(tensors)


def _scale_unseen(tensors: Sequence[Tensor], norm: Tensor, max_norm: float, nonfinite: str) -> None:
    """Without a look at the norm: every tensor is read and written."""
    bad = ~norm.isfinite()
    c = clip_coefficient(norm, max_norm)
    if nonfinite != "propagate":
        c = torch.where(bad, 1.0, c)
    for t in tensors:
        t.mul_(c)
        if nonfinite == "zero":
            t.masked_fill_(bad, 0.0)
