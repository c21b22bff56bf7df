"""Runs some blocks of a grid at once: an array holds a register of all their threads.

Threads that stand at the same basic block are a group. The group at the lowest one runs first, which lets structured
branches meet again. An instruction is a function of the machine and of a mask: the threads that take part, None for
all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import scalar  # noqa: F401 - registers its instructions
from .hopper import BulkUnit
from .memory import WARP, Fault, GlobalMemory, SharedMemory
from .parser import Block, Instruction, Program
from .transfers import AsynchronousCopies
from .values import U8, U16, U32, U64

_GARBAGE = {1: np.bool_(True), 8: U8(0xA5), 16: U16(0xA5A5), 32: U32(0xA5A5A5A5), 64: U64(0xA5A5A5A5A5A5A5A5)}
_MOST_STEPS = 100_000  # basic blocks: more of them, and the kernel does not end


class Machine:
    """Some blocks at work on a program.

    Args:
        program: the kernel.
        numbers: of the blocks, in the grid.
        grid: blocks in x, y and z.
        parameters: by name, (bits, width); a tensor map has width 0.
        shared_bytes: of shared memory that a block has.
        memory: what they may touch.
        seed: of what shared memory holds at first.

    Attributes:
        lane: the threads, counted through all blocks.
        thread: their numbers within their blocks.
        block: of each thread, its block's place among `numbers`.
        registers: arrays of all threads, or scalars where all hold the same. Never written in place: moves alias.
    """

    def __init__(
        self, program: Program, numbers: Sequence[int], grid: tuple[int, int, int], parameters: dict,
        shared_bytes: int, memory: GlobalMemory, seed: int = 0,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.parameters = program, memory, parameters
        self.numbers = np.array(numbers, np.int64)
        self.blocks, self.n = len(numbers), len(numbers) * program.threads
        self.lane = np.arange(self.n)
        self.thread = (self.lane % program.threads).astype(U32)
        self.block = self.lane // program.threads
        self.warp_bit = U32(1) << (self.thread // U32(WARP))
        self.live = np.ones(self.n, bool)
        self.registers = [_GARBAGE[width] for width in program.widths]
        self.special = self._special(grid)
        self.shared = SharedMemory(self.blocks, shared_bytes, seed)
        self.copies = AsynchronousCopies(self)
        self.bulk = BulkUnit(self)
        # A parameter that is a tensor map has an address, at which nothing can be read.
        maps = [name for name, (_, width) in parameters.items() if width == 0]
        self.symbols = {name: 0x7FFF00000000 + 256 * i for i, name in enumerate(maps)}
        self.maps = {self.symbols[name]: parameters[name][0] for name in maps}

    def _special(self, grid):
        x, y, _ = grid
        places = {"x": self.numbers % x, "y": self.numbers // x % y, "z": self.numbers // (x * y)}
        special = {f"%ctaid.{axis}": at.astype(U32)[self.block] for axis, at in places.items()}
        special |= {f"%nctaid.{axis}": U32(size) for axis, size in zip("xyz", grid, strict=True)}
        special |= {"%tid.x": self.thread, "%tid.y": U32(0), "%tid.z": U32(0), "%ntid.x": U32(self.program.threads)}
        return special | {"%laneid": self.thread % U32(WARP), "%warpid": self.thread // U32(WARP)}

    def where(self, instruction: Instruction) -> str:
        return f"{self.program.name}, line {instruction.line}: {instruction.text}"

    def taking_part(self, mask):
        """The threads of a mask, as numbers."""
        return self.lane if mask is None else np.flatnonzero(mask)

    def as_mask(self, mask):
        return np.ones(self.n, bool) if mask is None else mask

    def spread(self, values, mask):
        """Values of the threads that take part, as a register."""
        if mask is None:
            return values
        whole = np.zeros(self.n, values.dtype)
        whole[mask] = values
        return whole

    def need_whole_warps(self, mask, instruction, what="not all threads of a warp take part") -> None:
        if mask is not None:
            count = mask.reshape(-1, WARP).sum(1)
            if ((count != 0) & (count != WARP)).any():
                raise Fault(f"{what}: {self.where(instruction)}")

    # ------------------------------------------------------------------------------------------------------------
    # Control flow

    def run(self) -> None:
        """Until every thread has returned."""
        with np.errstate(all="ignore"):
            groups = {0: None}  # by basic block: a mask
            waiting: list[tuple[int, np.ndarray | None]] = []
            steps = 0
            while groups or waiting:
                if not groups:
                    self._release(waiting, groups)
                    waiting = []
                k = min(groups)
                mask = groups.pop(k)
                block = self.program.blocks[k]
                self.program.runs[k] += 1
                if (steps := steps + 1) > _MOST_STEPS:
                    raise Fault(f"{self.program.name} does not end")
                for instruction in block.body:
                    self._execute(instruction, mask)
                if block.end == "return":
                    self.live &= ~self.as_mask(mask)
                elif block.end == "barrier":
                    self.need_whole_warps(mask, block.last, "a barrier in a divergent warp")
                    waiting.append((k + 1, mask))
                else:
                    for target, part in self._branch(block, k, mask):
                        _join(groups, target, part)
            self.bulk.finish()

    def _execute(self, instruction: Instruction, mask) -> None:
        if instruction.predicate is not None:
            holds = self._holds(instruction.predicate)
            if holds.ndim == 0:
                if not holds:
                    return
            else:
                mask = holds if mask is None else holds & mask
                if not mask.any():
                    return
                mask = None if mask.all() else mask
        instruction.run(self, mask)

    def _holds(self, predicate):
        index, negated = predicate
        value = np.asarray(self.registers[index])
        return ~value if negated else value

    def _branch(self, block: Block, k: int, mask):
        """(basic block, mask) of where threads go on."""
        if block.end == "fall" or block.last.predicate is None:
            return [(block.target, mask)]
        holds = self._holds(block.last.predicate)
        if holds.ndim == 0:
            return [(block.target if holds else k + 1, mask)]
        parts = [(block.target, holds), (k + 1, ~holds)]
        parts = [(target, part if mask is None else part & mask) for target, part in parts]
        return [(target, part) for target, part in parts if part.any()]

    def _release(self, waiting, groups) -> None:
        """All live threads of a block have come to a barrier."""
        at = np.full(self.n, -1)
        for k, mask in waiting:
            at[(self.live if mask is None else mask)] = k
        for place in at.reshape(self.blocks, -1):
            if len(set(place[place >= 0])) > 1:
                raise Fault(f"{self.program.name}: threads of a block wait at different barriers")
        met = (at >= 0).reshape(self.blocks, -1).any(1)
        self.shared.synchronize(met)
        self.bulk.synchronize(met)
        for k, mask in waiting:
            _join(groups, k, mask)


def _join(groups, k: int, mask) -> None:
    if k in groups:
        other = groups[k]
        mask = None if mask is None or other is None else mask | other
    groups[k] = None if mask is not None and mask.all() else mask
