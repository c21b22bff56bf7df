"""What kind of tensor it is: one with memory and behaviour of its own, or of a class that changes either."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

PLAIN = frozenset({Tensor, nn.Parameter})  # the classes whose operations nobody intercepts
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes: what bits are read as


def all_plain(tensors: Iterable[object]) -> bool:
    """Whether tensors are of torch's own classes, so that their memory is theirs to read and write.

    Subclasses (DTensor, FakeTensor, quantised and other wrappers) are not, whatever they wrap. None counts as plain,
    for an operand that is left out.

    Example:
        >>> import torch
        >>> from initlab.kernels import all_plain
        >>> all_plain([torch.ones(2), torch.nn.Parameter(torch.ones(2)), None])
        True
    """
    return set(map(type, tensors)) <= _PLAIN_OR_NONE


_PLAIN_OR_NONE = PLAIN | {type(None)}


def is_freed(tensor: Tensor) -> bool:
    """Whether a strided tensor's storage is too small for it, as where a sharding library has freed it.

    Reading or writing such a tensor may end the process. A tensor without a storage, as torch.func makes them, is none.

    Example:
        >>> import torch
        >>> from initlab.kernels.tensors import is_freed
        >>> x = torch.ones(3)
        >>> _ = x.untyped_storage().resize_(0)
        >>> is_freed(x)
        True
    """
    if tensor.numel() == 0:
        return False
    try:
        size = tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):
        return False
    if tensor.is_contiguous():
        end = tensor.storage_offset() + tensor.numel()
    else:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps) + 1
    return size < end * tensor.element_size()
