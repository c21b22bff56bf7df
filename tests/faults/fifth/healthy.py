"""Models that are right and train, many of them odd-looking."""
import copy
import math
import torch
import torch.nn as nn
import torch.nn.functional as F


def supervised(criterion):
    def loss_fn(model, batch):
        return criterion(model(batch[0]), batch[1])
    return loss_fn


def pack(model, batch, loss_fn, optimizer):
    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=optimizer)


def adam(model, lr=0.01):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


def healthy_gaussian_nll_below_zero():
    torch.manual_seed(0)
    x = torch.randn(96, 4)
    y = 0.05 * torch.sin(x[:, :1])
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))

    def loss_fn(model, batch):
        mean, log_var = model(batch[0]).chunk(2, 1)
        return (0.5 * log_var + 0.5 * (batch[1] - mean).pow(2) * torch.exp(-log_var)).mean()
    return pack(model, (x, y), loss_fn, adam(model))


def healthy_cosine_similarity_negative():
    """SimSiam: minus a cosine similarity, with a stop-gradient."""
    torch.manual_seed(1)
    model = nn.ModuleDict(dict(enc=nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)),
                               pred=nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))))
    z = torch.randn(64, 10)
    a, b = z + 0.1 * torch.randn(64, 10), z + 0.1 * torch.randn(64, 10)

    def loss_fn(model, batch):
        za, zb = model["enc"](batch[0]), model["enc"](batch[1])
        pa, pb = model["pred"](za), model["pred"](zb)
        return -(F.cosine_similarity(pa, zb.detach()).mean() + F.cosine_similarity(pb, za.detach()).mean()) / 2
    return pack(model, (a, b), loss_fn, torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9))


def healthy_house_prices_with_own_scaler():
    """Prices of 3e5: the model's last step scales its output, and the loss is relative."""
    torch.manual_seed(2)
    area = torch.rand(80, 3) * 200
    price = 2e5 + 1e3 * area[:, :1] + 5e2 * area[:, 1:2]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("m", area.mean(0))
            self.register_buffer("s", area.std(0))
            self.register_buffer("ym", price.mean())
            self.register_buffer("ys", price.std())
            self.net = nn.Sequential(nn.Linear(3, 24), nn.ReLU(), nn.Linear(24, 1))

        def forward(self, x):
            return self.net((x - self.m) / self.s) * self.ys + self.ym
    model = Net()
    return pack(model, (area, price), lambda m, b: F.mse_loss(m(b[0]), b[1]) / m.ys ** 2, adam(model))


def healthy_batchnorm_before_raw_table():
    torch.manual_seed(3)
    x = torch.randn(100, 5) * torch.tensor([1.0, 100.0, 1e4, 0.01, 5.0]) + torch.tensor([0.0, 500.0, 1e5, 0.0, -3.0])
    y = (x[:, 1] > 500).long()
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 2))
    return pack(model, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr=0.2))


def healthy_frozen_backbone_head_only():
    torch.manual_seed(4)
    backbone = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()).requires_grad_(False)
    model = nn.Sequential(backbone, nn.Linear(128, 4))
    y = torch.arange(48) % 4
    x = torch.randn(4, 1, 8, 8)[y] + 0.3 * torch.randn(48, 1, 8, 8)
    return pack(model, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(model[1].parameters(), lr=0.01))


def healthy_byol_ema_teacher():
    torch.manual_seed(5)

    class Byol(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
            self.pred = nn.Linear(8, 8)

        def forward(self, a, b):
            if self.training:
                with torch.no_grad():
                    for t, s in zip(self.teacher.parameters(), self.student.parameters()):
                        t.lerp_(s, 0.01)
            with torch.no_grad():
                target = F.normalize(self.teacher(b), dim=1)
            return 2 - 2 * (F.normalize(self.pred(self.student(a)), dim=1) * target).sum(1)
    model = Byol()
    z = torch.randn(64, 10)
    return pack(model, (z + 0.1 * torch.randn(64, 10), z), lambda m, b: m(*b).mean(), adam(model, 3e-3))


def healthy_gan_generator_step():
    """The discriminator is in the model and not in this optimizer."""
    torch.manual_seed(6)
    model = nn.ModuleDict(dict(G=nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)),
                               D=nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))))
    z = torch.randn(64, 4)
    return pack(model, (z,), lambda m, b: F.softplus(-m["D"](m["G"](b[0]))).mean(),
                torch.optim.Adam(model["G"].parameters(), lr=5e-3, betas=(0.5, 0.999)))


def healthy_wgan_critic_step():
    """A critic's loss is a difference: negative, and falling without an end in sight; fake.detach() is right here."""
    torch.manual_seed(7)
    sn = nn.utils.parametrizations.spectral_norm
    model = nn.ModuleDict(dict(G=nn.Linear(4, 2), D=nn.Sequential(sn(nn.Linear(2, 32)), nn.LeakyReLU(0.2), sn(nn.Linear(32, 1)))))
    real = torch.randn(64, 2) * 0.3 + 2
    z = torch.randn(64, 4)
    return pack(model, (real, z), lambda m, b: m["D"](m["G"](b[1]).detach()).mean() - m["D"](b[0]).mean(),
                torch.optim.Adam(model["D"].parameters(), lr=5e-3))


def healthy_warmup_schedule():
    torch.manual_seed(8)
    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 2))
    opt = torch.optim.AdamW(model.parameters(), lr=0.02)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 4))  # at a quarter of the rate now
    return pack(model, (x, y), supervised(nn.CrossEntropyLoss()), opt)


def healthy_masked_rows_all_padding():
    """One row is all padding; the result is masked, not the softmax broken."""
    torch.manual_seed(9)

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(50, 16, padding_idx=0)
            self.score = nn.Linear(16, 1)
            self.out = nn.Linear(16, 2)

        def forward(self, ids):
            h, ok = self.emb(ids), ids != 0
            w = self.score(h)[..., 0].masked_fill(~ok, -1e9).softmax(1) * ok
            return self.out((w[..., None] * h).sum(1))
    y = torch.arange(40) % 2
    ids = torch.randint(1, 25, (40, 8)) + 24 * y[:, None]
    ids[:, 5:] = 0
    ids[3] = 0
    model = Pool()
    return pack(model, (ids, y), supervised(nn.CrossEntropyLoss()), adam(model, 0.02))


def healthy_tied_gpt():
    torch.manual_seed(10)

    class Tied(nn.Module):
        def __init__(self, v=30, d=32):
            super().__init__()
            self.emb = nn.Embedding(v, d)
            nn.init.normal_(self.emb.weight, std=0.05)
            self.pos = nn.Parameter(0.02 * torch.randn(16, d))
            self.layer = nn.TransformerEncoderLayer(d, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
            self.ln = nn.LayerNorm(d)
            self.head = nn.Linear(d, v, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            t = ids.shape[1]
            mask = nn.Transformer.generate_square_subsequent_mask(t)
            return self.head(self.ln(self.layer(self.emb(ids) + self.pos[:t], src_mask=mask, is_causal=True)))
    seq = (torch.randint(0, 30, (16, 1)) + 7 * torch.arange(13)) % 30
    model = Tied()
    return pack(model, (seq[:, :-1], seq[:, 1:]), lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()),
                torch.optim.AdamW(model.parameters(), lr=3e-3))


def healthy_sparse_embedding_bag():
    torch.manual_seed(11)
    model = nn.Sequential(nn.EmbeddingBag(500, 3, mode="mean", sparse=True))
    y = torch.arange(60) % 3
    ids = torch.randint(0, 160, (60, 6)) + 160 * y[:, None]
    return pack(model, (ids, y), supervised(nn.CrossEntropyLoss()), torch.optim.SparseAdam(model.parameters(), lr=0.05))


class STE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.sign() * w.abs().mean()

    @staticmethod
    def backward(ctx, g):
        return g


def healthy_binary_weights_straight_through():
    torch.manual_seed(12)

    class Bin(nn.Linear):
        def forward(self, x):
            return F.linear(x, STE.apply(self.weight), self.bias)
    model = nn.Sequential(Bin(8, 32), nn.ReLU(), Bin(32, 2))
    x = torch.randn(64, 8)
    y = (x[:, 0] + x[:, 1] > 0).long()
    return pack(model, (x, y), supervised(nn.CrossEntropyLoss()), adam(model))


def healthy_fake_quant_round():
    torch.manual_seed(13)

    class Q(nn.Module):
        def forward(self, x):
            q = (x * 8).round().clamp(-128, 127) / 8
            return x + (q - x).detach()
    model = nn.Sequential(nn.Linear(6, 24), Q(), nn.ReLU(), nn.Linear(24, 1), Q())
    x = torch.randn(64, 6)
    return pack(model, (x, x[:, :1] * 2 - x[:, 1:2]), supervised(nn.MSELoss()), adam(model, 0.02))


def healthy_reinforce():
    torch.manual_seed(14)
    s = torch.randn(128, 5)
    a = torch.randint(0, 3, (128,))
    adv = torch.where(a == (s[:, 0] > 0).long(), 1.0, -0.5)
    model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))

    def loss_fn(model, batch):
        logp = torch.log_softmax(model(batch["s"]), 1)
        pg = -(logp.gather(1, batch["a"][:, None])[:, 0] * batch["adv"]).mean()
        entropy = -(logp.exp() * logp).sum(1).mean()
        return pg - 0.05 * entropy
    return pack(model, dict(s=s, a=a, adv=adv), loss_fn, adam(model, 5e-3))


def healthy_dqn_double_target():
    torch.manual_seed(15)

    class Q(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
            self.target = copy.deepcopy(self.online).requires_grad_(False)
    model = Q()
    s, s2 = torch.randn(64, 4), torch.randn(64, 4)
    a = torch.randint(0, 2, (64,))
    r = s[:, 0] * (2 * a - 1)

    def loss_fn(model, batch):
        s, a, r, s2 = batch
        with torch.no_grad():
            best = model.online(s2).argmax(1, keepdim=True)
            y = r + 0.9 * model.target(s2).gather(1, best)[:, 0]
        return F.smooth_l1_loss(model.online(s).gather(1, a[:, None])[:, 0], y)
    return pack(model, (s, a, r, s2), loss_fn, torch.optim.Adam(model.online.parameters(), lr=5e-3))


def healthy_sum_loss_with_tiny_rate():
    torch.manual_seed(16)
    x = torch.randn(512, 8)
    y = x @ torch.randn(8, 1)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    return pack(model, (x, y), supervised(nn.MSELoss(reduction="sum")), torch.optim.SGD(model.parameters(), lr=5e-5))


def healthy_large_rate_for_mean_of_many():
    """A rate of 60, for the loss is a mean over many outputs of which each has weights of its own."""
    torch.manual_seed(17)
    x = torch.randn(64, 6)
    y = torch.tanh(x @ torch.randn(6, 200))
    model = nn.Sequential(nn.Linear(6, 200), nn.Tanh())
    return pack(model, (x, y), supervised(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=60.0))


def healthy_class_weights_and_smoothing():
    torch.manual_seed(18)
    y = (torch.rand(120) < 0.1).long()
    x = torch.randn(120, 1, 16) + 1.5 * y[:, None, None]
    model = nn.Sequential(nn.Conv1d(1, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(32, 2))
    return pack(model, (x, y), supervised(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]), label_smoothing=0.1)), adam(model, 0.02))


def healthy_gumbel_softmax_router():
    torch.manual_seed(19)

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.route = nn.Linear(6, 3)
            self.experts = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

        def forward(self, x, g):
            soft = ((self.route(x) + g) / 0.7).softmax(1)
            hard = F.one_hot(soft.argmax(1), 3).float()
            w = hard + soft - soft.detach()
            return sum(w[:, i:i + 1] * e(x) for i, e in enumerate(self.experts))
    x = torch.randn(96, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    g = -torch.log(-torch.log(torch.rand(96, 3).clamp(1e-6, 1 - 1e-6)))
    model = Router()
    return pack(model, (x, g, y), lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]), adam(model, 0.03))


def healthy_mixture_density():
    torch.manual_seed(20)
    x = torch.rand(96, 1) * 2 - 1
    y = torch.where(torch.rand(96, 1) < 0.5, x, -x) + 0.05 * torch.randn(96, 1)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 9))

    def loss_fn(model, batch):
        logit, mu, log_s = model(batch[0]).chunk(3, 1)
        log_s = log_s.clamp(-4, 2)
        comp = -0.5 * ((batch[1] - mu) / log_s.exp()).pow(2) - log_s - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(F.log_softmax(logit, 1) + comp, 1).mean()
    return pack(model, (x, y), loss_fn, adam(model, 0.02))


def healthy_moco_queue():
    torch.manual_seed(21)

    class Moco(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
            self.k = copy.deepcopy(self.q).requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(64, 8), dim=1))

        def forward(self, a, b):
            q = F.normalize(self.q(a), dim=1)
            with torch.no_grad():
                k = F.normalize(self.k(b), dim=1)
            return torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.T], 1) / 0.2
    model = Moco()
    z = torch.randn(48, 8)
    return pack(model, (z + 0.1 * torch.randn(48, 8), z),
                lambda m, b: F.cross_entropy(m(*b), torch.zeros(len(b[0]), dtype=torch.long)), adam(model, 5e-3))


def healthy_vqvae():
    torch.manual_seed(22)

    class VQ(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec, self.code = nn.Linear(10, 4), nn.Linear(4, 10), nn.Embedding(16, 4)

        def forward(self, x):
            z = self.enc(x)
            q = self.code(torch.cdist(z.detach(), self.code.weight.detach()).argmin(1))
            extra = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
            return self.dec(z + (q - z).detach()), extra
    x = torch.randn(8, 10)[torch.randint(0, 8, (64,))]
    model = VQ()

    def loss_fn(model, batch):
        out, extra = model(batch[0])
        return F.mse_loss(out, batch[0]) + extra
    return pack(model, (x,), loss_fn, adam(model, 0.02))


def healthy_vae_beta_small():
    torch.manual_seed(23)

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec = nn.Linear(36, 8), nn.Linear(4, 36)

        def forward(self, x, eps):
            mu, lv = self.enc(x).chunk(2, 1)
            return self.dec(mu + eps * (0.5 * lv).exp()), mu, lv
    x = (torch.rand(4, 36) > 0.5).float()[torch.randint(0, 4, (48,))]
    model = VAE()

    def loss_fn(model, batch):
        out, mu, lv = model(*batch)
        kl = -0.5 * (1 + lv - mu.pow(2) - lv.exp()).sum(1).mean()
        return F.binary_cross_entropy_with_logits(out, batch[0], reduction="sum") / len(out) + 0.1 * kl
    return pack(model, (x, torch.randn(48, 4)), loss_fn, adam(model, 0.02))


def healthy_lora_zero_b():
    torch.manual_seed(24)

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.A = nn.Parameter(torch.randn(4, base.in_features) * 0.3)
            self.B = nn.Parameter(torch.zeros(base.out_features, 4))

        def forward(self, x):
            return self.base(x) + 4 * x @ self.A.T @ self.B.T
    model = nn.Sequential(Lora(nn.Linear(8, 32)), nn.ReLU(), Lora(nn.Linear(32, 3)))
    y = torch.arange(60) % 3
    x = torch.randn(60, 8) + F.one_hot(y, 8)
    return pack(model, (x, y), supervised(nn.CrossEntropyLoss()), adam(model))


def healthy_resnet_zero_gamma():
    """The last norm of each residual branch starts at 0."""
    torch.manual_seed(25)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.b1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.c2, self.b2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            nn.init.zeros_(self.b2.weight)

        def forward(self, x):
            return F.relu(x + self.b2(self.c2(F.relu(self.b1(self.c1(x))))))
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                          nn.Linear(32, 3))
    y = torch.arange(36) % 3
    x = torch.randn(3, 1, 8, 8)[y] + 0.5 * torch.randn(36, 1, 8, 8)
    return pack(model, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def healthy_zero_init_logistic_regression():
    torch.manual_seed(26)
    model = nn.Linear(6, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x = torch.randn(80, 6)
    y = (x[:, :1] - x[:, 1:2] > 0).float()
    return pack(model, (x, y), supervised(nn.BCEWithLogitsLoss()), torch.optim.SGD(model.parameters(), lr=1.0))


def healthy_ctc():
    torch.manual_seed(27)

    class Asr(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(6, 24, batch_first=True, bidirectional=True)
            self.out = nn.Linear(48, 6)

        def forward(self, x):
            return self.out(self.rnn(x)[0]).log_softmax(2).transpose(0, 1)
    labels = torch.randint(1, 6, (12, 4))
    x = F.one_hot(labels.repeat_interleave(4, 1), 6).float() + 0.1 * torch.randn(12, 16, 6)
    model = Asr()
    lens = torch.full((12,), 16), torch.full((12,), 4)
    return pack(model, (x, labels), lambda m, b: F.ctc_loss(m(b[0]), b[1], *lens, zero_infinity=True), adam(model, 0.02))


def healthy_cox_partial_likelihood():
    torch.manual_seed(28)
    x = torch.randn(80, 5)
    t = torch.exp(-x[:, 0]) * torch.rand(80).add(0.1)
    event = (torch.rand(80) < 0.6).float()
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1, bias=False))

    def loss_fn(model, batch):
        x, t, e = batch
        order = t.argsort(descending=True)
        risk = model(x)[order, 0]
        return -((risk - risk.logcumsumexp(0)) * e[order]).sum() / e.sum()
    return pack(model, (x, t, event), loss_fn, adam(model, 0.03))


def healthy_pinn_oscillator():
    torch.manual_seed(29)
    t = torch.linspace(0, 2, 40)[:, None]
    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def loss_fn(model, batch):
        t = batch[0].clone().requires_grad_(True)
        u = model(t)
        du = torch.autograd.grad(u.sum(), t, create_graph=True)[0]
        d2 = torch.autograd.grad(du.sum(), t, create_graph=True)[0]
        return (d2 + 4 * u).pow(2).mean() + 10 * (u[0] - 1).pow(2).sum() + du[0].pow(2).sum()
    return pack(model, (t,), loss_fn, adam(model, 5e-3))


def healthy_segmentation_dice_empty_mask():
    torch.manual_seed(30)
    x = torch.randn(16, 1, 10, 10) * 0.3
    y = torch.zeros(16, 1, 10, 10)
    for i in range(15):
        y[i, 0, i % 5:i % 5 + 4, i % 4:i % 4 + 5] = 1
    x = x + y
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def loss_fn(model, batch):
        out = model(batch[0])
        p = out.sigmoid()
        inter = (p * batch[1]).sum((1, 2, 3))
        dice = 1 - (2 * inter + 1) / (p.sum((1, 2, 3)) + batch[1].sum((1, 2, 3)) + 1)
        return dice.mean() + F.binary_cross_entropy_with_logits(out, batch[1])
    return pack(model, (x, y), loss_fn, adam(model, 0.02))


def healthy_poisson_counts():
    """Log rates with an exposure; the Poisson loss without its constant is negative."""
    torch.manual_seed(31)
    x = torch.randn(90, 4)
    exposure = torch.rand(90, 1) * 9 + 1
    y = torch.poisson(exposure * torch.exp(0.5 * x[:, :1] + 1))
    model = nn.Linear(4, 1)

    def loss_fn(model, batch):
        x, e, y = batch
        return F.poisson_nll_loss(model(x) + e.log(), y, log_input=True)
    return pack(model, (x, exposure, y), loss_fn, adam(model, 0.05))


def healthy_bf16_autocast():
    torch.manual_seed(32)
    y = torch.arange(48) % 3
    x = torch.randn(48, 12) + 2 * F.one_hot(y, 12)
    model = nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 3))

    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch[0])
        return F.cross_entropy(out.float(), batch[1])
    return pack(model, (x, y), loss_fn, torch.optim.AdamW(model.parameters(), lr=5e-3))


def healthy_deep_supervision_detached_probe():
    """A linear probe on detached features beside the real head."""
    torch.manual_seed(33)

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
            self.head, self.probe = nn.Linear(32, 2), nn.Linear(32, 2)

        def forward(self, x):
            h = self.body(x)
            return self.head(h), self.probe(h.detach())
    x = torch.randn(64, 8)
    y = (x[:, 0].abs() > 0.7).long()
    model = Probe()

    def loss_fn(model, batch):
        a, b = model(batch[0])
        return F.cross_entropy(a, batch[1]) + F.cross_entropy(b, 1 - batch[1])
    return pack(model, (x, y), loss_fn, adam(model))


def healthy_partial_labels_semisupervised():
    """Most targets are missing (NaN) and masked before the loss."""
    torch.manual_seed(34)
    x = torch.randn(90, 6)
    y = torch.stack([x[:, 0] + x[:, 1], x[:, 2] - x[:, 3]], 1)
    y[torch.rand(90, 2) < 0.6] = float("nan")
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))

    def loss_fn(model, batch):
        ok = ~batch[1].isnan()
        return F.mse_loss(model(batch[0])[ok], batch[1][ok])
    return pack(model, (x, y), loss_fn, adam(model, 0.02))


def healthy_hinge_svm_plus_minus_one():
    torch.manual_seed(35)
    x = torch.randn(80, 5)
    y = torch.sign(x[:, :1] + 0.3 * x[:, 1:2])
    model = nn.Linear(5, 1)
    return pack(model, (x, y), lambda m, b: F.relu(1 - b[1] * m(b[0])).mean() + 1e-3 * m.weight.pow(2).sum(),
                torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=1e-3))


def healthy_minus_mean_reward():
    """A deterministic policy climbs a known reward: the loss is minus its mean, below 0 from the start."""
    torch.manual_seed(36)
    s = torch.randn(64, 4)
    model = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 1), nn.Tanh())

    def loss_fn(model, batch):
        a = model(batch[0])
        reward = 3 - 5 * (a - torch.sin(batch[0][:, :1])).pow(2)
        return -reward.mean()
    return pack(model, (s,), loss_fn, adam(model))


def healthy_stateful_lstm_detached_state():
    """Truncated backpropagation: the state between two chunks is detached, as it should be."""
    torch.manual_seed(37)

    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 1)

        def forward(self, x):
            state, outs = None, []
            for chunk in x.split(10, 1):
                h, state = self.lstm(chunk, state)
                state = tuple(s.detach() for s in state)
                outs.append(self.out(h))
            return torch.cat(outs, 1)
    t = torch.arange(31.0) * 0.3 + torch.rand(16, 1) * 6
    s = torch.sin(t)[..., None]
    model = Chunked()
    return pack(model, (s[:, :-1], s[:, 1:]), supervised(nn.MSELoss()), adam(model))


def healthy_multitask_uncertainty():
    torch.manual_seed(38)

    class Multi(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU())
            self.reg, self.cls = nn.Linear(32, 1), nn.Linear(32, 3)
            self.s = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            h = self.body(x)
            return self.reg(h), self.cls(h)
    x = torch.randn(80, 6)
    y, c = x[:, :1] + x[:, 1:2], (x[:, 2] > 0).long() + (x[:, 2] > 1).long()
    model = Multi()

    def loss_fn(model, batch):
        r, k = model(batch["x"])
        losses = torch.stack([F.mse_loss(r, batch["y"]), F.cross_entropy(k, batch["c"])])
        return (losses * torch.exp(-model.s) + model.s).sum()
    return pack(model, dict(x=x, y=y, c=c), loss_fn, adam(model, 0.02))
