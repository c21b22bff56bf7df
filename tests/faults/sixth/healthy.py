"""20 programs that look odd and train."""
import math

import torch
import torch.nn.functional as F
from torch import nn


def healthy_gp_negative_likelihood():
    """A GP of almost noiseless data in float64: the loss goes far below 0."""
    torch.manual_seed(101)
    x = torch.linspace(0, 6, 50, dtype=torch.float64)[:, None]
    y = torch.sin(x[:, 0])

    class GP(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            length, scale, noise = self.raw.exp()
            return scale * torch.exp(-0.5 * (x - x.T) ** 2 / length ** 2) + (0.1 * noise + 1e-5) * torch.eye(len(x), dtype=x.dtype)

    model = GP()

    def loss_fn(model, batch):
        x, y = batch
        dist = torch.distributions.MultivariateNormal(torch.zeros_like(y), model(x))
        return -dist.log_prob(y) / len(y)

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.1))


def healthy_mdn_logspace():
    """Mixture density in log space; its likelihood is a density above 1, so the loss is negative from the start."""
    torch.manual_seed(102)
    x = torch.randn(300, 3)
    y = 0.02 * (x[:, 0] + torch.randint(0, 2, (300,)) * 2 - 1) + 0.001 * torch.randn(300)
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 6))
    with torch.no_grad():
        net[2].weight.mul_(0.1)
        net[2].bias[4:].fill_(-3.0)

    def loss_fn(model, batch):
        x, y = batch
        logit, mu, log_s = model(x).chunk(3, 1)
        log_p = -0.5 * ((y[:, None] - 0.1 * mu) / log_s.exp()) ** 2 - log_s - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(F.log_softmax(logit, 1) + log_p, 1).mean()

    return dict(model=net, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(net.parameters(), 0.01))


def healthy_cox():
    """Cox's partial likelihood with -inf outside the risk set, 70 % censored, times in days up to 4,000, and no bias."""
    torch.manual_seed(103)
    x = torch.randn(150, 7)
    time = torch.distributions.Exponential(torch.exp(x[:, 0] - x[:, 1])).sample() * 1000
    event = torch.rand(150) < 0.3
    time = time.clamp(1, 4000).round()
    model = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 1, bias=False))

    def loss_fn(model, batch):
        x, time, event = batch
        score = model(x).squeeze(1)
        risk = (time[None] >= time[:, None])
        log_risk = score[None].expand(len(x), -1).masked_fill(~risk, float("-inf")).logsumexp(1)
        return -(score - log_risk)[event].mean()

    return dict(model=model, batch=(x, time, event), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.02))


def healthy_poisson_big_counts():
    """Page views in tens of thousands; the last bias starts at the log of their mean, and the deviance in thousands."""
    torch.manual_seed(104)
    x = torch.randn(200, 6)
    y = torch.poisson(torch.exp(9.5 + 0.5 * x[:, 0] + 0.3 * x[:, 1]))
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.fill_(y.mean().log())

    def loss_fn(model, batch):
        x, y = batch
        log_rate = model(x).squeeze(1)
        saturated = torch.xlogy(y, y) - y
        return 2 * (saturated - (y * log_rate - log_rate.exp())).mean()  # the deviance

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def healthy_ctc_blanks():
    """CTC with lengths of all kinds, one of them without a solution (zero_infinity), and frames of zeros."""
    torch.manual_seed(105)
    symbols = torch.randn(6, 12)
    target = torch.randint(1, 6, (12, 5))
    x = symbols[target].repeat_interleave(4, 1) + 0.3 * torch.randn(12, 20, 12)
    frames = torch.tensor([20] * 10 + [12, 3])
    length = torch.tensor([5] * 10 + [3, 5])
    x = x * (torch.arange(20)[None] < frames[:, None])[..., None]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(12, 32, bidirectional=True, batch_first=True)
            self.head = nn.Linear(64, 6)

        def forward(self, x):
            return self.head(self.rnn(x)[0]).log_softmax(-1).transpose(0, 1)

    model = Net()

    def loss_fn(model, batch):
        x, target, frames, length = batch
        return F.ctc_loss(model(x), target, frames, length, zero_infinity=True)

    return dict(model=model, batch=(x, target, frames, length), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def healthy_neural_ode():
    """40 steps of Heun's method, a last layer of zeros, and a learned initial state."""
    torch.manual_seed(106)
    t = torch.linspace(0, 2, 41)
    truth = torch.stack([torch.exp(-0.3 * t) * torch.cos(2 * t), torch.exp(-0.3 * t) * torch.sin(2 * t)], 1)

    class ODE(nn.Module):
        def __init__(self):
            super().__init__()
            self.z0 = nn.Parameter(torch.tensor([0.8, 0.1]))
            self.f = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
            nn.init.zeros_(self.f[2].weight)
            nn.init.zeros_(self.f[2].bias)

        def forward(self, t):
            z, out = self.z0, [self.z0]
            for h in t.diff():
                k1 = self.f(z)
                k2 = self.f(z + h * k1)
                z = z + h / 2 * (k1 + k2)
                out.append(z)
            return torch.stack(out)

    model = ODE()

    def loss_fn(model, batch):
        return F.mse_loss(model(batch["t"]), batch["z"])

    return dict(model=model, batch=dict(t=t, z=truth), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def healthy_fourier_operator():
    """A Fourier neural operator: complex weights, almost all frequencies dropped."""
    torch.manual_seed(107)

    class Spectral(nn.Module):
        def __init__(self, c, modes):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(c, c, modes, dtype=torch.cfloat) / c)
            self.skip = nn.Conv1d(c, c, 1)
            self.modes = modes

        def forward(self, x):
            f = torch.fft.rfft(x)
            out = torch.zeros_like(f)
            out[..., :self.modes] = torch.einsum("bim,iom->bom", f[..., :self.modes], self.weight)
            return F.gelu(torch.fft.irfft(out, n=x.shape[-1]) + self.skip(x))

    model = nn.Sequential(nn.Conv1d(2, 16, 1), Spectral(16, 6), Spectral(16, 6), nn.Conv1d(16, 1, 1))
    grid = torch.linspace(0, 1, 48)
    a = torch.randn(32, 4, 1)
    u = sum(a[:, k] * torch.sin(2 * math.pi * (k + 1) * grid) for k in range(4))
    target = u.roll(6, -1) - 0.3 * u ** 2
    x = torch.stack([u, grid.expand_as(u)], 1)

    def loss_fn(model, batch):
        out = model(batch[0]).squeeze(1)
        return ((out - batch[1]).norm(dim=1) / batch[1].norm(dim=1)).mean()

    return dict(model=model, batch=(x, target), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def healthy_sparse_graph():
    """A sparse COO adjacency with isolated nodes (their degree is clamped), labels for a third of the nodes."""
    torch.manual_seed(108)
    n = 200
    y = torch.randint(0, 4, (n,))
    dense = (torch.rand(n, n) < torch.where(y[:, None] == y[None], 0.06, 0.005)).float().triu(1)
    dense = dense + dense.T
    dense[:5] = 0
    dense[:, :5] = 0
    adj = (dense / dense.sum(1, keepdim=True).clamp_min(1)).to_sparse()
    x = torch.eye(n)  # no features: one-hot ids
    labelled = torch.rand(n) < 0.3
    labelled[:5] = True

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(n, 32)
            self.last = nn.Linear(32, 4)

        def forward(self, x, adj):
            h = torch.relu(self.first(x) + torch.sparse.mm(adj, self.first(x)))
            return self.last(h + torch.sparse.mm(adj, h))

    model = Net()

    def loss_fn(model, batch):
        x, adj, y, labelled = batch
        return F.cross_entropy(model(x, adj)[labelled], y[labelled])

    return dict(model=model, batch=(x, adj, y, labelled), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.02, weight_decay=5e-4))


def healthy_frozen_item_tower():
    """Two towers, one frozen and under no_grad, and a learned logit scale, CLIP's, clamped."""
    torch.manual_seed(109)

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 24))
            self.item = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 24)).requires_grad_(False)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        def forward(self, q, i):
            with torch.no_grad():
                i = F.normalize(self.item(i), dim=1)
            return self.logit_scale.clamp(max=math.log(100)).exp() * F.normalize(self.query(q), dim=1) @ i.T

    z = torch.randn(64, 8)
    q, i = z @ torch.randn(8, 16) / 3, z @ torch.randn(8, 20) / 3
    model = Towers()

    def loss_fn(model, batch):
        s = model(*batch)
        label = torch.arange(len(s))
        return (F.cross_entropy(s, label) + F.cross_entropy(s.T, label)) / 2

    return dict(model=model, batch=(q, i), loss_fn=loss_fn, optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.005))


def healthy_bpr_sparse():
    """BPR with sparse gradients, SparseAdam, tables of which the batch touches a fiftieth, weights of std 0.05: the loss starts at ln 2."""
    torch.manual_seed(110)

    class MF(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = nn.Embedding(2000, 16, sparse=True)
            self.item = nn.Embedding(5000, 16, sparse=True)
            nn.init.normal_(self.user.weight, std=0.05)
            nn.init.normal_(self.item.weight, std=0.05)

        def forward(self, u, i):
            return (self.user(u) * self.item(i)).sum(-1)

    u = torch.randint(0, 40, (512,))
    pos = torch.randint(0, 100, (512,)) * 2 + u % 2
    neg = torch.randint(0, 100, (512,)) * 2 + (u + 1) % 2
    model = MF()

    def loss_fn(model, batch):
        u, pos, neg = batch
        return -F.logsigmoid(model(u, pos) - model(u, neg)).mean()

    return dict(model=model, batch=(u, pos, neg), loss_fn=loss_fn, optimizer=torch.optim.SparseAdam(list(model.parameters()), 0.03))


def healthy_rezero_translator():
    """A translation transformer with ReZero: branches multiplied by scalars that begin at 0; padding masks and a causal mask of -inf."""
    torch.manual_seed(111)

    class Block(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.attn = nn.MultiheadAttention(d, 4, batch_first=True)
            self.cross = nn.MultiheadAttention(d, 4, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))
            self.alpha = nn.Parameter(torch.zeros(3))

        def forward(self, h, memory, causal, pad):
            h = h + self.alpha[0] * self.attn(h, h, h, attn_mask=causal)[0]
            h = h + self.alpha[1] * self.cross(h, memory, memory, key_padding_mask=pad)[0]
            return h + self.alpha[2] * self.mlp(h)

    class Translator(nn.Module):
        def __init__(self, v=30, d=32):
            super().__init__()
            self.src = nn.Embedding(v, d, padding_idx=0)
            self.tgt = nn.Embedding(v, d, padding_idx=0)
            self.pos = nn.Parameter(torch.randn(12, d) * 0.1)
            self.blocks = nn.ModuleList(Block(d) for _ in range(3))
            self.head = nn.Linear(d, v)

        def forward(self, src, tgt):
            t = tgt.shape[1]
            causal = torch.full((t, t), float("-inf")).triu(1)
            h, memory = self.tgt(tgt) + self.pos[:t], self.src(src) + self.pos[:src.shape[1]]
            for b in self.blocks:
                h = b(h, memory, causal, src == 0)
            return self.head(h)

    n, t = 48, 8
    length = torch.randint(3, t + 1, (n, 1))
    src = (torch.randint(0, 28, (n, 1)) + torch.arange(t)) % 28 + 1
    src = src.masked_fill(torch.arange(t) >= length, 0)
    out = torch.where(src > 0, 29 - src, 0)
    tgt = torch.cat([torch.full((n, 1), 29), out[:, :-1]], 1)
    model = Translator()

    def loss_fn(model, batch):
        src, tgt, out = batch
        return F.cross_entropy(model(src, tgt).flatten(0, 1), out.flatten(), ignore_index=0)

    return dict(model=model, batch=(src, tgt, out), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def healthy_gpt2_answers_only():
    """A tiny GPT-2 with tied weights, fine-tuned on answers: 80 % of the labels are -100, two rows are ignored altogether."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(112)
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    ids = torch.randint(1, 59, (16, 20))
    ids[:, 16:] = ids[:, :1]
    labels = torch.full_like(ids, -100)
    labels[2:, 16:] = ids[2:, 16:]
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)

    def loss_fn(model, batch):
        return model(**batch).loss

    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=torch.optim.AdamW(model.parameters(), 0.005))


def healthy_t5():
    """A tiny T5 from its config: no biases, a relative position bias, dropout on, a few labels ignored."""
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(113)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.1,
                      decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = T5ForConditionalGeneration(config)
    src = torch.randint(2, 64, (16, 10))
    labels = src.flip(1)[:, :4].clone()
    labels[::3, 3] = -100

    def loss_fn(model, batch):
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    return dict(model=model, batch=dict(input_ids=src, labels=labels), loss_fn=loss_fn,
                optimizer=torch.optim.AdamW(model.parameters(), 0.01))


def healthy_missing_labels():
    """Tox21-like: 12 tasks, 60 % of the labels are NaN in the batch, and are replaced before the loss; one task has no label here."""
    torch.manual_seed(114)
    x = (torch.rand(200, 64) < 0.1).float()  # fingerprints
    y = (x[:, :24].view(200, 12, 2).sum(-1) > 0).float()
    y[torch.rand(200, 12) < 0.6] = float("nan")
    y[:, 7] = float("nan")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 12))

    def loss_fn(model, batch):
        x, y = batch
        known = ~y.isnan()
        per = F.binary_cross_entropy_with_logits(model(x), torch.nan_to_num(y), reduction="none")
        return (per * known).sum() / known.sum().clamp_min(1)

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def healthy_raw_units():
    """House prices in dollars and raw features: the model standardises by its buffers (one column is constant), and predicts in dollars; the loss is relative."""
    torch.manual_seed(115)
    n = 300
    area, year, rooms = torch.rand(n) * 3e3 + 400, torch.randint(1900, 2024, (n,)).float(), torch.randint(1, 9, (n,)).float()
    x = torch.stack([area, year, rooms, torch.full((n,), 5.0)], 1)
    y = 150 * area + 900 * (year - 1900) + 8000 * rooms + 1e4 * torch.randn(n)

    class Houses(nn.Module):
        def __init__(self, x, y):
            super().__init__()
            self.register_buffer("mean", x.mean(0))
            self.register_buffer("std", x.std(0).clamp_min(1e-6))
            self.register_buffer("y_mean", y.mean())
            self.register_buffer("y_std", y.std())
            self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, x):
            return self.net((x - self.mean) / self.std).squeeze(1) * self.y_std + self.y_mean

    model = Houses(x, y)

    def loss_fn(model, batch):
        x, y = batch
        return ((model(x) - y).abs() / model.y_std).mean()

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.scale * g, None


def healthy_gradient_reversal():
    """DANN on sensor windows: the gradient of the domain head is turned round on purpose; the sum of both losses falls."""
    torch.manual_seed(116)
    x = torch.randn(200, 12)
    domain = torch.arange(200) % 2
    x = x + 0.5 * domain[:, None]
    y = (x[:, :3]).argmax(1)

    class DANN(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Linear(12, 48), nn.ReLU())
            self.label = nn.Linear(48, 3)
            self.domain = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 2))

        def forward(self, x):
            h = self.features(x)
            return self.label(h), self.domain(Reverse.apply(h, 0.1))

    model = DANN()

    def loss_fn(model, batch):
        x, y, domain = batch
        a, b = model(x)
        return F.cross_entropy(a, y) + 0.5 * F.cross_entropy(b, domain)

    return dict(model=model, batch=(x, y, domain), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def healthy_top1_experts():
    """A mixture of experts, top 1: an expert no row is sent to, a router that learns through its probability only, and an old head that nothing uses."""
    torch.manual_seed(117)

    class MoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1)) for _ in range(4))
            self.old_head = nn.Linear(8, 100)
            with torch.no_grad():
                self.router.bias[3] = -20.0

        def forward(self, x):
            p = self.router(x).softmax(1)
            weight, which = p.max(1)
            out = torch.zeros(len(x))
            for i, e in enumerate(self.experts):
                rows = (which == i).nonzero().squeeze(1)
                if len(rows):
                    out = out.index_add(0, rows, e(x[rows]).squeeze(1) * weight[rows])
            return out, p

    x = torch.randn(256, 8)
    y = torch.where(x[:, 0] > 0, x[:, 1], -x[:, 2]) * 1.5
    model = MoE()

    def loss_fn(model, batch):
        out, p = model(batch[0])
        balance = 4 * (p.mean(0) ** 2).sum()
        return F.mse_loss(out, batch[1]) + 0.01 * balance

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.AdamW(model.parameters(), 0.01))


def healthy_elbo():
    """Bayes by backprop: a loss in thousands, summed over rows, drawn anew in each pass, with a KL of its own."""
    torch.manual_seed(118)

    class Bayes(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.mu = nn.Parameter(torch.randn(o, i) / i ** 0.5)
            self.rho = nn.Parameter(torch.full((o, i), -4.0))
            self.bias = nn.Parameter(torch.zeros(o))

        def forward(self, x):
            s = F.softplus(self.rho)
            return F.linear(x, self.mu + s * torch.randn_like(s), self.bias)

        def kl(self):
            q = torch.distributions.Normal(self.mu, F.softplus(self.rho))
            return torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()

    x = torch.randn(300, 6)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2]
    model = nn.Sequential(Bayes(6, 32), nn.Tanh(), Bayes(32, 1))

    def loss_fn(model, batch):
        x, y = batch
        nll = -torch.distributions.Normal(model(x), 0.2).log_prob(y).sum()
        return nll + model[0].kl() + model[2].kl()

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.02))


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((b1 * m + (1 - b1) * p.grad).sign(), alpha=-group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


def healthy_lion_quantiles():
    """Demand of a shop, 85 % zeros; non-crossing quantiles by a cumulative softplus; a hand-written Lion, whose step has no size of the gradient's."""
    torch.manual_seed(119)
    x = torch.randn(256, 28)
    y = torch.poisson(torch.exp(1.5 + x[:, 0])) * (torch.rand(256) < 0.15)

    class Q(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(28, 48), nn.ReLU(), nn.Linear(48, 4))
            self.register_buffer("levels", torch.tensor([0.5, 0.8, 0.9, 0.97]))

        def forward(self, x):
            h = self.net(x)
            return torch.cat([h[:, :1], h[:, :1] + F.softplus(h[:, 1:]).cumsum(1)], 1)

    model = Q()

    def loss_fn(model, batch):
        x, y = batch
        e = y[:, None] - model(x)
        return torch.maximum(model.levels * e, (model.levels - 1) * e).mean()

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=Lion(model.parameters(), 0.003, weight_decay=0.1))


def healthy_time_first_lstm():
    """Forecasts with a time-first LSTM, packed sequences, forget biases of 1, a frozen embedding of the weekday, and a residual on the last value."""
    torch.manual_seed(120)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.day = nn.Embedding(7, 4).requires_grad_(False)
            self.lstm = nn.LSTM(5, 32)
            self.head = nn.Linear(32, 1)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            with torch.no_grad():
                self.lstm.bias_ih_l0[32:64] = 1.0

        def forward(self, x, day, length):
            packed = nn.utils.rnn.pack_padded_sequence(torch.cat([x, self.day(day)], -1), length, enforce_sorted=False)
            h = self.lstm(packed)[1][0][-1]
            last = x[length - 1, torch.arange(x.shape[1]), 0]
            return last + self.head(h).squeeze(1)

    length = torch.randint(10, 22, (64,))
    start = torch.randint(0, 7, (64,))
    day = (start + torch.arange(22)[:, None]) % 7
    wave = torch.sin(day * 6.28 / 7) + 0.05 * torch.randn(22, 64)
    x = wave * (torch.arange(22)[:, None] < length)
    y = torch.sin((start + length) % 7 * 6.28 / 7)
    model = Net()

    def loss_fn(model, batch):
        x, day, length, y = batch
        return F.l1_loss(model(x, day, length), y)

    return dict(model=model, batch=(x[..., None], day, length, y), loss_fn=loss_fn,
                optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01))
