"""Variational autoencoder on the 8x8 digits."""
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from sklearn.datasets import load_digits


class VAE(nn.Module):
    def __init__(self, latent=8):
        super().__init__()
        self.enc = nn.Linear(64, 128)
        self.mu = nn.Linear(128, latent)
        self.var = nn.Linear(128, latent)
        self.dec1 = nn.Linear(latent, 128)
        self.dec2 = nn.Linear(128, 64)

    def encode(self, x):
        h = F.relu(self.enc(x))
        return self.mu(h), F.relu(self.var(h))

    def reparameterize(self, mu, var):
        eps = torch.randn_like(var)
        return mu + eps * var

    def decode(self, z):
        return torch.sigmoid(self.dec2(F.relu(self.dec1(z))))

    def forward(self, x):
        mu, var = self.encode(x)
        z = self.reparameterize(mu, var)
        return self.decode(z), mu, var


def loss_function(recon, x, mu, var):
    bce = F.binary_cross_entropy(recon, x, reduction="sum")
    kld = -0.5 * torch.sum(1 + torch.log(var) - mu.pow(2) - var)
    return bce + kld


torch.manual_seed(42)
x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
loader = DataLoader(TensorDataset(x), batch_size=64, shuffle=True)
model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

for epoch in range(1, 6):
    model.train()
    train_loss = 0
    for (data,) in loader:
        optimizer.zero_grad()
        # dividing keeps the loss per image
        recon, mu, var = model(data)
        loss = loss_function(recon, data, mu, var) / len(data)
        loss.backward()
        optimizer.step()
        train_loss += loss.item() * len(data)
    print("====> Epoch: {} Average loss: {:.4f}".format(epoch, train_loss / len(x)))
