"""Which activation function a weight's output meets, read off the source of forward functions.

A forward is followed statement by statement, with modules, settings and functions as they are and tensors known only by
the weights that they come from. Nothing is run. What is not understood comes from no weight, so the worst outcome is
that no activation is seen. Both sides of a condition are followed where its value is not known.
"""

import ast
import functools
import inspect
import linecache
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from .fans import compute_fans

Weight: TypeAlias = tuple[int, str]  # id of a module, and the attribute that holds a weight
_DEPTH = 12  # of calls that are followed
_ITEMS = 512  # of a list that a loop goes over


class _Signal(NamedTuple):
    """A tensor: the weights that it comes from, but for what passes a signal on, and those whose sigmoid it is."""

    weights: frozenset[Weight] = frozenset()
    sigmoid_of: frozenset[Weight] = frozenset()


class _Parameter(NamedTuple):
    """A parameter, used as it is."""

    weight: Weight


class _Known(NamedTuple):
    """Anything else, as it is: a module, a setting, a function."""

    value: Any


_NOTHING = _Signal()

# Functions of torch, and methods of tensors, that make a new signal of a weight, and of any other tensors none.
_PRODUCTS = frozenset({"linear", "bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d"})
# Functions of torch that scale, drop, pool or reshape.
_PASSING = frozenset(
    {
        *("dropout", "alpha_dropout", "feature_alpha_dropout", "layer_norm", "rms_norm", "batch_norm", "group_norm"),
        *("instance_norm", "flatten", "reshape", "transpose", "permute", "squeeze", "unsqueeze", "chunk", "split"),
        *("cat", "concat", "stack", "clamp", "clip", "add", "sub", "mul", "div", "pad", "mean", "sum", "narrow"),
        *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate", "clone"),
    }
)


_SIZES = frozenset({"size", "shape", "dim", "ndim", "numel", "dtype", "device", "stride", "is_cuda", "requires_grad"})


class Reader:
    """Follows the forwards of a model.

    Args:
        start_of: what an activation function, by its module or its name, wants; None for what is none.

    Attributes:
        found: by weight, the activation that its output meets first.
        called: weights whose use was seen.
    """

    def __init__(self, start_of: Callable[[Any], Any]) -> None:
        self.start_of = start_of
        self.found: dict[Weight, Any] = {}
        self.called: set[Weight] = set()
        self._results: dict[tuple[int, frozenset[Weight]], _Signal] = {}
        self._followed: set[int] = set()
        self._depth = 0

    def read(self, model: nn.Module) -> None:
        """Follow the forward of every module but the layers themselves: whether those are called is the question."""
        for module in model.modules():
            if id(module) not in self._followed and not _is_layer(module, _weights(module)):
                self.call_module(module, [_NOTHING])

    def call_module(self, module: nn.Module, arguments: Sequence[Any], named: dict[str, Any] | None = None) -> _Signal:
        """What a module makes of its arguments."""
        into = _union([*arguments[:1], *(named or {}).values()][:1])
        if (activation := self.start_of(module)) is not None:
            return self._meets(into, activation)
        own = _weights(module)
        if _is_layer(module, own):
            self.called.update(own)
            return _Signal(own) if "weight" in module._parameters else _NOTHING
        if _is_torchs(module) and not module._modules:
            return into
        key = (id(module), into.weights)
        if key in self._results:
            return self._results[key]
        self._results[key] = _NOTHING  # of a module that calls itself
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            signal = into
            for child in module:
                signal = self.call_module(child, [signal])
        elif self._depth < _DEPTH:
            self._followed.add(id(module))
            signal = _union([self.call_function(type(module).forward, [_Known(module), *arguments], named or {})])
        else:
            signal = _NOTHING
        self._results[key] = signal
        return signal

    def call_function(self, function: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """What a Python function returns."""
        function = inspect.unwrap(function)
        tree = _tree(getattr(function, "__code__", None))
        if tree is None:
            return _NOTHING
        names = [*tree.args.posonlyargs, *tree.args.args]
        scope = {name.arg: value for name, value in zip(names, arguments, strict=False)}
        scope |= {name: value for name, value in named.items() if name}
        defaults = function.__defaults__ or ()
        for name, default in zip(reversed(names), reversed(defaults), strict=False):
            scope.setdefault(name.arg, _Known(default) if default is not None else _NOTHING)
        self._depth += 1
        try:
            return _Frame(self, function, scope).run(tree.body)
        finally:
            self._depth -= 1

    def _meets(self, signal: _Signal, activation: Any) -> _Signal:
        for weight in signal.weights:
            self.found.setdefault(weight, activation)
        return _NOTHING

    def apply_name(self, name: str, arguments: Sequence[Any]) -> _Signal | None:
        """A function of torch, or a method of a tensor, by its name; None where the name says nothing."""
        name = name.rstrip("_")
        if name in _PRODUCTS:
            used = frozenset(a.weight for a in arguments if isinstance(a, _Parameter))
            self.called.update(used)
            return _Signal(used)
        if (activation := self.start_of(name)) is not None:
            signal = _union(arguments[:1])
            result = self._meets(signal, activation)
            return result._replace(sigmoid_of=signal.weights) if name == "sigmoid" else result
        return None

    def multiply(self, values: Sequence[Any]) -> _Signal:
        """A product. That of a signal and its own sigmoid is a SiLU, written out."""
        for one, other in (values, reversed(values)):
            gate = one.sigmoid_of & other.weights if isinstance(one, _Signal) and isinstance(other, _Signal) else ()
            for weight in gate:
                if self.found[weight].name == "sigmoid":
                    self.found[weight] = self.start_of("silu")
            if gate:
                return _NOTHING
        return _union(values)


def _weights(module: nn.Module) -> frozenset[Weight]:
    """The weight matrices of a module itself."""
    own = module._parameters.items()
    return frozenset(
        (id(module), name) for name, tensor in own if tensor is not None and compute_fans(module, name, tensor)
    )


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _is_layer(module: nn.Module, weights: frozenset[Weight]) -> bool:
    """Whether it is called to apply its weight: a layer of torch, or another that calls it weight."""
    return bool(weights) and (_is_torchs(module) or "weight" in module._parameters)


def _tree(code: Any) -> ast.FunctionDef | None:
    return None if code is None else _functions_of(code.co_filename).get(code.co_firstlineno)


@functools.lru_cache(maxsize=256)
def _functions_of(file: str) -> dict[int, ast.FunctionDef]:
    """The functions of a source file, by the line where each begins, its decorators included."""
    try:
        nodes = ast.walk(ast.parse("".join(linecache.getlines(file))))
    except (SyntaxError, ValueError):
        return {}
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef))
    return {min([node.lineno, *(d.lineno for d in node.decorator_list)]): node for node in functions}


def _union(values: Iterable[Any]) -> _Signal:
    weights: frozenset[Weight] = frozenset()
    for value in values:
        if isinstance(value, _Signal):
            weights |= value.weights
        elif isinstance(value, list):
            weights |= _union(value).weights
    return _Signal(weights)


class _Frame:
    """One call of a function: its names, and what they stand for."""

    def __init__(self, reader: Reader, function: Any, scope: dict[str, Any]) -> None:
        self.reader, self.function, self.scope = reader, function, scope
        self.returned: list[Any] = []

    def run(self, body: Sequence[ast.stmt]) -> Any:
        self.block(body)
        return self.returned[0] if len(self.returned) == 1 else _union(self.returned)

    def block(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                result = self.value(value)
                for target in targets:
                    self.bind(target, result)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self.bind(target, self.value(value))
            case ast.AugAssign(target=target, value=value):
                self.bind(target, _union([self.value(target), self.value(value)]))
            case ast.Expr(value=value):
                self.value(value)
            case ast.Return(value=value):
                self.returned.append(_NOTHING if value is None else self.value(value))
            case ast.If(test=test, body=body, orelse=orelse):
                self.condition(self.value(test), body, orelse)
            case ast.For(target=target, iter=over, body=body, orelse=orelse):
                for item in self.items(over):
                    self.bind(target, item)
                    self.block(body)
                self.block(orelse)
            case ast.While(body=body):
                self.block(body)
            case ast.With(items=items, body=body):
                for item in items:
                    self.value(item.context_expr)
                self.block(body)
            case ast.Try(body=body, orelse=orelse, finalbody=final):
                self.block([*body, *orelse, *final])

    def condition(self, test: Any, body: Sequence[ast.stmt], orelse: Sequence[ast.stmt]) -> None:
        if isinstance(test, _Known) and isinstance(test.value, bool | int | str | None):
            self.block(body if test.value else orelse)
            return
        before = dict(self.scope)
        self.block(body)
        after, self.scope = self.scope, dict(before)
        self.block(orelse)
        for name, value in after.items():
            other = self.scope.get(name, value)
            self.scope[name] = value if other is value or other == value else _union([value, other])

    def bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.scope[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for index, part in enumerate(target.elts):
                inner = value[index] if isinstance(value, list) and index < len(value) else _union([value])
                self.bind(part.value if isinstance(part, ast.Starred) else part, inner)

    def items(self, over: ast.expr) -> list[Any]:
        """What a loop goes over, or one unknown."""
        if isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id in ("enumerate", "zip"):
            columns = [self.items(argument) for argument in over.args]
            if over.func.id == "enumerate":
                return [[_NOTHING, item] for item in columns[0]]
            longest = max(map(len, columns), default=0)
            return [[column[i] if i < len(column) else column[-1] for column in columns] for i in range(longest)]
        value = self.value(over)
        if isinstance(value, _Known):
            if isinstance(value.value, nn.ModuleDict):
                return [_Known(key) for key in value.value]
            if isinstance(value.value, nn.ModuleList | nn.Sequential | list | tuple):
                return [_Known(item) for item in list(value.value)[:_ITEMS]] or [_NOTHING]
        return value if isinstance(value, list) and value else [_union([value])]

    def value(self, node: ast.expr) -> Any:
        """What an expression stands for."""
        match node:
            case ast.Constant(value=value):
                return _Known(value)
            case ast.Name(id=name):
                return self.name(name)
            case ast.Attribute(value=owner, attr=name):
                return self.attribute(self.value(owner), name)
            case ast.Subscript(value=owner, slice=index):
                return self.item(self.value(owner), index)
            case ast.Call():
                return self.call(node)
            case ast.BinOp(left=left, op=op, right=right):
                values = [self.value(left), self.value(right)]
                if isinstance(op, ast.MatMult):
                    return self.reader.apply_name("matmul", values)
                return self.reader.multiply(values) if isinstance(op, ast.Mult) else _union(values)
            case ast.UnaryOp(op=op, operand=operand):
                value = self.value(operand)
                known = isinstance(value, _Known) and isinstance(value.value, bool | int | None)
                if isinstance(op, ast.Not):
                    return _Known(not value.value) if known else _NOTHING
                return _Known(-value.value) if known and isinstance(op, ast.USub) and value.value else _union([value])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                found = self.value(test)
                if isinstance(found, _Known) and isinstance(found.value, bool):
                    return self.value(body if found.value else orelse)
                values = [self.value(body), self.value(orelse)]
                return values[0] if values[0] == values[1] else _union(values)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return [self.value(part.value if isinstance(part, ast.Starred) else part) for part in parts]
            case ast.NamedExpr(target=target, value=value):
                result = self.value(value)
                self.bind(target, result)
                return result
            case ast.ListComp(elt=element, generators=[each]) | ast.GeneratorExp(elt=element, generators=[each]):
                found_all = []
                for item in self.items(each.iter):
                    self.bind(each.target, item)
                    found_all.append(self.value(element))
                return found_all
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
        return _NOTHING

    def name(self, name: str) -> Any:
        if name in self.scope:
            return self.scope[name]
        found = self.function.__globals__.get(name, _NOTHING)
        return found if found is _NOTHING else _Known(found)

    def attribute(self, owner: Any, name: str) -> Any:
        if not isinstance(owner, _Known):
            return _NOTHING if name in _SIZES else owner if isinstance(owner, _Parameter) else _union([owner])
        value = owner.value
        if isinstance(value, nn.Module):
            if name in value._parameters:
                return _Parameter((id(value), name))
            if name in value._modules:
                return _Known(value._modules[name])
            if name in vars(value):
                return _NOTHING if isinstance(vars(value)[name], Tensor) else _Known(vars(value)[name])
            found = inspect.getattr_static(type(value), name, None)
            return _Known(found.__get__(value)) if inspect.isfunction(found) else _NOTHING
        try:
            return _Known(getattr(value, name))
        except Exception:  # of whatever class it is
            return _NOTHING

    def item(self, owner: Any, index: ast.expr) -> Any:
        if isinstance(owner, _Parameter | _Signal):
            return owner
        if isinstance(index, ast.Slice):
            bounds = [None if part is None else self.value(part) for part in (index.lower, index.upper, index.step)]
            at: Any = None
            if all(part is None or isinstance(part, _Known) for part in bounds):
                at = slice(*(None if part is None else part.value for part in bounds))
        else:
            found = self.value(index)
            at = found.value if isinstance(found, _Known) else None
        sequence = owner if isinstance(owner, list) else owner.value
        if at is None or not isinstance(sequence, list | tuple | dict | nn.ModuleList | nn.Sequential | nn.ModuleDict):
            return _union(owner) if isinstance(owner, list) else _NOTHING
        try:
            got = sequence[at]
        except Exception:  # an index that is none
            return _NOTHING
        return got if isinstance(owner, list) else _Known(got)

    def call(self, node: ast.Call) -> Any:
        arguments = [self.value(part.value if isinstance(part, ast.Starred) else part) for part in node.args]
        named = {part.arg or "": self.value(part.value) for part in node.keywords}
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value)
            if not isinstance(owner, _Known):  # a method of a tensor
                if node.func.attr in _SIZES:
                    return _NOTHING
                result = self.reader.apply_name(node.func.attr, [owner, *arguments])
                return _union([owner]) if result is None else result
        target = self.value(node.func)
        if not isinstance(target, _Known):
            return _NOTHING
        called = target.value
        if isinstance(called, nn.Module):
            return self.reader.call_module(called, arguments, named)
        if isinstance(called, functools.partial):
            called = called.func
        if inspect.ismethod(called) and isinstance(called.__self__, nn.Module):
            if self.reader._depth < _DEPTH:
                return self.reader.call_function(called.__func__, [_Known(called.__self__), *arguments], named)
            return _NOTHING
        if isinstance(called, type | ModuleType) or not callable(called):
            return _NOTHING
        name = str(getattr(called, "__name__", ""))
        result = self.reader.apply_name(name, [*arguments, *named.values()])
        if result is None:
            return _union(arguments) if name.rstrip("_") in _PASSING else _NOTHING
        return result
