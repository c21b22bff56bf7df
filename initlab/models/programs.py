"""Values that no distribution describes: the operators that computed them, run again with keyed random numbers.

While a model is built, each operator that writes is a `Call`, and its operands are the nodes of what they held. A
`Program` is what one tensor comes from, in order, as plain data: it can be pickled, and needs neither the model nor its
code. Random numbers are those of docs/stream.md, section 9; all else is torch's own, on the CPU, in one thread.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from initlab.kernels import Constant, Distribution, Draw, fill_, named_key

from .memory import Layout

LIMIT = 1 << 26  # elements of the largest tensor on the way to a computed value: 256 MiB in float32


def call_key(seed: int, name: str, n: int) -> int:
    """The key of the n-th random call, from 0, of what is computed for the parameter `name`: docs/stream.md, section 9.

    Example:
        >>> from initlab.models.programs import call_key
        >>> hex(call_key(0, "conv.weight", 0))
        '0x4965eb36893045e'
    """
    return named_key(seed, f"{name}\0{n}")


@dataclass(eq=False, slots=True)
class Unknown:
    """Values that cannot be computed again, and why."""

    why: str


@dataclass(eq=False, slots=True)
class Literal:
    """Data that were there."""

    tensor: Tensor


@dataclass(eq=False, slots=True)
class Filled:
    """A tensor filled from one distribution by random call number `draw`; a constant, and empty memory, by none."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    distribution: Distribution | None
    draw: int = 0


@dataclass(eq=False, slots=True)
class Call:
    """A call of an operator. Its value is a list: the tensors that it writes to, then those that it returns.

    Args:
        func: the operator.
        args: its arguments, with nodes in the places of tensors.
        kwargs: likewise.
        draw: the number of the random call, where torch's own sampling makes its numbers; 0 where it draws none.
        generator: of the code's own; None for torch's default one.
    """

    func: Any
    args: Any
    kwargs: dict[str, Any]
    draw: int = 0
    generator: "Stream | None" = None


@dataclass(eq=False, slots=True)
class Picked:
    """One of the tensors of a call."""

    call: Call
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False, slots=True)
class Read:
    """A tensor that lies over several writes to its memory, oldest first."""

    layout: Layout
    dtype: torch.dtype
    writes: tuple[tuple[Layout, torch.dtype, "Node"], ...]


@dataclass(eq=False, slots=True)
class Stream:
    """A generator of the code's own: its state, and the call that it served before, where the state does not tell."""

    state: Tensor
    before: Call | None = None


@dataclass(frozen=True, slots=True)
class Nested:
    """What another program computes."""

    program: "Program"
    shape: tuple[int, ...]
    dtype: torch.dtype


Node: TypeAlias = Unknown | Literal | Filled | Picked | Read | Nested


@dataclass(frozen=True, slots=True)
class Arg:
    """In the arguments of an instruction: the value of an earlier one."""

    index: int


@dataclass(frozen=True, slots=True)
class Fill:
    """Fill a new tensor by the n-th random call of the parameter `owner`; without one, by a constant or not at all."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    distribution: Distribution | None
    owner: str = ""
    n: int = 0


@dataclass(frozen=True, slots=True)
class Data:
    """Data that were there."""

    tensor: Tensor

    def __repr__(self) -> str:
        return f"Data({self.tensor.dtype}, {tuple(self.tensor.shape)})"


@dataclass(frozen=True, slots=True)
class Operator:
    """Call an operator; with an owner, torch samples from its default generator, seeded by that random call's key."""

    name: str
    args: Any
    kwargs: dict[str, Any]
    owner: str = ""
    n: int = 0
    state: Tensor | None = field(default=None, repr=False)
    before: int | None = None


@dataclass(frozen=True, slots=True)
class Pick:
    """One of the tensors that an operator wrote or returned."""

    source: int
    index: int


@dataclass(frozen=True, slots=True)
class Assemble:
    """Lay values over each other in memory, and read a tensor from there."""

    layout: Layout
    dtype: torch.dtype
    writes: tuple[tuple[Layout, torch.dtype, int], ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """The start of another parameter of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


Instruction: TypeAlias = Fill | Data | Operator | Pick | Assemble | Parameter | Nested


@dataclass(frozen=True)
class Program:
    """How the values of one parameter or buffer are computed.

    Args:
        steps: the instructions, each after those whose values it takes; the last gives the tensor.
        elements: of the largest tensor on the way.
    """

    steps: tuple[Instruction, ...]
    elements: int

    @property
    def parameters(self) -> set[str]:
        """Names of the other parameters whose starts it takes."""
        nested = (step.program.parameters for step in self.steps if isinstance(step, Nested))
        return {step.name for step in self.steps if isinstance(step, Parameter)}.union(*nested)

    @property
    def takes_random_numbers(self) -> bool:
        """Whether it has random calls, other than those of parameters whose starts it takes."""
        return any(
            step.program.takes_random_numbers if isinstance(step, Nested) else bool(getattr(step, "owner", ""))
            for step in self.steps
        )

    def run(self, key_of: Callable[[str, int], int], start_of: Callable[[Parameter], Tensor]) -> Tensor:
        """Compute the values, on the CPU, in one thread.

        Args:
            key_of: the key of the n-th random call of a parameter.
            start_of: the start of another parameter.

        Returns:
            A tensor in main memory, of the shape and dtype that the code gave it.
        """
        last = self._last_uses()
        values: list[Any] = []
        with _one_thread(), torch.inference_mode(False), torch.no_grad():
            for index, step in enumerate(self.steps):
                values.append(_value(step, values, key_of, start_of))
                for done in last.get(index, ()):
                    values[done] = None  # its memory
        value: Tensor = values[-1]
        return value

    def _last_uses(self) -> dict[int, list[int]]:
        """By instruction: those whose values nobody needs after it."""
        last: dict[int, int] = {}
        for index, step in enumerate(self.steps):
            for used in _used(step):
                last[used] = index
        found: dict[int, list[int]] = {}
        for used, index in last.items():
            found.setdefault(index, []).append(used)
        return found


def _used(step: Instruction) -> list[int]:
    if isinstance(step, Operator):
        found = [leaf.index for leaf in tree_leaves((step.args, step.kwargs), _is_arg) if isinstance(leaf, Arg)]
        return found if step.before is None else [*found, step.before]
    if isinstance(step, Pick):
        return [step.source]
    return [index for _, _, index in step.writes] if isinstance(step, Assemble) else []


def _is_arg(x: Any) -> bool:
    return isinstance(x, Arg)


def _value(
    step: Instruction,
    values: Sequence[Any],
    key_of: Callable[[str, int], int],
    start_of: Callable[[Parameter], Tensor],
) -> Any:
    if isinstance(step, Fill):
        tensor = torch.empty(step.shape, dtype=step.dtype, device="cpu")
        if isinstance(step.distribution, Constant):
            tensor.fill_(step.distribution.value)
        elif step.distribution is not None:
            fill_([Draw(tensor, step.distribution, key_of(step.owner, step.n))])
        return tensor
    if isinstance(step, Data):
        return step.tensor
    if isinstance(step, Parameter):
        return start_of(step)
    if isinstance(step, Nested):
        return step.program.run(key_of, start_of)
    if isinstance(step, Pick):
        return values[step.source][0][step.index]
    if isinstance(step, Assemble):
        return assembled(step.layout, step.dtype, [(where, t, values[i]) for where, t, i in step.writes])
    key = key_of(step.owner, step.n) if step.owner else None
    state = step.state if step.before is None else values[step.before][1]
    return _called(step, values, key, state)


def _called(step: Operator, values: Sequence[Any], key: int | None, state: Tensor | None) -> tuple[list[Tensor], Any]:
    """The tensors that an operator writes or returns, and the state of its own generator afterwards."""
    namespace, name, overload = step.name.split("::")[0], *step.name.split("::")[1].rsplit(".", 1)
    func = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    args, kwargs = tree_map(
        lambda x: values[x.index] if isinstance(x, Arg) else x, (step.args, step.kwargs), is_leaf=_is_arg
    )
    args, kwargs = list(args), dict(kwargs)
    for container, place in written_places(func._schema, args, kwargs):
        container[place] = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, container[place])
    written = list(written_tensors(func._schema, args, kwargs))
    if state is not None:
        kwargs["generator"] = torch.Generator(device="cpu")
        kwargs["generator"].set_state(state)
        result = func(*args, **kwargs)
        state = kwargs["generator"].get_state()
    elif key is not None:
        before = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(key)
            result = func(*args, **kwargs)
        finally:
            torch.default_generator.set_state(before)
    else:
        result = func(*args, **kwargs)
    return [*written, *(t for t in tree_leaves(result) if isinstance(t, Tensor))], state


_threads = threading.RLock()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch's, so that sums and factorisations are those of one thread on every machine."""
    with _threads:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def assembled(layout: Layout, dtype: torch.dtype, writes: Sequence[tuple[Layout, torch.dtype, Tensor]]) -> Tensor:
    """The tensor that is read from memory after these writes, oldest first."""
    low = min(layout.offset, *(where.offset for where, _, _ in writes))
    high = max(layout.end, *(where.end for where, _, _ in writes))
    low -= low % 16
    memory = torch.empty(high - low, dtype=torch.uint8, device="cpu")
    for where, kind, value in writes:
        _at(memory, where, kind, low).copy_(value)
    return _at(memory, layout, dtype, low).clone(memory_format=torch.contiguous_format)


def _at(memory: Tensor, layout: Layout, dtype: torch.dtype, low: int) -> Tensor:
    size = memory.numel() // layout.unit * layout.unit
    typed = memory[:size].view(dtype)
    return typed.as_strided(
        layout.shape, [s // layout.unit for s in layout.stride], (layout.offset - low) // layout.unit
    )


def written_places(schema: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(container, key) of the arguments that a call writes to."""
    position = 0
    for argument in schema.arguments:
        container, place = (kwargs, argument.name) if argument.kwarg_only or position >= len(args) else (args, position)
        position += not argument.kwarg_only
        if argument.alias_info is not None and argument.alias_info.is_write and (container is args or place in kwargs):
            yield container, place


def written_tensors(schema: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call writes to."""
    if schema.is_mutable:
        for container, place in written_places(schema, args, kwargs):
            yield from (t for t in tree_leaves(container[place]) if isinstance(t, Tensor))


class Untraceable(Exception):
    """Some of the values that a program needs cannot be computed again; says why."""


def draws_of(node: Node, known: Mapping[int, Parameter]) -> set[int]:
    """The numbers of the random calls behind a node, but for those behind parameters that are known.

    Args:
        node: of a tensor.
        known: by the id of a node, the parameter that starts with its values.
    """
    found = (x for x in _ordered(node, known) if id(x) not in known)
    return {x.draw for x in found if isinstance(x, Filled | Call) and x.draw}


def program_of(node: Node, known: Mapping[int, Parameter], owners: Mapping[int, tuple[str, int]]) -> Program:
    """The program of a node.

    Args:
        node: of a tensor.
        known: by the id of a node, the parameter that starts with its values.
        owners: by the number of a random call, the parameter whose call it is, and how many it had before.

    Raises:
        Untraceable: if values behind it are not known.
    """
    steps: list[Instruction] = []
    place: dict[int, int] = {}
    elements = 0

    def placed(x: Any) -> Any:
        return Arg(place[id(x)]) if isinstance(x, _NODES) else x

    for x in _ordered(node, known):
        if isinstance(x, Unknown):
            raise Untraceable(x.why)
        if id(x) in known:
            place[id(x)] = len(steps)
            steps.append(known[id(x)])
            elements = max(elements, math.prod(known[id(x)].shape))
            continue
        owner, n = owners[x.draw] if isinstance(x, Filled | Call) and x.draw else ("", 0)
        step: Instruction
        if isinstance(x, Filled):
            step = Fill(x.shape, x.dtype, x.distribution, owner, n)
        elif isinstance(x, Literal):
            step = Data(x.tensor)
        elif isinstance(x, Nested):
            step = x
            elements = max(elements, x.program.elements)
        elif isinstance(x, Picked):
            step = Pick(place[id(x.call)], x.index)
        elif isinstance(x, Read):
            if not _is_covered(x):
                raise Untraceable("only a part of it is written")
            writes = tuple((where, dtype, place[id(value)]) for where, dtype, value in x.writes)
            step = Assemble(x.layout, x.dtype, writes)
        else:
            args, kwargs = tree_map(placed, (x.args, x.kwargs), is_leaf=lambda y: isinstance(y, _NODES))
            schema = x.func._schema
            name = f"{schema.name}.{schema.overload_name or 'default'}"
            own = x.generator
            before = None if own is None or own.before is None else place[id(own.before)]
            step = Operator(name, args, kwargs, owner, n, None if own is None else own.state, before)
        if not isinstance(x, Call):
            elements = max(elements, math.prod(_form(x)[0]))
        place[id(x)] = len(steps)
        steps.append(step)
    return Program(tuple(steps), elements)


def _is_covered(read: Read) -> bool:
    """Whether the writes reach every byte that is read."""
    layout = read.layout
    if any(w.is_dense() and w.offset <= layout.offset and layout.end <= w.end for w, _, _ in read.writes):
        return True
    if layout.end - layout.offset > 8 * LIMIT:
        return False

    def bytes_of(where: Layout) -> Layout:
        return Layout(where.offset, (*where.shape, where.unit), (*where.stride, 1), 1)

    low = min(layout.offset, *(where.offset for where, _, _ in read.writes))
    high = max(layout.end, *(where.end for where, _, _ in read.writes))
    reached = torch.zeros(high - low, dtype=torch.uint8, device="cpu")
    for where, _, _ in read.writes:
        _at(reached, bytes_of(where), torch.uint8, low).fill_(1)
    return bool(_at(reached, bytes_of(layout), torch.uint8, low).all())


_NODES = (Unknown, Literal, Filled, Picked, Read, Nested)


def _form(node: Any) -> tuple[tuple[int, ...], torch.dtype]:
    if isinstance(node, Unknown):
        return (), torch.uint8
    if isinstance(node, Literal):
        return tuple(node.tensor.shape), node.tensor.dtype
    if isinstance(node, Read):
        return node.layout.shape, node.dtype
    return node.shape, node.dtype


def _operands(node: Any) -> list[Any]:
    if isinstance(node, Picked):
        return [node.call]
    if isinstance(node, Read):
        return [value for _, _, value in node.writes]
    if isinstance(node, Call):
        leaves = tree_leaves((node.args, node.kwargs), is_leaf=lambda y: isinstance(y, _NODES))
        found = [x for x in leaves if isinstance(x, _NODES)]
        own = node.generator
        return found if own is None or own.before is None else [*found, own.before]
    return []


def _ordered(node: Node, known: Mapping[int, Parameter]) -> Iterator[Any]:
    """The nodes behind a node and itself, operands first; what is known is not looked behind."""
    seen: set[int] = set()
    stack: list[tuple[Any, bool]] = [(node, False)]
    while stack:
        x, done = stack.pop()
        if done:
            yield x
        elif id(x) not in seen:
            seen.add(id(x))
            stack.append((x, True))
            if id(x) not in known:
                stack += [(operand, False) for operand in reversed(_operands(x))]
