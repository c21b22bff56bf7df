"""A model that is run for what it shows, and put back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._contents import CONTAINERS, Contents, restore_dict


@contextlib.contextmanager
def restored(model: nn.Module, values: bool = False) -> Iterator[None]:
    """Put back the attributes, and the containers in them, of a module and of those in it, and torch's generators.

    Args:
        model: the module.
        values: whether to put back what its parameters and buffers hold too.
    """
    modules = list(model.modules())
    before = [(m.__dict__, dict(m.__dict__)) for m in modules]
    containers = [Contents(c) for d, _ in before for value in d.values() for c in _containers(value)]
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if values else []
    # Parameters are large, and a forward leaves them alone: that is checked, not put back.
    parameters = [(p, p._version) for p in model.parameters()] if values else []

    devices = {t.device for t in (*model.parameters(), *model.buffers())} if values else set()
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        try:
            yield
        finally:
            for contents in containers:
                contents.restore()
            for entries, then in before:
                restore_dict(entries, then)
            with torch.no_grad():
                for buffer, copy in buffers:
                    buffer.copy_(copy)
    if any(p._version != version for p, version in parameters):
        raise RuntimeError("the run on the example changed parameters; fuse without an example")


def _containers(value: Any, depth: int = 4) -> Iterator[Any]:
    """The containers in a value, itself included."""
    if isinstance(value, CONTAINERS):
        yield value
    if depth and isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item, depth - 1)
