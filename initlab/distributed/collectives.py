"""Small collectives over the meshes of DTensors: sums of what ranks hold, and what they do not agree on.

An axis is one dimension of a mesh. All ranks must make the same calls with tensors placed the same way, as for every
collective; ranks of other meshes, such as other pipeline stages, need not.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._console import listing
from .shards import is_dtensor


class MeshDim(NamedTuple):
    """One dimension of a mesh, with more than one rank: those that hold shares, or copies, of the same tensors."""

    group: Any  # torch.distributed.ProcessGroup
    ranks: tuple[int, ...]
    device: torch.device  # on which its collectives run


class MeshDims:
    """Every axis on which some of the tensors lie, once, in the order in which the tensors first name it.

    Args:
        tensors: DTensors and others, which lie on no axis.

    Attributes:
        axes: the axes.
        sharded: for each tensor, the places in `axes` of those that shard it: ranks along them hold different elements.
            Along the others they hold copies, or where it is Partial terms of the same sums.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        >>> from initlab.distributed.collectives import MeshDims
        >>> dist.init_process_group("fake", rank=1, world_size=4)  # no network: collectives do nothing
        >>> mesh = dist.init_device_mesh("cpu", (2, 2))
        >>> weight = distribute_tensor(torch.ones(6, 5), mesh, [Replicate(), Shard(0)])
        >>> found = MeshDims([weight, torch.ones(3)])
        >>> [axis.ranks for axis in found.axes], found.sharded
        ([(1, 3), (0, 1)], [frozenset({1}), frozenset()])
        >>> dist.destroy_process_group()
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.axes: list[MeshDim] = []
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
                layouts[layout] = frozenset(
                    place
                    for place, placement in zip(places, placements, strict=False)
                    if place >= 0 and not placement.is_replicate() and not placement.is_partial()
                )
            self.sharded.append(layouts[layout])

    def _places(self, mesh: Any) -> list[int]:
        """For each dimension of a mesh the place of its axis, -1 where there is one rank only."""
        if mesh.get_coordinate() is None:
            return []  # this rank holds nothing of it
        return [-1 if mesh.size(dim) == 1 else self._place(mesh_axis(mesh, dim)) for dim in range(mesh.ndim)]

    def _place(self, axis: MeshDim) -> int:
        if axis.ranks not in self._known:
            self._known[axis.ranks] = len(self.axes)
            self.axes.append(axis)
        return self._known[axis.ranks]


def device_of(device_type: str) -> torch.device:
    """The device of that type which this process works on."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def mesh_axis(mesh: Any, dim: int) -> MeshDim:
    """A dimension of a mesh as an axis."""
    group = mesh.get_group(dim)
    return MeshDim(group, tuple(torch.distributed.get_process_group_ranks(group)), device_of(mesh.device_type))


def group_axis(group: Any) -> MeshDim:
    """A process group as an axis: its collectives run on a GPU where that has a backend of its own."""
    backends = dict(pair.split(":") for pair in torch.distributed.get_backend_config(group).split(","))
    own = [
        device_type
        for device_type, backend in backends.items()
        if backend != backends.get("cpu") and torch.get_device_module(device_type).is_available()
    ]
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    return MeshDim(group, ranks, device_of(own[0] if own else "cpu"))


def group_axes(group: Any, name: str) -> list[MeshDim]:
    """The axes of a ProcessGroup, a DeviceMesh or the default group; arguments as for `groups_of`."""
    return [group_axis(each) for each in groups_of(group, name) if each.size() > 1]


def reduced(shares: Tensor, over: Sequence[frozenset[int]], axes: Sequence[MeshDim], op: str = "sum") -> Tensor:
    """Numbers of this rank, each reduced over its own axes. One all-reduce for each axis that any number needs.

    Args:
        shares: 1-D, on any device.
        over: for each number the places of its axes in `axes`.
        axes: from MeshDims, in the same order on every rank.
        op: "sum", "min" or "max".

    Returns:
        A new tensor like `shares`; the same numbers on all ranks of a number's axes.
    """
    total = list(shares.clone().unbind())  # an index would have to be copied to the device, which waits for it
    for place, axis in enumerate(axes):
        mine = [i for i, places in enumerate(over) if place in places]
        if not mine:
            continue
        packed = torch.stack([total[i] for i in mine]).to(axis.device)
        torch.distributed.all_reduce(packed, _OPS[op](), group=axis.group)
        for i, number in zip(mine, packed.to(shares.device).unbind(), strict=True):
            total[i] = number
    return torch.stack(total) if total else shares.clone()


_OPS = {
    "sum": lambda: torch.distributed.ReduceOp.SUM,
    "min": lambda: torch.distributed.ReduceOp.MIN,
    "max": lambda: torch.distributed.ReduceOp.MAX,
}


def all_mesh_dims(axes: Sequence[MeshDim]) -> frozenset[int]:
    """All axes, for `reduced`."""
    return frozenset(range(len(axes)))


def all_gather(numbers: Tensor, axis: MeshDim) -> Tensor:
    """Numbers of all ranks of an axis, a row for each in the order of its ranks. One all-gather.

    Args:
        numbers: 1-D, on any device; as many on every rank.
        axis: the axis.
    """
    mine = numbers.to(axis.device)
    rows = mine.new_empty(len(axis.ranks), len(mine))
    torch.distributed.all_gather(list(rows.unbind()), mine, group=axis.group)
    return rows.to(numbers.device)


# ---------------------------------------------------------------------------------------------------------------
# Words


def groups_of(across: Any, name: str = "across") -> tuple[Any, ...]:
    """The groups over which to gather one after the other, so that a rank has what all ranks of `across` bring.

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


def gather(mine: Any, groups: Iterable[Any]) -> dict[int, Any]:
    """What every rank brings, by global rank and in their order; the same on all of them. One gather for each group.

    Args:
        mine: small and picklable.
        groups: from `groups_of`, the same on every rank that takes part.

    Example:
        >>> import torch.distributed as dist
        >>> from initlab.distributed.collectives import gather, groups_of
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


# ---------------------------------------------------------------------------------------------------------------
# Agreement


def differing(said: Mapping[str, str], axes: Sequence[MeshDim]) -> dict[str, dict[int, str | None]]:
    """What ranks do not agree on. One all-reduce of 16 bytes for each axis where they agree on everything.

    Args:
        said: what this rank says, by name.
        axes: of one mesh.

    Returns:
        By name: what each rank says, None where it does not know the name; without the names on which all agree. The
        same on every rank.

    Example:
        >>> from initlab.distributed.collectives import differing
        >>> differing({"seed": "1"}, [])
        {}
    """
    text = "\0".join(f"{name}\0{what}" for name, what in sorted(said.items()))
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    extremes = reduced(torch.tensor([word, -word]), [all_mesh_dims(axes)] * 2, axes, "max").tolist()
    if extremes[0] == -extremes[1]:
        return {}
    known = gather(said, [axis.group for axis in axes])
    names = dict.fromkeys(name for words in known.values() for name in words)
    found = {name: {rank: words.get(name) for rank, words in known.items()} for name in names}
    return {name: words for name, words in found.items() if len(set(words.values())) > 1}


def check_agreement(said: Iterable[tuple[Tensor, str, str]], what: str, advice: str) -> None:
    """Compare what ranks say of DTensors, mesh by mesh. Every rank of the meshes calls this.

    Args:
        said: (tensor, name, what this rank says of it); plain tensors are passed over.
        what: is compared, and `advice`: what to do about it; for the message.

    Raises:
        RuntimeError: on every rank, if they differ; the message lists names and ranks.
    """
    meshes: dict[Any, tuple[list[Tensor], dict[str, str]]] = {}
    for tensor, name, words in said:
        if is_dtensor(tensor):
            tensors, mine = meshes.setdefault(tensor.device_mesh, ([], {}))  # type: ignore[attr-defined]
            tensors.append(tensor)
            mine[name] = mine.get(name, "") + words
    for tensors, mine in meshes.values():
        refuse_differing(differing(mine, MeshDims(tensors).axes), what, advice)


def refuse_differing(found: Mapping[str, Mapping[int, str | None]], what: str, advice: str) -> None:
    """Raise a RuntimeError that names what `differing` found, unless it is nothing."""
    if not found:
        return
    lines = []
    for name, words in found.items():
        usual = max(words.values(), key=list(words.values()).count)
        others = [rank for rank, word in words.items() if word != usual]
        lines.append(f"{name}: rank{'s' if len(others) > 1 else ''} {listed(others)} of {len(words)}")
    raise RuntimeError(f"{what} differ between ranks:{listing(lines)}\n{advice}")
