"""A checksum of a tensor's contents that no device, memory format or order of reading can change.

It is a sum over elements, so that the parts of a tensor can be summed apart and added up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = {"cpu": 1 << 14}  # elements: scratch stays in the cache, and below what torch splits over threads
_CHUNK_ELSEWHERE = 1 << 23
_MASK64 = (1 << 64) - 1

# SplitMix64 (Steele, Lea and Flood 2014): increment, multipliers and shifts.
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def content_sum(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's elements, bit by bit, in row-major order.

    Args:
        tensor: any shape, strides and device, any dtype whose elements have 1, 2, 4 or 8 bytes, or complex ones.
            -0 and 0 differ, as do NaNs of different bits.

    Returns:
        The sum, modulo 2**64, of mix(word + index * 0x9E3779B97F4A7C15) over all elements: `word` is the element's
        bits read as a signed integer, `index` its row-major index (of a complex tensor: that of the part, real parts
        first), mix SplitMix64's finaliser. An empty tensor gives 0.

    Raises:
        NotImplementedError: for a tensor that holds no elements of its own: on the meta device, or not strided.

    Source:
        G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Example:
        >>> import torch
        >>> from initlab.kernels import content_sum
        >>> x = torch.arange(6.0).view(2, 3)
        >>> content_sum(x) == content_sum(x.t().contiguous().t())  # the memory format does not matter
        True
        >>> content_sum(x) == content_sum(x.t())  # the order of the elements does
        False
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        raise NotImplementedError(
            f"a tensor on {tensor.device} of layout {tensor.layout} holds no dense values to digest; "
            "materialise it first, or digest its dense values"
        )
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.numel() == 0:
        return 0
    tensor = tensor.resolve_neg()
    integer = _INTEGER[tensor.element_size()]
    chunk = min(_CHUNK.get(tensor.device.type, _CHUNK_ELSEWHERE), tensor.numel())
    with torch.no_grad():
        steps = torch.arange(chunk, dtype=torch.int64, device=tensor.device).mul_(_signed(_GAMMA))
        x, shifted = torch.empty_like(steps), torch.empty_like(steps)
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for start, flat in _pieces(tensor, 0, chunk):
            for at in range(0, flat.numel(), chunk):
                words = flat[at : at + chunk].view(integer)
                n = words.numel()
                torch.add(steps[:n], words, out=x[:n])
                x[:n].add_(_signed((start + at) * _GAMMA))
                total += _mix(x[:n], shifted[:n]).sum()
    return int(total.item()) & _MASK64


def _pieces(tensor: Tensor, start: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(row-major index of the first element, flat contiguous tensor) of a tensor's parts, copied where they must be."""
    if tensor.is_contiguous():
        yield start, tensor.view(-1)
    elif tensor.numel() <= chunk:
        yield start, tensor.contiguous().view(-1)
    else:
        dim = next(d for d, size in enumerate(tensor.shape) if size > 1)
        each = tensor.numel() // tensor.shape[dim]
        step = max(1, chunk // each)
        for at in range(0, tensor.shape[dim], step):
            part = tensor.narrow(dim, at, min(step, tensor.shape[dim] - at))
            yield from _pieces(part, start + at * each, chunk)


def _mix(x: Tensor, shifted: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place. int64 stands for uint64: products wrap, shifts are masked to be logical."""
    for shift, multiplier in _ROUNDS:
        _xor_shift(x, shift, shifted)
        x.mul_(_signed(multiplier))
    return _xor_shift(x, _LAST_SHIFT, shifted)


def _xor_shift(x: Tensor, shift: int, shifted: Tensor) -> Tensor:
    torch.bitwise_right_shift(x, shift, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))


def _signed(word: int) -> int:
    """The 64 bits of `word` as a two's complement integer."""
    return ((word & _MASK64) ^ (1 << 63)) - (1 << 63)
