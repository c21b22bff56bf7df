"""Which of the symbols occurs most often? Transformer encoder with the warmup schedule of the 2017 paper."""
import math
import torch
import torch.nn as nn

VOCAB, SEQ, D, WARMUP, STEPS = 5, 12, 64, 60, 220


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, max_len=64):
        super().__init__()
        pos = torch.arange(max_len).unsqueeze(1)
        div = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, d_model)
        pe[:, 0::2] = torch.sin(pos * div)
        pe[:, 1::2] = torch.cos(pos * div)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return x + self.pe[: x.size(1)]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(VOCAB, D)
        self.pe = PositionalEncoding(D)
        layer = nn.TransformerEncoderLayer(D, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, num_layers=2)
        self.out = nn.Linear(D, VOCAB)

    def forward(self, x):
        h = self.pe(self.emb(x) * math.sqrt(D))
        return self.out(self.enc(h).mean(dim=1))


def batch(n=64):
    fav = torch.randint(0, VOCAB, (n,))
    x = torch.randint(0, VOCAB, (n, SEQ))
    keep = torch.rand(n, SEQ) < 0.5
    x = torch.where(keep, fav[:, None], x)
    return x, fav


def noam(step):
    step = max(step, 1)
    return D ** -0.5 * min(step ** -0.5, step * WARMUP ** -1.5)


torch.manual_seed(17)
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=noam)
loss_fn = nn.CrossEntropyLoss()

window = []
for step in range(STEPS):
    x, y = batch()
    loss = loss_fn(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    window.append(loss.item())
    if (step + 1) % 20 == 0:
        print(f"{step + 1:4d} loss {sum(window[-20:]) / 20:.4f}")
