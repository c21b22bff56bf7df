"""Text by characters, GPT with features of the document, float32, FSDP2 on two ranks."""
import os
import socket

import torch
import torch.distributed
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import common

NAME = "run10_gpt_fsdp2_single_row"
STEPS, LENGTH, WIDTH, HEADS = 24, 24, 32, 4
SHORT = {14: 1}  # step: rank whose batch has one row


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (z.view(b, t, HEADS, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


class Standardise(torch.nn.Module):
    """Features of a document, standardised over the batch."""

    def forward(self, features):
        return (features - features.mean(0)) / (features.std(0) + 1e-5)


class GPT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = torch.nn.Embedding(common.VOCABULARY, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.standardise, self.style = Standardise(), torch.nn.Linear(3, WIDTH)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, common.VOCABULARY)

    def forward(self, codes, features):
        x = self.token(codes) + self.place(torch.arange(codes.shape[1])) + self.style(self.standardise(features))[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def data(rank):
    generator = torch.Generator().manual_seed(10 + rank)
    batches = []
    for step in range(1, STEPS + 1):
        x, y = common.windows(LENGTH, 1 if SHORT.get(step) == rank else 8, generator)
        spaces = (x == common.CHARS.index(" ")).float().mean(1)
        features = torch.stack([spaces, (x == common.CHARS.index(",")).float().mean(1), x.float().mean(1)], 1)
        batches.append((x, features, y))
    return batches


def loss_fn(model, batch):
    codes, features, following = batch
    return torch.nn.functional.cross_entropy(model(codes, features).flatten(0, 1), following.flatten())


def worker(rank, port, where):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = GPT()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    if common.PLAIN:
        probe = common.Probe(model)
        for batch in data(rank):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            probe.see(loss)
            optimizer.step()
        probe.print(f"{NAME} rank {rank}")
    else:
        import initlab

        done = 0
        with initlab.guard(model, optimizer, loss_fn=loss_fn, folder=where) as guard:
            for batch in data(rank):
                guard.step(batch)
                done += 1
        report = guard.report()
        own = [common.finite(model), done]
        all_ranks = [None, None]
        torch.distributed.all_gather_object(all_ranks, own)
        if rank == 0:
            common.emit(NAME, report, where, min(d for _, d in all_ranks), STEPS, all(f for f, _ in all_ranks))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main():
    where = common.folder(NAME)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(port, str(where)), nprocs=2)


if __name__ == "__main__":
    main()
