"""What GradClipper needs to know of an optimizer: where its step takes hooks, who can skip a step, and how.

A fused optimizer of torch skips a step by itself, on the device. From others the gradients are hidden while the step
runs, and what that step changes nevertheless (counters, averages of rates) is put back.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._contents import CONTAINERS, Contents, restore_dict

# Their fused steps multiply by grad_scale and obey found_inf. An optimizer of another class may say that it does, or
# change something else in its step.
_SKIP_ON_DEVICE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
_INNER = ("optimizer", "_optimizer", "optim")  # where wrappers keep the optimizer whose step() they call
# Packages whose optimizers, but for those below, pass over parameters without a gradient: tried one by one.
_PASS_OVER = ("torch", "schedulefree", "pytorch_optimizer")
# Of pytorch_optimizer, and not told from the others by anything but their names. These raise in a step in which no
# parameter has a gradient; and this one adds noise to the weights before it calls its closure.
_RAISE_WITHOUT_GRADIENTS = ("Adai", "AdamS", "Ranger21")
_MOVE_BEFORE_THE_CLOSURE = ("BSAM",)
_COPIED = 1 << 12  # elements: up to here a tensor is copied, to be put back


def hooked_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, or the one inside a wrapper such as accelerate's or Lightning's, whose step() runs hooks.

    Raises:
        TypeError: where there is none.
        NotImplementedError: for DeepSpeed's ZeRO.
    """
    found = optimizer
    for _ in range(8):  # wrappers of wrappers; an object may also answer any name with itself
        if found is None:
            break
        if any(cls.__module__.partition(".")[0] == "deepspeed" for cls in type(found).__mro__):
            raise NotImplementedError(
                f"{type(found).__name__} is an optimizer of DeepSpeed's ZeRO, of whose gradients each rank holds a "
                'part, so norms would differ from rank to rank; set "gradient_clipping" in the DeepSpeed config'
            )
        runs_hooks = getattr(getattr(type(found), "step", None), "hooked", False)
        if runs_hooks and "_optimizer_step_pre_hooks" in vars(found):
            return found
        attributes = vars(found) if hasattr(found, "__dict__") else {}
        found = next((attributes[name] for name in _INNER if attributes.get(name) is not None), None)
    raise TypeError(
        f"{type(optimizer).__name__} is no torch.optim.Optimizer whose step() runs hooks, nor a wrapper of one under "
        f"the attribute {', '.join(_INNER)}; call initlab.clip_grad_norm_(parameters, max_norm) before step() instead"
    )


def refuse_partitioned(parameters: Iterable[Tensor]) -> None:
    """Raise a NotImplementedError for parameters of which DeepSpeed's ZeRO holds a part on each rank."""
    for i, p in enumerate(parameters):
        try:
            attributes = p.__dict__  # hasattr of what a tensor has not takes five times as long
        except AttributeError:  # as torch says it, which asks for the gradient
            raise AttributeError(
                f"{type(p).__name__!r} object has no attribute 'grad'; item {i} must be a parameter, or a "
                "(name, parameter) pair, as model.parameters() and model.named_parameters() give them"
            ) from None
        if attributes and ("ds_id" in attributes or "ds_tensor" in attributes):
            raise NotImplementedError(
                f"parameter {i} of shape {tuple(p.shape)} is partitioned by DeepSpeed's ZeRO (it has ds_id), so each "
                'rank would see the norm of its own part; set "gradient_clipping" in the DeepSpeed config'
            )


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every group's step takes grad_scale and found_inf, and changes nothing where found_inf says so."""
    step = inspect.unwrap(type(optimizer).step)
    return any(isinstance(optimizer, cls) and step is inspect.unwrap(cls.step) for cls in _SKIP_ON_DEVICE) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def waits_for_unscale(scaler: torch.amp.GradScaler | None, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Whether a GradScaler has yet to unscale the gradients of one of these optimizers."""
    if scaler is None or not scaler.is_enabled():
        return False
    states = scaler._per_optimizer_states
    return any(states[id(one)]["stage"].name == "READY" for one in optimizers)


def starts_dampened_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether SGD makes momentum buffers in its next step, and leaves its dampening out of that step.

    A fused SGD makes buffers without values, and leaves them so in a step that found_inf skips. Zeros would be right
    there, but not in a step that is not skipped: dampening would apply to it.
    """
    groups = (group for group in optimizer.param_groups if group.get("dampening", 0) != 0)
    return any(_without_momentum_buffer(optimizer, group) for group in groups)


def make_momentum_buffers(optimizer: torch.optim.Optimizer) -> None:
    """Make SGD's momentum buffers before its first step, as zeros: see `starts_dampened_momentum`.

    Without dampening they give the step that torch takes: 0 * momentum + gradient.
    """
    for group in optimizer.param_groups:
        if group.get("dampening", 0) == 0:
            for p in _without_momentum_buffer(optimizer, group):
                assert p.grad is not None
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)


def _without_momentum_buffer(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[Tensor]:
    """Parameters of a group for which SGD makes momentum buffers in its next step."""
    if group.get("momentum", 0) == 0 or "dampening" not in group:
        return []
    state = optimizer.state
    return [p for p in group["params"] if p.grad is not None and state.get(p, {}).get("momentum_buffer") is None]


def versions_of(optimizer: torch.optim.Optimizer) -> list[int]:
    """The version counters of its parameters, which tell whether it has written them."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p._version for p in parameters if not p.is_inference()]


class SkippedStep:
    """A step that is to change nothing, though the optimizer takes it.

    What is known to pass over parameters without a gradient sees none meanwhile. Others see zeros: they may do anything
    without gradients, so everything that they hold is copied before. What a step changes nevertheless is put back:
    state, groups and attributes, also those of optimizers inside it.

    Args:
        optimizer: whose step it is.
        before: everything that it held before the step, for one that has run its closure already, perhaps several
            times. Then it sees its gradients, which its line search may expect, and everything is put back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, before: OptimizerCopy | None = None) -> None:
        self._parameters: list[Tensor] = []
        self._sees_zeros = not _passes_over_missing_gradients(optimizer)
        if before is None:
            before = OptimizerCopy(optimizer, everything=self._sees_zeros or changes_more(optimizer))
            self._parameters += {id(p): p for group in optimizer.param_groups for p in group["params"]}.values()
        self._before = before
        self._hidden: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.hide()

    def hide(self) -> None:
        """Take away the gradients that there are."""
        for p in self._parameters:
            if p.grad is not None:
                shown = torch.zeros_like(p.grad) if self._sees_zeros else None
                self._hidden.append((p, p.grad, shown))
                p.grad = shown

    def show(self) -> None:
        """Put them back, where there are no others by now."""
        for p, gradient, shown in self._hidden:
            if p.grad is shown:
                p.grad = gradient
        self._hidden = []

    def end(self) -> None:
        """The step is over: put everything back.

        Raises:
            RuntimeError: if an optimizer that was to pass over its parameters has changed large tensors.
        """
        self.show()
        self._before.restore()


class OptimizerCopy:
    """What an optimizer holds: state, groups and attributes, in containers of any depth, to be put back as it was.

    Large tensors are copied only if everything is asked for: an optimizer that sees no gradient leaves its parameters
    and moments alone. That it has is checked by their version counters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, everything: bool = False) -> None:
        self._name, self._everything = type(optimizer).__name__, everything
        self._owners: list[tuple[torch.optim.Optimizer, dict[str, Any]]] = []
        self._containers: list[Contents] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []
        self._seen: set[int] = set()
        self._keep(optimizer)

    @torch.no_grad()
    def restore(self) -> None:
        """Make everything what it was. A RuntimeError tells of a tensor that was changed and not copied."""
        for owner, attributes in self._owners:
            others = {name: value for name, value in vars(owner).items() if not _is_its_own(name)}
            restore_dict(vars(owner), attributes | others)
        for container in self._containers:
            container.restore()
        for array, values in self._arrays:
            array[...] = values
        changed = []
        for tensor, version, copy in self._tensors:
            if copy is not None and (self._everything or tensor._version != version):
                tensor.copy_(copy)
            elif tensor._version != version:
                changed.append(tensor)
        if changed:
            raise RuntimeError(
                f"{self._name} changed {len(changed)} of its tensors, the first of shape {tuple(changed[0].shape)}, in "
                "a step that was to be skipped, though it saw no gradient; use nonfinite='zero' or 'raise' with it"
            )

    def _keep(self, value: Any) -> None:
        """Keep what a value holds: tensors, arrays, containers, optimizers, schedulers and plain records of values.

        Other objects are kept as they are: they may hold anything, as a model or a logger.
        """
        if isinstance(value, (SimpleNamespace, torch.optim.lr_scheduler.LRScheduler)) or dataclasses.is_dataclass(
            value
        ):
            value = getattr(value, "__dict__", None)
        if isinstance(value, np.ndarray) and value.flags.writeable and id(value) not in self._seen:
            self._seen.add(id(value))
            self._arrays.append((value, value.copy()))
        if not isinstance(value, (Tensor, torch.optim.Optimizer, tuple, *CONTAINERS)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_inference() and not value.is_meta:
                copied = self._everything or value.numel() <= _COPIED
                self._tensors.append((value, value._version, value.detach().clone() if copied else None))
            return
        if isinstance(value, torch.optim.Optimizer):
            attributes = {name: one for name, one in vars(value).items() if _is_its_own(name)}
            self._owners.append((value, attributes))
            inner: Iterable[Any] = attributes.values()
        else:
            if not isinstance(value, tuple):
                self._containers.append(Contents(value))
            inner = [*value, *value.values()] if isinstance(value, dict) else list(value)
        for one in inner:
            self._keep(one)


def changes_more(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step changes parameters without gradients, or runs the closure again after it has moved them.

    LBFGS does, and optimizers that hold another one: SAM, Lookahead.
    """
    inner = any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values())
    return inner or isinstance(optimizer, torch.optim.LBFGS) or _is_called(optimizer, _MOVE_BEFORE_THE_CLOSURE)


def _passes_over_missing_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step leaves parameters without a gradient alone, and their moments."""
    package = inspect.unwrap(type(optimizer).step).__module__.partition(".")[0]
    return package in _PASS_OVER and not _is_called(optimizer, _RAISE_WITHOUT_GRADIENTS)


def _is_called(optimizer: torch.optim.Optimizer, names: tuple[str, ...]) -> bool:
    classes = [cls for cls in type(optimizer).__mro__ if cls.__module__.partition(".")[0] == "pytorch_optimizer"]
    return any(cls.__name__ in names for cls in classes)


def _is_its_own(name: str) -> bool:
    """Whether an attribute is the optimizer's, and no hook's or ours: those may come and go in a step."""
    return not name.startswith(("_optimizer_", "_initlab_"))
