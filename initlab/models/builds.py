"""BuildRecord: what a recorded build wrote to each parameter and buffer, by name, and the recipe made of it."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from initlab.kernels import Constant

from .contents import Contents, plain
from .entries import Entry, Found, entries_of
from .memory import Layout
from .naming import TensorRef, class_name, walk
from .recipe_parts import NamedRecipe, View
from .specs import FillSpec, Refused


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

        return NamedRecipe("build", prepare, prepare_buffers, asks_parts=True)

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
    return (
        None if entry is None else (entry.shape, entry.spec and (entry.spec.fills, repr(entry.spec.program)), entry.why)
    )


def _place(tensor: Tensor) -> tuple[int, Any]:
    """The memory of a tensor, by which ties and parameters that are views are told."""
    local = plain(tensor)
    try:
        return local.untyped_storage()._cdata, Layout.of(local)
    except (NotImplementedError, RuntimeError):
        return -id(tensor), None


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
        return replace(found.spec, known_as={**known_as, found.name: ref.name})
    if not found.copies or isinstance(found.spec.distribution, Constant):
        return found.spec
    names = present.get(id(found.copies), [])
    original = min(names) if len(names) == len(found.copies) else min(found.copies)
    return replace(found.spec, copy_of=original if original != ref.name else "")
