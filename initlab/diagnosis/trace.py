"""One pass of the user's code under observation: what each module did, which losses were called, where it stopped."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from initlab.kernels.torch_internals import is_transformed, physical, without_functions

from .._tree import tensors_in
from ..models.fans import compute_fans
from ..models.naming import walk
from . import names
from .histograms import some
from .limits import LIMITS
from .lines import line_of_user
from .losses import LossCall, Stopped, hinge_of_bits, loss_call, multiplies, shapes
from .slopes import Slopes
from .stats import Stats, edge_share, measure, rows_equal

if TYPE_CHECKING:
    from .flow import Flow

LOSSY = ("long", "int", "to", "type", "round", "floor", "trunc", "sign")
_REDUCTIONS = ("mean", "sum", "amax", "max", "median", "logsumexp")
# Functions after which a signal is still the output of the layer before, for the question which activation follows it.
_PASSING = frozenset(
    (
        *("adaptive_avg_pool2d", "add", "avg_pool2d", "batch_norm", "dropout", "flatten", "group_norm", "layer_norm"),
        *("max_pool2d", "mul", "permute", "reshape", "squeeze", "transpose", "unsqueeze", "view", "max_pool1d"),
    )
)
_DROPOUTS = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"))
_HINGES = frozenset(("relu", "clamp", "clamp_min", "maximum"))
ACTIVATIONS = frozenset(
    (
        *("elu", "gelu", "hardswish", "leaky_relu", "mish", "prelu", "relu", "relu6", "selu", "sigmoid", "silu"),
        *("softplus", "tanh"),
    )
)


class Call:
    """One call of one module.

    Attributes:
        path: of the module in the model.
        is_layer: whether it has a weight matrix, or is recurrent.
        input: of its first floating input.
        output: of its first floating output.
        activation: the function that its output went through, "" if none was seen.
        activated: of that function's output.
        some, some_activated: elements of both, for histograms, where they are asked for.
        edge: share of that output near the ends of tanh or sigmoid.
        recorded: whether its output can pass a gradient on; not under no_grad().
        reads_batch: paths of the leaves of the batch that it got unchanged.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.is_layer = has_weight(module, path)
        self.input: Stats | None = None
        self.output: Stats | None = None
        self.activation = ""
        self.activated: Stats | None = None
        self.some: Tensor | None = None
        self.some_activated: Tensor | None = None
        self.edge = 0.0
        self.recorded = True
        self.reads_batch: list[tuple[Any, ...]] = []
        self.steps = 1
        self.takes_time_first = getattr(module, "batch_first", True) is False
        self.shape: torch.Size | None = None  # of its first input, where it takes time first

    @property
    def kind(self) -> str:
        """The module's class."""
        return type(self.module).__name__


def has_weight(module: nn.Module, path: str = "") -> bool:
    """Whether a module multiplies what it gets with a weight of its own."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return True
    return any(
        t is not None and compute_fans(module, leaf, t, path) is not None for leaf, t in module._parameters.items()
    )


class Modules:
    """Hooks that keep the stack of modules that are running."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[nn.Module, str] = {}
        for path, module in walk(model):
            self.paths.setdefault(module, path)
        self.stack: list[str] = []
        self.error: BaseException | None = None  # the last that passed through a module
        self.raised_in: str | None = None

    def hooked(self, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None) -> ExitStack:
        """Puts the hooks in place; they go when the stack is closed."""
        hooks = ExitStack()

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stack.append(self.paths[module])
            if before is not None:
                before(module, args, kwargs)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            error = sys.exc_info()[1] if output is None else None
            if error is None and after is not None:
                after(module, output)
            if error is not None and error is not self.error:
                self.error, self.raised_in = error, self.current
            self.stack.pop()

        for module in self.paths:
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        return hooks

    @property
    def current(self) -> str | None:
        """The path of the innermost module that runs; None outside the model."""
        return self.stack[-1] if self.stack else None


M = TypeVar("M", bound="ModuleMode")


class ModuleMode(TorchFunctionMode):
    """A mode that knows which module runs. A context manager.

    Args:
        model: the model.

    Attributes:
        modules: the stack of those that are running.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = Modules(model)
        self._hooks = ExitStack()

    def __enter__(self: M) -> M:
        self._hooks = self.hooked()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._hooks.close()

    def hooked(self) -> ExitStack:
        """Puts the hooks in place; they go when the stack is closed."""
        return self.modules.hooked()


class Write(NamedTuple):
    """An operation that changes a tensor in place.

    Args:
        module: in which it runs; None in the loss function.
        op: its name as it is written.
        line: of the user's code.
        shape: of the tensor.
    """

    module: str | None
    op: str
    line: str
    shape: torch.Size


class Trace(ModuleMode):
    """Observes a forward pass. Use as a context manager around the call of loss_fn.

    Args:
        model: the model.
        batch_storages: paths of the leaves of the batch, by `storage_of`.
        flow: follows the tensors of the batch.
        histograms: whether to keep some elements of each output.

    Attributes:
        calls: of modules, in the order in which they began.
        losses: of loss functions.
        products: names of parameters that a signal was multiplied with, and sizes of what came out, in order.
        failed: (module, operation) that ran when an exception was raised.
        arguments: of that operation.
        low: 16-bit dtypes that modules put out.
        dropped: (module, function, share) of calls of dropout outside its modules.
        makers: of torch.autograd.Functions, the path of the first module that puts out what one gives.
        over_rows: (module, function, shape) of each softmax over dimension 0 of several columns.
        singles: (module, function) of each normalisation whose statistics are of one number each.
        writes: of each operation that changes a tensor with a graph in place.
        merged: (module, function, shape) of what makes one of several rows, within the model: a reduction over
            dimension 0, or a cast or rounding after which all are equal.
        slopes: of what the loss is to make smaller, once the backward pass has run.
        differentiates: whether the loss takes a gradient itself, to be differentiated again.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_storages: Mapping[int, tuple[Any, ...]],
        flow: Flow | None = None,
        histograms: bool = False,
    ) -> None:
        super().__init__(model)
        self.flow = flow
        self.histograms = histograms
        self.slopes = Slopes()
        if flow is not None:
            flow.slopes = self.slopes
        self.calls: list[Call] = []
        self.losses: list[LossCall] = []
        self.products: list[tuple[str, torch.Size]] = []
        self._weights = {storage_of(p): name for name, p in model.named_parameters() if p.dim() > 1}
        self.failed: tuple[str | None, str] | None = None
        self.arguments: list[Any] = []
        self.low: set[torch.dtype] = set()
        self.dropped: list[tuple[str | None, str, float]] = []
        self.differentiates = False
        self.makers: dict[type, str] = {}
        self.over_rows: list[tuple[str | None, str, torch.Size]] = []
        self.singles: list[tuple[str | None, str]] = []
        self.writes: list[Write] = []
        self.merged: list[tuple[str, str, torch.Size]] = []
        self._raised: Exception | None = None
        self._open: list[Call] = []
        self._counts: dict[nn.Module, int] = {}
        self._makers: dict[int, tuple[weakref.ref[Tensor], Call]] = {}
        self._batch = batch_storages

    def hooked(self) -> ExitStack:
        return self.modules.hooked(self._before, self._after)

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if exc[1] is not None and exc[1] is not self._raised:
            self.failed = self.modules.raised_in if exc[1] is self.modules.error else None, ""

    @property
    def repeats(self) -> dict[str, int]:
        """How often each module ran, where that is more than once; a recurrent layer counts its time steps."""
        counts = {self.modules.paths[m]: n for m, n in self._counts.items() if n > 1}
        for call in self.calls:
            if call.steps > 1:
                counts[call.path] = max(counts.get(call.path, 1), call.steps)
        return counts

    # Modules

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(self.modules.paths[module], module)
        self._open.append(call)
        count = self._counts[module] = self._counts.get(module, 0) + 1
        if count > LIMITS.calls_measured:
            return
        self.calls.append(call)
        with without_functions():
            for tensor in tensors_in((args, kwargs)):
                leaf = self._batch.get(storage_of(tensor))
                if leaf is not None:
                    call.reads_batch.append(leaf)
                if call.takes_time_first and call.shape is None:
                    call.shape = tensor.shape
                if call.input is None and call.is_layer:
                    call.input = measure(tensor)
                    if isinstance(module, nn.RNNBase) and tensor.dim() > 1:
                        call.steps = tensor.shape[1 if module.batch_first and tensor.dim() == 3 else 0]

    def _after(self, module: nn.Module, output: Any) -> None:
        call = self._open.pop()
        while call.module is not module:  # it raised, and its caller went on
            call = self._open.pop()
        if self._counts[module] > LIMITS.calls_measured:
            return
        with without_functions():
            tensor = next(tensors_in(output), None)
            if tensor is None or not tensor.is_floating_point():
                return
            if tensor.dtype in (torch.float16, torch.bfloat16):
                self.low.add(tensor.dtype)
            node: Any = tensor.grad_fn
            if isinstance(node, BackwardCFunction):
                self.makers.setdefault(getattr(node, "_forward_cls"), call.path)  # noqa: B009
            call.recorded = tensor.requires_grad or physical(tensor).requires_grad
            call.output = measure(tensor)
            if self.histograms and self._counts[module] == 1:
                call.some = some(tensor)
            if call.is_layer:
                self._makers[id(tensor)] = weakref.ref(tensor), call

    @property
    def _module(self) -> nn.Module | None:
        """The innermost module that runs."""
        return self._open[-1].module if self._open else None

    # Functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = names.of_function(func)
        wrapped = any(is_transformed(t) for t in tensors_in(args))
        loss = None if wrapped else loss_call(name, args, kwargs)  # one row of a vmap has no values to look at
        if loss is None and not wrapped and name in ("sub", "rsub"):
            loss = self._difference(args)
        if loss is None and not wrapped and name in _HINGES and self.modules.current is None:
            loss = hinge_of_bits(name, args[0] if args else kwargs.get("input"))
        if loss is not None:
            self.losses.append(loss)
        try:
            if loss is not None and loss.fatal:
                raise Stopped(f"{name}: {loss.problem}")
            version = None if wrapped else _version(args)
            out = func(*args, **kwargs)
        except Exception as error:
            self.failed, self._raised = (self.modules.current, name), error
            self.arguments = [*args, *kwargs.values()]
            raise
        if loss is not None and isinstance(out, Tensor) and out.numel() == 1 and not out.is_meta:
            with without_functions():
                loss.value = float(out.detach())
                self.slopes.of_loss(loss.name, out)
        if not wrapped:
            with without_functions():
                self.slopes.called(name, args, out)
        if self.flow is not None:
            with without_functions():
                within = bool(self._open) and self._open[-1].is_layer
                layer = self.flow.called(name, args, kwargs, out, within)
            if layer is not None:
                if self.histograms:
                    layer.some = some(out)
                self.calls.append(layer)
                self._makers[id(out)] = weakref.ref(out), layer
        if version is not None and _version(args) != version and args[0].requires_grad:
            self.writes.append(Write(self.modules.current, _as_written(func), line_of_user(), args[0].shape))
        if name == "grad":
            self.differentiates = True
        elif name in ("softmax", "log_softmax") and isinstance(out, Tensor) and out.dim() > 1 and out.requires_grad:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (0, -out.dim()) and out.shape[-1] > 1:
                self.over_rows.append((self.modules.current, name, out.shape))
        elif name in _REDUCTIONS and args and isinstance(x := args[0], Tensor) and x.dim() > 1 and x.requires_grad:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            within_model = self.modules.current
            if within_model is not None and dim in (0, -x.dim(), (0,), [0]) and x.shape[-1] > 1:
                self.merged.append((within_model, name, x.shape))
        elif name in LOSSY and not wrapped and self.modules.current is not None and _merges(args, out):
            self.merged.append((self.modules.current, name, args[0].shape))
        elif name == "group_norm" and _of_single_numbers(args):
            self.singles.append((self.modules.current, name))
        elif name in _DROPOUTS and not isinstance(self._module, nn.modules.dropout._DropoutNd):
            training = args[2] if len(args) > 2 else kwargs.get("training", True)
            share = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            if training and share:
                self.dropped.append((self.modules.current, name, float(share)))
        if name in ACTIVATIONS or name in _PASSING:
            self._follow(name, args[0] if args else kwargs.get("input"), out)
        elif name in ("linear", "matmul") and isinstance(out, Tensor):
            found = (self._weights.get(storage_of(arg)) for arg in args[:2] if isinstance(arg, Tensor))
            self.products += [(weight, out.shape) for weight in found if weight is not None]
            if name == "matmul" and out.dtype in (torch.float16, torch.bfloat16):
                self.low.add(out.dtype)
        return out

    def _difference(self, args: tuple[Any, ...]) -> LossCall | None:
        """The beginning of a loss by hand: a prediction less its target, (n, 1) against (n,), which are broadcast."""
        if len(args) < 2 or not all(isinstance(arg, Tensor) for arg in args[:2]):
            return None
        first, second = args[:2]
        for prediction, target in ((first, second), (second, first)):
            rows = {prediction.dim(), target.dim()} == {1, 2}  # a target that was computed: rewards and values
            fixed = not target.requires_grad and (rows or storage_of(target) in self._batch)
            if fixed and prediction.requires_grad and multiplies(prediction, target):
                return LossCall("sub", problem="shapes", facts=shapes(prediction, target))
        return None

    def _follow(self, name: str, source: Any, out: Any) -> None:
        """Carry the knowledge of which layer made a tensor through a function."""
        found = self._makers.get(id(source))
        if found is None or found[0]() is not source or not isinstance(out, Tensor):
            return
        call = found[1]
        if name not in ACTIVATIONS:
            self._makers[id(out)] = weakref.ref(out), call
        elif not call.activation:
            call.activation = name
            call.activated = measure(out)
            if call.some is not None:
                call.some_activated = some(out)
            if name in ("tanh", "sigmoid"):
                call.edge = edge_share(out, name)


def _merges(args: Any, out: Any) -> bool:
    """Whether an operation makes equal rows of rows that differ."""
    x = args[0] if args else None
    if type(x) is not Tensor or type(out) is not Tensor or x.dim() < 1 or len(x) < 2 or out.shape != x.shape:
        return False  # a subclass may communicate
    if x.layout != torch.strided or x.is_meta or out.is_meta or not x.numel():
        return False
    return rows_equal(out) and not rows_equal(x)


def _version(args: Any) -> int | None:
    """How often the first argument was changed in place; None where that is not counted."""
    if not args or not isinstance(args[0], Tensor) or args[0].is_inference():
        return None
    return args[0]._version


def _as_written(func: Any) -> str:
    """The name of a function that changes its argument, as it stands in code: "mul_", also of `x *= y`."""
    name = str(getattr(func, "__name__", type(func).__name__))
    return f"{name[3:-2]}_" if name.startswith("__i") else name


def _of_single_numbers(args: Any) -> bool:
    """Whether a group_norm takes the mean of one number at a time: what comes out is its bias, whatever goes in."""
    if len(args) < 2 or not isinstance(args[0], Tensor) or not args[0].numel():
        return False
    return args[0].numel() == len(args[0]) * args[1]


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    try:
        return physical(tensor).untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or a wrapper without a storage
        return id(tensor)
