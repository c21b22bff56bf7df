"""Where the outputs of Linear layers go: what the readers of a model find, and what counts as a ReLU.

A tensor is followed through what only looks at it differently (views, shapes); ReLU, element by element, does not mind.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

RELU_FUNCTIONS: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)
RELU_METHODS = ("relu", "relu_")

# By the names of tensors' methods, attributes and torch's functions.
VIEWS = frozenset(
    {
        *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "transpose", "swapaxes"),
        *("permute", "squeeze", "unsqueeze", "contiguous", "movedim", "t", "mT"),
    }
)
QUESTIONS = frozenset(
    {
        *("shape", "size", "dim", "ndim", "dtype", "device", "numel", "nelement", "is_cuda", "is_floating_point"),
        *("stride", "element_size", "get_device", "requires_grad", "is_contiguous", "layout", "itemsize", "nbytes"),
        *("is_nested", "is_sparse", "is_quantized", "is_meta", "is_inference", "is_complex", "names", "grad_fn"),
        *("__len__", "_version", "is_mkldnn", "is_xpu", "is_leaf", "is_cpu", "is_mps"),
    }
)

_TORCH = os.path.dirname(torch.__file__)
_HIDDEN = tuple(os.path.join(_TORCH, name) for name in ("fx", "utils", "overrides.py", "_tensor.py"))
_HIDDEN += (os.path.join(_TORCH, "nn", "functional.py"), os.path.dirname(__file__))


def is_models(code: CodeType) -> bool:
    """Whether code may be a model's own, and is not what torch and this package have around its functions."""
    return not code.co_filename.startswith(_HIDDEN)


def frames(below: CodeType | None = None) -> Iterator[FrameType]:
    """The frames that run such code, from the innermost outwards, up to one that runs `below`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not below:
        if is_models(frame.f_code):
            yield frame
        frame = frame.f_back


@dataclass
class Use:
    """What is known of one Linear layer.

    Attributes:
        relu: whether its output was seen to go to a ReLU.
        modules: the modules that apply it.
        callers: modules whose code applies it as a function, and that code.
        viewed: whether a ReLU reads a view of its output.
        others: what else its output goes to, in words.
        unknown: why it may go elsewhere too, in words: code that could not be followed.
    """

    relu: bool = False
    modules: dict[nn.Module, None] = field(default_factory=dict)
    callers: dict[tuple[nn.Module, Any], None] = field(default_factory=dict)
    viewed: bool = False
    others: dict[str, None] = field(default_factory=dict)
    unknown: dict[str, None] = field(default_factory=dict)

    def add(self, other: Use, read_in: nn.Module, owner: nn.Module) -> None:
        """Add what was read of a Linear in one module, as it holds for the same one in a module like it."""
        self.relu |= other.relu
        self.viewed |= other.viewed
        self.others |= other.others
        self.unknown |= other.unknown
        self.callers |= {(owner, code): None for _, code in other.callers}
        places = {module: name for name, module in read_in.named_modules()} if read_in is not owner else {}
        for module in other.modules:
            self.modules[owner.get_submodule(places[module]) if places else module] = None


def called(name: str) -> str:
    """What a function is called in a sentence."""
    return {"getitem": "indexing", "truediv": "div", "iadd": "add", "imul": "mul"}.get(name, name).strip("_")


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function or of a property of Tensor, whose getters are called `__get__`."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return name
