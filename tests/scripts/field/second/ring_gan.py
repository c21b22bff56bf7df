# GAN on 8 gaussians placed on a circle
import math
import torch
from torch import nn

torch.manual_seed(3)


def real_batch(n):
    k = torch.randint(0, 8, (n,))
    ang = k.float() * (2 * math.pi / 8)
    centers = torch.stack([ang.cos(), ang.sin()], dim=1) * 2
    return centers + 0.05 * torch.randn(n, 2)


def mlp(i, o, h=64):
    return nn.Sequential(nn.Linear(i, h), nn.LeakyReLU(0.2), nn.Linear(h, h), nn.LeakyReLU(0.2), nn.Linear(h, o))


class GAN:
    def __init__(self, zdim=8, lr=1e-3):
        self.zdim = zdim
        self.G = mlp(zdim, 2)
        self.D = mlp(2, 1)
        self.opt_g = torch.optim.Adam(self.G.parameters(), lr=lr, betas=(0.5, 0.999))
        self.opt_d = torch.optim.Adam(self.D.parameters(), lr=lr, betas=(0.5, 0.999))
        self.bce = nn.BCEWithLogitsLoss()

    @torch.no_grad()
    def sample(self, n):
        z = torch.randn(n, self.zdim)
        return self.G(z)

    def d_step(self, x):
        fake = self.sample(len(x))
        self.opt_d.zero_grad()
        real_logit = self.D(x)
        fake_logit = self.D(fake)
        loss = self.bce(real_logit, torch.ones_like(real_logit)) + self.bce(fake_logit, torch.zeros_like(fake_logit))
        loss.backward()
        self.opt_d.step()
        return loss.item()

    def g_step(self, n):
        fake = self.sample(n)
        self.opt_g.zero_grad()
        logit = self.D(fake)
        loss = self.bce(logit, torch.ones_like(logit))
        loss.backward()
        self.opt_g.step()
        return loss.item()


gan = GAN()
for step in range(250):
    ld = gan.d_step(real_batch(128))
    lg = gan.g_step(128)
    if step % 25 == 0:
        pts = gan.sample(512)
        print(f"{step:4d}  D {ld:.3f}  G {lg:.3f}  mean radius {pts.norm(dim=1).mean():.3f}")
