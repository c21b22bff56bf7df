"""What tensors are filled with, as data: slices, fill specs, and the trace of what a model's code writes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from initlab.kernels import Constant, Distribution

if TYPE_CHECKING:
    from .programs import Program

ZEROS, ONES = Constant(0.0), Constant(1.0)


class DimSlice(NamedTuple):
    """Part of a tensor: the elements from `start` to `start + length` of dimension `dim`."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class FillSpec:
    """What a parameter is filled with, and why.

    Args:
        fills: distributions in the order of writing, each of the whole tensor (None) or of a slice of it.
        fan: the number of connections that the distribution was derived from; None if it was derived from none.
        why: what the spec was read from.
        guess: whether it was guessed from names or from the order of modules.
        exact: whether it is what the model's own code does, so that a padding row is zero only where that sets it.
        copy_of: the name whose key it takes, where it starts as a copy of another parameter; empty for its own.
        program: what computes its values, where no distribution describes them; there are no fills then.
        check: whether the values that a parameter has must be ones that it can have made.
        known_as: by the names that the program has for parameters, those of today, where they differ.
        fitted: whether it is scaled to a batch: "always", or only where the parameter turns out to be a layer's weight;
            "never" refuses it there, since a rule of its own, which had nothing for it, has asked for another start.
        orthogonal: whether the draws are replaced by the orthogonal matrix that they make.
    """

    fills: tuple[tuple[DimSlice | None, Distribution], ...]
    fan: float | None = None
    why: str = ""
    guess: bool = False
    exact: bool = False
    copy_of: str = ""
    program: "Program | None" = None
    check: bool = False
    known_as: Mapping[str, str] = field(default_factory=dict)
    fitted: Literal["", "if a weight", "always", "never"] = ""
    orthogonal: bool = False

    @property
    def distribution(self) -> Distribution | None:
        """The distribution of the whole tensor, or of its first slice; None where its values are computed."""
        return self.fills[0][1] if self.fills else None


@dataclass(frozen=True, slots=True)
class Refused:
    """In the place of a spec: a recipe must not fill this parameter, and no other rule may do so instead.

    Args:
        why: the reason, for the message.
    """

    why: str


def covers(fills: Iterable[tuple[DimSlice | None, object]], shape: Sequence[int]) -> bool:
    """Whether fills, in the order of writing, reach all elements of a tensor of this shape."""
    covered: dict[int, list[tuple[int, int]]] = {}
    for part, _ in fills:
        if part is None:
            return True
        covered.setdefault(part.dim, []).append((part.start, part.start + part.length))
    for dim, spans in covered.items():
        reached = 0
        for start, end in sorted(spans):
            reached = max(reached, end) if start <= reached else reached
        if reached == shape[dim]:
            return True
    return False


def computed_spec(program: "Program", why: str, known_as: Mapping[str, str] | None = None) -> FillSpec:
    """The spec of a tensor whose values are computed."""
    return FillSpec((), None, why, exact=True, program=program, known_as=known_as or {})


def whole_fill(distribution: Distribution, why: str, fan: float | None = None, guess: bool = False) -> FillSpec:
    """The spec that fills a whole tensor from one distribution."""
    return FillSpec(((None, distribution),), fan, why, guess)


def constant_fill(value: float, why: str) -> FillSpec:
    """The spec, a guess, that fills a whole tensor with one value."""
    return FillSpec(((None, Constant(value)),), None, why, guess=True)


class InitTrace:
    """What a model's code writes to its tensors: a later write replaces an earlier one, as in the code itself.

    Attributes:
        recorded: by the id of a tensor, the spec found so far.
        unreadable: by the id of a tensor, why no distribution is known for what is written to it.
        ignored: ids of tensors whose writes are not recorded for now.
        writes: by the id of a tensor, how many times it is written.
        failed: (id of a module, name) of the code that did not run to its end.
    """

    def __init__(self) -> None:
        self.recorded: dict[int, FillSpec] = {}
        self.unreadable: dict[int, str] = {}
        self.ignored: frozenset[int] = frozenset()
        self.writes: dict[int, int] = {}
        self.failed: set[tuple[int, str]] = set()

    def copy(self) -> "InitTrace":
        """Another trace that begins with what this one has recorded."""
        trace = InitTrace()
        trace.recorded, trace.unreadable = dict(self.recorded), dict(self.unreadable)
        trace.writes, trace.failed = dict(self.writes), set(self.failed)
        return trace

    def write(
        self,
        tensor: Tensor,
        distribution: Distribution,
        why: str,
        dim_slice: DimSlice | None = None,
        fan: float | None = None,
    ) -> None:
        """Record that `tensor`, or a slice of it, is filled with `distribution`."""
        if dim_slice is None:
            self.write_whole(tensor, whole_fill(distribution, why, fan))
            return
        self.count(tensor)
        if id(tensor) in self.ignored:
            return
        if (before := self.recorded.get(id(tensor))) is not None:
            self.recorded[id(tensor)] = replace(before, fills=(*before.fills, (dim_slice, distribution)), why=why)
        elif id(tensor) not in self.unreadable:
            self.recorded[id(tensor)] = FillSpec(((dim_slice, distribution),), fan, why)

    def write_whole(self, tensor: Tensor, spec: FillSpec) -> None:
        """Record that all of `tensor` is filled by `spec`."""
        self.count(tensor)
        if id(tensor) not in self.ignored:
            self.unreadable.pop(id(tensor), None)
            self.recorded[id(tensor)] = spec

    def give_up(self, tensor: Tensor, why: str) -> None:
        """Record that `tensor` is written in a way that no distribution describes."""
        self.count(tensor)
        if id(tensor) in self.ignored:
            return
        self.recorded.pop(id(tensor), None)
        self.unreadable[id(tensor)] = why

    def count(self, tensor: Tensor, writes: int = 1) -> None:
        """Count writes to a tensor, also those that are ignored."""
        self.writes[id(tensor)] = self.writes.get(id(tensor), 0) + writes

    def complete(self, tensor: Tensor) -> FillSpec | None:
        """The spec of a tensor, if it fills all elements; None otherwise."""
        found = self.recorded.get(id(tensor))
        return found if found is not None and covers(found.fills, tensor.shape) else None
