"""Physics informed net for u'' + 0.4 u' + 4 u = 0, u(0) = 1, u'(0) = 0 on [0, 2]."""
import math
import torch
from torch import nn

torch.manual_seed(10)
net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
opt = torch.optim.Adam(net.parameters(), lr=5e-3)


def derivative(u, t):
    return torch.autograd.grad(u, t, grad_outputs=torch.ones_like(u), create_graph=True)[0]


def residual(t):
    u = net(t)
    du = derivative(u, t)
    ddu = derivative(du, t)
    return ddu + 0.4 * du + 4.0 * u


def exact(t):
    w = math.sqrt(4.0 - 0.04)
    return torch.exp(-0.2 * t) * (torch.cos(w * t) + 0.2 / w * torch.sin(w * t))


t0 = torch.zeros(1, 1, requires_grad=True)
for it in range(300):
    t = (2 * torch.rand(64, 1)).requires_grad_(True)
    loss_pde = residual(t).pow(2).mean()
    u0 = net(t0)
    du0 = derivative(u0, t0)
    loss_ic = (u0 - 1).pow(2).mean() + du0.pow(2).mean()
    loss = loss_pde + 10 * loss_ic
    opt.zero_grad()
    loss.backward()
    opt.step()
    if it % 50 == 0 or it == 299:
        with torch.no_grad():
            tt = torch.linspace(0, 2, 50).unsqueeze(1)
            err = (net(tt) - exact(tt)).abs().max().item()
        print(f"{it:4d} loss {loss.item():.5f} pde {loss_pde.item():.5f} ic {loss_ic.item():.5f} max err {err:.4f}")
