"""Which stretch of one tensor dimension a rank holds: the arithmetic of Shard and _StridedShard.

Plain integers, no tensors, no communication.

Example:
    >>> from initlab.distributed.intervals import local_intervals
    >>> local_intervals(10, [(4, 1, 1)], size=3)  # the second of four ranks
    [(3, 3)]
    >>> local_intervals(10, [(4, 3, 1)], size=1)  # torch.chunk: the last one has less
    [(9, 1)]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Interval: TypeAlias = tuple[int, int]  # offset, size
Split: TypeAlias = tuple[int, int, int]  # number of parts, index of this rank's part, factor


def local_intervals(length: int, splits: Sequence[Split], size: int | None = None) -> list[Interval] | None:
    """The intervals of one dimension that a rank holds, in the order of its local tensor.

    Args:
        length: of the dimension.
        splits: (parts, index of the rank's part, factor) for each mesh dimension that shards it, from left to right.
            The factor is 1 for Shard, and _StridedShard's split_factor.
        size: how many elements the rank does hold; None to leave it unchecked. FSDP shards what tensor parallelism has
            sharded before, and writes it as a _StridedShard on its left. Where sizes do not divide, that is not what
            distribute_tensor makes of the same placements; the size tells which of the two a tensor is.

    Returns:
        (offset, size) pairs without empty ones; None if no reading of the splits gives `size` elements.

    Example:
        >>> from initlab.distributed.intervals import local_intervals
        >>> local_intervals(8, [(2, 1, 2), (2, 0, 1)])  # FSDP on top of tensor parallelism: right first
        [(2, 2)]
        >>> local_intervals(8, [(2, 1, 2)])  # the same, gathered over the tensor parallel ranks
        [(2, 2), (6, 2)]
    """
    for read in (_in_order_of_sharding, _from_left):
        intervals = read(length, splits)
        if intervals is not None and (size is None or sum(n for _, n in intervals) == size):
            return intervals
    return None


def _in_order_of_sharding(length: int, splits: Sequence[Split]) -> list[Interval] | None:
    """By mesh dimension in the order in which they sharded, as FSDP does; None if the factors fit no order."""
    order = _order(splits)
    if order is None:
        return None
    intervals = [(0, length)]
    for i in order:
        parts, index, _ = splits[i]
        intervals = _chunk(intervals, parts, index)
    return intervals


def _from_left(length: int, splits: Sequence[Split]) -> list[Interval]:
    """By mesh dimension from left to right, as distribute_tensor does; a factor cuts before its parts are taken."""
    intervals = [(0, length)]
    for parts, index, factor in splits:
        intervals = [one for i in range(factor) for one in _chunk(_chunk(intervals, factor, i), parts, index)]
    return _joined(intervals)


def _order(splits: Sequence[Split]) -> list[int] | None:
    """The order in which mesh dimensions sharded a tensor dimension; None if the factors fit no order.

    A factor says into how many parts the dimension had been cut by mesh dimensions further to the right.
    """
    order: list[int] = []
    for i in reversed(range(len(splits))):
        factor = splits[i][2]
        cut = 1
        for position in range(len(order) + 1):
            if cut == factor:
                order.insert(position, i)
                break
            if position < len(order):
                cut *= splits[order[position]][0]
        else:
            return None
    return order


def _chunk(intervals: list[Interval], parts: int, index: int) -> list[Interval]:
    """One of `parts` chunks, cut as torch.chunk does, of intervals taken as one."""
    total = sum(size for _, size in intervals)
    chunk_size = -(-total // parts)
    start, end = min(index * chunk_size, total), min((index + 1) * chunk_size, total)
    chunk, before = [], 0
    for offset, size in intervals:
        low, high = max(start, before), min(end, before + size)
        if low < high:
            chunk.append((offset + low - before, high - low))
        before += size
    return chunk


def _joined(intervals: list[Interval]) -> list[Interval]:
    """Intervals without gaps between them made one."""
    joined: list[Interval] = []
    for offset, size in intervals:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((offset, size))
    return joined
