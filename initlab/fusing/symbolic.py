"""Reads where the outputs of Linear layers go, by running each module's forward on symbols in place of tensors.

torch.fx records what a forward does with symbols; the modules that it calls are not entered, each is read by itself.
Where a condition depends on a symbol both ways are taken, so that every path is seen. Nothing is computed.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.utils._python_dispatch import TorchDispatchMode

from .callers import attributes, callers_by_name, changes_more_than_its_result, loads, nested, tests_for_linear
from .restoring import restored
from .usage import QUESTIONS, RELU_FUNCTIONS, RELU_METHODS, VIEWS, Use, called, frames, is_models, name_of

_PATHS = 64  # through one forward
_DECISIONS = 32  # on a path


class _Path(NamedTuple):
    """One way through a forward.

    Args:
        graph: what was done on it.
        kept: outputs of modules that were still referred to where it ended, or that the model stored.
        error: what ended it before its end; None where it went through.
        codes: the code that recorded something on it, and the id of its `self`.
        lines: the lines that ran.
    """

    graph: Graph
    kept: frozenset[Node]
    error: Exception | None
    codes: set[tuple[types.CodeType, int]]
    lines: set[tuple[types.CodeType, int]]


class _NoWrites(TorchDispatchMode):
    """Refuses to change tensors in place: nothing of a model is changed by reading it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} changes a tensor")
        return func(*args, **(kwargs or {}))


class _Recorder(Tracer):
    """Records one path: `decisions` are the answers to its first conditions, False answers the others."""

    proxy_buffer_attributes = True

    def __init__(self, decisions: list[bool], make_arguments: Callable[[Tracer], tuple[list[Any], dict[str, Any]]]):
        super().__init__()
        self.decisions = decisions
        self.asked = 0
        self.codes: set[tuple[types.CodeType, int]] = set()
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
            node.meta["code"] = next((code for code, _ in _codes()), None)
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


def _codes() -> Iterator[tuple[types.CodeType, int]]:
    """The code that is running, from the innermost outwards, and the id of its `self`."""
    for frame in frames(_record.__code__):  # beyond is whoever reads
        code = frame.f_code
        yield code, id(frame.f_locals.get(code.co_varnames[0])) if code.co_argcount else 0


@contextlib.contextmanager
def _lines(into: set[tuple[types.CodeType, int]]) -> Iterator[None]:
    """Note the lines that run in this thread, without torch's and ours."""
    before = sys.gettrace()

    def note(frame: types.FrameType, event: str, argument: Any) -> Any:
        if not is_models(frame.f_code):
            return None
        into.add((frame.f_code, frame.f_lineno))
        return note

    sys.settrace(note)
    try:
        yield
    finally:
        sys.settrace(before)


class _Reading(NamedTuple):
    """What the paths through one forward show.

    Args:
        owner: the module that was run.
        uses: by the names of Linear layers in it.
        followed: its own code that ran on paths that were read to their ends.
        why_not: why no path could be read to its end; None where one could.
    """

    owner: nn.Module
    uses: dict[str, Use]
    followed: set[types.CodeType]
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
        self._relus: dict[nn.Module, bool] = {}
        self._followed: set[tuple[types.CodeType, int]] = set()  # with the id of `self`
        self._readings: dict[Any, _Reading] = {}
        owners = [m for m in model.modules() if m not in self.uses and any(c in self.uses for c in m.modules())]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for owner in owners:
                self._read(owner)
        for owner in owners:
            self._note_unread_calls(owner)

    def is_relu(self, module: nn.Module) -> bool:
        """Whether a module makes the same of a tensor and of its ReLU."""
        if module not in self._relus:
            self._relus[module] = type(module) is nn.ReLU or _begins_with_relu(module)
        return self._relus[module]

    def _read(self, owner: nn.Module) -> None:
        """Read one module's forward; one like a module that was read before is not run again."""
        if type(owner).forward is nn.Module.forward:  # a list of modules
            return
        if "forward" in owner.__dict__:
            self.unread[owner] = "its forward has been replaced"
            return
        key = _likeness(owner)
        if key not in self._readings:
            self._readings[key] = self._run(owner)
        reading = self._readings[key]
        if reading.why_not is not None:
            self.unread[owner] = reading.why_not
        self._followed |= {(code, id(owner)) for code in reading.followed}
        for name, use in reading.uses.items():
            self.uses[owner.get_submodule(name)].add(use, reading.owner, owner)

    def _run(self, owner: nn.Module) -> _Reading:
        callers = callers_by_name(owner, self.uses)
        names = {m: name for name, m in owner.named_modules() if m in self.uses}
        reading = _Reading(owner, {names[layer]: Use() for layer in callers}, set(), None)
        by_name = list(reading.uses.values())
        errors: list[Exception | None] = []
        lines: dict[types.CodeType, set[int]] = {}
        ran: set[types.CodeType] = set()
        where = f"{type(owner).__name__}.forward"
        for path in _paths(owner):
            self._note(reading, path)
            errors.append(path.error)
            for code, line in path.lines:
                lines.setdefault(code, set()).add(line)
            ran |= {code for code, _ in path.codes}
            if path.error is None:
                self._followed |= path.codes
                reading.followed.update(code for code, of in path.codes if of == id(owner))
            elif isinstance(path.error, _TooManyPathsError):
                for use in by_name:
                    use.unknown[f"{where} cannot be followed: {path.error}"] = None
            if all(use.others for use in by_name):
                break  # nothing is left to be learned
        if None not in errors:
            for use in by_name:
                use.unknown[f"{where} cannot be followed: {_first_line(errors[0])}"] = None
        missed = dict(_missed(lines))
        asking = [code.co_name for code in ran if tests_for_linear(code)]
        for name, use in reading.uses.items():
            attribute = "".join(attributes(owner, name)[-1:])
            if attribute in missed:
                use.unknown[f"line {missed[attribute]} of {where} calls it and was on no path"] = None
            if asking:
                use.others[f"{asking[0]} asks which modules are nn.Linear"] = None
        return reading if None in errors else reading._replace(why_not=_first_line(errors[0]))

    def _note(self, reading: _Reading, path: _Path) -> None:
        """Add to what is known of each Linear that was called on a path."""
        owner = reading.owner
        where = f"{type(owner).__name__}.forward"
        for node in path.graph.nodes:
            if node.op == "get_attr":
                self._note_weight(reading, node)
            if node.op != "call_module" or owner.get_submodule(node.target) not in self.uses:
                continue
            use = reading.uses.setdefault(node.target, Use())
            before = len(use.others)
            found = sum(self._count_relus(owner, node, use))
            use.relu |= found > 0
            if found > 1:
                use.others["more than one ReLU reads its output"] = None
            if path.error is not None and (node in path.kept or (not found and len(use.others) == before)):
                use.unknown[f"{where} cannot be followed: {_first_line(path.error)}"] = None
            elif node in path.kept:
                use.others[f"{where} keeps its output"] = None
            elif not found and len(use.others) == before:
                use.others["nothing reads its output"] = None

    def _note_weight(self, reading: _Reading, node: Node) -> None:
        """A Linear whose weight or bias is used without calling it, as by its forward."""
        name, _, parameter = str(node.target).rpartition(".")
        layer = reading.owner.get_submodule(name)
        if layer in self.uses:
            for user in node.users:
                if not (user.target is getattr and user.args[1] in QUESTIONS):
                    use = reading.uses.setdefault(name, Use())
                    use.others[f"{type(reading.owner).__name__}.forward uses its {parameter} by itself"] = None

    def _count_relus(self, owner: nn.Module, node: Node, use: Use) -> Iterator[int]:
        """A 1 for each ReLU that reads a tensor or a view of it; other readers are added to `use`."""
        for user in sorted(node.users):
            name = user.target if isinstance(user.target, str) else name_of(user.target)
            reads_first = bool(user.args) and user.args[0] is node and user.all_input_nodes.count(node) == 1
            in_place = False
            if user.op == "call_module":
                module = owner.get_submodule(str(user.target))
                if not reads_first or not self.is_relu(module):
                    use.others[f"its output goes to a {type(module).__name__}"] = None
                    continue
                use.modules[module] = None
                in_place = bool(getattr(module, "inplace", False))
                if in_place and use.viewed:
                    use.others["its ReLU works in place on a view of it"] = None
                yield 1
            elif user.op == "output":
                use.others[f"{type(owner).__name__}.forward returns its output"] = None
            elif user.target in RELU_FUNCTIONS or (user.op == "call_method" and name in RELU_METHODS):
                use.callers[owner, user.meta.get("code")] = None
                in_place = name.endswith("_") or bool(user.kwargs.get("inplace", user.args[1:2] == (True,)))
                if in_place:
                    use.others["code applies ReLU to it in place"] = None
                yield 1
            elif (name == "getattr" and user.args[1] in QUESTIONS) or name in QUESTIONS:
                continue
            elif (name in VIEWS and reads_first) or (name == "getattr" and user.args[1] in VIEWS):
                use.viewed = True
                yield from self._count_relus(owner, user, use)
            else:
                use.others[f"its output goes to {called(str(user.args[1]) if name == 'getattr' else name)}"] = None
            if in_place:  # whoever reads it from here on reads what ReLU left
                return

    def _note_unread_calls(self, owner: nn.Module) -> None:
        """A Linear must be left alone where code that was not run to its end may call it too."""
        for layer, functions in callers_by_name(owner, self.uses).items():
            for code in functions:
                if (code, id(owner)) not in self._followed:
                    why = self.unread.get(owner, "it is not called by forward")
                    name = getattr(code, "co_qualname", f"{type(owner).__name__}.{code.co_name}")
                    self.uses[layer].unknown[f"{name} may call it, and cannot be followed: {why}"] = None


def _first_line(error: Exception | None) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}{': ' * bool(text)}{text}"


def _missed(lines: dict[types.CodeType, set[int]]) -> Iterator[tuple[str, int]]:
    """Attributes that code reads on lines that were on no path, with the line; of functions inside it as well."""
    for code, ran in lines.items():
        for part in nested(code):
            for name, line in loads(part):
                if line is not None and line not in (ran if part is code else lines.get(part, ())):
                    yield name, line


class _TooManyPathsError(RuntimeError):
    """A forward has more paths than are read."""


def _begins_with_relu(module: nn.Module) -> bool:
    """Whether all that a module without state does with its one input begins with ReLU: its square, for one."""
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or changes_more_than_its_result(code) or module._parameters or module._buffers or module._modules:
        return False
    held = {*module.__dict__} - {*nn.Module().__dict__}  # transformers marks each module, and no forward reads the mark
    read = {name for part in nested(code) for name in part.co_names}
    methods = {*dir(type(module))} - {*dir(nn.Module)} | {"forward", "getattr", "vars"}  # which may read anything
    if read & held or (held and read & methods):
        return False
    paths = [*itertools.islice(_paths(module), _VARIANTS)]
    return 0 < len(paths) < _VARIANTS and all(path.error is None and _reads_by_relu(path.graph) for path in paths)


def _reads_by_relu(graph: Graph) -> bool:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or len(inputs[0].users) != 1:
        return False
    (user,) = inputs[0].users
    in_place = str(user.target).endswith("_") or user.kwargs.get("inplace") or len(user.args) > 1
    is_relu = user.target in RELU_FUNCTIONS or (user.op == "call_method" and user.target in RELU_METHODS)
    return is_relu and not in_place and user.args[:1] == (inputs[0],)


_VARIANTS = 8  # of arguments: parameters that are None by default, or not


def _paths(owner: nn.Module) -> Iterator[_Path]:
    """Every path through a module's forward."""
    parameters = list(inspect.signature(type(owner).forward).parameters.values())[1:]
    optional = {p.name for p in parameters if p.default is not p.empty}
    missing = [p.name for p in parameters if p.default is None]
    left_out: list[set[str]] = [set(), optional]
    for name in missing[: _VARIANTS - 2]:  # it alone, and all but it
        left_out += [{name}, optional - {name}]
    seen: list[set[str]] = []
    training = owner.training
    for names in left_out:
        if names in seen:
            continue
        seen.append(names)
        modes = ((training, False), (not training, False), (training, True)) if not names else ((training, False),)
        for mode in modes:
            for count, decisions in enumerate(_decisions()):
                if count == _PATHS:
                    error = _TooManyPathsError(f"more than {_PATHS} paths lead through it")
                    yield _Path(Graph(), frozenset(), error, set(), set())
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
    owner: nn.Module,
    decisions: list[bool],
    parameters: list[inspect.Parameter],
    left_out: set[str],
    mode: tuple[bool, bool],
) -> _Path:
    """Follow one path, in a mode (training, with gradients), and put the module back as it was."""

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
    lines: set[tuple[types.CodeType, int]] = set()
    failure: Exception | None = None
    with restored(owner), torch.set_grad_enabled(mode[1]), _NoWrites(), _lines(lines):
        owner.__dict__["training"] = mode[0]
        try:
            recorder.trace(owner)
            kept = recorder.alive()
        except Exception as error:
            failure = error
            kept = recorder.alive()  # while the traceback holds what the forward's variables referred to
            error.__traceback__ = None
    return _Path(recorder.graph, kept, failure, recorder.codes, lines)


def _likeness(owner: nn.Module) -> Any:
    """What modules have in common whose forwards do the same: classes and settings, those of the modules in them too.

    What is no plain setting is the same object in both.
    """
    parts: list[Any] = []
    for name, module in owner.named_modules():
        parts.append((name, type(module)))
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers"):
                parts.append(tuple((k, v is None) for k, v in value.items()))
            elif key != "_modules" and not (key in _EMPTY and not value):
                plain = value is None or isinstance(value, int | float | str | torch.dtype)
                parts.append((key, value if plain else id(value)))
    return tuple(parts)


_EMPTY = {key for key, value in nn.Module().__dict__.items() if isinstance(value, dict | set)}
