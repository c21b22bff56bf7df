"""diagnose() on losses whose sign is wrong, and on those that only look so: adversarial, contrastive, maximised."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose

pytestmark = pytest.mark.long

G = torch.Generator().manual_seed(0)
X = torch.randn(128, 8, generator=G)
Y = X[:, :1] * X[:, 1:2] + X[:, 2:3]
C = (X[:, 0] > 0).long()


def net(out=1, i=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(i, 32), nn.Tanh(), nn.Linear(32, out))


def adam(m, lr=1e-2):
    return torch.optim.Adam(m.parameters(), lr)


def gauss(sign):
    def f(m, b):
        mu, ls = m(b[0]).chunk(2, -1)
        return sign * torch.distributions.Normal(mu, ls.clamp(-3, 3).exp()).log_prob(b[1]).mean()

    m = net(2)
    return m, (X, Y), f, adam(m)


def mse(sign):
    m = net()
    return m, (X, Y), (lambda m, b: sign * ((m(b[0]) - b[1]) ** 2).mean() + 0.0), adam(m)


def sub_l2():
    m = net()
    return (
        m,
        (X, Y),
        (lambda m, b: F.mse_loss(m(b[0]), b[1]) - 0.1 * sum(p.pow(2).sum() for p in m.parameters())),
        adam(m),
    )


def logp(sign):
    m = net(2)
    return m, (X, C), (lambda m, b: sign * m(b[0]).log_softmax(-1).gather(1, b[1][:, None]).mean()), adam(m)


def reinforce(sign):
    m = net(2)
    A = torch.randint(0, 2, (128,), generator=G)
    R = torch.rand(128, generator=G)

    def f(m, b):
        d = torch.distributions.Categorical(logits=m(b[0]))
        return sign * (d.log_prob(A) * (R - R.mean() * 0.0)).mean() - 0.01 * d.entropy().mean()

    m = net(2)
    return m, (X,), f, adam(m)


class V(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.e = nn.Linear(8, 8)
        s.d = nn.Linear(4, 8)

    def forward(s, x):
        mu, lv = s.e(x).chunk(2, -1)
        return s.d(mu + torch.randn_like(mu) * (0.5 * lv).exp()), mu, lv


def vae(sign, kind=0):
    def f(m, x):
        r, mu, lv = m(x[0])
        if kind == 0:
            kl = -0.5 * (1 + lv - mu**2 - lv.exp()).sum(1).mean()
        elif kind == 1:
            kl = (
                torch.distributions.kl_divergence(
                    torch.distributions.Normal(mu, (0.5 * lv).exp()),
                    torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu)),
                )
                .sum(1)
                .mean()
            )
        else:
            kl = torch.mean(-0.5 * torch.sum(1 + lv - mu.pow(2) - lv.exp(), dim=1))
        return F.mse_loss(r, x[0]) + sign * 0.1 * kl

    m = V()
    return m, (X,), f, adam(m)


class GAN(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.G = nn.Linear(4, 8)
        s.D = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def minimax():
    m = GAN()
    return (
        m,
        (X,),
        (lambda m, b: -F.binary_cross_entropy_with_logits(m.D(m.G(torch.randn(64, 4))), torch.zeros(64, 1))),
        adam(m.G),
    )


def wgan():
    m = GAN()
    return (
        m,
        (X,),
        (lambda m, b: m.D(m.G(torch.randn(128, 4)).detach()).mean() - m.D(b[0]).mean() + 10 * 0),
        adam(m.D, 1e-3),
    )


def maxlik():
    m = net(2)

    def f(m, b):
        mu, ls = m(b[0]).chunk(2, -1)
        return torch.distributions.Normal(mu, ls.clamp(-3, 3).exp()).log_prob(b[1]).mean()

    return m, (X, Y), f, torch.optim.Adam(m.parameters(), 1e-2, maximize=True)


def entropy_min():
    m = net(4)

    def f(m, b):
        lp = m(b[0]).log_softmax(-1)
        return -(lp.exp() * lp).sum(-1).mean()

    return m, (X,), f, adam(m)


def contrast():
    m = net(4)

    def f(m, b):
        z = F.normalize(m(b[0]), dim=-1)
        d = (z[:, None] - z[None]).pow(2).sum(-1)
        same = C[:, None] == C[None]
        return d[same].mean() - d[~same].mean()

    return m, (X, C), f, adam(m)


def preferences():
    """Two answers to a prompt: the log-probability of the worse one is made smaller on purpose."""
    m = net(4)
    better, worse = torch.randint(0, 2, (128, 1), generator=G), torch.randint(2, 4, (128, 1), generator=G)

    def f(m, b):
        logp = m(b[0]).log_softmax(-1)
        return -F.logsigmoid(logp.gather(1, better) - logp.gather(1, worse)).mean()

    return m, (X,), f, adam(m)


def reversekl():
    m = net(4)
    t = torch.randn(128, 4, generator=G).log_softmax(-1)

    def f(m, b):
        lp = m(b[0]).log_softmax(-1)
        return (lp.exp() * (lp - t)).sum(-1).mean()

    return m, (X,), f, adam(m)


WRONG = {
    "likelihood": (lambda: gauss(1), "sub"),
    "distance": (lambda: mse(-1), "sub"),
    "log-probability": (lambda: logp(1), "log_softmax"),
    "policy": (lambda: reinforce(1), "gather"),
    "divergence": (lambda: vae(-1), "sum"),
    "of distributions": (lambda: vae(-1, 1), "sum"),
    "sum, then mean": (lambda: vae(-1, 2), "sum"),
}
RIGHT = {
    "likelihood": lambda: gauss(-1),
    "distance": lambda: mse(1),
    "log-probability": lambda: logp(-1),
    "policy": lambda: reinforce(-1),
    "divergence": lambda: vae(1),
    "of distributions": lambda: vae(1, 1),
    "sum, then mean": lambda: vae(1, 2),
    "minimax generator": minimax,
    "critic": wgan,
    "to be maximised": maxlik,
    "entropy": entropy_min,
    "contrastive": contrast,
    "reverse divergence": reversekl,
    "preferences": preferences,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sign_is_named(name):
    make, op = WRONG[name]
    cause = diagnose(*make()).causes[0]
    assert (cause.kind, cause.place.op) == ("loss", op)


@pytest.mark.parametrize("name", RIGHT)
def test_what_only_looks_so(name):
    found = diagnose(*RIGHT[name]())
    assert found.causes == (), str(found)


def test_maximised_twice():
    model, batch, _, _ = mse(-1)
    found = diagnose(
        model,
        batch,
        lambda m, b: -(m(b[0])[:, 0] * b[0][:, 0]).mean(),
        torch.optim.SGD(model.parameters(), 0.1, maximize=True),
    )
    assert (found.causes[0].kind, found.causes[0].tried) == ("optimizer", True)
