"""Faults in GANs, critics and variational autoencoders that make or judge digits."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .case import DIV, POW, STD, Built, Fault, planter, train

FAULTS: list[Fault] = []
fault = planter(FAULTS, "gan")


class Gan(nn.Module):
    """A generator of 64 pixels and a critic that gives one logit."""

    def __init__(self, hidden: int = 64, depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(16, hidden), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(hidden, hidden), nn.ReLU()]
        self.generator = nn.Sequential(*layers, nn.Linear(hidden, 64), nn.Sigmoid())
        self.critic = nn.Sequential(nn.Linear(64, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.critic(self.generator(z))


def pair(count: int = 64, top: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Real images as rows of pixels, and latent vectors."""
    x, _ = data.images(count, top=top)
    return x.flatten(1), torch.randn(count, 16)


def critic_loss(model: Any, batch: Any) -> torch.Tensor:
    """The stable loss of the critic."""
    real, z = batch
    fake = model.generator(z).detach()
    return F.softplus(-model.critic(real)).mean() + F.softplus(model.critic(fake)).mean()


def generator_loss(model: Any, batch: Any) -> torch.Tensor:
    """The stable, non-saturating loss of the generator."""
    return F.softplus(-model(batch[1])).mean()


def adam(part: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(part.parameters(), lr=lr)


class Vae(nn.Module):
    """`encoder` gives means and log-variances of 8 latents; `decoder` gives logits of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_var = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + noise * torch.exp(0.5 * log_var)), mean, log_var


# Input.


@fault("input", "operation")
def vae_on_bytes(planted: bool = True) -> Built:
    # Pixels in 0..255 give log-variances of about 100, whose exp overflows.
    x, _ = data.images(64, top=255.0 if planted else 1.0)
    x = x.flatten(1)
    model = Vae()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, noise = batch
        out, mean, log_var = model(inputs, noise)
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(-1)
        return (F.mse_loss(out, inputs, reduction="none").sum(-1) + kl).mean()

    nn.init.normal_(model.encoder[2].weight, std=0.2)
    return model, (x, torch.randn(64, 8)), loss_fn, adam(model)


@fault("input", place={"feature": 3})
def nan_in_latents(planted: bool = True) -> Built:
    # Latents cached in a file, one column of which was divided by its std of 0 over constant rows.
    _, z = pair()
    if planted:
        z[:, 3] = torch.nan
    model = Gan()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return F.softplus(-model(batch)).mean()

    return model, z, loss_fn, adam(model.generator)


# Starting weights.


@fault("weights", place={"module": ("", "generator", *(f"generator.{i}" for i in range(24)))})
def dcgan_weights_in_a_deep_mlp(planted: bool = True) -> Built:
    # N(0, 0.02) belongs to DCGAN with its batch norms; here eleven plain layers fade the latents out.
    batch = pair()
    model = Gan(depth=11)
    for layer in model.generator:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            if planted:
                nn.init.normal_(layer.weight, std=0.02)
    return model, batch, generator_loss, adam(model.generator)


@fault("weights", place={"module": ("critic.0", "critic.2")})
def huge_critic(planted: bool = True) -> Built:
    # The critic's layers were given std 100 (a variance for a std, and a slip of the point).
    batch = pair()
    model = Gan()
    if planted:
        for layer in (model.critic[0], model.critic[2]):
            nn.init.normal_(layer.weight, std=100.0)
    optimizer = torch.optim.SGD(model.critic.parameters(), lr=0.01)
    return model, batch, critic_loss, optimizer


# Operations.


class MinibatchStd(nn.Module):
    """Adds the mean std over the batch as a feature, as StyleGAN's critic has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spread = x.std(0).mean().expand(x.shape[0], 1)
        return torch.cat([x, spread], -1)


@fault("operation", place={"module": "critic.0", "op": STD}, fixable=False)
def minibatch_std_of_one(planted: bool = True) -> Built:
    # Batch size 1 to save memory: the std over the batch is NaN.
    batch = pair(1 if planted else 8)
    model = Gan()
    model.critic = nn.Sequential(MinibatchStd(), nn.Linear(65, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    return model, batch, critic_loss, adam(model.critic)


class PixelNorm(nn.Module):
    """Latents on the sphere."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z / torch.sqrt(z.square().mean(-1, keepdim=True) + self.eps)


@fault("operation", place={"module": "generator.0", "op": (*DIV, "sqrt")}, fixable=False)
def pixel_norm_of_zero(planted: bool = True) -> Built:
    # The mean latent (all zeros) is in the batch for a preview image; its norm is 0.
    real, z = pair()
    z[0] = 0.0
    model = Gan()
    model.generator = nn.Sequential(PixelNorm(0.0 if planted else 1e-8), *model.generator)
    return model, (real, z), generator_loss, adam(model.generator)


# Precision.


@fault("precision", fixable=False)
def half_critic_scaled(planted: bool = True) -> Built:
    # The critic in float16 with a fixed loss scale of 2**30.
    batch = pair()
    model = Gan()
    model.critic.half()
    scale = 2.0**30 if planted else 2.0**8

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        real, z = batch
        dtype = next(model.critic.parameters()).dtype
        fake = model.generator(z).detach()
        on_real, on_fake = model.critic(real.to(dtype)).float(), model.critic(fake.to(dtype)).float()
        return scale * (F.softplus(-on_real).mean() + F.softplus(on_fake).mean())

    return model, batch, loss_fn, torch.optim.SGD(model.critic.parameters(), lr=1e-4)


# Learning rate.


@fault("learning rate", steps=5)
def generator_lr_2(planted: bool = True) -> Built:
    # lr=2 for 2e-4: the decoder jumps away from the data.
    x, _ = data.images(64)
    model = Vae()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, noise = batch
        out, mean, _ = model(inputs, 0 * noise)
        return F.mse_loss(out, inputs) + 1e-3 * mean.square().mean()

    return model, (x.flatten(1), torch.randn(64, 8)), loss_fn, adam(model, 2.0 if planted else 2e-3)


# Loss.


@fault("loss", place={"op": "log"}, fixable=False)
def log_of_one_minus_d(planted: bool = True) -> Built:
    # log(D(x)) + log(1 - D(G(z))): a critic fooled by strong fakes gives D = 1 exactly, so log(0).
    real, z = pair()
    model = Gan()
    train(
        model,
        (real, z),
        lambda m, b: F.softplus(m.critic(b[0])).mean() + F.softplus(-m(b[1])).mean(),
        adam(model, 0.05),
        60,
    )

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        images, latents = batch
        d_real = torch.sigmoid(model.critic(images))
        d_fake = torch.sigmoid(model.critic(model.generator(latents).detach()))
        return -(torch.log(d_real) + torch.log(1 - d_fake)).mean()

    return model, (real, z), loss_fn if planted else critic_loss, adam(model.critic, 1e-3)


@fault("loss", place={"op": ("binary_cross_entropy", "bce_loss", "bceloss")}, fixable=False)
def bce_loss_on_logits(planted: bool = True) -> Built:
    # nn.BCELoss with a critic that has no sigmoid.
    batch = pair()
    model = Gan()
    criterion = nn.BCELoss() if planted else nn.BCEWithLogitsLoss()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        images, latents = batch
        on_real, on_fake = model.critic(images), model.critic(model.generator(latents).detach())
        return criterion(on_real, torch.ones_like(on_real)) + criterion(on_fake, torch.zeros_like(on_fake))

    return model, batch, loss_fn, adam(model.critic)


@fault("loss", "operation", place={"op": ("sqrt", *POW)}, fixable=False)
def gradient_penalty_at_zero(planted: bool = True) -> Built:
    # WGAN-GP: the norm of the critic's input gradient as sqrt(sum(g**2)); with a last layer of zeros g is 0.
    real, z = pair()
    model = Gan()
    nn.init.zeros_(model.critic[2].weight)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        images, latents = batch
        fake = model.generator(latents).detach()
        between = (0.5 * images + 0.5 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(model.critic(between).sum(), between, create_graph=True)
        norm = torch.sqrt(slope.square().sum(-1) + (0.0 if planted else 1e-12))
        return model.critic(fake).mean() - model.critic(images).mean() + 10 * (norm - 1).square().mean()

    return model, (real, z), loss_fn, adam(model.critic)


class ReluVae(Vae):
    """Standard deviations from a ReLU."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, std = self.encoder(x).chunk(2, -1)
        std = torch.relu(std) + self.floor
        return self.decoder(mean + noise * std), mean, std


@fault("loss", "operation", place={"op": "log"}, fixable=False)
def kl_of_zero_std(planted: bool = True) -> Built:
    # The std is a ReLU's output, 0 for many latents; the KL term takes its log.
    x, _ = data.images(64)
    model = ReluVae(0.0 if planted else 0.1)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        inputs, noise = batch
        out, mean, std = model(inputs, noise)
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * torch.log(std)).mean()
        return F.binary_cross_entropy_with_logits(out, inputs) + 0.01 * kl

    return model, (x.flatten(1), torch.randn(64, 8)), loss_fn, adam(model)


# Uninitialised.


class SpectralLinear(nn.Module):
    """A linear layer divided by its largest singular value, which one power step from the buffer `u` estimates."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in) / math.sqrt(fan_in))
        self.bias = nn.Parameter(torch.zeros(fan_out))
        self.register_buffer("u", torch.empty(fan_out))
        nn.init.normal_(self.u)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            v = F.normalize(self.weight.T @ self.u, dim=0)
            u = F.normalize(self.weight @ v, dim=0)
        return F.linear(x, self.weight / (u @ self.weight @ v), self.bias)


@fault("uninitialised", place={"parameter": "critic.0.u"})
def empty_spectral_vector(planted: bool = True) -> Built:
    # Spectral norm by hand: register_buffer("u", torch.empty(n)) and nothing fills it.
    batch = pair()
    model = Gan()
    model.critic[0] = SpectralLinear(64, 64)
    if planted:
        model.critic[0].u.zero_()
        model.critic[0].u[::5] = torch.nan
    return model, batch, critic_loss, adam(model.critic)


@fault("uninitialised", place={"parameter": "generator.2.weight"})
def generator_of_a_broken_run(planted: bool = True) -> Built:
    # Resumed from the last checkpoint, saved after the collapse into NaN.
    batch = pair()
    model = Gan()
    if planted:
        nn.init.constant_(model.generator[2].weight, torch.nan)
    return model, batch, generator_loss, adam(model.generator)


# Several at once.


@fault("weights", "uninitialised", place={"parameter": "critic.0.weight"}, several=True, steps=2)
def nan_critic_and_lr_1(planted: bool = True) -> Built:
    # A NaN weight in the critic, and lr=1.0 for Adam.
    batch = pair()
    model = Gan()
    if planted:
        with torch.no_grad():
            model.critic[0].weight[0, 10] = torch.nan
    return model, batch, critic_loss, adam(model.critic, 1.0 if planted else 1e-3)
