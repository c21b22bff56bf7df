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


def halves(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Two optimizers, for the matrices and the rest."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [fused(matrices), momentum(others)]


def decided_alike(shard: Callable[[nn.Module], nn.Module], action: str, number: int) -> None:
    """Spikes, a NaN on one rank, two optimizers: every rank decides as one process does, and knows whole norms."""
    torch.manual_seed(0)
    plain = GPT()
    model = shard(copy.deepcopy(plain))
    policy = initlab.clipping.MedianSpikes(factor=3.0, window=8, warmup=3, action=action)
    pairs = []
    for one in (model, plain):
        optimizers = halves(one)[:number] if number > 1 else [fused(one.parameters())]
        options = {"named_parameters": one.named_parameters(), "spikes": policy, "per_parameter": True}
        pairs.append((optimizers, initlab.GradClipper(optimizers, 10.0, **options)))
    for step in range(10):
        for one, (optimizers, clipper) in zip((model, plain), pairs, strict=True):
            one.zero_grad()
            (one.loss(step) * (100.0 if step in (6, 8) else 1.0)).backward()
            if step == 4:
                plant(dict(one.named_parameters())["layers.1.up.weight"].grad, dist.get_world_size() - 1, math.nan)
                if one is plain:
                    dict(one.named_parameters())["layers.1.up.weight"].grad.fill_(math.nan)
            expected = {name: p.grad for name, p in one.named_parameters()}
            norms = {name: float(whole(g).norm()) for name, g in expected.items()} if step != 4 else {}
            for optimizer in optimizers:
                optimizer.step()
            if norms:
                assert clipper.norms() == pytest.approx(norms, rel=1e-6)
                assert clipper.top(1)[0][0] == max(norms, key=norms.__getitem__)
    (_, ours), (_, theirs) = pairs
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, ours.state_dict() | {"counts": ours.state_dict()["counts"][:3]})
    assert all(state == states[0] for state in states), states
    stats, reference = ours.stats(), theirs.stats()
    assert (stats.steps, stats.clipped, stats.nonfinite, stats.spikes) == (
        *(reference.steps, reference.clipped, reference.nonfinite, reference.spikes),
    )
    assert (stats.nonfinite, stats.first_bad_step, stats.spike_steps) == (1, 5, (7, 9))
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(whole(q.detach()), p.detach().double(), rtol=1e-4, atol=1e-5)


@on(2, 4)
def spikes() -> None:
    for action in ("clip", "skip"):
        for number in (1, 2):
            decided_alike(spread.fsdp, action, number)
