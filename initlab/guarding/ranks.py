"""Ranks that must act alike: which they are, and one flag for all."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.dtensors import is_dtensor

_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
)


def ranks_of(model: nn.Module, across: Any) -> Any:
    """The ranks that step together, as `initlab.diagnose` takes them: those of DDP, or of the largest mesh.

    Args:
        model: in its wrappers.
        across: what the caller says: a ProcessGroup, a DeviceMesh, True, False for none, or None.

    Raises:
        ValueError: if there are other ranks, and neither the model nor the caller says which of them step with it.
    """
    dist = torch.distributed
    if across is not None:
        return across or None
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    wrappers = tuple(getattr(sys.modules[module], name) for module, name in _WRAPPERS if module in sys.modules)
    for module in model.modules():
        if isinstance(module, wrappers):
            return module.process_group
    meshes = [p.device_mesh for p in model.parameters() if is_dtensor(p)]  # type: ignore[attr-defined]
    if meshes:
        return max(meshes, key=lambda mesh: mesh.size())
    raise ValueError(
        f"there are {dist.get_world_size()} ranks, and the model is in neither DDP nor FSDP, which would say which of "
        "them step together; pass across=True or their ProcessGroup, or across=False where each trains by itself"
    )


def any_rank_(flags: Tensor, groups: tuple[Any, ...]) -> Tensor:
    """The largest of each flag over all ranks, in place. One all-reduce for each group."""
    for group in groups:
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=group)
    return flags
