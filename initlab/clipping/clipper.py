"""Gradient clipping: drop-ins for torch.nn.utils, and GradClipper, which lets a fused optimizer do the scaling.

Gradients are read once; when nothing is clipped they are not written. Norms are true ones, also where squares overflow
float32. A NaN or inf is found in the same read, named, and handled as asked.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import utils
from torch.utils._foreach_utils import _device_has_foreach_support
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from initlab.kernels import Norm, clip_coefficient, describe

from ..distributed.collectives import MeshDim
from ..distributed.norm import MeshTensors, pp_mesh_dim_of
from ..distributed.shards import is_dtensor, local, without_elements

__all__ = [
    "ClipReport",
    "ClipStats",
    "GradClipper",
    "PartialNorm",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]

Policy: TypeAlias = Literal["propagate", "raise", "skip", "zero"]
Tensors: TypeAlias = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]

_POLICIES = ("propagate", "raise", "skip", "zero")
_ELSEWHERE = "one on another rank"


# ---------------------------------------------------------------------------------------------------------------
# What the functions return


@dataclass(frozen=True)
class ClipReport:
    """A norm, and what was found on the way. Nothing is read from the device until a property or str() asks.

    With DTensors norm and flag are the same on all ranks, and all three are plain tensors.

    Attributes:
        norm: the total norm, 0-d, float32, or float64 where a gradient is float64.
        flag: which non-finite values were seen, on any rank, 0-d, int32: NaN = 1, +inf = 2, -inf = 4, or-ed.
        first_nonfinite_index: place of the first tensor of which this rank holds one, in the order they were given, 0-d, int64; -1 if
            there is none.

    Example:
        >>> import torch, initlab
        >>> report = initlab.get_total_norm([torch.ones(2), torch.tensor([0.0, float("inf")])], report=True)
        >>> print(report)
        norm inf; gradient 1 of shape (2,) is the first of those that hold +inf
    """

    norm: Tensor
    flag: Tensor
    first_nonfinite_index: Tensor
    _label: Callable[[int], str] = field(repr=False)

    @property
    def nonfinite(self) -> bool:
        """Whether a gradient holds NaN or inf."""
        return int(self.flag) != 0

    @property
    def first_bad(self) -> str | None:
        """The first tensor that holds NaN or inf: its name where names were given, else its place and shape.

        Where this rank holds none of them, it says so: nothing is asked of other ranks.
        """
        first = int(self.first_nonfinite_index)
        return self._label(first) if first >= 0 else _ELSEWHERE if self.nonfinite else None

    def __str__(self) -> str:
        norm = f"norm {float(self.norm):.6g}"
        if not self.nonfinite:
            return norm
        return f"{norm}; {self.first_bad} is the first of those that hold {describe(int(self.flag))}"


class PartialNorm(NamedTuple):
    """The part of a norm that these tensors make up, to be reduced over other ranks before the root is taken.

    Of DTensors it is reduced over their own meshes already, and the same on all ranks of these.

    Attributes:
        sum_of_powers: the sum of |g|^p, 0-d, float64: add up over ranks (inf: the largest |g|, take the maximum; -inf: the
            minimum). For float64 gradients beyond 1e154 it overflows.
        flag: the flag word of these tensors, 0-d, int32; 0 if all are finite. Take the maximum, or or them.
        norm_type: p.

    Example:
        >>> import torch, initlab
        >>> ranks = [initlab.get_total_norm([torch.tensor([x])], partial=True) for x in (3.0, 4.0)]
        >>> ranks[0]._replace(sum_of_powers=ranks[0].sum_of_powers + ranks[1].sum_of_powers).norm()  # torch.distributed.all_reduce does this
        tensor(5.)
    """

    sum_of_powers: Tensor
    flag: Tensor
    norm_type: float

    def norm(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The norm that `power` stands for, 0-d."""
        if math.isinf(self.norm_type):
            return self.sum_of_powers.to(dtype)
        return self.sum_of_powers.pow(1.0 / self.norm_type).to(dtype)


# ---------------------------------------------------------------------------------------------------------------
# What callers give


class LabelledTensors(NamedTuple):
    """Tensors, and their names where pairs were given, as named_parameters() gives them."""

    tensors: list[Tensor]
    names: list[str] | None

    def label(self) -> Callable[[int], str]:
        """What to call a tensor, by its place. Keeps names or shapes, not tensors."""
        if self.names is not None:
            return self.names.__getitem__
        shapes = [tuple(t.shape) for t in self.tensors]
        return lambda i: f"gradient {i} of shape {shapes[i]}"


def as_labelled_tensors(given: Tensors) -> LabelledTensors:
    if isinstance(given, Tensor):
        return LabelledTensors([given], None)
    items: list[Any] = list(given)
    if items and isinstance(items[0], tuple):
        return LabelledTensors([tensor for _, tensor in items], [name for name, _ in items])
    return LabelledTensors(items, None)


def _gradients(parameters: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[int]]:
    """The gradients that there are, and the places of their parameters.

    For a DTensor without a gradient there is one of which this rank holds nothing: other ranks may have theirs, as
    where experts got no tokens here, and would wait.
    """
    gradients: list[Any] = [p.grad for p in parameters]
    if type(None) not in set(map(type, gradients)):
        return gradients, range(len(gradients))
    if not torch.compiler.is_compiling():
        for i, p in enumerate(parameters):
            if gradients[i] is None and p.requires_grad and is_dtensor(p):
                gradients[i] = without_elements(p)
    places = [i for i, g in enumerate(gradients) if g is not None]
    return [gradients[i] for i in places], places


def _check_policy(nonfinite: str) -> None:
    if nonfinite not in _POLICIES:
        raise ValueError(f"nonfinite is {nonfinite!r}; it must be one of {', '.join(_POLICIES)}")


def _check_max_norm(max_norm: Any) -> float:
    number = float(max_norm)
    if not number >= 0.0:  # torch would turn every gradient round, or make it NaN
        raise ValueError(f"max_norm is {number}; it must be 0 or more")
    return number


def _check_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    for device in {t.device for t in tensors} if foreach else ():
        if not _device_has_foreach_support(device):
            raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")


def _shares(
    tensors: Sequence[Tensor], places: Sequence[int], given: Callable[[], LabelledTensors], stages: MeshDim | None
) -> MeshTensors:
    try:
        return MeshTensors(tensors, places, stages)
    except NotImplementedError:
        strided = [t.layout == torch.strided for t in tensors]
        if all(strided):
            raise
        i = strided.index(False)
        raise NotImplementedError(
            f"{given().label()(places[i])} has layout {tensors[i].layout}, and torch defines no norm for it; leave it "
            "out, or make it dense: p.grad = p.grad.to_dense()"
        ) from None


def _foreign(tensors: Iterable[Tensor]) -> bool:
    """Whether some are left to torch, since they wrap other tensors: those know what their norm is.

    Of a DTensor we read what it wraps, but under torch.compile, which traces torch's own way of doing it.
    """
    if set(map(type, tensors)) <= _PLAIN:
        return False
    tracing = torch.compiler.is_compiling()
    return any((tracing or not is_dtensor(t)) and is_traceable_wrapper_subclass(t) for t in tensors)


_PLAIN = {Tensor, torch.nn.Parameter}


def _only_torch(**extras: object) -> None:
    for name, value in extras.items():
        if value not in (False, None, "propagate"):
            raise NotImplementedError(
                f"{name}={value!r} is not to be had for tensors that wrap others, or DTensors under torch.compile; "
                "leave it out"
            )


# ---------------------------------------------------------------------------------------------------------------
# The drop-ins


@torch.no_grad()
def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    report: bool = False,
    partial: bool = False,
    pp_group: Any = None,
) -> Any:
    """The norm of tensors, as if they were one vector. Drop-in for torch.nn.utils.get_total_norm.

    DTensors count as the whole tensors that they stand for, on any meshes; plain tensors among them count as they are.
    Every rank reads what it holds, once, and learns the same norm by one small collective for each mesh dimension. All
    ranks must make the call, with DTensors in the same order. Meshes of which a rank is no member add nothing there.

    Args:
        tensors: one, an iterable, or an iterable of (name, tensor) pairs. Floating or complex, any shapes, dtypes and
            devices, also mixed. Partial DTensors (sum or avg) are summed for it, a collective each.
        norm_type: p, any number, or "inf".
        error_if_nonfinite: raise where the norm is NaN or infinite. Waits for the device.
        foreach: True raises on devices where torch has no foreach kernels; there is no other difference.
        report: return a ClipReport.
        partial: return a PartialNorm, to be reduced over ranks.
        pp_group: a ProcessGroup of pipeline stages, or a DeviceMesh with one dimension, over which to take the norm
            too. A stage without tensors must make the call as well. Tied weights that two stages hold count twice.

    Returns:
        The norm, 0-d, on the first tensor's device: float64 where a tensor is float64 or complex128, else float32
        (torch: the tensors' own dtype). Within 1e-6 of the true norm wherever float32 holds it, also where squares
        overflow or vanish (torch: inf, or 0). 0 for no tensors. A replicated DTensor, as in torch, where all tensors
        are DTensors on one mesh.

    Raises:
        RuntimeError: for a non-finite norm, if asked to, on every rank; the message names the first bad tensor, and the
            lowest rank that holds one.
        NotImplementedError: for sparse tensors, as in torch; for Partial DTensors other than sums and averages.
        ValueError: for both report and partial, or partial with p = 0; for a pp_group that is something else, or has
            ranks over which a mesh spreads a DTensor: that would count several times.

    Example:
        >>> import torch, initlab
        >>> initlab.get_total_norm([torch.tensor([3.0e30]), torch.tensor([4.0e30])])
        tensor(5.0000e+30)
    """
    p = float(norm_type)
    if partial and (report or p == 0.0):
        raise ValueError("partial=True goes neither with report=True nor with norm_type=0; ask for one of them")
    stages = None if pp_group is None else pp_mesh_dim_of(pp_group)
    given = as_labelled_tensors(tensors)
    _check_foreach(given.tensors, foreach)
    if _foreign(given.tensors):
        _only_torch(report=report, partial=partial, pp_group=pp_group)
        return utils.get_total_norm(given.tensors, p, error_if_nonfinite, foreach)
    shares = _shares(given.tensors, range(len(given.tensors)), lambda: given, stages)
    found = shares.norm(p, detect_nonfinite=report or partial or error_if_nonfinite)
    if error_if_nonfinite:
        _raise_if_nonfinite(found.norm, found, shares, given, p)
    if partial:
        assert found.flag is not None
        return PartialNorm(found.sum_of_powers, found.flag, p)
    return _report(found, given) if report else shares.as_given(found.norm)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    nonfinite: Policy = "propagate",
    report: bool = False,
    pp_group: Any = None,
) -> Any:
    """Scale gradients in place so that their norm is at most max_norm. Drop-in for torch.nn.utils.clip_grad_norm_.

    Every gradient is multiplied by min(1, max_norm / (norm + 1e-6)). One read gives the norm; where nothing is to be
    clipped, gradients are not written. Nothing waits for a GPU, unless an error is asked for.

    Gradients that are DTensors are scaled where they lie, by the norm of the whole; see `get_total_norm`. What one rank
    finds, all ranks act on: they skip, zero or raise together. A parameter that is a DTensor may have its gradient on
    some ranks only; the others take part with nothing.

    Args:
        parameters: one, an iterable, or (name, parameter) pairs as named_parameters() gives them, whose names then
            appear in errors and reports. Those without a gradient are passed over.
        max_norm: 0 or more.
        norm_type: p, any number, or "inf".
        error_if_nonfinite: raise where the norm is NaN or infinite, before anything is written.
        foreach: True raises on devices where torch has no foreach kernels; there is no other difference.
        nonfinite: what to do when a gradient holds NaN or inf. "propagate": what torch does, the formula's NaN or
            zeros; "raise": as error_if_nonfinite; "skip": leave all gradients as they are; "zero": set all to zero.
        report: return a ClipReport in place of the norm.
        pp_group: pipeline stages to take the norm over; as for `get_total_norm`.

    Returns:
        The norm before clipping; see `get_total_norm`.

    Raises:
        RuntimeError: for a non-finite norm, if asked to, on every rank; the message names the first bad parameter.
        NotImplementedError: for sparse gradients, as in torch; for Partial DTensors other than sums and averages.
        ValueError: for a max_norm that is negative or NaN, an unknown word for nonfinite, or a pp_group that is neither
            a ProcessGroup nor a DeviceMesh with one dimension.

    Source:
        R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> norm = initlab.clip_grad_norm_(model.named_parameters(), max_norm=1.0, nonfinite="raise")
        >>> f"{float(norm):.4f}", f"{float(initlab.get_total_norm(p.grad for p in model.parameters())):.4f}"
        ('5.0990', '1.0000')
    """
    _check_policy(nonfinite)
    p, largest = float(norm_type), _check_max_norm(max_norm)
    stages = None if pp_group is None else pp_mesh_dim_of(pp_group)
    given = as_labelled_tensors(parameters)
    if not given.tensors and isinstance(parameters, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    gradients, places = _gradients(given.tensors)
    _check_foreach(gradients, foreach)
    if _foreign(gradients):
        _only_torch(report=report, nonfinite=nonfinite, pp_group=pp_group)
        return utils.clip_grad_norm_(given.tensors, largest, p, error_if_nonfinite, foreach)
    raises = error_if_nonfinite or nonfinite == "raise"
    shares = _shares(gradients, places, lambda: given, stages)
    found = shares.norm(p, detect_nonfinite=raises or report)
    if raises:
        _raise_if_nonfinite(found.norm if error_if_nonfinite else found.norm64, found, shares, given, p)
    shares.clip_(found.norm64, largest, nonfinite="propagate" if nonfinite == "raise" else nonfinite)
    return _report(found, given) if report else shares.as_given(found.norm)


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensors,
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
    *,
    nonfinite: Policy = "propagate",
) -> None:
    """Scale gradients in place, given their norm. Drop-in for torch.nn.utils.clip_grads_with_norm_.

    Args:
        parameters: as for `clip_grad_norm_`.
        max_norm: 0 or more.
        total_norm: 0-d, on any device, or a number: of these gradients, or of more, as under pipeline parallelism. A
            DTensor where torch or `get_total_norm` returned one, whatever the gradients are.
        foreach: as for `clip_grad_norm_`.
        nonfinite: what to do when total_norm is NaN or infinite; as for `clip_grad_norm_`.

    Raises:
        RuntimeError: for a non-finite norm, if asked to.
        NotImplementedError: for sparse gradients, as in torch.
        ValueError: for a max_norm that is negative or NaN, or an unknown word for nonfinite.

    Example:
        >>> import torch, initlab
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> initlab.clip_grads_with_norm_(w, 1.0, initlab.get_total_norm(w.grad))
        >>> w.grad
        tensor([0.6000, 0.8000])
    """
    _check_policy(nonfinite)
    largest = _check_max_norm(max_norm)
    given = as_labelled_tensors(parameters)
    gradients, places = _gradients(given.tensors)
    if not gradients:
        return
    _check_foreach(gradients, foreach)
    norm = total_norm if isinstance(total_norm, Tensor) else torch.tensor(float(total_norm), dtype=torch.float64)
    if _foreign([*gradients, norm]):
        _only_torch(nonfinite=nonfinite)
        utils.clip_grads_with_norm_(given.tensors, largest, norm, foreach)
        return
    if is_dtensor(norm):
        norm = norm.full_tensor()  # type: ignore[attr-defined]
    shares = _shares(gradients, places, lambda: given, None)
    if nonfinite == "raise" and not bool(norm.isfinite()):
        raise RuntimeError(f"total_norm is {float(norm)}, so the gradients cannot be clipped; none was changed")
    shares.clip_(norm, largest, nonfinite="propagate" if nonfinite == "raise" else nonfinite)


@torch.no_grad()
def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clamp gradients in place into [-clip_value, clip_value], by torch.nn.utils.clip_grad_value_ itself.

    Of DTensors, also on several meshes and beside plain tensors, it is given what this rank holds. Nothing is sent.

    Args:
        parameters: one, an iterable, or (name, parameter) pairs.
        clip_value: 0 or more. NaN stays NaN, inf becomes clip_value.
        foreach: as in torch.

    Raises:
        ValueError: for a clip_value that is negative or NaN, with which torch would set every element to one value.
        NotImplementedError: for Partial DTensors: clamped terms do not make a clamped sum.

    Example:
        >>> import torch, initlab
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> w.grad = torch.tensor([-7.0, 0.5, float("inf")])
        >>> initlab.clip_grad_value_(w, 1.0)
        >>> w.grad
        tensor([-1.0000,  0.5000,  1.0000])
    """
    value = float(clip_value)
    if not value >= 0.0:
        raise ValueError(f"clip_value is {value}; it must be 0 or more")
    given = [p for p in as_labelled_tensors(parameters).tensors if p.grad is not None]
    if not given:  # torch takes an empty list amiss
        return
    gradients, _ = _gradients(given)
    spread: list[Any] = [] if _foreign(gradients) else [g for g in gradients if is_dtensor(g)]
    if not spread:
        utils.clip_grad_value_(given, value, foreach)
        return
    for g in spread:
        if any(placement.is_partial() for placement in g.placements):
            raise NotImplementedError(
                f"a gradient of shape {tuple(g.shape)} is placed {g.placements}, and clamped terms do not make a "
                "clamped sum; redistribute it to Shard or Replicate. No gradient was changed"
            )
    held: Any = [types.SimpleNamespace(grad=local(g)) for g in gradients]
    utils.clip_grad_value_(held, value, foreach)
    torch.autograd.graph.increment_version(spread)


def _report(found: Norm, given: LabelledTensors) -> ClipReport:
    assert found.flag is not None
    assert found.first_nonfinite_index is not None
    return ClipReport(found.norm, found.flag, found.first_nonfinite_index, given.label())


def _raise_if_nonfinite(norm: Tensor, found: Norm, shares: MeshTensors, given: LabelledTensors, p: float) -> None:
    if bool(norm.isfinite()):
        return
    report = _report(found, given)
    if report.nonfinite:
        first = report.first_bad
        if not shares.alone:
            lowest = shares.lowest(first if int(report.first_nonfinite_index) >= 0 else None)
            first = _ELSEWHERE if lowest is None else f"{lowest[1]}, on rank {lowest[0]},"
        why = f"{first} is the first of those that hold {describe(int(report.flag))}"
    else:
        why = f"every gradient is finite, but their norm, {float(found.norm64):.6g}, is beyond {norm.dtype}"
    raise RuntimeError(
        f"The total norm of order {p} for gradients from `parameters` is non-finite, so it cannot be clipped: {why}. "
        "No gradient was changed. Give nonfinite='skip' or 'zero' to go on without them, or error_if_nonfinite=False "
        "to scale by the non-finite norm anyway"
    )


# ---------------------------------------------------------------------------------------------------------------
# GradClipper


@dataclass(frozen=True)
class ClipStats:
    """What a GradClipper has seen.

    Attributes:
        steps: how often it ran.
        clipped: steps whose gradients were scaled down.
        nonfinite: steps with a NaN or inf in a gradient; under nonfinite="skip" they changed nothing.
        first_bad_step: the first of them, counted from 0; None if there was none.
        first_bad_parameter: the first parameter whose gradient held one then; says so where that lies on another rank.
    """

    steps: int
    clipped: int
    nonfinite: int
    first_bad_step: int | None
    first_bad_parameter: str | None


class GradClipper:
    """Clips the gradients of an optimizer's parameters in every step, and keeps bad steps out of weights and moments.

    From then on `optimizer.step()` does it; nothing else is to be called. With an optimizer of torch whose groups are
    all fused (SGD, Adam, AdamW, Adagrad with fused=True) gradients are read once for the norm; the coefficient rides
    in the optimizer's own pass, as its grad_scale, and bad steps as its found_inf: no pass that scales, no wait for a
    GPU. With others gradients are scaled in place, and "skip" waits for the device once a step; "raise" always does.

    Works under torch.amp.GradScaler: scaled gradients are measured as what they stand for, and a step that the scaler
    gives up stays given up. Parameter groups count as one vector; parameters without a gradient are passed over.

    Works with DTensors on any meshes (FSDP2, tensor, expert and hybrid parallelism): every rank of the meshes takes the
    same norm, and a NaN on one makes all skip the step. Ranks that share no mesh know nothing of each other, unless
    pp_group joins them. See `get_total_norm`.

    Args:
        optimizer: any whose step() takes no closure. Its names are used if it was made of named_parameters().
        max_norm: more than 0; inf only measures and guards. May be set anew at any time, as an attribute.
        nonfinite: what to do in a step with NaN or inf in a gradient. "skip": no parameter, moment or step count
            changes; "raise": RuntimeError before anything changes, naming the parameter; "zero": step with gradients
            of zero; "propagate": as if nothing was wrong.
        norm_type: p, any number, or "inf".
        named_parameters: (name, parameter) pairs, for reports.
        pp_group: pipeline stages to take the norm over; as for `get_total_norm`. All stages must step, whether they
            have gradients or not. torch.amp.GradScaler goes by each stage's own gradients, so scales drift apart; use
            torch's ShardedGradScaler with the process group of the stages, and call its unscale_ before each step.

    Attributes:
        max_norm: the largest norm.
        report: the ClipReport of the last step; None before it. Its norm is that before clipping.

    Raises:
        ValueError: for a max_norm that is not positive, an unknown word for nonfinite, or a pp_group that is neither a
            ProcessGroup nor a DeviceMesh with one dimension.
        RuntimeError: if the optimizer has a GradClipper already.

    Source:
        R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.

    Example:
        >>> import torch, initlab
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.named_parameters(), fused=True)
        >>> clipper = initlab.GradClipper(optimizer, max_norm=1.0)
        >>> for x in (1.0, 50.0, float("nan")):
        ...     optimizer.zero_grad()
        ...     model(torch.tensor([[0.1, x]])).sum().backward()
        ...     optimizer.step()
        >>> clipper.stats()
        ClipStats(steps=3, clipped=2, nonfinite=1, first_bad_step=2, first_bad_parameter='weight')
        >>> bool(model.weight.isfinite().all())
        True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        nonfinite: Policy = "skip",
        *,
        norm_type: float = 2.0,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        pp_group: Any = None,
    ) -> None:
        _check_policy(nonfinite)
        if not float(max_norm) > 0.0:
            raise ValueError(f"max_norm is {max_norm}; it must be more than 0; inf only measures and guards")
        if getattr(optimizer, "_initlab_clipper", None) is not None:
            raise RuntimeError("this optimizer has a GradClipper already; remove() that one first")
        self.max_norm, self.nonfinite, self.norm_type = float(max_norm), nonfinite, float(norm_type)
        self.report: ClipReport | None = None
        self._optimizer = optimizer
        self._stages = None if pp_group is None else pp_mesh_dim_of(pp_group)
        self._names = {id(p): name for name, p in named_parameters or ()}
        self._steps = 0
        self._counts = torch.tensor([0, 0, -1, -1])  # clipped, non-finite, the first such step, its parameter's place
        self._ours: tuple[Tensor | None, ...] = ()  # grad_scale and found_inf, where no GradScaler set them
        self._hidden: list[tuple[Tensor, Tensor]] = []
        optimizer._initlab_clipper = self  # type: ignore[attr-defined]
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def stats(self) -> ClipStats:
        """The counts so far, read from the device."""
        clipped, nonfinite, step, place = self._counts.tolist()
        if step < 0:
            return ClipStats(self._steps, clipped, nonfinite, None, None)
        return ClipStats(self._steps, clipped, nonfinite, step, self._label(place) if place >= 0 else _ELSEWHERE)

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain numbers."""
        return {"steps": self._steps, "counts": self._counts.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the counts that `state_dict` returned."""
        self._steps = int(state_dict["steps"])
        self._counts = torch.tensor(state_dict["counts"])

    def remove(self) -> None:
        """Leave the optimizer as it was before."""
        for hook in self._hooks:
            hook.remove()
        self._tidy()
        if getattr(self._optimizer, "_initlab_clipper", None) is self:
            del self._optimizer._initlab_clipper

    def _label(self, place: int) -> str:
        return self._given().label()(place)

    def _given(self) -> LabelledTensors:
        """The optimizer's parameters, and their names as far as they are known."""
        parameters: list[Tensor] = []
        names: list[str] = []
        for number, group in enumerate(self._optimizer.param_groups):
            given = group.get("param_names")
            for i, p in enumerate(group["params"]):
                other = given[i] if given is not None else f"parameter {i} of group {number}, of shape {tuple(p.shape)}"
                parameters.append(p)
                names.append(self._names.get(id(p), other))
        return LabelledTensors(parameters, names)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(closure is not None for closure in (*args[1:2], kwargs.get("closure"))):
            raise RuntimeError(
                "GradClipper clips before step() runs, and a closure makes the gradients inside it; "
                "call initlab.clip_grad_norm_ in the closure, after backward(), and remove() the GradClipper"
            )
        self._tidy()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients, places = _gradients(parameters)
        if not gradients and self._stages is None:
            return
        if _foreign(gradients):
            raise NotImplementedError("GradClipper takes no gradients that wrap other tensors, but for DTensors")
        # A GradScaler leaves its scale here where gradients are still scaled, and always what it has found.
        scale, found_inf = (_whole(getattr(optimizer, name, None)) for name in ("grad_scale", "found_inf"))
        scaled = found_inf is not None
        shares = _shares(gradients, places, self._given, self._stages)
        total = shares.norm(self.norm_type)
        if scale is not None:
            exact = total.norm64 / scale.to(total.norm64.device)
            total = total._replace(norm64=exact, norm=exact.to(total.norm.dtype))
        assert total.flag is not None
        assert total.first_nonfinite_index is not None
        self.report = ClipReport(total.norm, total.flag, total.first_nonfinite_index, self._label)
        bad = total.flag != 0
        c = clip_coefficient(total.norm64, self.max_norm)
        self._count(total.first_nonfinite_index, bad, ~bad & (c < 1.0))
        policy = "skip" if self.nonfinite == "raise" and scaled else self.nonfinite  # the scaler sees to infs
        if policy == "raise":
            _raise_if_nonfinite(torch.where(bad, math.nan, 0.0), total, shares, self._given(), self.norm_type)
        exact = total.norm64 if policy == "propagate" else torch.where(bad, math.nan, total.norm64)
        if not _is_fused(optimizer):
            if policy == "skip" and bool(bad):
                self._hide(parameters)
            else:
                how = policy if policy in ("skip", "zero") else "propagate"
                shares.clip_(exact, self.max_norm, nonfinite=how)
            return
        if policy == "zero":
            shares.clip_(exact, math.inf, nonfinite="zero")
        if policy == "skip" or scaled:
            found = bad if found_inf is None else bad | (found_inf.to(bad.device) != 0)
            if not _start_momentum(optimizer) and bool(found):
                self._hide(parameters)
            found_inf = found.to(torch.float32)
        if policy != "propagate":
            c = torch.where(bad, 1.0, c)
        # Both 0-d: vectors of one element do not go with DTensors.
        grad_scale = ((1.0 if scale is None else scale.to(c.device)) / c).to(torch.float32)
        self._ours = () if scaled else (grad_scale, found_inf)
        optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tidy()

    def _count(self, first: Tensor, bad: Tensor, clipped: Tensor) -> None:
        counts = self._counts.to(bad.device, non_blocking=True)
        fresh = bad & (counts[2] < 0)
        step, place = torch.where(fresh, self._steps, counts[2]), torch.where(fresh, first, counts[3])
        self._counts = torch.stack([counts[0] + clipped, counts[1] + bad, step, place])
        self._steps += 1

    def _hide(self, parameters: Iterable[Tensor]) -> None:
        """Take the gradients away until step() is over: an optimizer passes over parameters that have none."""
        self._hidden = [(p, p.grad) for p in parameters if p.grad is not None]
        for p, _ in self._hidden:
            p.grad = None

    def _tidy(self) -> None:
        """Undo what one step needed, also where an earlier one raised."""
        for p, gradient in self._hidden:
            p.grad = gradient
        self._hidden = []
        for name, tensor in zip(("grad_scale", "found_inf"), self._ours, strict=False):
            if hasattr(self._optimizer, name) and getattr(self._optimizer, name) is tensor:
                delattr(self._optimizer, name)
        self._ours = ()


def _whole(tensor: Tensor | None) -> Tensor | None:
    """A number of a GradScaler's, 0-d: a DTensor where gradients are, one element of ShardedGradScaler's."""
    if tensor is None:
        return None
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return whole.reshape(())


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every group's step takes grad_scale and found_inf."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def _start_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Make SGD's momentum buffers before its first step. False where that would change the step.

    A fused SGD makes them without values and leaves them so in a step that found_inf skips. Zeros give the step that
    torch takes: 0 * momentum + gradient. With dampening torch's first step leaves it out, and zeros would not.
    """
    for group in optimizer.param_groups:
        if group.get("momentum", 0) != 0 and "dampening" in group:
            new = [
                p
                for p in group["params"]
                if p.grad is not None and optimizer.state.get(p, {}).get("momentum_buffer") is None
            ]
            if new and group["dampening"] != 0:
                return False
            for p in new:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
    return True
