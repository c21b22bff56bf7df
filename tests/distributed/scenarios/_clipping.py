"""What the scenarios of clipping share: norms in float64 on one process, and counted collectives."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_models import GPT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import utils

import initlab
from initlab.distributed.dtensors import is_dtensor, local
from initlab.distributed.shards import local_shards


def close(found: Any, expected: float, rel: float = 1e-6) -> None:
    assert math.isclose(float(found), expected, rel_tol=rel), (float(found), expected)


def norm_of(wholes: Sequence[Tensor], p: float = 2.0) -> float:
    return float(torch.linalg.vector_norm(torch.cat([w.double().reshape(-1) for w in wholes]), p))


def each_close(gradients: Sequence[Tensor], expected: Sequence[float], number: int, pp: Any = None) -> None:
    """The norm of each gradient, by as many collectives as the norm of all takes, which stays the same."""
    with collectives(number):
        norm, norms = initlab.get_total_norm(gradients, per_parameter=True, pp_group=pp)
    total = initlab.get_total_norm(gradients, pp_group=pp)
    assert local(norm).dtype == norms.dtype == local(total).dtype
    assert local(norm).nan_to_num(-1.0) == local(total).nan_to_num(-1.0)
    assert type(norm) is type(total)
    expected_norms = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(norms.double(), expected_norms, rtol=1e-6, atol=0.0, equal_nan=True)


def whole(tensor: Tensor) -> Tensor:
    """What ranks hold, put together by the regions that they hold it of, in float64."""
    if not is_dtensor(tensor):
        return tensor.double()
    if terms(tensor):
        return tensor.full_tensor().double()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [(shard.region, shard.tensor) for shard in local_shards(tensor)])
    full = torch.full(tensor.shape, math.nan, dtype=torch.float64)
    for region, part in (one for rank in gathered for one in rank):
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


def check(parameters: Sequence[Tensor], mesh_dims: int, torch_too: bool = False, pp: Any = None) -> None:
    """Norms and scaled gradients against float64, collectives counted; torch's own result where it has one."""
    gradients = [p.grad for p in parameters]
    wholes = [whole(g) for g in gradients]
    own_norms = [norm_of([w]) for w in wholes]
    if pp is not None:
        gathered: list[Any] = [None] * dist.get_world_size(pp)
        dist.all_gather_object(gathered, wholes, group=pp)
        wholes = [w for stage in gathered for w in stage]
    mesh_dims += sum(map(terms, gradients)) + (pp is not None)
    for p in (2.0, 1.0, 3.0, math.inf):
        with collectives(mesh_dims):
            norm = initlab.get_total_norm(gradients, p, pp_group=pp)
        close(norm, norm_of(wholes, p))
        if torch_too:
            other = utils.get_total_norm(gradients, p)
            close(other.full_tensor(), norm_of(wholes, p), 1e-5)
            assert type(norm) is type(other) is DTensor
            assert norm.full_tensor() == norm.item()
            assert set(norm.placements) == {Replicate()}
    each_close(gradients, own_norms, mesh_dims, pp)
    parts = [local(g) for g in gradients]
    before = [part.clone() for part in parts]
    norm = norm_of(wholes)
    with collectives(mesh_dims):
        close(initlab.clip_grad_norm_(parameters, 0.4 * norm, pp_group=pp), norm)
    for part, b in zip(parts, before, strict=True):
        step = max(1e-6, torch.finfo(part.dtype).eps)  # of 16-bit types
        torch.testing.assert_close(part.double(), b.double() * (0.4 * norm / (norm + 1e-6)), rtol=step, atol=1e-30)
        part.copy_(b)
    total = initlab.get_total_norm(gradients, pp_group=pp)
    with collectives(0):
        initlab.clip_grads_with_norm_(parameters, 0.4 * norm, total)
    if torch_too:
        scaled = [part.clone() for part in parts]
        for part, b in zip(parts, before, strict=True):
            part.copy_(b)
        utils.clip_grad_norm_(parameters, 0.4 * norm)
        for part, s in zip(parts, scaled, strict=True):
            torch.testing.assert_close(part, s, rtol=1e-5, atol=1e-12)
    for part, b in zip(parts, before, strict=True):
        part.copy_(b)
    initlab.clip_grad_norm_(parameters, 2.0 * norm, pp_group=pp)
    assert all(map(torch.equal, parts, before))


def check_model(
    make: Callable[[], nn.Module], shard: Callable[[nn.Module], nn.Module], mesh_dims: int, torch_too: bool = False
) -> None:
    """`check` of a spread model's gradients, which are those of the model on one process."""
    torch.manual_seed(0)
    plain = make()
    model = shard(copy.deepcopy(plain))
    plain.loss().backward()
    getattr(model, "module", model).loss().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(whole(q.grad), p.grad.double(), rtol=1e-4, atol=1e-6)
    check(list(model.parameters()), mesh_dims, torch_too)


def wide() -> GPT:
    return GPT(hidden=48)


def whole_in(tensor: DTensor, group: Any) -> Tensor:
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, local(tensor), group=group)
    return torch.cat(gathered)


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


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [local(x).clone() for state in optimizer.state.values() for x in state.values()]


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, fused=True)


def one_by_one(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, foreach=False)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
