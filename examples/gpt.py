"""A small GPT on the CPU, with everything on: python examples/gpt.py

It learns to spell from the help texts that Python ships. The start is that of GPT-2, the same on every machine;
gradients are clipped; a batch that goes wrong would be left out, and explained, while the run goes on.
"""

from pydoc_data.topics import topics  # what help("for") prints: half a million characters

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import initlab

CONTEXT, WIDTH, HEADS, DEPTH, STEPS = 64, 64, 4, 2, 250


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]])))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    # Help texts differ between versions of Python; characters beyond ASCII become "?".
    text = "\n".join(topics.values()).encode("ascii", "replace")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    with torch.device("meta"):  # no memory yet, and no random numbers that would be thrown away
        model = GPT(vocabulary=128)

    # Normal with a standard deviation of 0.02, and less where a residual branch ends, which it finds by itself.
    print(initlab.init_model_(model, seed=0, recipe="gpt2", device="cpu"))
    print("digest", initlab.model_digest(model))  # the same bits on a GPU, and on any number of ranks

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    # A guard has a GradClipper of its own, max_norm is its limit. folder="guard" would keep bad batches as well.
    with initlab.guard(model, optimizer, loss_fn=loss_fn, max_norm=1.0) as guard:
        for step in range(STEPS):
            starts = torch.randint(len(data) - CONTEXT, (16, 1), generator=generator)
            loss = guard.step(data[starts + torch.arange(CONTEXT + 1)])  # zero_grad, loss, backward, clip, step
            schedule.step()
            if step % 50 == 0 or step == STEPS - 1:
                print(f"step {step:3}: loss {loss:.3f}, gradient norm {guard.clipper.report.norm:.2f}")
    print(guard.report())
    print(guard.clipper.stats())


if __name__ == "__main__":
    main()
