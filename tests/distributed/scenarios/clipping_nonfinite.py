"""A NaN or inf on one rank, which every rank must learn of."""

import math
from collections.abc import Callable
from typing import Any

import sharded_models as spread
import torch
import torch.distributed as dist
from ranks import on
from scenarios._clipping import collectives, plant, raised, wide
from sharded_models import GPT
from torch import Tensor, nn

import initlab
from initlab.distributed.dtensors import local

ON_ANOTHER_RANK = "one on another rank"


def planted(shard: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], value: float) -> None:
    rank = dist.get_world_size() - 1  # under hybrid one of a replica alone
    model = shard(make())
    model.loss().backward()
    named = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
    target = "layers.1.up.weight"
    gradient = dict(named)[target].grad
    parts = [local(p.grad) for _, p in named]
    plant(gradient, rank, value)
    before = [part.clone() for part in parts]
    for p in (2.0, 3.0, math.inf, -1.0, -math.inf):
        if p < 0.0 and not math.isnan(value):
            continue
        norm = initlab.get_total_norm([p.grad for _, p in named], p)
        assert math.isnan(norm) if math.isnan(value) else norm == math.inf, (p, norm)
    partial = initlab.get_total_norm([p.grad for _, p in named], partial=True)
    assert int(partial.flag) == (1 if math.isnan(value) else 2)
    assert not partial.norm().isfinite()
    report = initlab.clip_grad_norm_(named, 1e-3, nonfinite="keep", report=True)
    assert report.nonfinite
    assert int(report.flag) == (1 if math.isnan(value) else 2)
    with collectives(0):
        assert report.first_bad == (target if dist.get_rank() == rank else ON_ANOTHER_RANK)
        assert "first of those that hold" in str(report)
        assert type(report.norm) is Tensor
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    assert reports[dist.get_rank()] == report
    assert [one.first_bad == target for one in reports] == [at == rank for at in range(len(reports))]
    for part, b in zip(parts, before, strict=True):
        assert torch.equal(part.nan_to_num(), b.nan_to_num())
    assert raised(named) == f"{target}, on rank {rank},"
    initlab.clip_grad_norm_(named, 1e-3, nonfinite="zero")
    assert not any(part.any() for part in parts)


@on(2)
def planted_in_fsdp() -> None:
    planted(spread.fsdp, GPT, math.nan)
    planted(spread.fsdp, GPT, math.inf)


@on(4)
def planted_in_a_replica() -> None:
    planted(spread.hybrid, GPT, math.nan)
    planted(spread.two_dimensional, wide, math.inf)
