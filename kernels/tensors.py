"""What kind of tensor it is: one with memory and behaviour of its own, or of a class that changes either; its bits."""

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
