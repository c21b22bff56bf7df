"""linear_relu with DTensor weights, and its flags: compared with one process, flagged on the rank that holds it."""

import copy
import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from ranks import on
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import initlab

NAN, INF = math.nan, math.inf
ACTIVATIONS = {"relu": torch.relu, "relu_squared": lambda x: torch.relu(x).square()}


def new_flags() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(placements: dict[str, Any], name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """What torch's ParallelStyles do to the parameters of an nn.Linear, and to no other class."""
    for key, parameter in list(module._parameters.items()):
        if parameter is not None:
            spread = distribute_tensor(parameter.detach(), mesh, [placements.get(key, Replicate())])
            module.register_parameter(key, nn.Parameter(spread))


def mlp(activation: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(initlab.LinearReLU(6, 10, activation=activation), nn.Linear(10, 6))


def tensor_parallel(activation: str) -> nn.Sequential:
    """Column-parallel, then row-parallel, 10 columns on 2 ranks; on 3 they do not divide."""
    model, tp = mlp(activation), mesh()
    distribute_module(model[0], tp, functools.partial(placed, {"weight": Shard(0), "bias": Shard(0)}))
    distribute_module(model[1], tp, functools.partial(placed, {"weight": Shard(1)}))
    return model


@on(2, 3)
def columns_then_rows() -> None:
    for activation in ACTIVATIONS:
        one, many = mlp(activation), tensor_parallel(activation)
        many[0].flags = new_flags()
        x = torch.randn(4, 6)
        expected = one(x)
        expected.square().sum().backward()
        y = many(DTensor.from_local(x, mesh(), [Replicate()]))
        whole(y.square().sum()).backward()
        torch.testing.assert_close(whole(y), expected)
        for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(whole(ours.grad), theirs.grad)
        assert int(many[0].flags) == 0


@on(2)
def a_flag_is_of_what_this_rank_holds() -> None:
    for activation, value, kind in (("relu", NAN, 1), ("relu", -INF, 4), ("relu_squared", 2.0**64, 2)):
        model = tensor_parallel(activation)
        model[0].flags = new_flags()
        with torch.no_grad():
            if dist.get_rank() == 1:
                model[0].bias.to_local()[-1] = value
            model(DTensor.from_local(torch.zeros(4, 6), mesh(), [Replicate()]))
        assert int(model[0].flags) == (kind if dist.get_rank() == 1 else 0)
        others = torch.tensor([[0], [4 * dist.get_rank()]], dtype=torch.int32)
        for across in (True, mesh(), mesh().get_group()):
            flags = model[0].flags.clone()
            assert initlab.all_reduce_flags_(flags, across) is flags
            assert int(flags) == kind
            assert initlab.all_reduce_flags_(others.clone(), across).tolist() == [[0], [4]]


@on(2)
def all_kinds_at_once() -> None:
    """Bits that no single rank has; NCCL's own or is missing, and a maximum of whole flags would lose one."""
    flags = torch.tensor([[1, 4, 8], [2, 4, 0]][dist.get_rank()], dtype=torch.int32)
    assert initlab.all_reduce_flags_(flags).tolist() == [3, 4, 8 if dist.get_rank() == 0 else 0]


@on(2)
def sums_over_ranks_are_reduced_before_relu() -> None:
    """Row-parallel: ReLU of a sum, and its flag. Each rank's part is finite, the sum overflows; or they cancel."""
    tp = mesh()
    for activation, function in ACTIVATIONS.items():
        x, w = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)
        spread = distribute_tensor(w.detach(), tp, [Shard(1)]).requires_grad_()
        flags = new_flags()
        rows = distribute_tensor(x, tp, [Shard(1)])
        expected = function(x @ w.T)
        expected.square().sum().backward()
        for given in (flags, None):
            spread.grad = None
            y = initlab.linear_relu(rows, spread, flags=given, activation=activation)
            assert not any(isinstance(p, Partial) for p in y.placements)
            torch.testing.assert_close(whole(y), expected)
            whole(y.square().sum()).backward()
            torch.testing.assert_close(whole(spread.grad), w.grad)
        assert int(flags) == 0
    large = torch.full((3, 2), 3e38)
    ones = distribute_tensor(torch.ones(5, 2), tp, [Shard(1)])
    for sign, kind in ((1.0, 2), (-1.0, 0)):
        flags = new_flags()
        initlab.linear_relu(distribute_tensor(large * torch.tensor([1.0, sign]), tp, [Shard(1)]), ones, flags=flags)
        assert int(flags) == kind


@on(2)
def flags_under_fsdp() -> None:
    model = mlp("relu_squared")
    fully_shard(model[0])
    fully_shard(model)
    model[0].flags = new_flags()
    bad = dist.get_rank() == 1
    model(torch.full((2, 6), NAN if bad else 1.0)).nan_to_num().sum().backward()
    assert int(model[0].flags) == (1 if bad else 0)
    assert int(initlab.all_reduce_flags_(model[0].flags)) == 1


@on(2)
def watched() -> None:
    model = tensor_parallel("relu")
    with torch.no_grad():
        model[0].bias.to_local()[dist.get_rank() :] = -INF  # ReLU hides it
    with initlab.watch(model) as watch:
        model(DTensor.from_local(torch.zeros(4, 6), mesh(), [Replicate()]))
    fault = watch.report().fault
    assert fault is not None
    assert fault.module == "0"


@on(2, 3)
def a_parallelized_model_is_fused() -> None:
    """Tensor parallelism's hooks on the Linear go on around the LinearReLU, and its way back."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
    many = copy.deepcopy(one)
    parallelize_module(many, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert initlab.fuse_linear_relu(many).fused == ("0",)
    many[0].flags = new_flags()
    x = torch.randn(4, 6)
    for _ in range(2):
        expected, y = one(x), many(x)
        torch.testing.assert_close(y, expected)
        for model, out in ((one, expected), (many, y)):
            model.zero_grad()
            out.square().sum().backward()
        for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(whole(ours.grad), theirs.grad)
        initlab.unfuse(many)
        assert type(many[0]) is nn.Linear
    assert initlab.fuse_linear_relu(fully_shard(one, mesh=mesh())).skipped["0"].startswith("a FSDPSequential around it")
