"""Redirect: inside it, this thread's init and sampling calls go to a sink.

A TorchFunctionMode sees `Tensor.normal_`, `Tensor.uniform_` and the functions of torch.nn.init that call
`handle_torch_function`, however they were imported. For what it does not see there are patches.
"""

from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .patches import INIT_PATCHES, Sink, sinks


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
        for name in _DISPATCHING:
            if func is init_functions.get(name):
                return getattr(self.sink, name)(*args, **kwargs)
        return self.other(func, args, kwargs)

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What becomes of every other call to torch."""
        return func(*args, **kwargs)

    def __enter__(self) -> "Redirect":
        INIT_PATCHES.add()
        try:
            super().__enter__()
        except BaseException:
            INIT_PATCHES.remove()
            raise
        sinks().append(self.sink)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sinks().pop()
        try:
            super().__exit__(kind, error, trace)
        finally:
            INIT_PATCHES.remove()


_DISPATCHING = ("uniform_", "normal_", "kaiming_uniform_", "constant_")  # they call handle_torch_function


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


_SKIPPED_ON_META = {torch.nn.init.orthogonal_.__code__: "orthogonal_", torch.nn.init.sparse_.__code__: "sparse_"}


def skipped_on_meta(frame: FrameType | None) -> tuple[str, dict[str, Any]]:
    """The function of torch.nn.init that is running and its arguments, where it leaves meta tensors alone; else empty.

    Those that a library has imported by name go past every patch; but they ask the tensor for its dimensions, which a
    function mode sees.
    """
    for _ in range(4):  # other modes may lie between
        if frame is None:
            break
        if frame.f_code in _SKIPPED_ON_META:
            given = {name: value for name, value in frame.f_locals.items() if name != "tensor"}
            return _SKIPPED_ON_META[frame.f_code], given
        frame = frame.f_back
    return "", {}
