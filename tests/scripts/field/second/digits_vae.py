import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits


class VAE(nn.Module):
    def __init__(self, d_in=64, d_h=128, d_z=8):
        super().__init__()
        self.enc = nn.Linear(d_in, d_h)
        self.mu = nn.Linear(d_h, d_z)
        self.logvar = nn.Linear(d_h, d_z)
        self.dec1 = nn.Linear(d_z, d_h)
        self.dec2 = nn.Linear(d_h, d_in)

    def encode(self, x):
        h = F.relu(self.enc(x))
        return self.mu(h), self.logvar(h)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        return mu + std * torch.randn_like(std)

    def decode(self, z):
        return self.dec2(F.relu(self.dec1(z)))

    def forward(self, x):
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


def elbo_loss(logits, x, mu, logvar):
    bce = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kld = 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (bce + kld) / x.size(0)


def train(steps=280, bs=128):
    torch.manual_seed(0)
    x = torch.tensor(load_digits().data, dtype=torch.float32) / 16.0
    vae = VAE()
    opt = torch.optim.Adam(vae.parameters(), lr=4e-3)
    history = []
    for i in range(steps):
        batch = x[torch.randint(0, len(x), (bs,))]
        logits, mu, logvar = vae(batch)
        loss = elbo_loss(logits, batch, mu, logvar)
        opt.zero_grad()
        loss.backward()
        opt.step()
        history.append(loss.item())
        if i % 40 == 0:
            print("step", i, "loss", round(history[-1], 3))
    print("final", history[-1])
    return vae


if __name__ == "__main__":
    train()
