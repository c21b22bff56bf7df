"""Small collectives over the meshes of DTensors: sums of what ranks hold, and what they do not agree on.

An axis is one dimension of a mesh. All ranks must make the same calls with tensors placed the same way, as for every
collective; ranks of other meshes, such as other pipeline stages, need not.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distributed import is_dtensor


class Axis(NamedTuple):
    """One dimension of a mesh, with more than one rank: those that hold shares, or copies, of the same tensors."""

    group: Any  # torch.distributed.ProcessGroup
    ranks: tuple[int, ...]
    device: torch.device  # on which its collectives run


class Axes:
    """Every axis on which some of the tensors lie, once, in the order in which the tensors first name it.

    Args:
        tensors: DTensors and others, which lie on no axis.

    Attributes:
        axes: the axes.
        sharded: for each tensor, the places in `axes` of those that shard it: ranks along them hold different elements.
            Along the others they hold copies.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        >>> from initlab.collectives import Axes
        >>> dist.init_process_group("fake", rank=1, world_size=4)  # no network: collectives do nothing
        >>> mesh = dist.init_device_mesh("cpu", (2, 2))
        >>> weight = distribute_tensor(torch.ones(6, 5), mesh, [Replicate(), Shard(0)])
        >>> found = Axes([weight, torch.ones(3)])
        >>> [axis.ranks for axis in found.axes], found.sharded
        ([(1, 3), (0, 1)], [frozenset({1}), frozenset()])
        >>> dist.destroy_process_group()
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.axes: list[Axis] = []
        self.sharded: list[frozenset[int]] = []
        self._known: dict[tuple[int, ...], int] = {}  # place of the axis by its ranks
        meshes: dict[Any, list[int]] = {}
        layouts: dict[Hashable, frozenset[int]] = {}
        for tensor in tensors:
            if not is_dtensor(tensor):
                self.sharded.append(frozenset())
                continue
            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            layout = mesh, placements
            if layout not in layouts:
                places = meshes.get(mesh)
                if places is None:
                    places = meshes[mesh] = self._places(mesh)
                sharding = (place for place, p in zip(places, placements, strict=False) if not p.is_replicate())
                layouts[layout] = frozenset(place for place in sharding if place >= 0)
            self.sharded.append(layouts[layout])

    def _places(self, mesh: Any) -> list[int]:
        """For each dimension of a mesh the place of its axis, -1 where there is one rank only."""
        if mesh.get_coordinate() is None:
            return []  # this rank holds nothing of it
        return [
            -1 if mesh.size(dim) == 1 else self._place(mesh.get_group(dim), mesh.device_type)
            for dim in range(mesh.ndim)
        ]

    def _place(self, group: Any, device_type: str) -> int:
        ranks = tuple(torch.distributed.get_process_group_ranks(group))
        if ranks not in self._known:
            self._known[ranks] = len(self.axes)
            self.axes.append(Axis(group, ranks, device_of(device_type)))
        return self._known[ranks]


def device_of(device_type: str) -> torch.device:
    """The device of that type which this process works on."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def group_axis(group: Any) -> Axis:
    """A process group as an axis: its collectives run on a GPU where its backend is one for GPUs alone."""
    types = {device.type for device in group._device_types}
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    return Axis(group, ranks, device_of("cpu" if "cpu" in types else sorted(types)[0]))


def reduced(shares: Tensor, over: Sequence[frozenset[int]], axes: Sequence[Axis], op: str = "sum") -> Tensor:
    """Numbers of this rank, each reduced over its own axes. One all-reduce for each axis that any number needs.

    Args:
        shares: 1-D, on any device.
        over: for each number the places of its axes in `axes`.
        axes: from Axes, in the same order on every rank.
        op: "sum", "min" or "max".

    Returns:
        A new tensor like `shares`; the same numbers on all ranks of a number's axes.
    """
    total = shares.clone()
    for place, axis in enumerate(axes):
        mine = [i for i, places in enumerate(over) if place in places]
        if not mine:
            continue
        index = torch.tensor(mine, device=total.device)
        packed = total[index].to(axis.device)
        torch.distributed.all_reduce(packed, _OPS[op](), group=axis.group)
        total[index] = packed.to(total.device)
    return total


_OPS = {
    "sum": lambda: torch.distributed.ReduceOp.SUM,
    "min": lambda: torch.distributed.ReduceOp.MIN,
    "max": lambda: torch.distributed.ReduceOp.MAX,
}


def everywhere(axes: Sequence[Axis]) -> frozenset[int]:
    """All axes, for `reduced`."""
    return frozenset(range(len(axes)))


def groups_of(across: Any) -> tuple[Any, ...]:
    """The groups over which to gather one after the other, so that a rank has what all ranks of `across` bring.

    Args:
        across: a ProcessGroup; a DeviceMesh; True for the default group; None or False for no group.

    Raises:
        TypeError: if it is something else.
        ValueError: if this rank is no part of it.
        RuntimeError: if torch.distributed is not initialised.
    """
    if across is None or across is False:
        return ()
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "across asks other ranks, but torch.distributed is not initialised: call init_process_group first, or "
            "leave it None"
        )
    if across is True:
        return (dist.group.WORLD,)
    if across is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"rank {dist.get_rank()} is no part of the group; only its members gather")
    if isinstance(across, dist.ProcessGroup):
        return (across,)
    module = sys.modules.get("torch.distributed.device_mesh")
    if module is None or not isinstance(across, module.DeviceMesh):
        raise TypeError(f"across is {across!r}; it must be a ProcessGroup, a DeviceMesh, True for all ranks, or None")
    if across.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is no part of {across}; only its ranks gather")
    if across.size() == dist.get_world_size():
        return (dist.group.WORLD,)
    return tuple(across.get_group(dim) for dim in range(across.ndim))


def gather(mine: Any, groups: Iterable[Any]) -> dict[int, Any]:
    """What every rank brings, by global rank and in their order; the same on all of them. One gather for each group.

    Args:
        mine: small and picklable.
        groups: from `groups_of`, the same on every rank that takes part.

    Example:
        >>> import torch.distributed as dist
        >>> from initlab.collectives import gather, groups_of
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> gather("hello", groups_of(True))
        {0: 'hello'}
        >>> dist.destroy_process_group()
    """
    found = {torch.distributed.get_rank(): mine}
    for group in groups:
        each: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(each, found, group=group)
        found = {rank: one for some in each for rank, one in some.items()}
    return dict(sorted(found.items()))


def listed(ranks: Iterable[int]) -> str:
    """Ranks in words.

    Example:
        >>> from initlab.collectives import listed
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
