"""The functions by which a model's own code starts it: which modules have one, and in which order they are called."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn


def children_first(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model in the order in which torch's Module.apply visits them, each once."""
    seen: set[int] = set()
    stack: list[tuple[nn.Module, bool]] = [(model, False)]
    while stack:
        module, done = stack.pop()
        if done:
            yield module
        elif id(module) not in seen:
            seen.add(id(module))
            stack.append((module, True))
            stack += [(child, False) for child in reversed(module._modules.values()) if child is not None]


def owners_of_init_weights(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """(module, the nearest module above it, itself included, that has an `_init_weights(module)`), children first."""
    nearest: dict[int, Any] = {}
    stack: list[tuple[nn.Module, Any]] = [(model, None)]
    while stack:
        module, owner = stack.pop()
        owner = module if _takes_a_module(module) else owner
        # Reached twice, by PEFT's prompt encoders for one: from its own model, which starts it, and from a wrapper.
        if id(module) in nearest and (owner is None or nearest[id(module)] is not None):
            continue
        nearest[id(module)] = owner
        stack += [(child, owner) for child in reversed(module._modules.values()) if child is not None]
    for module in children_first(model):
        if nearest[id(module)] is not None:
            yield module, nearest[id(module)]


def _needs_nothing(module: nn.Module, name: str) -> bool:
    """Whether a module's class has a public function of this name that can be called without arguments."""
    if not callable(getattr(type(module), name, None)):
        return False
    if any((cls.__module__.partition(".")[0], cls.__name__) in _NOT_RUN for cls in type(module).__mro__):
        return False
    try:
        inspect.signature(getattr(module, name)).bind()
    except (TypeError, ValueError):
        return False
    return True


def public_starts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, name) of the public functions that start a module and need no arguments, children first."""
    for module in children_first(model):
        for name in _PUBLIC:
            if _needs_nothing(module, name):
                yield module, name


_PUBLIC = ("init_weights", "init_states", "initialize_weights")
_NOT_RUN = {("transformers", "PreTrainedModel"), ("mmengine", "BaseModule"), ("mmcv", "BaseModule")}


def _takes_a_module(module: nn.Module) -> bool:
    if not callable(getattr(type(module), "_init_weights", None)):
        return False
    try:
        inspect.signature(module._init_weights).bind(module)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True
