"""Executes a launch: packs the parameters, finds out what the kernel may touch, and runs the grid's blocks."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from .driver import Launch
from .hopper import TensorMap
from .machine import Machine
from .memory import Fault, GlobalMemory
from .operands import decode
from .parser import Program
from .values import WIDTHS

THREADS_AT_ONCE = 4096
backward = False  # whether the last block runs first
only: Collection[int] | None = None  # blocks that run, of a grid that is too large to run all
edit = None  # a function of a kernel's name and PTX that returns other PTX: to break kernels on purpose

_programs: dict[str, Program] = {}


def program_of(ptx: str) -> Program:
    """Parsed and decoded once."""
    if ptx not in _programs:
        program = Program(ptx)
        decode(program)
        _programs[ptx] = program
    return _programs[ptx]


def programs() -> list[Program]:
    """All that were launched so far."""
    return list(_programs.values())


def execute(launch: Launch) -> None:
    """Run a launch to its end."""
    ptx = launch.ptx if edit is None else edit(launch.name, launch.ptx)
    program = program_of(ptx)
    if program.threads != launch.threads:
        raise Fault(f"{launch.name} is made for {program.threads} threads, and launched with {launch.threads}")
    parameters, spans = _packed(launch, program)
    memory = GlobalMemory(spans)
    count = launch.grid[0] * launch.grid[1] * launch.grid[2]
    numbers = list(range(count)) if only is None else sorted(n for n in only if n < count)
    if backward:
        numbers.reverse()
    at_once = max(1, THREADS_AT_ONCE // program.threads)
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once]
        Machine(program, some, launch.grid, parameters, launch.shared_bytes, memory, seed=start).run()


def _packed(launch: Launch, program: Program):
    """(parameters as bits and widths, spans of memory)."""
    if len(program.parameters) != len(launch.arguments):
        raise Fault(f"{launch.name} has {len(program.parameters)} parameters, not {len(launch.arguments)}")
    parameters, spans = {}, []
    for parameter, argument in zip(program.parameters, launch.arguments, strict=True):
        if argument.kind == "nvTmaDesc":
            parameters[parameter.name] = (argument.value, 0)
            spans.append(_span_of_map(argument.value, launch.name))
            continue
        width = WIDTHS[parameter.kind]
        if width != int(argument.kind.lstrip("iufp")):
            raise Fault(f"{launch.name}: {parameter.name} is {parameter.kind}, and given as {argument.kind}")
        if argument.kind[0] == "f":
            bits = int(np.array(argument.value, f"<f{width // 8}").view(f"<u{width // 8}"))
        else:
            bits = argument.value & ((1 << width) - 1)
        if argument.tensor is not None:
            if bits % parameter.alignment:
                raise Fault(f"{launch.name}: {parameter.name} must be a multiple of {parameter.alignment}: {bits:#x}")
            spans += [span_of(argument.tensor), *getattr(argument.tensor, "pointees", ())]
        parameters[parameter.name] = (bits, width)
    return parameters, spans


def span_of(tensor) -> tuple[int, int]:
    """(address, bytes) from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _span_of_map(tensor_map: TensorMap, name: str) -> tuple[int, int]:
    """Also what cuTensorMapEncodeTiled would refuse."""
    row = tensor_map.strides[0] * tensor_map.element_size
    if tensor_map.address % 16 or row % 16 or not all(0 < size <= 256 for size in tensor_map.box):
        raise Fault(f"{name}: a tensor map of {tensor_map}")
    last = (tensor_map.shape[0] - 1) * tensor_map.strides[0] + tensor_map.shape[1]
    return tensor_map.address, last * tensor_map.element_size
