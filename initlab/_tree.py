"""The tensors in what users pass around: batches, arguments and outputs of modules, attributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import SUPPORTED_NODES, GetAttrKey, MappingKey, SequenceKey

Path: TypeAlias = tuple[Any, ...]  # of torch.utils._pytree's keys; its keystr writes them as code: "[0]['x'].logits"


def tensors_with_paths(value: Any, path: Path = (), depth: int = -1) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in nested containers, in order, each with its path.

    Looks into lists, tuples, mappings, dataclasses and torch's distributions, their subclasses included, and into what
    else torch.utils._pytree has been told about. pytree alone would take a dataclass, a BatchEncoding or a subclass of
    dict for a leaf, and has no paths into what transformers registers.

    Args:
        value: a tensor, a container, or anything else, which has no tensors.
        path: of the value itself.
        depth: how many containers deep to look; -1 is no limit.

    Example:
        >>> import torch
        >>> from torch.utils._pytree import keystr
        >>> from initlab._tree import tensors_with_paths
        >>> [keystr(path) for path, tensor in tensors_with_paths([torch.ones(1), {"x": (torch.ones(1), 3)}])]
        ['[0]', "[1]['x'][0]"]
    """
    if isinstance(value, Tensor):
        yield path, value
    elif depth:
        for key, item in items_in(value):
            yield from tensors_with_paths(item, (*path, key), depth - 1)


def tensors_in(value: Any, depth: int = -1) -> Iterator[Tensor]:
    """The tensors in nested containers, in order. See `tensors_with_paths`.

    Example:
        >>> import torch
        >>> from initlab._tree import tensors_in
        >>> [len(tensor) for tensor in tensors_in({"x": torch.ones(2), "y": [torch.ones(3), None]})]
        [2, 3]
    """
    return (tensor for _, tensor in tensors_with_paths(value, depth=depth))


def items_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a container holds, by torch.utils._pytree's keys; nothing for anything else."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield SequenceKey(index), item
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield MappingKey(key), item
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield GetAttrKey(field.name), getattr(value, field.name, None)
    elif isinstance(value, Distribution):
        for name, item in vars(value).items():
            yield GetAttrKey(name), item
    elif (node := SUPPORTED_NODES.get(type(value))) is not None:
        for index, item in enumerate(node.flatten_fn(value)[0]):
            yield SequenceKey(index), item
