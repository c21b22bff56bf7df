"""How a model is called on a batch, and whether the batch can tell anything about it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..diagnosis.batch import leaves, mapped
from ..diagnosis.loaders import is_loader
from ..models.naming import unwrapped
from ..models.recipe_parts import short_repr

Forward: TypeAlias = Callable[[nn.Module, Any], Any]

_SAY = "say how the model is called: forward=lambda model, batch: model(...)"


def call_model(model: nn.Module, batch: Any) -> Any:
    """The output of a model for a batch, called as its signature asks.

    Args:
        model: the model.
        batch: a tensor is the argument. Of a tuple or list the last item is the target, and the others are the
            arguments, as far as the model takes them. The items of a mapping, dataclass or named tuple whose names
            forward() has are keyword arguments; where it has none of them, the first that is no target is the argument.

    Raises:
        TypeError: if forward() takes other arguments; the message says how to call it by hand.

    Example:
        >>> import torch
        >>> from initlab.fitting.calling import call_model
        >>> call_model(torch.nn.Linear(2, 3), (torch.ones(4, 2), torch.zeros(4))).shape
        torch.Size([4, 3])
    """
    args, kwargs = arguments_for(model, mapped(batch, lambda x: x if isinstance(x, Tensor) else torch.as_tensor(x)))
    return model(*args, **kwargs)


def arguments_for(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a model is called with, see `call_model`."""
    signature = inspect.signature(unwrapped(model).forward)
    named = _named_items(batch)
    if named is not None:
        targets = {leaf.path[0] for leaf in leaves(named) if leaf.is_target and leaf.path}
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
        taken = {name: value for name, value in named.items() if name in signature.parameters}
        if open_ended and taken:
            taken |= {name: value for name, value in named.items() if name not in targets}
        others = [value for name, value in named.items() if name not in targets]
        tried = [((), taken), (tuple(others[:1]), {})] if taken else [(tuple(others[:1]), {}), (tuple(others), {})]
    elif isinstance(batch, list | tuple):
        items = tuple(batch)
        tried = [(items[:-1] or items, {}), (items[:1], {}), (items, {})]
    else:
        tried = [((batch,), {})]
    for args, kwargs in tried:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            continue
        return args, kwargs
    raise TypeError(
        f"{type(unwrapped(model)).__name__}.forward{signature} does not take the batch, {_told(batch)}; {_SAY}"
    )


def _named_items(batch: Any) -> dict[str, Any] | None:
    """The items of a batch that has names for them; None of any other."""
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {each.name: getattr(batch, each.name) for each in dataclasses.fields(batch)}
    return dict(batch._asdict()) if isinstance(batch, tuple) and hasattr(batch, "_asdict") else None


def _told(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping of {', '.join(map(str, batch))}"
    return f"{len(batch)} items" if isinstance(batch, list | tuple) else short_repr(batch)


def check_batch(batch: Any) -> None:
    """Raise where a batch says nothing about a model.

    Raises:
        TypeError: for a loader, and for what holds no tensor.
        ValueError: for inputs that are empty, on the meta device, not finite, or whose rows are all alike.
    """
    if is_loader(batch):
        raise TypeError(f"batch is {short_repr(batch)}, which gives batches; pass one, next(iter(loader))")
    found = leaves(batch)
    if not found:
        raise TypeError(
            f"batch is {short_repr(batch)}; it must be one real batch: tensors, or arrays of numpy's, alone or in "
            "tuples, lists, dicts and dataclasses"
        )
    inputs = [leaf for leaf in found if not leaf.is_target] or found
    for leaf in inputs:
        if leaf.tensor.is_meta or leaf.tensor.numel() == 0:
            what = "is on the meta device" if leaf.tensor.is_meta else f"has the shape {tuple(leaf.tensor.shape)}"
            raise ValueError(f"{leaf.code} {what}: it has no values to go by")
        if leaf.tensor.is_floating_point() and not bool(leaf.tensor.isfinite().all()):
            raise ValueError(
                f"{leaf.code} holds NaN or infinities; mend the data first: initlab.scan_data(loader) tells where"
            )
    if not any(_varies(leaf.tensor) for leaf in inputs):
        raise ValueError(
            f"no two rows of {inputs[0].code} differ, {tuple(inputs[0].tensor.shape)}: a variance needs several rows "
            "of real data"
        )


def _varies(tensor: Tensor) -> bool:
    """Whether rows differ: of numbers those along the last dimension, of integers all elements."""
    plain = not tensor.is_floating_point() and not tensor.is_complex()
    rows = tensor.reshape(-1, 1) if tensor.dim() < 2 or plain else tensor.reshape(-1, tensor.shape[-1])
    return bool((rows != rows[:1]).any())
