"""Which elements a rank holds of a DTensor, for meshes of up to 512 ranks, in one process."""

import itertools
import math
import weakref
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import initlab
from initlab.distributed.agreement import differing
from initlab.distributed.groups import MeshDims
from initlab.distributed.intervals import local_intervals
from initlab.distributed.shards import local_shards

MESHES = [(64,), (512,), (8, 8), (16, 4), (64, 8), (3, 5, 7), (2, 4, 8), (4, 16, 8)]


@st.composite
def sharding(draw, mesh):
    """A length, and the order in which some dimensions of a mesh shard it, as (parts, factor) from left to right."""
    length = draw(st.integers(0, 1200))
    chosen = draw(st.sets(st.integers(0, len(mesh) - 1), min_size=1))
    order = draw(st.permutations(sorted(chosen)))
    factor = {d: math.prod(mesh[e] for e in order[:i] if e > d) for i, d in enumerate(order)}
    return length, {d: (mesh[d], factor[d]) for d in sorted(order)}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_regions_tile(data):
    """In any order of sharding, all ranks together hold each element once for every copy."""
    mesh = data.draw(st.sampled_from(MESHES))
    length, splits = data.draw(sharding(mesh))
    count = torch.zeros(length, dtype=torch.int64)
    for where in itertools.product(*map(range, mesh)):
        for offset, size in local_intervals(
            length, [(parts, where[d], factor) for d, (parts, factor) in splits.items()]
        ):
            assert size > 0
            count[offset : offset + size] += 1
    copies = math.prod(n for d, n in enumerate(mesh) if d not in splits)
    assert (count == copies).all()


@pytest.fixture
def world():
    """`world(size, rank)` makes a process group in which collectives do nothing."""

    def make(size, rank=0):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=size)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


PLACED = [
    ((64,), [Shard(0)]),
    ((512,), [Shard(1)]),
    ((8, 8), [Shard(0), Shard(0)]),
    ((8, 8), [Shard(1), Shard(0)]),
    ((4, 16), [Replicate(), Shard(0)]),
    ((8, 8), [_StridedShard(0, split_factor=8), Shard(0)]),
    ((8, 8), [_StridedShard(0, split_factor=8), Replicate()]),
    ((8, 8), [_StridedShard(1, split_factor=3), Shard(0)]),
    ((4, 4, 4), [_StridedShard(0, split_factor=4), Replicate(), Shard(0)]),
    ((4, 4, 4), [Shard(0), _StridedShard(0, split_factor=4), Shard(0)]),
    ((64, 8), [Shard(0), Shard(1)]),
]


@pytest.mark.parametrize(("mesh", "placements"), PLACED)
@pytest.mark.parametrize("shape", [(128, 64), (67, 33), (5, 70)])
def test_where_torch_puts_elements(mesh, placements, shape):
    """Against the splitting that torch's placements do themselves, on every rank."""
    pieces = {(): torch.arange(math.prod(shape)).view(shape)}
    for placement, parts in zip(placements, mesh, strict=True):
        for where, piece in list(pieces.items()):
            split = [piece] * parts
            if not placement.is_replicate():
                split, _ = placement._split_tensor(piece, parts, with_padding=False)
            pieces |= {(*where, at): split[at] for at in range(parts)}
    for where in itertools.product(*map(range, mesh)):
        assert torch.equal(pieces[where], expected(shape, mesh, placements, where, pieces[where].shape)), where


def expected(shape, mesh, placements, where, sizes):
    """What a rank holds of a tensor whose elements are numbered, by `local_intervals`."""
    found = torch.arange(math.prod(shape)).view(shape)
    for dim, length in enumerate(shape):
        splits = [
            (parts, at, getattr(p, "split_factor", 1))
            for p, parts, at in zip(placements, mesh, where, strict=True)
            if getattr(p, "dim", None) == dim
        ]
        intervals = local_intervals(length, splits, sizes[dim])
        index = [i for offset, size in intervals for i in range(offset, offset + size)]
        found = found.index_select(dim, torch.tensor(index, dtype=torch.int64))
    return found


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((8, 8), [_StridedShard(0, split_factor=8), Shard(0)]),
        pytest.param((64, 8), [Shard(0), Shard(1)], marks=pytest.mark.long),
    ],
)
def test_where_distribute_tensor_puts_elements(world, mesh, placements):
    """Against LocalTensor, torch's simulation of all ranks at once."""
    shape = 67, 33
    world(math.prod(mesh))
    with LocalTensorMode(math.prod(mesh)):
        numbered = torch.arange(math.prod(shape)).view(shape)
        device_mesh = dist.init_device_mesh("cpu", mesh)
        ranks = distribute_tensor(numbered, device_mesh, placements, src_data_rank=None).to_local()
        found = {rank: tensor.clone() for rank, tensor in ranks._local_tensors.items()}
    for rank, where in enumerate(itertools.product(*map(range, mesh))):
        assert torch.equal(found[rank], expected(shape, mesh, placements, where, found[rank].shape)), where


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(37, 101), nn.Linear(101, 37), nn.LayerNorm(37)


def mesh_of(*sizes):
    """Named after the rank: torch keeps one mesh for equal ones, and a process has one rank elsewhere."""
    names = [f"{name}_{dist.get_rank()}" for name in ("copy", "data", "model")[-len(sizes) :]]
    return dist.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def over_tensor_parallel(model, mesh):
    *data, last = mesh.mesh_dim_names
    parallelize_module(model, mesh[last], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh[tuple(data)])


PARALLEL = {
    "fsdp": lambda model, world: fully_shard(model, mesh=mesh_of(world)),
    "hsdp": lambda model, world: fully_shard(model, mesh=mesh_of(2, world // 2)),
    "2-d": lambda model, world: over_tensor_parallel(model, mesh_of(world // 8, 8)),
    "3-d": lambda model, world: over_tensor_parallel(model, mesh_of(2, world // 16, 8)),
}


@pytest.mark.parametrize("kind", PARALLEL)
def test_parallel_models_tile(world, kind):
    """What fully_shard and parallelize_module make on each of 64 ranks: together every element, equally often."""
    count = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in Layer().named_parameters()}
    for rank in range(64):
        world(64, rank)
        with torch.device("meta"):
            model = Layer()
        for name, parameter in PARALLEL[kind](model, 64).named_parameters():
            for _, region in local_shards(parameter):
                where = zip(region.offsets, region.sizes, strict=True)
                count[name][tuple(slice(offset, offset + size) for offset, size in where)] += 1
    for name, times in count.items():
        assert times.min() == times.max() >= 1, name


@pytest.mark.parametrize("rank", [0, 1, 63, 300, 511])
def test_a_rank_of_512(world, rank):
    """One rank of 512 fills its part of the bits of the whole, from meta, without the other 511."""
    whole = Layer()
    initlab.init_model_(whole, 3)
    world(512, rank)
    with torch.device("meta"):
        model = Layer()
    model = PARALLEL["3-d"](model, 512)
    initlab.init_model_(model, 3, device="cpu")
    for name, parameter in model.named_parameters():
        for shard, region in local_shards(parameter):
            where = zip(region.offsets, region.sizes, strict=True)
            expected = whole.get_parameter(name)[tuple(slice(offset, offset + size) for offset, size in where)]
            assert torch.equal(shard, expected), name


def test_a_parameter_that_cannot_stay_the_same_object(world):
    """torch swaps no tensor to which there is a weak reference."""
    world(4, 1)
    with torch.device("meta"):
        model = Layer()
    model = PARALLEL["fsdp"](model, 4)
    weak = weakref.ref(model.up.weight)
    with pytest.warns(UserWarning, match=r"up\.weight is a new parameter now.*weakref.*make anew"):
        initlab.init_model_(model, 3, device="cpu")
    assert weak() is not model.up.weight
    assert not model.up.weight.is_meta


def test_an_order_that_placements_alone_do_not_tell(world):
    """DTensorSpec may hold the order in which mesh dimensions shard a tensor dimension."""
    world(8, 3)
    mesh = dist.init_device_mesh("cpu", (2, 4))
    tensor = distribute_tensor(torch.ones(16), mesh, [Shard(0), Shard(0)])
    assert [region.offsets for _, region in local_shards(tensor)] == [(6,)]
    entry = type(tensor._spec.shard_order[0])
    tensor._spec.shard_order = (entry(tensor_dim=0, mesh_dims=(1, 0)),)
    assert [region.offsets for _, region in local_shards(tensor)] == [(12,)]


def test_factors_that_fit_nothing():
    assert local_intervals(12, [(3, 0, 5)]) == [
        (0, 1),
        (3, 1),
        (6, 1),
        (9, 1),
    ]  # in 5 as torch.chunk does, of each the first of 3
    assert local_intervals(12, [(3, 0, 5)], size=5) is None
    assert local_intervals(12, [(3, 1, 1)], size=5) is None


def test_mesh_dims(world):
    """Dimensions of one rank are left out, and dimensions with equal ranks are one."""
    world(8, 5)
    square, cube = dist.init_device_mesh("cpu", (2, 4)), dist.init_device_mesh("cpu", (2, 1, 4))
    tensors = [
        distribute_tensor(torch.ones(8, 8), square, [Replicate(), Shard(0)]),
        distribute_tensor(torch.ones(8, 8), cube, [Shard(0), Shard(1), Replicate()]),
        None,
    ]
    mesh_dims = MeshDims(tensors)
    assert [mesh_dim.ranks for mesh_dim in mesh_dims.dims] == [(1, 5), (4, 5, 6, 7)]
    assert mesh_dims.sharded == [frozenset({1}), frozenset({0}), frozenset()]


def test_everybody_agrees_with_himself():
    assert differing({"a": "1", "b": "2"}, []) == {}


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_content_sums_of_parts_add_up(data):
    """kernels.content_sum over the regions of a random sharding, complex and strided tensors too."""
    from initlab.kernels import Region, content_sum

    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int8]))
    parts = [data.draw(st.integers(1, 4)) for _ in shape]
    whole = torch.randn(shape).mul(40).to(dtype)
    total = 0
    for where in itertools.product(*map(range, parts)):
        each = [local_intervals(n, [(p, at, 1)]) for n, p, at in zip(shape, parts, where, strict=True)]
        for intervals in itertools.product(*each):
            region = Region(shape, tuple(o for o, _ in intervals), tuple(s for _, s in intervals))
            total += content_sum(whole[tuple(slice(o, o + s) for o, s in intervals)], region)
    assert total % 2**64 == content_sum(whole)
    with pytest.raises(ValueError, match="region's sizes"):
        content_sum(whole, Region((1, *shape), (0,) * (len(shape) + 1), (1, *shape)))


def test_two_readings():
    """Where sizes do not divide, distribute_tensor and FSDP cut one pair of placements in two ways; size decides."""
    splits = [(4, 3, 2), (2, 0, 1)]  # nine elements: in two, and the first of those in four; or the fourth of _S first
    assert local_intervals(9, splits, size=0) == []
    assert local_intervals(9, splits, size=1) == [(8, 1)]
    assert local_intervals(38, [(4, 3, 4), (4, 2, 1)], size=1) == [
        (29, 1)
    ]  # both fit: FSDP's counts, not torch's (37, 1)
    everywhere = Counter()
    for dp, tp in itertools.product(range(4), range(2)):
        for offset, size in local_intervals(9, [(4, dp, 2), (2, tp, 1)]):
            everywhere.update(range(offset, offset + size))
    assert everywhere == Counter(range(9))
