"""The same weights under every parallelism."""

import torch
import torch.distributed as dist
from ranks import on
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from initlab.distributed import blocks


@on(2, 3)
def shards() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(35.0).view(7, 5)
    for tensor, region in blocks(distribute_tensor(whole, mesh, [Shard(0)])):
        (a, b), (m, n) = region.offsets, region.sizes
        assert torch.equal(tensor, whole[a : a + m, b : b + n])
