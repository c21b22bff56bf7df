"""Small collectives over the meshes of DTensors: sums of what ranks hold, and what they do not agree on.

An axis is one dimension of a mesh. All ranks must make the same calls with tensors placed the same way, as for every
collective; ranks of other meshes, such as other pipeline stages, need not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
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
        ranks = _ranks(group)
        if ranks not in self._known:
            self._known[ranks] = len(self.axes)
            self.axes.append(Axis(group, ranks, device_of(device_type)))
        return self._known[ranks]


def device_of(device_type: str) -> torch.device:
    """The device of that type which this process works on."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def group_axes(group: Any) -> list[Axis]:
    """The axes of a ProcessGroup, a DeviceMesh, or, where it is True, of the default group."""
    if hasattr(group, "get_coordinate"):
        dims = range(group.ndim)
        return [Axis(g, _ranks(g), device_of(group.device_type)) for g in map(group.get_group, dims) if g.size() > 1]
    group = torch.distributed.group.WORLD if group is True else group
    types = sorted(device.type for device in group._device_types)  # "cpu" comes before "cuda", and needs no copy
    return [Axis(group, _ranks(group), device_of(types[0]))] if group.size() > 1 else []


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))


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


# ---------------------------------------------------------------------------------------------------------------
# Agreement


def differing(said: Mapping[str, str], axes: Sequence[Axis]) -> dict[str, dict[int, str | None]]:
    """What ranks do not agree on. One all-reduce of 16 bytes for each axis where they agree on everything.

    Args:
        said: what this rank says, by name.
        axes: of one mesh.

    Returns:
        By name: what each rank says, None where it does not know the name; without the names on which all agree. The
        same on every rank.

    Example:
        >>> from initlab.collectives import differing
        >>> differing({"seed": "1"}, [])
        {}
    """
    text = "\0".join(f"{name}\0{what}" for name, what in sorted(said.items()))
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    extremes = reduced(torch.tensor([word, -word]), [everywhere(axes)] * 2, axes, "max").tolist()
    if extremes[0] == -extremes[1]:
        return {}
    told: dict[int, Mapping[str, str]] = {torch.distributed.get_rank(): said}
    for axis in axes:
        every: list[Any] = [None] * len(axis.ranks)
        torch.distributed.all_gather_object(every, told, group=axis.group)
        told = {rank: words for one in every for rank, words in one.items()}
    names = dict.fromkeys(name for words in told.values() for name in words)
    found = {name: {rank: told[rank].get(name) for rank in sorted(told)} for name in names}
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
            tensors, told = meshes.setdefault(tensor.device_mesh, ([], {}))  # type: ignore[attr-defined]
            tensors.append(tensor)
            told[name] = told.get(name, "") + words
    for tensors, told in meshes.values():
        refuse_differing(differing(told, Axes(tensors).axes), what, advice)


def refuse_differing(found: Mapping[str, Mapping[int, str | None]], what: str, advice: str) -> None:
    """Raise a RuntimeError that names what `differing` found, unless it is nothing."""
    if not found:
        return
    lines = []
    for name, words in list(found.items())[:_LISTED]:
        usual = max(words.values(), key=list(words.values()).count)
        others = [str(rank) for rank, word in words.items() if word != usual]
        lines.append(f"{name}: rank{'s' if len(others) > 1 else ''} {', '.join(others)} of {len(words)}")
    more = f"\n  ... and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    raise RuntimeError(f"{what} differ between ranks:\n  " + "\n  ".join(lines) + more + f"\n{advice}")


_LISTED = 20
