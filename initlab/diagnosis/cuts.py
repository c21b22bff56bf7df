"""Where the graph ends: the first function that gets a tensor with a gradient and gives one without."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from initlab.kernels.torch_internals import without_functions

from .._tree import tensors_in
from . import names
from .lines import line_of_user
from .trace import ModuleMode

_SHAPES = ("get", "size", "dim", "numel", "stride", "len", "is_floating_point", "is_complex", "data_ptr")
_READ = ("item", "tolist", "numpy", "float", "int")  # give no tensor
COMPARED: tuple[str, ...] = ("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isfinite", "isinf")
COMPARED += ("all", "any", "bool", "allclose", "equal")
_DISTRIBUTIONS = str(Path(torch.distributions.__file__).parent)


class Cut(NamedTuple):
    """A function that gives no gradient back.

    Args:
        op: its name; "sample" of a distribution.
        module: path of the module that runs; None outside the model.
        line: of the user's code.
        no_grad: whether it runs under no_grad().
    """

    op: str
    module: str | None
    line: str
    no_grad: bool


class Cuts(ModuleMode):
    """Follows what is computed from some parameters, to where it no longer wants a gradient. A context manager.

    Args:
        compared: whether a comparison is such a place; what it gives is a mask, most often, or a count for the log.

    Attributes:
        found: in the order in which they ran.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor], compared: bool = False) -> None:
        super().__init__(model)
        self._skipped = _SHAPES if compared else (*_SHAPES, *COMPARED)
        self.found: list[Cut] = []
        self._marked: dict[int, weakref.ref[Tensor]] = {id(p): weakref.ref(p) for p in parameters}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = names.of_function(func)
        if name in self._skipped:
            return out
        with without_functions():
            made = [out] if isinstance(out, Tensor) else list(tensors_in(out, 2))
            marked = [x for x in tensors_in((args, kwargs or {}), 3) if self._is_marked(x)]
            if not marked or (not made and name not in _READ):
                return out
            for one in made:
                self._marked[id(one)] = weakref.ref(one)
            if any(x.requires_grad for x in marked) and not any(one.requires_grad for one in made):
                op, line = _as_the_user_knows_it(name)
                off = not torch.is_grad_enabled() and op != "sample"
                self.found.append(Cut(op, self.modules.current, line, off))
        return out

    def _is_marked(self, tensor: Tensor) -> bool:
        known = self._marked.get(id(tensor))
        return known is not None and known() is tensor


def _as_the_user_knows_it(name: str) -> tuple[str, str]:
    """The function that the user's own code called, where it is a distribution's, and the line."""
    frame: FrameType | None = sys._getframe(2)
    outer = ""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_DISTRIBUTIONS):
            outer = frame.f_code.co_name
        elif outer:
            return outer, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return name, line_of_user()
