"""Keys: the 64 bits that decide a tensor's draws, by seed and name or from a generator. docs/stream.md, section 1."""

from __future__ import annotations

import ctypes
import hashlib
import operator
from typing import SupportsIndex

import torch

from ..torch_internals import count_dispatch_modes, is_transforming

STREAM_VERSION = 1

_MASK64 = 0xFFFFFFFFFFFFFFFF


def named_key(seed: SupportsIndex, name: str) -> int:
    """The 64-bit key of the parameter called `name` under `seed`.

    Args:
        seed: any integer in [-2**63, 2**64), also NumPy's or torch's; negative ones mean what they mean to
            torch.manual_seed. A bool is none.
        name: the canonical name, as ``model.named_parameters()`` gives it without wrappers.

    Returns:
        An int in [0, 2**64): BLAKE2b with an 8-byte digest, personalised ``b"initlab.stream.1"``, over the seed as 8
        little-endian bytes (two's complement) and the name in UTF-8; the digest read as a little-endian integer.

    Raises:
        TypeError: if seed is no integer, or name no str.
        ValueError: if the seed does not fit into 64 bits.

    Example:
        >>> from initlab.kernels import named_key
        >>> hex(named_key(0, "transformer.wte.weight"))
        '0x953ff8ca7c069734'
    """
    number = _integer(seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed is {number}; a seed must fit into 64 bits: -2**63 <= seed < 2**64")
    if not isinstance(name, str):
        raise TypeError(
            f"name is {name!r}, a {type(name).__name__}; it must be a str: a parameter's name, "
            "as model.named_parameters() gives it"
        )
    return _digest((number & _MASK64).to_bytes(8, "little") + name.encode())


def _integer(seed: SupportsIndex) -> int:
    # numpy's bool by its name: numpy 1 takes it for an index, with a warning.
    is_bool = type(seed).__name__ in ("bool", "bool_") or (isinstance(seed, torch.Tensor) and seed.dtype == torch.bool)
    try:
        if not is_bool:
            return operator.index(seed)
    except TypeError:
        pass
    raise TypeError(f"seed is {seed!r}, a {type(seed).__name__}; it must be an integer: pass an int, such as 0")


_EMPTY = hashlib.blake2b(digest_size=8, person=b"initlab.stream.%d" % STREAM_VERSION)


def _digest(message: bytes) -> int:
    hashed = _EMPTY.copy()  # half the time of a new one
    hashed.update(message)
    return int.from_bytes(hashed.digest(), "little")


def generator_key(generator: torch.Generator | None = None) -> int:
    """One 64-bit key drawn from a generator: the key of a fill that has no name.

    Args:
        generator: on a CPU, the key is one ``random_(-2**63, None)`` draw of an int64 scalar. On another device it
            is a digest of the generator's seed and offset, and the offset moves on by 4, so nothing synchronises.
            None means torch's default CPU generator, whatever the device of the tensor to fill: equal
            ``torch.manual_seed`` then gives equal weights on every device.

    Returns:
        An int in [0, 2**64).

    Raises:
        TypeError: if generator is neither a torch.Generator nor None.
        NotImplementedError: for a generator that is not on a CPU and has no offset.

    Example:
        >>> import torch
        >>> from initlab.kernels import generator_key
        >>> a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        >>> generator_key(a) == generator_key(b)
        True
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is {generator!r}, a {type(generator).__name__}; it must be a torch.Generator or None: "
            "torch.Generator().manual_seed(seed), or named_key(seed, name) for a key by name"
        )
    if generator is None or generator.device.type == "cpu":
        if _is_watched():
            # The device is given, so that `with torch.device("meta")` does not make the draw vanish.
            draw = torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=generator)
            return int(draw.item()) & _MASK64
        # Taken out of the list meanwhile: threads, and code that a signal runs, have others.
        tensor, number = cell = _cells.pop() if _cells else _new_cell()
        tensor.random_(-(2**63), None, generator=generator)
        key: int = number.value
        _cells.append(cell)
        return key
    try:
        offset = generator.get_offset()
        generator.set_offset(offset + 4)
    except RuntimeError as error:
        raise NotImplementedError(
            f"a generator on {generator.device} has no offset to take a key from; pass a CPU generator, "
            "which serves tensors on every device"
        ) from error
    seed = generator.initial_seed() & _MASK64
    return _digest(b"generator" + seed.to_bytes(8, "little") + offset.to_bytes(8, "little"))


# Scalars to draw keys into, and the same memory as an unsigned integer: to make and read a tensor costs twice the draw.
_cells: list[tuple[torch.Tensor, ctypes.c_uint64]] = []


def _new_cell() -> tuple[torch.Tensor, ctypes.c_uint64]:
    with torch.inference_mode(False):
        tensor = torch.empty((), dtype=torch.int64, device="cpu")
    return tensor, ctypes.c_uint64.from_address(tensor.data_ptr())


def _is_watched() -> bool:
    """Whether a tensor to draw into must be a new one: under torch.compile, a dispatch mode or a transform."""
    return torch.compiler.is_dynamo_compiling() or count_dispatch_modes() > 0 or is_transforming()
