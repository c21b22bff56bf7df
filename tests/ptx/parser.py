"""Reads a kernel's PTX: registers, parameters, and instructions in basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .values import WIDTHS

SHARED_BASE = 1024  # the address at which a block's shared memory begins


class Register(NamedTuple):
    index: int
    width: int


class Immediate(NamedTuple):
    bits: int


class Address(NamedTuple):
    """[base + offset]; the base is a register, a number, or a parameter's name."""

    base: Any
    offset: int


class Box(NamedTuple):
    """[tensor map, {column, row}]: where a bulk copy reads or writes."""

    tensor_map: Any
    coordinates: list[Any]


class Parameter(NamedTuple):
    name: str
    kind: str
    alignment: int  # of what a pointer points to
    size: int  # bytes, of a parameter that is an array


@dataclass
class Instruction:
    """One line. Operands are registers, numbers, addresses, lists of these, None for "_", or other words."""

    line: int
    text: str
    operation: str
    operands: list[Any]
    predicate: tuple[int, bool] | None = None  # a register's index, and whether it must be false
    run: Any = field(default=None, repr=False)

    @property
    def parts(self) -> list[str]:
        return self.operation.split(".")

    @property
    def kind(self) -> str:
        """The type at its end."""
        return self.operation.rpartition(".")[2]

    def require(self, condition: bool) -> None:
        """What is emulated of an instruction: the rest is refused."""
        if not condition:
            raise NotImplementedError(f"line {self.line}: {self.text}")


class Block(NamedTuple):
    """Instructions that run one after the other; `end` says what follows: "fall", "branch", "barrier" or "return"."""

    body: list[Instruction]
    end: str
    target: int
    last: Instruction


class Program:
    """A kernel.

    Attributes:
        name: the kernel's.
        parameters: in order.
        threads: in a block.
        widths: of each register, in bits.
        blocks: basic blocks; a branch's target is a place in this list.
        runs: how often each of them ran, by however many threads.
    """

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        head = ptx[ptx.index(".entry") :]
        self.name = re.match(r"\.entry\s+(\w+)", head)[1]
        self.parameters = [
            Parameter(m[4], m[2], int(m[3] or 1), int(m[5] or 0))
            for m in re.finditer(_PARAMETER, head[: head.index(")")], re.M)
        ]
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])
        self.widths: list[int] = []
        self.code: list[Instruction] = []
        self._registers: dict[str, Register] = {}
        self._labels: dict[str, int] = {}
        self._read(ptx, ptx.index("{", ptx.index(".reqntid")) + 1)
        self._make_blocks()
        self.runs = [0] * len(self.blocks)

    def _read(self, ptx: str, start: int) -> None:
        first = ptx[:start].count("\n") + 1
        scope: dict[str, str] = {}  # names that are declared inside braces, as inline assembly does
        depth = scopes = 0
        for number, line in enumerate(ptx[start:].splitlines(), first):
            for statement in _statements(line.split("//")[0].strip()):
                if statement == "{":
                    depth, scopes = depth + 1, scopes + 1
                    scope = {**scope, "": f"@{scopes}"}
                elif statement == "}":
                    if depth == 0:
                        return
                    depth, scope = depth - 1, {}
                elif statement.endswith(":"):
                    self._labels[_label(statement[:-1], scope)] = len(self.code)
                elif statement.startswith(".reg"):
                    self._declare(statement, number, scope)
                elif not statement.startswith("."):
                    self.code.append(self._instruction(statement, number, scope))

    def _declare(self, statement: str, number: int, scope: dict[str, str]) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement).groups()
        for name in map(str.strip, names.split(",")):
            many = re.match(r"(%\w+?)<(\d+)>$", name)
            if many is None:
                scope[name] = f"{name}@{number}"
            for full in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [scope[name]]:
                self._registers[full] = Register(len(self.widths), WIDTHS[kind])
                self.widths.append(WIDTHS[kind])

    def _instruction(self, text: str, number: int, scope: dict[str, str]) -> Instruction:
        predicate, rest = None, text
        if m := re.match(r"@(!?)(\S+)\s+(.*)$", text):
            predicate, rest = (self._registers[scope.get(m[2], m[2])].index, m[1] == "!"), m[3]
        operation, _, operands = rest.replace("\t", " ").partition(" ")
        if operation.partition(".")[0] in ("ld", "st", "atom"):  # Triton 3.8 names the block where .shared means it too
            operation = operation.replace(".shared::cta", ".shared")
        if operation.startswith("bra"):
            return Instruction(number, text, operation, [_label(operands.strip(), scope)], predicate)
        return Instruction(number, text, operation, [self._operand(o, scope) for o in _split(operands)], predicate)

    def _operand(self, text: str, scope: dict[str, str]) -> Any:
        name = scope.get(text, text)
        if name in self._registers:
            return self._registers[name]
        if text[0] == "{":
            return [self._operand(part, scope) for part in _split(text[1:-1])]
        if text[0] == "[":
            inner = text[1:-1].strip()
            if "{" in inner:
                return Box(*(self._operand(part, scope) for part in _split(inner)))
            base, _, offset = map(str.strip, inner.partition("+"))
            return Address(self._operand(base, scope), int(offset or "0", 0))
        if "|" in text:
            return [self._operand(part.strip(), scope) for part in text.split("|")]
        if re.match(r"-?(\d+|0[xX][0-9a-fA-F]+U?)$", text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.match(r"0[fF][0-9A-Fa-f]{8}$|0[dD][0-9A-Fa-f]{16}$", text):
            return Immediate(int(text[2:], 16))
        if text == "global_smem":
            return Immediate(SHARED_BASE)
        return None if text == "_" else text  # a special register, or a parameter

    def _make_blocks(self) -> None:
        leaders = {0}
        for place, i in enumerate(self.code):
            if i.operation.startswith("bra"):
                leaders |= {self._labels[i.operands[0]], place + 1}
            elif i.operation in _ENDS:
                leaders.add(place + 1)
        starts = sorted(place for place in leaders if place < len(self.code))
        place_of = {start: k for k, start in enumerate(starts)}
        self.blocks = []
        for k, (start, stop) in enumerate(zip(starts, [*starts[1:], len(self.code)], strict=True)):
            body = self.code[start:stop]
            last = body[-1]
            end = "branch" if last.operation.startswith("bra") else _ENDS.get(last.operation, "fall")
            target = place_of[self._labels[last.operands[0]]] if end == "branch" else k + 1
            if end in ("barrier", "return"):
                last.require(last.predicate is None and len(last.operands) == (end == "barrier"))
            self.blocks.append(Block(body if end == "fall" else body[:-1], end, target, last))


_ENDS = {"bar.sync": "barrier", "ret": "return", "exit": "return"}
_PARAMETER = (
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr\s+\.global\s+\.align\s+(\d+))?\s+(\w+?)(?:\[(\d+)\])?[,\s]*$"
)


def _label(name: str, scope: dict[str, str]) -> str:
    return name if name[0] == "$" else name + scope.get("", "")


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _statements(line: str):
    """Labels, braces, directives and instructions of one line."""
    while line:
        if m := re.match(r"(\$?\w+:)\s*", line):
            yield m[1]
            line = line[m.end() :]
        elif line[0] in "{}":
            yield line[0]
            line = line[1:].strip()
        elif line[0] == "." and ";" not in line:
            yield line
            return
        else:
            statement, _, line = line.partition(";")
            yield statement.strip()
            line = line.strip()
