"""Reads where the outputs of Linear layers go, by running each module's forward on symbols in place of tensors.

torch.fx records what a forward does with symbols; the modules that it calls are not entered, each is read by itself.
Where a condition depends on a symbol both ways are taken, so that every path is seen. Nothing is computed.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import os
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

from .._contents import CONTAINERS
from .restoring import restored
from .usage import (
    QUESTIONS,
    RELU,
    RELU_FUNCTIONS,
    RELU_METHODS,
    RELU_SQUARED,
    VIEWS,
    Use,
    called,
    is_square_of,
    name_of,
)

_PATHS = 64  # through one forward
_DECISIONS = 32  # on a path
_TORCH = os.path.dirname(torch.__file__)
_HIDDEN = tuple(os.path.join(_TORCH, *parts) for parts in (("fx",), ("overrides.py",), ("_tensor.py",)))
_HIDDEN += (os.path.join(_TORCH, "nn", "functional.py"), os.path.dirname(__file__))


class _Path(NamedTuple):
    """One way through a forward.

    Args:
        graph: what was done on it.
        kept: outputs of modules that were still referred to where it ended, or that the model stored.
        error: what ended it before its end; None where it went through.
        codes: the code that ran on it.
    """

    graph: Graph
    kept: frozenset[Node]
    error: Exception | None
    codes: set[types.CodeType]


class _Recorder(Tracer):
    """Records one path: `decisions` are the answers to its first conditions, False answers the others."""

    proxy_buffer_attributes = True

    def __init__(self, decisions: list[bool], make_arguments: Callable[[Tracer], tuple[list[Any], dict[str, Any]]]):
        super().__init__()
        self.decisions = decisions
        self.asked = 0
        self.codes: set[types.CodeType] = set()
        self.make_arguments = make_arguments
        self.outputs: list[tuple[weakref.ref[Proxy], Node]] = []

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        arguments, named = self.make_arguments(self)
        root = self.root
        return (lambda: root_fn(root, *arguments, **named)), []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        symbol = super().proxy(node)
        if node.op == "call_module":
            self.outputs.append((weakref.ref(symbol), node))
        return symbol

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if target in RELU_FUNCTIONS or (kind == "call_method" and target in RELU_METHODS):
            node.meta["code"] = next(_codes())
        self.codes.update(_codes())
        return node

    def alive(self) -> frozenset[Node]:
        """The outputs of modules that something still refers to."""
        return frozenset(node for symbol, node in self.outputs if symbol() is not None)

    def to_bool(self, obj: Proxy) -> bool:
        self.asked += 1
        if self.asked > _DECISIONS:
            raise RuntimeError(f"more than {_DECISIONS} conditions depend on tensors")
        if self.asked > len(self.decisions):
            self.decisions.append(False)
        return self.decisions[self.asked - 1]

    def iter(self, obj: Proxy) -> Any:
        raise RuntimeError("it goes through the items of a tensor or an argument")

    def keys(self, obj: Proxy) -> Any:
        return ()  # of **kwargs that are a symbol


def _codes() -> Iterator[types.CodeType]:
    """The code that is running, from the innermost outwards, without torch's and ours."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_HIDDEN):
            yield frame.f_code
        frame = frame.f_back


class _Reading(NamedTuple):
    """What the paths through one forward show.

    Args:
        owner: the module that was run.
        uses: by the names of Linear layers in it.
        why_not: why no path could be read to its end; None where one could.
    """

    owner: nn.Module
    uses: dict[str, Use]
    why_not: str | None


class Reader:
    """Reads a model.

    Attributes:
        uses: by Linear layer, what is known of its output.
        unread: by module, why no path through its forward could be read to its end.
    """

    def __init__(self, model: nn.Module) -> None:
        self.uses: dict[nn.Module, Use] = {m: Use() for m in model.modules() if isinstance(m, nn.Linear)}
        self.unread: dict[nn.Module, str] = {}
        self._kinds: dict[nn.Module, str | None] = {}
        self._followed: set[types.CodeType] = set()  # code that ran on paths that were read to their ends
        self._readings: dict[Any, _Reading] = {}
        owners = [m for m in model.modules() if m not in self.uses and any(c in self.uses for c in m.modules())]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for owner in owners:
                self._read(owner)
        for owner in owners:
            self._note_unread_calls(owner)

    def activation(self, module: nn.Module) -> str | None:
        """The kind of activation that a module applies: "relu", "relu_squared", or None."""
        if module not in self._kinds:
            self._kinds[module] = RELU if type(module) is nn.ReLU else _kind_of(module)
        return self._kinds[module]

    def _read(self, owner: nn.Module) -> None:
        """Read one module's forward; one like a module that was read before is not run again."""
        reachable = _reachable(owner, self.uses)
        if not reachable:
            return
        if "forward" in owner.__dict__:
            self.unread[owner] = "its forward has been replaced"
            return
        key = _likeness(owner)
        if key not in self._readings:
            self._readings[key] = self._run(owner, reachable)
        reading = self._readings[key]
        if reading.why_not is not None:
            self.unread[owner] = reading.why_not
        for name, use in reading.uses.items():
            self.uses[owner.get_submodule(name)].add(use, reading.owner, owner)

    def _run(self, owner: nn.Module, reachable: dict[nn.Module, list[types.CodeType]]) -> _Reading:
        reading = _Reading(owner, {name: Use() for name, m in owner.named_modules() if m in reachable}, None)
        errors = []
        for path in _paths(owner):
            self._note(reading, path)
            errors.append(path.error)
            if path.error is None:
                self._followed |= path.codes
            if all(use.others for use in reading.uses.values()):
                break  # nothing is left to be learned
        if None not in errors:
            reading = reading._replace(why_not=_first_line(errors[0]))
        return reading

    def _note(self, reading: _Reading, path: _Path) -> None:
        """Add to what is known of each Linear that was called on a path."""
        owner = reading.owner
        where = f"{type(owner).__name__}.forward"
        for node in path.graph.nodes:
            if node.op != "call_module" or owner.get_submodule(node.target) not in self.uses:
                continue
            use = reading.uses.setdefault(node.target, Use())
            before = len(use.others)
            found = list(self._consumers(owner, node, use))
            if path.error is not None and (node in path.kept or (not found and len(use.others) == before)):
                use.unknown[f"{where} cannot be followed: {_first_line(path.error)}"] = None
            elif node in path.kept:
                use.others[f"{where} keeps its output"] = None
            elif not found and len(use.others) == before:
                use.others["nothing reads its output"] = None
            use.activations.update(found)

    def _consumers(self, owner: nn.Module, node: Node, use: Use) -> Iterator[str]:
        """The activations that read a tensor or a view of it; other readers are added to `use`."""
        for user in sorted(node.users):
            name = user.target if isinstance(user.target, str) else name_of(user.target)
            reads_first = bool(user.args) and user.args[0] is node and user.all_input_nodes.count(node) == 1
            in_place = False
            if user.op == "call_module":
                module = owner.get_submodule(str(user.target))
                kind = self.activation(module) if reads_first else None
                if kind is None:
                    use.others[f"its output goes to a {type(module).__name__}"] = None
                    continue
                use.modules[module] = None
                in_place = bool(getattr(module, "inplace", False))
                yield kind
            elif user.op == "output":
                use.others[f"{type(owner).__name__}.forward returns its output"] = None
            elif user.target in RELU_FUNCTIONS or (user.op == "call_method" and name in RELU_METHODS):
                use.callers[owner, user.meta.get("code")] = None
                in_place = name.endswith("_") or bool(user.kwargs.get("inplace", user.args[1:2] == (True,)))
                yield RELU
            elif (name == "getattr" and user.args[1] in QUESTIONS) or name in QUESTIONS:
                continue
            elif (name in VIEWS and reads_first) or (name == "getattr" and user.args[1] in VIEWS):
                use.viewed = True
                yield from self._consumers(owner, user, use)
            else:
                use.others[f"its output goes to {called(str(user.args[1]) if name == 'getattr' else name)}"] = None
            use.in_place |= in_place
            if in_place:  # whoever reads it from here on reads what ReLU left
                return

    def _note_unread_calls(self, owner: nn.Module) -> None:
        """A Linear must be left alone where code that was not run to its end may call it too."""
        for layer, functions in _reachable(owner, self.uses).items():
            for code in functions:
                if code not in self._followed:
                    why = self.unread.get(owner, "it is not called by forward")
                    name = getattr(code, "co_qualname", f"{type(owner).__name__}.{code.co_name}")
                    self.uses[layer].unknown[f"{name} may call it, and cannot be followed: {why}"] = None


def _first_line(error: Exception | None) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}{': ' * bool(text)}{text}"


def _kind_of(module: nn.Module) -> str | None:
    """What a module without parameters computes of its one input, if that is ReLU or its square."""
    if module._parameters or module._buffers or module._modules or "forward" in module.__dict__:
        return None
    paths = [*itertools.islice(_paths(module), _VARIANTS)]
    if not 0 < len(paths) < _VARIANTS or any(path.error for path in paths):
        return None
    kinds = {_kind_of_graph(path.graph) for path in paths}
    return kinds.pop() if len(kinds) == 1 else None


def _kind_of_graph(graph: Graph) -> str | None:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    others = [node for node in graph.nodes if node.op != "placeholder"]
    if len(inputs) != 1 or len(others) not in (2, 3):
        return None
    first, last = others[0], others[-1]
    is_relu = first.target in RELU_FUNCTIONS or (first.op == "call_method" and first.target in RELU_METHODS)
    if not is_relu or first.args[0] is not inputs[0] or last.args[0] is not others[-2]:
        return None
    return RELU if len(others) == 2 else RELU_SQUARED if is_square_of(others[1], first) else None


_VARIANTS = 8  # of arguments: parameters that are None by default, or not


def _paths(owner: nn.Module) -> Iterator[_Path]:
    """Every path through a module's forward."""
    parameters = list(inspect.signature(type(owner).forward).parameters.values())[1:]
    optional = {p.name for p in parameters if p.default is not p.empty}
    missing = [p.name for p in parameters if p.default is None]
    left_out: list[set[str]] = [set(), optional, *({name} for name in missing[: _VARIANTS - 2])]
    seen: list[set[str]] = []
    training = owner.training
    for names in left_out:
        if names in seen:
            continue
        seen.append(names)
        for mode in (training, not training) if not names else (training,):
            for count, decisions in enumerate(_decisions()):
                if count == _PATHS:
                    error = RuntimeError(f"more than {_PATHS} paths lead through it")
                    yield _Path(Graph(), frozenset(), error, set())
                    break
                yield _record(owner, decisions, parameters, names, mode)


def _decisions() -> Iterator[list[bool]]:
    """Lists of answers, to which a path adds those that it needed; the next one turns the last False."""
    decisions: list[bool] = []
    while True:
        yield decisions
        while decisions and decisions[-1]:
            decisions.pop()
        if not decisions:
            return
        decisions[-1] = True


def _record(
    owner: nn.Module, decisions: list[bool], parameters: list[inspect.Parameter], left_out: set[str], training: bool
) -> _Path:
    """Follow one path, and put the module back as it was."""

    def make_arguments(tracer: Tracer) -> tuple[list[Any], dict[str, Any]]:
        symbols: list[Any] = []
        named = {}
        for parameter in parameters:
            if parameter.name in left_out or parameter.kind is parameter.VAR_KEYWORD:
                continue
            symbol = tracer.create_proxy("placeholder", parameter.name, (), {})
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                named[parameter.name] = symbol
            else:
                symbols.append(symbol)
        return symbols, named

    recorder = _Recorder(decisions, make_arguments)
    kept: frozenset[Node] = frozenset()
    failure: Exception | None = None
    with restored(owner) as stored:
        owner.__dict__["training"] = training
        try:
            recorder.trace(owner)
        except Exception as error:
            failure = error
            kept = recorder.alive()  # while the traceback holds what the forward's variables referred to
            error.__traceback__ = None
        else:
            ids = {id(value) for value in stored()}
            kept = frozenset(node for symbol, node in recorder.outputs if symbol() is not None and id(symbol()) in ids)
    return _Path(recorder.graph, kept, failure, recorder.codes)


def _reachable(owner: nn.Module, layers: Container[nn.Module]) -> dict[nn.Module, list[types.CodeType]]:
    """By Linear layer in a module, the module's code that may call it, going by the names that the code reads."""
    forward = type(owner).forward
    if forward is nn.Module.forward:  # a list of modules
        return {}
    if (forward.__module__ or "").startswith("torch.nn.modules.container"):  # it calls its children
        return {child: [] for child in owner.children() if child in layers}
    functions = _functions(type(owner))  # type: ignore[arg-type]
    of_items = isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    found: dict[nn.Module, list[types.CodeType]] = {}
    for path, layer in owner.named_modules():
        if layer in layers:
            names = _attributes(owner, path)
            callers = [f for f in functions if names and names[-1] in f.loaded and f.names >= {*names}]
            by_any_name = of_items or any(f.names & _ANY_CHILD for f in functions)
            if callers or (by_any_name and path in owner._modules):
                # What is overridden is called by super() alone, in code that is followed then.
                found[layer] = [f.code for f in callers if not f.overridden]
    return found


def _attributes(owner: nn.Module, path: str) -> list[str]:
    """The attributes by which code reaches a module: its path, without the keys of lists and dicts of modules."""
    module, names = owner, []
    for part in path.split("."):
        if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            names.append(part)
        module = getattr(module, part) if not isinstance(module, nn.ModuleDict) else module[part]
    return names


def _likeness(owner: nn.Module) -> Any:
    """What modules have in common whose forwards do the same: classes, settings, the kinds of modules in them."""
    settings = []
    for name, value in owner.__dict__.items():
        plain = value is None or isinstance(value, int | float | str | torch.dtype)
        settings.append((name, value if plain else type(value) if isinstance(value, CONTAINERS) else id(value)))
    parameters = [(name, p is None) for name, p in (*owner._parameters.items(), *owner._buffers.items())]
    inside = [
        (name, type(m), getattr(m, "inplace", None), "forward" in m.__dict__) for name, m in owner.named_modules()
    ]
    return type(owner), tuple(settings), tuple(parameters), tuple(inside)


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


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _all_names(code: types.CodeType) -> set[str]:
    return {name for part in _nested(code) for name in part.co_names}


def _loaded(code: types.CodeType) -> set[str]:
    """Attributes that code reads, but for those of which it only reads another attribute, such as a weight."""
    found = set()
    for part in _nested(code):
        instructions = [i for i in dis.get_instructions(part) if i.opname not in ("CACHE", "EXTENDED_ARG")]
        for one, after in itertools.pairwise(instructions):
            if one.opname in ("LOAD_ATTR", "LOAD_METHOD") and after.opname not in ("LOAD_ATTR", "STORE_ATTR"):
                found.add(one.argval)
    return found
