import math

import torch
import torch.nn as nn

torch.manual_seed(99)
Z_DIM, BATCH = 4, 128


def real_batch(n):
    k = torch.randint(0, 8, (n,)).float()
    angle = 2 * math.pi * k / 8
    centers = torch.stack([angle.cos(), angle.sin()], 1)
    return centers + 0.05 * torch.randn(n, 2)


def mlp(i, o, h=64):
    return nn.Sequential(nn.Linear(i, h), nn.LeakyReLU(0.2), nn.Linear(h, h), nn.LeakyReLU(0.2), nn.Linear(h, o))


G = mlp(Z_DIM, 2)
D = mlp(2, 1)
bce = nn.BCEWithLogitsLoss()
opt_g = torch.optim.Adam(G.parameters(), lr=1e-3, betas=(0.5, 0.999))
opt_d = torch.optim.Adam(G.parameters(), lr=1e-3, betas=(0.5, 0.999))

ones, zeros = torch.ones(BATCH, 1), torch.zeros(BATCH, 1)
for it in range(600):
    # discriminator
    real = real_batch(BATCH)
    fake = G(torch.randn(BATCH, Z_DIM)).detach()
    loss_d = bce(D(real), ones) + bce(D(fake), zeros)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()

    # generator
    fake = G(torch.randn(BATCH, Z_DIM))
    loss_g = bce(D(fake), ones)
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()

    if it % 100 == 0:
        r = fake.detach().norm(dim=1)
        print(f"{it}: D {loss_d.item():.3f} G {loss_g.item():.3f} radius {r.mean():.3f}+-{r.std():.3f}")
