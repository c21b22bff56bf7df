"""A diagnosis beside other ranks: what it refuses, how it avoids communication, and whose diagnosis comes first.

Which passes it runs depends on what it finds, so no two ranks need run the same ones: a collective in them would wait
for a rank that does not come, or pair with another one of the job's.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from .._contents import CONTAINERS, Contents
from ..distributed.dtensors import is_dtensor
from .report import Diagnosis

_SHARDED = (("torch.distributed.fsdp", "FSDPModule"), ("torch.distributed.fsdp", "FullyShardedDataParallel"))
_DDP = (("torch.nn.parallel.distributed", "DistributedDataParallel"),)
_COLLECTIVES = ("c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd")
_WORST = ("broken", "warning", "healthy")


class CommunicatesError(NotImplementedError):
    """A diagnosis would have to communicate: raised to the caller, never a diagnosis."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}, and a diagnosis runs passes that other ranks do not run, so it must not communicate. Diagnose "
            "one unsharded copy of the model, with a loss of its own batch alone; or let "
            "initlab.watch(model).report(across=True) name the first bad rank and module"
        )


def refuse_sharded(model: nn.Module, others: Iterable[nn.Module], tensors: Iterable[Tensor]) -> None:
    """Refuse what communicates in its forward pass, before anything runs.

    Args:
        model: in its wrappers.
        others: other modules that run with it.
        tensors: of the batch.

    Raises:
        CommunicatesError: for DTensors and FSDP.
    """
    sharded = sharded_classes()
    for tensor in tensors:
        if is_dtensor(tensor):
            raise CommunicatesError("the batch holds a DTensor")
    for owner in (model, *others):
        for name, module in owner.named_modules():
            who = repr(name) if name else "the model" if owner is model else "what loss_fn refers to"
            if isinstance(module, sharded):
                raise CommunicatesError(f"{who} is a {type(module).__name__}")
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and is_dtensor(tensor):
                    raise CommunicatesError(f"{leaf} of {who} ({type(module).__name__}) is a DTensor")


def sharded_classes() -> tuple[type, ...]:
    """The classes of modules that gather their parameters from other ranks."""
    return _classes(_SHARDED)


def _classes(known: Iterable[tuple[str, str]]) -> tuple[type, ...]:
    """Those of the classes that have been imported; of others a model holds no instance."""
    found = ((sys.modules.get(where), name) for where, name in known)
    return tuple(getattr(module, name) for module, name in found if module is not None)


def without_collectives() -> AbstractContextManager[Any]:
    """Refuses collectives before they are called, where there are other ranks.

    Raises:
        CommunicatesError: inside, from the call.
    """
    dist = torch.distributed
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _RefuseCollectives() if several else nullcontext()


class _RefuseCollectives(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _COLLECTIVES:
            raise CommunicatesError(f"the model, the loss or the optimizer calls {func.overloadpacket}")
        return func(*args, **(kwargs or {}))


@contextmanager
def parameter_aliases(models: Iterable[nn.Module], optimizer: Optimizer | None) -> Iterator[None]:
    """Replaces the parameters in the models and the optimizer by aliases, which share their memory.

    DDP registers hooks on the nodes of the graph at which a parameter's gradient arrives, and they communicate if a
    backward pass is due. The aliases have nodes of their own; and a change of dtype, which makes a tensor forget its
    node, and so DDP its parameter, does not touch the originals. Nor do gradients.

    Args:
        models: without DTensors.
        optimizer: of their parameters.

    Raises:
        CommunicatesError: inside, where a DDP among the models is called.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    owners: list[Any] = [*modules, *([] if optimizer is None else [optimizer])]
    groups = [] if optimizer is None else optimizer.param_groups
    values = [value for owner in owners for value in vars(owner).values()]
    values += [value for group in groups for value in group.values()]
    containers = [Contents(value) for value in values if isinstance(value, CONTAINERS)]
    parameters = [p for module in modules for p in module._parameters.values()]
    originals = {id(p): p for p in parameters if p is not None and not is_lazy(p)}
    aliases = {place: _alias(parameter) for place, parameter in originals.items()}
    ddp = _classes(_DDP)
    try:
        for container in containers:
            container.replace(aliases)
        for module in modules:
            if isinstance(module, ddp):
                module.register_forward_pre_hook(_refuse_call)  # which goes when its container is restored
        yield
    finally:
        for container in containers:
            container.restore()


def _refuse_call(module: nn.Module, args: Any) -> None:
    raise CommunicatesError(f"a {type(module).__name__}, inside of the model or one that loss_fn refers to, is called")


def _alias(parameter: Tensor) -> nn.Parameter:
    alias = nn.Parameter(parameter.detach(), parameter.requires_grad)
    alias.__dict__.update(parameter.__dict__)
    return alias


def merge(diagnoses: Mapping[int, Diagnosis | str]) -> Diagnosis:
    """The diagnosis of the first bad rank: the worst verdict, then the earliest step, then the lowest rank.

    Args:
        diagnoses: by rank; for a rank that raised an error, its text.

    Raises:
        RuntimeError: if a rank raised an error.
    """
    for rank, one in diagnoses.items():
        if isinstance(one, str):
            raise RuntimeError(f"diagnose raised an error on rank {rank}, so there is none of all ranks: {one}")
    found = {rank: one for rank, one in diagnoses.items() if isinstance(one, Diagnosis)}

    def order(rank: int) -> tuple[Any, ...]:
        broke_at = found[rank].broke_at
        return _WORST.index(found[rank].verdict), math.inf if broke_at is None else broke_at, rank

    first = min(found, key=order)
    return dataclasses.replace(found[first], rank=first, verdicts={rank: one.verdict for rank, one in found.items()})
