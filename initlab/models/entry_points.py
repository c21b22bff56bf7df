"""The functions by which a model's own code starts it: which modules have one, and in which order they are called."""

import inspect
from collections.abc import Iterator
from types import CodeType
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


def run_init_weights(owner: Any, module: nn.Module) -> None:
    """Call `owner._init_weights(module)`, and mark the module as started, as transformers does and its code asks for.

    The marks are to be taken off first: `unmark`.
    """
    owner._init_weights(module)
    if any((cls.__module__.partition(".")[0], cls.__name__) == _TRANSFORMERS for cls in type(owner).__mro__):
        vars(module)[_MARK] = True


def unmark(model: nn.Module) -> None:
    """Take off transformers' marks of modules that have been started."""
    for module in model.modules():
        vars(module).pop(_MARK, None)


_MARK = "_is_hf_initialized"
_TRANSFORMERS = ("transformers", "PreTrainedModel")


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
        for name in PUBLIC:
            if _needs_nothing(module, name):
                yield module, name


PUBLIC = ("init_weights", "init_states", "initialize_weights")
_NOT_RUN = {_TRANSFORMERS, ("mmengine", "BaseModule"), ("mmcv", "BaseModule")}


def _takes_a_module(module: nn.Module) -> bool:
    if not callable(getattr(type(module), "_init_weights", None)):
        return False
    try:
        inspect.signature(module._init_weights).bind(module)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


_READ = frozenset({"reset_parameters", "_reset_parameters", "_init_weights", "forward", *PUBLIC})
_UNCOUNTED = frozenset({"trunc_normal_", "orthogonal_", "sparse_"})  # newer torch leaves meta tensors alone in these
_INIT = frozenset(name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_"))
_WRITING = frozenset({"normal_", "uniform_", "fill_", "zero_", "copy_", "mul_", "add_", "div_", "sub_", "clamp_"})


def uncounted_code(model: nn.Module, sharded: bool = False) -> dict[int, str]:
    """Code of a model that is not read and whose writes no version counter of a meta tensor shows.

    Args:
        sharded: whether counters show nothing at all: those of a sharded parameter begin anew.

    Returns:
        By the id of a module, the name of such code in its class or in that of a module above it.
    """
    classes: dict[type, str] = {}
    found: dict[int, str] = {}
    stack: list[tuple[nn.Module, str]] = [(model, "")]
    while stack:
        module, above = stack.pop()
        kind = type(module)
        if kind not in classes:
            classes[kind] = _uncounted(kind, sharded)
        here = above or classes[kind]
        if id(module) in found and (found[id(module)] or not here):
            continue
        found[id(module)] = here
        stack += [(child, here) for child in module._modules.values() if child is not None]
    return {key: where for key, where in found.items() if where}


def _uncounted(kind: type, sharded: bool) -> str:
    """The function that does so, of those that the constructor of a class calls, itself included."""
    waiting: list[Any] = [vars(cls)["__init__"] for cls in kind.__mro__ if "__init__" in vars(cls)]
    seen: set[Any] = set()
    while waiting:
        function = waiting.pop()
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        home = str(getattr(function, "__module__", ""))
        if code is None or code in seen or home == "torch" or home.startswith("torch."):
            continue
        seen.add(code)
        names = _names(code)
        if names & _UNCOUNTED or (("data" in names or sharded) and names & _WRITING) or (sharded and names & _INIT):
            return str(function.__qualname__)
        for name in names - _READ:
            waiting.append(getattr(kind, name, None))
            called = function.__globals__.get(name)
            waiting.append(called if inspect.isfunction(called) else None)
    return ""


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*inner)
