"""What kind of tensor it is: one with memory and behaviour of its own, or of a class that changes either."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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


def wraps_tensors(tensor: object) -> bool:
    """Whether a tensor is of a class that wraps other tensors; as torch's is_traceable_wrapper_subclass, which
    torch.compile answers with False for a DTensor.
    """
    return hasattr(type(tensor), "__tensor_flatten__")


_Settle = Callable[[Tensor], tuple[Tensor, Tensor] | None]
_settlers: list[_Settle] = []


def register_wrapper(settle: _Settle) -> None:
    """Tell ops how to read a class of tensors that wrap others, which kernels/ does not know itself.

    Args:
        settle: gets a tensor and returns None where it is of another class, else (the same values as a tensor of its
            class whose elements are final, the plain tensor of those that this process holds).
    """
    _settlers.append(settle)


def settled(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(a tensor whose elements are final, the plain tensor of those that this process holds); see `register_wrapper`.

    A tensor that wraps no other is both; so is what a nested one holds.

    Raises:
        NotImplementedError: if it wraps others, and its class has not been registered.
    """
    if tensor.is_nested:
        return tensor, tensor.values()
    if not wraps_tensors(tensor):
        return tensor, tensor
    for settle in _settlers:
        if (found := settle(tensor)) is not None:
            return found
    raise NotImplementedError(
        f"flags do not work with a {type(tensor).__name__}, which wraps other tensors; "
        "leave flags out, or call linear_relu on the tensors inside"
    )
