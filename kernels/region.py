"""Which elements of a logical tensor a local tensor holds, and the strided runs that they are read as."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class StridedRun(NamedTuple):
    """Rows of consecutive elements of a logical tensor, which follow each other in the local tensor's memory.

    Attributes:
        start: the number of the first row's first element.
        rows: how many rows.
        length: elements in a row.
        stride: elements of the logical tensor from one row's start to the next one's.
    """

    start: int
    rows: int
    length: int
    stride: int

    @property
    def numel(self) -> int:
        """Elements in all rows."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Region:
    """The block of a logical tensor that a local tensor holds.

    Args:
        shape: of the logical, unsharded tensor.
        offsets: where the block begins, one per dimension.
        sizes: of the block, one per dimension: the local tensor's shape. Zero is allowed.

    Raises:
        ValueError: if the lengths differ, or the block does not lie within the shape.

    Example:
        >>> from initlab.kernels import Region
        >>> Region(shape=(4, 6), offsets=(2, 3), sizes=(2, 3)).numel
        6
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("shape", "offsets", "sizes"):
            object.__setattr__(self, name, tuple(int(x) for x in getattr(self, name)))
        if not len(self.shape) == len(self.offsets) == len(self.sizes):
            raise ValueError(f"{self}: shape, offsets and sizes must have one number per dimension each")
        for whole, offset, size in zip(self.shape, self.offsets, self.sizes, strict=True):
            if offset < 0 or size < 0 or offset + size > whole:
                raise ValueError(f"{self}: 0 <= offset and offset + size <= shape must hold in every dimension")

    @property
    def numel(self) -> int:
        """Elements in the block."""
        return math.prod(self.sizes)

    @staticmethod
    def whole(shape: Iterable[int]) -> Region:
        """All of a logical tensor.

        Example:
            >>> from initlab.kernels import Region
            >>> Region.whole((4, 6))
            Region(shape=(4, 6), offsets=(0, 0), sizes=(4, 6))
        """
        shape = tuple(shape)
        return Region(shape, (0,) * len(shape), shape)

    def as_real(self) -> Region:
        """The block in the real tensor of a complex one's parts, which has one more dimension, of size 2."""
        return Region((*self.shape, 2), (*self.offsets, 0), (*self.sizes, 2))

    def of(self, whole: Tensor) -> Tensor:
        """The view of a logical tensor, all of which is here, that is the block."""
        ends = (offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))
        return whole[tuple(map(slice, self.offsets, ends))]

    def narrow(self, dim: int, offset: int, size: int) -> Region:
        """The part of the block that begins at `offset` within it and is `size` long in dimension `dim`."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim] += offset
        sizes[dim] = size
        return Region(self.shape, tuple(offsets), tuple(sizes))

    def runs(self) -> Iterator[StridedRun]:
        """The block in row-major order, as runs of consecutive elements of the logical tensor."""
        if self.numel == 0:
            return
        start, stride = 0, 1
        dims: list[tuple[int, int]] = []  # (size, stride), innermost first, joined where they continue each other
        for whole, offset, size in zip(reversed(self.shape), reversed(self.offsets), reversed(self.sizes), strict=True):
            start += offset * stride
            if size > 1:
                if dims and dims[-1][0] * dims[-1][1] == stride:
                    dims[-1] = (dims[-1][0] * size, dims[-1][1])
                else:
                    dims.append((size, stride))
            stride *= whole
        if not dims or dims[0][1] != 1:
            dims.insert(0, (1, 1))
        length = dims[0][0]
        rows, step = dims[1] if len(dims) > 1 else (1, length)
        outer = dims[2:]
        for index in range(math.prod(size for size, _ in outer)):
            place = start
            for size, step_of_dim in outer:
                index, i = divmod(index, size)
                place += i * step_of_dim
            yield StridedRun(place, rows, length, step)
