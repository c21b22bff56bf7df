"""What a script computed last outside of its model: where a batch got a value that is not finite."""

from __future__ import annotations

import linecache
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tree import tensors_in
from ..diagnosis import Cause, Operation, Place, reason

_KEPT = 512  # calls
_LARGEST = 1 << 14  # elements of a tensor that is kept


class _Made(NamedTuple):
    number: int
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Sequence[Tensor]
    place: tuple[str, int]

    @property
    def name(self) -> str:
        """Of the function."""
        return getattr(self.function, "__name__", "").strip("_")

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it was made of."""
        return tensors_in((self.args, self.kwargs))


class History:
    """The last calls of torch's functions, of small tensors, that do not depend on what is learned."""

    def __init__(self) -> None:
        self.calls: deque[tuple[Any, ...]] = deque(maxlen=_KEPT)  # as _Made has them, which takes longer to make
        self.count = 0
        self.step = 0  # the first call after the last backward pass

    def note(self, function: Any, args: Any, kwargs: Any, output: Any, place: Callable[[], tuple[str, int]]) -> None:
        """Keep a call, where it is small, and what it put out may be not finite. It is on every call's way.

        Args:
            place: gives file and line of the user's code, where the call is kept.
        """
        outputs = (output,) if isinstance(output, Tensor) else tuple(tensors_in(output))
        if not outputs or not outputs[0].is_floating_point():
            return
        for value in (*outputs, *args, *kwargs.values()):
            if isinstance(value, Tensor) and value.numel() > _LARGEST:
                return
            if type(value) in (list, tuple) and any(part.numel() > _LARGEST for part in tensors_in(value)):
                return
        self.count += 1
        self.calls.append((self.count, function, args, kwargs, outputs, place()))

    def next_step(self) -> None:
        """A backward pass has been called: what follows belongs to another step."""
        self.step = self.count + 1

    def origin(self, tensor: Tensor) -> _Made | None:
        """The call that made the first value that is not finite on the way to a tensor; None where it is not known."""
        before = self.count + 1
        while True:
            earlier = (made for made in map(_Made._make, reversed(self.calls)) if made.number < before)
            made = next((made for made in earlier if _is_among(tensor, made.outputs)), None)
            if made is None:
                return None  # it came from elsewhere: a file, an array, a call that is not kept any more
            sources = list(made.tensors())
            if any(_is_among(source, made.outputs) for source in sources):
                return None  # written in place: what it was made of is gone
            bad = next((source for source in sources if not _is_finite(source)), None)
            if bad is None:
                return made if sources else None
            tensor, before = bad, made.number


def cause_of(made: _Made, name: str) -> Cause:
    """A cause out of the script's own code.

    Args:
        made: the call.
        name: of the tensor of the batch that holds what it made.
    """
    file, line = made.place
    bad = next(t for t in made.outputs if not _is_finite(t))
    what = "NaN" if bool(bad.isnan().any()) else "infinities"
    why = reason(Operation(made.name, made.args, made.kwargs))
    said = why.text if why is not None else f"makes the first value that is not finite ({what}) of finite ones"
    code = why.form.code if why is not None and why.form is not None else ""
    return Cause(
        "operation",
        "broken",
        Place(op=made.name),
        f"{made.name} in line {line} of {Path(file).name} {said}: batch[{name!r}] holds it.",
        {"made": what, "line": f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"},
        f"# in line {line}: {code}" if code else "",
    )


def _is_among(tensor: Tensor, tensors: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in tensors)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())
