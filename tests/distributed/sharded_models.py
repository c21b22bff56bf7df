"""Models, and the ways in which torch spreads them over ranks. Sizes are odd: they divide by no number of ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Its vocabulary, width and hidden size are odd; tokens of shape (batch, length) give logits."""

    def __init__(
        self, vocabulary: int = 53, width: int = 15, heads: int = 3, hidden: int = 41, layers: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=1)
        self.layers = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))

    def loss(self, seed: int = 0) -> Tensor:
        """Of a batch that depends on `seed` alone."""
        tokens = torch.randint(0, 53, (2, 7), generator=torch.Generator().manual_seed(seed))
        return _cross_entropy(self(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


class Conv(nn.Module):
    """Images of shape (batch, 3, 9, 9) give 7 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3)
        self.norm = nn.BatchNorm2d(11)
        self.mixed = nn.Conv2d(11, 5, 3, bias=False)
        self.head = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(nn.functional.relu(self.norm(self.stem(x)))).mean((2, 3)))

    def loss(self, seed: int = 0) -> Tensor:
        """Of a batch that depends on `seed` alone."""
        x = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
        return _cross_entropy(self(x), torch.arange(5))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    full = getattr(logits, "full_tensor", None)
    return nn.functional.cross_entropy(logits if full is None else full(), target)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2, each layer on its own and the rest together."""
    mesh = options.pop("mesh", None) or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in getattr(model, "layers", ()):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def offloaded(model: nn.Module) -> nn.Module:
    return fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Columns and rows of the feed-forward layers, rows of the embedding, columns of the head."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    if isinstance(model, GPT):
        plan: dict[str, Any] = {
            "embed": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        for i in range(len(model.layers)):
            plan |= {f"layers.{i}.up": ColwiseParallel(), f"layers.{i}.down": RowwiseParallel()}
    else:
        plan = {"head": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(model, mesh, plan)


def two_dimensional(model: nn.Module) -> nn.Module:
    """FSDP2 on top of tensor parallelism."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    return fsdp(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"])


def hybrid(model: nn.Module) -> nn.Module:
    """HSDP: two replicas, each sharded."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard"))
    return fsdp(model, mesh=mesh)


def three_dimensional(model: nn.Module) -> nn.Module:
    """HSDP on top of tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, 2, dist.get_world_size() // 4), mesh_dim_names=("replica", "shard", "tp"))
    return fsdp(tensor_parallel(model, mesh["tp"]), mesh=mesh["replica", "shard"])


MODELS: tuple[Callable[[], nn.Module], ...] = (GPT, Conv)
