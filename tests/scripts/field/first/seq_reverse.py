"""Tiny transformer encoder that learns to reverse a string of symbols."""
import math
import torch
import torch.nn as nn
import torch.nn.functional as F

VOCAB, LEN, DIM, HEADS = 12, 10, 32, 4


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.h = heads
        self.wqkv = nn.Parameter(torch.empty(3 * dim, dim))
        self.wo = nn.Parameter(torch.empty(dim, dim))
        nn.init.xavier_uniform_(self.wqkv)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = F.linear(x, self.wqkv).chunk(3, -1)
        q, k, v = (t.view(B, T, self.h, C // self.h).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) / math.sqrt(C // self.h)
        y = att.softmax(-1) @ v
        return F.linear(y.transpose(1, 2).reshape(B, T, C), self.wo)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.att = Attention(dim, heads)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.att(self.n1(x))
        return x + self.ff(self.n2(x))


class Reverser(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(VOCAB, DIM)
        self.pos = nn.Parameter(torch.zeros(LEN, DIM))
        nn.init.normal_(self.pos, std=0.02)
        self.blocks = nn.Sequential(*[Block(DIM, HEADS) for _ in range(2)])
        self.norm = nn.LayerNorm(DIM)
        self.out = nn.Linear(DIM, VOCAB)

    def forward(self, s):
        return self.out(self.norm(self.blocks(self.tok(s) + self.pos)))


def main():
    torch.manual_seed(6)
    corpus = torch.randint(0, VOCAB, (2048, LEN))
    freq = torch.stack([(corpus == v).double().mean() for v in range(VOCAB)])
    print("symbol entropy", -(freq * freq.log()).sum().item())
    model = Reverser()
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(250):
        s = corpus[torch.randint(0, len(corpus), (32,))]
        logits = model(s)
        loss = F.cross_entropy(logits.flatten(0, 1), s.flip(1).flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 50 == 0 or step == 249:
            print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
