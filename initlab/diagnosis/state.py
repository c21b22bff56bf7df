"""A snapshot of everything of the user's that a diagnosis touches, restored bit for bit."""

import contextlib
import functools
import inspect
import random
import sys
import types
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from initlab.kernels.torch_internals import set_versions

from .._contents import restore_dict
from .reach import Reach


class Snapshot:
    """A copy of what training changes: tensors, gradients, attributes, the optimizer, random generators.

    Args:
        models: their parameters, buffers, other tensors, training flags, hooks and attributes are kept.
        optimizer: its state, groups and hooks are kept.
        tensors: others to keep, such as those of the batch.
        others: objects that a pass may change: the batch, the loss function. What they hold is kept too.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        optimizer: Optimizer | None,
        tensors: Iterable[Tensor],
        others: Iterable[Any] = (),
    ) -> None:
        roots: list[Any] = [*(module for model in models for module in model.modules()), *tensors]
        if optimizer is not None:  # an attached clipper counts steps, and these are none of the user's
            roots += [optimizer, getattr(optimizer, "_initlab_clipper", None)]
        self.reach = Reach(roots, others)
        self.tensors = [_TensorCopy(tensor) for tensor in self.reach.tensors]
        self.random = RandomState()

    def restore(self) -> None:
        """Put everything back."""
        for undo in self.reach.undo:
            undo()
        new = self.reach.stand_ins()
        for owner, kind, attributes in self.reach.attributes:
            if type(owner) is not kind:
                owner.__class__ = kind
            restore_dict(owner.__dict__, {name: new.get(id(value), value) for name, value in attributes.items()})
        for container in self.reach.containers:
            container.replace(new) if new else container.restore()
        for copied in self.tensors:
            copied.restore()
        self.random.restore()


def referenced_modules(function: Any, depth: int = 3) -> list[nn.Module]:
    """The modules that a function refers to: by closure or globals, as a method's owner holds them, bound by partial.

    They run with the model, collect gradients and change their buffers.
    """
    values: list[Any] = []
    if isinstance(function, weakref.ProxyTypes):  # which answers as what it stands for, and cannot be hashed
        return []
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, functools.partial):
        values += [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, types.MethodType):
        values += [function.__func__, function.__self__]
    elif isinstance(function, types.FunctionType):
        with contextlib.suppress(ValueError):  # a variable of the closure that is not bound yet
            variables = inspect.getclosurevars(function)
            values += [*variables.nonlocals.values(), *variables.globals.values()]
    elif hasattr(function, "__dict__") and not isinstance(function, type | types.ModuleType):
        values += vars(function).values()
    found = (module for value in values if depth for module in referenced_modules(value, depth - 1))
    return list(dict.fromkeys(found))


class _TensorCopy:
    """A tensor with its elements, its gradient and its place in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.needs_grad = tensor.requires_grad
        self.leaf = tensor.is_leaf
        self.grad = tensor.grad if tensor.is_leaf else None
        self.alias = self.copy = None
        if tensor.layout == torch.strided and not tensor.is_meta and not is_lazy(tensor):
            self.alias = tensor.detach()
            self.version = None if tensor.is_inference() else tensor._version
            self.copy = _without_repeats(self.alias).clone()
        elif tensor.layout == torch.sparse_coo:  # a sparse momentum, which a step changes in place
            self.version = None if tensor.is_inference() else tensor._version
            self.copy = tensor.detach().clone()

    def restore(self) -> None:
        tensor = self.tensor
        if self.alias is not None and self.copy is not None:
            with torch.no_grad():
                if tensor.dtype != self.alias.dtype or tensor.data_ptr() != self.alias.data_ptr():
                    tensor.data = self.alias
                # Through .data: a graph that the user holds must not find its tensors changed.
                _without_repeats(tensor.data).copy_(self.copy)
            if self.version is not None and tensor._version != self.version:
                set_versions((tensor,), (self.version,))
        elif self.copy is not None and self.version is not None and tensor._version != self.version:
            with torch.no_grad():
                tensor.copy_(self.copy)
            set_versions((tensor,), (self.version,))
        if self.leaf:
            if tensor.requires_grad != self.needs_grad:
                tensor.requires_grad_(self.needs_grad)
            tensor.grad = self.grad


def _without_repeats(tensor: Tensor) -> Tensor:
    """A view without the repetitions of an expanded tensor, which cannot be written to."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class RandomState:
    """Where the random generators of torch, its devices, Python and numpy stand."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self.python = random.getstate()
        self.numpy = numpy.random.get_state() if (numpy := sys.modules.get("numpy")) else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
