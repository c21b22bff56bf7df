"""diagnose() on healthy runs that do what the checks of signs, of cut gradients and of layouts look for, on purpose."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import initlab
from initlab import diagnose

pytestmark = pytest.mark.long

G = torch.Generator().manual_seed(3)
X = torch.randn(96, 12, generator=G)
Y = (X[:, :1] * 2 + X[:, 1:2]).tanh()
C = (X[:, 0] > 0).long()


def adam(m, lr=5e-3):
    return torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr)


CE = initlab.supervised(nn.CrossEntropyLoss())
MSE = initlab.supervised(nn.MSELoss())


class LoRA(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.b = nn.Linear(12, 32)
        s.h = nn.Linear(32, 2)
        s.b.requires_grad_(False)
        s.A = nn.Parameter(torch.randn(12, 4) * 0.3)
        s.B = nn.Parameter(torch.zeros(4, 32))

    def forward(s, x):
        return s.h((s.b(x) + x @ s.A @ s.B).relu())


def a_lora():
    m = LoRA()
    return (m, (X, C), CE, adam(m))


class VQ(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.e = nn.Linear(12, 8)
        s.d = nn.Linear(8, 12)
        s.book = nn.Parameter(torch.randn(16, 8))

    def forward(s, x):
        z = s.e(x)
        i = torch.cdist(z, s.book).argmin(1)
        q = s.book[i]
        s.commit = F.mse_loss(z, q.detach()) + F.mse_loss(q, z.detach())
        return s.d(z + (q - z).detach())


def a_vq():
    m = VQ()
    return (m, (X,), lambda m, b: F.mse_loss(m(b[0]), b[0]) + m.commit, adam(m))


class Moe(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.r = nn.Linear(12, 4)
        s.ex = nn.ModuleList(nn.Linear(12, 2) for _ in range(4))

    def forward(s, x):
        p = s.r(x).softmax(-1)
        w, i = p.max(-1)
        return torch.stack([e(x) for e in s.ex], 1)[torch.arange(len(x)), i] * w[:, None]


def a_moe():
    m = Moe()
    return (m, (X, C), CE, adam(m))


class ReZero(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.i = nn.Linear(12, 32)
        s.l = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        s.a = nn.Parameter(torch.zeros(4))
        s.o = nn.Linear(32, 2)

    def forward(s, x):
        x = s.i(x)
        for a, layer in zip(s.a, s.l, strict=True):
            x = x + a * layer(x).relu()
        return s.o(x)


def a_rezero():
    m = ReZero()
    return (m, (X, C), CE, adam(m))


def wgangp():
    torch.manual_seed(0)
    D = nn.Sequential(nn.Linear(12, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def f(m, b):
        fake = torch.randn(96, 12) * 0.5 + 1
        a = torch.rand(96, 1)
        xi = (a * b[0] + (1 - a) * fake).requires_grad_()
        (g,) = torch.autograd.grad(m(xi).sum(), xi, create_graph=True)
        return m(fake).mean() - m(b[0]).mean() + 10 * ((g.norm(dim=1) - 1) ** 2).mean()

    return D, (X,), f, adam(D)


def wass_gen():
    torch.manual_seed(0)
    m = nn.Module()
    m.G = nn.Linear(4, 12)
    m.D = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))
    return m, (X,), (lambda m, b: -m.D(m.G(torch.randn(96, 4))).mean()), torch.optim.Adam(m.G.parameters(), 5e-3)


def ppo():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4))
    A = torch.randint(0, 4, (96,), generator=G)
    adv = torch.randn(96, generator=G)
    old = torch.distributions.Categorical(logits=m(X)).log_prob(A).detach()

    def f(m, b):
        d = torch.distributions.Categorical(logits=m(b[0]))
        r = (d.log_prob(b[1]) - b[3]).exp()
        return -torch.min(r * b[2], r.clamp(0.8, 1.2) * b[2]).mean() - 0.01 * d.entropy().mean()

    return m, (X, A, adv, old), f, adam(m)


def sac():
    torch.manual_seed(0)
    m = nn.Module()
    m.pi = nn.Linear(12, 4)
    m.q = nn.Linear(14, 1)
    m.q.requires_grad_(False)

    def f(m, b):
        mu, ls = m.pi(b[0]).chunk(2, -1)
        d = torch.distributions.Normal(mu, ls.clamp(-5, 2).exp())
        u = d.rsample()
        a = u.tanh()
        lp = (d.log_prob(u) - torch.log(1 - a**2 + 1e-6)).sum(-1, keepdim=True)
        return (0.2 * lp - m.q(torch.cat([b[0], a], 1))).mean()

    return m, (X,), f, torch.optim.Adam(m.pi.parameters(), 5e-3)


def unlikelihood():
    torch.manual_seed(0)
    m = nn.Linear(12, 6)
    good = torch.randint(0, 3, (96,), generator=G)
    bad = torch.randint(3, 6, (96, 1), generator=G)

    def f(m, b):
        lp = m(b[0]).log_softmax(-1)
        return F.nll_loss(lp, good) - torch.log(1 - lp.gather(1, bad).exp() + 1e-6).mean()

    return m, (X,), f, adam(m)


def triplet():
    torch.manual_seed(0)
    m = nn.Linear(12, 8)

    def f(m, b):
        a = m(b[0])
        p = b[1]
        n = b[2]
        return (((a - p) ** 2).sum(1) - ((a - n) ** 2).sum(1) + 1).relu().mean()

    return m, (X, torch.randn(96, 8, generator=G), torch.randn(96, 8, generator=G)), f, adam(m)


def tft():
    class N(nn.Module):
        def __init__(s):
            super().__init__()
            torch.manual_seed(0)
            s.r = nn.LSTM(3, 16)
            s.o = nn.Linear(16, 2)

        def forward(s, x):
            return s.o(s.r(x.transpose(0, 1))[0][-1])

    S = torch.randn(64, 7, 3, generator=G)
    y = (S[:, :, 0].sum(1) > 0).long()
    m = N()
    return m, (S, y), CE, adam(m)


def setattn():
    class N(nn.Module):
        def __init__(s):
            super().__init__()
            torch.manual_seed(0)
            s.a = nn.MultiheadAttention(12, 2)
            s.o = nn.Linear(12, 2)

        def forward(s, x):
            h = x[:, None]
            return s.o((h + s.a(h, h, h)[0])[:, 0])

    m = N()
    return m, (X, C), CE, adam(m)


def mil():
    class N(nn.Module):
        def __init__(s):
            super().__init__()
            torch.manual_seed(0)
            s.e = nn.Linear(12, 8)
            s.a = nn.Linear(8, 1)
            s.o = nn.Linear(8, 2)

        def forward(s, x):
            h = s.e(x).tanh()
            return s.o((s.a(h).softmax(0) * h).sum(0, keepdim=True))

    m = N()
    return m, (X, torch.tensor([1])), CE, adam(m)


def maxi():
    torch.manual_seed(0)
    m = nn.Linear(12, 1)
    return m, (X, Y), (lambda m, b: -F.mse_loss(m(b[0]), b[1])), torch.optim.Adam(m.parameters(), 1e-2, maximize=True)


def rew():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(12, 4), nn.Softmax(-1))
    R = torch.rand(96, 4, generator=G)
    return (
        m,
        (X, R),
        (lambda m, b: (m(b[0]) * b[1]).sum(1).mean()),
        torch.optim.Adam(m.parameters(), 5e-2, maximize=True),
    )


class GRL(torch.autograd.Function):
    @staticmethod
    def forward(c, x):
        return x.view_as(x)

    @staticmethod
    def backward(c, g):
        return -0.1 * g


def dann():
    torch.manual_seed(0)
    m = nn.Module()
    m.f = nn.Linear(12, 16)
    m.c = nn.Linear(16, 2)
    m.d = nn.Linear(16, 2)
    dom = torch.randint(0, 2, (96,), generator=G)

    def f(m, b):
        h = m.f(b[0]).relu()
        return F.cross_entropy(m.c(h), b[1]) + F.cross_entropy(m.d(GRL.apply(h)), b[2])

    return m, (X, C, dom), f, adam(m)


def distill():
    torch.manual_seed(0)
    m = nn.Linear(12, 5)
    T = torch.randn(96, 5, generator=G)
    return (
        m,
        (X, T),
        (lambda m, b: F.kl_div((m(b[0]) / 2).log_softmax(-1), (b[1] / 2).softmax(-1), reduction="batchmean") * 4),
        adam(m, 2e-2),
    )


def betavae():
    torch.manual_seed(0)
    m = nn.Module()
    m.e = nn.Linear(12, 8)
    m.d = nn.Linear(4, 12)

    def f(m, b):
        mu, lv = m.e(b[0]).chunk(2, -1)
        z = mu + torch.randn_like(mu) * (lv / 2).exp()
        kl = -0.5 * (1 + lv - mu.pow(2) - lv.exp()).sum(1)
        return F.mse_loss(m.d(z), b[0]) + 0.05 * kl.clamp_min(0.5).mean()

    return m, (X,), f, adam(m)


def flow():
    torch.manual_seed(0)
    m = nn.Module()
    m.s = nn.Parameter(torch.zeros(12))
    m.t = nn.Parameter(torch.zeros(12))
    return (
        m,
        (X * 3 + 1,),
        (
            lambda m, b: (
                -(torch.distributions.Normal(0.0, 1.0).log_prob((b[0] - m.t) * (-m.s).exp()).sum(1) - m.s.sum()).mean()
            )
        ),
        adam(m, 5e-2),
    )


def clampstd():
    torch.manual_seed(0)
    m = nn.Linear(12, 2)
    with torch.no_grad():
        m.bias[1] = -0.5

    def f(m, b):
        mu, ls = m(b[0]).chunk(2, -1)
        return -torch.distributions.Normal(mu, ls.clamp(-20, 2).exp()).log_prob(b[1]).mean()

    return m, (X, Y), f, adam(m, 1e-2)


def hardtanhnet():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(12, 32), nn.Hardtanh(), nn.Linear(32, 1))
    return m, (X, Y), MSE, adam(m)


def ids_round():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 1))

    def f(m, b):
        out = m(b[0])
        m.acc = (out.round() == b[1].round()).float().mean()
        return F.mse_loss(out, b[1])

    return m, (X, Y), f, adam(m)


def ema_teacher():
    torch.manual_seed(0)
    m = nn.Module()
    m.s = nn.Linear(12, 8)
    m.t = nn.Linear(12, 8)
    m.p = nn.Linear(8, 8)

    def f(m, b):
        with torch.no_grad():
            t = m.t(b[0])
        return 2 - 2 * F.cosine_similarity(m.p(m.s(b[0])), t).mean()

    return m, (X,), f, adam(m)


HEALTHY = {
    "wgan-gp": wgangp,
    "wgan generator": wass_gen,
    "ppo": ppo,
    "sac": sac,
    "unlikelihood": unlikelihood,
    "triplet": triplet,
    "transposed inside": tft,
    "attention over rows": setattn,
    "mil": mil,
    "maximise minus mse": maxi,
    "maximise reward": rew,
    "gradient reversal": dann,
    "distill": distill,
    "free bits": betavae,
    "flow": flow,
    "clamped std": clampstd,
    "hardtanh": hardtanhnet,
    "round in a metric": ids_round,
    "byol": ema_teacher,
    "lora": a_lora,
    "vq": a_vq,
    "moe": a_moe,
    "rezero": a_rezero,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_meant_is_no_fault(name):
    found = diagnose(*HEALTHY[name]())
    assert found.causes == (), str(found)
