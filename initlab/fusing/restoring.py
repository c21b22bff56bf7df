"""A model that is run for what it shows, and put back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .._contents import CONTAINERS, Contents, restore_dict


@contextlib.contextmanager
def restored(model: nn.Module, values: bool = False) -> Iterator[Callable[[], list[Any]]]:
    """Put back the attributes, and the containers in them, of a module and of those in it, and torch's generators.

    Args:
        model: the module.
        values: whether to put back what its parameters and buffers hold too.

    Yields:
        What lists the values that the modules hold at that time.
    """
    modules = list(model.modules())
    before = [(m.__dict__, dict(m.__dict__)) for m in modules]
    containers = [Contents(v) for d, _ in before for v in d.values() if isinstance(v, CONTAINERS)]
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if values else []
    # Parameters are large, and a forward leaves them alone: that is checked, not put back.
    parameters = [(p, p._version) for p in model.parameters()] if values else []

    def stored() -> list[Any]:
        flat: list[Any] = []
        for module in modules:
            for value in module.__dict__.values():
                flat.extend(
                    value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,)
                )
        return flat

    devices = {t.device for t in (*model.parameters(), *model.buffers())} if values else set()
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        try:
            yield stored
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
