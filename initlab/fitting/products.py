"""Which weights a pass multiplies signals with, wherever they are kept: modules, parameters, slices, views, copies."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._tree import tensors_in
from ..diagnosis.names import is_loss, of_function
from ..diagnosis.trace import storage_of
from ..models.activations import ACTIVATIONS, Start, start_before
from ..models.memory import Layout, slice_of
from ..models.naming import TensorRef
from ..models.specs import DimSlice
from .branches import SUMS, Branches

LOOKUPS = frozenset(("embedding", "embedding_bag"))
RECURRENT = frozenset(
    ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
)
_CONVOLUTIONS = frozenset(f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3))
_SECOND = _CONVOLUTIONS | {"linear"}  # their weight is the second argument
_EITHER = frozenset(("matmul", "mv", "einsum", "tensordot", "inner", "addbmm", "addmv", "grouped_mm"))
_WITH_A_SUM = frozenset(("addmm", "baddbmm", "addbmm", "addmv"))  # the first argument is added to the product
# What a parameter may do beside being a weight: be added, scale, take a place. Its values have no fan.
_ELEMENTWISE = frozenset(
    (
        *("add", "iadd", "radd", "sub", "mul", "div", "pow", "lerp", "addcmul", "addcdiv", "where", "prelu", "copy"),
        *("maximum", "minimum", "clamp", "clip", "clamp_min", "clamp_max", "masked_scatter", "index_put", "index_copy"),
        *("index_add", "scatter", "scatter_add", "slice_scatter", "select_scatter", "cat", "concat", "concatenate"),
        *("stack", "hstack", "vstack", "dstack", "column_stack", "row_stack", "batch_norm", "layer_norm", "rms_norm"),
        *("group_norm", "instance_norm", "broadcast_tensors"),
    )
)
_SCALED = frozenset(("mul", "div", "addcmul"))  # no scale but a product where the signal is repeated for it
_FORM_ONLY = frozenset(("to", "type_as", "expand_as", "view_as", "reshape_as", "data", "set", "get"))
_ATTENTION = frozenset(("scaled_dot_product_attention", "attention"))
_DROPOUTS = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"))
_ACTIVATIONS = frozenset(ACTIVATIONS) - {"softmax", "log_softmax"}
_GATES = {"sigmoid": "silu", "tanh": "gelu", "erf": "gelu"}  # x times one of these of x
_MHA = inspect.signature(F.multi_head_attention_forward)

Key = tuple[int, DimSlice | None]  # id of a parameter, and which part of it is a weight


class Unit:
    """A weight as a layer uses it: a parameter, or the part of one.

    Attributes:
        ref: the parameter.
        part: which part of it; None for all.
        op: the function that multiplies with it, by its short name.
        fan_in: how many inputs meet in an output; None where that is not known.
        activation: the function that its output meets first, "" if none was seen.
        start: what that function wants of a weight.
        inner: whether its output reaches another weight.
        reads_data: whether what it reads has met no weight before.
    """

    def __init__(self, ref: TensorRef, part: DimSlice | None, op: str) -> None:
        self.ref, self.part, self.op = ref, part, op
        self.fan_in: int | None = None
        self.activation = ""
        self.start: Start | None = None
        self.inner = False
        self.reads_data = False

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return id(self.ref.tensor), self.part

    @property
    def name(self) -> str:
        """Its parameter, and the part of it: "in_proj_weight[0:64]"."""
        if self.part is None:
            return self.ref.name
        dim, start, length = self.part
        return f"{self.ref.name}[{':, ' * dim}{start}:{start + length}]"

    @property
    def is_lookup(self) -> bool:
        """Whether its rows are looked up, and not multiplied."""
        return self.op in LOOKUPS


class _Origin(NamedTuple):
    """Where a tensor comes from that is made of parameters alone."""

    refs: tuple[TensorRef, ...]
    part: DimSlice | None
    in_place: bool  # whether it lies in the parameter's memory, and changes with it


class _Signal(NamedTuple):
    """What is known of any other tensor.

    Args:
        makers: units that it comes from with no weight in between.
        waiting: those of them that have met no activation yet.
        gate: (activation, units): x times this is that activation of x.
        calls: the products that it comes from with none in between, as Branches numbers them.
    """

    makers: frozenset[Unit] = frozenset()
    waiting: frozenset[Unit] = frozenset()
    gate: tuple[str, frozenset[Unit]] = ("", frozenset())
    calls: int = 0


_NOTHING = _Signal()


class Products(TorchFunctionMode):
    """Follows a pass, and reports each product of a signal with a weight. Dropout is left out.

    Args:
        model: it is run inside this context.
        refs: its parameters.
        on_product: called with the unit, the function's short name, the signal, the output, a function that computes
            the output again, and whether that would see new values of the parameter; returns the output that the pass
            goes on with.

    Attributes:
        units: the weights that were met.
        elementwise, unknown: by parameter, the function through which it met a signal: one that adds, scales or
            places it, or one of which it is not known what it makes of it.
        branches: the residual branches of the last pass.
        scaled: ids of parameters: of several that make up a weight, the one of these is reported.
    """

    def __init__(
        self,
        model: nn.Module,
        refs: Iterable[TensorRef],
        on_product: Callable[[Unit, str, Tensor | None, Tensor, Callable[[], Tensor], bool], Tensor],
    ) -> None:
        super().__init__()
        self.units: dict[Key, Unit] = {}
        self.recurrent: set[TensorRef] = set()
        self.elementwise: dict[TensorRef, str] = {}
        self.unknown: dict[TensorRef, str] = {}
        self.lookups: dict[Key, Unit] = {}  # the same weights as embeddings: one may be a head too
        self.branches = Branches()
        self.scaled: Container[int] = ()
        self._on_product = on_product
        self._model = model
        self._refs = {storage_of(ref.tensor): ref for ref in refs}
        self._buffers = {storage_of(buffer) for buffer in model.buffers()}
        self._origins: dict[int, tuple[weakref.ref[Tensor], _Origin]] = {}
        self._signals: dict[int, tuple[weakref.ref[Tensor], _Signal]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Products:
        self._origins.clear()
        self._signals.clear()
        self.branches = Branches()
        for module in self._model.modules():
            start = start_before(module)
            if start is not None:
                self._hooks.append(module.register_forward_pre_hook(self._activation_module(start)))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        while self._hooks:
            self._hooks.pop().remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _short_name(func)
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "multi_head_attention_forward":
            return self._attention(func, args, kwargs)
        if name == "scaled_dot_product_attention":
            args, kwargs = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, {**kwargs, "dropout_p": 0.0}
            if len(args) > 4:
                kwargs.pop("dropout_p")
        out = func(*args, **kwargs)
        raw = getattr(func, "__name__", "").strip("_")
        operand = self._operand(name, raw, args, kwargs) if isinstance(out, Tensor) else None
        if operand is not None:
            weight, signal = operand
            in_place = getattr(func, "__name__", "x_").endswith("_") and not getattr(func, "__name__", "").endswith(
                "__"
            )
            return self._product(name, weight, signal, out, lambda: func(*args, **kwargs), in_place, args)
        if name in RECURRENT:
            own = [ref for t in tensors_in((args, kwargs)) if (o := self._origin(t)) is not None for ref in o.refs]
            self.recurrent.update(own)
            for tensor in tensors_in(out) if own else ():
                self._signals[id(tensor)] = weakref.ref(tensor), _Signal(frozenset((Unit(own[0], None, name),)))
            return out
        self._follow(name, args, kwargs, out)
        return out

    # Which of the arguments is a weight.

    def _operand(self, name: str, raw: str, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None] | None:
        if name in _SECOND:
            weight, signal = _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 0, "input")
        elif name in LOOKUPS:
            first, second = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
            weight, signal = (first, second) if _is_floating(first) else (second, first)
        elif name == "bilinear":
            weight, signal = _argument(args, kwargs, 2, "weight"), _argument(args, kwargs, 0, "input1")
        elif name in _EITHER:
            tensors = list(tensors_in((args[1:] if raw in _WITH_A_SUM else args, kwargs), 3))
            ours = [t for t in tensors if self._origin(t) is not None]
            others = [t for t in tensors if self._origin(t) is None and _is_floating(t)]
            if not ours or not others:
                return None
            weight, signal = ours[-1], others[0]
        else:
            return None
        if not isinstance(weight, Tensor) or self._origin(weight) is None:
            return None
        return weight, signal if isinstance(signal, Tensor) else None

    def _origin(self, tensor: Tensor) -> _Origin | None:
        known = self._origins.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        ref = self._refs.get(storage_of(tensor))
        if ref is None or not tensor.is_floating_point():
            return None
        return _Origin((ref,), slice_of(Layout.of(tensor), Layout.of(ref.tensor)) or None, True)

    def _signal(self, tensor: Any) -> _Signal:
        known = self._signals.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else _NOTHING

    def _product(
        self,
        name: str,
        weight: Tensor,
        signal: Tensor | None,
        out: Tensor,
        again: Callable[[], Tensor],
        in_place: bool,
        args: Any = (),
        reads: int = 0,
    ) -> Tensor:
        origin = self._origin(weight)
        assert origin is not None
        scaled = [ref for ref in origin.refs if ref.tensor.dim() > 1 or id(ref.tensor) in self.scaled]
        units = [self._unit(ref, origin.part, name) for ref in scaled or origin.refs]
        known = self._signal(signal)
        for maker in known.makers:
            maker.inner = True
        unit = next((each for each in units if id(each.ref.tensor) in self.scaled), units[0])
        for each in units:
            if each.fan_in is None:
                each.fan_in = _fan_in(name, args, weight, signal)
                each.reads_data = not known.makers and (signal is None or self._origin(signal) is None)
        if unit.is_lookup:
            unit.op = name  # a head that is tied to its embedding
        try:
            out = self._on_product(unit, name, signal, out, again, origin.in_place and not in_place and len(units) == 1)
        except RuntimeError as error:
            if "vmap" not in str(error) or ".item()" not in str(error):
                raise
            raise NotImplementedError(
                f"{unit.name}: {name} is called inside torch.func.vmap, where what it puts out cannot be measured; "
                "call the model without vmap, forward=lambda model, batch: ..."
            ) from error
        if name in LOOKUPS:
            units = [self.lookups.setdefault(unit.key, Unit(unit.ref, unit.part, name)) for unit in units]
        made = frozenset(units)
        call = self.branches.product((unit.key for unit in made), known.calls | reads)
        self._signals[id(out)] = weakref.ref(out), _Signal(made, made, calls=call)
        return out

    def is_head(self, unit: Unit) -> bool:
        """Whether what a unit puts out reached no other weight."""
        return not (self.lookups[unit.key] if unit.is_lookup else unit).inner

    def _unit(self, ref: TensorRef, part: DimSlice | None, name: str) -> Unit:
        key = id(ref.tensor), part
        if key not in self.units:
            self.units[key] = Unit(ref, part, name)
        return self.units[key]

    # Attention in one function: its projections are layers.

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        bound = _MHA.bind(*args, **kwargs)
        bound.apply_defaults()
        a = bound.arguments
        a["training"] = False  # no dropout
        bias = a["in_proj_bias"]
        if a["use_separate_proj_weight"]:
            weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
        else:
            weights = list(a["in_proj_weight"].chunk(3))
        biases = [None] * 3 if bias is None else list(bias.chunk(3))
        made: frozenset[Unit] = frozenset()
        calls = 0
        for signal, weight, b in zip((a["query"], a["key"], a["value"]), weights, biases, strict=True):
            if self._origin(weight) is None:
                continue

            def project(x: Tensor = signal, w: Tensor = weight, b: Tensor | None = b) -> Tensor:
                return F.linear(x, w, b)

            out = self._product("linear", weight, signal, project(), project, False)
            made |= self._signal(out).makers
            calls |= self._signal(out).calls
        for unit in made:
            unit.inner = True
        result = func(*bound.args, **bound.kwargs)
        weight = a["out_proj_weight"]
        if self._origin(weight) is None:
            return result

        def attend() -> Tensor:
            nonlocal result
            result = func(*bound.args, **bound.kwargs)
            return result[0]

        out = self._product("linear", weight, None, result[0], attend, False, reads=calls)
        unit = next(iter(self._signal(out).makers))
        unit.fan_in, unit.reads_data = weight.shape[-1], False
        return (out, *result[1:])

    # What a function makes of signals and of parameters.

    def _follow(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        made = [out] if isinstance(out, Tensor) else list(tensors_in(out, 2)) if isinstance(out, tuple | list) else []
        made = [tensor for tensor in made if tensor.is_floating_point()]
        if not made:
            return
        given = [tensor for tensor in tensors_in((args, kwargs), 3) if tensor.is_floating_point()]
        origins = [self._origin(tensor) for tensor in given]
        if any(origins):
            given = [tensor for tensor in given if not self._is_constant(tensor)]
            origins = [self._origin(tensor) for tensor in given]
        if given and all(origins):
            refs = tuple(dict.fromkeys(ref for origin in origins if origin for ref in origin.refs))
            for tensor in made:
                self._from_parameters(tensor, refs, [origin for origin in origins if origin])
            return
        signals = [self._signal(tensor) for tensor in given]
        refs = tuple(dict.fromkeys(ref for origin in origins if origin for ref in origin.refs))
        if refs and not is_loss(name) and name not in _FORM_ONLY:
            if self._is_elementwise(name, args, kwargs, given, made):
                self.elementwise.update((ref, name) for ref in refs if ref not in self.elementwise)
            elif any(ref.tensor.requires_grad for ref in refs):
                self.unknown.update((ref, name) for ref in refs if ref not in self.unknown)
                for unit in frozenset().union(*(signal.makers for signal in signals)):
                    unit.inner = True
                stands_for = _Signal(frozenset((Unit(refs[0], None, name),)))
                for tensor in made:
                    self._signals[id(tensor)] = weakref.ref(tensor), stands_for
                return
        if not any(signal is not _NOTHING for signal in signals):
            return
        known = self._combined(name, args, kwargs, given, signals)
        for tensor in made:
            self._signals[id(tensor)] = weakref.ref(tensor), known

    def _is_constant(self, tensor: Tensor) -> bool:
        """Whether it is a buffer, or one number, such as a mask of a weight or its factor, and no signal."""
        if self._origin(tensor) is not None or self._signal(tensor) is not _NOTHING:
            return False
        return tensor.dim() == 0 or storage_of(tensor) in self._buffers

    def _is_elementwise(self, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether parameters are only added, multiplied element by element, or put beside signals."""
        if name in _SCALED:
            return max(t.numel() for t in given if self._origin(t) is None) >= made[0].numel()
        mask = _argument(args, kwargs, 3, "attn_mask")
        if name in _ATTENTION and isinstance(mask, Tensor):
            return all(tensor is mask for tensor in given if self._origin(tensor) is not None)
        return name in _ELEMENTWISE

    def _from_parameters(self, tensor: Tensor, refs: tuple[TensorRef, ...], origins: Sequence[_Origin]) -> None:
        part, in_place = origins[0].part if len(origins) == 1 else None, False
        ref = self._refs.get(storage_of(tensor))
        if ref is not None:
            in_place = True
            found = slice_of(Layout.of(tensor), Layout.of(ref.tensor))
            part = part if found is False else found
        self._origins[id(tensor)] = weakref.ref(tensor), _Origin(refs, part, in_place)

    def _combined(self, name: str, args: Any, kwargs: Any, given: list[Tensor], signals: list[_Signal]) -> _Signal:
        makers = frozenset().union(*(signal.makers for signal in signals))
        waiting = frozenset().union(*(signal.waiting for signal in signals))
        gate = next((signal.gate for signal in signals if signal.gate[0]), ("", frozenset()))
        calls = 0
        for signal in signals:
            calls |= signal.calls
        if name in SUMS and len(signals) == 2:
            self.branches.sum(signals[0].calls, signals[1].calls)
        if name == "mul" and len(signals) == 2:
            for one, other in (signals, signals[::-1]):
                if one.waiting and one.waiting <= other.gate[1]:
                    for unit in one.waiting:
                        unit.activation, unit.start = other.gate[0], ACTIVATIONS[other.gate[0]]
                    return _Signal(makers, calls=calls)
        if name in _GATES:
            gate = _GATES[name], waiting
        function = _activation_called(name, args, kwargs)
        if function:
            _meets(waiting, function, _start_of(function, args, kwargs))
            waiting = frozenset()
        elif name in _GATES:
            waiting = frozenset()
        return _Signal(makers, waiting, gate, calls)

    def _activation_module(self, start: Start) -> Callable[[nn.Module, Any], None]:
        def meets(module: nn.Module, args: Any) -> None:
            tensor = next(iter(args), None)
            known = self._signal(tensor)
            if isinstance(tensor, Tensor) and known.waiting:
                _meets(known.waiting, type(module).__name__, start)
                self._signals[id(tensor)] = weakref.ref(tensor), known._replace(waiting=frozenset())

        return meets


def _short_name(func: Any) -> str:
    """As of_function; of an operator from torch.ops that is not torch's own, all of its name."""
    func = getattr(func, "overloadpacket", func)
    own = isinstance(func, type(torch.ops.aten.mm)) and not str(func).startswith(("aten.", "prims."))
    return str(func) if own else of_function(func)


def _meets(units: Iterable[Unit], name: str, start: Start) -> None:
    for unit in units:
        if not unit.activation:
            unit.activation, unit.start = name, start


def _activation_called(name: str, args: Any, kwargs: Any) -> str:
    """The activation that a function is, "" if it is none."""
    if name in ("clamp_min", "clamp", "clip", "maximum"):
        low = _argument(args, kwargs, 1, "min")
        high = _argument(args, kwargs, 2, "max")
        return "relu" if isinstance(low, int | float) and low == 0 and high is None else ""
    return name if name in _ACTIVATIONS else ""


def _start_of(name: str, args: Any, kwargs: Any) -> Start:
    start = ACTIVATIONS[name]
    if name != "leaky_relu":
        return start
    slope = _argument(args, kwargs, 1, "negative_slope")
    slope = 0.01 if slope is None else float(slope)
    return start._replace(gain=math.sqrt(2.0 / (1.0 + slope**2)))


def _argument(args: Any, kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _fan_in(name: str, args: Any, weight: Tensor, signal: Tensor | None) -> int | None:
    if name in LOOKUPS or weight.dim() == 0:
        return None
    if name in _CONVOLUTIONS:
        return weight[0].numel() if "transpose" not in name else weight.shape[0] * weight[0, 0].numel()
    if name == "linear":
        return weight.shape[-1]
    if name == "bilinear":
        return weight[0].numel()
    if name == "einsum" and args and isinstance(args[0], str) and "->" in args[0] and "." not in args[0]:
        terms, result = args[0].replace(" ", "").split("->")
        letters = next((term for term in terms.split(",") if len(term) == weight.dim()), "")
        sizes = zip(letters, weight.shape, strict=False)
        return math.prod(size for letter, size in sizes if letter not in result) or None
    if name == "matmul" and signal is not None and signal.dim():
        on_the_left = any(arg is weight for arg in args[:1])
        return weight.shape[-1] if on_the_left else signal.shape[-1]
    return weight.shape[-2] if weight.dim() > 1 else weight.shape[0]
