import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression


def augment(x):
    keep = (torch.rand_like(x) > 0.15).float()
    return x * keep + 0.1 * torch.randn_like(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.projector = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x):
        return self.projector(self.backbone(x))


def nt_xent(z1, z2, temperature=0.2):
    n = z1.size(0)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    sim = z @ z.t() / temperature
    eye = torch.eye(2 * n, dtype=torch.bool)
    sim = sim.masked_fill(eye, float("-inf"))
    positives = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    return F.cross_entropy(sim, positives)


def probe(enc, x, y):
    with torch.no_grad():
        h = enc.backbone(x).numpy()
    clf = LogisticRegression(max_iter=200).fit(h[:1200], y[:1200])
    return clf.score(h[1200:], y[1200:])


def main():
    torch.manual_seed(14)
    d = load_digits()
    x = torch.tensor(d.data / 16.0, dtype=torch.float32)
    enc = Encoder()
    opt = torch.optim.AdamW(enc.parameters(), lr=2e-3, weight_decay=1e-4)
    for it in range(200):
        b = x[torch.randperm(len(x))[:128]]
        loss = nt_xent(enc(augment(b)), enc(augment(b)))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if it % 25 == 0 or it == 199:
            print(f"{it:3d} nt-xent {loss.item():.4f}")
    print("linear probe", probe(enc, x, d.target))


main()
