"""Which of a module's code may call which of the Linear layers in it, going by the names that the code reads."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

from torch import nn


def callers_by_name(owner: nn.Module, layers: Container[nn.Module]) -> dict[nn.Module, list[types.CodeType]]:
    """By Linear layer in a module, the module's code that may call it."""
    forward = type(owner).forward
    if forward is nn.Module.forward:  # a list of modules
        return {}
    if (forward.__module__ or "").startswith("torch.nn.modules.container"):  # it calls its children
        return {child: [] for child in owner.children() if child in layers}
    functions = _functions(type(owner))  # type: ignore[arg-type]
    everything = frozenset().union(*(f.names for f in functions))
    of_items = isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    found: dict[nn.Module, list[types.CodeType]] = {}
    for path, layer in owner.named_modules():
        if layer in layers:
            names = attributes(owner, path)
            callers = [f for f in functions if names and names[-1] in f.loaded and everything >= {*names}]
            by_any_name = of_items or any(f.names & _ANY_CHILD for f in functions)
            if callers or (by_any_name and path in owner._modules):
                # What is overridden is called by super() alone, in code that is followed then.
                found[layer] = [f.code for f in callers if not f.overridden]
    return found


def attributes(owner: nn.Module, path: str) -> list[str]:
    """The attributes by which code reaches a module: its path, without the keys of lists and dicts of modules."""
    module, names = owner, []
    for part in path.split("."):
        if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            names.append(part)
        module = getattr(module, part) if not isinstance(module, nn.ModuleDict) else module[part]
    return names


# Names by which code may reach any child of its module.
_ANY_CHILD = {"children", "named_children", "_modules", "getattr"}


class _Function(NamedTuple):
    """A method's code, the attributes that it reads, all names in it, and whether a class below overrides it."""

    code: types.CodeType
    loaded: frozenset[str]
    names: frozenset[str]
    overridden: bool


@functools.lru_cache(maxsize=512)
def _functions(kind: Any) -> tuple[_Function, ...]:
    """The methods of a class, but for nn.Module's."""
    found = []
    names = {*_SETTING_UP}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        if (base.__module__ or "").startswith("torch.nn.modules.container"):
            continue
        for name, value in vars(base).items():
            value = getattr(value, "fget", None) or getattr(value, "__func__", value)
            code = getattr(inspect.unwrap(value) if callable(value) else None, "__code__", None)
            if isinstance(code, types.CodeType):
                found.append(_Function(code, frozenset(_loaded(code)), frozenset(_all_names(code)), name in names))
        names.update(vars(base))
    return tuple(found)


_SETTING_UP = {"__init__", "reset_parameters", "_reset_parameters", "init_weights", "_init_weights", "extra_repr"}


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


def _all_names(code: types.CodeType) -> set[str]:
    return {name for part in nested(code) for name in part.co_names}


def _loaded(code: types.CodeType) -> set[str]:
    """Attributes that code reads, but for those of which it only reads another attribute, such as a weight."""
    found = set()
    for part in nested(code):
        found |= {name for name, _ in loads(part)}
    return found


@functools.lru_cache(maxsize=2048)
def loads(code: types.CodeType) -> tuple[tuple[str, int | None], ...]:
    """Those attributes, each with its line; of this code alone."""
    found, line = [], None
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    for one, after in itertools.pairwise(instructions):
        line = one.starts_line if isinstance(one.starts_line, int) and not isinstance(one.starts_line, bool) else line
        line = getattr(one, "line_number", line)
        if one.opname in ("LOAD_ATTR", "LOAD_METHOD") and after.opname not in ("LOAD_ATTR", "STORE_ATTR"):
            found.append((str(one.argval), line))
    return tuple(found)


def changes_more_than_its_result(code: types.CodeType) -> bool:
    """Whether code stores anything but local variables."""
    stores = ("STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "STORE_DEREF", "DELETE_ATTR", "DELETE_SUBSCR")
    return any(i.opname in stores for part in nested(code) for i in dis.get_instructions(part))


@functools.lru_cache(maxsize=2048)
def tests_for_linear(code: types.CodeType) -> bool:
    """Whether code asks what is an nn.Linear, and may do otherwise with a layer in its place."""
    names = _all_names(code)
    return "Linear" in names and bool(names & {"isinstance", "type", "__class__", "issubclass"})
