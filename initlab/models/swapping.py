"""swap(): inside it, torch's own init calls take their values from initlab's stream.

A TorchFunctionMode sees `Tensor.normal_`, `Tensor.uniform_` and the functions of torch.nn.init that ask for it,
however they were imported. `trunc_normal_` does not ask, but calls a helper that it looks up in torch.nn.init;
`orthogonal_`, `sparse_`, `eye_` and `dirac_` are looked up there by their callers. Those names are replaced while any
thread is inside a swap(). So is the method with which embeddings set their padding row to zero, for DTensors: torch
writes into a copy of the row.
"""

import functools
import inspect
import os
import threading
from collections.abc import Callable
from contextlib import ContextDecorator, ExitStack
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from initlab.kernels import Constant, fill_

from .. import init
from ..distributed.agreement import check_agreement, differing, refuse_differing
from ..distributed.dtensors import count_as_written, is_dtensor
from ..distributed.groups import groups_of, mesh_dims_of
from ..distributed.shards import draws

_F = TypeVar("_F", bound=Callable[..., Any])


class Sink(Protocol):
    """Where redirected calls go: initlab.init, or whatever has these functions with the arguments of torch.nn.init."""

    def uniform_(self, tensor: Tensor, a: float = ..., b: float = ..., generator: Any = ...) -> Tensor: ...
    def normal_(self, tensor: Tensor, mean: float = ..., std: float = ..., generator: Any = ...) -> Tensor: ...
    def constant_(self, tensor: Tensor, val: float) -> Tensor: ...
    def kaiming_uniform_(
        self, tensor: Tensor, a: float = ..., mode: Any = ..., nonlinearity: Any = ..., generator: Any = ...
    ) -> Tensor: ...
    def trunc_normal_(
        self, tensor: Tensor, mean: float = ..., std: float = ..., a: float = ..., b: float = ..., generator: Any = ...
    ) -> Tensor: ...
    def orthogonal_(self, tensor: Tensor, gain: float = ..., generator: Any = ...) -> Tensor: ...
    def sparse_(self, tensor: Tensor, sparsity: float, std: float = ..., generator: Any = ...) -> Tensor: ...
    def eye_(self, tensor: Tensor) -> Tensor: ...
    def dirac_(self, tensor: Tensor, groups: int = ...) -> Tensor: ...


class Redirect(TorchFunctionMode):
    """While entered, this thread's sampling calls go to `sink`."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self.sink = sink

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or func is Tensor.uniform_:
            tensor = args[0] if args else kwargs["self"]
            if tensor.is_floating_point() or tensor.is_complex():
                return (_normal_ if func is Tensor.normal_ else _uniform_)(self.sink, *args, **kwargs)
            return self.other(func, args, kwargs)
        # Not compared with torch's own functions: torch.nn.init looks the name up before it asks, and finds what is
        # there, transformers' guard for instance while a model of transformers is being initialised.
        init_functions = vars(torch.nn.init)
        for name in _ASKING:
            if func is init_functions.get(name):
                return getattr(self.sink, name)(*args, **kwargs)
        return self.other(func, args, kwargs)

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What becomes of every other call to torch."""
        return func(*args, **kwargs)

    def __enter__(self) -> "Redirect":
        _patches.add()
        try:
            super().__enter__()
        except BaseException:
            _patches.remove()
            raise
        _sinks().append(self.sink)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _sinks().pop()
        try:
            super().__exit__(kind, error, trace)
        finally:
            _patches.remove()


_ASKING = ("uniform_", "normal_", "kaiming_uniform_", "constant_")  # they call handle_torch_function


def _normal_(sink: Sink, self: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Tensor:
    return _as_a_method(sink.normal_, self, mean, std, generator)


def _uniform_(sink: Sink, self: Tensor, *bounds: float, generator: Any = None, **named: float) -> Tensor:
    low, high = (*bounds, *(named.get(name, default) for name, default in (("from", 0.0), ("to", 1.0))[len(bounds) :]))
    return _as_a_method(sink.uniform_, self, low, high, generator)


def _as_a_method(fill: Callable[..., Tensor], tensor: Tensor, a: float, b: float, generator: Any) -> Tensor:
    """Fill a tensor as autograd demands of a method: a leaf raises, and nothing flows back to the old values."""
    if tensor.requires_grad and torch.is_grad_enabled():
        fill(torch.empty(0, dtype=tensor.dtype, device="meta"), a, b, generator=generator)  # its errors, first
        tensor.zero_()
    return fill(tensor, a, b, generator=generator)


# ---------------------------------------------------------------------------------------------------------------
# What the mode cannot see

# Modes are per thread, patches are not: the patches ask which sink their own thread has. Not a contextvar, which other
# threads can inherit, while modes stay where they were entered.
_here = threading.local()


def _sinks() -> list[Sink]:
    try:
        sinks: list[Sink] = _here.sinks
    except AttributeError:
        sinks = _here.sinks = []
    return sinks


_TARGETS = {
    "_no_grad_trunc_normal_": "trunc_normal_",
    "orthogonal_": "orthogonal_",
    "sparse_": "sparse_",
    "eye_": "eye_",  # these two for DTensors alone, which torch's own fill wrongly
    "dirac_": "dirac_",
}


class _Patches:
    """What must be replaced by name, in torch.nn.init above all, replaced while at least one Redirect is entered."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entered = 0
        self.replaced: list[tuple[Any, str, Any, Any]] = []  # (owner, name, what was there, what is there now)

    def add(self) -> None:
        with self.lock:
            if self.entered == 0:
                module = vars(torch.nn.init)
                missing = [name for name in _TARGETS if name not in module]
                if missing:
                    raise RuntimeError(
                        f"torch {torch.__version__} has no torch.nn.init.{missing[0]}, so its init calls cannot be "
                        "redirected; call initlab.init's functions, or initlab.init_model_, instead"
                    )
                for name, target in _TARGETS.items():
                    # A function that somebody else has put there, as transformers' guard does, stays: it knows which
                    # tensors to leave alone, and reaches torch's own in the end.
                    if name == target and not _is_torchs(module[name]):
                        continue
                    self.replace(torch.nn.init, name, _ask_first(module[name], target))
                for owner in (nn.Embedding, nn.EmbeddingBag):
                    if _PADDING in vars(owner):
                        self.replace(owner, _PADDING, _zero_in_place(vars(owner)[_PADDING]))
            self.entered += 1

    def replace(self, owner: Any, name: str, ours: Any) -> None:
        self.replaced.append((owner, name, vars(owner)[name], ours))
        setattr(owner, name, ours)

    def remove(self) -> None:
        with self.lock:
            self.entered -= 1
            if self.entered == 0:
                self.restore()

    def restore(self) -> None:
        for owner, name, original, ours in self.replaced:
            if vars(owner).get(name) is ours:  # else somebody has patched on top of it, and will restore it
                setattr(owner, name, original)
        self.replaced.clear()

    def after_fork(self) -> None:
        """In a forked child the other threads are gone, and with them the swaps that they were inside."""
        self.lock = threading.Lock()
        self.entered = len(_sinks())
        if self.entered == 0:
            self.restore()


def _is_torchs(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == torch.nn.init.__file__


def _ask_first(original: _F, target: str) -> _F:
    @functools.wraps(original)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        sinks = _sinks()
        return (getattr(sinks[-1], target) if sinks else original)(*args, **kwargs)

    return redirected  # type: ignore[return-value]


_PADDING = "_fill_padding_idx_with_zero"  # of embeddings, at the end of reset_parameters


def _zero_in_place(original: _F) -> _F:
    @functools.wraps(original)
    def zero_padding(self: Any) -> None:
        if self.padding_idx is None or not _sinks() or not is_dtensor(self.weight):
            original(self)
            return
        fill_(draws(self.weight, Constant(0.0), 0, (0, self.padding_idx, 1)))
        count_as_written(self.weight)

    return zero_padding  # type: ignore[return-value]


_patches = _Patches()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_patches.after_fork)


# ---------------------------------------------------------------------------------------------------------------
# swap()


class _Swap(ContextDecorator):
    def __init__(self, check_ranks: Any) -> None:
        self.check_ranks = check_ranks
        self.entered: list[tuple[ExitStack, list[Any]]] = []

    def __enter__(self) -> None:
        if not isinstance(self.check_ranks, bool):
            groups_of(self.check_ranks, "check_ranks")  # for its errors, before anything is drawn
        with ExitStack() as stack:
            drawn = stack.enter_context(init.noting()) if self.check_ranks else []
            stack.enter_context(Redirect(init))
            self.entered.append((stack.pop_all(), drawn))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, drawn = self.entered.pop()
        stack.__exit__(kind, error, trace)
        if self.check_ranks and kind is None:
            _compare(drawn, self.check_ranks)

    def __call__(self, func: _F) -> _F:
        for kind in (
            inspect.isclass,
            inspect.isgeneratorfunction,
            inspect.iscoroutinefunction,
            inspect.isasyncgenfunction,
        ):
            if kind(func):
                raise TypeError(
                    f"swap() decorates plain functions, and {func!r} would run, or go on running, outside it; "
                    "write `with initlab.swap():` inside it"
                )
        return super().__call__(func)

    def _recreate_cm(self) -> "_Swap":
        return _Swap(
            self.check_ranks
        )  # one for each call of the decorated function: it may be running in several threads


def _compare(drawn: list[tuple[Tensor, Any, int]], where: Any) -> None:
    """Raise where ranks drew other keys, naming the generators."""
    labels: dict[int, str] = {}
    said = []
    for tensor, generator, key in drawn:
        label = "torch's default CPU generator"
        if generator is not None:
            shape = tuple(tensor.shape)
            label = labels.setdefault(
                id(generator), f"generator {len(labels) + 1} ({generator.device}), first used for shape {shape}"
            )
        said.append((tensor, label, f"{key:x} "))
    what, advice = "keys", "Give these generators one seed on every rank, torch.manual_seed for the default one"
    if where is True:
        check_agreement(said, what, advice)
        return
    told: dict[str, str] = {}
    for _, label, words in said:
        told[label] = told.get(label, "") + words
    refuse_differing(differing(told, mesh_dims_of(where, "check_ranks")), what, advice)


def swap(*, check_ranks: Any = False) -> _Swap:
    """Inside it, torch's init functions and in-place sampling of floating tensors take their values from the stream.

    A context manager, `with initlab.swap():`, and a decorator of plain functions, `@initlab.swap()`. It redirects, in
    the thread that entered it,

    - every function of torch.nn.init, also where a library has imported it by name. Of `orthogonal_` and `sparse_`
      imported by name, or called by their deprecated names, the random numbers come from the stream and the rest is
      torch's; so are `eye_` and `dirac_`, which must not be given DTensors then;
    - `Tensor.normal_` and `Tensor.uniform_` of floating and complex tensors, also on `.data`;
    - the zeros of an embedding's padding row, where its weight is a DTensor: torch writes them into a copy.

    What makes new tensors, such as `torch.randn`, `torch.normal` or `nn.Parameter(torch.rand(n))`, is not swapped.
    Each call takes one key from its generator, as in initlab.init, so the values depend on the order of the calls;
    `initlab.init_model_` goes by names. Nothing stays changed afterwards, also where an exception ends it.

    Args:
        check_ranks: True compares, at the end, the keys that ranks have drawn for DTensors: one small all-reduce for
            each dimension of their meshes, in which every rank takes part. A process group or a DeviceMesh compares
            the keys of all draws, of plain tensors too, over its ranks. False does nothing.

    Raises:
        RuntimeError: on entry, if this torch.nn.init lacks a function that has to be replaced, or check_ranks asks
            others where torch.distributed is not initialised. At the end, on every rank, if check_ranks finds that
            keys differ; it names the generators and the ranks.
        TypeError: on entry, for another check_ranks; as a decorator, for classes, generators and coroutines, whose code
            would run outside it.

    Example:
        >>> import torch, initlab
        >>> with initlab.swap():
        ...     seed = torch.manual_seed(0)
        ...     layer = torch.nn.Linear(3, 5)
        >>> seed = torch.manual_seed(0)
        >>> same = initlab.init.kaiming_uniform_(torch.empty(5, 3), a=5**0.5)
        >>> torch.equal(layer.weight, same)
        True
    """
    return _Swap(check_ranks)
