"""BuildRecord: what a recorded build wrote to each parameter and buffer, by name, and the recipe made of it."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from initlab.kernels import Constant

from ..distributed.dtensors import is_dtensor
from .contents import Contents, Fills, plain
from .memory import Layout
from .naming import TensorRef, class_name, walk
from .programs import LIMIT, Node, Parameter, Untraceable, draws_of, program_of
from .recipe_parts import NamedRecipe, View
from .specs import DimSlice, FillSpec, Refused, computed_spec


@dataclass
class Entry:
    """What a build wrote to one parameter or buffer.

    Args:
        shape: its shape.
        spec: what it was filled with; None if no distribution describes it.
        why: the reason, where there is no spec.
        copies: names of the tensors that hold the same random numbers, itself included; empty for most.
        name: its smallest name in the model that was built.
    """

    shape: tuple[int, ...]
    spec: FillSpec | None
    why: str = ""
    copies: tuple[str, ...] = ()
    name: str = ""


class Found(NamedTuple):
    """A tensor when its build is over: the smallest of its names, and what it holds."""

    tensor: Tensor
    name: str
    fills: Fills | None
    node: Node


class _Built:
    """One model that was built: its entries by name, and the classes of its modules by name."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.classes: dict[str, str] = {}


class BuildRecord:
    """What was written while a model was built: what `record_build()` gives, and a recipe of init_model_.

    Example:
        >>> import torch, initlab
        >>> with initlab.record_build() as build:
        ...     model = torch.nn.Linear(4, 2)
        >>> build
        <record of a build: Linear, 2 parameters and buffers>
    """

    def __init__(self) -> None:
        self._models: list[_Built] = []
        self._known: weakref.WeakKeyDictionary[nn.Module, dict[str, Entry]] = weakref.WeakKeyDictionary()
        self._state = "is still going on: leave its with-block first"

    def __repr__(self) -> str:
        if self._state:
            return f"<record of a build that {self._state}>"
        classes = ", ".join(built.classes[""] for built in self._models)
        count = sum(len(built.entries) for built in self._models)
        return f"<record of a build: {classes or 'no module'}, {count} parameters and buffers>"

    def __getstate__(self) -> dict[str, Any]:
        """Names travel, modules do not: elsewhere, models are told by their names."""
        return self.__dict__ | {"_known": weakref.WeakKeyDictionary()}

    def __reduce__(self) -> Any:
        return _restored, (self._models, self._state)

    def fail(self, error: str) -> None:
        """The block was ended by an exception."""
        self._state = f"was ended by {error}, so that it is not complete"

    def close(self, modules: Iterable[nn.Module], contents: Contents) -> None:
        """The block has ended: enter what the tensors of these modules hold, by name."""
        within = {id(child) for module in modules for child in module.modules() if child is not module}
        found: dict[Any, Found] = {}
        places: list[tuple[_Built, str, nn.Module, str, tuple[int, Any]]] = []
        for root in modules:
            if id(root) in within:
                continue
            built = _Built()
            self._models.append(built)
            for module_name, module in walk(root):
                built.classes[module_name] = class_name(module)
                for tensors in (module._parameters, module._buffers):
                    for attribute, tensor in tensors.items():
                        if tensor is None or torch.nn.parameter.is_lazy(tensor):
                            continue
                        name = f"{module_name}.{attribute}".lstrip(".")
                        place = _place(tensor)
                        before = found.get(place)
                        found[place] = (
                            Found(tensor, name, contents.read(tensor), contents.node(plain(tensor)))
                            if before is None
                            else before._replace(name=min(name, before.name))
                        )
                        places.append((built, name, module, attribute, place))
        entries = entries_of(found)
        for built, name, module, attribute, place in places:
            built.entries[name] = entries[place]
            self._known.setdefault(module, {})[attribute] = entries[place]
        self._state = ""

    def recipe(self) -> NamedRecipe:
        """The recipe that fills parameters as the build did.

        Raises:
            RuntimeError: if the block has not ended, or an exception ended it.
        """
        if self._state:
            raise RuntimeError(f"the recording of this build {self._state}")

        def prepare(view: View) -> Callable[[TensorRef], FillSpec | Refused | None]:
            find = self._finder(view)
            present: dict[int, list[str]] = {}
            known_as: dict[str, str] = {}
            for ref in view.refs:
                found = find(ref)
                if isinstance(found, Entry):
                    known_as[found.name] = ref.name
                    if found.copies:
                        present.setdefault(id(found.copies), []).append(ref.name)
            return lambda ref: _spec(find(ref), ref, present, known_as)

        def prepare_buffers(view: View) -> Callable[[TensorRef], FillSpec | None]:
            find = self._finder(view)

            def choose(ref: TensorRef) -> FillSpec | None:
                spec = _spec(find(ref), ref, {}, {})
                return spec if isinstance(spec, FillSpec) else None

            return choose

        return NamedRecipe("build", prepare, prepare_buffers)

    def _finder(self, view: View) -> Callable[[TensorRef], Entry | str]:
        """What finds the entry of a parameter in the model of a view, or why there is none."""
        names: dict[int, str] = {}
        for name, module in walk(view.model):
            names.setdefault(id(module), name)
        if any(module in self._known for _, module in walk(view.model)):
            return lambda ref: _by_module(self._known, ref)
        table = self._table(view.model, names)

        def by_name(ref: TensorRef) -> Entry | str:
            if isinstance(table, str):
                return table
            name = f"{names[id(ref.module)]}.{ref.attribute}".lstrip(".")
            return _checked(table.get(name), ref)

        return by_name

    def _table(self, model: nn.Module, names: Mapping[int, str]) -> Mapping[str, Entry] | str:
        """The entries of the recorded model, or part of one, that a copy was made of; or why there is none."""
        wanted = [
            (f"{name}.{attribute}".lstrip("."), tuple(tensor.shape))
            for name, module in walk(model)
            for attribute, tensor in module._parameters.items()
            if tensor is not None
        ]
        kind = class_name(next(module for _, module in walk(model)))
        tables: list[Mapping[str, Entry]] = []
        for built in self._models:
            for start, cls in built.classes.items():
                if cls != kind:
                    continue
                prefix = f"{start}." if start else ""
                table = {n[len(prefix) :]: entry for n, entry in built.entries.items() if n.startswith(prefix)}
                if any(name in table and table[name].shape == shape for name, shape in wanted):
                    tables.append(table)
        complete = [t for t in tables if all(name in t and t[name].shape == shape for name, shape in wanted)]
        chosen = complete or tables
        if not chosen:
            return f"no {kind} with parameters of these names and shapes was built during the recording"
        first = [(name, _comparable(chosen[0].get(name))) for name, _ in wanted]
        if any([(name, _comparable(table.get(name))) for name, _ in wanted] != first for table in chosen[1:]):
            return (
                f"several a {kind} fits this model, which is a copy, and they were started differently; record the "
                "build of each in a block of its own"
            )
        return chosen[0]


def _restored(models: list[_Built], state: str) -> BuildRecord:
    record = BuildRecord()
    record._models, record._state = models, state
    return record


def _comparable(entry: Entry | None) -> Any:
    return None if entry is None else (entry.shape, entry.spec and (entry.spec.fills, repr(entry.spec.program)), entry.why)


def _place(tensor: Tensor) -> tuple[int, Any]:
    """The memory of a tensor, by which ties and parameters that are views are told."""
    local = plain(tensor)
    try:
        return local.untyped_storage()._cdata, Layout.of(local)
    except (NotImplementedError, RuntimeError):
        return -id(tensor), None


def _copies(found: Mapping[Any, Found]) -> tuple[dict[Any, tuple[str, ...]], dict[Any, tuple[str, ...]]]:
    """Names of the tensors that are made of the same random numbers, by place.

    Returns:
        (those that are equal, those that share some of their random numbers and are not equal).
    """
    by_draw: dict[int, dict[Any, list[tuple[Any, ...]]]] = {}
    for place, each in found.items():
        for _, value in each.fills or ():
            for draw in value.draws:
                by_draw.setdefault(draw, {}).setdefault(place, []).append(value.path)
    equal: dict[Any, tuple[str, ...]] = {}
    shared: dict[Any, tuple[str, ...]] = {}
    for places in by_draw.values():
        groups: dict[Any, list[Any]] = {}
        for place in places:
            groups.setdefault(_content(found[place]), []).append(place)
        parts = [{path for place in group for path in places[place]} for group in groups.values()]
        names = tuple(found[place].name for place in places)
        lost = len(places) > 1 and any("?" in path for paths in parts for path in paths)
        if lost or not _are_disjoint(parts):
            shared |= dict.fromkeys(places, names)
            continue
        for group in groups.values():
            if len(group) > 1:
                equal |= dict.fromkeys(group, tuple(found[place].name for place in group))
    return equal, shared


def _content(found: Found) -> Any:
    """What has to be equal for two tensors to hold equal random numbers."""
    return tuple(found.tensor.shape), tuple((part, v.distribution, v.draws, v.path) for part, v in found.fills or ())


def _are_disjoint(groups: list[set[tuple[Any, ...]]]) -> bool:
    """Whether tensors took different parts of one draw: each group one slice, of the same dimension."""
    if len(groups) < 2:
        return True
    if any(len(paths) != 1 for paths in groups):
        return False
    firsts = [next(iter(paths))[:1] for paths in groups]
    if not all(first and isinstance(first[0], DimSlice) for first in firsts):
        return False
    spans = sorted(first[0] for first in firsts)
    return all(a.dim == b.dim and a.start + a.length <= b.start for a, b in itertools.pairwise(spans))


def entries_of(found: Mapping[Any, Found]) -> dict[Any, Entry]:
    """What each tensor is to be filled with: a distribution, or else a program.

    Args:
        found: by any key, the tensors of a model.

    Returns:
        By the same keys.
    """
    equal, shared = _copies(found)
    entries = {key: _entry(found[key], equal.get(key, ()), shared.get(key, ())) for key in found}
    computed = {key for key, entry in entries.items() if entry.spec is None and found[key].fills}
    # A tensor with a distribution has its own numbers. Where a computed one takes numbers from which that was made,
    # and not its values, both have to be computed.
    while True:
        known = {
            id(each.node): Parameter(each.name, tuple(each.tensor.shape), each.tensor.dtype)
            for key, each in found.items()
            if key not in computed and any(value.draws for _, value in each.fills or ())
        }
        users: dict[int, set[str]] = {}
        for key in computed:
            for draw in draws_of(found[key].node, known):
                users.setdefault(draw, set()).add(found[key].name)
        more = {
            key
            for key, each in found.items()
            if key not in computed and any(draw in users for _, value in each.fills or () for draw in value.draws)
        }
        if not more:
            break
        computed |= more
    owners: dict[int, tuple[str, int]] = {}
    count: dict[str, int] = {}
    for draw in sorted(users):
        name = min(users[draw])
        owners[draw] = name, count.get(name, 0)
        count[name] = owners[draw][1] + 1
    for key in computed:
        entries[key] = _computed(found[key], entries[key], known, owners)
    for key, entry in entries.items():
        entry.name = found[key].name
    return entries


def _computed(
    found: Found, entry: Entry, known: Mapping[int, Parameter], owners: Mapping[int, tuple[str, int]]
) -> Entry:
    """The entry of a tensor whose values are computed, with the reason where they cannot be."""
    shape = tuple(found.tensor.shape)
    why = entry.why or (entry.spec.why if entry.spec is not None else "")
    try:
        program = program_of(found.node, known, owners)
    except Untraceable as reason:
        return Entry(shape, None, f"{why}: {reason}" if str(reason) not in why else why)
    if program.elements > LIMIT:
        return Entry(
            shape, None, f"{why}, through {program.elements:,} elements, and no more than {LIMIT:,} are computed"
        )
    return Entry(shape, computed_spec(program, why))


def _entry(found: Found, copies: tuple[str, ...], shared: tuple[str, ...]) -> Entry:
    tensor, name, fills, _ = found
    shape = tuple(tensor.shape)
    if fills is None:
        return Entry(shape, None, "it was made outside the recorded build")
    if not fills:
        return Entry(shape, None, "nothing was written to it during the recorded build")
    bad = next((value for _, value in fills if value.distribution is None), None)
    if bad is not None:
        return Entry(shape, None, bad.why)
    if is_dtensor(tensor) and any(part is not None for part, _ in fills):
        return Entry(shape, None, "a part of a DTensor was written")
    if shared:
        others = ", ".join(other for other in shared if other != name)
        return Entry(shape, None, f"it is computed from the random numbers of {others}, or shares a part of them")
    pairs = tuple((part, value.distribution) for part, value in fills if value.distribution is not None)
    return Entry(shape, FillSpec(pairs, fills[0][1].fan, fills[-1][1].why, exact=True), "", copies)


def _by_module(known: Mapping[nn.Module, dict[str, Entry]], ref: TensorRef) -> Entry | str:
    for owner, attribute in ref.places:
        entries = known.get(owner)
        if entries is not None and attribute in entries:
            return _checked(entries[attribute], ref)
    return "it was made outside the recorded build"


def _checked(entry: Entry | None, ref: TensorRef) -> Entry | str:
    if entry is None:
        return "it was made outside the recorded build"
    if entry.shape != tuple(ref.tensor.shape):
        return f"in the recorded build it had the shape {entry.shape}, and now it has {tuple(ref.tensor.shape)}"
    return entry


def _spec(
    found: Entry | str, ref: TensorRef, present: Mapping[int, list[str]], known_as: Mapping[str, str]
) -> FillSpec | Refused:
    if isinstance(found, str):
        return Refused(found)
    if found.spec is None:
        return Refused(found.why)
    if found.spec.program is not None:
        return replace(found.spec, known_as=known_as | {found.name: ref.name})
    if not found.copies or isinstance(found.spec.distribution, Constant):
        return found.spec
    names = present.get(id(found.copies), [])
    original = min(names) if len(names) == len(found.copies) else min(found.copies)
    return replace(found.spec, copy_of=original if original != ref.name else "")
