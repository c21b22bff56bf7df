"""Faults in metric learning, RL, physics, graphs, recommenders, survival, flows, detection, fine-tuning."""
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
    return (x - x.mean(0)) / x.std(0)


def _digits(n=256):
    d = load_digits()
    return _t(d.data[:n]), torch.tensor(d.target[:n])


def _adam(model, lr):
    return torch.optim.Adam(model.parameters(), lr=lr)


# 33 ---- contrastive: the positive of a row is the row itself, which is masked
def _ntxent(fixed):
    torch.manual_seed(33)
    x, _ = _digits(64)
    x = x / 8 - 1
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def loss_fn(model, batch):
        a, b = batch
        z = F.normalize(model(torch.cat([a, b])), dim=1)
        n = len(a)
        sim = (z @ z.T / 0.2).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
        positive = (torch.arange(2 * n) + n) % (2 * n) if fixed else torch.arange(2 * n)
        return F.cross_entropy(sim, positive)
    return dict(model=model, batch=(x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)), loss_fn=loss_fn, optimizer=_adam(model, 3e-3),
                kind=("target", "operation", "loss"), place=("cross_entropy", "masked_fill", "loss"), curable=False, cure=None,
                wrong="the labels point at the diagonal, which is masked with -inf")


def fault_ntxent():
    return _ntxent(False)


def twin_ntxent():
    return _ntxent(True)


# 34 ---- batch-hard triplets: the distance of a row to itself
def _triplet(eps):
    torch.manual_seed(34)
    x, y = _digits(96)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    def loss_fn(model, batch):
        x, y = batch
        e = model(x)
        dist = ((e[:, None] - e[None]) ** 2).sum(-1).add(eps).sqrt()
        same = y[:, None] == y[None]
        far = (dist * same).max(1).values
        near = (dist + 1e3 * same).min(1).values
        return F.relu(far - near + 0.5).mean()
    return dict(model=model, batch=(x / 8 - 1, y), loss_fn=loss_fn, optimizer=_adam(model, 5e-3),
                kind=("operation",), place=("sqrt",), curable=False, cure=None,
                wrong="the square root of a distance of 0, each row's to itself, has an infinite derivative")


def fault_triplet():
    return _triplet(0.0)


def twin_triplet():
    return _triplet(1e-8)


# 35 ---- ArcFace, prototypes taken from the data
class ArcFace(nn.Module):
    def __init__(self, x, y, edge):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(13, 32), nn.Tanh(), nn.Linear(32, 8))
        with torch.no_grad():
            first = torch.stack([x[y == c][0] for c in range(3)])
            self.prototypes = nn.Parameter(F.normalize(self.body(first), dim=1))
        self.edge = edge

    def forward(self, x, y):
        cos = F.linear(F.normalize(self.body(x), dim=1), F.normalize(self.prototypes, dim=1)).clamp(-1 + self.edge, 1 - self.edge)
        angle = torch.acos(cos)
        return 8 * torch.cos(angle + 0.3 * F.one_hot(y, 3))


def _arcface(edge):
    torch.manual_seed(35)
    d = load_wine()
    x, y = _t(_z(d.data)), torch.tensor(d.target)
    model = ArcFace(x, y, edge)
    return dict(model=model, batch=(x, y), loss_fn=lambda model, b: F.cross_entropy(model(*b), b[1]), optimizer=_adam(model, 5e-3),
                kind=("operation",), place=("acos",), curable=False, cure=None,
                wrong="acos of a cosine of 1, a sample that is its class's prototype, has an infinite derivative")


def fault_arcface():
    return _arcface(0.0)


def twin_arcface():
    return _arcface(1e-4)


# 36 ---- entropy bonus over illegal moves
class Policy(nn.Module):
    def __init__(self, n_in=9, actions=9):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_in, 32), nn.Tanh(), nn.Linear(32, actions))

    def forward(self, obs, legal):
        return self.net(obs).masked_fill(~legal, float("-inf"))


def _boards():
    g = torch.Generator().manual_seed(36)
    obs = torch.randint(-1, 2, (64, 9), generator=g).float()
    legal = obs == 0
    legal[:, 0] = True
    action = torch.multinomial(legal.float(), 1, generator=g)[:, 0]
    return dict(obs=obs, legal=legal, action=action, advantage=torch.randn(64, generator=g) + (action % 2) * 2.0)


def _entropy(fixed):
    torch.manual_seed(36)
    model = Policy()

    def loss_fn(model, b):
        logits = model(b["obs"], b["legal"])
        logp, p = F.log_softmax(logits, -1), F.softmax(logits, -1)
        plogp = p * (logp.masked_fill(~b["legal"], 0.0) if fixed else logp)
        chosen = logp.gather(1, b["action"][:, None])[:, 0]
        return -(chosen * b["advantage"]).mean() + 0.01 * plogp.sum(-1).mean()
    return dict(model=model, batch=_boards(), loss_fn=loss_fn, optimizer=_adam(model, 1e-2),
                kind=("operation",), place=("mul", "loss"), curable=False, cure=None,
                wrong="p * log p of illegal moves: 0 * -inf")


def fault_entropy():
    return _entropy(False)


def twin_entropy():
    return _entropy(True)


# 37 ---- SAC: log(1 - tanh(u) ** 2)
class Actor(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, s):
        mu, log_std = self.body(s).chunk(2, -1)
        return mu, (log_std + 1.0).clamp(-5, 2)


def _sac(fixed):
    torch.manual_seed(37)
    actor = Actor()
    state = torch.randn(128, 6)
    best = torch.tanh(state[:, :2])

    def loss_fn(model, state):
        mu, log_std = model(state)
        dist = torch.distributions.Normal(mu, log_std.exp())
        u = dist.rsample()
        a = torch.tanh(u)
        if fixed:
            squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
        else:
            squash = torch.log(1 - a ** 2)
        logp = (dist.log_prob(u) - squash).sum(-1)
        q = -((a - best) ** 2).sum(-1)
        return (0.1 * logp - q).mean()
    return dict(model=actor, batch=state, loss_fn=loss_fn, optimizer=_adam(actor, 1e-2),
                kind=("operation",), place=("log",), curable=False, cure=None,
                wrong="log(1 - tanh(u) ** 2) where tanh is 1 in float32")


def fault_sac():
    return _sac(False)


def twin_sac():
    return _sac(True)


# 38 ---- GCN: a node without neighbours
class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(13, 24), nn.Linear(24, 3)

    def forward(self, x, adj):
        d = adj.sum(1).pow(-0.5)
        a = d[:, None] * adj * d[None]
        return a @ self.w2(F.relu(a @ self.w1(x)))


def _gcn(fixed):
    torch.manual_seed(38)
    d = load_wine()
    x = _t(_z(d.data))
    adj = (torch.cdist(x, x) < 2.6).float().fill_diagonal_(1.0 if fixed else 0.0)
    model = GCN()
    return dict(model=model, batch=dict(x=x, adj=adj, y=torch.tensor(d.target)),
                loss_fn=lambda model, b: F.cross_entropy(model(b["x"], b["adj"]), b["y"]), optimizer=_adam(model, 1e-2),
                kind=("operation", "input"), place=("pow", "mul", "adj"), curable=True,
                cure="batch['adj'] = batch['adj'] + torch.eye(len(batch['adj']))",
                wrong="nodes without neighbours: 0 ** -0.5 is inf, and times 0 NaN")


def fault_gcn():
    return _gcn(False)


def twin_gcn():
    return _gcn(True)


# 39 ---- BPR on wide embeddings
class Matcher(nn.Module):
    def __init__(self, n_user, n_item, k, sparse=False):
        super().__init__()
        self.user, self.item = nn.Embedding(n_user, k, sparse=sparse), nn.Embedding(n_item, k, sparse=sparse)

    def forward(self, u, i):
        return (self.user(u) * self.item(i)).sum(-1)


def _bpr(fixed):
    torch.manual_seed(39)
    model = Matcher(60, 80, 1024, sparse=True)
    u, i, j = torch.randint(60, (256,)), torch.randint(40, (256,)), torch.randint(40, 80, (256,))

    def loss_fn(model, batch):
        u, i, j = batch
        diff = model(u, i) - model(u, j)
        return -F.logsigmoid(diff).mean() if fixed else -torch.log(torch.sigmoid(diff)).mean()
    return dict(model=model, batch=(u, i, j), loss_fn=loss_fn, optimizer=torch.optim.SparseAdam(list(model.parameters()), lr=1e-2),
                kind=("loss", "weights"), place=("log", "sigmoid", "loss", "user", "item"), curable=True,
                cure="with torch.no_grad():\n    model.user.weight.mul_(0.03); model.item.weight.mul_(0.03)",
                wrong="the log of a sigmoid that underflows: N(0, 1) embeddings of 1,024 give scores of 100")


def fault_bpr():
    return _bpr(False)


def twin_bpr():
    return _bpr(True)


# 40 ---- Cox regression on raw covariates
def _cox(fixed):
    torch.manual_seed(40)
    d = load_wine()
    x = _z(d.data) if fixed else d.data
    rng = np.random.default_rng(40)
    t = rng.exponential(np.exp(-_z(d.data)[:, 0] - _z(d.data)[:, 6]))
    order = np.argsort(-t)
    model = nn.Linear(13, 1, bias=False)
    batch = dict(x=_t(x[order]), event=_t(rng.random(len(t))[order] < 0.7))

    def loss_fn(model, b):
        risk = model(b["x"])[:, 0]
        at_risk = torch.logcumsumexp(risk, 0) if fixed else torch.log(torch.cumsum(torch.exp(risk), 0))
        return -((risk - at_risk) * b["event"]).sum() / b["event"].sum()
    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=_adam(model, 5e-3),
                kind=("loss", "input", "operation"), place=("exp", "log", "cumsum", "batch['x']"), curable=True,
                cure="x = batch['x']; batch['x'] = (x - x.mean(0)) / x.std(0)",
                wrong="exp of risks of more than 88, which unscaled covariates give, instead of logcumsumexp")


def fault_cox():
    return _cox(False)


def twin_cox():
    return _cox(True)


# 41 ---- Poisson
def _poisson(log_input):
    torch.manual_seed(41)
    d = load_diabetes()
    x = _t(_z(d.data))
    y = torch.poisson(torch.exp(0.5 + 0.6 * x[:, 2] + 0.4 * x[:, 8]))
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    return dict(model=model, batch=(x, y),
                loss_fn=lambda model, b: F.poisson_nll_loss(model(b[0]).squeeze(1), b[1], log_input=log_input), optimizer=_adam(model, 5e-3),
                kind=("loss", "operation"), place=("loss", "log", "poisson_nll_loss"), curable=True,
                cure="def loss_fn(model, b):\n    return F.poisson_nll_loss(model(b[0]).squeeze(1), b[1], log_input=True)",
                wrong="log_input=False with outputs that may be negative: the log of a negative rate")


def fault_poisson():
    return _poisson(False)


def twin_poisson():
    return _poisson(True)


# 42 ---- mixture density network
class MDN(nn.Module):
    def __init__(self, k=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 32), nn.Tanh())
        self.pi, self.mu, self.log_sigma = nn.Linear(32, k), nn.Linear(32, k), nn.Linear(32, k)

    def forward(self, x):
        h = self.body(x)
        return self.pi(h), self.mu(h), self.log_sigma(h)


def _mdn(fixed):
    torch.manual_seed(42)
    d = load_diabetes()
    model = MDN()

    def loss_fn(model, batch):
        pi, mu, log_sigma = model(batch[0])
        y = batch[1][:, None]
        if fixed:
            logpdf = -0.5 * ((y - mu) / log_sigma.exp()) ** 2 - log_sigma - 0.5 * math.log(2 * math.pi)
            return -torch.logsumexp(F.log_softmax(pi, 1) + logpdf, 1).mean()
        pdf = torch.exp(-0.5 * ((y - mu) / log_sigma.exp()) ** 2) / (log_sigma.exp() * math.sqrt(2 * math.pi))
        return -torch.log((F.softmax(pi, 1) * pdf).sum(1)).mean()
    return dict(model=model, batch=(_t(_z(d.data)), _t(_z(d.target) if fixed else d.target)), loss_fn=loss_fn, optimizer=_adam(model, 5e-3),
                kind=("target", "loss", "operation"), place=("log", "exp", "batch[1]", "loss"), curable=True,
                cure="y = batch[1]; batch = (batch[0], (y - y.mean()) / y.std())",
                wrong="densities of targets near 150 underflow under components near 0, and log(0) follows")


def fault_mdn():
    return _mdn(False)


def twin_mdn():
    return _mdn(True)


# 43 ---- REINFORCE, the sign
def _reinforce(sign):
    torch.manual_seed(43)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
    obs = torch.randn(128, 4)
    action = torch.randint(3, (128,))
    reward = 0.1 + (action == obs[:, :3].argmax(1)).float()

    def loss_fn(model, b):
        dist = torch.distributions.Categorical(logits=model(b["obs"]))
        return sign * (dist.log_prob(b["action"]) * b["return"]).mean()
    return dict(model=model, batch={"obs": obs, "action": action, "return": reward}, loss_fn=loss_fn, optimizer=_adam(model, 1e-2),
                wrong_end=True,  # falls without bound: actions that were rewarded become impossible
                kind=("loss",), place=("loss",), curable=True,
                cure="old = loss_fn\ndef loss_fn(model, b):\n    return -old(model, b)",
                wrong="the policy gradient without its minus: rewarded actions are made unlikely")


def fault_reinforce():
    return _reinforce(1)


def twin_reinforce():
    return _reinforce(-1)


# 44 ---- PINN: the second derivative without create_graph
def _pinn(fixed):
    torch.manual_seed(44)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss_fn(model, x):
        x = x.clone().requires_grad_()
        u = model(x)
        u_x, = torch.autograd.grad(u.sum(), x, create_graph=True)
        u_xx, = torch.autograd.grad(u_x.sum(), x, create_graph=fixed)
        residual = u_xx + math.pi ** 2 * torch.sin(math.pi * x)
        edges = model(torch.tensor([[-1.0], [1.0]]))
        return (residual ** 2).mean() + (edges ** 2).mean()
    return dict(model=model, batch=torch.linspace(-1, 1, 64)[:, None], loss_fn=loss_fn, optimizer=_adam(model, 1e-2),
                kind=("gradient",), place=("autograd.grad", "create_graph", "loss", "detach"), curable=False, cure=None,
                wrong="the second derivative is taken without create_graph=True: the residual is a constant to the optimizer")


def fault_pinn():
    return _pinn(False)


def twin_pinn():
    return _pinn(True)


# 45 ---- IoU of boxes that never meet
class Boxer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.box = nn.Linear(512, 4)

    def forward(self, x):
        cx, cy, w, h = torch.sigmoid(self.box(self.conv(x).flatten(1))).unbind(1)
        return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)


def _iou_loss(model, batch):
    x, t = batch
    p = model(x)
    wh = (torch.minimum(p[:, 2:], t[:, 2:]) - torch.maximum(p[:, :2], t[:, :2])).clamp(min=0)
    inter = wh.prod(1)
    area = (p[:, 2:] - p[:, :2]).prod(1) + (t[:, 2:] - t[:, :2]).prod(1)
    return (1 - inter / (area - inter)).mean()


def _iou(fixed):
    torch.manual_seed(45)
    rng = np.random.default_rng(45)
    n, img, boxes = 48, np.zeros((48, 1, 8, 8)), np.zeros((48, 4))
    for i in range(n):
        w, h = rng.integers(3, 6, 2)
        a, b = rng.integers(1, 8 - w), rng.integers(1, 8 - h)
        img[i, 0, b:b + h, a:a + w] = 1
        boxes[i] = a, b, a + w, b + h
    boxes = boxes / 8 if fixed else boxes * 40
    model = Boxer()
    return dict(model=model, batch=(_t(img), _t(boxes)), loss_fn=_iou_loss, optimizer=_adam(model, 5e-3),
                kind=("target", "gradient", "loss"), place=("batch[1]", "clamp", "loss"), curable=True, cure="batch = (batch[0], batch[1] / 320)",
                wrong="predicted boxes are in [0, 1] and the targets in pixels: no overlap, and the clamp's derivative is 0")


def fault_iou():
    return _iou(False)


def twin_iou():
    return _iou(True)


# 46 ---- matrix factorisation, both factors zero
class Factors(nn.Module):
    def __init__(self, zero):
        super().__init__()
        self.user, self.item = nn.Embedding(50, 6), nn.Embedding(40, 6)
        self.user_bias, self.item_bias = nn.Embedding(50, 1), nn.Embedding(40, 1)
        for e in (self.user, self.item):
            nn.init.zeros_(e.weight) if zero else nn.init.normal_(e.weight, std=0.3)
        for e in (self.user_bias, self.item_bias):
            nn.init.zeros_(e.weight)

    def forward(self, u, i):
        return (self.user(u) * self.item(i)).sum(1) + self.user_bias(u)[:, 0] + self.item_bias(i)[:, 0]


def _factors(zero):
    torch.manual_seed(46)
    model = Factors(zero)
    a, b = torch.randn(50, 3), torch.randn(40, 3)
    u, i = torch.meshgrid(torch.arange(50), torch.arange(40), indexing="ij")
    r = a @ b.T
    r = (r - r.mean(0) - r.mean(1, keepdim=True) + r.mean()).flatten()  # what users and items like on average is out already
    return dict(model=model, batch=dict(user=u.flatten(), item=i.flatten(), rating=r),
                loss_fn=lambda model, b: F.mse_loss(model(b["user"], b["item"]), b["rating"]), optimizer=_adam(model, 3e-2),
                kind=("weights",), place=("user", "item"), curable=True,
                cure="nn.init.normal_(model.user.weight, std=0.3); nn.init.normal_(model.item.weight, std=0.3)",
                wrong="user and item factors both start at 0: each one's gradient is the other")


def fault_factors():
    return _factors(True)


def twin_factors():
    return _factors(False)


# 47 ---- distillation: the optimizer has the teacher's parameters
class Distiller(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher.eval()
        self.student = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x):
        with torch.no_grad():
            soft = self.teacher(x)
        return self.student(x), soft


def _distil(fixed):
    torch.manual_seed(47)
    x, y = _digits()
    x = x / 16
    teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = _adam(teacher, 1e-2)
    for _ in range(20):
        opt.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        opt.step()
    opt.zero_grad()
    model = Distiller(teacher)

    def loss_fn(model, x):
        s, t = model(x)
        return F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean") * 4
    return dict(model=model, batch=x, loss_fn=loss_fn, optimizer=_adam(model.student if fixed else model.teacher, 5e-3),
                kind=("optimizer",), place=("optimizer", "student"), curable=True,
                cure="optimizer = torch.optim.Adam(model.student.parameters(), lr=5e-3)",
                wrong="the optimizer was given the teacher's parameters, not the student's")


def fault_distil():
    return _distil(False)


def twin_distil():
    return _distil(True)


# 48 ---- normalising flow, the sign of the log-determinant
class Coupling(nn.Module):
    def __init__(self, flip):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
        self.flip = flip

    def forward(self, x):
        a, b = x[:, :1], x[:, 1:]
        if self.flip:
            a, b = b, a
        s, t = self.net(a).chunk(2, 1)
        b = b * torch.exp(s) + t
        return torch.cat([b, a] if self.flip else [a, b], 1), s.sum(1)


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([Coupling(i % 2) for i in range(4)])

    def forward(self, x):
        logdet = 0
        for s in self.steps:
            x, d = s(x)
            logdet = logdet + d
        return x, logdet


def _flow(sign):
    torch.manual_seed(48)
    model = Flow()

    def loss_fn(model, x):
        z, logdet = model(x)
        logp = -0.5 * (z ** 2 + math.log(2 * math.pi)).sum(1)
        return -(logp + sign * logdet).mean()
    return dict(model=model, batch=_t(_z(make_moons(200, noise=0.05, random_state=1)[0])), loss_fn=loss_fn, optimizer=_adam(model, 2e-2),
                wrong_end=True,  # falls without bound: everything is squeezed to a point
                kind=("loss",), place=("loss",), curable=False, cure=None,
                wrong="the log-determinant is subtracted: the flow is rewarded for squeezing everything to a point")


def fault_flow():
    return _flow(-1)


def twin_flow():
    return _flow(1)


# 49 ---- LoRA, alpha // r
class LoRA(nn.Module):
    def __init__(self, base, r, scaling):
        super().__init__()
        self.base = base
        base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(base.in_features, r) / r)
        self.lora_b = nn.Parameter(torch.zeros(r, base.out_features))
        self.scaling = scaling

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.lora_a @ self.lora_b)


def _lora(scaling):
    torch.manual_seed(49)
    x, y = _digits(512)
    x = x / 16
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    opt = _adam(net, 1e-2)
    low = y[:256] < 5
    for _ in range(30):  # pretrained on 0 to 4
        opt.zero_grad()
        F.cross_entropy(net(x[:256][low]), y[:256][low]).backward()
        opt.step()
    opt.zero_grad()
    net[0], net[2] = LoRA(net[0], 8, scaling), LoRA(net[2], 8, scaling)
    return dict(model=net, batch=(x[256:], y[256:]), loss_fn=lambda model, b: F.cross_entropy(model(b[0]), b[1]),
                optimizer=torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3),
                kind=("gradient", "operation", "weights"), place=("mul", "lora", "scaling"), curable=True,
                cure="for m in (model[0], model[2]): m.scaling = 0.5",
                wrong="LoRA's scaling is alpha // r, 4 // 8 = 0: the update counts for nothing")


def fault_lora():
    return _lora(4 // 8)


def twin_lora():
    return _lora(4 / 8)


# 50 ---- a Function of one's own whose backward forgets the chain rule
class SwishFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output):
        x, = ctx.saved_tensors
        s = torch.sigmoid(x)
        return s + x * s * (1 - s)


class Swish(nn.Module):
    def forward(self, x):
        return SwishFn.apply(x)


def _swish(act):
    torch.manual_seed(50)
    d = load_diabetes()
    model = nn.Sequential(nn.Linear(10, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 1))
    return dict(model=model, batch=(_t(_z(d.data)), _t(_z(d.target))[:, None]),
                loss_fn=lambda model, b: F.mse_loss(model(b[0]), b[1]), optimizer=torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
                kind=("gradient",), place=("Swish", "1", "3", "5"), curable=True,
                cure="model[1] = model[3] = model[5] = nn.SiLU()",
                wrong="the backward of SwishFn does not multiply by grad_output")


def fault_swish():
    return _swish(Swish)


def twin_swish():
    return _swish(nn.SiLU)


# 54 ---- DQN: (n, 1) minus (n,)
def _dqn(fixed):
    torch.manual_seed(54)
    q = nn.Sequential(nn.Linear(5, 48), nn.ReLU(), nn.Linear(48, 3))
    frozen = copy.deepcopy(q).requires_grad_(False)
    s, a = torch.randn(200, 5), torch.randint(3, (200,))
    batch = dict(s=s, a=a, r=1.5 * s[:, 0] - (a == 2) * s[:, 1], s2=s + 0.1 * torch.randn(200, 5), done=(torch.rand(200) < 0.3).float())

    def loss_fn(model, b):
        q_sa = model(b["s"]).gather(1, b["a"].unsqueeze(1))
        if fixed:
            q_sa = q_sa.squeeze(1)
        y = b["r"] + 0.9 * (1 - b["done"]) * frozen(b["s2"]).max(1).values
        return ((q_sa - y) ** 2).mean()
    return dict(model=q, batch=batch, loss_fn=loss_fn, optimizer=_adam(q, 1e-2),
                kind=("loss", "operation"), place=("loss", "sub", "batch['r']"), curable=False, cure=None,
                wrong="Q values of shape (n, 1) minus targets of shape (n,): every pair is compared, and all learn the mean")


def fault_dqn():
    return _dqn(False)


def twin_dqn():
    return _dqn(True)


# 55 ---- a coordinate network on pixel coordinates
class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))

    def forward(self, xy):
        return self.net(xy)[:, 0]


def _coords(scale):
    torch.manual_seed(55)
    g = torch.linspace(-1, 1, 24)
    u, v = torch.meshgrid(g, g, indexing="ij")
    value = torch.tanh(2 * u) + 0.5 * v - 0.5 * u * v
    xy = torch.stack([u.flatten(), v.flatten()], 1)
    if scale:
        xy = (xy + 1) / 2 * scale + 3000  # a tile far from the map's corner
    model = Image()
    return dict(model=model, batch={"xy": xy, "value": value.flatten()}, loss_fn=lambda m, b: F.mse_loss(m(b["xy"]), b["value"]),
                optimizer=_adam(model, 5e-3), kind=("input",), place=("batch['xy']", "xy"), curable=True,
                cure="x = batch['xy']; batch['xy'] = (x - x.mean(0)) / x.std(0)",
                wrong="coordinates of 3,000 to 3,500: every tanh is saturated, and all pixels look the same")


def fault_coords():
    return _coords(500)


def twin_coords():
    return _coords(0)


# 56 ---- weight_norm after the optimizer was made
def _weightnorm(fixed):
    torch.manual_seed(56)
    x, y = _digits(200)
    model = nn.Sequential(nn.Linear(64, 48), nn.ELU(), nn.Linear(48, 10, bias=False))

    def wrap():
        for i in (0, 2):
            nn.utils.parametrizations.weight_norm(model[i])
    if fixed:
        wrap()
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    if not fixed:
        wrap()
    return dict(model=model, batch=(x / 8 - 1, y), loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1]), optimizer=opt,
                kind=("optimizer",), place=("optimizer", "parametrizations", "weight"), curable=True,
                cure="optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)",
                wrong="weight_norm replaced the weights after the optimizer had been made: it steps the old ones")


def fault_weightnorm():
    return _weightnorm(False)


def twin_weightnorm():
    return _weightnorm(True)
