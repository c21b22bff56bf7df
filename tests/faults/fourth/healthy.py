"""Healthy models; some look odd and are right."""
import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine, make_moons


def _t(x):
    return torch.tensor(np.asarray(x), dtype=torch.float32)


def _z(x):
    s = x.std(0)
    return (x - x.mean(0)) / np.where(s > 0, s, 1)


def _digits(n=256):
    d = load_digits()
    return _t(d.data[:n]), torch.tensor(d.target[:n])


def _patterns(n, length, vocab, seed):
    rng = np.random.default_rng(seed)
    start, step = rng.integers(0, vocab, (n, 1)), rng.integers(1, 4, (n, 1))
    return torch.tensor((start + step * np.arange(length)) % vocab)


def _case(model, batch, loss_fn, optimizer):
    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=optimizer)


def _ce(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


# 1 a VAE whose decoder learns its variance: the loss becomes negative
class GaussVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(30, 32), nn.Tanh(), nn.Linear(32, 8))
        self.dec = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 30))
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        mu, logvar = self.enc(x).chunk(2, 1)
        return self.dec(mu + (0.5 * logvar).exp() * torch.randn_like(mu)), mu, logvar


def healthy_sigma_vae():
    torch.manual_seed(101)
    model = GaussVAE()
    x = load_breast_cancer().data
    x = _t((x - x.min(0)) / (x.max(0) - x.min(0)))

    def loss_fn(model, x):
        rec, mu, logvar = model(x)
        nll = ((x - rec) ** 2 / (2 * (2 * model.log_sigma).exp()) + model.log_sigma).sum(1).mean()
        return nll - 0.5 * (1 + logvar - mu ** 2 - logvar.exp()).sum(1).mean()
    return _case(model, x, loss_fn, torch.optim.Adam(model.parameters(), 2e-2))


# 2 densities above 1: a negative NLL that is right
def healthy_narrow_flow():
    torch.manual_seed(102)
    x = _t(make_moons(200, noise=0.05, random_state=2)[0]) * 0.05

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2))
            self.log_scale, self.shift = nn.Parameter(torch.full((2,), 2.0)), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            x = (x + self.shift) * self.log_scale.exp()
            s, t = self.net(x[:, :1]).chunk(2, 1)
            s = torch.tanh(s)
            return torch.cat([x[:, :1], x[:, 1:] * s.exp() + t], 1), s.sum(1) + self.log_scale.sum()

    def loss_fn(model, x):
        z, logdet = model(x)
        return -(torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + logdet).mean()
    model = Affine()
    return _case(model, x, loss_fn, torch.optim.Adam(model.parameters(), 2e-2))


# 3 raw wine, a BatchNorm first
def healthy_bn_first():
    torch.manual_seed(103)
    d = load_wine()
    model = nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))
    return _case(model, (_t(d.data), torch.tensor(d.target)), _ce, torch.optim.SGD(model.parameters(), 0.1))


# 4 targets of 25 to 346, whose mean and spread the model knows
class Scaled(nn.Module):
    def __init__(self, y):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
        self.register_buffer("mean", y.mean())
        self.register_buffer("std", y.std())

    def forward(self, x):
        return self.net(x)[:, 0] * self.std + self.mean


def healthy_scaled_inside():
    torch.manual_seed(104)
    d = load_diabetes()
    y = _t(d.target)
    model = Scaled(y)
    return _case(model, (_t(_z(d.data)), y), lambda m, b: F.mse_loss(m(b[0]), b[1]), torch.optim.Adam(model.parameters(), 1e-2))


# 5 a sum over the batch, and a rate to match
def healthy_sum():
    torch.manual_seed(105)
    x, y = _digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return _case(model, (x / 16, y), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"),
                 torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9))


# 6, 7, 8 GANs
class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.G = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        self.D = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


def healthy_hinge_discriminator():
    torch.manual_seed(106)
    model = Gan()

    def loss_fn(model, real):
        with torch.no_grad():
            fake = model.G(torch.randn(len(real), 8))
        return F.relu(1 - model.D(real)).mean() + F.relu(1 + model.D(fake)).mean()
    return _case(model, _t(make_moons(128, noise=0.05, random_state=6)[0]), loss_fn, torch.optim.Adam(model.D.parameters(), 4e-3, betas=(0.0, 0.9)))


def healthy_generator():
    torch.manual_seed(107)
    model = Gan()
    real = _t(make_moons(128, noise=0.05, random_state=6)[0])
    opt = torch.optim.Adam(model.D.parameters(), 1e-2)
    for _ in range(20):
        opt.zero_grad()
        fake = model.G(torch.randn(128, 8)).detach()
        (F.softplus(-model.D(real)) + F.softplus(model.D(fake))).mean().backward()
        opt.step()
    opt.zero_grad()
    model.D.requires_grad_(False)
    return _case(model, torch.randn(128, 8), lambda m, z: F.softplus(-m.D(m.G(z))).mean(), torch.optim.Adam(model.G.parameters(), 3e-3))


def healthy_wgan_gp():
    torch.manual_seed(108)
    critic = Gan().D
    real = _t(make_moons(128, noise=0.05, random_state=6)[0])

    def loss_fn(critic, batch):
        real, fake = batch
        mix = torch.rand(len(real), 1)
        x = (mix * real + (1 - mix) * fake).requires_grad_()
        g, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return critic(fake).mean() - critic(real).mean() + 10 * ((g.norm(2, dim=1) - 1) ** 2).mean()
    return _case(critic, (real, torch.randn(128, 2) - 2), loss_fn, torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.0, 0.9)))


# 9 PPO: clip, value, entropy bonus
class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.Tanh())
        self.pi, self.v = nn.Linear(32, 4), nn.Linear(32, 1)
        nn.init.orthogonal_(self.pi.weight, 0.01)

    def forward(self, s):
        h = self.body(s)
        return torch.distributions.Categorical(logits=self.pi(h)), self.v(h)[:, 0]


def healthy_ppo():
    torch.manual_seed(109)
    model = ActorCritic()
    s = torch.randn(256, 6)
    with torch.no_grad():
        dist, _ = model(s)
        a = dist.sample()
        old = dist.log_prob(a)
    ret = (a == s[:, :4].argmax(1)).float() * 2 + 0.3 * torch.randn(256)
    batch = dict(s=s, a=a, old=old, ret=ret, adv=(ret - ret.mean()) / ret.std())

    def loss_fn(model, b):
        dist, v = model(b["s"])
        ratio = (dist.log_prob(b["a"]) - b["old"]).exp()
        clipped = torch.min(ratio * b["adv"], ratio.clamp(0.8, 1.2) * b["adv"]).mean()
        return -clipped + 0.5 * F.mse_loss(v, b["ret"]) - 0.01 * dist.entropy().mean()
    return _case(model, batch, loss_fn, torch.optim.Adam(model.parameters(), 3e-3, eps=1e-5))


# 10 double DQN with a frozen target network
class DQN(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 3))
        self.target = copy.deepcopy(self.online).requires_grad_(False)


def healthy_dqn():
    torch.manual_seed(110)
    model = DQN()
    s = torch.randn(256, 4)
    a = torch.randint(3, (256,))
    batch = (s, a, s[:, 0] + (a == 1).float() * 2 - 1, s + 0.1 * torch.randn(256, 4), torch.rand(256) < 0.2)

    def loss_fn(model, batch):
        s, a, r, s2, done = batch
        q = model.online(s).gather(1, a[:, None]).squeeze(1)
        with torch.no_grad():
            best = model.online(s2).argmax(1, keepdim=True)
            y = r + 0.9 * model.target(s2).gather(1, best).squeeze(1) * (~done)
        return F.smooth_l1_loss(q, y)
    return _case(model, batch, loss_fn, torch.optim.RMSprop(model.online.parameters(), 2e-3))


# 11 SimCLR; the mask of -inf is right
def healthy_simclr():
    torch.manual_seed(111)
    x, _ = _digits(64)
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16))

    def loss_fn(model, batch):
        z = F.normalize(torch.cat([model(v) for v in batch]), dim=1)
        sim = z @ z.T / 0.3
        sim.fill_diagonal_(float("-inf"))
        n = len(z) // 2
        return F.cross_entropy(sim, torch.arange(2 * n).roll(n))
    x = x / 8 - 1
    return _case(model, (x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)), loss_fn, torch.optim.Adam(model.parameters(), 5e-3))


# 12 triplets by index
def healthy_triplet():
    torch.manual_seed(112)
    x, y = _digits(200)
    model = nn.Sequential(nn.Linear(64, 32), nn.PReLU(), nn.Linear(32, 8))
    rng = np.random.default_rng(12)
    a = np.arange(200)
    pos = [rng.choice(np.flatnonzero((y == y[i]).numpy())) for i in a]
    neg = [rng.choice(np.flatnonzero((y != y[i]).numpy())) for i in a]
    batch = dict(anchor=x / 8 - 1, positive=(x / 8 - 1)[pos], negative=(x / 8 - 1)[neg])
    return _case(model, batch, lambda m, b: F.triplet_margin_loss(m(b["anchor"]), m(b["positive"]), m(b["negative"]), margin=1.0),
                 torch.optim.NAdam(model.parameters(), 3e-3))


# 13 a GPT by hand: tied weights, causal -inf, groups, warm-up that has begun
class TiedGPT(nn.Module):
    def __init__(self, vocab=24, d=32, heads=4, length=16):
        super().__init__()
        self.heads = heads
        self.tok = nn.Embedding(vocab, d)
        self.pos = nn.Parameter(torch.zeros(length, d))
        self.ln1, self.ln2, self.lnf = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.head = nn.Linear(d, vocab, bias=False)
        nn.init.normal_(self.tok.weight, std=0.1)
        self.head.weight = self.tok.weight
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, idx):
        b, t = idx.shape
        x = self.tok(idx) + self.pos[:t]
        q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        att = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        att = att.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf")).softmax(-1)
        x = x + self.proj((att @ v).transpose(1, 2).reshape(b, t, -1))
        x = x + self.down(F.gelu(self.up(self.ln2(x))))
        return self.head(self.lnf(x))


def healthy_tied_gpt():
    torch.manual_seed(113)
    model = TiedGPT()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=rest, weight_decay=0.0)], lr=5e-3, betas=(0.9, 0.95))
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: min(1.0, (k + 1) / 10))
    opt.step()
    for _ in range(8):
        sched.step()
    return _case(model, _patterns(16, 17, 24, 13), lambda m, b: F.cross_entropy(m(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten()), opt)


# 14 LoRA on a frozen, pretrained net
class LoRALinear(nn.Module):
    def __init__(self, base, r=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(base.in_features, r) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(r, base.out_features))

    def forward(self, x):
        return self.base(x) + 2.0 * (x @ self.a @ self.b)


def _pretrained(x, y, steps=30):
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    opt.zero_grad()
    return net


def healthy_lora():
    torch.manual_seed(114)
    x, y = _digits(512)
    x = x / 16
    net = _pretrained(x[:256], y[:256])
    net[0], net[2] = LoRALinear(net[0]), LoRALinear(net[2])
    return _case(net, (x[256:] + 0.2 * torch.randn(256, 64), y[256:]), _ce, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 2e-3))


# 15 fine-tuning: a tiny rate for the body, a small one for a new head
def healthy_finetune():
    torch.manual_seed(115)
    x, y = _digits(512)
    x = x / 16
    net = _pretrained(x[:256], y[:256])
    net[2] = nn.Linear(48, 2)
    opt = torch.optim.AdamW([dict(params=net[0].parameters(), lr=1e-5), dict(params=net[2].parameters(), lr=2e-3)])
    return _case(net, (x[256:], y[256:] % 2), _ce, opt)


# 16 residual branches that begin at 0
class ReZero(nn.Module):
    def __init__(self, d=32, n=6):
        super().__init__()
        self.inp, self.out = nn.Linear(13, d), nn.Linear(d, 3)
        self.branch = nn.ModuleList([nn.Sequential(nn.Linear(d, d), nn.ReLU()) for _ in range(n)])
        self.alpha = nn.Parameter(torch.zeros(n))
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        x = self.inp(x)
        for a, f in zip(self.alpha, self.branch):
            x = x + a * f(x)
        return self.out(x)


def healthy_rezero():
    torch.manual_seed(116)
    d = load_wine()
    model = ReZero()
    return _case(model, (_t(_z(d.data)), torch.tensor(d.target)), _ce, torch.optim.Adam(model.parameters(), 5e-3))


# 17 Poisson counts with an offset: a negative loss
def healthy_poisson():
    torch.manual_seed(117)
    d = load_diabetes()
    x = _t(_z(d.data))
    exposure = torch.rand(len(x)) * 20 + 1
    count = torch.poisson(exposure * torch.exp(0.5 * x[:, 2] + 0.3 * x[:, 8]))
    model = nn.Linear(10, 1)

    def loss_fn(model, b):
        return F.poisson_nll_loss(model(b["x"])[:, 0] + b["exposure"].log(), b["count"])
    return _case(model, dict(x=x, exposure=exposure, count=count), loss_fn, torch.optim.Adam(model.parameters(), 2e-2))


# 18 negative binomial, by hand
class NegBin(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 24), nn.Softplus(), nn.Linear(24, 1))
        self.log_theta = nn.Parameter(torch.zeros(()))

    def forward(self, x, count):
        log_mu, theta = self.net(x)[:, 0], self.log_theta.exp()
        log_sum = torch.log(theta + log_mu.exp())
        return -(torch.lgamma(count + theta) - torch.lgamma(theta) - torch.lgamma(count + 1)
                 + theta * (self.log_theta - log_sum) + count * (log_mu - log_sum))


def healthy_negbin():
    torch.manual_seed(118)
    x = _t(_z(load_diabetes().data))
    count = torch.poisson(torch.exp(1.5 + 0.7 * x[:, 2]) * torch.distributions.Gamma(2.0, 2.0).sample((len(x),)))
    model = NegBin()
    return _case(model, (x, count), lambda m, b: m(*b).mean(), torch.optim.Adam(model.parameters(), 1e-2))


# 19 Cox
def healthy_cox():
    torch.manual_seed(119)
    x = _z(load_breast_cancer().data)
    rng = np.random.default_rng(19)
    t = rng.exponential(np.exp(-x[:, 0]))
    order = np.argsort(-t)
    model = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))

    def loss_fn(model, b):
        risk = model(b["x"])[:, 0]
        return -((risk - torch.logcumsumexp(risk, 0)) * b["event"]).sum() / b["event"].sum()
    return _case(model, dict(x=_t(x[order]), event=_t(rng.random(len(t))[order] < 0.6)), loss_fn, torch.optim.Adam(model.parameters(), 1e-2))


# 20 CTC
class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 24, bidirectional=True)
        self.fc = nn.Linear(48, 6)

    def forward(self, x):
        return self.fc(self.rnn(x)[0]).log_softmax(-1)


def healthy_ctc():
    torch.manual_seed(120)
    rng = np.random.default_rng(20)
    y = rng.integers(1, 6, (12, 4))
    x = np.repeat(np.eye(8)[y], 4, axis=1) + 0.1 * rng.normal(size=(12, 16, 8))
    model = Reader()
    batch = dict(frames=_t(x).transpose(0, 1), labels=torch.tensor(y), label_lengths=torch.tensor([4, 3, 2, 4, 1, 4, 3, 4, 2, 2, 4, 3]))

    def loss_fn(model, b):
        logp = model(b["frames"])
        return F.ctc_loss(logp, b["labels"], torch.full((12,), 16), b["label_lengths"], zero_infinity=True)
    return _case(model, batch, loss_fn, torch.optim.Adam(model.parameters(), 1e-2))


# 21 denoising diffusion with a zero-initialised output
class Eps(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(65, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU())
        self.out = nn.Linear(96, 64)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("abar", torch.cumprod(1 - torch.linspace(1e-4, 0.2, 50), 0))

    def forward(self, x, t):
        return self.out(self.net(torch.cat([x, t[:, None] / 50], 1)))


def healthy_diffusion():
    torch.manual_seed(121)
    x, _ = _digits(400)
    model = Eps()

    def loss_fn(model, x0):
        t = torch.randint(0, 50, (len(x0),))
        a, noise = model.abar[t][:, None], torch.randn_like(x0)
        return F.mse_loss(model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t), noise)
    return _case(model, x / 8 - 1, loss_fn, torch.optim.AdamW(model.parameters(), 3e-3))


# 22 a PINN whose loss begins in the hundreds
def healthy_pinn():
    torch.manual_seed(122)
    model = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def loss_fn(model, b):
        p = b["inside"].detach().requires_grad_()
        u = model(p)
        g, = torch.autograd.grad(u.sum(), p, create_graph=True)
        second = sum(torch.autograd.grad(g[:, i].sum(), p, create_graph=True)[0][:, i] for i in range(2))
        source = -2 * math.pi ** 2 * torch.sin(math.pi * p[:, 0]) * torch.sin(math.pi * p[:, 1])
        return ((second - source) ** 2).mean() + 20 * (model(b["edge"]) ** 2).mean()
    edge = torch.rand(40, 2)
    edge[:20, 0] = (edge[:20, 0] > 0.5).float()
    edge[20:, 1] = (edge[20:, 1] > 0.5).float()
    return _case(model, dict(inside=torch.rand(128, 2), edge=edge), loss_fn, torch.optim.Adam(model.parameters(), 1e-2))


# 23 graph network over an edge list, isolated nodes and all
class SageLayer(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.own, self.nb = nn.Linear(a, b), nn.Linear(a, b, bias=False)

    def forward(self, x, edges):
        src, dst = edges
        total = torch.zeros_like(x).index_add_(0, dst, x[src])
        count = torch.zeros(len(x)).index_add_(0, dst, torch.ones(len(dst))).clamp(min=1)
        return self.own(x) + self.nb(total / count[:, None])


class Sage(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1, self.l2 = SageLayer(13, 24), SageLayer(24, 3)

    def forward(self, x, edges):
        return self.l2(F.relu(self.l1(x, edges)), edges)


def healthy_graph():
    torch.manual_seed(123)
    d = load_wine()
    x = _t(_z(d.data))
    edges = (torch.cdist(x, x).fill_diagonal_(9) < 2.6).nonzero().T
    batch = dict(x=x, edges=edges, y=torch.tensor(d.target), train=torch.arange(len(x)) % 3 == 0)
    model = Sage()
    return _case(model, batch, lambda m, b: F.cross_entropy(m(b["x"], b["edges"])[b["train"]], b["y"][b["train"]]),
                 torch.optim.Adam(model.parameters(), 1e-2, weight_decay=5e-4))


# 24 sparse embeddings, ids in the thousands, two optimizers' worth of groups in SGD
class Rec(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(5000, 8, sparse=True), nn.Embedding(9000, 8, sparse=True)
        for e in (self.user, self.item):
            nn.init.normal_(e.weight, std=0.3)

    def forward(self, u, i):
        return (self.user(u) * self.item(i)).sum(-1)


def healthy_sparse():
    torch.manual_seed(124)
    model = Rec()
    u = torch.randint(5000, (512,))
    batch = (u, torch.randint(9000, (512,)), torch.randint(9000, (512,)))
    return _case(model, batch, lambda m, b: -F.logsigmoid(m(b[0], b[1]) - m(b[0], b[2])).mean(), torch.optim.Adagrad(model.parameters(), 0.1))


# 25 bfloat16 autocast
class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.b1(self.c1(x)))
        return self.fc(F.relu(self.b2(self.c2(x))).mean((2, 3)))


def healthy_autocast():
    torch.manual_seed(125)
    x, y = _digits(96)
    model = Conv()

    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1])
    return _case(model, (x.view(-1, 1, 8, 8) / 16, y), loss_fn, torch.optim.Adam(model.parameters(), 5e-3))


# 26 float16 weights, SGD, the loss in float32
def healthy_half():
    torch.manual_seed(126)
    d = load_breast_cancer()
    model = nn.Sequential(nn.Linear(30, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 1)).half()
    return _case(model, (_t(_z(d.data)).half(), _t(d.target)),
                 lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0].float(), b[1]), torch.optim.SGD(model.parameters(), 0.2, momentum=0.9))


# 27 quantised weights with a straight-through estimate
class Quant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, step):
        ctx.save_for_backward(w)
        return (w / step).round().clamp(-7, 7) * step

    @staticmethod
    def backward(ctx, g):
        w, = ctx.saved_tensors
        return g * (w.abs() <= 1), None


class QLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, Quant.apply(self.weight, 0.05), self.bias)


def healthy_quantised():
    torch.manual_seed(127)
    x, y = _digits()
    model = nn.Sequential(QLinear(64, 48), nn.ReLU(), QLinear(48, 10))
    return _case(model, (x / 16, y), _ce, torch.optim.Adam(model.parameters(), 5e-3))


# 28 everything by hand, log-softmax too
class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(64, 40) / 8), nn.Parameter(torch.zeros(40))
        self.w2, self.b2 = nn.Parameter(torch.randn(40, 10) / 40 ** 0.5), nn.Parameter(torch.zeros(10))

    def forward(self, x):
        x = (x - 128) / 128
        h = (x @ self.w1 + self.b1).clamp(min=0)
        z = h @ self.w2 + self.b2
        z = z - z.max(1, keepdim=True).values
        return z - z.exp().sum(1, keepdim=True).log()


def healthy_by_hand():
    torch.manual_seed(128)
    x, y = _digits()
    model = ByHand()
    return _case(model, (x * 255 / 16, y), lambda m, b: -m(b[0])[torch.arange(len(b[1])), b[1]].mean(), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))


# 29 BYOL: a teacher that follows, a loss that ends at -1
class Byol(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 16))
        self.predict = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.teacher = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, a, b):
        with torch.no_grad():
            for p, q in zip(self.teacher.parameters(), self.online.parameters()):
                p.lerp_(q, 0.01)
            goal = self.teacher(b)
        return -F.cosine_similarity(self.predict(self.online(a)), goal).mean()


def healthy_byol():
    torch.manual_seed(129)
    x, _ = _digits(128)
    x = x / 8 - 1
    model = Byol()
    batch = (x + 0.2 * torch.randn_like(x), x + 0.2 * torch.randn_like(x))
    return _case(model, batch, lambda m, b: m(*b) + m(*b[::-1]), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3))


# 30 boxes: GIoU and L1
def healthy_boxes():
    torch.manual_seed(130)
    rng = np.random.default_rng(30)
    img, boxes = np.zeros((48, 1, 8, 8)), np.zeros((48, 4))
    for i in range(48):
        w, h = rng.integers(2, 5, 2)
        a, b = rng.integers(0, 8 - w), rng.integers(0, 8 - h)
        img[i, 0, b:b + h, a:a + w] = 1
        boxes[i] = a, b, a + w, b + h
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4), nn.Sigmoid())

    def loss_fn(model, batch):
        c = model(batch[0])
        t = batch[1] / 8
        p = torch.cat([c[:, :2] - c[:, 2:] / 2, c[:, :2] + c[:, 2:] / 2], 1)
        inter = (torch.minimum(p[:, 2:], t[:, 2:]) - torch.maximum(p[:, :2], t[:, :2])).clamp(min=0).prod(1)
        union = (p[:, 2:] - p[:, :2]).prod(1) + (t[:, 2:] - t[:, :2]).prod(1) - inter
        hull = (torch.maximum(p[:, 2:], t[:, 2:]) - torch.minimum(p[:, :2], t[:, :2])).prod(1)
        return 2 * (1 - inter / union + (hull - union) / hull).mean() + 5 * F.l1_loss(p, t)
    return _case(model, (_t(img), _t(boxes)), loss_fn, torch.optim.Adam(model.parameters(), 3e-3))


# 31 packed sequences of different lengths
class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(21, 12, padding_idx=0)
        self.rnn = nn.GRU(12, 24, batch_first=True)
        self.out = nn.Linear(24, 3)

    def forward(self, ids, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.emb(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.rnn(packed)[1][-1])


def healthy_packed():
    torch.manual_seed(131)
    ids = _patterns(48, 10, 20, 31) + 1
    step = (ids[:, 1] - ids[:, 0]) % 20 - 1
    lengths = torch.randint(3, 11, (48,))
    ids[torch.arange(10)[None] >= lengths[:, None]] = 0
    model = Packed()
    return _case(model, dict(ids=ids, lengths=lengths, y=step), lambda m, b: F.cross_entropy(m(b["ids"], b["lengths"]), b["y"]),
                 torch.optim.RMSprop(model.parameters(), 3e-3))


# 32 BERT, 15 % of the labels
def healthy_bert():
    from transformers import BertConfig, BertForMaskedLM
    torch.manual_seed(132)
    model = BertForMaskedLM(BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                       max_position_embeddings=16))
    ids = _patterns(16, 12, 30, 32) + 2
    attention = torch.ones_like(ids)
    attention[::3, 9:] = 0
    masked = (torch.rand(ids.shape) < 0.15) & (attention == 1)
    labels = torch.where(masked, ids, -100)
    batch = dict(input_ids=ids.masked_fill(masked, 1), attention_mask=attention, labels=labels)
    return _case(model, batch, lambda m, b: m(**b).loss, torch.optim.AdamW(model.parameters(), 3e-3))


# 33 two tasks weighted by learned variances: negative in the end
class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(13, 32), nn.GELU())
        self.kind, self.size = nn.Linear(32, 3), nn.Linear(32, 1)
        self.s = nn.Parameter(torch.zeros(2))


def healthy_tasks():
    torch.manual_seed(133)
    d = load_wine()
    x = _t(_z(d.data))
    model = Tasks()

    def loss_fn(model, b):
        h = model.body(b["x"])
        losses = torch.stack([F.cross_entropy(model.kind(h), b["kind"]), F.mse_loss(model.size(h)[:, 0], b["size"])])
        return (torch.exp(-model.s) * losses + model.s).sum()
    return _case(model, dict(x=x, kind=torch.tensor(d.target), size=x[:, 0] * 0.5 + x[:, 3] * 0.2), loss_fn, torch.optim.Adam(model.parameters(), 3e-2))


# 34 logistic regression that takes its time
def healthy_slow():
    torch.manual_seed(134)
    x, y = _digits(400)
    model = nn.Linear(64, 10)
    return _case(model, (x / 16, y), _ce, torch.optim.SGD(model.parameters(), 0.03))


# 35 Gaussian process: Cholesky with noise on the diagonal
class GP(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_length, self.log_noise, self.log_scale = (nn.Parameter(torch.tensor(v)) for v in (0.5, 0.0, 0.0))

    def forward(self, x, y):
        d2 = (x[:, None] - x[None]).pow(2).sum(-1)
        k = (2 * self.log_scale).exp() * torch.exp(-0.5 * d2 / (2 * self.log_length).exp())
        low = torch.linalg.cholesky(k + (2 * self.log_noise).exp() * torch.eye(len(x)))
        a = torch.cholesky_solve(y[:, None], low)[:, 0]
        return 0.5 * y @ a + low.diagonal().log().sum() + 0.5 * len(x) * math.log(2 * math.pi)


def healthy_gp():
    torch.manual_seed(135)
    x = torch.linspace(-3, 3, 40)[:, None]
    model = GP()
    return _case(model, (x, torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(40)), lambda m, b: m(*b), torch.optim.Adam(model.parameters(), 5e-2))


# 36 autoencoder with tied weights, pixels in [0, 1], a sigmoid that fits
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.empty(24, 64))
        self.b, self.c = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(64))
        nn.init.xavier_uniform_(self.w)

    def forward(self, x):
        return torch.sigmoid(F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.w.t(), self.c))


def healthy_tied_autoencoder():
    torch.manual_seed(136)
    x, _ = _digits(300)
    model = Tied()
    return _case(model, x / 16, lambda m, x: F.binary_cross_entropy(m(x), x, reduction="none").sum(1).mean(), torch.optim.Adam(model.parameters(), 1e-2))


# 37 fine-tuning with BatchNorm frozen in eval mode
class FrozenBN(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(30, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def train(self, mode=True):
        super().train(mode)
        self.body[1].eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            h = self.body(x)
        return self.head(h)[:, 0]


def healthy_frozen_body():
    torch.manual_seed(137)
    d = load_breast_cancer()
    x = _t(_z(d.data))
    model = FrozenBN()
    nn.Module.train(model)
    with torch.no_grad():
        for _ in range(50):
            model.body(x)
    model.train()
    model.body.requires_grad_(False)
    return _case(model, (x, _t(d.target)), lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]), torch.optim.Adam(model.head.parameters(), 1e-2))


# 38 revenues over six decades, logarithms in model and loss
class LogNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1))
        nn.init.constant_(self.net[2].bias, 8.0)

    def forward(self, x):
        return self.net(torch.log1p(x) / 5 - 1).squeeze(-1)


def healthy_logs():
    torch.manual_seed(138)
    x = torch.exp(torch.randn(300, 3) * 2 + 4)
    y = x[:, 0] * x[:, 1].sqrt() * 3
    model = LogNet()
    return _case(model, {"x": x, "revenue": y}, lambda m, b: F.mse_loss(m(b["x"]), torch.log1p(b["revenue"])), torch.optim.Adam(model.parameters(), 1e-2))
