"""GradClipper: clips in an optimizer's step. Each step measures the gradients, decides, and applies the decision."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from initlab.kernels import Norm, clip_coefficient

from ..distributed.dtensors import classify, is_dtensor
from ..distributed.groups import pp_mesh_dim_of
from ..distributed.norm import MeshTensors
from .functional import (
    LabelledTensors,
    Policy,
    check_policy,
    gradients_of,
    mesh_tensors_of,
    nonfinite_error,
    report_of,
)
from .report import ON_ANOTHER_RANK, ClipReport, ClipStats, label


class GradClipper:
    """Clips the gradients of an optimizer's parameters in every step, and keeps bad steps out of weights and moments.

    From then on `optimizer.step()` clips; call nothing else. With an optimizer of torch whose groups are all fused
    (SGD, Adam, AdamW, Adagrad with fused=True) gradients are read once, for the norm. The optimizer applies the coefficient
    in its own pass, as its grad_scale, and skips bad steps by its found_inf: no pass that scales, no wait for a GPU.
    With others gradients are scaled in place, and "skip" waits for the device once a step; "raise" always does.

    Works under torch.amp.GradScaler: the norm of gradients that are still scaled is that of the unscaled ones, and a
    step that the scaler skips stays skipped. Parameter groups count as one vector; parameters without a gradient are
    passed over.

    Works with DTensors on any meshes (FSDP2, tensor, expert and hybrid parallelism): every rank of the meshes takes the
    same norm, and a NaN on one makes all skip the step. Ranks that share no mesh know nothing of each other, unless
    pp_group joins them. See `get_total_norm`.

    Args:
        optimizer: any whose step() takes no closure. Reports use its names if it was made of named_parameters().
        max_norm: more than 0; inf only measures and guards. The attribute may be set at any time.
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
        ValueError: for a max_norm that is not positive, an unknown policy for nonfinite, or a pp_group that is neither
            a ProcessGroup nor a DeviceMesh with one dimension.
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
        check_policy(nonfinite)
        if not float(max_norm) > 0.0:
            raise ValueError(f"max_norm is {max_norm}; it must be more than 0; inf only measures and guards")
        if getattr(optimizer, "_initlab_clipper", None) is not None:
            raise RuntimeError("this optimizer has a GradClipper already; remove() that one first")
        self.max_norm, self.nonfinite, self.norm_type = float(max_norm), nonfinite, float(norm_type)
        self.report: ClipReport | None = None
        self._optimizer = optimizer
        self._pp_mesh_dim = pp_mesh_dim_of(pp_group)
        self._names = {id(p): name for name, p in named_parameters or ()}
        self._known = LabelledTensors([], [], [], [])  # the optimizer's parameters at the last step
        self._steps = 0
        self._counts = torch.tensor([0, 0, -1, -1])  # clipped, non-finite, the first such step, its parameter
        self._set: tuple[Tensor | None, ...] = ()  # grad_scale and found_inf, where no GradScaler had set them
        self._hidden: list[tuple[Tensor, Tensor]] = []  # parameters, and the gradients that step() must not see
        optimizer._initlab_clipper = self  # type: ignore[attr-defined]
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def stats(self) -> ClipStats:
        """The counts so far, read from the device."""
        clipped, nonfinite, step, parameter = self._counts.tolist()
        if step < 0:
            return ClipStats(self._steps, clipped, nonfinite, None, None)
        name = label(self._parameters().labels(), parameter) if parameter >= 0 else ON_ANOTHER_RANK
        return ClipStats(self._steps, clipped, nonfinite, step, name)

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
        self._undo()
        if getattr(self._optimizer, "_initlab_clipper", None) is self:
            del self._optimizer._initlab_clipper

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(closure is not None for closure in (*args[1:2], kwargs.get("closure"))):
            raise RuntimeError(
                "GradClipper clips before step() runs, and a closure computes the gradients inside it; "
                "call initlab.clip_grad_norm_ in the closure, after backward(), and remove() the GradClipper"
            )
        self._undo()
        measured = self._measure()
        if measured is None:
            return
        self._record(measured)
        self._apply(measured, self._decide(measured))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._undo()

    def _measure(self) -> _Measurement | None:
        """Read the gradients. None where there is nothing to do: no gradient, and no other stage that may have one."""
        gradients = gradients_of(self._parameters())
        if not gradients.tensors and self._pp_mesh_dim is None:
            return None
        classified = classify(gradients.tensors)
        if classified.has_wrapper_subclass:
            raise NotImplementedError("GradClipper takes no gradients that wrap other tensors, except DTensors")
        # A GradScaler leaves its scale here where gradients are still scaled, and always what it has found.
        scale, found_inf = (_as_0d(getattr(self._optimizer, name, None)) for name in ("grad_scale", "found_inf"))
        mesh_tensors = mesh_tensors_of(gradients, classified, self._pp_mesh_dim)
        total = mesh_tensors.norm(self.norm_type)
        if scale is not None:
            norm64 = total.norm64 / scale.to(total.norm64.device)
            total = total._replace(norm64=norm64, norm=norm64.to(total.norm.dtype))
        assert total.flag is not None
        coefficient = clip_coefficient(total.norm64, self.max_norm)
        return _Measurement(gradients, mesh_tensors, total, total.flag != 0, coefficient, scale, found_inf)

    def _record(self, measured: _Measurement) -> None:
        """The report of this step, and the counts, which stay on the device."""
        self.report = report_of(measured.total, measured.gradients.labels())
        bad, index = measured.nonfinite, self.report.first_nonfinite_index
        clipped = ~bad & (measured.coefficient < 1.0)
        counts = self._counts.to(bad.device, non_blocking=True)
        is_first = bad & (counts[2] < 0)
        step, parameter = torch.where(is_first, self._steps, counts[2]), torch.where(is_first, index, counts[3])
        self._counts = torch.stack([counts[0] + clipped, counts[1] + bad, step, parameter])
        self._steps += 1

    def _decide(self, measured: _Measurement) -> _Decision:
        """What happens in this step. Nothing has been changed so far; under "raise" this is where it ends."""
        bad, found_inf = measured.nonfinite, measured.found_inf
        policy = self.nonfinite
        if policy == "raise" and found_inf is not None:
            policy = "skip"  # the scaler sees to infs
        if policy == "raise" and bool(bad):
            total, mesh_tensors = measured.total, measured.mesh_tensors
            raise nonfinite_error(total, total.norm.dtype, mesh_tensors, measured.gradients, self.norm_type)
        fused = _is_fused(self._optimizer)
        skip = bad if policy == "skip" else None
        if fused and found_inf is not None:  # the scaler, or we, or both
            skip = bad | (found_inf.to(bad.device) != 0)
        skips_by_itself = fused and not _starts_dampened_momentum(self._optimizer)
        return _Decision(
            fused=fused,
            skip=skip,
            hide=skip is not None and not skips_by_itself and bool(skip),
            zero=policy == "zero",
            norm=measured.total.norm64 if policy == "propagate" else torch.where(bad, math.nan, measured.total.norm64),
            coefficient=measured.coefficient if policy == "propagate" else torch.where(bad, 1.0, measured.coefficient),
        )

    def _apply(self, measured: _Measurement, decision: _Decision) -> None:
        """Carry a decision out: in the gradients, or by what a fused optimizer reads in its step."""
        mesh_tensors, max_norm = measured.mesh_tensors, self.max_norm
        if decision.hide:
            self._hide_gradients()
        if not decision.fused:
            if not decision.hide:
                how = "zero" if decision.zero else "propagate" if decision.skip is None else "skip"
                mesh_tensors.clip_(decision.norm, max_norm, nonfinite=how)
            return
        if decision.zero:
            mesh_tensors.clip_(decision.norm, math.inf, nonfinite="zero")
        if decision.skip is not None and not decision.hide:
            _make_momentum_buffers(self._optimizer)
        # Both 0-d: vectors of one element do not go with DTensors.
        scale = 1.0 if measured.scale is None else measured.scale.to(decision.coefficient.device)
        grad_scale = (scale / decision.coefficient).to(torch.float32)
        found_inf = None if decision.skip is None else decision.skip.to(torch.float32)
        self._set = () if measured.found_inf is not None else (grad_scale, found_inf)
        self._optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]

    def _parameters(self) -> LabelledTensors:
        """The optimizer's parameters, and their names as far as they are known. Made anew only where they changed."""
        parameters: list[Tensor] = [p for group in self._optimizer.param_groups for p in group["params"]]
        known = self._known.passed
        if len(parameters) == len(known) and all(map(operator.is_, parameters, known)):
            return self._known
        names = []
        for number, group in enumerate(self._optimizer.param_groups):
            own = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = own[i] if own is not None else f"parameter {i} of group {number}, of shape {tuple(p.shape)}"
                names.append(self._names.get(id(p), name))
        self._known = LabelledTensors(parameters, range(len(parameters)), parameters, names)
        return self._known

    def _hide_gradients(self) -> None:
        """Take the gradients away until step() is over: an optimizer passes over parameters that have none."""
        self._hidden = [(p, p.grad) for p in self._parameters().passed if p.grad is not None]
        for p, _ in self._hidden:
            p.grad = None

    def _undo(self) -> None:
        """Undo what one step needed, also where an earlier one raised."""
        for p, gradient in self._hidden:
            p.grad = gradient
        self._hidden = []
        for name, tensor in zip(("grad_scale", "found_inf"), self._set, strict=False):
            if hasattr(self._optimizer, name) and getattr(self._optimizer, name) is tensor:
                delattr(self._optimizer, name)
        self._set = ()


class _Measurement(NamedTuple):
    """The gradients of one step, before anything is decided or changed. Tensors are 0-d, on the gradients' device.

    Attributes:
        gradients: those that there are, and the parameters' names.
        mesh_tensors: the same, prepared for scaling.
        total: the norm, without a GradScaler's scale.
        nonfinite: bool: whether a gradient holds NaN or inf, on any rank.
        coefficient: what clips them: min(1, max_norm / norm).
        scale: of a GradScaler, by which gradients are still multiplied; None if they are not.
        found_inf: of a GradScaler, not 0 where it skips the step; None without a GradScaler.
    """

    gradients: LabelledTensors
    mesh_tensors: MeshTensors
    total: Norm
    nonfinite: Tensor
    coefficient: Tensor
    scale: Tensor | None
    found_inf: Tensor | None


class _Decision(NamedTuple):
    """What happens to the gradients of one step. Tensors are 0-d, on the gradients' device.

    Attributes:
        fused: the optimizer multiplies by the coefficient and skips by itself, in its own pass; else gradients are
            scaled in place, and skipping means hiding them.
        skip: bool: whether the step changes nothing at all; None where no step is skipped, whatever gradients hold.
        hide: whether the step is skipped by taking all gradients away while it runs, since the optimizer cannot.
        zero: whether all gradients become zero if one is non-finite.
        norm: what gradients in place are scaled by; NaN where one is non-finite, but for "propagate".
        coefficient: what a fused optimizer multiplies gradients by; 1 where one is non-finite, but for "propagate".
    """

    fused: bool
    skip: Tensor | None
    hide: bool
    zero: bool
    norm: Tensor
    coefficient: Tensor


def _as_0d(tensor: Tensor | None) -> Tensor | None:
    """A number of a GradScaler's, 0-d: a DTensor where gradients are, one element of ShardedGradScaler's."""
    if tensor is None:
        return None
    plain: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return plain.reshape(())


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every group's step takes grad_scale and found_inf."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def _without_momentum_buffer(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[Tensor]:
    """Parameters of a group for which SGD makes momentum buffers in its next step."""
    if group.get("momentum", 0) == 0 or "dampening" not in group:
        return []
    state = optimizer.state
    return [p for p in group["params"] if p.grad is not None and state.get(p, {}).get("momentum_buffer") is None]


def _starts_dampened_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether SGD makes momentum buffers in its next step, and leaves its dampening out of that step.

    A fused SGD makes buffers without values, and leaves them so in a step that found_inf skips. Zeros would be right
    there, but not in a step that is not skipped: dampening would apply to it.
    """
    groups = (group for group in optimizer.param_groups if group.get("dampening", 0) != 0)
    return any(_without_momentum_buffer(optimizer, group) for group in groups)


def _make_momentum_buffers(optimizer: torch.optim.Optimizer) -> None:
    """Make SGD's momentum buffers before its first step, as zeros: see `_starts_dampened_momentum`.

    Without dampening they give the step that torch takes: 0 * momentum + gradient.
    """
    for group in optimizer.param_groups:
        if group.get("dampening", 0) == 0:
            for p in _without_momentum_buffer(optimizer, group):
                assert p.grad is not None
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
