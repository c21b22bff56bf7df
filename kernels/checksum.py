"""A checksum of a tensor's contents that no device, memory format or order of reading can change.

It is a sum over elements, so that the parts of a tensor can be summed apart and added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from . import backends
from .region import Region, StridedRun
from .tensors import INTEGERS, PLAIN, is_freed
from .torch_internals import FakeTensor

_MODULES = {"numba": "._checksum_numba", "triton": None}
_CHUNK = {"cpu": 1 << 14}  # elements: scratch stays in the cache, and below what torch splits over threads
_CHUNK_ELSEWHERE = 1 << 23
_MASK64 = (1 << 64) - 1

# SplitMix64 (Steele, Lea and Flood 2014): increment, multipliers and shifts.
GAMMA = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


def content_sum(tensor: Tensor, region: Region | None = None) -> int:
    """A 64-bit checksum of a tensor's elements, bit by bit, in row-major order.

    Args:
        tensor: any shape, strides and device, any dtype whose elements have 1, 2, 4 or 8 bytes, or complex ones.
            -0 and 0 differ, as do NaNs of different bits.
        region: the block of a logical tensor that `tensor` holds, where it is a part of one: the sums of parts that
            make up the whole, each element once, add up to the sum of the whole, modulo 2**64.

    Returns:
        The sum, modulo 2**64, of mix(word + index * 0x9E3779B97F4A7C15) over all elements: `word` is the element's
        bits read as a signed integer, `index` its row-major index (of a complex tensor: that of the part, real parts
        first), mix SplitMix64's finaliser. An empty tensor gives 0.

    Raises:
        NotImplementedError: for a tensor that holds no plain elements of its own: quantised, nested, of a layout that
            is not strided, on the meta device, fake, or one whose storage was freed.
        ValueError: for a region of another shape than the tensor's.

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
    _check(tensor)
    if region is not None and region.sizes != tensor.shape:
        raise ValueError(f"the tensor's shape is {tuple(tensor.shape)}, its region's sizes are {region.sizes}")
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
        if region is not None:
            region = region.as_real()
    if tensor.numel() == 0:
        return 0
    tensor = tensor.resolve_neg()
    module = backends.load(tensor.device, _MODULES).module
    with torch.no_grad():
        chunk = min(_CHUNK.get(tensor.device.type, _CHUNK_ELSEWHERE), tensor.numel())
        pieces = _pieces(tensor, 0, chunk) if region is None else [(_flat(tensor), region.runs())]
        if module is not None:
            return sum(module.total(flat, runs) for flat, runs in pieces) & _MASK64
        return _total(pieces, tensor, chunk)


def _total(pieces: Iterable[tuple[Tensor, Iterable[StridedRun]]], tensor: Tensor, chunk: int) -> int:
    """The sum in plain torch, of `chunk` elements at a time: the reference."""
    integer = INTEGERS[tensor.element_size()]
    steps = torch.arange(chunk, dtype=torch.int64, device=tensor.device).mul_(_signed(GAMMA))
    x, shifted = torch.empty_like(steps), torch.empty_like(steps)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for flat, runs in pieces:
        for offset, run in _batches(runs, chunk):
            words = flat[offset : offset + run.numel].view(integer).view(run.rows, run.length)
            flat_x = x[: words.numel()]
            torch.add(words, steps[: run.length], out=flat_x.view_as(words))
            if run.rows > 1:
                rows = torch.arange(run.rows, device=x.device).mul_(_signed(run.stride * GAMMA))
                flat_x.view_as(words).add_(rows[:, None])
            flat_x.add_(_signed(run.start * GAMMA))
            total += _mix(flat_x, shifted[: words.numel()]).sum()
    return int(total.item()) & _MASK64


def _check(tensor: Tensor) -> None:
    """Refuse what has no bits to read; reading a quantised tensor's, or a freed storage's, would end the process."""
    if tensor.is_quantized:
        raise NotImplementedError(
            f"a quantised tensor ({tensor.dtype}, {tensor.qscheme()}) has no digest; digest tensor.int_repr() and its "
            "scales and zero points, or tensor.dequantize()"
        )
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        raise NotImplementedError(
            f"a {'fake ' if not tensor.is_meta else ''}tensor on {tensor.device} of layout {tensor.layout} holds no "
            "dense values to digest; materialise it first"
        )
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"a tensor on {tensor.device}"
        raise NotImplementedError(
            f"{kind} of layout {tensor.layout} holds no dense values to digest; digest its parts or its dense values"
        )
    if type(tensor) in PLAIN and is_freed(tensor):
        raise NotImplementedError(
            f"the storage of a tensor of shape {tuple(tensor.shape)} is smaller than its elements: it was freed or "
            "resized, as sharding libraries do between steps; digest it while its values are there"
        )


def _pieces(tensor: Tensor, start: int, chunk: int) -> Iterator[tuple[Tensor, Iterable[StridedRun]]]:
    """A tensor's parts, flat and contiguous, copied where they must be, and which elements of it they are."""
    if tensor.is_contiguous() or tensor.numel() <= chunk:
        yield _flat(tensor), [StridedRun(start, 1, tensor.numel(), 0)]
        return
    dim = next(d for d, size in enumerate(tensor.shape) if size > 1)
    each = tensor.numel() // tensor.shape[dim]
    step = max(1, chunk // each)
    for index in range(0, tensor.shape[dim], step):
        part = tensor.narrow(dim, index, min(step, tensor.shape[dim] - index))
        yield from _pieces(part, start + index * each, chunk)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1)


def _batches(runs: Iterable[StridedRun], chunk: int) -> Iterator[tuple[int, StridedRun]]:
    """Runs cut into pieces of at most `chunk` elements, each with its offset in the flat tensor that they number."""
    offset = 0
    for run in runs:
        rows = max(1, chunk // run.length)
        for row in range(0, run.rows, rows):
            n, first = min(rows, run.rows - row), run.start + row * run.stride
            for column in range(0, run.length, chunk):
                length = min(chunk, run.length - column)
                yield offset, StridedRun(first + column, n, length, run.stride)
                offset += n * length


def _mix(x: Tensor, shifted: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place. int64 stands for uint64: products wrap, shifts are masked to be logical."""
    for shift, multiplier in ROUNDS:
        _xor_shift(x, shift, shifted)
        x.mul_(_signed(multiplier))
    return _xor_shift(x, LAST_SHIFT, shifted)


def _xor_shift(x: Tensor, shift: int, shifted: Tensor) -> Tensor:
    torch.bitwise_right_shift(x, shift, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))


def _signed(word: int) -> int:
    """The 64 bits of `word` as a two's complement integer."""
    return ((word & _MASK64) ^ (1 << 63)) - (1 << 63)
