"""One step of an optimizer, from its pre-hook to its post-hook: what GradClipper measures, decides and lends to it."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from initlab.kernels import Norm

from ..distributed.dtensors import is_dtensor
from ..distributed.norm import MeshTensors
from .functional import LabelledTensors
from .optimizers import OptimizerCopy, SkippedStep
from .spikes import SpikeStep

_RUNS_HOOKS = torch.optim.Optimizer.profile_hook_step.__code__.co_filename


class Step:
    """One step of one optimizer, from its pre-hook to its post-hook.

    Attributes:
        optimizer: whose step it is.
        before: what the optimizer held, where its closure may run several times.
        skipped: how it is kept from changing anything; None while it may.
        versions: of its parameters before it, where it may leave out its closure.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.before: OptimizerCopy | None = None
        self.skipped: SkippedStep | None = None
        self.versions: list[int] | None = None
        self._given: dict[str, Tensor | None] = {}  # grad_scale and found_inf, where no GradScaler had set them

    def give_scale(self, grad_scale: Tensor, found_inf: Tensor | None) -> None:
        """What a fused optimizer divides its gradients by, and whether it does nothing."""
        given = {"grad_scale": grad_scale, "found_inf": found_inf}
        if getattr(self.optimizer, "found_inf", None) is None:
            self._given = given
        vars(self.optimizer).update(given)

    def take_back_scale(self) -> None:
        """Remove it, unless a GradScaler does."""
        attributes = vars(self.optimizer)
        for name, tensor in self._given.items():
            if name in attributes and attributes[name] is tensor:
                del attributes[name]
        self._given = {}


def runs_inside_another(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook runs for a step inside another one of the same optimizer.

    That of a subclass whose step() calls super().step(): torch runs the hooks for each. Asked of the stack, which an
    exception cannot leave in the wrong state. What torch.compile makes of a function after a graph break has another
    name.
    """
    found, frame = 0, inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == _RUNS_HOOKS and frame.f_code.co_name == "wrapper":
            found += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found > 1


class Measurement(NamedTuple):
    """The gradients of one step, before anything is decided or changed. Tensors are 0-d, on the gradients' device.

    Attributes:
        gradients: those that there are, and the parameters' names.
        mesh_tensors: the same, prepared for scaling.
        total: the norm, without a GradScaler's scale.
        nonfinite: bool: whether a gradient holds NaN or inf, on any rank.
        coefficient: what clips them: min(1, max_norm / norm), or less for a spike.
        spike: what the policy for spikes says; None without one.
        scale: of a GradScaler, by which gradients are still multiplied; None if they are not.
    """

    gradients: LabelledTensors
    mesh_tensors: MeshTensors
    total: Norm
    nonfinite: Tensor
    coefficient: Tensor
    spike: SpikeStep | None
    scale: Tensor | None


class Decision(NamedTuple):
    """What happens to the gradients of one step. Tensors are 0-d, on the gradients' device.

    Attributes:
        on_device: the optimizer multiplies by the coefficient and skips by itself, in its own pass; else gradients are
            scaled in place, and skipping means hiding them.
        skip: bool: whether the step changes nothing at all; None where no step is skipped, whatever gradients hold.
        hide: whether the step is skipped by taking all gradients away while it runs, since the optimizer cannot.
        zero: whether all gradients become zero if one is non-finite.
        coefficient: what gradients are multiplied by; 1 where one is non-finite, but for "propagate".
    """

    on_device: bool
    skip: Tensor | None
    hide: bool
    zero: bool
    coefficient: Tensor


class Round(NamedTuple):
    """One measurement that several optimizers go by.

    Attributes:
        measured: over all of them.
        marks: their gradients then.
        stepped: the optimizers that have stepped, with their gradients afterwards.
    """

    measured: Measurement
    marks: dict[torch.optim.Optimizer, GradientMarks]
    stepped: dict[torch.optim.Optimizer, GradientMarks]


def as_0d(tensor: Tensor | None) -> Tensor | None:
    """A number of a GradScaler's, 0-d: a DTensor where gradients are, one element of ShardedGradScaler's."""
    if tensor is None:
        return None
    plain: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return plain.reshape(())


class GradientMarks:
    """An optimizer's gradients at one moment, to tell later whether they are the same. Keeps none of them alive."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self._marks = {key: self._mark(p) for key, p in self._parameters.items() if p.grad is not None}

    def are_some(self) -> bool:
        """Whether there were gradients."""
        return bool(self._marks)

    def hold(self) -> bool:
        """Whether gradients are the same tensors as then, and nothing has been written to them. None are none."""
        now = {key: p.grad for key, p in self._parameters.items() if p.grad is not None}
        return now.keys() == self._marks.keys() and all(
            ref() is now[key] and version == _version(now[key]) for key, (ref, version) in self._marks.items()
        )

    @staticmethod
    def _mark(p: Tensor) -> tuple[TensorWeakRef, int]:
        assert p.grad is not None
        return TensorWeakRef(p.grad), _version(p.grad)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which inference tensors do not have
