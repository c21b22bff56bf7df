"""The same weights under every parallelism, compared with what one process fills."""

import copy
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import sharded_models as spread
import torch
import torch.distributed as dist
from initlab.kernels import Normal, Region
from ranks import on
from sharded_models import GPT, MODELS, Conv
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import initlab
from initlab.distributed.dtensors import local
from initlab.distributed.shards import local_shards
from initlab.models.naming import tensor_refs

RECIPES = ("torch", "gpt2", "he", "trunc_normal", "own")


def whole(make: Callable[[], nn.Module], recipe: str = "torch", seed: int = 5) -> nn.Module:
    """What one process fills."""
    model = make()
    initlab.init_model_(model, seed, recipe)
    return model


def gathered(tensor: Tensor) -> Tensor:
    """A DTensor put together from what each rank says that it holds. NaN where nobody holds anything, or copies differ.

    A plain tensor is taken as a copy.
    """
    parts = [(tensor.detach().clone(), Region.whole(tensor.shape))]
    if hasattr(tensor, "placements"):
        parts = [(mine.detach().clone(), region) for mine, region in local_shards(tensor)]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, parts)
    full, seen = torch.full(tensor.shape, torch.nan).to(tensor.dtype), torch.zeros(tensor.shape, dtype=torch.bool)
    for mine, region in (part for rank in every for part in rank):
        where = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
        full[where] = mine.where(~seen[where] | (full[where] == mine), torch.nan)
        seen[where] = True
    return full


def same(model: nn.Module, expected: nn.Module, names: Iterable[str] | None = None) -> None:
    """Every parameter and buffer, gathered, is bit by bit what it is in `expected`."""
    theirs = {ref.name: ref.tensor for kind in tensor_refs(expected) for ref in kind}
    mine = {ref.name: ref.tensor for kind in tensor_refs(model) for ref in kind}
    assert mine.keys() == (theirs.keys() if names is None else set(names))
    for name, tensor in mine.items():
        assert torch.equal(gathered(tensor), theirs[name].detach()), name


def check(parallel: Callable[[nn.Module], nn.Module], models: Iterable[Callable[[], nn.Module]] = MODELS) -> None:
    """Fill models after they are spread: in memory, and from the meta device."""
    recipes = RECIPES if dist.get_world_size() < 8 else RECIPES[:1]  # eight ranks share two cores, as a rule
    for make in models:
        for recipe in recipes:
            model = parallel(make())
            initlab.init_model_(model, 5, recipe)
            same(model, whole(make, recipe))
        if parallel is spread.ddp:  # which needs values at once
            continue
        with torch.device("meta"):
            model = make()
        model = parallel(model)
        held = dict(model.named_parameters())
        initlab.init_model_(model, 5, device="cpu")
        kept = {name: p for name, p in model.named_parameters() if hasattr(p, "placements")}
        assert all(p is held[name] for name, p in kept.items())  # an optimizer may hold them
        same(model, whole(make))
        if make is Conv or model.layers[0].up.out_features % dist.get_world_size() == 0:
            model.loss().backward()  # it is ready to be trained


@on(2, 3)
def ddp() -> None:
    check(spread.ddp)


@on(2, 3, 4, 8)
def fsdp() -> None:
    check(spread.fsdp)


class Started(nn.Module):
    """A model that starts in its constructor: factories, slices, copies and ties, which nothing but a record knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(53, 15, padding_idx=1)
        self.layers = nn.ModuleList(nn.Linear(15, 15) for _ in range(2))
        self.twin = copy.deepcopy(self.layers[1])
        self.token = nn.Parameter(torch.randn(7, 15) * 0.02)
        self.gamma = nn.Parameter(torch.full((15,), 1e-5))
        self.head = nn.Linear(15, 53, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("noise", torch.randn(15))
        nn.init.trunc_normal_(self.layers[0].weight, std=0.02)
        nn.init.zeros_(self.layers[0].weight[:5])


@on(2, 4)
def recorded_builds() -> None:
    """A build is recorded on meta, then the model is sharded, and filled: the bits of one process."""
    for start in (nn.Module.train, copy.deepcopy):
        with initlab.record_build() as build, torch.device("meta"):
            model = Started()
        model = spread.fsdp(start(model))
        initlab.init_model_(model, 5, build, device="cpu")
        with initlab.record_build() as alone:
            expected = Started()
        initlab.init_model_(expected, 5, alone)
        same(model, expected)
        assert torch.equal(gathered(model.twin.weight), gathered(model.layers[1].weight))
    with initlab.record_build() as inside:
        layer = distribute_tensor(torch.empty(7, 15), init_mesh(), [Shard(0)])
        holder = nn.Module()
        holder.weight = nn.Parameter(layer)
        nn.init.normal_(holder.weight, std=0.3)
    assert initlab.plan_model(holder, 0, inside).rows[0].distribution == Normal(0.0, 0.3)


def init_mesh() -> DeviceMesh:
    return DeviceMesh("cpu", list(range(dist.get_world_size())))


@on(2)
def offloaded() -> None:
    check(spread.offloaded)


@on(2, 3, 8)
def tensor_parallel() -> None:
    check(spread.tensor_parallel)


@on(4, 8)
def two_dimensional() -> None:
    check(spread.two_dimensional)


@on(4, 8)
def hybrid() -> None:
    check(spread.hybrid)


@on(8)
def three_dimensional() -> None:
    check(spread.three_dimensional)


@on(2)
def pipeline() -> None:
    """Stages by hand, each a module of its own with names of its own."""
    stages = {
        GPT: ({"embed": "embed", "first": "layers.0"}, {"last": "layers.1", "norm": "norm", "head": "head"}),
        Conv: ({"first": "stem", "second": "norm"}, {"conv": "mixed", "head": "head"}),
    }
    for make, parts in stages.items():
        mine = parts[dist.get_rank()]
        with torch.device("meta"):
            model = make()
        stage = nn.ModuleDict({name: model.get_submodule(whole_name) for name, whole_name in mine.items()})

        def renamed(name: str, mine: dict[str, str] = mine) -> str:
            head, _, rest = name.partition(".")
            return f"{mine[head]}.{rest}"

        initlab.init_model_(stage, 5, names=renamed, device="cpu")
        theirs = dict(whole(make).named_parameters())
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, theirs[renamed(name)]), name


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(6, count)
        self.up = nn.Parameter(torch.empty(count, 6, 10))
        self.each = nn.ModuleList(nn.Linear(6, 10) for _ in range(count))


@on(2, 3)
def experts() -> None:
    """Sharded over ranks as one weight, or some modules to a rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    recipe = {"up": Normal(0.0, 0.3), "*": "torch"}
    expected = whole(lambda: Experts(5), recipe)
    model = Experts(5)
    mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    model.up = nn.Parameter(distribute_tensor(model.up.detach(), mesh, [Shard(0)]))
    model.each = model.each[rank::world]
    mine = range(5)[rank::world]

    def renamed(name: str) -> str:
        first, *rest = name.split(".")
        return ".".join([first, str(mine[int(rest[0])]), rest[1]]) if first == "each" else name

    initlab.init_model_(model, 5, recipe, names=renamed)
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        full = gathered(parameter) if name == "up" else parameter  # the others are of this rank alone
        assert torch.equal(full, theirs[renamed(name)]), name


@on(3)
def elsewhere() -> None:
    """A rank outside a mesh holds nothing, and draws the key all the same."""
    mesh = DeviceMesh("cpu", [0, 2])
    tensor = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)])
    torch.manual_seed(3)
    initlab.init.normal_(tensor)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = initlab.init.normal_(torch.empty(7, 5))
    assert torch.equal(torch.get_rng_state(), after)
    full = gathered(tensor)
    assert torch.equal(full, expected)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform_": lambda t: initlab.init.uniform_(t, -1.0, 2.0),
    "normal_": lambda t: initlab.init.normal_(t, 1.0, 2.0),
    "trunc_normal_": initlab.init.trunc_normal_,
    "xavier_uniform_": initlab.init.xavier_uniform_,
    "xavier_normal_": initlab.init.xavier_normal_,
    "kaiming_uniform_": lambda t: initlab.init.kaiming_uniform_(t, mode="fan_out"),
    "kaiming_normal_": initlab.init.kaiming_normal_,
    "constant_": lambda t: initlab.init.constant_(t, 0.3),
    "method": lambda t: t.normal_(),
    "data": lambda t: t.data.uniform_(),
    "torch's": torch.nn.init.trunc_normal_,
}


@on(2, 4)
def calls() -> None:
    """Drop-in calls agree across ranks where torch.manual_seed does, and communicate nothing."""
    world = dist.get_world_size()
    line, square = dist.init_device_mesh("cpu", (world,)), dist.init_device_mesh("cpu", (world // 2, 2))
    placed = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()]), (square, [Shard(1), Shard(0)])]
    placed += [(square, [Shard(0), Shard(0)]), (square, [Replicate(), Shard(2)]), (square, [Shard(0), Replicate()])]
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for name, call in CALLS.items():
            if dtype.is_complex and "trunc" in f"{name}{call}":
                continue
            for mesh, placements in placed:
                torch.manual_seed(7)
                with initlab.swap():
                    expected = call(torch.zeros(7, 5, 3, dtype=dtype)).clone()
                tensor = distribute_tensor(torch.zeros(7, 5, 3, dtype=dtype), mesh, placements)
                version = tensor._version
                torch.manual_seed(7)
                with initlab.swap(), CommDebugMode() as traffic:
                    call(tensor)
                assert traffic.get_total_counts() == 0
                assert tensor._version > version or name == "data"  # which counts for itself
                assert torch.equal(gathered(tensor).nan_to_num(9.0), expected), (name, dtype, placements)


@on(2, 3)
def in_pieces() -> None:
    """A view of a DTensor may be a _StridedShard on its own: a rank holds several pieces of it."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

    def flat() -> Tensor:
        return distribute_tensor(torch.zeros(4, 6, 5), mesh, [Shard(1)]).view(24, 5)

    assert len(local_shards(flat())) == 4
    assert torch.equal(gathered(initlab.init.eye_(flat())), torch.eye(24, 5))
    model = nn.Embedding(24, 5, padding_idx=13)
    model.weight = nn.Parameter(flat())
    initlab.init_model_(model, 5)
    expected = whole(lambda: nn.Embedding(24, 5, padding_idx=13))
    same(model, expected)
    assert initlab.model_digest(model) == initlab.model_digest(expected)


@on(2)
def under_way() -> None:
    """A local tensor that a collective is still writing is waited for."""
    mesh = dist.init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)]).redistribute(mesh, [Replicate()], async_op=True)
    torch.manual_seed(3)
    expected = initlab.init.normal_(torch.empty(7, 5))
    torch.manual_seed(3)
    initlab.init.normal_(tensor)
    assert torch.equal(gathered(tensor), expected)


@on(2, 3)
def placed_ones() -> None:
    """eye_ and dirac_; torch's own write each rank's part as if it were the whole."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for dim in (0, 1):
        tensor = distribute_tensor(torch.ones(7, 5), mesh, [Shard(dim)])
        assert torch.equal(gathered(initlab.init.eye_(tensor)), torch.eye(7, 5))
        for shape, groups in (((6, 5, 3), 1), ((6, 2, 3, 4), 3), ((4, 2, 3, 3, 1), 2)):
            tensor = distribute_tensor(torch.ones(shape), mesh, [Shard(dim)])
            expected = torch.nn.init.dirac_(torch.empty(shape), groups)
            assert torch.equal(gathered(initlab.init.dirac_(tensor, groups)), expected), (shape, groups)
            with initlab.swap():
                torch.nn.init.constant_(tensor, 3.0)
                assert torch.equal(gathered(torch.nn.init.dirac_(tensor, groups)), expected)
        tensor = distribute_tensor(torch.ones(7, 5), mesh, [Shard(dim)])
        with initlab.swap():
            assert torch.equal(gathered(torch.nn.init.eye_(tensor)), torch.eye(7, 5))


@on(2)
def refused() -> None:
    """What cannot be filled says so on every rank, and writes nothing."""
    mesh = dist.init_device_mesh("cpu", (2,))
    state = torch.get_rng_state()
    tensor = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    raises("orthogonal_ needs the whole matrix", initlab.init.orthogonal_, tensor)
    raises("sparse_ needs the whole matrix", initlab.init.sparse_, tensor, 0.5)
    partial = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    raises("under Partial no rank holds the values", initlab.init.normal_, partial)
    odd = DTensor.from_local(torch.ones(1 + 3 * dist.get_rank(), 3), mesh, [Shard(0)], shape=(5, 3), stride=(3, 1))
    raises("not what the placements say", initlab.init.normal_, odd)
    assert torch.equal(torch.get_rng_state(), state)
    for bad in (partial, odd):
        model = nn.Linear(3, 4)
        model.weight = nn.Parameter(bad)
        raises("weight: ", initlab.init_model_, model, 0)
        assert (local(bad) == 1.0).all()
    flat = FullyShardedDataParallel(nn.Linear(3, 4), device_id=torch.device("cpu"))
    raises("flat pieces", initlab.init_model_, flat, 0)
    raises("flat pieces", initlab.model_digest, flat)
    with FullyShardedDataParallel.summon_full_params(flat):
        initlab.init_model_(flat, 0, names=lambda name: name.removeprefix("_flat_param."))
        mine = initlab.model_digest(flat).total
    assert mine == initlab.model_digest(whole(lambda: nn.Linear(3, 4), seed=0)).total


@on(2)
def hidden() -> None:
    """Parts that are plain tensors: of DistributedDataParallel over tensor parallelism, and gathered copies."""
    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), mesh["tp"], {"0": ColwiseParallel()})
    DistributedDataParallel(model, device_mesh=mesh["dp"])
    assert not hasattr(model[0].weight, "placements")
    raises("0.weight is the local part of a DTensor placed (S(0))", initlab.init_model_, model, 0)
    raises("before the model is wrapped", initlab.model_digest, model)
    model = spread.fsdp(Conv())
    initlab.init_model_(model.head, 5, names="head")
    model.loss()
    raises("weight belongs to a module above this model", initlab.init_model_, model.head, 0)
    raises("call its reshard()", initlab.model_digest, model.head)
    model.reshard()
    assert torch.equal(gathered(model.head.weight), whole(Conv).head.weight)


def raises(message: str, function: Callable[..., object], *args: object) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match=re.escape(message)):
        function(*args)


@on(2, 3)
def reset_parameters() -> None:
    """FSDP2's own flow from the meta device: to_empty, then every module's reset_parameters, inside swap()."""
    for make in MODELS:
        torch.manual_seed(11)
        with initlab.swap():
            expected = make()
            for module in expected.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        with torch.device("meta"):
            model = make()
        model = spread.fsdp(model)
        model.to_empty(device="cpu")
        torch.manual_seed(11)
        with initlab.swap():
            make()  # the draws of the constructors
        with initlab.swap(check_ranks=True):
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        same(model, expected)


class Titan(nn.Module):
    """As torchtitan makes models: functions of torch.nn.init, taken when it was imported, in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(13, 31, bias=False), nn.Linear(31, 13)
        self.table = {
            "up.weight": functools.partial(nn.init.trunc_normal_, std=0.02),
            "down.weight": functools.partial(nn.init.normal_, std=1.0),
            "down.bias": nn.init.zeros_,
        }

    def init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            self.table[name](parameter)


@on(2, 3)
def table_of_functions() -> None:
    """torchtitan's flow: parallelise on meta, to_empty, init_weights without gradients."""
    expected = Titan()
    torch.manual_seed(17)
    with torch.no_grad(), initlab.swap():
        expected.init_weights()
    with torch.device("meta"):
        model = Titan()
    mesh = dist.init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("fsdp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["fsdp"])
    model.to_empty(device="cpu")
    torch.manual_seed(17)
    with torch.no_grad(), initlab.swap(check_ranks=True):
        model.init_weights()
    same(model, expected)


@on(2)
def while_gathered() -> None:
    """Between forward and backward the root's parameters are gathered copies, which are not to be filled."""
    model = spread.fsdp(Conv())
    loss = model.loss()
    assert not hasattr(model.head.weight, "placements")
    initlab.init_model_(model, 5)
    model.reshard()
    same(model, whole(Conv))
    del loss
    digest = initlab.model_digest(model)
    model.loss()
    assert initlab.model_digest(model) == digest


@on(2)
def without_gradients() -> None:
    """In inference mode too the parameters become such as can be trained."""
    for mode in (torch.no_grad(), torch.inference_mode()):
        with torch.device("meta"):
            model = Conv()
        model = spread.fsdp(model)
        with mode:
            initlab.init_model_(model, 4, device="cpu")
            initlab.init_model_(model, 5)
        same(model, whole(Conv))
        model.loss().backward()


@on(2)
def kept() -> None:
    """What parameters carry stays: frozen, labelled, with the whole's distributions and classes; autograd notices."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3).requires_grad_(False))
        model[0].weight.label = "first"
        return model

    with torch.device("meta"):
        model = make()
    for layer in model:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (2,)))
        layer.weight.label = "first"
    report = initlab.init_model_(model, 5, device="cpu")
    assert str(report) == str(initlab.plan_model(make(), 5))
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    assert model[0].weight.label == "first"
    loss = model[0].weight.square().sum().full_tensor()
    initlab.init_model_(model, 5)
    raises("modified by an inplace operation", loss.backward)
    model.again = nn.Parameter(model[0].weight.detach().T)
    with pytest.raises(ValueError, match="share memory"):
        initlab.init_model_(model, 5, {"again": "he", "*": "torch"})


@on(2)
def gradients_on_meta() -> None:
    """They go, as nothing is in them, and the parameters stay the same objects."""
    with torch.device("meta"):
        model = Conv()
    model = spread.fsdp(model)
    held = list(model.parameters())
    for parameter in held:
        parameter.grad = torch.empty_like(parameter)
    initlab.init_model_(model, 5, device="cpu")
    same(model, whole(Conv))
    assert all(a is b and a.grad is None for a, b in zip(model.parameters(), held, strict=True))


@on(2, 3)
def buffers() -> None:
    """Buffers that are DTensors have distributions, and values that the caller gives, as any other."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    values = {"table": torch.arange(35.0).view(7, 5), "scale": torch.tensor(3.0)}

    def plain(name: str, _: Tensor) -> Tensor | None:
        return values.get(name)

    def spread_out(name: str, _: Tensor) -> Tensor | None:
        return distribute_tensor(values[name].expand(7, 5), mesh, [Shard(1)]) if name in values else None

    for given in (plain, spread_out):
        with torch.device("meta"):
            model = nn.BatchNorm1d(7)
            model.running_var = distribute_tensor(torch.empty(7), mesh, [Shard(0)])
            for name in values:
                model.register_buffer(name, distribute_tensor(torch.empty(7, 5), mesh, [Shard(0)]))
        initlab.init_model_(model, 5, device="cpu", buffers=given)
        assert torch.equal(gathered(model.running_var), torch.ones(7))
        for name, value in values.items():
            assert torch.equal(gathered(getattr(model, name)), value.expand(7, 5)), name


@on(2, 3, 4)
def digests() -> None:
    """Computed shard by shard; one all-reduce for each dimension of a mesh."""
    ways = [spread.ddp, spread.fsdp, spread.tensor_parallel]
    if dist.get_world_size() == 4:
        ways += [spread.two_dimensional, spread.hybrid]
    for make in MODELS:
        expected = initlab.model_digest(whole(make))
        for parallel in ways:
            model = parallel(make())
            report = initlab.init_model_(model, 5)
            with CommDebugMode() as traffic:
                assert report.digest() == expected
            count = {"ddp": 0, "two_dimensional": 2}.get(parallel.__name__, 1)
            assert traffic.get_total_counts() == count, parallel
            with torch.no_grad():
                where = local(model.get_parameter("module.head.weight" if parallel is spread.ddp else "head.weight"))
                where.view(-1)[-1:].add_(1.0)
            changed = initlab.model_digest(model)
            assert changed.differing(expected) in ([], ["head.weight"])
            if parallel is not spread.ddp:
                assert changed != expected


@on(2, 4)
def agreement() -> None:
    """Seeds that differ are named on every rank, before init_model_ writes anything, and at the end of swap()."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = spread.fsdp(Conv())
    with CommDebugMode() as traffic:
        initlab.init_model_(model, 5, check_ranks=True)
    assert traffic.get_total_counts() == 1
    odd = int(rank == world - 1)
    raises(f"head.weight: rank {world - 1} of {world}", lambda: initlab.init_model_(model, 6 + odd, check_ranks=True))
    if world == 4:  # over both dimensions of a mesh
        square = spread.hybrid(Conv())
        raises("head.weight: rank 3 of 4", lambda: initlab.init_model_(square, 6 + odd, check_ranks=True))
    recipe = {"head": "he", "*": "torch"} if odd else "torch"
    raises(f"stem.weight: rank {world - 1}", lambda: initlab.init_model_(model, 5 + odd, recipe, check_ranks=True))
    recipe = {"head": "trunc_normal", "*": "torch"} if odd else {"head": "gpt2", "*": "torch"}
    raises(f"head.weight: rank {world - 1}", lambda: initlab.init_model_(model, 5, recipe, check_ranks=True))
    same(model, whole(Conv))
    tensor = model.head.weight
    own = torch.Generator().manual_seed(3)
    mine = torch.Generator().manual_seed(rank)

    def fill(*generators: torch.Generator | None) -> None:
        for generator in generators:
            initlab.init.normal_(tensor, generator=generator)

    with initlab.swap(check_ranks=True), CommDebugMode() as traffic:
        fill(None, own)
    assert traffic.get_total_counts() == 0  # within; the comparison comes after
    with CommDebugMode() as traffic, initlab.swap(check_ranks=True):
        fill(None, own)
    assert traffic.get_total_counts() == 1
    raises("generator 2 (cpu), first used for shape (7, 5)", initlab.swap(check_ranks=True)(fill), None, own, mine)

    def seeded_again() -> None:
        fill(mine)
        fill(mine.manual_seed(3))

    raises("generator 1 (cpu)", initlab.swap(check_ranks=True)(seeded_again))
    torch.manual_seed(rank)
    raises("torch's default CPU generator", initlab.swap(check_ranks=True)(fill), None)
    plain = torch.empty(3)
    with initlab.swap(check_ranks=True):  # no DTensor: there is nobody to compare with
        initlab.init.normal_(plain)
    raises("keys differ", initlab.swap(check_ranks=dist.group.WORLD)(initlab.init.normal_), plain)
    if world == 4:  # over a part of the ranks
        half = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("far", "near"))
        torch.manual_seed(rank // 2)
        initlab.swap(check_ranks=half["near"])(initlab.init.normal_)(plain)
        raises("keys differ", initlab.swap(check_ranks=half["far"])(initlab.init.normal_), plain)


@on(4)
def memory() -> None:
    """A model of 10^9 parameters from the meta device: no rank takes more than its shards and 64 MiB."""
    warm = nn.Linear(100, 100, dtype=torch.bfloat16)
    initlab.init_model_(warm, 0)
    with torch.device("meta"):
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(4096, 4096, dtype=torch.bfloat16) for _ in range(58))
        model.embed = nn.Embedding(7001, 4096, padding_idx=0, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) > 10**9
    model = spread.fsdp(model)
    mine = sum(local(p).numel() * 2 for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status("VmRSS")
    initlab.init_model_(model, 0, device="cpu")
    taken = _status("VmHWM") - before
    print(f"rank {dist.get_rank()}: {taken / 2**20:.0f} MiB for {mine / 2**20:.0f} MiB of shards")
    assert taken <= mine + 64 * 2**20
    assert all(local(p).device.type == "cpu" for p in model.parameters())


def _status(name: str) -> int:
    """A line of this process's memory, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
