"""FSDP and DDP modules whose parameters are, for a while or for good, not the tensors that they stand for."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .dtensors import is_dtensor, placements_text


def reshard(model: Any) -> None:
    """Have FSDP2's modules of a model hold their own shards again: gathered parameters are copies, soon to be freed.

    Raises:
        RuntimeError: for a part of such a module that holds plain tensors; only the module itself can reshard them.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(model, nn.Module):
        return
    within: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
        if module in within or isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel):
            within.update(module.children())
        elif getattr(module, "_is_fsdp_managed_module", False):
            plain = [leaf for leaf, p in module._parameters.items() if p is not None and not is_dtensor(p)]
            if plain:
                raise RuntimeError(
                    f"{name}{name and '.'}{plain[0]} belongs to a module above this model that FSDP shards, and may be "
                    "a gathered copy, whose contents are lost when it is freed. Pass the sharded module, with only= to "
                    "choose, or call its reshard() first"
                )


def refuse_hidden_shards(model: nn.Module) -> None:
    """Raise where this rank's parts of parameters are plain tensors, whose shapes are not the parameters'.

    FullyShardedDataParallel, the first FSDP, holds flat pieces; DistributedDataParallel with a device_mesh puts local
    tensors in the place of DTensors.

    Raises:
        NotImplementedError: for one of these; the message names it.
    """
    for name, parameter in model.named_parameters():
        spec = getattr(parameter, "_st_info", None)
        if spec is not None and not all(placement.is_replicate() for placement in spec.placements):
            raise NotImplementedError(
                f"{name} is the local part of a DTensor placed {placements_text(spec.placements)}, which "
                "DistributedDataParallel has put in its place. Do this before the model is wrapped"
            )
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules() if fsdp is not None else ():
        if not isinstance(module, fsdp.FullyShardedDataParallel) or module.process_group.size() == 1:
            continue
        strategy, state = module.sharding_strategy.name, module.training_state.name
        if strategy != "NO_SHARD" and state != "SUMMON_FULL_PARAMS":
            raise NotImplementedError(
                f"{name or 'the model'} is a FullyShardedDataParallel, whose parameters are flat pieces on this rank. "
                "Use torch.distributed.fsdp.fully_shard, or do this before wrapping, or inside "
                "FullyShardedDataParallel.summon_full_params(model)"
            )
