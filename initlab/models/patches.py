"""What has to be replaced by name, since a TorchFunctionMode does not see it, while a Redirect is entered.

`trunc_normal_` calls a helper that it looks up in torch.nn.init; `orthogonal_`, `sparse_`, `eye_` and `dirac_` are
looked up there by their callers. The method with which embeddings set their padding row to zero is replaced too, for
DTensors: torch writes into a copy of the row.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from initlab.kernels import Constant, fill_

from ..distributed.dtensors import count_as_written, is_dtensor
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


class Observer:
    """A sink that lets a call pass, to the sink around it or to torch, and looks at it."""

    def observe(self, target: str, call: Callable[[], Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Make the call of the function `target` of torch.nn.init, and return what it returns."""
        return call()


# Modes are per thread, patches are not: the patches ask which sink their own thread has. Not a contextvar, which other
# threads can inherit, while modes stay where they were entered.
_thread = threading.local()


def sinks() -> list[Any]:
    """The sinks, and observers, of the redirects that this thread is inside, innermost last."""
    try:
        found: list[Any] = _thread.sinks
    except AttributeError:
        found = _thread.sinks = []
    return found


_TARGETS = {
    "_no_grad_trunc_normal_": "trunc_normal_",
    "orthogonal_": "orthogonal_",
    "sparse_": "sparse_",
    "eye_": "eye_",  # these two for DTensors alone, which torch's own fill wrongly
    "dirac_": "dirac_",
}


class Patches:
    """Names that are replaced, in torch.nn.init above all, while any thread is inside a Redirect."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entered = 0
        self.replaced: list[tuple[Any, str, Any, Any]] = []  # (owner, name, what was there, what is there now)

    def add(self) -> None:
        """Enter one more Redirect; the first replaces the names."""
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
                    self.replace(torch.nn.init, name, _ask_thread(module[name], target))
                for owner in (nn.Embedding, nn.EmbeddingBag):
                    if _PADDING in vars(owner):
                        self.replace(owner, _PADDING, _zero_in_place(vars(owner)[_PADDING]))
            self.entered += 1

    def replace(self, owner: Any, name: str, ours: Any) -> None:
        self.replaced.append((owner, name, vars(owner)[name], ours))
        setattr(owner, name, ours)

    def remove(self) -> None:
        """Leave a Redirect; the last restores the names."""
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
        self.entered = len(sinks())
        if self.entered == 0:
            self.restore()


def _is_torchs(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == torch.nn.init.__file__


def _ask_thread(original: _F, target: str) -> _F:
    @functools.wraps(original)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        return _through(sinks(), len(sinks()), original, target, args, kwargs)

    return redirected  # type: ignore[return-value]


def _through(
    entered: list[Any], depth: int, original: Callable[..., Any], target: str, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Call the innermost sink of the first `depth`; one that only observes calls what is below it."""
    if depth == 0:
        return original(*args, **kwargs)
    sink = entered[depth - 1]
    if not isinstance(sink, Observer):
        return getattr(sink, target)(*args, **kwargs)
    return sink.observe(target, lambda: _through(entered, depth - 1, original, target, args, kwargs), args, kwargs)


_PADDING = "_fill_padding_idx_with_zero"  # of embeddings, at the end of reset_parameters


def _zero_in_place(original: _F) -> _F:
    @functools.wraps(original)
    def zero_padding(self: Any) -> None:
        swapped = any(not isinstance(sink, Observer) for sink in sinks())
        if self.padding_idx is None or not swapped or not is_dtensor(self.weight):
            original(self)
            return
        fill_(draws(self.weight, Constant(0.0), 0, (0, self.padding_idx, 1)))
        count_as_written(self.weight)

    return zero_padding  # type: ignore[return-value]


INIT_PATCHES = Patches()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=INIT_PATCHES.after_fork)
