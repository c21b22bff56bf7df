"""GradClipper on models that are spread over ranks, compared with steps of one process."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import sharded_models as spread
import torch
import torch.distributed as dist
from ranks import on
from scenarios._clipping import close, collectives, fused, moments, momentum, norm_of, one_by_one, plant, whole, wide
from sharded_models import GPT
from torch import nn
from torch.nn import utils

import initlab
from initlab.distributed.dtensors import local

ON_ANOTHER_RANK = "one on another rank"


def trained(
    shard: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], optimizer: Any, mesh_dims: int
) -> None:
    """Steps of a spread model: those of one process, clipped by torch; one with a NaN on one rank changes nothing."""
    rank = dist.get_world_size() - 1
    torch.manual_seed(0)
    plain = make()
    model = shard(copy.deepcopy(plain))
    ours, theirs = optimizer(model.parameters()), optimizer(plain.parameters())
    clipper = initlab.GradClipper(ours, 0.05, named_parameters=model.named_parameters())
    for step in range(4):
        bad = step == 2
        model.zero_grad()
        model.loss(step).backward()
        state = [local(p).clone() for p in model.parameters()]
        kept = moments(ours)
        if bad:
            plant(dict(model.named_parameters())["layers.1.up.weight"].grad, rank, math.nan)
        with collectives(mesh_dims):
            ours.step()
        if bad:
            assert all(map(torch.equal, state, map(local, model.parameters())))
            after = moments(ours)
            assert len(kept) == len(after)
            assert all(map(torch.equal, kept, after))
            continue
        plain.zero_grad()
        plain.loss(step).backward()
        close(clipper.report.norm, norm_of([p.grad for p in plain.parameters()]), 1e-5)
        utils.clip_grad_norm_(plain.parameters(), 0.05)
        theirs.step()
    stats = clipper.stats()
    assert (stats.steps, stats.clipped, stats.nonfinite, stats.first_bad_step) == (4, 3, 1, 3), stats
    assert stats.first_bad_parameter == ("layers.1.up.weight" if dist.get_rank() == rank else ON_ANOTHER_RANK)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(whole(q.detach()), p.detach().double(), rtol=1e-4, atol=1e-5)
    clipper.nonfinite = "raise"
    model.zero_grad()
    model.loss().backward()
    plant(dict(model.named_parameters())["layers.1.up.weight"].grad, rank, math.inf)
    with pytest.raises(RuntimeError, match=f"layers.1.up.weight, on rank {rank}, is the first"):
        ours.step()


@on(2)
def steps_of_shards() -> None:
    for optimizer in (fused, momentum):
        trained(spread.fsdp, GPT, optimizer, 1)
    trained(spread.offloaded, GPT, fused, 1)


@on(4)
def steps_of_meshes() -> None:
    trained(spread.hybrid, GPT, fused, 2)
    trained(spread.two_dimensional, wide, one_by_one, 2)  # two meshes, which torch's other loops refuse
