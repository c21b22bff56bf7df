"""How instructions are written down: a decorator that registers them, and how they read and write registers.

A decorated function gets an Instruction, once, and returns what runs it: a function of a machine and a mask. What it
does not know it refuses, by `Instruction.require`.
"""

from __future__ import annotations

import re

import numpy as np

from .parser import Address, Immediate, Register
from .values import U64, UNSIGNED

INSTRUCTIONS = {}


def instruction(*names):
    """Registers a function for instructions by what stands before the first dot."""

    def register(function):
        INSTRUCTIONS.update(dict.fromkeys(names, function))
        return function

    return register


def decode(program) -> None:
    """Give each instruction of a program what runs it."""
    for i in program.code:
        i.require(i.parts[0] in INSTRUCTIONS)
        i.run = INSTRUCTIONS[i.parts[0]](i)


def reader(operand, width):
    """A function of the machine that gives an operand's bits."""
    if isinstance(operand, Register):
        if operand.width not in (1, width):
            raise NotImplementedError(f"a register of {operand.width} bits as {width}")
        index = operand.index
        return lambda machine: machine.registers[index]
    if isinstance(operand, Immediate):
        bits = np.bool_(operand.bits != 0) if width == 1 else UNSIGNED[width](operand.bits & ((1 << width) - 1))
        return lambda machine: bits
    if isinstance(operand, str) and operand[0] == "%":
        return lambda machine: machine.special[operand]
    if isinstance(operand, str) and re.match(r"\w+_param_\d+$", operand):
        return lambda machine: U64(machine.symbols[operand])
    raise NotImplementedError(f"operand {operand}")


def readers(operands, width):
    return [reader(operand, width) for operand in operands]


def address_reader(address, width):
    """As reader, of an address."""
    if not isinstance(address, Address):
        raise NotImplementedError(f"address {address}")
    base, offset = reader(address.base, width), UNSIGNED[width](address.offset & ((1 << width) - 1))
    return lambda machine: base(machine) + offset


def all_lanes(values, machine):
    """A register's value with one entry for each thread."""
    return np.broadcast_to(values, machine.n)


def write(machine, register, values, mask) -> None:
    """Of the threads that take part; None is nowhere."""
    if register is not None:
        i = register.index
        machine.registers[i] = values if mask is None else np.where(mask, values, machine.registers[i])


def elementwise(i, f, *gets):
    """What runs an instruction that writes f of its operands' bits to its first operand."""
    target = i.operands[0]
    if len(gets) == 1:
        (a,) = gets
        return lambda machine, mask: write(machine, target, f(a(machine)), mask)
    if len(gets) == 2:
        a, b = gets
        return lambda machine, mask: write(machine, target, f(a(machine), b(machine)), mask)
    return lambda machine, mask: write(machine, target, f(*(get(machine) for get in gets)), mask)
