"""Clipping of gradients that are spread over ranks, compared with what one process gets in float64."""

import math
from typing import Any

import pytest
import sharded_models as spread
import torch
import torch.distributed as dist
from ranks import on
from scenarios._clipping import (
    check,
    check_model,
    close,
    collectives,
    each_close,
    fused,
    momentum,
    norm_of,
    parameter,
    plant,
    raised,
    random_like,
    terms,
    whole,
    whole_in,
    wide,
)
from sharded_models import GPT, Conv
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import utils

import initlab
from initlab.clipping.functional import as_labelled_tensors, gradients_of, mesh_tensors_of
from initlab.distributed.dtensors import classify, local


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
    gradients = [
        distribute_tensor(random_like((6, 5, 3), 1), both["ep"], [Shard(0)]),
        random_like((7,), 2),
        distribute_tensor(random_like((5, 3), 3), line, [Shard(0)]),  # the last rank holds none of it
        distribute_tensor(random_like((3, 5), 4), both, [Shard(1), Shard(0)]),
        distribute_tensor(random_like((3,), 5), both, [Replicate(), Replicate()]),
        distribute_tensor(random_like((9,), 6, torch.bfloat16), both["dp"], [Shard(0)]),
    ]
    parameters = [parameter(g) for g in gradients]
    check(parameters, mesh_dims=3)
    assert type(initlab.get_total_norm(gradients)) is Tensor
    for some in (
        [gradients[0], gradients[3]],
        gradients[1:3],
    ):  # torch goes neither over several meshes nor from tensor to DTensor
        with pytest.raises(RuntimeError, match=r"mesh|mixed"):
            utils.get_total_norm(some)
    initlab.clip_grad_value_(parameters, 0.5)
    for p, seed in zip(parameters, range(1, 7), strict=True):
        expected = random_like(p.shape, seed, p.dtype).clamp(-0.5, 0.5)
        torch.testing.assert_close(whole(p.grad), expected.double(), rtol=0, atol=0)
    norms = [norm_of([whole(g)]) for g in gradients]
    plant(gradients[1], 2, math.inf)
    for p in (2.0, 3.0, math.inf):
        assert initlab.get_total_norm(gradients, p) == math.inf
    norms[1] = math.inf if dist.get_rank() == 2 else norms[1]  # each rank has a plain tensor of its own
    each_close(gradients, norms, 3)
    plant(gradients[3], 1, math.nan)
    plant(gradients[0], 0, -math.inf)
    norms[3] = math.nan
    norms[0] = math.inf if dist.get_rank() < 2 else norms[0]  # the other line of "ep" holds copies
    each_close(gradients, norms, 3)
    for g, value in ((gradients[0], 0.5), (gradients[3], 0.5)):
        local(g).nan_to_num_(value, value, value)
    plant(gradients[4], 3, math.nan)  # on one of those that hold the same
    for p in (2.0, 3.0, math.inf):
        assert initlab.get_total_norm(gradients, p).isnan()
    assert raised([(f"weight{i}", p) for i, p in enumerate(parameters)]) == "weight1, on rank 2,"


@on(2, 3)
def every_order() -> None:
    """Shards that are empty, and orders for which nothing can be added up."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wholes = [random_like((1, 4), 1), random_like((5, 2), 2), random_like((2,), 3), torch.zeros(4), torch.zeros(0, 3)]
    wholes.append(torch.tensor([0.0, 0.0, 1.0]))  # non-zero on the last rank alone
    gradients = [distribute_tensor(w, mesh, [Shard(0)]) for w in wholes]
    for p in (0.5, 1.5, -1.0, -math.inf, 0.0):
        some = gradients if p >= 0.0 else gradients[:3]
        with collectives(1):
            norm = initlab.get_total_norm(some, p)
        close(norm, 4.0 if p == 0.0 else norm_of(wholes[: len(some)], p))
    each_close(gradients, [norm_of([w]) for w in wholes], 1)


@on(2)
def gradients_on_some_ranks_only() -> None:
    """Experts that got no tokens on one rank, and plain tensors that it alone holds: nobody waits."""
    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    first = dist.get_rank() == 0
    wholes = [random_like((6, 5), 1), random_like((5, 3), 2, torch.float64), random_like((2, 4), 3)]
    meshes = ((mesh, [Shard(0)]), (square, [Shard(0), Replicate()]), (mesh, [Shard(1)]))
    shards = [distribute_tensor(w, *where) for w, where in zip(wholes, meshes, strict=True)]
    alone = random_like((3,), 4)
    parts = [*(local(shards[0]), local(shards[2])), local(shards[1])] if first else [local(shards[2])]
    gathered: list[Any] = [None] * 2
    dist.all_gather_object(gathered, parts)
    norms = [norm_of([gathered[0][i]]) for i in (0, 2, 1)]  # of what the first rank holds of each
    for p in (2.0, 1.0, 0.0, math.inf, 3.0, -1.0):
        for some in (shards[:1], shards):
            parameters = [nn.Parameter(torch.zeros_like(s)) for s in some]
            for q, s in zip(parameters, some, strict=True):
                if first or s is shards[2]:
                    q.grad = s.clone()
            part = [parameter(alone.clone())] if first and len(some) == 3 else []
            expected = [x for rank in gathered for x in rank] if len(some) == 3 else gathered[0][:1]
            with collectives(1):
                norm = initlab.clip_grad_norm_([*part, *parameters], 1e30, p)
            close(norm, float(len(some) + len(part)) if p == 0.0 else norm_of([*expected, *[alone] * len(part)], p))
            assert [q.grad is None for q in parameters] == [not first and s is not shards[2] for s in some]
    for some in (shards[:1], shards):
        passed = gradients_of(as_labelled_tensors([parameter(s) if first else nn.Parameter(s) for s in some]))
        mesh_tensors = mesh_tensors_of(passed, classify(passed.tensors))
        with collectives(1):
            found = mesh_tensors.norm(2.0, per_tensor=True).tensor_norms
        assert found is not None
        for norm, expected_norm in zip(found, norms[: len(some)], strict=True):
            close(norm, expected_norm)
        with pytest.raises(ValueError, match="p = 2 alone"):
            mesh_tensors.norm(3.0, per_tensor=True)
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
        assert (stats.steps, stats.clipped, stats.nonfinite, stats.first_bad_step) == (2, 1, 1, 2), stats
        assert local(weight).isfinite().all()
        assert bool(local(weight).any()) == first


@on(3)
def outside() -> None:
    """A rank that is no member of a mesh has nothing of it, and takes no part."""
    mesh = DeviceMesh("cpu", [0, 1])
    wholes = [random_like((5, 2), 1), random_like((2, 3), 2)]
    gradients = [distribute_tensor(w, mesh, [Shard(0)]) for w in wholes]
    gradients.append(DTensor.from_local(wholes[1], mesh, [Partial("sum")]))
    out = dist.get_rank() == 2
    expected = 0.0 if out else norm_of([*wholes, 2 * wholes[1]])
    each_close(gradients, [0.0 if out else norm_of([w]) for w in (*wholes, 2 * wholes[1])], 0 if out else 2)
    with collectives(0 if out else 2):
        norm = initlab.clip_grad_norm_([parameter(g) for g in gradients], 0.5 * expected, error_if_nonfinite=True)
    close(norm, expected)
    plant(gradients[1], 1, math.nan)
    if not out:
        with pytest.raises(RuntimeError, match=r"gradient 1 of shape \(2, 3\), on rank 1, is the first"):
            initlab.get_total_norm(gradients, error_if_nonfinite=True)


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
        gradients = [distribute_tensor(random_like((5, 3), i, dtype) * scale, mesh, [Shard(0)]) for i in (1, 2)]
        for p in (2.0, 1.0, 3.0):
            expected = norm_of([whole(g) / scale for g in gradients], p) * scale
            with collectives(1):
                norm = initlab.get_total_norm(gradients, p)
            assert norm.dtype == dtype
            close(norm, expected)
        each_close(gradients, [norm_of([whole(g) / scale]) * scale for g in gradients], 1)
    small = distribute_tensor(random_like((5,), 1), mesh, [Shard(0)])
    close(initlab.get_total_norm([small, torch.full((3,), 1e200, dtype=torch.float64)]), 3.0**0.5 * 1e200)
    z = torch.complex(random_like((5, 3), 1), random_like((5, 3), 2))
    close(initlab.get_total_norm(distribute_tensor(z, mesh, [Shard(0)])), norm_of([z.real, z.imag]))
    for dtype, tiny, huge in ((torch.float32, 1e-25, 1e25), (torch.float64, 1e-200, 1e200)):
        factors = [1.0, tiny, huge, 0.0]
        wholes = [random_like((5, 3), i, dtype) for i in range(4)]
        gradients = [distribute_tensor(w * x, mesh, [Shard(0)]) for w, x in zip(wholes, factors, strict=True)]
        gradients += [torch.full((3,), 1e200, dtype=torch.float64), DTensor.from_local(wholes[0], mesh, [Replicate()])]
        norms = [norm_of([w * x / (x or 1.0)]) * x for w, x in zip(wholes, factors, strict=True)]
        each_close(gradients, [*norms, 3.0**0.5 * 1e200, norms[0]], 1)


@on(2)
def sums_to_come() -> None:
    """Partial gradients: their norm is that of the sum; scaled are the terms."""
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    for op in ("sum", "avg"):
        part = random_like((5, 3), 10 + rank)
        p = parameter(DTensor.from_local(part, mesh, [Partial(op)]))
        assert terms(p.grad)
        other = parameter(distribute_tensor(random_like((5, 3), 3), mesh, [Shard(0)]))
        check([other, p], mesh_dims=1, torch_too=op == "sum")
    p.grad = DTensor.from_local(part, mesh, [Partial("max")])
    before = part.clone()
    for clip in (initlab.clip_grad_norm_, initlab.clip_grad_value_):
        with pytest.raises(NotImplementedError, match="redistribute"):
            clip([p], 0.1)
    assert torch.equal(part, before)


@on(2, 3)
def pipeline() -> None:
    """Stages with other shapes and dtypes, and with nothing."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    dtype = (torch.float32, torch.float64, torch.bfloat16)[rank]
    gradients = [] if rank == 2 else [random_like((5, 3 + rank), rank, dtype) for _ in range(rank + 1)]
    check([parameter(g) for g in gradients], mesh_dims=0, pp=group)
    for p, expected in ((0.0, 3.0), (-1.0, None)):
        wholes = [
            random_like((5, 3 + r), r, d) for r, d in enumerate((torch.float32, torch.float64)) for _ in range(r + 1)
        ]
        close(
            initlab.get_total_norm(gradients, p, pp_group=group), norm_of(wholes, p) if expected is None else expected
        )
    stages = init_device_mesh("cpu", (world,))
    assert initlab.get_total_norm(gradients, pp_group=stages) == initlab.get_total_norm(gradients, pp_group=group)
    weights = [nn.Parameter(torch.ones(3))] if rank == 2 else [parameter(g) for g in gradients]
    optimizer = torch.optim.SGD(weights, lr=1.0, momentum=0.9, fused=rank == 0)
    clipper = initlab.GradClipper(optimizer, 1e-3, pp_group=group)
    optimizer.step()
    before = [p.detach().clone() for p in weights]
    for g in gradients:
        g.copy_(random_like(g.shape, rank, g.dtype))  # a fused step has scaled them
    if rank == 1:
        gradients[0][0, 0] = math.nan
    optimizer.step()
    stats = clipper.stats()
    assert (stats.clipped, stats.nonfinite, stats.first_bad_step) == (1, 1, 2)
    assert all(map(torch.equal, before, weights))
    alone = dist.new_group([0])
    if rank == 0:
        with collectives(0):
            initlab.get_total_norm(gradients, pp_group=alone)
    for wrong in (3, init_device_mesh("cpu", (world, 1)), *([alone] if rank else [])):
        with pytest.raises(ValueError, match="pp_group is"):
            initlab.get_total_norm(gradients, pp_group=wrong)


@on(4)
def pipeline_of_shards() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh.get_coordinate()[0]
    gradients = [
        distribute_tensor(random_like((5 + 2 * stage, 3), stage + i), mesh["dp"], [Shard(0)]) for i in range(2)
    ]
    gathered: list[Any] = [None] * 4
    dist.all_gather_object(gathered, [whole_in(g, mesh["dp"].get_group()) for g in gradients])
    expected = norm_of([*gathered[0], *gathered[2]])
    with collectives(2):
        norm = initlab.get_total_norm(gradients, pp_group=mesh["pp"])
    close(norm, expected)
    each_close(gradients, [norm_of([whole_in(g, mesh["dp"].get_group())]) for g in gradients], 2, mesh["pp"])
    assert type(norm) is DTensor
    part = initlab.get_total_norm(gradients, partial=True)  # over "dp" already
    dist.all_reduce(part.sum_of_powers, group=mesh["pp"].get_group())
    close(part.norm(), expected)
    if dist.get_rank() == 3:
        local(gradients[1])[0, 0] = math.nan
    parameters = [(f"stage{stage}.{i}", parameter(g)) for i, g in enumerate(gradients)]
    assert raised(parameters, pp_group=mesh["pp"]) == "stage1.1, on rank 3,"
    for wrong in (mesh["dp"], dist.group.WORLD):  # every rank of "dp" has the norm over it already
        with pytest.raises(ValueError, match="would count 2 times"):
            initlab.get_total_norm(gradients, pp_group=wrong)


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
