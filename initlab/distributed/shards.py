"""Which regions of a logical tensor a rank holds, by a DTensor's mesh and placements. Nothing here communicates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from initlab.kernels import Distribution, Draw, Region

from .dtensors import is_dtensor, local, placements_text
from .intervals import Interval, local_intervals


class LocalShard(NamedTuple):
    """A part of a local tensor, and the region of the logical tensor that it holds."""

    tensor: Tensor
    region: Region


def local_shards(tensor: Tensor) -> list[LocalShard]:
    """The regions of the logical tensor that this rank holds of a DTensor, and its local tensor's parts.

    Nearly always one. A `_StridedShard` without the sharding that it strides over gives several. At least one is
    returned, without elements where the rank holds none, so that every rank makes the same checks.

    Args:
        tensor: a DTensor on a mesh of any number of dimensions, placed by Shard, _StridedShard and Replicate; sizes
            need not divide.

    Raises:
        NotImplementedError: for another placement, such as Partial.
        RuntimeError: if the local tensor's shape is not what the placements say.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.tensor import Shard, distribute_tensor
        >>> from initlab.distributed.shards import local_shards
        >>> dist.init_process_group("fake", rank=1, world_size=4)  # no network: collectives do nothing
        >>> mesh = dist.init_device_mesh("cpu", (4,))
        >>> [shard.region for shard in local_shards(distribute_tensor(torch.ones(6, 5), mesh, [Shard(0)]))]
        [Region(shape=(6, 5), offsets=(2, 0), sizes=(2, 5))]
        >>> dist.destroy_process_group()
    """
    whole = local(tensor)
    shape = tuple(tensor.shape)
    dims = [
        _intervals_of(tensor, dim, splits, whole) if splits else [(0, length)]
        for dim, (length, splits) in enumerate(zip(shape, _splits(tensor), strict=True))
    ]
    if whole.numel() == 0 or not all(dims):
        # A rank outside the mesh holds a tensor of shape (0,), whatever the logical one is.
        empty = whole if whole.ndim == len(shape) else whole.new_empty((0,) * len(shape))
        return [LocalShard(empty, Region(shape, (0,) * len(shape), tuple(empty.shape)))]
    shards = []
    for intervals in itertools.product(*dims):
        part = whole
        for dim, (each, (_, size)) in enumerate(zip(dims, intervals, strict=True)):
            if len(each) > 1:
                before = sum(s for _, s in each[: each.index(intervals[dim])])
                part = part.narrow(dim, before, size)
        region = Region(shape, tuple(offset for offset, _ in intervals), tuple(size for _, size in intervals))
        shards.append(LocalShard(part, region))
    return shards


def shards_in(shards: list[LocalShard], tensor: Tensor) -> list[LocalShard]:
    """The local shards of a DTensor that is placed as the one whose shards are known, or is that one."""
    whole = local(tensor)
    if len(shards) == 1 and tuple(whole.shape) == shards[0].region.sizes:
        return [LocalShard(whole, shards[0].region)]
    return local_shards(tensor)


def draws(
    tensor: Tensor, distribution: Distribution, key: int, part: tuple[int, int, int] | None = None
) -> Iterator[Draw]:
    """What `fill_` has to do on this rank to fill a tensor or a part of it.

    Args:
        tensor: plain, or a DTensor as for `local_shards`.
        distribution: what to draw.
        key: of the draws.
        part: (dim, start, length) in the logical tensor; None for all of it.
    """
    if not is_dtensor(tensor):
        if part is None:
            yield Draw(tensor, distribution, key)
            return
        yield Draw(tensor.narrow(*part), distribution, key, Region.whole(tensor.shape).narrow(*part))
        return
    yield from draws_of_shards(local_shards(tensor), distribution, key, part)


def draws_of_shards(
    shards: Iterable[LocalShard], distribution: Distribution, key: int, part: tuple[int, int, int] | None = None
) -> Iterator[Draw]:
    """What `draws` gives for a DTensor whose local shards are known."""
    for shard, region in shards:
        if part is None:
            yield Draw(shard, distribution, key, region)
            continue
        dim, start, length = part
        low = max(start, region.offsets[dim])
        high = min(start + length, region.offsets[dim] + region.sizes[dim])
        if low < high:
            inner = (dim, low - region.offsets[dim], high - low)
            yield Draw(shard.narrow(*inner), distribution, key, region.narrow(*inner))


class _Split(NamedTuple):
    """One mesh dimension's part in sharding one tensor dimension."""

    parts: int
    part: int  # index of the rank's
    factor: int  # of _StridedShard; 1 for Shard
    mesh_dim: int


def _splits(tensor: Any) -> list[list[_Split]]:
    """By tensor dimension: how it is sharded, mesh dimensions from left to right."""
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    splits: list[list[_Split]] = [[] for _ in tensor.shape]
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if not _is_shard(placement):
            raise NotImplementedError(
                f"a DTensor placed {placements_text(placements)} cannot be filled or digested: under "
                f"{type(placement).__name__} no rank holds the values themselves. Redistribute it to Shard or Replicate"
            )
        factor = int(getattr(placement, "split_factor", 1))
        index = 0 if coordinate is None else coordinate[mesh_dim]
        splits[placement.dim].append(_Split(mesh.size(mesh_dim), index, factor, mesh_dim))
    return splits


def _is_shard(placement: Any) -> bool:
    """Whether a placement is Shard or _StridedShard; one of torch's versions makes the second a subclass of the first.

    Others, such as ragged ones, have a `dim` too: they do not go by torch.chunk.
    """
    return type(placement).__name__ in ("Shard", "_StridedShard")


def _intervals_of(tensor: Any, dim: int, splits: list[_Split], whole: Tensor) -> list[Interval]:
    """The intervals of one tensor dimension in the local tensor `whole`, whose size must be theirs."""
    if tensor.device_mesh.get_coordinate() is None:
        return []
    size = whole.shape[dim] if whole.ndim == tensor.ndim else -1
    order = next(
        (entry.mesh_dims for entry in getattr(tensor._spec, "shard_order", None) or () if entry.tensor_dim == dim), None
    )
    if order is not None and sorted(order) == [split.mesh_dim for split in splits]:
        by_mesh_dim = {split.mesh_dim: split for split in splits}
        splits = [by_mesh_dim[mesh_dim] for mesh_dim in order]
    intervals = local_intervals(tensor.shape[dim], [split[:3] for split in splits], size)
    if intervals is None:
        raise RuntimeError(
            f"dimension {dim} of a DTensor of shape {tuple(tensor.shape)}, placed {placements_text(tensor.placements)} "
            f"on {tensor.device_mesh}, has {size} elements on this rank, which is not what the placements say; "
            "DTensor.from_local with shards of other sizes than torch.chunk's makes such tensors: use distribute_tensor"
        )
    return intervals
