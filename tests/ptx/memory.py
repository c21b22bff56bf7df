"""What kernels read and write: the tensors of a launch, and a block's shared memory. Every access is checked."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from .parser import SHARED_BASE
from .values import I64, U8, U16, U32, U64, UNSIGNED

WARP = 32
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
_FIRST = 4096  # the first page is nobody's
_PROCESS = np.ctypeslib.as_array((ctypes.c_uint8 * ((1 << 47) - 2 * _FIRST)).from_address(_FIRST))
_PROCESS = {8: _PROCESS, 16: _PROCESS.view(U16), 32: _PROCESS.view(U32), 64: _PROCESS.view(U64)}  # by width


class Fault(Exception):
    """What a GPU would trap on, or leave undefined."""


def _places(addresses, width):
    """Where this process's memory, as words, has addresses."""
    return ((addresses - U64(_FIRST)) // U64(width // 8)).astype(I64)


def untouched_zeros(count: int, dtype):
    """Zeros that take memory only where they are touched, however many they are."""
    pages = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1), flags=mmap.MAP_PRIVATE | _NORESERVE)
    return np.frombuffer(pages, dtype, count)


class GlobalMemory:
    """The memory that a launch may touch.

    Args:
        spans: (address, bytes) of each tensor. Those that meet are joined.

    Attributes:
        writer: for each byte, the number of the block that wrote it, from 1 on; 0 where nobody did.
    """

    def __init__(self, spans) -> None:
        joined: list[list[int]] = []
        for start, size in sorted((int(start), int(size)) for start, size in spans):
            if size > 0 and joined and start <= joined[-1][1] - 1:
                joined[-1][1] = max(joined[-1][1], start + size)
            elif size > 0:
                joined.append([start, start + size])
        sizes = [end - start for start, end in joined]
        self.spans = joined
        self._starts = np.array([start for start, _ in joined], U64)
        self._ends = np.array([end for _, end in joined], U64)
        self._bases = np.cumsum([0, *sizes])[:-1].astype(U64)
        self.writer = untouched_zeros(sum(sizes), np.int32)

    def shadow(self, addresses):
        """Where `writer` has addresses."""
        span = np.searchsorted(self._starts, addresses, "right") - 1
        return (addresses - self._starts[span] + self._bases[span]).astype(I64)

    def check(self, addresses, size, what, where) -> None:
        """Raise unless each access of `size` bytes is aligned and lies in one tensor."""
        if addresses.size == 0:
            return
        if (bad := addresses % U64(size) != 0).any():
            raise Fault(f"misaligned {what} of {size} bytes at {int(addresses[bad][0]):#x}: {where}")
        span = np.searchsorted(self._starts, addresses, "right").astype(I64) - 1
        bad = span < 0
        if len(self.spans) > 0:
            bad |= addresses + U64(size) > self._ends[np.maximum(span, 0)]
        if bad.any():
            address = int(addresses[bad][0])
            near = min(self.spans, key=lambda s: min(abs(address - s[0]), abs(address - s[1])), default=(0, 0))
            raise Fault(
                f"{what} of {size} bytes out of bounds at {address:#x} by {int(bad.sum())} lanes (nearest tensor "
                f"[{near[0]:#x}, {near[1]:#x})): {where}"
            )

    def load(self, addresses, width, count, blocks, where):
        """`count` words of `width` bits at each address. blocks: the number of each lane's block."""
        self.check(addresses, width * count // 8, "load", where)
        writer = self.writer[self.shadow(addresses)]
        if ((writer != 0) & (writer != blocks + 1)).any():
            raise Fault(f"reads what another block of this launch wrote: {where}")
        places = _places(addresses, width)
        return [_PROCESS[width][places + i] for i in range(count)]

    def store(self, addresses, words, width, blocks, where) -> None:
        """As load; of lanes that store to one address, all must store the same."""
        size = width * len(words) // 8
        self.check(addresses, size, "store", where)
        shadow, numbers = self.shadow(addresses), (blocks + 1).astype(np.int32)
        writer = self.writer[shadow]
        if ((writer != 0) & (writer != numbers)).any():
            raise Fault(f"writes what another block of this launch wrote: {where}")
        for byte in range(size):
            self.writer[shadow + byte] = numbers
        _, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        if len(first) < len(addresses) and any((v[first][inverse] != v).any() for v in (*words, numbers)):
            raise Fault(f"several writers of one address, with different values: {where}")
        places = _places(addresses, width)
        for i, word in enumerate(words):
            _PROCESS[width][places + i] = word

    def or_into(self, addresses, words, where):
        """The words at addresses before each was or-ed with its own, one lane after the other."""
        self.check(addresses, 4, "atomic", where)
        memory, before = _PROCESS[32], np.zeros(len(addresses), U32)
        for lane, (place, word) in enumerate(zip(_places(addresses, 32), words, strict=True)):
            before[lane] = memory[place]
            memory[place] |= word
        return before

    def load_bytes(self, addresses, where):
        """Of a bulk copy."""
        self.check(addresses, 1, "bulk load", where)
        return _PROCESS[8][_places(addresses, 8)]

    def store_bytes(self, addresses, values, block, where) -> None:
        """Of a bulk copy: of what nobody wrote before."""
        self.check(addresses, 1, "bulk store", where)
        shadow = self.shadow(addresses)
        if self.writer[shadow].any():
            raise Fault(f"a bulk copy writes what was written: {where}")
        self.writer[shadow] = block + 1
        _PROCESS[8][_places(addresses, 8)] = values


class SharedMemory:
    """The shared memory of some blocks, side by side. It starts as garbage. Kept for every two bytes:

    Attributes:
        known: whether it was ever written.
        wrote, read: the warps that did since the last barrier, as bits.
        unfenced: whether threads wrote it and no fence has made that visible to bulk copies.
    """

    lane_order: str | None = None  # "first" or "last": of lanes that store different values to one place, who stays

    def __init__(self, blocks: int, size: int, seed: int) -> None:
        self.blocks, self.size = blocks, (size + 15) // 16 * 16
        self.bytes = np.random.default_rng(seed).integers(0, 256, blocks * self.size, dtype=U8)
        self.known = np.zeros(blocks * self.size // 2, bool)
        self.unfenced = np.zeros_like(self.known)
        self.wrote = np.zeros(len(self.known), U32)
        self.read = np.zeros_like(self.wrote)

    def words(self, width):
        return self.bytes.view(UNSIGNED[width])

    def synchronize(self, blocks) -> None:
        """Threads of these blocks (a mask) have met at a barrier."""
        if self.size:
            self.wrote.reshape(self.blocks, -1)[blocks] = 0
            self.read.reshape(self.blocks, -1)[blocks] = 0

    def fence(self, blocks) -> None:
        self.unfenced.reshape(self.blocks, -1)[blocks] = False

    def locate(self, addresses, size, blocks, what, where):
        """Where the bytes of lanes' blocks have addresses, checked. blocks: each lane's, counted from 0."""
        offsets = addresses.astype(I64) - SHARED_BASE
        if ((offsets < 0) | (offsets + size > self.size)).any():
            raise Fault(f"shared {what} out of bounds: {offsets.min()}..{offsets.max()} of {self.size}: {where}")
        if (offsets % size != 0).any():
            raise Fault(f"misaligned shared {what}: {where}")
        return offsets + blocks * self.size

    def mark_read(self, places, size, warps, where) -> None:
        """Note a read of `size` bytes by each lane. warps: each lane's bit."""
        for cell in self._cells(places, size):
            if not self.known[cell].all():
                raise Fault(f"reads shared memory that nobody wrote: {where}")
            if (self.wrote[cell] & ~warps).any():
                raise Fault(f"race: reads what another warp wrote since the last barrier: {where}")
            np.bitwise_or.at(self.read, cell, warps)

    def mark_write(self, places, size, warps, where) -> None:
        for cell in self._cells(places, size):
            if ((self.wrote[cell] | self.read[cell]) & ~warps).any():
                raise Fault(f"race: writes what another warp touched since the last barrier: {where}")
            np.bitwise_or.at(self.wrote, cell, warps)
            self.known[cell] = self.unfenced[cell] = True

    @staticmethod
    def _cells(places, size):
        return [places // 2 + i for i in range(max(size // 2, 1))]

    def load(self, places, width, count):
        memory, index = self.words(width), places // (width // 8)
        return [memory[index + i] for i in range(count)]

    def store(self, places, words, width, where) -> None:
        memory, index = self.words(width), places // (width // 8)
        _, first, inverse = np.unique(places, return_index=True, return_inverse=True)
        if len(first) < len(places) and any((v[first][inverse] != v).any() for v in words):
            if self.lane_order is None:
                raise Fault(f"several writers of one shared address, with different values: {where}")
            if self.lane_order == "first":  # numpy lets the last one stay
                index, words = index[::-1], [v[::-1] for v in words]
        for i, word in enumerate(words):
            memory[index + i] = word
