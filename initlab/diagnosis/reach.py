"""What the user's objects hold, and theirs: containers, attributes, tensors, iterators, random generators, closures.

A pass of the user's code may change any of it: a counter in a closure, a list in an object in a list, the scale of a
GradScaler. A snapshot keeps what is reached from the model, the optimizer, the loss function and the batch.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._contents import CONTAINERS, Contents

_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType, range)
_LARGEST = 1 << 22  # elements in tensors that only other objects hold: a data set is not copied
_MOST = 20_000  # objects that are looked into
_POSITIONED: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter(range(0))), type(iter("")))
_OWN = str(Path(__file__).parents[1])
_COPIED = (itertools.count, itertools.cycle, enumerate, zip, map, filter, itertools.chain, itertools.islice)
# Objects of other threads, processes and files: not the diagnosis's to put back.
_NOT_OURS = frozenset(
    (
        *(
            "threading",
            "_thread",
            "queue",
            "multiprocessing",
            "concurrent",
            "asyncio",
            "logging",
            "socket",
            "io",
            "_io",
        ),
        *("wandb", "tensorboard", "tensorboardX", "mlflow", "tqdm", "weakref", "subprocess", "ctypes"),
    )
)


class Reach:
    """Everything that is reached from some objects.

    Attributes:
        attributes: (object, its class, its attributes) of each object that has some.
        containers: the contents of lists, dicts, sets and deques.
        tensors: in order, each once.
        undo: functions that put back what is none of these.
    """

    def __init__(self, roots: Iterable[Any], functions: Iterable[Any] = ()) -> None:
        self.attributes: list[tuple[Any, type, dict[str, Any]]] = []
        self.containers: list[Contents] = []
        self.tensors: list[Tensor] = []
        self.iterators: list[tuple[Any, Any]] = []
        self.undo: list[Callable[[], None]] = []
        self._room = _LARGEST
        self._seen: dict[int, Any] = {}  # holds them: an id is not used again
        self._walk([(root, True) for root in roots])
        self._walk([(function, False) for function in functions])

    def _walk(self, stack: list[tuple[Any, bool]]) -> None:
        stack.reverse()
        while stack and len(self._seen) < _MOST:
            value, own = stack.pop()
            if isinstance(value, _ATOMS) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            found = self._look_into(value, own)
            own = own and isinstance(value, (nn.Module, Optimizer, tuple, *CONTAINERS))
            stack += [(item, own) for item in reversed(list(found)) if not isinstance(item, _ATOMS)]

    def _look_into(self, value: Any, own: bool) -> Iterable[Any]:
        """Keep one object, and say what it holds."""
        if isinstance(value, Tensor):
            if not own:
                self._room -= value.numel()
            if own or self._room >= 0:
                self.tensors.append(value)
            return ()
        if isinstance(value, CONTAINERS):
            self.containers.append(Contents(value))
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
            return [*inner, *self._attributes(value)]
        if isinstance(value, tuple | frozenset):
            return list(value)
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, types.MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, types.FunctionType):
            return self._variables(value)
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self.undo.append(functools.partial(_set_state, value, state))
            return ()
        if isinstance(value, random.Random):
            kept = value.getstate()
            self.undo.append(lambda: value.setstate(kept))
            return ()
        if (undo := _of_numpy(value)) is not None:
            self.undo.append(undo)
            return ()
        if isinstance(value, _POSITIONED):
            self._position(value)
            return ()
        if isinstance(value, _COPIED):
            self.iterators.append((value, copy.copy(value)))
            return ()
        return self._attributes(value)

    def _attributes(self, value: Any) -> Iterable[Any]:
        entries = getattr(value, "__dict__", None)
        if type(entries) is not dict or (type(value).__module__ or "").partition(".")[0] in _NOT_OURS:
            return ()
        if not isinstance(value, nn.Module) and any(_is_foreign(item) for item in entries.values()):
            return ()  # another thread may be at work in it
        self.attributes.append((value, type(value), dict(entries)))
        return entries.values()

    def _variables(self, function: types.FunctionType) -> Iterable[Any]:
        """What a function's closure and the globals that it names are bound to."""
        found = []
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            self.undo.append(functools.partial(setattr, cell, "cell_contents", held))
            found.append(held)
        for name in () if _is_installed(function) else function.__code__.co_names:
            if name in function.__globals__:
                held = function.__globals__[name]
                if not isinstance(held, types.ModuleType | type | types.FunctionType):
                    self.undo.append(functools.partial(function.__globals__.__setitem__, name, held))
                found.append(held)
        return [*found, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]

    def _position(self, iterator: Any) -> None:
        """Where an iterator of a sequence stands."""
        reduced = iterator.__reduce__()
        if len(reduced) > 2 and reduced[2] is not None:
            at = reduced[2]

            def back() -> None:
                now = iterator.__reduce__()
                if len(now) > 2 and now[2] != at:
                    iterator.__setstate__(at)

            self.iterators.append((iterator, copy.copy(iterator)))
            self.undo.append(back)

    def stand_ins(self) -> dict[int, Any]:
        """Copies of the iterators that have moved and cannot be moved back, by their ids."""
        found = {}
        for iterator, kept in self.iterators:
            try:
                moved = not _alike(iterator.__reduce__(), kept.__reduce__())
            except Exception:
                moved = True
            if moved:
                found[id(iterator)] = copy.copy(kept)
        return found


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _alike(a: Any, b: Any) -> bool:
    """Whether two descriptions of an iterator are the same, without comparing tensors."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int | float | str | type(None)) or isinstance(b, int | float | str | type(None)):
        return type(a) is type(b) and a == b
    if hasattr(a, "__reduce__") and hasattr(a, "__next__") and type(a) is type(b):
        return _alike(a.__reduce__(), b.__reduce__())
    return a is b


def _is_installed(function: types.FunctionType) -> bool:
    """Whether a function is a library's, whose globals are no part of a training step."""
    file = function.__code__.co_filename
    return "-packages" in file or file.startswith((_OWN, "<frozen"))


def _is_foreign(value: Any) -> bool:
    return type(value).__module__ in ("_thread", "threading", "queue", "_queue", "multiprocessing.queues")


def _of_numpy(value: Any) -> Callable[[], None] | None:
    """What puts a random generator of numpy's back, or an array; None for anything else."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        bits, state = value.bit_generator, value.bit_generator.state
        return functools.partial(setattr, bits, "state", state)
    if isinstance(value, numpy.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if (
        isinstance(value, numpy.ndarray)
        and value.dtype.kind != "O"
        and value.size <= _LARGEST
        and value.flags.writeable
    ):
        return functools.partial(numpy.copyto, value, value.copy())
    return None
