"""watch() and the doctor on several ranks: a fault planted on one of them is found by all."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import sharded_models as sharded
import torch
import torch.distributed as dist
from ranks import on
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import initlab
from initlab.watch import WatchReport

NAN, INF = math.nan, math.inf


class MLP(nn.Module):
    """`middle` may break what passes through it."""

    def __init__(self, middle: Callable[[Tensor], Tensor] = nn.functional.relu, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle, self.down = nn.Linear(5, width), Apply(middle), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x)))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def on_rank(bad: int, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return function if dist.get_rank() == bad else nn.functional.relu


def same_everywhere(report: WatchReport) -> WatchReport:
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, report)
    assert all(one == report for one in told), told
    assert report.ranks == tuple(range(dist.get_world_size()))
    return report


@contextlib.contextmanager
def gathers() -> Iterator[list[int]]:
    """How many collectives of any kind there were, and how many of them were gathers of objects."""
    count = [0, 0]
    plain = dist.all_gather_object

    def counted(*args: Any, **kwargs: Any) -> None:
        count[1] += 1
        plain(*args, **kwargs)

    with mock.patch.object(dist, "all_gather_object", counted), CommDebugMode() as comm:
        yield count
    count[0] = comm.get_total_counts()


def main() -> int:
    return dist.get_world_size() - 1


@on(2, 3)
def explore() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    x = torch.ones(3, 5)
    def go(tag, model, x=x, back=False, bad=None):
        with initlab.watch(model, backward=back) as w:
            with CommDebugMode() as comm:
                y = model(x)
            if back:
                y.sum().backward()
        me = w.report()
        rep = same_everywhere(w.report(across=True))
        if rank == 0: print(tag, '\n', rep, '\n', dict(comm.get_comm_counts()), flush=True)
    for back in (False, True):
        go('healthy fsdp', sharded.fsdp(MLP()), back=back)
        m = MLP()
        for l in (m.up, m.middle, m.down): fully_shard(l)
        fully_shard(m)
        with torch.no_grad():
            if rank == world-1: m.up.weight.to_local()[0, 0] = NAN
        go('fsdp leaf modules', m, back=back)
        m = sharded.fsdp(MLP())
        with torch.no_grad():
            if rank == world-1: m.down.weight.to_local()[0, 0] = NAN
        go('fsdp root', m, back=back)
        m = sharded.offloaded(MLP())
        with torch.no_grad():
            if rank == world-1: m.down.weight.to_local()[0, 0] = NAN
        go('offl root', m, back=back)
        mesh = init_device_mesh("cpu", (world,))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        m = parallelize_module(MLP(on_rank(1, lambda x: x * INF)), mesh, plan)
        go('tp produced', m, back=back)
        m = parallelize_module(MLP(), mesh, plan)
        with torch.no_grad():
            if rank == world-1: m.up.weight.to_local()[0, 0] = NAN
        go('tp held', m, back=back)
        m = parallelize_module(MLP(), mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel(use_local_output=False)})
        with torch.no_grad():
            if rank == world-1: m.up.weight.to_local()[0, 0] = NAN
        go('tp dtensors', m, back=back)
        m = parallelize_module(MLP(), mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel(use_local_output=False, output_layouts=torch.distributed.tensor.Partial())})
        with torch.no_grad():
            if rank == world-1: m.up.weight.to_local()[0, 0] = NAN
        go('tp partial', m, back=back)
        m = sharded.ddp(MLP())
        go('ddp healthy', m, back=back)
        x2 = x.clone()
        if rank == 1: x2[0,0] = NAN
        go('ddp', m, x2, back=back)
