"""Small collectives: numbers reduced or gathered over mesh dimensions, objects gathered over process groups.

All ranks must make the same calls with tensors placed the same way, as for every collective; ranks of other meshes,
such as other pipeline stages, need not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .groups import MeshDim


def all_reduce(
    numbers: Tensor, reduce_over: Sequence[frozenset[int]], mesh_dims: Sequence[MeshDim], op: str = "sum"
) -> Tensor:
    """Reduce each number over mesh dimensions of its own. One all-reduce for each dimension that any number needs.

    Args:
        numbers: of this rank, 1-D, on any device.
        reduce_over: for each number the indices of its dimensions in `mesh_dims`.
        mesh_dims: from MeshDims, in the same order on every rank.
        op: "sum", "min" or "max".

    Returns:
        A new tensor like `numbers`, the same on all ranks of a number's dimensions.
    """
    # An index would have to be copied to the device, which waits for it.
    return torch.cat(all_reduce_parts(numbers.split(1), reduce_over, mesh_dims, op))


def all_reduce_parts(
    parts: Sequence[Tensor], reduce_over: Sequence[frozenset[int]], mesh_dims: Sequence[MeshDim], op: str = "sum"
) -> list[Tensor]:
    """Reduce the numbers of each part over mesh dimensions of that part; as `all_reduce`, with as many collectives.

    Args:
        parts: of this rank, 1-D, on one device; parts and their lengths are those of the other ranks.
        reduce_over: for each part the indices of its dimensions in `mesh_dims`.
        mesh_dims: from MeshDims, in the same order on every rank.
        op: "sum", "min" or "max".

    Returns:
        New tensors like the parts; a part that is reduced over no dimension as it is.
    """
    results = list(parts)
    for i, mesh_dim in enumerate(mesh_dims):
        taking_part = [k for k, indices in enumerate(reduce_over) if i in indices]
        if not taking_part:
            continue
        packed = torch.cat([results[k] for k in taking_part]).to(mesh_dim.device)
        torch.distributed.all_reduce(packed, _OPS[op](), group=mesh_dim.group)
        reduced = packed.to(parts[0].device).split([len(parts[k]) for k in taking_part])
        for k, part in zip(taking_part, reduced, strict=True):
            results[k] = part
    return results


_OPS = {
    "sum": lambda: torch.distributed.ReduceOp.SUM,
    "min": lambda: torch.distributed.ReduceOp.MIN,
    "max": lambda: torch.distributed.ReduceOp.MAX,
}


def all_mesh_dims(mesh_dims: Sequence[MeshDim]) -> frozenset[int]:
    """The indices of all mesh dimensions, for `all_reduce`."""
    return frozenset(range(len(mesh_dims)))


def all_gather(numbers: Tensor, mesh_dim: MeshDim) -> Tensor:
    """Numbers of all ranks of a mesh dimension, a row for each in the order of its ranks. One all-gather.

    Args:
        numbers: of this rank, 1-D, on any device; as many on every rank.
        mesh_dim: the mesh dimension.

    Returns:
        (ranks, numbers), on the device of `numbers`.
    """
    row = numbers.to(mesh_dim.device)
    rows = row.new_empty(len(mesh_dim.ranks), len(row))
    torch.distributed.all_gather(list(rows.unbind()), row, group=mesh_dim.group)
    return rows.to(numbers.device)


def all_gather_object(obj: Any, groups: Iterable[Any]) -> dict[int, Any]:
    """The objects of all ranks by global rank, in order; the same on all of them. One gather for each group.

    Args:
        obj: of this rank, small and picklable.
        groups: from `groups_of`, the same on every rank that takes part.

    Example:
        >>> import torch.distributed as dist
        >>> from initlab.distributed.collectives import all_gather_object
        >>> from initlab.distributed.groups import groups_of
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> all_gather_object("hello", groups_of(True))
        {0: 'hello'}
        >>> dist.destroy_process_group()
    """
    by_rank = {torch.distributed.get_rank(): obj}
    for group in groups:
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, by_rank, group=group)
        by_rank = {rank: one for some in gathered for rank, one in some.items()}
    return dict(sorted(by_rank.items()))


def listed(ranks: Iterable[int]) -> str:
    """Ranks as text.

    Example:
        >>> from initlab.distributed.collectives import listed
        >>> listed([5, 0, 2, 3, 4])
        '0, 2-5'
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
