"""Sharded from meta, filled, clipped and watched: torchrun --nproc_per_node 4 examples/sharded_training.py

FSDP2 on tensor parallelism. In the fourth step one half of the data is broken: all ranks skip it, and say where it was.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import initlab


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def build() -> nn.Sequential:
    return nn.Sequential(*(Block(32) for _ in range(3)), nn.Linear(32, 5))


def main() -> None:
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = build()
    for block in model[:3]:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    clipper = initlab.GradClipper(optimizer, max_norm=0.5)

    initlab.init_model_(model, seed=0, recipe="he", device="cpu", check_ranks=True)
    digest = initlab.model_digest(model)
    whole = build()
    initlab.init_model_(whole, seed=0, recipe="he")
    say(f"digest of the sharded model {digest}, of a whole one {initlab.model_digest(whole)}")

    half = mesh["dp"].get_local_rank()
    generator = torch.Generator().manual_seed(half)
    with initlab.watch(model) as watching:
        for step in range(6):
            x = torch.randn(16, 32, generator=generator)
            if step == 3 and half == 1:
                x[0, 0] = float("nan")
            optimizer.zero_grad()
            (model(x) - x[:, :5]).square().mean().backward()
            optimizer.step()  # clips, and skips the step whose gradients are NaN, on every rank
    say(str(clipper.stats()))
    say(str(watching.report(across=True)))
    dist.destroy_process_group()


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
