"""25 faults in training programs, each with its twin without the mistake."""
import math

import torch
import torch.nn.functional as F
from torch import nn


# 1 ---------------------------------------------------------------- insurance claims, Poisson with an exposure
def _claims(bad):
    torch.manual_seed(1)
    n = 256
    x = torch.randn(n, 8)
    exposure = torch.rand(n) * 0.9 + 0.1
    rate = torch.exp(0.8 * x[:, 0] - 0.5 * x[:, 1] + 0.5)
    claims = torch.poisson(rate * exposure)
    if bad:
        exposure[[17, 90, 201]] = 0.0  # policies cancelled on the first day
        claims[[17, 90, 201]] = 0.0
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def loss_fn(model, batch):
        x, exposure, claims = batch
        log_rate = model(x).squeeze(1) + torch.log(exposure)
        return F.poisson_nll_loss(log_rate, claims, log_input=True, full=False)

    return dict(model=model, batch=(x, exposure, claims), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def fault_claims_exposure():
    return dict(_claims(True), kind=("input", "operation"), place=("log", "batch[1]"), curable=True,
                cure="keep = batch[1] > 0\nbatch = tuple(t[keep] for t in batch)",
                wrong="three policies have an exposure of 0, whose logarithm is the offset: -inf, and 0 * -inf is NaN in the Poisson loss.")


def twin_claims_exposure():
    return _claims(False)


# 2 ---------------------------------------------------------------- zero-inflated Poisson
class ZIP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, 24), nn.Tanh())
        self.gate = nn.Linear(24, 1)
        self.log_rate = nn.Linear(24, 1)

    def forward(self, x):
        h = self.body(x)
        return self.gate(h).squeeze(-1), self.log_rate(h).squeeze(-1)


def _zip_data():
    torch.manual_seed(2)
    x = torch.randn(200, 5)
    y = torch.poisson(torch.exp(1.2 + 0.7 * x[:, 0])) * (torch.rand(200) < torch.sigmoid(1 + x[:, 1])).float()
    model = ZIP(5)
    return model, (x, y), torch.optim.Adam(model.parameters(), 0.02)


def fault_zip_lgamma():
    model, batch, optimizer = _zip_data()

    def loss_fn(model, batch):
        x, y = batch
        gate, log_rate = model(x)
        poisson = y * log_rate - log_rate.exp() - torch.lgamma(y)
        zero = torch.logaddexp(F.logsigmoid(gate), F.logsigmoid(-gate) - log_rate.exp())
        positive = F.logsigmoid(-gate) + poisson
        is_zero = (y == 0).float()
        return -(is_zero * zero + (1 - is_zero) * positive).mean()

    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=optimizer, kind=("operation", "loss"),
                place=("lgamma", "mul", "loss"), curable=False, cure=None,
                wrong="log(y!) is lgamma(y + 1); lgamma(y) is inf where the count is 0, and the mask multiplies it by 0.")


def twin_zip_lgamma():
    model, batch, optimizer = _zip_data()

    def loss_fn(model, batch):
        x, y = batch
        gate, log_rate = model(x)
        poisson = y * log_rate - log_rate.exp() - torch.lgamma(y + 1)
        zero = torch.logaddexp(F.logsigmoid(gate), F.logsigmoid(-gate) - log_rate.exp())
        positive = F.logsigmoid(-gate) + poisson
        is_zero = (y == 0).float()
        return -(is_zero * zero + (1 - is_zero) * positive).mean()

    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=optimizer)


# 3 ---------------------------------------------------------------- mixture density network, prices in thousands
class MDN(nn.Module):
    def __init__(self, d, k=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, 32), nn.ELU())
        self.pi = nn.Linear(32, k)
        self.mu = nn.Linear(32, k)
        self.sigma = nn.Linear(32, k)

    def forward(self, x):
        h = self.body(x)
        return F.softmax(self.pi(h), 1), self.mu(h), F.elu(self.sigma(h)) + 1.0 + 1e-3


def _mdn(bad):
    torch.manual_seed(3)
    x = torch.randn(300, 6)
    price = 180 + 60 * x[:, 0] + 25 * x[:, 1] ** 2 + 10 * torch.randn(300)  # thousands
    y = price if bad else (price - price.mean()) / price.std()
    model = MDN(6)

    def loss_fn(model, batch):
        x, y = batch
        pi, mu, sigma = model(x)
        density = torch.exp(-0.5 * ((y[:, None] - mu) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return -torch.log((pi * density).sum(1)).mean()

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def fault_mdn_prices():
    return dict(_mdn(True), kind=("target", "loss", "operation"), place=("log", "batch[1]", "exp", "loss"), curable=True,
                cure="batch = (batch[0], (batch[1] - batch[1].mean()) / batch[1].std())",
                wrong="the prices are in thousands, far from every component: all densities underflow to 0, and their logarithm is -inf.")


def twin_mdn_prices():
    return _mdn(False)


# 4 ---------------------------------------------------------------- Gaussian process, Matern 3/2, by hand
class MaternGP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.log_length = nn.Parameter(torch.zeros(d))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_noise = nn.Parameter(torch.zeros(()))

    def distance(self, z):
        return torch.sqrt(((z[:, None] - z[None]) ** 2).sum(-1))

    def forward(self, x):
        r = math.sqrt(3) * self.distance(x / self.log_length.exp())
        k = self.log_scale.exp() * (1 + r) * torch.exp(-r)
        return k + (self.log_noise.exp() + 1e-4) * torch.eye(len(x))


class SafeMaternGP(MaternGP):
    def distance(self, z):
        return torch.sqrt(((z[:, None] - z[None]) ** 2).sum(-1) + 1e-12)


def _gp(cls):
    torch.manual_seed(4)
    x = torch.rand(60, 2) * 4
    y = torch.sin(x[:, 0]) + 0.5 * x[:, 1].cos() + 0.05 * torch.randn(60)
    model = cls(2)

    def loss_fn(model, batch):
        x, y = batch
        chol = torch.linalg.cholesky(model(x))
        alpha = torch.cholesky_solve(y[:, None], chol)
        return (0.5 * (y[:, None] * alpha).sum() + chol.diagonal().log().sum()) / len(y) + 0.5 * math.log(2 * math.pi)

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.1))


def fault_gp_matern():
    return dict(_gp(MaternGP), kind=("operation", "gradient"), place=("sqrt", "log_length"), curable=False, cure=None,
                wrong="the distance of a point from itself is sqrt(0), whose gradient is inf: the first step makes the length scales NaN.")


def twin_gp_matern():
    return _gp(SafeMaternGP)


# 5 ---------------------------------------------------------------- Bayes by backprop, sigma as a parameter of its own
class BayesLinear(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.mu = nn.Parameter(torch.randn(o, i) / i ** 0.5)
        self.sigma = nn.Parameter(torch.full((o, i), 0.02))
        self.bias = nn.Parameter(torch.zeros(o))


    def std(self):
        return self.sigma

    def forward(self, x):
        return F.linear(x, self.mu + self.std() * torch.randn_like(self.mu), self.bias)

    def kl(self):
        s = self.std()
        return (0.5 * (s ** 2 + self.mu ** 2) - torch.log(s) - 0.5).sum()


class BayesLinearSoftplus(BayesLinear):
    def __init__(self, i, o):
        super().__init__(i, o)
        self.sigma.data.fill_(math.log(math.expm1(0.02)))

    def std(self):
        return F.softplus(self.sigma)


def _bayes(cls):
    torch.manual_seed(5)
    x = torch.randn(400, 10)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    model = nn.Sequential(cls(10, 40), nn.Tanh(), cls(40, 1))

    def loss_fn(model, batch):
        x, y = batch
        kl = sum(m.kl() for m in model if isinstance(m, BayesLinear))
        return F.mse_loss(model(x), y) / (2 * 0.1 ** 2) + kl / 20000

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def fault_bayes_sigma():
    return dict(_bayes(BayesLinear), kind=("operation", "weights", "learning rate"),
                place=("log", "0.sigma", "2.sigma", "optimizer", "0", "2"), curable=False, cure=None,
                wrong="sigma is a parameter without softplus or exp: a few steps make some of it negative, and log(sigma) in the KL is NaN.")


def twin_bayes_sigma():
    return _bayes(BayesLinearSoftplus)


# 6 ---------------------------------------------------------------- PINN: heat on a disc, polar coordinates
def _disc(bad):
    torch.manual_seed(6)
    r = torch.linspace(0.0 if bad else 0.02, 1.0, 64)[:, None]
    edge = torch.ones(1, 1)
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss_fn(model, batch):
        r, edge = batch
        r = r.clone().requires_grad_(True)
        u = model(r)
        u_r = torch.autograd.grad(u.sum(), r, create_graph=True)[0]
        u_rr = torch.autograd.grad(u_r.sum(), r, create_graph=True)[0]
        residual = u_rr + u_r / r + 1.0  # steady heat with a source
        return (residual ** 2).mean() + 10 * (model(edge) ** 2).mean()

    return dict(model=net, batch=(r, edge), loss_fn=loss_fn, optimizer=torch.optim.Adam(net.parameters(), 0.005))


def fault_pinn_origin():
    return dict(_disc(True), kind=("operation", "input"), place=("div", "batch[0]"), curable=True,
                cure="batch = (batch[0].clamp_min(0.02), batch[1])",
                wrong="the collocation points include r = 0, where the polar Laplacian divides by r.")


def twin_pinn_origin():
    return _disc(False)


# 7 ---------------------------------------------------------------- neural ODE, time in milliseconds
class Dynamics(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.ELU(), nn.Linear(32, 2))

    def forward(self, z0, t):
        out, z = [z0], z0
        for dt in t[1:] - t[:-1]:
            k1 = self.net(z)
            k2 = self.net(z + dt / 2 * k1)
            k3 = self.net(z + dt / 2 * k2)
            k4 = self.net(z + dt * k3)
            z = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            out.append(z)
        return torch.stack(out)


def _ode(bad):
    torch.manual_seed(7)
    seconds = torch.linspace(0, 2, 21)
    z0 = torch.randn(32, 2)
    w = 2.0
    c, s = torch.cos(w * seconds)[:, None], torch.sin(w * seconds)[:, None]
    truth = torch.stack([c * z0[:, 0] + s * z0[:, 1], -s * z0[:, 0] + c * z0[:, 1]], -1)
    model = Dynamics()

    def loss_fn(model, batch):
        z0, t, truth = batch
        return F.mse_loss(model(z0, t), truth)

    t = seconds * 1000 if bad else seconds
    return dict(model=model, batch=(z0, t, truth), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.02))


def fault_ode_milliseconds():
    return dict(_ode(True), kind=("input", "operation", "weights"), place=("batch[1]", "net", "net.0", "net.2", "net.1", "elu", "mul", "add"),
                curable=True, cure="batch = (batch[0], batch[1] / 1000, batch[2])",
                wrong="the logger writes milliseconds: the solver takes steps of 100 instead of 0.1, and the state grows until it overflows.")


def twin_ode_milliseconds():
    return _ode(False)


# 8 ---------------------------------------------------------------- GCN with isolated nodes
class GCN(nn.Module):
    def __init__(self, d, h, k):
        super().__init__()
        self.lin1 = nn.Linear(d, h)
        self.lin2 = nn.Linear(h, k)

    def forward(self, x, adj):
        inv = adj.sum(1).pow(-0.5)
        a = inv[:, None] * adj * inv[None]
        return a @ self.lin2(torch.relu(a @ self.lin1(x)))


def _gcn(bad):
    torch.manual_seed(8)
    n = 120
    y = torch.randint(0, 3, (n,))
    p = torch.where(y[:, None] == y[None], 0.08, 0.01)
    adj = (torch.rand(n, n) < p).float().triu(1)
    adj = adj + adj.T
    adj[5] = adj[77] = 0  # authors without a co-author
    adj[:, 5] = adj[:, 77] = 0
    if not bad:
        adj = adj + torch.eye(n)
    x = F.one_hot(y, 3).float() + torch.randn(n, 3)
    x = torch.cat([x, torch.randn(n, 13)], 1)
    model = GCN(16, 32, 3)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["x"], batch["adj"]), batch["y"])

    return dict(model=model, batch=dict(x=x, adj=adj, y=y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.02))


def fault_gcn_isolated():
    return dict(_gcn(True), kind=("operation", "input"), place=("pow", "mul", "batch['adj']"), curable=True,
                cure="batch['adj'] = batch['adj'] + torch.eye(len(batch['adj']))",
                wrong="self-loops were forgotten: an isolated node has degree 0, its degree ** -0.5 is inf, and inf * 0 is NaN.")


def twin_gcn_isolated():
    return _gcn(False)


# 9 ---------------------------------------------------------------- forecasting transformer, causal mask
class Forecaster(nn.Module):
    def __init__(self, mask, d=32):
        super().__init__()
        self.inp = nn.Linear(1, d)
        self.pos = nn.Parameter(torch.randn(1, mask.shape[0], d) * 0.02)
        self.attn = nn.MultiheadAttention(d, 4, batch_first=True)
        self.norm = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 64), nn.GELU(), nn.Linear(64, d))
        self.out = nn.Linear(d, 1)
        self.register_buffer("mask", mask)

    def forward(self, x):
        h = self.inp(x) + self.pos
        h = h + self.attn(h, h, h, attn_mask=self.mask)[0]
        h = h + self.mlp(self.norm(h))
        return self.out(h)


def _forecaster(mask):
    torch.manual_seed(9)
    t = torch.arange(25.0)
    phase = torch.rand(64, 1) * 6.28
    series = torch.sin(t * 0.5 + phase) + 0.1 * torch.randn(64, 25)
    model = Forecaster(mask)

    def loss_fn(model, batch):
        series = batch
        return F.mse_loss(model(series[:, :-1, None]).squeeze(-1), series[:, 1:])

    return dict(model=model, batch=series, loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.003))


def fault_forecaster_mask():
    return dict(_forecaster(torch.ones(24, 24).tril().bool()), kind=("operation", "input"),
                place=("softmax", "attn", "scaled_dot_product_attention", "mask", "multi_head_attention_forward"), curable=True, cure="model.mask = ~model.mask",
                wrong="True means 'may look' in scaled_dot_product_attention and 'may not' in MultiheadAttention: the last step sees nothing, and its softmax is NaN.")


def twin_forecaster_mask():
    return _forecaster(~torch.ones(24, 24).tril().bool())


# 10 --------------------------------------------------------------- ListNet over padded lists of documents
class Scorer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, docs):
        return self.net(docs).squeeze(-1)


def _listnet_data():
    torch.manual_seed(10)
    docs = torch.randn(24, 12, 10)
    relevance = (docs[..., 0] * 1.5 + docs[..., 1]).clamp(-4, 4).round().clamp_min(0)
    length = torch.randint(5, 13, (24,))
    pad = torch.arange(12)[None] >= length[:, None]
    docs[pad] = 0
    relevance[pad] = 0
    model = Scorer(10)
    return model, (docs, relevance, pad), torch.optim.Adam(model.parameters(), 0.01)


def fault_listnet_padding():
    model, batch, optimizer = _listnet_data()

    def loss_fn(model, batch):
        docs, relevance, pad = batch
        scores = model(docs).masked_fill(pad, float("-inf"))
        truth = relevance.masked_fill(pad, float("-inf")).softmax(1)
        return -(truth * F.log_softmax(scores, 1)).sum(1).mean()

    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=optimizer, kind=("operation", "loss"),
                place=("mul", "log_softmax", "masked_fill", "loss"), curable=False, cure=None,
                wrong="padded documents have a log probability of -inf, and the cross-entropy of ListNet multiplies it by their truth of 0.")


def twin_listnet_padding():
    model, batch, optimizer = _listnet_data()

    def loss_fn(model, batch):
        docs, relevance, pad = batch
        scores = model(docs).masked_fill(pad, float("-inf"))
        truth = relevance.masked_fill(pad, float("-inf")).softmax(1)
        return -(truth * F.log_softmax(scores, 1).masked_fill(pad, 0.0)).sum(1).mean()

    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=optimizer)


# 11 --------------------------------------------------------------- tiny GPT-2: which labels are ignored
def _gpt2(bad):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(11)
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    start = torch.randint(1, 50, (16, 1))
    ids = (start + torch.arange(20)[None] * 3) % 59 + 1
    mask = torch.ones_like(ids)  # packed: no padding
    labels = ids.clone()
    labels[mask == (1 if bad else 0)] = -100
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels)

    def loss_fn(model, batch):
        return model(**batch).loss

    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=torch.optim.AdamW(model.parameters(), 0.01))


def fault_gpt2_ignored():
    return dict(_gpt2(True), kind=("target", "loss"), place=("batch['labels']", "cross_entropy", "loss"), curable=True,
                cure="batch['labels'] = batch['input_ids'].masked_fill(batch['attention_mask'] == 0, -100)",
                wrong="labels are set to -100 where the attention mask is 1 instead of 0: every label is ignored, and the mean over none is NaN.")


def twin_gpt2_ignored():
    return _gpt2(False)


# 12 --------------------------------------------------------------- Adam by hand
class MyAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, first=1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))
        self.t = first

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                    state["v"] = torch.zeros_like(p)
                state["m"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                one = torch.ones(())
                m_hat = state["m"] / (one - b1 ** self.t)
                v_hat = state["v"] / (one - b2 ** self.t)
                p.sub_(group["lr"] * m_hat / (v_hat.sqrt() + group["eps"]))
        self.t += 1


def _breast_cancer(optimizer):
    from sklearn.datasets import load_breast_cancer
    torch.manual_seed(12)
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    y = torch.tensor(data.target, dtype=torch.float32)
    model = nn.Sequential(nn.Linear(30, 32), nn.SiLU(), nn.Linear(32, 1))

    def loss_fn(model, batch):
        return F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), batch[1])

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=optimizer(model))


def fault_adam_from_zero():
    return dict(_breast_cancer(lambda m: MyAdam(m.parameters(), lr=0.01, first=0)), kind=("optimizer",), place=("optimizer",), curable=True,
                cure="optimizer = torch.optim.Adam(model.parameters(), lr=0.01)",
                wrong="the hand-written Adam counts its steps from 0: the first bias correction divides by 1 - b ** 0 = 0, and the weights are NaN.")


def twin_adam_from_zero():
    return _breast_cancer(lambda m: MyAdam(m.parameters(), lr=0.01))


# 13 --------------------------------------------------------------- CTC on raw scores
class Recogniser(nn.Module):
    def __init__(self, d, k, log_probs):
        super().__init__()
        self.rnn = nn.GRU(d, 32, bidirectional=True)
        self.head = nn.Linear(64, k)
        self.log_probs = log_probs

    def forward(self, x):
        scores = self.head(self.rnn(x)[0])
        return F.log_softmax(scores, -1) if self.log_probs else scores


def _ctc(log_probs):
    torch.manual_seed(13)
    symbols = torch.randn(6, 12)
    target = torch.randint(1, 6, (16, 5))
    x = symbols[target].repeat_interleave(4, 1) + 0.3 * torch.randn(16, 20, 12)
    model = Recogniser(12, 6, log_probs)

    def loss_fn(model, batch):
        x, target = batch
        frames = torch.full((x.shape[1],), x.shape[0], dtype=torch.long)
        length = torch.full((len(target),), target.shape[1], dtype=torch.long)
        return F.ctc_loss(model(x), target, frames, length)

    return dict(model=model, batch=(x.transpose(0, 1).contiguous(), target), loss_fn=loss_fn,
                optimizer=torch.optim.Adam(model.parameters(), 0.01))


def fault_ctc_scores():
    return dict(_ctc(False), kind=("loss", "operation"), place=("ctc_loss", "loss", "head"), curable=False, cure=None,
                wrong="ctc_loss gets scores instead of log probabilities: its value, which starts below 0, is no likelihood, and its gradient, made for normalised input, does not lower it.")


def twin_ctc_scores():
    return _ctc(True)


# 14 --------------------------------------------------------------- quantile regression of demand
def _quantiles(reduce):
    torch.manual_seed(14)
    x = torch.randn(256, 6)
    y = x[:, 0] + 0.5 * x[:, 1] ** 2 + (0.3 + 0.3 * x[:, 2].abs()) * torch.randn(256)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    levels = torch.tensor([0.1, 0.5, 0.9])

    def loss_fn(model, batch):
        x, y = batch
        error = y[:, None] - model(x)
        return reduce(levels * error, (levels - 1) * error).mean()

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def fault_pinball_min():
    return dict(_quantiles(torch.minimum), kind=("loss",), place=("loss", "minimum"), curable=False, cure=None,
                wrong="the pinball loss takes the minimum of its two branches instead of the maximum: the further off, the lower.")


def twin_pinball_min():
    return _quantiles(torch.maximum)


# 15 --------------------------------------------------------------- several tasks weighted by learned uncertainty
class MultiTask(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 48), nn.ReLU())
        self.price = nn.Linear(48, 1)
        self.kind = nn.Linear(48, 4)
        self.log_var = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        h = self.trunk(x)
        return self.price(h).squeeze(-1), self.kind(h)


def _multitask():
    torch.manual_seed(15)
    x = torch.randn(256, 10)
    price = x[:, 0] * 1.5 - x[:, 3] + 0.1 * torch.randn(256)
    kind = (x[:, 4:8] + 0.3 * torch.randn(256, 4)).argmax(1)
    model = MultiTask()
    return model, (x, price, kind), torch.optim.Adam(model.parameters(), 0.03)


def fault_uncertainty_sign():
    model, batch, optimizer = _multitask()

    def loss_fn(model, batch):
        x, price, kind = batch
        p, k = model(x)
        losses = torch.stack([F.mse_loss(p, price), F.cross_entropy(k, kind)])
        return (torch.exp(-model.log_var) * losses - model.log_var).sum()

    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=optimizer, kind=("loss",), place=("loss", "log_var"), curable=False, cure=None,
                wrong="the logarithm of the variance is subtracted instead of added: it grows for ever, and both tasks are switched off.")


def twin_uncertainty_sign():
    model, batch, optimizer = _multitask()

    def loss_fn(model, batch):
        x, price, kind = batch
        p, k = model(x)
        losses = torch.stack([F.mse_loss(p, price), F.cross_entropy(k, kind)])
        return (torch.exp(-model.log_var) * losses + model.log_var).sum()

    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=optimizer)


# 16 --------------------------------------------------------------- SGD by hand, which rebinds its tensors
class MomentumSGD(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                v = self.state[p].get("v", torch.zeros_like(p))
                v = group["momentum"] * v + p.grad
                self.state[p]["v"] = v
                self.update(p, v, group["lr"])

    def update(self, p, v, lr):
        p.add_(v, alpha=-lr)


class ReboundSGD(MomentumSGD):
    def update(self, p, v, lr):
        p = p - lr * v


def _diabetes(cls):
    from sklearn.datasets import load_diabetes
    torch.manual_seed(16)
    data = load_diabetes()
    x = torch.tensor(data.data, dtype=torch.float32)
    x = x / x.std(0)
    y = torch.tensor(data.target, dtype=torch.float32)[:, None]
    y = (y - y.mean()) / y.std()
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=cls(model.parameters(), lr=0.02))


def fault_sgd_rebinds():
    return dict(_diabetes(ReboundSGD), kind=("optimizer", "learning rate"), place=("optimizer",), curable=True,
                cure="optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)",
                wrong="the hand-written step says p = p - lr * v, which makes a new tensor and leaves the parameter as it was.")


def twin_sgd_rebinds():
    return _diabetes(MomentumSGD)


# 17 --------------------------------------------------------------- LoRA by hand, scaled by alpha // r
class LoRALinear(nn.Module):
    def __init__(self, base, r=16, alpha=8):
        super().__init__()
        self.base = base
        for p in base.parameters():
            p.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features ** 0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.scaling = self.scale(alpha, r)

    def scale(self, alpha, r):
        return alpha / r

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)


class FloorLoRALinear(LoRALinear):
    def scale(self, alpha, r):
        return alpha // r


def _lora(cls):
    torch.manual_seed(17)
    x = torch.randn(200, 20)
    y = (x[:, :5] + 0.5 * x[:, 5:10]).argmax(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5))
    for i in (0, 2, 4):
        model[i] = cls(model[i])

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    trained = [p for p in model.parameters() if p.requires_grad]
    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.AdamW(trained, 0.01))


def fault_lora_floor():
    return dict(_lora(FloorLoRALinear), kind=("gradient", "weights", "operation"),
                place=("0", "2", "4", "0.A", "0.B", "2.A", "2.B", "4.A", "4.B", "mul"), curable=True,
                cure="for m in model:\n    if hasattr(m, 'scaling'):\n        m.scaling = 0.5",
                wrong="the scaling is alpha // r = 8 // 16 = 0: the update is multiplied by 0, and so is its gradient.")


def twin_lora_floor():
    return _lora(LoRALinear)


# 18 --------------------------------------------------------------- peft, an optimizer made too early
def _peft(early):
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(18)
    config = BertConfig(vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=32, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    base = BertForSequenceClassification(config)
    ids = torch.randint(5, 80, (32, 12))
    labels = torch.randint(0, 2, (32,))
    ids[labels == 1, 3] = 7
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.02)
    torch.manual_seed(19)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"], lora_dropout=0.0))
    if not early:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)

    def loss_fn(model, batch):
        return model(**batch).loss

    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=optimizer)


def fault_peft_early():
    s = _peft(True)
    names = tuple(n for n, p in s["model"].named_parameters() if p.requires_grad)
    return dict(s, kind=("optimizer",), place=("optimizer",) + names, curable=True,
                cure="optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)",
                wrong="the optimizer was made before get_peft_model: it holds the frozen weights and none of the adapters.")


def twin_peft_early():
    return _peft(False)


# 19 --------------------------------------------------------------- two towers, temperature
class TwoTowers(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.query = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
        self.item = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 32))
        self.temperature = temperature

    def forward(self, q, i):
        q = F.normalize(self.query(q), dim=1)
        i = F.normalize(self.item(i), dim=1)
        return q @ i.T / self.temperature


def _towers(temperature):
    torch.manual_seed(19)
    z = torch.randn(64, 8)
    q = z @ torch.randn(8, 16) + 0.1 * torch.randn(64, 16)
    i = z @ torch.randn(8, 24) + 0.1 * torch.randn(64, 24)
    q, i = q / q.std(0), i / i.std(0)
    model = TwoTowers(temperature)

    def loss_fn(model, batch):
        scores = model(*batch)
        return F.cross_entropy(scores, torch.arange(len(scores)))

    return dict(model=model, batch=(q, i), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.003))


def fault_towers_temperature():
    return dict(_towers(20.0), kind=("operation", "gradient", "weights", "loss"), place=("div", "loss", "cross_entropy"), curable=True,
                cure="model.temperature = 0.05",
                wrong="the paper's logit scale of 20 was used as a temperature: cosines are divided by 20, and the softmax over 64 items stays flat.")


def twin_towers_temperature():
    return _towers(0.05)


# 20 --------------------------------------------------------------- graph: edges run the wrong way
class SageToItems(nn.Module):
    """Items get the mean of their users' features; items have no features of their own."""

    def __init__(self, d, h, k):
        super().__init__()
        self.message = nn.Linear(d, h)
        self.own = nn.Linear(d, h)
        self.head = nn.Linear(h, k)

    def forward(self, x, edges):
        src, dst = edges
        m = self.message(x)[src]
        total = torch.zeros(len(x), m.shape[1]).index_add(0, dst, m)
        count = torch.zeros(len(x)).index_add(0, dst, torch.ones(len(dst))).clamp_min(1)
        return self.head(torch.relu(self.own(x) + total / count[:, None]))


def _sage(bad):
    torch.manual_seed(20)
    users, items = 150, 60
    label = torch.randint(0, 3, (items,))
    taste = torch.randint(0, 3, (users,))
    x = torch.zeros(users + items, 8)
    x[:users] = torch.randn(users, 8)
    x[:users, :3] += 2 * F.one_hot(taste, 3)
    likes = torch.rand(users, items) < torch.where(taste[:, None] == label[None], 0.15, 0.02)
    u, i = likes.nonzero(as_tuple=True)
    edges = torch.stack([u, users + i])  # from user to item
    if bad:
        edges = edges.flip(0)
    model = SageToItems(8, 32, 3)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["x"], batch["edge_index"])[users:], batch["y"])

    return dict(model=model, batch=dict(x=x, edge_index=edges, y=label), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def fault_edges_reversed():
    return dict(_sage(True), kind=("input", "gradient"), place=("batch['edge_index']", "batch['x']", "message", "message.weight", "own", "own.weight"),
                curable=True, cure="batch['edge_index'] = batch['edge_index'].flip(0)",
                wrong="the two rows of edge_index are swapped: messages go from items to users, and every item, without features, looks the same.")


def twin_edges_reversed():
    return _sage(False)


# 21 --------------------------------------------------------------- category codes scaled, then cast
class Tabular(nn.Module):
    def __init__(self, cards):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(c, 8) for c in cards)
        self.mlp = nn.Sequential(nn.Linear(8 * len(cards), 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, codes):
        codes = codes.long()
        return self.mlp(torch.cat([t(codes[:, i]) for i, t in enumerate(self.tables)], 1)).squeeze(1)


def _codes(bad):
    torch.manual_seed(21)
    cards = (12, 7, 20)
    codes = torch.stack([torch.randint(0, c, (256,)) for c in cards], 1).float()
    effect = [torch.randn(c) for c in cards]
    y = sum(e[codes[:, i].long()] for i, e in enumerate(effect))
    y = (y - y.mean()) / y.std()
    if bad:
        codes = codes / torch.tensor(cards)  # the scaler ran over all columns, the categorical ones too
    model = Tabular(cards)

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    return dict(model=model, batch=(codes, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def fault_codes_scaled():
    return dict(_codes(True), kind=("input", "gradient", "operation"),
                place=("batch[0]", "long", "to", "tables.0", "tables.1", "tables.2", "tables.0.weight", "tables.1.weight", "tables.2.weight", "embedding", "tables"),
                curable=True, cure="batch = ((batch[0] * torch.tensor([12, 7, 20])).round(), batch[1])",
                wrong="the category codes were scaled to [0, 1) with the other columns: as integers all of them are 0, and every row is the same.")


def twin_codes_scaled():
    return _codes(False)


# 22 --------------------------------------------------------------- a gradient hook that clips below at 0
def _clipped(low):
    torch.manual_seed(22)
    week = torch.rand(128, 1) * 6.28
    series = 1 + 0.5 * torch.sin(week + torch.arange(15) * 0.9) + 0.1 * torch.randn(128, 15)  # demand over its mean
    x, y = series[:, :14], series[:, 14]
    model = nn.Sequential(nn.Linear(14, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 1))
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(low, 1.0))

    def loss_fn(model, batch):
        x, y = batch
        return F.mse_loss(model(x).squeeze(1), y)

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.SGD(model.parameters(), 0.02, momentum=0.9))


def fault_hook_clamps():
    s = _clipped(0.0)
    return dict(s, kind=("gradient",), place=tuple(n for n, _ in s["model"].named_parameters()) + ("clamp", "0", "2", "4"), curable=True,
                cure="for p in model.parameters():\n    p._backward_hooks.clear()",
                wrong="the hooks that clip gradients clamp them to [0, 1] instead of [-1, 1]: weights can only go down.")


def twin_hook_clamps():
    return _clipped(-1.0)


# 23 --------------------------------------------------------------- parameter groups from a generator that was used up
def _groups(bad):
    torch.manual_seed(23)
    x = torch.randn(200, 12)
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    decay = (p for p in model.parameters() if p.ndim > 1)
    if not bad:
        decay = list(decay)
    no_decay = [p for p in model.parameters() if p.ndim <= 1]
    count = sum(p.numel() for p in decay)  # printed in the log
    optimizer = torch.optim.AdamW([dict(params=no_decay, weight_decay=0.0), dict(params=decay, weight_decay=0.01)], lr=0.005)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=optimizer)


def fault_generator_used_up():
    return dict(_groups(True), kind=("optimizer",), place=("optimizer", "0.weight", "3.weight", "5.weight"), curable=True,
                cure="optimizer.add_param_group(dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=0.01))",
                wrong="the generator of weights was used up by counting them: the second group is empty, and only biases and norms are trained.")


def twin_generator_used_up():
    return _groups(False)


# 24 --------------------------------------------------------------- an LSTM read after the padding
class Sentiment(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.head = nn.Linear(24, 1)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0][:, -1]).squeeze(1)


def _sentiment(bad):
    torch.manual_seed(24)
    ids = torch.zeros(64, 90, dtype=torch.long)
    y = torch.randint(0, 2, (64,)).float()
    for row in range(64):
        n = int(torch.randint(5, 10, ()))
        words = torch.randint(1, 25, (n,)) + (24 if y[row] else 0)
        if bad:
            ids[row, :n] = words
        else:
            ids[row, -n:] = words
    model = Sentiment()

    def loss_fn(model, batch):
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    return dict(model=model, batch=(ids, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.005))


def fault_read_after_padding():
    return dict(_sentiment(True), kind=("gradient", "input", "operation"), place=("lstm", "batch[0]", "embed", "embed.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"),
                curable=True, cure="ids = batch[0]\nbatch = (torch.stack([r.roll(int((r == 0).sum())) for r in ids]), batch[1])",
                wrong="reviews of 5 to 9 words are padded on the right to 90, and the last output of the LSTM has forgotten them.")


def twin_read_after_padding():
    return _sentiment(False)


# 25 --------------------------------------------------------------- seq2seq: logits by batch, targets by time
class Seq2Seq(nn.Module):
    def __init__(self, v=30, d=48):
        super().__init__()
        self.src = nn.Embedding(v, d)
        self.tgt = nn.Embedding(v, d)
        self.encoder = nn.GRU(d, d)
        self.decoder = nn.GRU(d, d)
        self.head = nn.Linear(2 * d, v)

    def forward(self, src, tgt):  # (time, batch)
        memory, h = self.encoder(self.src(src))
        out, _ = self.decoder(self.tgt(tgt), h)
        weight = torch.softmax(torch.einsum("tbd,sbd->bts", out, memory), -1)
        context = torch.einsum("bts,sbd->tbd", weight, memory)
        return self.head(torch.cat([out, context], -1)).transpose(0, 1)  # (batch, time, words)


def _translate(bad):
    torch.manual_seed(25)
    step = torch.arange(10)[:, None]
    src = (torch.randint(0, 29, (1, 400)) + step * torch.randint(1, 9, (1, 400))) % 29 + 1
    out = (src * 7) % 29 + 1
    tgt_in = torch.cat([torch.zeros(1, 400, dtype=torch.long), out[:-1]])
    target = out if bad else out.T.contiguous()
    model = Seq2Seq()

    def loss_fn(model, batch):
        src, tgt_in, target = batch
        logits = model(src, tgt_in)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))

    return dict(model=model, batch=(src, tgt_in, target), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 0.01))


def fault_time_against_batch():
    return dict(_translate(True), kind=("target", "loss", "input"), place=("batch[2]", "loss", "cross_entropy", "reshape"), curable=True,
                cure="batch = (*batch[:2], batch[2].T.contiguous())",
                wrong="logits are (batch, time, words) and targets (time, batch): flattened, each word is compared with the word of another sentence.")


def twin_time_against_batch():
    return _translate(False)


FALLS_WITHOUT_BOUND = ("fault_pinball_min", "fault_uncertainty_sign")
