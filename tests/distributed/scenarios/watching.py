"""watch() and the doctor on several ranks: a fault planted on one of them is found by all, and nothing communicates."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import sharded_models as sharded
import torch
import torch.distributed as dist
from ranks import on
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import initlab
from initlab.watching import WatchReport, hooks

NAN, INF = math.nan, math.inf
UP = "gradient of its input, which was output of module 'up'"
SQUARED = initlab.supervised(nn.MSELoss())


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class MLP(nn.Module):
    """`middle` may break what passes through it."""

    def __init__(self, middle: Callable[[Tensor], Tensor] = nn.functional.gelu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle, self.down = nn.Linear(5, 12), Apply(middle), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x))).clone()  # FSDP warns of views


def last() -> int:
    return dist.get_world_size() - 1


def x(bad: bool = False) -> Tensor:
    """A batch; two values of a bad one are NaN."""
    values = torch.linspace(-1, 1, 15).view(3, 5)
    return values.index_fill(0, torch.tensor([1]), NAN) if bad else values


@torch.no_grad()
def plant(parameter: Tensor, bad: int) -> None:
    """A NaN in what one rank holds of a parameter."""
    if dist.get_rank() == bad:
        assert isinstance(parameter, DTensor)
        parameter.to_local().view(-1)[:1] = NAN


@contextlib.contextmanager
def collectives() -> Iterator[list[int]]:
    """[of all kinds, seen by torch; gathers of objects]"""
    count = [0, 0]
    gather = dist.all_gather_object

    def counted(*args: Any, **kwargs: Any) -> None:
        count[1] += 1
        gather(*args, **kwargs)

    with mock.patch.object(dist, "all_gather_object", counted), CommDebugMode() as comm:
        yield count
    count[0] = comm.get_total_counts()


def report_of(watch: Any, across: Any = True) -> WatchReport:
    """The report across ranks, after what every report must be."""
    with collectives() as count:
        own = watch.report()
    assert count == [0, 0], count
    with collectives() as count:
        report = watch.report(across=across)
    assert count[1] == 1, count
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, report)
    assert all(one == report for one in told), told
    faults = [fault for fault in (report.fault, *report.others) if fault is not None]
    mine = [fault for fault in faults if fault.rank == dist.get_rank()]
    assert mine == ([dataclasses.replace(own.fault, rank=dist.get_rank())] if own.fault else [])
    assert report.ranks == tuple(range(dist.get_world_size()))
    return report


def watched(model: nn.Module, batch: Tensor | None = None, **options: Any) -> WatchReport:
    with initlab.watch(model, **options) as watch:
        out = model(x() if batch is None else batch)
        if out.requires_grad:
            (out.full_tensor() if isinstance(out, DTensor) else out).sum().backward()
    return report_of(watch)


def told(report: WatchReport) -> tuple[Any, ...]:
    fault = report.fault
    return (fault.rank, fault.phase, fault.cause, fault.module, fault.tensor) if fault else ()


def ways() -> Iterator[dict[str, Any]]:
    """Words read at once, with gradients and without, and words that lie in a device's buffer until asked for."""
    yield {}
    yield {"backward": True}
    with mock.patch.object(hooks, "_SYNCHRONOUS", ()):
        yield {}


@on(2, 4)
def nothing_is_wrong_and_no_look_communicates() -> None:
    for spread in (sharded.ddp, sharded.fsdp, tensor_parallel):
        models = spread(MLP()), spread(MLP())
        with CommDebugMode() as plain:
            models[0](x()).sum().backward()
        with CommDebugMode() as comm, initlab.watch(models[1], backward=True) as watch:
            models[1](x()).sum().backward()
        assert comm.get_comm_counts() == plain.get_comm_counts(), spread
        report = report_of(watch)
        assert (report.fault, report.model_calls, report.calls) == (None, 1, 4 * dist.get_world_size())


@on(2, 4)
def a_bad_batch_under_ddp() -> None:
    model = sharded.ddp(MLP())
    for options in ways():
        report = watched(model, x(bad=dist.get_rank() == last()), **options)
        assert told(report) == (last(), "forward", "input", None, "input 0 of the model"), report
        assert not report.others
        model.zero_grad()


@on(2, 4)
def a_module_that_breaks_on_one_rank() -> None:
    infinite = (lambda x: x / 0) if dist.get_rank() == last() else nn.functional.gelu
    steep = (lambda x: (x - x.detach()).sqrt()) if dist.get_rank() == last() else nn.functional.gelu
    for spread in (sharded.ddp, by_layers):
        for options in ways():
            report = watched(spread(MLP(infinite)), **options)
            assert told(report) == (last(), "forward", "produced", "middle", "output"), (spread, report)
            assert not report.others
        report = watched(spread(MLP(steep)), backward=True)
        assert told(report) == (last(), "backward", "produced", "middle", UP), (spread, report)
        assert not report.others


@on(2, 4)
def a_shard_under_fsdp() -> None:
    for spread in (by_layers, sharded.fsdp, sharded.offloaded):
        for options in ways():
            model = spread(MLP())
            plant(model.up.weight, last())
            report = watched(model, **options)
            assert told(report) == (last(), "forward", "parameter", "up", "weight"), (spread, options, report)
            assert [fault.rank for fault in report.others] == list(range(last()))  # all have gathered it
            assert {(fault.cause, fault.module, fault.from_all_gather) for fault in report.others} == {
                ("parameter", "up", True)
            }


@on(2)
def a_shard_that_overflows_when_it_is_gathered() -> None:
    """Finite in float32 on its own rank, infinite in float16 on all."""
    for options in ways():
        model = MLP()
        with torch.no_grad():
            model.up.weight[-1, -1] = 1e6
        report = watched(sharded.fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16)), **options)
        assert told(report) == (1, "forward", "parameter", "up", "weight"), report
        assert [(fault.rank, fault.from_all_gather) for fault in report.others] == [(0, True)]


def by_layers(model: MLP) -> nn.Module:
    fully_shard(model.up)
    fully_shard(model.down)
    return fully_shard(model)


@on(4)
def a_shard_of_two_dimensions() -> None:
    for spread in (sharded.hybrid, two_dimensional):
        for bad in (1, 2):
            model = spread(MLP())
            plant(model.down.weight, bad)
            report = watched(model)
            assert told(report) == (bad, "forward", "parameter", "down", "weight"), (spread, bad, report)


def two_dimensional(model: MLP) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return sharded.fsdp(tensor_parallel(model, mesh=mesh["tp"]), mesh=mesh["dp"])


def tensor_parallel(model: MLP, mesh: Any = None, **options: Any) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    local = options.pop("use_local_output", True)
    plan = {
        "up": ColwiseParallel(use_local_output=local),
        "down": RowwiseParallel(use_local_output=local, **options),
    }
    return parallelize_module(model, mesh, plan)


@on(2, 4)
def tensor_parallel_ranks_hand_on() -> None:
    outputs: tuple[dict[str, Any], ...] = (
        {},
        {"use_local_output": False},
        {"use_local_output": False, "output_layouts": Shard(0)},
        {"use_local_output": False, "output_layouts": Partial()},
    )
    for options in outputs:
        model = tensor_parallel(MLP(), **options)
        plant(model.up.weight, last())
        report = watched(model)
        assert told(report) == (last(), "forward", "parameter", "up", "weight"), (options, report)
        breaks = (lambda x: x / 0) if dist.get_rank() == last() else nn.functional.gelu
        model = tensor_parallel(MLP(breaks), **options)
        report = watched(model)
        assert told(report) == (last(), "forward", "produced", "middle", "output"), (options, report)
        others = {(fault.rank, fault.module) for fault in report.others}
        # Sums are handed on where something adds them up: up to torch 2.13 MLP's own clone() does.
        handed = {"down"}
        if isinstance(options.get("output_layouts"), Partial):
            handed = set() if any(p.is_partial() for p in model(x()).placements) else {""}
        assert others == {(rank, module) for rank in range(last()) for module in handed}, (options, report)


@on(2, 4)
def stages_of_a_pipeline() -> None:
    rank = dist.get_rank()
    stage = MLP(torch.square if rank == 0 else nn.functional.gelu)
    with initlab.watch(stage) as watch:
        for scale in (1.0, 1e30):  # microbatches; the second overflows
            batch = scale * x()
            if rank:
                dist.recv(batch, rank - 1)
            out = stage(batch)
            if rank < last():
                dist.send(out.detach(), rank + 1)
    report = report_of(watch)
    assert told(report) == (0, "forward", "produced", "middle", "output"), report
    assert [(fault.rank, fault.cause) for fault in report.others] == [(r, "input") for r in range(1, last() + 1)]
    assert (report.fault.model_call, report.model_calls) == (2, 2)


@on(2)
def ranks_with_other_numbers_of_steps() -> None:
    rank = dist.get_rank()
    model = MLP()
    with initlab.watch(model) as watch:
        for step in range(1, 5 - rank):
            model(x(bad=step == 3 - rank))  # rank 0 in its third of four steps, rank 1 in its second of three
    report = report_of(watch)
    assert (report.fault.rank, report.fault.model_call, report.model_calls, report.calls) == (1, 2, 3, 4 * (3 + 2))
    assert [(fault.rank, fault.model_call) for fault in report.others] == [(0, 3)]

    model = MLP(lambda x: (x - x.detach()).sqrt() if rank == 0 else x / 0)  # 0, whose gradient is inf
    report = watched(model, backward=True)
    assert [told(report)[:2], [f.phase for f in report.others]] == [(1, "forward"), ["backward"]], report


@on(4)
def groups_and_meshes() -> None:
    rank = dist.get_rank()
    model = MLP()
    with initlab.watch(model) as watch:
        model(x(bad=rank in (2, 3)))
    pair, column = dist.new_group([1, 3]), DeviceMesh("cpu", torch.tensor([[1], [3]]))
    for across in (pair, column):
        if rank in (1, 3):
            report = watch.report(across=across)
            assert (report.fault.rank, report.ranks, report.others) == (3, (1, 3), ())
        else:
            with pytest.raises(ValueError, match="is no part of"):
                watch.report(across=across)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    assert told(report_of(watch, square))[0] == 2
    row = watch.report(across=square["b"])
    assert row.ranks == ((0, 1) if rank < 2 else (2, 3))
    assert (row.fault is None) == (rank < 2)


@on(2, 4)
def the_batch_of_one_rank() -> None:
    model = sharded.ddp(MLP())
    with collectives() as count:
        found = initlab.diagnose(model, (x(bad=dist.get_rank() == last()), x()), SQUARED, across=True)
    assert count[1] == 1, count
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, (str(found), found.to_json()))
    assert len(set(texts)) == 1
    assert (found.rank, found.verdict, found.causes[0].kind) == (last(), "broken", "input")
    assert [found.verdicts[rank] for rank in range(last() + 1)] == ["healthy"] * last() + ["broken"]


@on(2)
def the_loader_of_one_rank() -> None:
    batches = [(x(bad=dist.get_rank() == last() and index == 3), x()) for index in range(5)]
    found = initlab.diagnose(sharded.ddp(MLP()), iter(batches), SQUARED, across=True)
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, found.to_json())
    assert len(set(texts)) == 1
    assert (found.rank, found.batch_index, found.verdict, found.causes[0].kind) == (last(), 3, "broken", "input")
    assert found.data.faults[0].places[0][0] == 3


@on(2)
def one_rank_alone_in_the_middle_of_a_step() -> None:
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"static_graph": True})):
        start = MLP().to(dtype)
        batch = x().to(dtype) * (1 + dist.get_rank()), x().to(dtype)
        ends = []
        for alone in (False, True):
            model = DistributedDataParallel(copy.deepcopy(start), **options)
            optimizer = torch.optim.Adam(model.parameters(), 0.01)
            for step in range(3):
                loss = SQUARED(model, batch)
                if alone and dist.get_rank() == 1:
                    seen = list(model.parameters())
                    bad = (batch[0] * NAN, batch[1]) if step else batch
                    found = initlab.diagnose(model, bad, SQUARED, optimizer, steps=2)
                    assert found.verdict == ("broken" if step else found.verdict)
                    assert all(a is b for a, b in zip(seen, model.parameters(), strict=True))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append([p.detach().clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)), (dtype, options)


@on(2)
def what_would_communicate_is_refused() -> None:
    mesh = init_device_mesh("cpu", (2,))

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sharded.ddp(MLP())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    def summed(model: nn.Module, batch: Any) -> Tensor:
        loss = SQUARED(model, batch)
        total = loss.detach().clone()
        dist.all_reduce(total)
        return loss / total

    unsharded = sharded.fsdp(MLP())
    unsharded.unshard()
    spread = distribute_tensor(x(), mesh, [Shard(0)])
    teacher, wrapped = tensor_parallel(MLP()), sharded.ddp(MLP())
    cases: tuple[tuple[str, nn.Module, Any, Any], ...] = (
        ("FSDPMLP", sharded.fsdp(MLP()), (x(), x()), SQUARED),
        ("FSDPMLP", unsharded, (x(), x()), SQUARED),
        ("DTensor", tensor_parallel(MLP()), (x(), x()), SQUARED),
        ("DTensor", MLP(), (spread, spread), SQUARED),
        ("DTensor", MLP(), x(), lambda model, x: (model(x) - teacher(x)).square().mean()),
        ("DistributedDataParallel", Around(), (x(), x()), SQUARED),
        ("DistributedDataParallel", sharded.ddp(Around()), (x(), x()), SQUARED),
        ("DistributedDataParallel", MLP(), x(), lambda model, x: (model(x) - wrapped(x)).square().mean()),
        ("a DistributedDataParallel, inside", wrapped, x(), lambda model, x: wrapped(x).square().mean()),
        ("allreduce_", MLP(), (x(), x()), summed),
    )
    for what, model, batch, loss_fn in cases:
        before = [p.detach().clone() for p in model.parameters()]
        if dist.get_rank() == 0:  # the other one does not come
            with CommDebugMode() as comm, pytest.raises(NotImplementedError, match=what) as raised:
                initlab.diagnose(model, batch, loss_fn)
            assert "report(across=True)" in str(raised.value)
            assert comm.get_total_counts() == 0
        for now, then in zip(model.parameters(), before, strict=True):
            assert torch.equal(*(p.to_local() if isinstance(p, DTensor) else p for p in (now, then)))
    unsharded.reshard()
    wrapped(x()).sum().backward()  # as before
    wrapped(x()).sum().backward()


@on(2)
def an_error_on_one_rank_reaches_all() -> None:
    batch = iter([]) if dist.get_rank() == 1 else (x(), x())
    own = dist.get_rank() == 1
    with pytest.raises(TypeError if own else RuntimeError, match="the loader gave no batch") as raised:
        initlab.diagnose(MLP(), batch, SQUARED, across=True)
    assert own or "on rank 1" in str(raised.value)
