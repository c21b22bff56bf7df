"""Drop-ins for the gradient clipping of torch.nn.utils, with a few keywords behind torch's own.

One read gives the norm; what is not clipped is not written. `MeshTensors` makes one norm of plain tensors and DTensors.
"""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import utils

from initlab.kernels import Norm, describe
from initlab.kernels.torch_internals import has_foreach

from ..distributed.dtensors import ClassifiedTensors, classify, is_dtensor, without_elements
from ..distributed.groups import MeshDim, pp_mesh_dim_of
from ..distributed.norm import MeshTensors
from .optimizers import refuse_partitioned
from .report import ON_ANOTHER_RANK, ClipReport, PartialNorm, label

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]

Policy: TypeAlias = Literal["propagate", "raise", "keep", "zero"]  # for gradients
StepPolicy: TypeAlias = Literal["propagate", "raise", "skip", "zero"]  # for an optimizer's step
Tensors: TypeAlias = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]

# Where a word of the one is used for the other.
_MEANT = {
    "skip": "; 'skip' is GradClipper's, which skips the step: 'keep' leaves gradients as they are, for a step to apply",
    "keep": "; 'keep' is clip_grad_norm_'s, which leaves bad gradients for the step to apply: 'skip' skips the step",
}


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
    per_parameter: bool = False,
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
        per_parameter: return (norm, norms), with the 2-norm of each tensor, of the same read. For norm_type = 2 alone.

    Returns:
        The norm, 0-d, on the first tensor's device: float64 where a tensor is float64 or complex128, else float32
        (torch: the tensors' own dtype). Within 1e-6 of the true norm wherever float32 holds it, also where squares
        overflow or vanish (torch: inf, or 0). 0 for no tensors. A replicated DTensor, as in torch, where all tensors
        are DTensors on one mesh. The norms per parameter: a 1-D tensor in the order of the tensors, as exact as the
        norm, on its device and of its dtype. Of a DTensor the norm of the whole; of a tensor that is tiny beside the
        others, or lies beside non-finite ones, its own.

    Raises:
        RuntimeError: for a non-finite norm, if asked to, on every rank; the message names the first bad tensor, and the
            lowest rank that holds one.
        NotImplementedError: for sparse tensors, as in torch; for Partial DTensors other than sums and averages.
        ValueError: for both report and partial, or partial with p = 0; for a pp_group that is neither a ProcessGroup
            nor a DeviceMesh with one dimension, or has ranks over which a mesh spreads a DTensor, which would then
            count several times; for per_parameter with report, partial or another norm_type than 2.

    Example:
        >>> import torch, initlab
        >>> initlab.get_total_norm([torch.tensor([3.0e30]), torch.tensor([4.0e30])])
        tensor(5.0000e+30)
        >>> initlab.get_total_norm([torch.tensor([3.0, 0.0]), torch.tensor([4.0])], per_parameter=True)
        (tensor(5.), tensor([3., 4.]))
    """
    p = float(norm_type)
    if per_parameter:
        _check_per_parameter(p, report=report, partial=partial)
    if partial and (report or p == 0.0):
        raise ValueError("partial=True goes neither with report=True nor with norm_type=0; ask for one of them")
    pp_mesh_dim = pp_mesh_dim_of(pp_group)
    labelled = _each_once(as_labelled_tensors(tensors))
    _check_foreach(labelled.tensors, foreach)
    classified = classify(labelled.tensors)
    if classified.has_wrapper_subclass:
        _reject_extras(report=report, partial=partial, pp_group=pp_group, per_parameter=per_parameter)
        return utils.get_total_norm(labelled.tensors, p, error_if_nonfinite, foreach)
    mesh_tensors = mesh_tensors_of(labelled, classified, pp_mesh_dim)
    total = mesh_tensors.norm(p, detect_nonfinite=report or partial or error_if_nonfinite, per_tensor=per_parameter)
    if error_if_nonfinite and not bool(total.norm.isfinite()):
        raise nonfinite_error(total, mesh_tensors, labelled, p)
    if partial:
        assert total.flag is not None
        return PartialNorm(total.sum_of_powers, total.flag, p)
    if per_parameter:
        assert total.tensor_norms is not None
        norms = total.tensor_norms.to(total.norm.dtype)
        if len(labelled.tensors) < len(labelled.passed):  # some were passed twice
            places = {id(t): i for i, t in enumerate(labelled.tensors)}
            norms = norms[torch.tensor([places[id(t)] for t in labelled.passed], device=norms.device)]
        return mesh_tensors.replicated(total.norm), norms
    return report_of(total, labelled.labels()) if report else mesh_tensors.replicated(total.norm)


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

    Gradients that are DTensors are scaled in place, by the norm of the whole; see `get_total_norm`. What one rank
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
            zeros; "raise": as error_if_nonfinite; "keep": leave all gradients as they are, so that a step would
            apply them; "zero": set all to zero. GradClipper can skip the step.
        report: return a ClipReport in place of the norm.
        pp_group: pipeline stages to take the norm over; as for `get_total_norm`.

    Returns:
        The norm before clipping; see `get_total_norm`.

    Raises:
        RuntimeError: for a non-finite norm, if asked to, on every rank; the message names the first bad parameter.
        NotImplementedError: for sparse gradients, as in torch; for Partial DTensors other than sums and averages.
        ValueError: for a max_norm that is negative or NaN, an unknown policy for nonfinite, or a pp_group that is
            neither a ProcessGroup nor a DeviceMesh with one dimension.

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
    check_policy(nonfinite)
    p, max_norm = float(norm_type), _check_max_norm(max_norm)
    pp_mesh_dim = pp_mesh_dim_of(pp_group)
    labelled = as_labelled_tensors(parameters)
    if not labelled.passed and isinstance(parameters, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    gradients = gradients_of(labelled)
    _check_foreach(gradients.tensors, foreach)
    classified = classify(gradients.tensors)
    if classified.has_wrapper_subclass:
        _reject_extras(report=report, nonfinite=nonfinite, pp_group=pp_group)
        return utils.clip_grad_norm_(_owners(gradients), max_norm, p, error_if_nonfinite, foreach)
    raises = error_if_nonfinite or nonfinite == "raise"
    mesh_tensors = mesh_tensors_of(gradients, classified, pp_mesh_dim)
    total = mesh_tensors.norm(p, detect_nonfinite=raises or report)
    if raises:
        checked = total.norm if error_if_nonfinite else total.norm64
        if not bool(checked.isfinite()):
            raise nonfinite_error(total, mesh_tensors, gradients, p)
    mesh_tensors.clip_(total.norm64, max_norm, nonfinite="propagate" if nonfinite == "raise" else nonfinite)
    return report_of(total, labelled.labels()) if report else mesh_tensors.replicated(total.norm)


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
        ValueError: for a max_norm that is negative or NaN, or an unknown policy for nonfinite.

    Example:
        >>> import torch, initlab
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> initlab.clip_grads_with_norm_(w, 1.0, initlab.get_total_norm(w.grad))
        >>> w.grad
        tensor([0.6000, 0.8000])
    """
    check_policy(nonfinite)
    max_norm = _check_max_norm(max_norm)
    gradients = gradients_of(as_labelled_tensors(parameters))
    if not gradients.tensors:
        return
    _check_foreach(gradients.tensors, foreach)
    norm = total_norm
    if not isinstance(norm, Tensor):
        norm = torch.tensor(float(norm), dtype=torch.float64, device="cpu")
    classified, classified_norm = classify(gradients.tensors), classify([norm])
    if classified.has_wrapper_subclass or classified_norm.has_wrapper_subclass:
        _reject_extras(nonfinite=nonfinite)
        utils.clip_grads_with_norm_(_owners(gradients), max_norm, norm, foreach)
        return
    if classified_norm.has_dtensor:
        norm = norm.full_tensor()  # type: ignore[attr-defined]
    mesh_tensors = mesh_tensors_of(gradients, classified)
    if nonfinite == "raise" and not bool(norm.isfinite()):
        raise RuntimeError(f"total_norm is {float(norm)}, so the gradients cannot be clipped; none was changed")
    mesh_tensors.clip_(norm, max_norm, nonfinite="propagate" if nonfinite == "raise" else nonfinite)


@torch.no_grad()
def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clamp gradients in place into [-clip_value, clip_value], by torch.nn.utils.clip_grad_value_ itself.

    Of DTensors, also on several meshes and beside plain tensors, it clamps what this rank holds. Nothing is sent.

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
    with_gradient = [p for p in as_labelled_tensors(parameters).passed if p.grad is not None]
    if not with_gradient:  # torch raises for an empty list
        return
    gradients = classify([p.grad for p in with_gradient if p.grad is not None])
    if not gradients.has_dtensor:
        utils.clip_grad_value_(with_gradient, value, foreach)
        return
    dtensors: list[Any] = [g for g in gradients.dtensors() if g is not None]
    for g in dtensors:
        if any(placement.is_partial() for placement in g.placements):
            raise NotImplementedError(
                f"a gradient of shape {tuple(g.shape)} is placed {g.placements}, and clamped terms do not make a "
                "clamped sum; redistribute it to Shard or Replicate. No gradient was changed"
            )
    local_parameters: Any = [types.SimpleNamespace(grad=g) for g in gradients.local]
    utils.clip_grad_value_(local_parameters, value, foreach)
    torch.autograd.graph.increment_version(dtensors)


class LabelledTensors(NamedTuple):
    """Tensors that a call works on, and what to call each.

    Attributes:
        tensors: those to read: what the caller passed, or the gradients of that.
        indices: for each of them the index of what the caller passed.
        passed: what the caller passed.
        names: of what the caller passed, if that was pairs, as named_parameters() gives them.
    """

    tensors: Sequence[Tensor]
    indices: Sequence[int]
    passed: Sequence[Tensor]
    names: list[str] | None

    def labels(self) -> Sequence[str | torch.Size]:
        """By index: names, or shapes; no tensors, so that a report keeps none alive."""
        return [t.shape for t in self.passed] if self.names is None else self.names


def as_labelled_tensors(tensors: Tensors) -> LabelledTensors:
    """What a caller passed, as a list."""
    items: list[Any] = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    names = None
    if items and isinstance(items[0], tuple):
        items, names = [tensor for _, tensor in items], [name for name, _ in items]
    return LabelledTensors(items, range(len(items)), items, names)


def gradients_of(parameters: LabelledTensors) -> LabelledTensors:
    """The gradients of parameters; those without one are left out.

    For a DTensor without a gradient there is one of which this rank holds nothing: other ranks may have theirs, as
    where experts got no tokens on this rank, and would wait. Parameters of DeepSpeed's ZeRO raise NotImplementedError.
    """
    if not torch.compiler.is_compiling():
        refuse_partitioned(parameters.passed)
    gradients: list[Any] = [p.grad for p in parameters.passed]
    missing = type(None) in set(map(type, gradients))
    if missing and not torch.compiler.is_compiling():
        for i, p in enumerate(parameters.passed):
            if gradients[i] is None and p.requires_grad and is_dtensor(p):
                gradients[i] = without_elements(p)
    return _each_once(parameters._replace(tensors=gradients, indices=range(len(gradients))))


def _each_once(labelled: LabelledTensors) -> LabelledTensors:
    """Without what is None, and what came before: a tied weight, passed for both modules that have it."""
    tensors = labelled.tensors
    ids = set(map(id, tensors))
    if len(ids) == len(tensors) and id(None) not in ids:
        return labelled
    places = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    indices = sorted(i for i in places.values() if tensors[i] is not None)
    return labelled._replace(tensors=[tensors[i] for i in indices], indices=indices)


def mesh_tensors_of(
    labelled: LabelledTensors,
    classified: ClassifiedTensors,
    pp_mesh_dim: MeshDim | None = None,
    takes_sparse: bool | None = None,
) -> MeshTensors:
    """Tensors prepared for norm and scaling.

    Sparse ones (COO) are taken where asked for, by default where torch's own functions take them. If not they raise
    NotImplementedError, with the tensor's name.
    """
    try:
        return MeshTensors(classified, labelled.indices, pp_mesh_dim)
    except NotImplementedError:
        others = [i for i, tensor in enumerate(labelled.tensors) if tensor.layout != torch.strided]
        if not others:
            raise
        first = label(labelled.labels(), labelled.indices[others[0]])
        layouts = {labelled.tensors[i].layout for i in others}
        if layouts == {torch.sparse_coo} and (_torch_takes_sparse() if takes_sparse is None else takes_sparse):
            return _SparseMeshTensors(labelled, pp_mesh_dim)
        raise NotImplementedError(
            f"{first} has layout {labelled.tensors[others[0]].layout}, for which torch {torch.__version__} defines no "
            "norm; leave it out. GradClipper takes sparse_coo"
        ) from None


@functools.cache
def _torch_takes_sparse() -> bool:
    """Whether torch.nn.utils clips sparse gradients: since 2.14."""
    try:
        utils.get_total_norm([torch.ones(2, device="cpu").to_sparse()])
    except (NotImplementedError, RuntimeError):
        return False
    return True


class _SparseMeshTensors(MeshTensors):
    """As MeshTensors, with sparse tensors among them: the norm is that of their coalesced values."""

    def __init__(self, labelled: LabelledTensors, pp_mesh_dim: MeshDim | None) -> None:
        def prepared(values: Callable[[Tensor], Tensor]) -> ClassifiedTensors:
            return classify([values(t) if t.layout == torch.sparse_coo else t for t in labelled.tensors])

        super().__init__(prepared(lambda t: t.coalesce().values()), labelled.indices, pp_mesh_dim)
        # Values that are added up scale as their sum does, so what is not coalesced may stay so.
        self._written = MeshTensors(prepared(lambda t: t.detach()._values()), labelled.indices, pp_mesh_dim)

    def clip_(self, norm: Tensor, max_norm: float, *, nonfinite: str = "propagate") -> None:
        """Multiply what this rank holds by min(1, max_norm / (norm + 1e-6))."""
        self._written.clip_(norm, max_norm, nonfinite=nonfinite)


def check_policy(nonfinite: str, policies: Any = Policy) -> None:
    """Raise a ValueError for a policy that is none of a Literal's."""
    names = get_args(policies)
    if nonfinite not in names:
        meant = _MEANT.get(nonfinite, "") if isinstance(nonfinite, str) else ""
        raise ValueError(f"nonfinite is {nonfinite!r}; it must be one of {', '.join(names)}{meant}")


def _owners(gradients: LabelledTensors) -> list[Tensor]:
    """The parameters whose gradients these are."""
    return [gradients.passed[i] for i in gradients.indices]


def _check_max_norm(max_norm: Any) -> float:
    number = float(max_norm)
    if not number >= 0.0:  # torch would turn every gradient round, or make it NaN
        raise ValueError(f"max_norm is {number}; it must be 0 or more")
    return number


def _check_per_parameter(p: float, **others: bool) -> None:
    if p != 2.0:
        raise ValueError(
            f"per_parameter=True goes with norm_type=2 alone, not with {p}: the sums of other powers are not kept by "
            f"tensor; leave it out, or call get_total_norm(tensor, {p}) for each tensor"
        )
    for name, value in others.items():
        if value:
            raise ValueError(f"per_parameter=True does not go with {name}=True; make two calls, one for each of them")


def _check_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    for device in {t.device for t in tensors} if foreach else ():
        if not has_foreach(device):
            raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")


def _reject_extras(**extras: object) -> None:
    """Raise for keywords that torch's own functions, which take wrappers, do not have."""
    for name, value in extras.items():
        if value not in (False, None, "propagate"):
            raise NotImplementedError(
                f"{name}={value!r} does not work with tensors that wrap others, nor with DTensors under torch.compile; "
                "leave it out"
            )


def report_of(total: Norm, labels: Sequence[str | torch.Size]) -> ClipReport:
    """A norm for which non-finite values were looked for, as a report."""
    assert total.flag is not None
    assert total.first_nonfinite_index is not None
    return ClipReport(total.norm, total.flag, total.first_nonfinite_index, labels)


def nonfinite_error(total: Norm, mesh_tensors: MeshTensors, labelled: LabelledTensors, p: float) -> RuntimeError:
    """The error for a norm that is not finite. Every rank must ask for it: ranks tell each other names."""
    report = report_of(total, labelled.labels())
    if report.nonfinite:
        first = report.first_bad
        if mesh_tensors.communicates:
            lowest = mesh_tensors.lowest(first if int(report.first_nonfinite_index) >= 0 else None)
            first = ON_ANOTHER_RANK if lowest is None else f"{lowest[1]}, on rank {lowest[0]},"
        why = f"{first} is the first of those that hold {describe(int(report.flag))}"
    else:
        norm = float(total.norm64)
        dtype = total.norm.dtype if math.isfinite(norm) else total.norm64.dtype
        why = f"every gradient is finite, but their norm, {norm:.6g}, is beyond {dtype}"
    return RuntimeError(
        f"The total norm of order {p} for gradients from `parameters` is non-finite, so it cannot be clipped: {why}. "
        "No gradient was changed. Pass nonfinite='zero' to go on without them, or error_if_nonfinite=False "
        "to scale by the non-finite norm anyway"
    )
