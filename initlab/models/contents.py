"""What the storages of a model under construction hold: for each the writes that can still be seen, oldest first.

Writes go by storage and place, not by tensor: a view, a slice, `.data` and a Parameter of a tensor see the same ones.
"""

import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from initlab.kernels import Constant, Distribution

from ..distributed.dtensors import is_dtensor
from .memory import Layout, slice_of
from .programs import Call, Filled, Literal, Node, Picked, Read, Unknown
from .specs import DimSlice, covers

_MANY = 64  # writes to one storage, after which nobody can name a distribution
_TOO_MANY = 2048  # after which nobody follows them
_DATA = 1 << 24  # elements of data that a record keeps, all together
_FEW = 4096  # elements of data that are looked at, to see whether all are equal


@dataclass(frozen=True, slots=True)
class Value:
    """What has been written to a tensor, or to a part of it.

    Args:
        distribution: None if no distribution describes it.
        why: the code that wrote it, or why there is no distribution.
        fan: the connections that the distribution was derived from, where that is known.
        draws: which random numbers it is made of; none for constants. Copies have equal ones.
        path: how the elements were taken from those that were drawn: slices of slices; "?" where the order was lost;
            anything else names arithmetic.
    """

    distribution: Distribution | None
    why: str
    fan: float | None = None
    draws: tuple[int, ...] = ()
    path: tuple[DimSlice | str, ...] = ()


Fills: TypeAlias = tuple[tuple[DimSlice | None, Value], ...]


def whole(value: Value) -> Fills:
    """The fills of a tensor that is one value all over."""
    return ((None, value),)


def computed(why: str) -> Fills:
    """The fills of a tensor that no distribution describes."""
    return whole(Value(None, why))


@dataclass
class _Write:
    layout: Layout
    dtype: torch.dtype
    value: Value
    node: Node


@dataclass
class _Held:
    reference: StorageWeakRef  # keeps the number of a storage that is gone from being given to another
    writes: list[_Write] = field(default_factory=list)
    data: bool = False  # its values were there from the beginning: torch.tensor(...)


def plain(tensor: Tensor) -> Tensor:
    """The tensor whose storage tells what is written: of a DTensor the local one."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


class Contents:
    """What is in which storage."""

    def __init__(self) -> None:
        self.held: dict[int, _Held] = {}
        self.draws = 0
        self.room = _DATA
        self.outside = _OutsideRandomness()

    def new_draw(self) -> tuple[int, ...]:
        """A number for random numbers that are drawn now."""
        self.draws += 1
        return (self.draws,)

    def _entry(self, tensor: Tensor, make: bool) -> _Held | None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, or a wrapper around other tensors
            return None
        found = self.held.get(storage._cdata)
        if found is None and make:
            found = self.held[storage._cdata] = _Held(StorageWeakRef(storage))
        return found

    def is_known(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory was made, or written to, during the recording."""
        return self._entry(plain(tensor), make=False) is not None

    def make(self, tensor: Tensor, data: bool = False) -> None:
        """A tensor was made: without values yet, or with `data` that came from elsewhere."""
        entry = self._entry(plain(tensor), make=True)
        if entry is not None:
            entry.data = data and not entry.writes

    def write(self, tensor: Tensor, fills: Fills, node: Node | None = None) -> None:
        """What a tensor holds from now on: as distributions, and how it is computed."""
        local = plain(tensor)
        entry = self._entry(local, make=True)
        if entry is None:
            return
        try:
            layout = Layout.of(local)
        except RuntimeError:  # nested tensors have no strides
            return
        if local is not tensor and any(part is not None for part, _ in fills):
            fills = computed("a part of a DTensor is written")
        for part, value in fills:
            place = layout.narrow(part)
            if place.numel == 0 and layout.numel > 0:
                continue
            entry.writes = [w for w in entry.writes if not _contains(place, w.layout)]
            entry.writes.append(_Write(place, local.dtype, value, _part(node, part, local, value)))
        if len(entry.writes) > _TOO_MANY:
            size = local.untyped_storage().nbytes() // layout.unit
            everything = Layout(0, (size,), (layout.unit,), layout.unit)
            why = "it is written piece by piece"
            entry.writes = [_Write(everything, local.dtype, Value(None, why), Unknown(why))]

    def copy_storage(self, target: Tensor, source: Tensor) -> bool:
        """All of a storage was copied byte by byte, as copy.deepcopy does; False if that is not what happened."""
        ends = [(Layout.of(t).offset, Layout.of(t).end, t.untyped_storage().nbytes()) for t in (target, source)]
        found, entry = self._entry(source, make=False), self._entry(target, make=True)
        if found is None or entry is None or ends[0] != ends[1] or ends[0][:2] != (0, ends[0][2]):
            return False
        entry.writes, entry.data = list(found.writes), found.data
        return True

    def note_fan(self, tensor: Tensor, fan: float) -> None:
        """What was just written to a tensor was derived from so many connections."""
        fills = self.read(tensor)
        if fills is not None and len(fills) == 1 and not isinstance(fills[0][1].distribution, Constant | None):
            self.write(tensor, whole(replace(fills[0][1], fan=fan)), self.node(tensor))

    def node(self, tensor: Tensor) -> Node:
        """How what a tensor holds is computed."""
        if (
            tensor.is_nested
            or is_dtensor(tensor)
            or tensor.layout != torch.strided
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            return Unknown("it is no plain tensor")
        entry = self._entry(tensor, make=False)
        if entry is None or (entry.data and not entry.writes):
            return self.literal(tensor)
        try:
            layout = Layout.of(tensor)
        except RuntimeError:
            return Unknown("it has no strides")
        found: list[tuple[Layout, torch.dtype, Node]] = []
        for write in reversed(entry.writes):
            if layout.numel and (write.layout.end <= layout.offset or layout.end <= write.layout.offset):
                continue
            if not found and write.layout == layout and write.dtype == tensor.dtype:
                return write.node
            found.append((write.layout, write.dtype, write.node))
            if _contains(write.layout, layout):
                break
        if not found:
            return (
                Filled(tuple(tensor.shape), tensor.dtype, None) if not tensor.numel() else Unknown("nothing wrote it")
            )
        return Read(layout, tensor.dtype, tuple(reversed(found)))

    def literal(self, tensor: Tensor) -> Node:
        """Data, as they are now."""
        if tensor.is_meta:
            return Unknown("it holds data that were on the meta device before")
        if tensor.layout != torch.strided or tensor.numel() > self.room:
            return Unknown(f"it holds more than {_DATA} elements of data")
        if tensor.numel() > 1 and self.outside.has_drawn():
            return Unknown("it holds data, and Python or NumPy have drawn random numbers during the build")
        self.room -= tensor.numel()
        return Literal(tensor.detach().to("cpu", copy=True).contiguous())

    def read(self, tensor: Tensor) -> Fills | None:
        """What a tensor holds; no fills if nothing has been written to it, None if it was made by nobody seen here."""
        local = plain(tensor)
        entry = self._entry(local, make=False)
        if entry is None:
            return None
        if entry.data and not entry.writes:
            return literal(local.detach(), "data")
        try:
            layout = Layout.of(local)
        except RuntimeError:
            return computed("it has no strides")
        if len(entry.writes) > _MANY:
            return computed("it is written piece by piece")
        found: list[tuple[DimSlice | None, Value]] = []
        for write in reversed(entry.writes):
            if layout.numel and (write.layout.end <= layout.offset or layout.end <= write.layout.offset):
                continue
            value = write.value
            if write.dtype != local.dtype and value.distribution != Constant(0.0):
                value = Value(None, "it is written as a tensor of another dtype")
            if _contains(write.layout, layout):
                found.append((None, replace(value, path=(*value.path, *_path(layout, write.layout)))))
                break
            part = slice_of(write.layout, layout)
            if not isinstance(part, DimSlice):
                if _are_apart(write.layout, layout):
                    continue
                pieces = _pieces(entry.writes, layout, local.dtype)
                return pieces or computed(f"{value.why} fills a part of it that is no slice of one dimension")
            found.append((part, value))
        found.reverse()
        if any(value.distribution is None for _, value in found):
            return whole(next(value for _, value in found if value.distribution is None))
        random = next((value for _, value in found if value.draws), None)
        if random is not None and any(n > 1 and s == 0 for n, s in zip(layout.shape, layout.stride, strict=True)):
            return computed(f"{random.why} repeats random numbers")
        if found and not covers(found, layout.shape):
            return computed(f"{found[-1][1].why} writes only a part of it")
        return tuple(found)


def _part(node: Node | None, part: DimSlice | None, tensor: Tensor, value: Value) -> Node:
    """How a part of what is written is computed."""
    if node is None:
        return Unknown(value.why)
    if part is None:
        return node
    shape = (*tensor.shape[: part.dim], part.length, *tensor.shape[part.dim + 1 :])
    call = Call(torch.ops.aten.slice_copy.Tensor, (node, part.dim, part.start, part.start + part.length), {})
    return Picked(call, 0, shape, tensor.dtype)


class _OutsideRandomness:
    """Whether random numbers have been drawn that torch does not know of: data may be made of them."""

    def __init__(self) -> None:
        self.before = self._states()

    def has_drawn(self) -> bool:
        """Whether any have been since the build began."""
        return any(now != then for now, then in zip(self._states(), self.before, strict=False))

    @staticmethod
    def _states() -> tuple[Any, ...]:
        numpy = sys.modules.get("numpy.random")
        if numpy is None:
            return (random.getstate(),)
        kind, keys, *rest = numpy.get_state()
        return random.getstate(), kind, keys.tobytes(), *rest


def _pieces(writes: Sequence[_Write], layout: Layout, dtype: torch.dtype) -> Fills | None:
    """The fills of a tensor that is written piece by piece, all pieces from one distribution; None for any other.

    A fused query, key and value of torchtitan is: for each group of heads three pieces.
    """
    inside = [w for w in writes if w.layout.offset < layout.end and layout.offset < w.layout.end]
    first = inside[0].value
    if first.distribution is None or any(
        w.value.distribution != first.distribution or w.dtype != dtype for w in inside
    ):
        return None
    fits = layout.is_dense() and all(layout.offset <= w.layout.offset and w.layout.end <= layout.end for w in inside)
    if not fits or sum(w.layout.numel for w in inside) != layout.numel:
        return None
    if not all(_are_apart(a.layout, b.layout) for a, b in itertools.combinations(inside, 2)):
        return None
    draws = tuple(draw for w in inside for draw in w.value.draws)
    paths = tuple(step for w in inside for step in w.value.path)
    return whole(replace(first, draws=draws, path=paths))


def literal(tensor: Any, where: str) -> Fills:
    """The fills of a tensor of data, or of numbers from which torch makes one: a constant if all are equal."""
    if isinstance(tensor, bool | int | float | complex):
        return whole(Value(Constant(tensor), where))
    try:
        values = tensor if isinstance(tensor, Tensor) else torch.tensor(tensor, device="cpu")
        if not values.is_meta and 0 < values.numel() <= _FEW:
            first = values.reshape(-1)[0]
            if bool((values == first).all()):
                return whole(Value(Constant(first.item()), where))
    except (RuntimeError, TypeError, ValueError):
        pass
    return computed(f"{where} makes it of data")


def _contains(outer: Layout, inner: Layout) -> bool:
    if outer.is_dense() and outer.offset <= inner.offset and inner.end <= outer.end:
        return True
    return outer.unit == inner.unit and slice_of(inner, outer) is not False


def _path(view: Layout, drawn: Layout) -> Sequence[DimSlice | str]:
    """Which elements of what was drawn a view of it has; nothing if it has all of them, in their order."""
    if view.unit != drawn.unit:
        return ("?",)
    part = slice_of(view, drawn)
    if part is None:
        in_order = (view.is_contiguous() and drawn.is_contiguous()) or (view.shape, view.stride) == drawn[1:3]
        return () if in_order else ("?",)
    return ("?",) if part is False else (part,)


def _are_apart(a: Layout, b: Layout) -> bool:
    """Whether two layouts of one storage share no element: apart, or slices of one matrix, side by side."""
    if a.end <= b.offset or b.end <= a.offset:
        return True
    if a.unit != b.unit:
        return False
    shared = {s for n, s in a.dimensions()} | {s for n, s in b.dimensions()}
    for stride in shared:
        # What lies within one period of the largest stride: [start, end) of both, taken modulo it.
        spans = []
        for layout in (a, b):
            inner = sum((n - 1) * s for n, s in layout.dimensions() if s < stride) + layout.unit
            if any(s % stride for n, s in layout.dimensions() if s >= stride):
                break
            spans.append((layout.offset % stride, layout.offset % stride + inner))
        if len(spans) == 2 and all(end <= stride for _, end in spans):
            (start_a, end_a), (start_b, end_b) = spans
            if end_a <= start_b or end_b <= start_a:
                return True
    return False
