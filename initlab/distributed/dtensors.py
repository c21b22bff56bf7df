"""What kind of tensor it is: plain, a DTensor, or another wrapper; and a DTensor's local part.

Nothing here communicates, but that `local` waits for a collective that is still under way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from initlab.kernels import PLAIN, all_plain
from initlab.kernels.torch_internals import is_wrapper


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor.

    Example:
        >>> import torch
        >>> from initlab.distributed.dtensors import is_dtensor
        >>> is_dtensor(torch.ones(2))
        False
    """
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the local tensor of a DTensor, without autograd; any other as it is."""
    return _to_local(tensor) if is_dtensor(tensor) else tensor


def _to_local(dtensor: Any) -> Tensor:
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _to_local(dtensor)
    tensor: Tensor = dtensor.to_local()
    wait = getattr(tensor, "wait", None)  # of a collective that is still under way
    return tensor if wait is None else wait()


class ClassifiedTensors(NamedTuple):
    """Tensors, and what kind each one is. Made by `classify` at the start of a call, and passed on from there.

    Attributes:
        tensors: as they were passed.
        local: for each tensor what this rank holds of it; the same object unless it is a DTensor.
        has_dtensor: whether there is a DTensor among them.
        has_wrapper_subclass: whether one wraps other tensors in a way that we do not read, so that torch's own function
            has to take all of them. That is a wrapper other than DTensor, or under torch.compile any wrapper. Then the
            other attributes say nothing: `local` is `tensors`, and `has_dtensor` is False.
    """

    tensors: Sequence[Tensor]
    local: Sequence[Tensor]
    has_dtensor: bool
    has_wrapper_subclass: bool

    def dtensors(self) -> list[Tensor | None]:
        """For each tensor itself where it is a DTensor, else None."""
        pairs = zip(self.tensors, self.local, strict=True)
        return [None if tensor is mine else tensor for tensor, mine in pairs]


def classify(tensors: Sequence[Tensor]) -> ClassifiedTensors:
    """Ask each tensor once whether it is plain, a DTensor or another wrapper, and what of it lies on this rank.

    Args:
        tensors: any.

    Example:
        >>> import torch
        >>> from initlab.distributed.dtensors import classify
        >>> classify([torch.ones(2)]).has_dtensor
        False
    """
    if all_plain(tensors):
        return ClassifiedTensors(tensors, tensors, False, False)
    if torch.compiler.is_compiling():  # which traces what torch does with wrappers, DTensors included
        return ClassifiedTensors(tensors, tensors, False, any(map(is_wrapper, tensors)))
    kinds = [is_dtensor(t) for t in tensors]
    pairs = list(zip(tensors, kinds, strict=True))
    if any(is_wrapper(t) for t, dtensor in pairs if not dtensor):
        return ClassifiedTensors(tensors, tensors, False, True)
    return ClassifiedTensors(tensors, [_to_local(t) if dtensor else t for t, dtensor in pairs], any(kinds), False)


def settle(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """(a DTensor without pending sums, this rank's part of it); None for other tensors. All ranks call this alike."""
    if not is_dtensor(tensor):
        return None
    dtensor: Any = tensor
    if any(placement.is_partial() for placement in dtensor.placements):
        replicate = sys.modules["torch.distributed.tensor"].Replicate()
        dtensor = dtensor.redistribute(placements=[replicate if p.is_partial() else p for p in dtensor.placements])
    return dtensor, _to_local(dtensor)


def without_elements(tensor: Tensor) -> Tensor:
    """A DTensor on the same mesh, of the same shape, dtype and placements, of which this rank holds nothing."""
    module = sys.modules["torch.distributed.tensor"]
    empty = torch.empty(0, dtype=tensor.dtype, device=_to_local(tensor).device)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    made: Tensor = module.DTensor.from_local(empty, mesh, placements, run_check=False, **shape)
    return made


def count_as_written(tensor: Tensor) -> None:
    """Move the version counter of a DTensor on, whose local tensor has been filled: autograd goes by the DTensor's."""
    if is_dtensor(tensor) and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def placements_text(placements: Iterable[Any]) -> str:
    """Placements as messages show them."""
    return f"({', '.join(map(str, placements))})"
