"""What a rank holds of a tensor that is spread over many: the blocks of a DTensor, and who has the rest.

Nothing here communicates unless its name says so. torch.distributed.tensor is looked up among the modules already
imported: where nobody has imported it, there is no DTensor.

Example:
    >>> from initlab.distributed.shards import local_intervals
    >>> local_intervals(10, [(4, 1, 1)], size=3)  # the second of four ranks
    [(3, 3)]
    >>> local_intervals(10, [(4, 3, 1)], size=1)  # torch.chunk: the last one has less
    [(9, 1)]
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from initlab.kernels import Distribution, Draw, Region

_PLAIN = (Tensor, nn.Parameter)

Interval: TypeAlias = tuple[int, int]  # offset, size


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor.

    Example:
        >>> import torch
        >>> from initlab.distributed.shards import is_dtensor
        >>> is_dtensor(torch.ones(2))
        False
    """
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the local tensor of a DTensor, without autograd; any other as it is."""
    if not is_dtensor(tensor):
        return tensor
    if torch.is_grad_enabled():
        with torch.no_grad():
            return local(tensor)
    mine: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    wait = getattr(mine, "wait", None)  # of a collective that is still under way
    return mine if wait is None else wait()


def without_elements(tensor: Tensor) -> Tensor:
    """A DTensor on the same mesh, of the same shape, dtype and placements, of which this rank holds nothing."""
    module = sys.modules["torch.distributed.tensor"]
    mine = torch.empty(0, dtype=tensor.dtype, device=local(tensor).device)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    found: Tensor = module.DTensor.from_local(mine, mesh, placements, run_check=False, **shape)
    return found


def count_as_written(tensor: Tensor) -> None:
    """Move the version counter of a DTensor on, whose local tensor has been filled: autograd goes by the DTensor's."""
    if is_dtensor(tensor) and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def reshard(model: Any) -> None:
    """Have FSDP2's modules of a model hold their own shards again: gathered parameters are copies, soon to be freed.

    Raises:
        RuntimeError: for a part of such a module that holds plain tensors; only the module itself can reshard them.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(model, nn.Module):
        return
    within: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
        if module in within or isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel):
            within.update(module.children())
        elif getattr(module, "_is_fsdp_managed_module", False):
            plain = [leaf for leaf, p in module._parameters.items() if p is not None and not is_dtensor(p)]
            if plain:
                raise RuntimeError(
                    f"{name}{name and '.'}{plain[0]} belongs to a module above this model that FSDP shards, and may be "
                    "a gathered copy, whose contents are lost when it is freed. Pass the sharded module, with only= to "
                    "choose, or call its reshard() first"
                )


def refuse_hidden_shards(model: nn.Module) -> None:
    """Raise where this rank's parts of parameters are plain tensors, whose shapes are not the parameters'.

    FullyShardedDataParallel, the first FSDP, holds flat pieces; DistributedDataParallel with a device_mesh puts local
    tensors in the place of DTensors.
    """
    for name, parameter in model.named_parameters():
        spec = getattr(parameter, "_st_info", None)
        if spec is not None and not all(placement.is_replicate() for placement in spec.placements):
            raise NotImplementedError(
                f"{name} is the local part of a DTensor placed {_text(spec.placements)}, which DistributedDataParallel "
                "has put in its place. Do this before the model is wrapped"
            )
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules() if fsdp is not None else ():
        if not isinstance(module, fsdp.FullyShardedDataParallel) or module.process_group.size() == 1:
            continue
        strategy, state = module.sharding_strategy.name, module.training_state.name
        if strategy != "NO_SHARD" and state != "SUMMON_FULL_PARAMS":
            raise NotImplementedError(
                f"{name or 'the model'} is a FullyShardedDataParallel, whose parameters are flat pieces on this rank. "
                "Use torch.distributed.fsdp.fully_shard, or do this before wrapping, or inside "
                "FullyShardedDataParallel.summon_full_params(model)"
            )


# ---------------------------------------------------------------------------------------------------------------
# Blocks


class LocalShard(NamedTuple):
    """A part of a local tensor, and the block of the logical tensor that it holds."""

    tensor: Tensor
    region: Region


def local_shards(tensor: Tensor) -> list[LocalShard]:
    """The blocks of the logical tensor that this rank holds of a DTensor.

    Nearly always one. A `_StridedShard` without the sharding that it strides over gives several. At least one is
    returned, without elements where the rank holds none, so that every rank makes the same checks.

    Args:
        tensor: a DTensor on a mesh of any number of dimensions, placed by Shard, _StridedShard and Replicate; sizes
            need not divide.

    Raises:
        NotImplementedError: for another placement, such as Partial.
        RuntimeError: if the local tensor's shape is not what the placements say.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.tensor import Shard, distribute_tensor
        >>> from initlab.distributed.shards import local_shards
        >>> dist.init_process_group("fake", rank=1, world_size=4)  # no network: collectives do nothing
        >>> mesh = dist.init_device_mesh("cpu", (4,))
        >>> [block.region for block in local_shards(distribute_tensor(torch.ones(6, 5), mesh, [Shard(0)]))]
        [Region(shape=(6, 5), offsets=(2, 0), sizes=(2, 5))]
        >>> dist.destroy_process_group()
    """
    mine = local(tensor)
    shape = tuple(tensor.shape)
    dims = [
        [(0, whole)] if not shards else _checked(tensor, dim, whole, shards, mine)
        for dim, (whole, shards) in enumerate(zip(shape, _shards(tensor), strict=True))
    ]
    if mine.numel() == 0 or not all(dims):
        # A rank outside the mesh holds a tensor of shape (0,), whatever the logical one is.
        empty = mine if mine.ndim == len(shape) else mine.new_empty((0,) * len(shape))
        return [LocalShard(empty, Region(shape, (0,) * len(shape), tuple(empty.shape)))]
    found = []
    for intervals in itertools.product(*dims):
        part = mine
        for dim, (each, (_, size)) in enumerate(zip(dims, intervals, strict=True)):
            if len(each) > 1:
                before = sum(s for _, s in each[: each.index(intervals[dim])])
                part = part.narrow(dim, before, size)
        region = Region(shape, tuple(offset for offset, _ in intervals), tuple(size for _, size in intervals))
        found.append(LocalShard(part, region))
    return found


def draws(
    tensor: Tensor, distribution: Distribution, key: int, part: tuple[int, int, int] | None = None
) -> Iterator[Draw]:
    """What `fill_` has to do on this rank to fill a tensor, plain or DTensor, or the part of it with
    part = (dim, start, length) in the logical tensor.
    """
    if not is_dtensor(tensor):
        if part is None:
            yield Draw(tensor, distribution, key)
            return
        yield Draw(tensor.narrow(*part), distribution, key, Region.whole(tensor.shape).narrow(*part))
        return
    for mine, region in local_shards(tensor):
        if part is None:
            yield Draw(mine, distribution, key, region)
            continue
        dim, start, length = part
        low = max(start, region.offsets[dim])
        high = min(start + length, region.offsets[dim] + region.sizes[dim])
        if low < high:
            inner = (dim, low - region.offsets[dim], high - low)
            yield Draw(mine.narrow(*inner), distribution, key, region.narrow(*inner))


class _Split(NamedTuple):
    """One mesh dimension's part in sharding one tensor dimension."""

    parts: int
    at: int  # the rank's place among them
    factor: int  # of _StridedShard; 1 for Shard
    mesh_dim: int


def _shards(tensor: Any) -> list[list[_Split]]:
    """By tensor dimension: how it is sharded, mesh dimensions from left to right."""
    mesh, placements = tensor.device_mesh, tensor.placements
    where = mesh.get_coordinate()
    found: list[list[_Split]] = [[] for _ in tensor.shape]
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if not placement_is_shard(placement):
            raise NotImplementedError(
                f"a DTensor placed {_text(placements)} cannot be filled or digested: under "
                f"{type(placement).__name__} no rank holds the values themselves. Redistribute it to Shard or Replicate"
            )
        factor = int(getattr(placement, "split_factor", 1))
        index = 0 if where is None else where[mesh_dim]
        found[placement.dim].append(_Split(mesh.size(mesh_dim), index, factor, mesh_dim))
    return found


def placement_is_shard(placement: Any) -> bool:
    """Whether a placement is Shard or _StridedShard; one of torch's versions makes the second a subclass of the first.

    Others, such as ragged ones, have a `dim` too: they do not go by torch.chunk.
    """
    return type(placement).__name__ in ("Shard", "_StridedShard")


def _text(placements: Sequence[Any]) -> str:
    return f"({', '.join(map(str, placements))})"


def _checked(tensor: Any, dim: int, whole: int, shards: list[_Split], mine: Tensor) -> list[Interval]:
    if tensor.device_mesh.get_coordinate() is None:
        return []
    size = mine.shape[dim] if mine.ndim == tensor.ndim else -1
    given = next(
        (entry.mesh_dims for entry in getattr(tensor._spec, "shard_order", None) or () if entry.tensor_dim == dim), None
    )
    if given is not None and sorted(given) == [split.mesh_dim for split in shards]:
        by_dim = {split.mesh_dim: split for split in shards}
        shards = [by_dim[d] for d in given]
    found = local_intervals(whole, [split[:3] for split in shards], size)
    if found is None:
        raise RuntimeError(
            f"dimension {dim} of a DTensor of shape {tuple(tensor.shape)}, placed {_text(tensor.placements)} on "
            f"{tensor.device_mesh}, has {size} elements on this rank, which is not what the placements say; "
            "DTensor.from_local with shards of other sizes than torch.chunk's makes such tensors: use distribute_tensor"
        )
    return found


def local_intervals(
    length: int, splits: Sequence[tuple[int, int, int]], size: int | None = None
) -> list[Interval] | None:
    """The stretches of one dimension that a rank holds, in the order of its local tensor.

    Args:
        length: of the dimension.
        splits: (parts, index of the rank among them, factor) for each mesh dimension that shards it, from left to
            right. The factor is 1 for Shard, and _StridedShard's split_factor.
        size: how many elements the rank does hold; None to leave it unchecked. FSDP shards what tensor parallelism has
            sharded before, and writes it as a _StridedShard on its left. Where sizes do not divide, that is not what
            distribute_tensor makes of the same placements; the size tells which of the two a tensor is.

    Returns:
        (offset, size) pairs without empty ones; None if no reading of the splits gives `size` elements.

    Example:
        >>> from initlab.distributed.shards import local_intervals
        >>> local_intervals(8, [(2, 1, 2), (2, 0, 1)])  # FSDP on top of tensor parallelism: right first
        [(2, 2)]
        >>> local_intervals(8, [(2, 1, 2)])  # the same, gathered over the tensor parallel ranks
        [(2, 2), (6, 2)]
    """
    for read in (_in_order, _from_left):
        stretches = read(length, splits)
        if stretches is not None and (size is None or sum(n for _, n in stretches) == size):
            return stretches
    return None


def _in_order(length: int, splits: Sequence[tuple[int, int, int]]) -> list[Interval] | None:
    """By mesh dimension in the order in which they sharded, as FSDP does; None if the factors fit no order."""
    order = _order(splits)
    stretches = [(0, length)]
    for place in order or ():
        parts, index, _ = splits[place]
        stretches = _chunk(stretches, parts, index)
    return None if order is None else stretches


def _from_left(length: int, splits: Sequence[tuple[int, int, int]]) -> list[Interval]:
    """By mesh dimension from left to right, as distribute_tensor does; a factor cuts before its parts are taken."""
    stretches = [(0, length)]
    for parts, index, factor in splits:
        stretches = [one for i in range(factor) for one in _chunk(_chunk(stretches, factor, i), parts, index)]
    return _joined(stretches)


def _order(splits: Sequence[tuple[int, int, int]]) -> list[int] | None:
    """The order in which mesh dimensions sharded a tensor dimension; None if the factors fit no order.

    A factor says into how many parts the dimension had been cut by mesh dimensions further to the right.
    """
    order: list[int] = []
    for place in reversed(range(len(splits))):
        factor = splits[place][2]
        cut = 1
        for at in range(len(order) + 1):
            if cut == factor:
                order.insert(at, place)
                break
            if at < len(order):
                cut *= splits[order[at]][0]
        else:
            return None
    return order


def _chunk(stretches: list[Interval], parts: int, index: int) -> list[Interval]:
    """One of `parts` chunks, cut as torch.chunk does, of stretches taken as one."""
    total = sum(size for _, size in stretches)
    each = -(-total // parts)
    start, end = min(index * each, total), min((index + 1) * each, total)
    found, at = [], 0
    for offset, size in stretches:
        low, high = max(start, at), min(end, at + size)
        if low < high:
            found.append((offset + low - at, high - low))
        at += size
    return found


def _joined(stretches: list[Interval]) -> list[Interval]:
    """Neighbours made one."""
    found: list[Interval] = []
    for offset, size in stretches:
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((offset, size))
    return found
