"""Where in its storage a tensor lies, which part of another it is, and which parameters of a model share memory."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..distributed.dtensors import local
from .naming import TensorRef
from .specs import DimSlice


class Layout(NamedTuple):
    """Where the elements of a tensor lie in its storage, in bytes.

    Args:
        offset: of the first element.
        shape: the tensor's.
        stride: the bytes from one element to the next, in each dimension.
        unit: the bytes of an element.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    unit: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """The layout of a strided tensor."""
        unit = tensor.element_size()
        return cls(
            int(tensor.storage_offset()) * unit, tuple(tensor.shape), tuple(s * unit for s in tensor.stride()), unit
        )

    def narrow(self, part: DimSlice | None) -> "Layout":
        """The layout of a slice of the tensor; None is all of it."""
        if part is None:
            return self
        dim, start, length = part
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return Layout(self.offset + start * self.stride[dim], shape, self.stride, self.unit)

    @property
    def end(self) -> int:
        """The byte after the last one."""
        if 0 in self.shape:
            return self.offset
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + self.unit

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def dimensions(self) -> list[tuple[int, int]]:
        """(size, stride) of the dimensions that are more than one element long, in no order of theirs."""
        return sorted((n, s) for n, s in zip(self.shape, self.stride, strict=True) if n > 1)

    def is_dense(self) -> bool:
        """Whether it leaves out no byte between its first and its last, and meets none twice."""
        expected = self.unit
        for size, stride in sorted(self.dimensions(), key=lambda pair: pair[1]):
            if stride != expected:
                return False
            expected *= size
        return True

    def is_contiguous(self) -> bool:
        """Whether it is dense, its last dimension innermost."""
        expected = self.unit
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True


def slice_of(view: Layout, whole: Layout) -> DimSlice | Literal[False] | None:
    """Which slice of a tensor a view of its storage is: None if all of it, False if it is none."""
    if view.offset == whole.offset and view.numel == whole.numel:
        # All of it in another shape, or its dimensions in another order: independent draws do not mind.
        if view.is_contiguous() and whole.is_contiguous():
            return None
        if view.dimensions() == whole.dimensions():
            return None
    offset = view.offset - whole.offset
    for dim, (size, stride) in enumerate(zip(whole.shape, whole.stride, strict=True)):
        if stride == 0 or offset % stride or not 0 <= offset // stride < max(size, 1):
            continue
        start = offset // stride
        rest = [pair for d, pair in enumerate(zip(whole.shape, whole.stride, strict=True)) if d != dim]
        seen = list(zip(view.shape, view.stride, strict=True))
        if seen == rest:
            return DimSlice(dim, start, 1)
        longer = len(view.shape) == len(whole.shape) and view.stride[dim] == stride and start + view.shape[dim] <= size
        if longer and seen[:dim] + seen[dim + 1 :] == rest:
            return DimSlice(dim, start, view.shape[dim])
    return False


def shared_memory(parameters: list[TensorRef]) -> list[tuple[str, str]]:
    """Pairs of different parameters that share elements: a fill would write them twice, from two keys.

    Views of one storage that do not meet, such as the weights of an RNN on a GPU, are fine.
    """
    storages: dict[int, list[tuple[TensorRef, Tensor]]] = {}
    for ref in parameters:
        if ref.tensor.layout == torch.strided and ref.tensor.numel() > 0:
            tensor = local(ref.tensor) if ref.kind == "dtensor" else ref.tensor
            try:
                storages.setdefault(tensor.untyped_storage()._cdata, []).append((ref, tensor))
            except NotImplementedError:  # a wrapper subclass: it has no storage of its own
                continue
    found = []
    for group in storages.values():
        if len(group) == 1:
            continue
        reach, last = -1, None
        for ref, tensor in sorted(group, key=lambda pair: pair[1].storage_offset()):
            start, end = tensor.storage_offset() * tensor.element_size(), _end(tensor)
            if last is not None and start < reach and _meet(last[1], tensor):
                found.append((last[0].name, ref.name))
            if end > reach:
                reach, last = end, (ref, tensor)
    return found


def _end(tensor: Tensor) -> int:
    """The byte after the last one of a tensor, from the beginning of its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((tensor.storage_offset() + last + 1) * tensor.element_size())


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage, whose spans overlap, share an element."""
    if a.dtype != b.dtype or (a.is_contiguous() and b.is_contiguous()):
        return True
    size = max(_end(a), _end(b)) // a.element_size()
    count = torch.zeros(size, dtype=torch.int8, device="cpu")
    for tensor in (a, b):
        count.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).add_(1)
    return bool((count > 1).any())
