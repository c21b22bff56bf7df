"""Which parameters of a model share memory."""

import torch
from torch import Tensor

from ..distributed.dtensors import local
from .naming import TensorRef


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
