"""The groups of ranks that collectives run over: dimensions of DTensors' meshes, and groups that callers pass."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MeshDim(NamedTuple):
    """One dimension of a mesh, or a process group, with more than one rank."""

    group: Any  # torch.distributed.ProcessGroup
    ranks: tuple[int, ...]  # global, in the group's order
    device: torch.device  # on which its collectives run

    @classmethod
    def of_mesh(cls, mesh: Any, dim: int) -> MeshDim:
        """A dimension of a DeviceMesh."""
        group = mesh.get_group(dim)
        return cls(group, tuple(torch.distributed.get_process_group_ranks(group)), _device_of(mesh.device_type))

    @classmethod
    def of_group(cls, group: Any) -> MeshDim:
        """A ProcessGroup: its collectives run on a GPU where that has a backend of its own."""
        backends = dict(pair.split(":") for pair in torch.distributed.get_backend_config(group).split(","))
        own = [
            device_type
            for device_type, backend in backends.items()
            if backend != backends.get("cpu") and torch.get_device_module(device_type).is_available()
        ]
        ranks = tuple(torch.distributed.get_process_group_ranks(group))
        return cls(group, ranks, _device_of(own[0] if own else "cpu"))


class MeshDims:
    """Every mesh dimension on which some of the tensors lie, once, in the order in which the tensors first name it.

    Dimensions of different meshes with the same ranks are one.

    Args:
        tensors: DTensors; None in the place of a tensor that is on no mesh.

    Attributes:
        dims: the mesh dimensions.
        sharded: for each tensor, the indices in `dims` of those that shard it: ranks along them hold different
            elements. Along the others they hold copies, or where it is Partial terms of the same sums.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        >>> from initlab.distributed.groups import MeshDims
        >>> dist.init_process_group("fake", rank=1, world_size=4)  # no network: collectives do nothing
        >>> mesh = dist.init_device_mesh("cpu", (2, 2))
        >>> weight = distribute_tensor(torch.ones(6, 5), mesh, [Replicate(), Shard(0)])
        >>> mesh_dims = MeshDims([weight, None])
        >>> [mesh_dim.ranks for mesh_dim in mesh_dims.dims], mesh_dims.sharded
        ([(1, 3), (0, 1)], [frozenset({1}), frozenset()])
        >>> dist.destroy_process_group()
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self.dims: list[MeshDim] = []
        self.sharded: list[frozenset[int]] = []
        self._index_by_ranks: dict[tuple[int, ...], int] = {}
        indices_by_mesh: dict[Any, list[int]] = {}
        sharded_by_layout: dict[Hashable, frozenset[int]] = {}
        for tensor in tensors:
            if tensor is None:
                self.sharded.append(frozenset())
                continue
            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            layout = mesh, placements
            if layout not in sharded_by_layout:
                indices = indices_by_mesh.get(mesh)
                if indices is None:
                    indices = indices_by_mesh[mesh] = self._indices(mesh)
                sharded_by_layout[layout] = frozenset(
                    index
                    for index, placement in zip(indices, placements, strict=False)
                    if index >= 0 and not placement.is_replicate() and not placement.is_partial()
                )
            self.sharded.append(sharded_by_layout[layout])

    def _indices(self, mesh: Any) -> list[int]:
        """For each dimension of a mesh its index in `dims`, -1 where there is one rank only."""
        if mesh.get_coordinate() is None:
            return []  # this rank holds nothing of it
        return [-1 if mesh.size(dim) == 1 else self._index(MeshDim.of_mesh(mesh, dim)) for dim in range(mesh.ndim)]

    def _index(self, mesh_dim: MeshDim) -> int:
        if mesh_dim.ranks not in self._index_by_ranks:
            self._index_by_ranks[mesh_dim.ranks] = len(self.dims)
            self.dims.append(mesh_dim)
        return self._index_by_ranks[mesh_dim.ranks]


def _device_of(device_type: str) -> torch.device:
    """The device of that type which this process works on."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def pp_mesh_dim_of(pp_group: Any) -> MeshDim | None:
    """The pipeline stages that a caller passes as pp_group. None if they are one rank alone, or nothing was passed.

    Args:
        pp_group: a ProcessGroup, a DeviceMesh with one dimension, or None.

    Raises:
        ValueError: if it is something else, or this rank does not belong to it.

    Example:
        >>> import torch.distributed as dist
        >>> from initlab.distributed.groups import pp_mesh_dim_of
        >>> dist.init_process_group("fake", rank=1, world_size=4)  # no network: collectives do nothing
        >>> mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        >>> pp_mesh_dim_of(mesh["pp"]).ranks, pp_mesh_dim_of(dist.group.WORLD).ranks
        ((1, 3), (0, 1, 2, 3))
        >>> dist.destroy_process_group()
    """
    if pp_group is None:
        return None
    if isinstance(pp_group, torch.distributed.ProcessGroup):
        mesh_dim = MeshDim.of_group(pp_group)
    elif getattr(pp_group, "ndim", None) == 1 and hasattr(pp_group, "get_group"):
        if pp_group.get_coordinate() is None:
            raise ValueError(
                f"pp_group is {pp_group}, to which this rank does not belong; pass the group of its own stages"
            )
        mesh_dim = MeshDim.of_mesh(pp_group, 0)
    else:
        raise ValueError(
            f"pp_group is {pp_group!r}; it must be a ProcessGroup to which this rank belongs, or a DeviceMesh with one "
            "dimension, as mesh['pp'] is"
        )
    return mesh_dim if len(mesh_dim.ranks) > 1 else None


def groups_of(across: Any, name: str = "across") -> tuple[Any, ...]:
    """The process groups to gather over, one after the other, so that each rank has the objects of all `across`.

    Args:
        across: a ProcessGroup; a DeviceMesh; True for the default group; None or False for no group.
        name: of the caller's argument, for messages.

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
            f"{name} asks other ranks, but torch.distributed is not initialised: call init_process_group first, or "
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
        raise TypeError(f"{name} is {across!r}; it must be a ProcessGroup, a DeviceMesh, True for all ranks, or None")
    if across.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is no part of {across}; only its ranks gather")
    if across.size() == dist.get_world_size():
        return (dist.group.WORLD,)
    return tuple(across.get_group(dim) for dim in range(across.ndim))


def mesh_dims_of(across: Any, name: str) -> list[MeshDim]:
    """What `groups_of` returns, as MeshDims; groups of one rank are left out."""
    return [MeshDim.of_group(group) for group in groups_of(across, name) if group.size() > 1]
