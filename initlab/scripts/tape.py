"""What a training step called between its batch and its loss, so that the doctor can run it again.

A script computes its loss in code of its own. While it runs, the outermost calls of modules are recorded, and those of
torch's functions outside of modules that depend on one, or on a parameter: a handful for most losses. What loads and
prepares data is not, nor anything inside a module. What was recorded becomes `loss_fn(model, batch)`: the tensors that
came from outside are the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from initlab.kernels.torch_internals import count_function_modes, pop_function_mode, push_function_mode

from .._tree import tensors_in
from ..diagnosis.autograd_calls import Run, function_calls
from .history import History

_MOST_EVENTS = 100_000  # of a step that never comes to a backward pass


@dataclass(slots=True)
class Event:
    """One call: of an outermost module, or of one of torch's functions outside of modules.

    Args:
        function: what was called; a module for a module's call.
        outputs: the tensors that came out, in order; None where it raised an error.
        place: file and line of the user's code.
        grad: whether gradients were recorded.
        autocast: dtype on the CPU and on other devices, None where it was off.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: tuple[str, int]
    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    outputs: list[Tensor] | None = None


class Tape(TorchFunctionMode):
    """Records the events of the step that is under way, in the thread that entered it.

    Args:
        is_users: whether a file's name is of the user's own code.
    """

    def __init__(self, is_users: Callable[[str], bool]) -> None:
        super().__init__()
        self.is_users = functools.cache(is_users)  # asked for each frame of each call
        self.events: list[Event] = []
        self.history = History()
        self.made: set[int] = set()  # ids of what the events put out; they hold it, so that no id is used again
        self.thread = threading.get_ident()
        self.inside = False  # a module's call
        self.paused = False
        self.resting = self.lifted = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or getattr(func, "__name__", "") in _NOT_STEPS:
            return func(*args, **kwargs)
        if not self.depends(args):
            output = func(*args, **kwargs)
            if not self.inside:
                self.history.note(func, args, kwargs, output, self.place)
            return output
        event = self.begin(func, args, kwargs)
        self.end(event, output := func(*args, **kwargs))
        return output

    def depends(self, values: Any) -> bool:
        """Whether a tensor among arguments comes from an event, or requires grad."""
        for value in values:
            if isinstance(value, Tensor):
                if value.requires_grad or id(value) in self.made:
                    return True
            elif type(value) in (list, tuple) and self.depends(value):
                return True
        return False

    def end(self, event: Event, output: Any) -> None:
        """Note what a call put out."""
        event.outputs = [output] if isinstance(output, Tensor) else list(tensors_in(output))
        self.made.update(map(id, event.outputs))

    def drop(self, count: int) -> None:
        """Forget the first events."""
        del self.events[:count]
        self.made = {id(tensor) for event in self.events for tensor in event.outputs or ()}

    def begin(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Event:
        """Record a call before it runs: it may raise an error."""
        if len(self.events) > _MOST_EVENTS:
            self.drop(len(self.events))
        event = Event(function, args, kwargs, self.place(), torch.is_grad_enabled(), _autocast())
        self.events.append(event)
        return event

    def place(self) -> tuple[str, int]:
        """File and line of the innermost frame that is the user's own."""
        frame = self.users_frame()
        return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)

    def users_frame(self) -> FrameType | None:
        """The innermost frame of the user's own code."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not self.is_users(frame.f_code.co_filename):
            frame = frame.f_back
        return frame

    def lift(self) -> bool:
        """Take the tape off the stack of modes, as if there were none; where others lie on it, let everything pass."""
        innermost = pop_function_mode() if count_function_modes() else None
        if innermost is self:
            return True
        if innermost is not None:
            push_function_mode(innermost)
        self.paused = True
        return False

    def lay(self, lifted: bool) -> None:
        """Undo `lift`, which returned whether the tape was taken off."""
        if lifted:
            push_function_mode(self)
        self.paused = False

    def rest(self) -> None:
        """Record nothing until `resume`: while an optimizer takes its step."""
        if not self.resting and not self.inside and not self.paused:
            self.lifted, self.resting = self.lift(), True

    def resume(self) -> None:
        """Record again."""
        if self.resting:
            self.resting = False
            self.lay(self.lifted)

    def whole(self, function: Callable[..., Any], run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call, and nothing that happens inside of it."""
        event = self.begin(function, args, kwargs)
        self.inside = True
        # Without the tape what it calls costs nothing, and torch.compile has nothing to guard.
        lifted = self.lift()
        try:
            output = run(*args, **kwargs)
        finally:
            self.inside = False
            self.lay(lifted)
        self.end(event, output)
        return output

    @contextlib.contextmanager
    def calls(self) -> Iterator[None]:
        """Record the outermost calls of modules inside the block, and those of the user's autograd functions.

        Neither is a function of torch's that a mode would see.
        """
        tape, plain = self, nn.Module.__call__

        def is_elsewhere() -> bool:
            return tape.inside or tape.paused or threading.get_ident() != tape.thread

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_elsewhere():
                return plain(module, *args, **kwargs)
            return tape.whole(module, functools.partial(plain, module), args, kwargs)

        def apply(function: type[torch.autograd.Function], run: Run, args: Any, kwargs: Any) -> Any:
            if is_elsewhere() or not tape.depends(args):
                return run(*args, **kwargs)
            return tape.whole(_Apply(function), run, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with function_calls(apply):
                yield
        finally:
            nn.Module.__call__ = plain  # type: ignore[method-assign]


class _Apply:
    """`apply` of an autograd function, looked up when it is called: whoever runs the step again may watch it."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


_NOT_STEPS = {"backward", "item", "tolist", "numpy", "__repr__", "__format__", "__str__", "__len__", "__get__", "dim"}
_NOT_STEPS |= {"size", "numel", "stride", "is_floating_point", "__bool__", "__float__", "__int__", "register_hook"}


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor of the recorded step."""

    key: int


@dataclass
class _Call:
    """An event whose tensors have been replaced by slots: it keeps no graph and no activations."""

    event: Event
    args: Any
    kwargs: Any
    outputs: list[int]


class Replay:
    """A recorded step as a `loss_fn(model, batch)`.

    Args:
        events: of the step.
        loss: the tensor whose value it returns; None where the last event raised an error.
        model: what the doctor gets as the model; outermost calls of it go to the model that `loss_fn` is called with.
        names: by id, the names that tensors have in the script.

    Attributes:
        batch: the tensors that came from outside, by these names.
    """

    def __init__(self, events: list[Event], loss: Tensor | None, model: nn.Module, names: dict[int, str]) -> None:
        self.loss = None if loss is None else id(loss)
        self.model = model
        own = {id(p) for p in (*model.parameters(), *model.buffers())}
        made: set[int] = set()
        inputs: dict[int, Tensor] = {}
        needed: list[Event] = []
        for event in _needed(events, loss):
            for tensor in tensors_in((event.args, event.kwargs)):
                if id(tensor) not in made and id(tensor) not in own and not isinstance(tensor, nn.Parameter):
                    inputs[id(tensor)] = tensor
            outputs = {id(tensor) for tensor in event.outputs or ()}
            if not outputs or not outputs <= inputs.keys():  # what was changed in place has changed already
                needed.append(event)
                made |= outputs
        self.batch: dict[str, Tensor] = {}
        self.keys: dict[int, str] = {}
        for number, (key, tensor) in enumerate(inputs.items()):
            name = names.get(key, f"tensor{number}")
            self.keys[key] = name = name if name not in self.batch else f"{name}{number}"
            self.batch[name] = tensor if tensor.is_leaf else tensor.detach()
        known = made | inputs.keys()

        def slot(value: Any) -> Any:
            return _Slot(id(value)) if isinstance(value, Tensor) and id(value) in known else value

        self.calls: list[_Call] = []
        for event in needed:
            bare = dataclasses.replace(event, args=(), kwargs={}, outputs=None)
            args, kwargs = tree_map(slot, (event.args, event.kwargs))
            self.calls.append(_Call(bare, args, kwargs, [id(tensor) for tensor in event.outputs or ()]))
        # Each an attribute of its own: that is where the doctor looks for modules whose state it must put back.
        called = [event.function for event in needed if isinstance(event.function, nn.Module)]
        vars(self).update({f"module{number}": module for number, module in enumerate(dict.fromkeys(called))})

    def __call__(self, model: Any, batch: Any) -> Tensor:
        values: dict[int, Tensor] = {key: batch[name] for key, name in self.keys.items()}
        result: Any = None

        def now(value: Any) -> Any:
            return values[value.key] if isinstance(value, _Slot) else value

        for call in self.calls:
            args, kwargs = tree_map(now, (call.args, call.kwargs))
            function = _in(model, self.model, call.event.function)
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(call.event.grad and torch.is_grad_enabled()))
                for kind, dtype in call.event.autocast:
                    stack.enter_context(torch.autocast(kind, dtype))
                result = function(*args, **kwargs)
            values.update(zip(call.outputs, tensors_in(result), strict=False))
        return next(tensors_in(result)) if self.loss is None else values[self.loss]


def _in(model: nn.Module, recorded: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """A recorded module as it is in the model that the loss function is called with."""
    if function is recorded:
        return model
    if isinstance(function, nn.Module) and model is not recorded:
        for name, module in recorded.named_modules():
            if module is function:
                return model.get_submodule(name)
    return function


def _needed(events: list[Event], loss: Tensor | None) -> list[Event]:
    """The events that a loss depends on, in order: each that made one of the tensors that a later one read."""
    last = [] if loss is not None or not events else events[-1:]  # it raised the error
    wanted = {id(tensor) for event in last for tensor in tensors_in((event.args, event.kwargs))}
    wanted |= set() if loss is None else {id(loss)}
    kept = last[:]
    for event in reversed(events[: len(events) - len(last)]):
        if any(id(tensor) in wanted for tensor in event.outputs or ()):
            kept.append(event)
            wanted |= {id(tensor) for tensor in tensors_in((event.args, event.kwargs))}
    return kept[::-1]
