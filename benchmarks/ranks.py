"""How long a sharded model takes to be initialised from the meta device, by number of ranks, and the same for torch.

python benchmarks/ranks.py [PARAMETERS]: worlds of 1, 2, 4, ... ranks, one thread each, as many as there are cores.
torch's own way is FSDP2's: to_empty, then reset_parameters of every module. Both are run once to warm up, then five
times in turn; medians of the slowest rank.

python benchmarks/ranks.py host: what the host spends on each of many small sharded parameters, on one rank of 512.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict

ROUNDS = 5


def measure(world, rank, parameters, folder):
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    import initlab

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = dist.init_device_mesh("cpu", (world,))
    width = 2048

    def sharded():
        with torch.device("meta"):
            layers = (nn.Linear(width, width, dtype=torch.bfloat16) for _ in range(parameters // width**2))
            model = nn.Sequential(*layers)
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def ours(model):
        initlab.init_model_(model, 0, device="cpu")

    def torchs(model):
        model.to_empty(device="cpu")
        for layer in model:
            layer.reset_parameters()

    seconds = {ours: [], torchs: []}
    for _ in range(1 + ROUNDS):
        for way in seconds:
            model = sharded()
            dist.barrier()
            start = time.perf_counter()
            way(model)
            took = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            seconds[way].append(float(took))
            del model
    if rank == 0:
        shard = parameters // width**2 * (width**2 + width) * 2 // world
        median = [statistics.median(times[1:]) for times in seconds.values()]
        print(json.dumps([world, shard, *median]))
    dist.destroy_process_group()


def main(parameters):
    print(f"{parameters:.3g} parameters, bfloat16, {os.cpu_count()} cores")
    print("ranks  shard MiB   initlab s  torch s  ratio")
    for world in (n for n in (1, 2, 4, 8, 16, 32, 64) if n <= os.cpu_count()):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-W", "ignore", __file__, str(parameters), str(world), folder]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            ranks = [
                subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE, text=True)
                for rank in range(world)
            ]
            outputs = [rank.communicate()[0] for rank in ranks]
        _, shard, ours, torchs = json.loads(outputs[0].splitlines()[-1])
        print(f"{world:5d} {shard / 2**20:10.0f} {ours:11.3f} {torchs:8.3f} {torchs / ours:5.1f}x")


def host():
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import initlab

    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=100, world_size=512)  # its collectives do nothing
    mesh = dist.init_device_mesh("cpu", (64, 8), mesh_dim_names=("dp", "tp"))
    plan = {**dict.fromkeys(("q", "k", "v", "up", "gate"), ColwiseParallel()), "o": RowwiseParallel()}
    plan["down"] = RowwiseParallel()

    def layer():
        wide = {name: nn.Linear(64, 64, bias=False) for name in ("q", "k", "v", "o", "up", "gate", "down")}
        return nn.Sequential(OrderedDict(wide, norm1=nn.RMSNorm(64), norm2=nn.RMSNorm(64)))

    def sharded():
        with torch.device("meta"):
            model = nn.ModuleList(layer() for _ in range(126))
        for each in model:
            parallelize_module(each, mesh["tp"], plan)
            fully_shard(each, mesh=mesh["dp"])
        return model

    seconds = []
    for _ in range(1 + ROUNDS):
        model = sharded()
        start = time.perf_counter()
        initlab.init_model_(model, 0, device="cpu")
        seconds.append(time.perf_counter() - start)
    count, median = len(list(model.parameters())), statistics.median(seconds[1:])
    print(f"{count} sharded parameters of 64 x 64: {median:.3f} s, {median / count * 1e3:.2f} ms each")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:] == ["host"]:
        host()
    elif len(sys.argv) > 2:
        measure(int(sys.argv[2]), int(sys.argv[4]), int(sys.argv[1]), sys.argv[3])
    else:
        main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**9)
