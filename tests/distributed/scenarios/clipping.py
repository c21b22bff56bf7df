"""Clipping of gradients that are spread over ranks, held to what one process gets in float64."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import sharded_models as spread
import torch
import torch.distributed as dist
from ranks import on
from sharded_models import GPT, Conv
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import utils

import initlab
from initlab.distributed.dtensors import is_dtensor, local
from initlab.distributed.shards import local_shards

ELSEWHERE = "one on another rank"


def close(found: Any, expected: float, rel: float = 1e-6) -> None:
    assert math.isclose(float(found), expected, rel_tol=rel), (float(found), expected)


def norm_of(wholes: Sequence[Tensor], p: float = 2.0) -> float:
    return float(torch.linalg.vector_norm(torch.cat([w.double().reshape(-1) for w in wholes]), p))


def whole(tensor: Tensor) -> Tensor:
    """What ranks hold, put together by the regions that they hold it of, in float64."""
    if not is_dtensor(tensor):
        return tensor.double()
    if terms(tensor):
        return tensor.full_tensor().double()
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, [(block.region, block.tensor) for block in local_shards(tensor)])
    full = torch.full(tensor.shape, math.nan, dtype=torch.float64)
    for region, part in (one for rank in told for one in rank):
        if part.numel():
            full[tuple(slice(o, o + n) for o, n in zip(region.offsets, region.sizes, strict=True))] = part.double()
    return full


def terms(tensor: Tensor) -> bool:
    return is_dtensor(tensor) and any(p.is_partial() for p in tensor.placements)


@contextlib.contextmanager
def collectives(number: int) -> Iterator[None]:
    with CommDebugMode() as seen:
        yield
    assert seen.get_total_counts() == number, {str(k): v for k, v in seen.get_comm_counts().items() if v}


def random_like(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(gradient: Tensor) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient
    return p


def check(parameters: Sequence[Tensor], axes: int, torch_too: bool = False, pp: Any = None) -> None:
    """Norms and scaled gradients against float64, collectives counted; torch's own result where it has one."""
    given = [p.grad for p in parameters]
    wholes = [whole(g) for g in given]
    if pp is not None:
        told: list[Any] = [None] * dist.get_world_size(pp)
        dist.all_gather_object(told, wholes, group=pp)
        wholes = [w for stage in told for w in stage]
    axes += sum(map(terms, given)) + (pp is not None)
    for p in (2.0, 1.0, 3.0, math.inf):
        with collectives(axes):
            norm = initlab.get_total_norm(given, p, pp_group=pp)
        close(norm, norm_of(wholes, p))
        if torch_too:
            other = utils.get_total_norm(given, p)
            close(other.full_tensor(), norm_of(wholes, p), 1e-5)
            assert type(norm) is type(other) is DTensor
            assert norm.full_tensor() == norm.item()
            assert set(norm.placements) == {Replicate()}
    held = [local(g) for g in given]
    before = [mine.clone() for mine in held]
    norm = norm_of(wholes)
    with collectives(axes):
        close(initlab.clip_grad_norm_(parameters, 0.4 * norm, pp_group=pp), norm)
    for mine, b in zip(held, before, strict=True):
        step = max(1e-6, torch.finfo(mine.dtype).eps)  # of 16-bit types
        torch.testing.assert_close(mine.double(), b.double() * (0.4 * norm / (norm + 1e-6)), rtol=step, atol=1e-30)
        mine.copy_(b)
    total = initlab.get_total_norm(given, pp_group=pp)
    with collectives(0):
        initlab.clip_grads_with_norm_(parameters, 0.4 * norm, total)
    if torch_too:
        scaled = [mine.clone() for mine in held]
        for mine, b in zip(held, before, strict=True):
            mine.copy_(b)
        utils.clip_grad_norm_(parameters, 0.4 * norm)
        for mine, s in zip(held, scaled, strict=True):
            torch.testing.assert_close(mine, s, rtol=1e-5, atol=1e-12)
    for mine, b in zip(held, before, strict=True):
        mine.copy_(b)
    initlab.clip_grad_norm_(parameters, 2.0 * norm, pp_group=pp)
    assert all(map(torch.equal, held, before))


def check_model(
    make: Callable[[], nn.Module], shard: Callable[[nn.Module], nn.Module], axes: int, torch_too: bool = False
) -> None:
    """`check` of a spread model's gradients, which are those of the model on one process."""
    torch.manual_seed(0)
    plain = make()
    model = shard(copy.deepcopy(plain))
    plain.loss().backward()
    getattr(model, "module", model).loss().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(whole(q.grad), p.grad.double(), rtol=1e-4, atol=1e-6)
    check(list(model.parameters()), axes, torch_too)


def wide() -> GPT:
    return GPT(hidden=48)


# ---------------------------------------------------------------------------------------------------------------
# Norms and scaling under every parallelism


@on(2)
def data_parallel() -> None:
    check_model(GPT, spread.ddp, 0)
    check_model(Conv, spread.ddp, 0)


@on(2, 3, 8)
def fully_sharded() -> None:
    if dist.get_world_size() == 8:  # torch's inf norm hangs where a rank's shard is empty
        check_model(Conv, spread.fsdp, 1)
        return
    check_model(GPT, spread.fsdp, 1, torch_too=True)
    check_model(Conv, spread.fsdp, 1, torch_too=True)


@on(2)
def offloaded() -> None:
    check_model(GPT, spread.offloaded, 1, torch_too=True)


@on(2, 4)
def tensor_parallel() -> None:
    check_model(wide, spread.tensor_parallel, 1)
    check_model(Conv, spread.tensor_parallel, 1)


@on(4)
def two_dimensional() -> None:
    check_model(wide, spread.two_dimensional, 2)


@on(4)
def hybrid() -> None:
    check_model(GPT, spread.hybrid, 2, torch_too=True)


@on(8)
def three_dimensional() -> None:
    check_model(wide, spread.three_dimensional, 3)


@on(4)
def experts_and_others() -> None:
    """Experts on a mesh of their own, FSDP on another and on one of two dimensions, and plain tensors."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    line = init_device_mesh("cpu", (4,))
    given = [
        distribute_tensor(random_like((6, 5, 3), 1), both["ep"], [Shard(0)]),
        random_like((7,), 2),
        distribute_tensor(random_like((5, 3), 3), line, [Shard(0)]),  # the last rank holds none of it
        distribute_tensor(random_like((3, 5), 4), both, [Shard(1), Shard(0)]),
        distribute_tensor(random_like((3,), 5), both, [Replicate(), Replicate()]),
        distribute_tensor(random_like((9,), 6, torch.bfloat16), both["dp"], [Shard(0)]),
    ]
    parameters = [parameter(g) for g in given]
    check(parameters, axes=3)
    assert type(initlab.get_total_norm(given)) is Tensor
    for some in ([given[0], given[3]], given[1:3]):  # torch goes neither over several meshes nor from tensor to DTensor
        with pytest.raises(RuntimeError, match=r"mesh|mixed"):
            utils.get_total_norm(some)
    initlab.clip_grad_value_(parameters, 0.5)
    for p, seed in zip(parameters, range(1, 7), strict=True):
        expected = random_like(p.shape, seed, p.dtype).clamp(-0.5, 0.5)
        torch.testing.assert_close(whole(p.grad), expected.double(), rtol=0, atol=0)
    plant(given[1], 2, math.inf)
    for p in (2.0, 3.0, math.inf):
        assert initlab.get_total_norm(given, p) == math.inf
    plant(given[4], 3, math.nan)  # on one of those that hold the same
    for p in (2.0, 3.0, math.inf):
        assert initlab.get_total_norm(given, p).isnan()
    assert raised([(f"weight{i}", p) for i, p in enumerate(parameters)]) == "weight1, on rank 2,"


@on(2, 3)
def every_order() -> None:
    """Shards that are empty, and orders for which nothing can be added up."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wholes = [random_like((1, 4), 1), random_like((5, 2), 2), random_like((2,), 3), torch.zeros(4), torch.zeros(0, 3)]
    wholes.append(torch.tensor([0.0, 0.0, 1.0]))  # non-zero on the last rank alone
    given = [distribute_tensor(w, mesh, [Shard(0)]) for w in wholes]
    for p in (0.5, 1.5, -1.0, -math.inf, 0.0):
        some = given if p >= 0.0 else given[:3]
        with collectives(1):
            norm = initlab.get_total_norm(some, p)
        close(norm, 4.0 if p == 0.0 else norm_of(wholes[: len(some)], p))


@on(2)
def gradients_on_some_ranks_only() -> None:
    """Experts that got no tokens on one rank, and plain tensors that it alone holds: nobody waits."""
    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    first = dist.get_rank() == 0
    wholes = [random_like((6, 5), 1), random_like((5, 3), 2, torch.float64), random_like((2, 4), 3)]
    meshes = ((mesh, [Shard(0)]), (square, [Shard(0), Replicate()]), (mesh, [Shard(1)]))
    shards = [distribute_tensor(w, *where) for w, where in zip(wholes, meshes, strict=True)]
    alone = random_like((3,), 4)
    held = [*(local(shards[0]), local(shards[2])), local(shards[1])] if first else [local(shards[2])]
    told: list[Any] = [None] * 2
    dist.all_gather_object(told, held)
    for p in (2.0, 1.0, 0.0, math.inf, 3.0, -1.0):
        for some in (shards[:1], shards):
            parameters = [nn.Parameter(torch.zeros_like(s)) for s in some]
            for q, s in zip(parameters, some, strict=True):
                if first or s is shards[2]:
                    q.grad = s.clone()
            mine = [parameter(alone.clone())] if first and len(some) == 3 else []
            expected = [x for rank in told for x in rank] if len(some) == 3 else told[0][:1]
            with collectives(1):
                norm = initlab.clip_grad_norm_([*mine, *parameters], 1e30, p)
            close(norm, float(len(some) + len(mine)) if p == 0.0 else norm_of([*expected, *[alone] * len(mine)], p))
            assert [q.grad is None for q in parameters] == [not first and s is not shards[2] for s in some]
    for optimizer in (fused, momentum):
        weight = nn.Parameter(torch.zeros_like(shards[0]))
        ours = optimizer([weight])
        clipper = initlab.GradClipper(ours, 1e-3)
        for bad in (False, True):
            if first:
                weight.grad = shards[0].clone()
                plant(weight.grad, 0 if bad else -1, math.nan)
            ours.step()
        stats = clipper.stats()
        assert (stats.steps, stats.clipped, stats.nonfinite, stats.first_bad_step) == (2, 1, 1, 1), stats
        assert local(weight).isfinite().all()
        assert bool(local(weight).any()) == first


@on(3)
def outside() -> None:
    """A rank that is no member of a mesh has nothing of it, and takes no part."""
    mesh = DeviceMesh("cpu", [0, 1])
    wholes = [random_like((5, 2), 1), random_like((2, 3), 2)]
    given = [distribute_tensor(w, mesh, [Shard(0)]) for w in wholes]
    given.append(DTensor.from_local(wholes[1], mesh, [Partial("sum")]))
    out = dist.get_rank() == 2
    expected = 0.0 if out else norm_of([*wholes, 2 * wholes[1]])
    with collectives(0 if out else 2):
        norm = initlab.clip_grad_norm_([parameter(g) for g in given], 0.5 * expected, error_if_nonfinite=True)
    close(norm, expected)
    plant(given[1], 1, math.nan)
    if not out:
        with pytest.raises(RuntimeError, match=r"gradient 1 of shape \(2, 3\), on rank 1, is the first"):
            initlab.get_total_norm(given, error_if_nonfinite=True)


@on(2)
def large_and_small() -> None:
    """Squares beyond float32 and, in float64, beyond float64."""
    mesh = init_device_mesh("cpu", (2,))
    for dtype, scale in (
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
    ):
        given = [distribute_tensor(random_like((5, 3), i, dtype) * scale, mesh, [Shard(0)]) for i in (1, 2)]
        for p in (2.0, 1.0, 3.0):
            expected = norm_of([whole(g) / scale for g in given], p) * scale
            with collectives(1):
                norm = initlab.get_total_norm(given, p)
            assert norm.dtype == dtype
            close(norm, expected)
    small = distribute_tensor(random_like((5,), 1), mesh, [Shard(0)])
    close(initlab.get_total_norm([small, torch.full((3,), 1e200, dtype=torch.float64)]), 3.0**0.5 * 1e200)
    z = torch.complex(random_like((5, 3), 1), random_like((5, 3), 2))
    close(initlab.get_total_norm(distribute_tensor(z, mesh, [Shard(0)])), norm_of([z.real, z.imag]))


@on(2)
def sums_to_come() -> None:
    """Partial gradients: their norm is that of the sum; scaled are the terms."""
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    for op in ("sum", "avg"):
        mine = random_like((5, 3), 10 + rank)
        p = parameter(DTensor.from_local(mine, mesh, [Partial(op)]))
        assert terms(p.grad)
        other = parameter(distribute_tensor(random_like((5, 3), 3), mesh, [Shard(0)]))
        check([other, p], axes=1, torch_too=op == "sum")
    p.grad = DTensor.from_local(mine, mesh, [Partial("max")])
    before = mine.clone()
    for clip in (initlab.clip_grad_norm_, initlab.clip_grad_value_):
        with pytest.raises(NotImplementedError, match="redistribute"):
            clip([p], 0.1)
    assert torch.equal(mine, before)


@on(2, 3)
def pipeline() -> None:
    """Stages with other shapes and dtypes, and with nothing."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    dtype = (torch.float32, torch.float64, torch.bfloat16)[rank]
    given = [] if rank == 2 else [random_like((5, 3 + rank), rank, dtype) for _ in range(rank + 1)]
    check([parameter(g) for g in given], axes=0, pp=group)
    for p, expected in ((0.0, 3.0), (-1.0, None)):
        wholes = [
            random_like((5, 3 + r), r, d) for r, d in enumerate((torch.float32, torch.float64)) for _ in range(r + 1)
        ]
        close(initlab.get_total_norm(given, p, pp_group=group), norm_of(wholes, p) if expected is None else expected)
    stages = init_device_mesh("cpu", (world,))
    assert initlab.get_total_norm(given, pp_group=stages) == initlab.get_total_norm(given, pp_group=group)
    weights = [nn.Parameter(torch.ones(3))] if rank == 2 else [parameter(g) for g in given]
    optimizer = torch.optim.SGD(weights, lr=1.0, momentum=0.9, fused=rank == 0)
    clipper = initlab.GradClipper(optimizer, 1e-3, pp_group=group)
    optimizer.step()
    before = [p.detach().clone() for p in weights]
    for g in given:
        g.copy_(random_like(g.shape, rank, g.dtype))  # a fused step has scaled them
    if rank == 1:
        given[0][0, 0] = math.nan
    optimizer.step()
    stats = clipper.stats()
    assert (stats.clipped, stats.nonfinite, stats.first_bad_step) == (1, 1, 1)
    assert all(map(torch.equal, before, weights))
    alone = dist.new_group([0])
    if rank == 0:
        with collectives(0):
            initlab.get_total_norm(given, pp_group=alone)
    for wrong in (3, init_device_mesh("cpu", (world, 1)), *([alone] if rank else [])):
        with pytest.raises(ValueError, match="pp_group is"):
            initlab.get_total_norm(given, pp_group=wrong)


@on(4)
def pipeline_of_shards() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh.get_coordinate()[0]
    given = [distribute_tensor(random_like((5 + 2 * stage, 3), stage + i), mesh["dp"], [Shard(0)]) for i in range(2)]
    told: list[Any] = [None] * 4
    dist.all_gather_object(told, [whole_in(g, mesh["dp"].get_group()) for g in given])
    expected = norm_of([*told[0], *told[2]])
    with collectives(2):
        norm = initlab.get_total_norm(given, pp_group=mesh["pp"])
    close(norm, expected)
    assert type(norm) is DTensor
    part = initlab.get_total_norm(given, partial=True)  # over "dp" already
    dist.all_reduce(part.sum_of_powers, group=mesh["pp"].get_group())
    close(part.norm(), expected)
    if dist.get_rank() == 3:
        local(given[1])[0, 0] = math.nan
    parameters = [(f"stage{stage}.{i}", parameter(g)) for i, g in enumerate(given)]
    assert raised(parameters, pp_group=mesh["pp"]) == "stage1.1, on rank 3,"
    for wrong in (mesh["dp"], dist.group.WORLD):  # every rank of "dp" has the norm over it already
        with pytest.raises(ValueError, match="would count 2 times"):
            initlab.get_total_norm(given, pp_group=wrong)


@on(2)
def stages_under_a_scaler() -> None:
    """An overflow in one stage: all skip the step and lower the scale."""
    for optimizer in (fused, momentum):
        weight = nn.Parameter(torch.ones(4))
        ours = optimizer([weight])
        clipper = initlab.GradClipper(ours, 1.0, pp_group=dist.group.WORLD)
        scaler = ShardedGradScaler("cpu", init_scale=64.0, process_group=dist.group.WORLD)
        for step in range(3):
            ours.zero_grad()
            scaler.scale((weight * (math.inf if step == dist.get_rank() == 1 else 1.0)).square().sum()).backward()
            scaler.unscale_(ours)
            before = weight.detach().clone()
            scaler.step(ours)
            scaler.update()
            assert torch.equal(before, weight) == (step == 1)
            assert scaler.get_scale() == (32.0 if step else 64.0)
        assert clipper.stats().clipped == 2


def whole_in(tensor: DTensor, group: Any) -> Tensor:
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, local(tensor), group=group)
    return torch.cat(told)


# ---------------------------------------------------------------------------------------------------------------
# One rank's NaN is everybody's


def raised(parameters: Any, **options: Any) -> str:
    """Whom the error under nonfinite="raise" names; nothing has changed."""
    before = [local(p.grad).clone() for _, p in parameters]
    with pytest.raises(RuntimeError, match="cannot be clipped: ") as error:
        initlab.clip_grad_norm_(parameters, 1e-3, nonfinite="raise", **options)
    for (_, p), b in zip(parameters, before, strict=True):
        assert torch.equal(local(p.grad).nan_to_num(5.0), b.nan_to_num(5.0))
    return str(error.value).split("cannot be clipped: ")[1].split(" is the first of those that hold")[0]


def plant(gradient: Tensor, rank: int, value: float) -> None:
    if dist.get_rank() == rank:
        local(gradient).view(-1)[-1] = value


def planted(shard: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], value: float) -> None:
    rank = dist.get_world_size() - 1  # under hybrid one of a replica alone
    model = shard(make())
    model.loss().backward()
    named = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
    target = "layers.1.up.weight"
    gradient = dict(named)[target].grad
    held = [local(p.grad) for _, p in named]
    plant(gradient, rank, value)
    before = [mine.clone() for mine in held]
    for p in (2.0, 3.0, math.inf, -1.0, -math.inf):
        if p < 0.0 and not math.isnan(value):
            continue
        norm = initlab.get_total_norm([p.grad for _, p in named], p)
        assert math.isnan(norm) if math.isnan(value) else norm == math.inf, (p, norm)
    part = initlab.get_total_norm([p.grad for _, p in named], partial=True)
    assert int(part.flag) == (1 if math.isnan(value) else 2)
    assert not part.norm().isfinite()
    report = initlab.clip_grad_norm_(named, 1e-3, nonfinite="skip", report=True)
    assert report.nonfinite
    assert int(report.flag) == (1 if math.isnan(value) else 2)
    with collectives(0):
        assert report.first_bad == (target if dist.get_rank() == rank else ELSEWHERE)
        assert "first of those that hold" in str(report)
        assert type(report.norm) is Tensor
    for mine, b in zip(held, before, strict=True):
        assert torch.equal(mine.nan_to_num(), b.nan_to_num())
    assert raised(named) == f"{target}, on rank {rank},"
    initlab.clip_grad_norm_(named, 1e-3, nonfinite="zero")
    assert not any(mine.any() for mine in held)


@on(2)
def planted_in_fsdp() -> None:
    planted(spread.fsdp, GPT, math.nan)
    planted(spread.fsdp, GPT, math.inf)


@on(4)
def planted_in_a_replica() -> None:
    planted(spread.hybrid, GPT, math.nan)
    planted(spread.two_dimensional, wide, math.inf)


# ---------------------------------------------------------------------------------------------------------------
# GradClipper


def trained(shard: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], optimizer: Any, axes: int) -> None:
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
        with collectives(axes):
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
    assert (stats.steps, stats.clipped, stats.nonfinite, stats.first_bad_step) == (4, 3, 1, 2), stats
    assert stats.first_bad_parameter == ("layers.1.up.weight" if dist.get_rank() == rank else ELSEWHERE)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(whole(q.detach()), p.detach().double(), rtol=1e-4, atol=1e-5)
    clipper.nonfinite = "raise"
    model.zero_grad()
    model.loss().backward()
    plant(dict(model.named_parameters())["layers.1.up.weight"].grad, rank, math.inf)
    with pytest.raises(RuntimeError, match=f"layers.1.up.weight, on rank {rank}, is the first"):
        ours.step()


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [local(x).clone() for state in optimizer.state.values() for x in state.values()]


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, fused=True)


def one_by_one(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, foreach=False)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@on(2)
def steps_of_shards() -> None:
    for optimizer in (fused, momentum):
        trained(spread.fsdp, GPT, optimizer, 1)
    trained(spread.offloaded, GPT, fused, 1)


@on(4)
def steps_of_meshes() -> None:
    trained(spread.hybrid, GPT, fused, 2)
    trained(spread.two_dimensional, wide, one_by_one, 2)  # two meshes, which torch's other loops refuse
