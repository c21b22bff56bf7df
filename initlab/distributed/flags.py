"""Non-finite flags of several ranks, or-ed on request: until then each rank has the flags of what it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from initlab.kernels import NAN, NEGATIVE_INF, POSITIVE_INF

from .collectives import all_mesh_dims, all_reduce_parts
from .groups import mesh_dims_of


def all_reduce_flags_(flags: Tensor, across: Any = True) -> Tensor:
    """Or the flags of all ranks into each rank's. One all-reduce for each dimension of the mesh; nothing else waits.

    NCCL cannot or bits, so each of the three is reduced by its maximum, as a number of its own.

    Args:
        flags: int32, any shape, the same on every rank: LinearReLU.flags, or torch.stack of many to reduce them at
            once. Changed in place.
        across: a DeviceMesh or a ProcessGroup that this rank is part of; True for all ranks.

    Returns:
        flags.

    Raises:
        TypeError: if flags is not int32, or across is something else.
        ValueError: if this rank is no part of it.
        RuntimeError: if torch.distributed is not initialised.

    Example:
        >>> import torch, initlab
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> initlab.all_reduce_flags_(torch.tensor([4], dtype=torch.int32))
        tensor([4], dtype=torch.int32)
        >>> dist.destroy_process_group()
    """
    if flags.dtype != torch.int32:
        raise TypeError(f"flags is {flags.dtype}; flags are int32, as linear_relu and add_flag_ take them")
    mesh_dims = mesh_dims_of(across, "across")
    bits = torch.tensor([NAN, POSITIVE_INF, NEGATIVE_INF], dtype=torch.int32).to(flags.device, non_blocking=True)
    parts = [(flags.reshape(-1, 1) & bits).flatten()]
    (reduced,) = all_reduce_parts(parts, [all_mesh_dims(mesh_dims)], mesh_dims, "max")
    return flags.bitwise_or_(reduced.view(-1, len(bits)).sum(1, dtype=torch.int32).view(flags.shape))
