"""What a step needs to run again: its batches, and the buffers and random generators from before each pass.

Weights and moments need no copy: a bad step is left out, so they still are what they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._tree import tensors_in
from ..clipping.report import ClipReport
from ..diagnosis.state import RandomState


class _BufferCopy(NamedTuple):
    """A buffer as it was: the tensor itself, its version then, and a copy of its elements."""

    tensor: Tensor
    version: int
    copy: Tensor


class State:
    """Buffers and random generators at one moment.

    Args:
        buffers: (module, name, copy) of each.
    """

    def __init__(self, buffers: list[tuple[nn.Module, str, _BufferCopy]]) -> None:
        self._buffers = buffers
        self.random = RandomState()

    def restore_buffers(self) -> None:
        """Make the buffers what they were; those that have not changed are not written."""
        with torch.no_grad():
            for module, name, (tensor, version, copy) in self._buffers:
                if module._buffers.get(name) is not tensor:
                    module._buffers[name] = tensor
                if tensor._version != version or _may_change_unseen(tensor):
                    tensor.copy_(copy)

    def buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """The copies: (module, name, elements)."""
        return [(module, name, kept.copy) for module, name, kept in self._buffers]


class StateKeeper:
    """Takes States. A buffer that no pass has changed since the last one is not copied again.

    Args:
        models: whose buffers are kept.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(module for model in models for module in model.modules()))
        self._known: dict[tuple[int, str], _BufferCopy] = {}

    def take(self) -> State:
        """The state now."""
        return State([(module, name, self._copy(number, name, tensor)) for number, module, name, tensor in self._all()])

    def _all(self) -> Iterator[tuple[int, nn.Module, str, Tensor]]:
        for number, module in enumerate(self._modules):
            for name, tensor in module._buffers.items():
                if tensor is not None and not is_lazy(tensor) and not tensor.is_meta and not tensor.is_inference():
                    yield number, module, name, tensor

    def _copy(self, number: int, name: str, tensor: Tensor) -> _BufferCopy:
        known = self._known.get((number, name))
        seen = known is not None and known.tensor is tensor and known.version == tensor._version
        if known is None or not seen or _may_change_unseen(tensor):
            known = self._known[number, name] = _BufferCopy(tensor, tensor._version, tensor.detach().clone())
        return known

    @contextlib.contextmanager
    def at(self, state: State) -> Iterator[None]:
        """Inside, buffers and random generators are what they were at `state`; afterwards what they are now."""
        now = self.take()
        try:
            state.restore_buffers()
            state.random.restore()
            yield
        finally:
            now.restore_buffers()
            now.random.restore()


def _may_change_unseen(buffer: Tensor) -> bool:
    """Whether an operation of torch's may write to a buffer without counting a version.

    batch_norm does, to its running statistics, which are vectors.
    """
    return buffer.dim() == 1 and buffer.is_floating_point()


class ForwardPass:
    """One pass of a step: a batch, or one of several whose gradients accumulate.

    Attributes:
        batch: what was passed, itself and no copy.
        state: before the pass.
        losses: those noted, detached.
        went_back: whether a backward pass went through one of them, as far as can be seen.
    """

    def __init__(self, batch: Any, state: State) -> None:
        self.batch, self.state = batch, state
        self.losses: list[Tensor] = []
        self.went_back = False
        self._versions = self._versions_now()

    def note_loss(self, loss: Tensor) -> None:
        """Keep a loss, and hear of its backward pass."""
        self.losses.append(loss.detach())
        if loss.requires_grad:
            loss.register_hook(self._goes_back)
        else:
            self.went_back = True  # which an adapter has detached

    def _goes_back(self, gradient: Tensor) -> None:
        self.went_back = True

    def batch_has_changed(self) -> bool:
        """Whether something has written to the batch since."""
        return self._versions != self._versions_now()

    def _versions_now(self) -> list[int]:
        return [tensor._version for tensor in tensors_in(self.batch) if not tensor.is_inference()]


class HostFlags:
    """Flags on their way to the host: nothing waits until they are read.

    Args:
        flags: 1-D, on any device.
    """

    def __init__(self, flags: Tensor) -> None:
        self._event: torch.Event | None = None
        self._flags = flags
        if flags.device.type == "cuda":
            self._flags = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._event = torch.Event(flags.device)
            self._event.record(torch.accelerator.current_stream(flags.device))

    def read(self) -> list[int]:
        """The flags; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._flags.tolist()


class StepRecord(NamedTuple):
    """A step whose flags the host has not read yet.

    Attributes:
        step: its number, from 1.
        passes: whose gradients it took.
        flags: whether a gradient, a loss, or the norm by the policy for spikes, was bad; on any rank.
        report: what the clipper measured.
        scaled: whether a GradScaler had to do with it.
    """

    step: int
    passes: list[ForwardPass]
    flags: HostFlags
    report: ClipReport
    scaled: bool
