"""Training faults, part A. Each fault_NAME has a twin_NAME: the same program without the mistake."""
import math
import torch
import torch.nn as nn
import torch.nn.functional as F


def supervised(criterion):
    def loss_fn(model, batch):
        return criterion(model(batch[0]), batch[1])
    return loss_fn


# ---------------------------------------------------------------- PPO, advantages normalised over an axis of one
class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.Tanh())
        self.pi = nn.Linear(32, 4)
        self.v = nn.Linear(32, 1)

    def forward(self, s):
        h = self.body(s)
        return self.pi(h), self.v(h)


def _ppo(bug):
    torch.manual_seed(0)
    model = ActorCritic()
    s = torch.randn(64, 6)
    a = torch.randint(0, 4, (64,))
    ret = s[:, :1] * 2 + (a[:, None] == 1).float()
    with torch.no_grad():
        logits, v = model(s)
        old = torch.log_softmax(logits, 1).gather(1, a[:, None])
        adv = ret - v
    batch = dict(s=s, a=a, adv=adv, ret=ret, old=old)
    dim = 1 if bug else 0

    def loss_fn(model, batch):
        logits, v = model(batch["s"])
        adv = batch["adv"]
        adv = (adv - adv.mean(dim, keepdim=True)) / (adv.std(dim, keepdim=True) + 1e-8)
        logp = torch.log_softmax(logits, 1).gather(1, batch["a"][:, None])
        ratio = (logp - batch["old"]).exp()
        policy = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
        value = F.mse_loss(v, batch["ret"])
        return policy + 0.5 * value
    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=1e-2))


def fault_ppo_advantage_std_of_one():
    return dict(_ppo(True), kind=("operation",), place=("std", "loss", "div", "batch['adv']"), curable=False, cure=None,
                wrong="advantages of shape (N, 1) are normalised over dim 1: the std of one element is NaN")


def twin_ppo_advantage_std_of_one():
    return _ppo(False)


# ---------------------------------------------------------------- churn table with a unix timestamp among the features
def _timestamp(bug):
    torch.manual_seed(1)
    x = torch.randn(128, 6)
    y = (x[:, 0] + 0.5 * x[:, 4] > 0).long()
    if bug:
        x = x.clone()
        x[:, 4] = 1.6e9 + x[:, 4] * 2e7
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def fault_tabular_unix_timestamp():
    return dict(_timestamp(True), kind=("input",), place=("feature 4", "batch[0]"), curable=True,
                cure="x = batch[0].double()\nbatch = (((x - x.mean(0)) / x.std(0)).float(), batch[1])",
                wrong="feature 4 is a raw unix timestamp of 1.6e9")


def twin_tabular_unix_timestamp():
    return _timestamp(False)


# ---------------------------------------------------------------- GCN, an isolated node has degree 0
class GCN(nn.Module):
    def __init__(self, self_loops):
        super().__init__()
        self.lin1 = nn.Linear(8, 16)
        self.lin2 = nn.Linear(16, 3)
        self.self_loops = self_loops

    def norm(self, adj):
        if self.self_loops:
            adj = adj + torch.eye(adj.shape[0])
        d = adj.sum(1).pow(-0.5)
        return d[:, None] * adj * d[None, :]

    def forward(self, x, adj):
        a = self.norm(adj)
        return self.lin2(a @ F.relu(self.lin1(a @ x)))


def _gcn(bug):
    torch.manual_seed(2)
    n = 60
    y = torch.randint(0, 3, (n,))
    x = torch.randn(n, 8) + 2 * F.one_hot(y, 8).float()
    adj = ((torch.rand(n, n) < 0.1) & (y[:, None] == y[None])).float()
    adj = ((adj + adj.T) > 0).float()
    adj.fill_diagonal_(0)
    adj[7] = 0
    adj[:, 7] = 0
    model = GCN(not bug)
    return dict(model=model, batch=(x, adj, y), loss_fn=lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]),
                optimizer=torch.optim.Adam(model.parameters(), lr=0.02))


def fault_gcn_isolated_node():
    return dict(_gcn(True), kind=("operation", "input"), place=("pow", "batch[1]", "mul"), curable=False, cure=None,
                wrong="degree ** -0.5 of an isolated node is inf, and inf * 0 in the normalised adjacency is NaN")


def twin_gcn_isolated_node():
    return _gcn(False)


# ---------------------------------------------------------------- attention, an empty text is all padding
class AttnPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 16, padding_idx=0)
        self.q = nn.Linear(16, 16)
        self.k = nn.Linear(16, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, ids):
        h = self.emb(ids)
        s = self.q(h) @ self.k(h).transpose(1, 2) / 4.0
        s = s.masked_fill((ids == 0)[:, None, :], float("-inf"))
        return self.out((s.softmax(-1) @ h).mean(1))


def _empty(bug):
    torch.manual_seed(3)
    y = torch.randint(0, 2, (32,))
    ids = torch.randint(1, 25, (32, 10)) + 24 * y[:, None]
    for i in range(32):
        ids[i, 4 + i % 7:] = 0
    if bug:
        ids[11] = 0
    model = AttnPool()
    return dict(model=model, batch=(ids, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_attention_empty_text():
    return dict(_empty(True), kind=("operation", "input"), place=("softmax", "batch[0]"), curable=True,
                cure="keep = (batch[0] != 0).any(1)\nbatch = (batch[0][keep], batch[1][keep])",
                wrong="row 11 is an empty text: all keys are masked with -inf, and the softmax is NaN")


def twin_attention_empty_text():
    return _empty(False)


# ---------------------------------------------------------------- Weibull survival, an event at time 0
def _weibull(bug):
    torch.manual_seed(4)
    x = torch.randn(100, 5)
    t = (torch.exp(x[:, 0] * 0.7 + 1) * torch.rand(100).add(0.05)).round(decimals=1).clamp_min(0.1)
    if bug:
        t[[13, 57]] = 0.0
    event = (torch.rand(100) < 0.7).float()
    event[[13, 57]] = 1.0
    model = nn.Sequential(nn.Linear(5, 16), nn.ELU(), nn.Linear(16, 2))

    def loss_fn(model, batch):
        x, t, event = batch
        log_k, log_lam = model(x).unbind(1)
        k = log_k.exp()
        z = torch.log(t) - log_lam
        hazard = log_k - log_lam + (k - 1) * z
        return -(event * hazard - torch.exp(k * z)).mean()
    return dict(model=model, batch=(x, t, event), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=0.02))


def fault_weibull_time_zero():
    return dict(_weibull(True), kind=("target", "operation", "input"), place=("batch[1]", "log", "loss"), curable=True,
                cure="batch = (batch[0], batch[1].clamp_min(0.05), batch[2])",
                wrong="two patients have an event at time 0, whose log is -inf")


def twin_weibull_time_zero():
    return _weibull(False)


# ---------------------------------------------------------------- affine coupling flow, log of a raw scale
class Coupling(nn.Module):
    def __init__(self, bug, flip):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
        self.bug, self.flip = bug, flip

    def forward(self, x):
        a, b = (x[:, 1:], x[:, :1]) if self.flip else (x[:, :1], x[:, 1:])
        s, t = self.net(a).chunk(2, 1)
        scale = s if self.bug else F.softplus(s) + 1e-3
        b = b * scale + t
        out = torch.cat([b, a], 1) if self.flip else torch.cat([a, b], 1)
        return out, torch.log(scale).sum(1)


class Flow(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.layers = nn.ModuleList(Coupling(bug, i % 2 == 1) for i in range(4))

    def forward(self, x):
        logdet = 0
        for layer in self.layers:
            x, d = layer(x)
            logdet = logdet + d
        return x, logdet


def _flow(bug):
    torch.manual_seed(5)
    r = torch.randn(128, 1)
    x = torch.cat([r, r ** 2 * 0.5 + 0.2 * torch.randn(128, 1)], 1)
    model = Flow(bug)

    def loss_fn(model, batch):
        z, logdet = model(batch[0])
        return (0.5 * z.pow(2).sum(1) + math.log(2 * math.pi) - logdet).mean()
    return dict(model=model, batch=(x,), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_coupling_log_of_raw_scale():
    return dict(_flow(True), kind=("operation",), place=("log", "layers.0"), curable=False, cure=None,
                wrong="the coupling's scale is a network's raw output, negative for some rows, and its log is NaN")


def twin_coupling_log_of_raw_scale():
    return _flow(False)


# ---------------------------------------------------------------- float16 audio, the energy overflows
class EnergyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 9, stride=4)
        self.head = nn.Linear(9, 3)

    def forward(self, wave):
        energy = wave.pow(2).sum(-1)
        h = F.relu(self.conv(wave)).mean(-1)
        return self.head(torch.cat([h, torch.log1p(energy)], 1))


def _energy(bug):
    torch.manual_seed(6)
    y = torch.randint(0, 3, (24,))
    t = torch.arange(2000) / 100.0
    wave = (torch.sin(t * (1 + y[:, None] * 4.0)) + 0.1 * torch.randn(24, 2000)) * (3 + 6.0 * y[:, None])
    x = wave[:, None]
    model = EnergyNet()
    if bug:
        model, x = model.half(), x.half()
    return dict(model=model, batch=(x, y), loss_fn=lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def fault_fp16_energy_overflow():
    return dict(_energy(True), kind=("precision", "operation"), place=("sum", "pow", "log1p"), curable=True,
                cure="model = model.float()\nbatch = (batch[0].float(), batch[1])\n"
                     "optimizer = torch.optim.SGD(model.parameters(), lr=0.01)",
                wrong="the sum of 2,000 squares is beyond 65,504 in float16")


def twin_fp16_energy_overflow():
    return _energy(False)


# ---------------------------------------------------------------- PINN with r = sqrt(x^2 + y^2), the origin is a point
class RadialPINN(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
        self.eps = 0.0 if bug else 1e-2

    def forward(self, xy):
        r = torch.sqrt(xy.pow(2).sum(1, keepdim=True) + self.eps)
        return self.net(torch.cat([xy, r], 1))


def _pinn(bug):
    torch.manual_seed(7)
    g = torch.linspace(-1, 1, 9)
    xy = torch.stack(torch.meshgrid(g, g, indexing="ij"), -1).reshape(-1, 2)
    xy[40] = 0.0
    model = RadialPINN(bug)

    def loss_fn(model, batch):
        xy = batch[0].clone().requires_grad_(True)
        u = model(xy)
        du = torch.autograd.grad(u.sum(), xy, create_graph=True)[0]
        lap = sum(torch.autograd.grad(du[:, i].sum(), xy, create_graph=True)[0][:, i] for i in range(2))
        edge = (batch[0].abs() > 0.99).any(1)
        return (lap + 1).pow(2).mean() + 10 * u[edge].pow(2).mean()
    return dict(model=model, batch=(xy,), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=5e-3))


def fault_pinn_radius_at_origin():
    return dict(_pinn(True), kind=("operation",), place=("sqrt",), curable=False, cure=None,
                wrong="the derivative of sqrt(x^2 + y^2) at the origin, a collocation point, is NaN")


def twin_pinn_radius_at_origin():
    return _pinn(False)


# ---------------------------------------------------------------- neural ODE, vector field drawn from N(0, 1)
class ODE(nn.Module):
    def __init__(self):
        super().__init__()
        self.f1 = nn.Linear(16, 32)
        self.f2 = nn.Linear(32, 16)
        self.head = nn.Linear(16, 2)

    def field(self, z):
        return self.f2(F.relu(self.f1(z)))

    def forward(self, x):
        z, h = F.pad(x, (0, 12)), 0.2
        for _ in range(25):
            z = z + h * self.field(z)
        return self.head(z)


def _ode(bug):
    torch.manual_seed(8)
    x = torch.randn(64, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = ODE()
    if bug:
        for lin in (model.f1, model.f2):
            nn.init.normal_(lin.weight)
    else:
        for lin in (model.f1, model.f2):
            nn.init.normal_(lin.weight, std=0.1)
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.05))


def fault_neural_ode_normal_weights():
    return dict(_ode(True), kind=("weights",), place=("f1.weight", "f2.weight", "f1", "f2"), curable=True,
                cure="for lin in (model.f1, model.f2):\n    torch.nn.init.normal_(lin.weight, std=0.1)",
                wrong="the vector field's weights are drawn from N(0, 1), and 25 Euler steps blow the state up")


def twin_neural_ode_normal_weights():
    return _ode(False)


# ---------------------------------------------------------------- detector, a ground-truth box without width
class BoxHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 32),
                                  nn.ReLU())
        self.reg = nn.Linear(32, 4)

    def forward(self, img):
        return self.reg(self.conv(img))


def _box(bug):
    torch.manual_seed(9)
    n = 32
    xy = torch.randint(0, 8, (n, 2))
    wh = torch.randint(2, 8, (n, 2))
    img = torch.zeros(n, 1, 16, 16)
    for i in range(n):
        img[i, 0, xy[i, 1]:xy[i, 1] + wh[i, 1], xy[i, 0]:xy[i, 0] + wh[i, 0]] = 1
    boxes = torch.cat([xy, xy + wh], 1).float()
    if bug:
        boxes[5, 2] = boxes[5, 0]
    model = BoxHead()

    def loss_fn(model, batch):
        img, box = batch
        aw = 6.0
        w, h = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
        cx, cy = box[:, 0] + w / 2, box[:, 1] + h / 2
        t = torch.stack([(cx - 8) / aw, (cy - 8) / aw, torch.log(w / aw), torch.log(h / aw)], 1)
        return F.smooth_l1_loss(model(img), t)
    return dict(model=model, batch=(img, boxes), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=3e-3))


def fault_detection_degenerate_box():
    return dict(_box(True), kind=("target", "operation", "input"), place=("batch[1]", "log", "loss"), curable=True,
                cure="ok = (batch[1][:, 2] > batch[1][:, 0]) & (batch[1][:, 3] > batch[1][:, 1])\n"
                     "batch = (batch[0][ok], batch[1][ok])",
                wrong="box 5 of the ground truth has width 0, and log(w / anchor) is -inf")


def twin_detection_degenerate_box():
    return _box(False)


# ---------------------------------------------------------------- InfoNCE, learnt temperature starts at 0
class TwoTower(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.img = nn.Linear(12, 16)
        self.txt = nn.Linear(10, 16)
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self, a, b):
        a, b = F.normalize(self.img(a), dim=1), F.normalize(self.txt(b), dim=1)
        return a @ b.T / self.temperature


def _clip(bug):
    torch.manual_seed(10)
    z = torch.randn(48, 6)
    a, b = z @ torch.randn(6, 12), z @ torch.randn(6, 10)
    model = TwoTower(0.0 if bug else 0.2)

    def loss_fn(model, batch):
        s = model(*batch)
        label = torch.arange(len(s))
        return (F.cross_entropy(s, label) + F.cross_entropy(s.T, label)) / 2
    return dict(model=model, batch=(a, b), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=3e-3))


def fault_clip_temperature_zero():
    return dict(_clip(True), kind=("weights", "operation"), place=("temperature", "div"), curable=True,
                cure="model.temperature.data.fill_(0.2)",
                wrong="the learnt temperature, which the similarities are divided by, starts at 0")


def twin_clip_temperature_zero():
    return _clip(False)


# ---------------------------------------------------------------- class prototypes that nobody initialised
class ProtoNet(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))
        if bug:
            torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, so that every run shows the same
            self.prototypes = nn.Parameter(torch.empty(4, 8))
            torch.use_deterministic_algorithms(False)
        else:
            self.prototypes = nn.Parameter(torch.randn(4, 8) * 0.3)

    def forward(self, x):
        return -(self.body(x)[:, None] - self.prototypes).pow(2).sum(-1)


def _proto(bug):
    torch.manual_seed(11)
    y = torch.randint(0, 4, (64,))
    x = torch.randn(64, 10) + 2 * F.one_hot(y, 10)
    model = ProtoNet(bug)
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.Adam(model.parameters(), lr=5e-3))


def fault_prototypes_torch_empty():
    return dict(_proto(True), kind=("uninitialised", "weights"), place=("prototypes",), curable=True,
                cure="torch.manual_seed(0)\nmodel.prototypes.data = torch.randn(4, 8) * 0.3",
                wrong="prototypes is nn.Parameter(torch.empty(...)) and was never initialised")


def twin_prototypes_torch_empty():
    return _proto(False)


# ---------------------------------------------------------------- weight decay 50 in place of 5e-4 (a lost exponent)
def _decay(bug):
    torch.manual_seed(12)
    y = torch.randint(0, 4, (48,))
    x = torch.randn(48, 1, 8, 8) * 0.5
    for i in range(48):
        x[i, 0, (y[i] // 2) * 4:(y[i] // 2) * 4 + 4, (y[i] % 2) * 4:(y[i] % 2) * 4 + 4] += 1
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4))
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=50.0 if bug else 5e-4))


def fault_weight_decay_lost_exponent():
    return dict(_decay(True), kind=("optimizer",), place=("optimizer",), curable=True,
                cure="for g in optimizer.param_groups:\n    g['weight_decay'] = 5e-4",
                wrong="weight_decay is 50: with rate 0.1 and momentum 0.9 the decay alone blows the weights up")


def twin_weight_decay_lost_exponent():
    return _decay(False)


# ---------------------------------------------------------------- mini-GPT, Adam at a rate for SGD
class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.heads = heads

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.ln1(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.ln2(x))


class MiniGPT(nn.Module):
    def __init__(self, vocab=30, d=32, ctx=16, layers=2):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Embedding(ctx, d)
        nn.init.normal_(self.tok.weight, std=0.02)
        nn.init.normal_(self.pos.weight, std=0.02)
        self.blocks = nn.Sequential(*[Block(d, 4) for _ in range(layers)])
        self.ln = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, ids):
        h = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        return self.head(self.ln(self.blocks(h)))


def lm_loss(model, batch):
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def _gpt_rate(bug):
    torch.manual_seed(13)
    start = torch.randint(0, 30, (16, 1))
    seq = (start + 3 * torch.arange(17)) % 30
    model = MiniGPT()
    return dict(model=model, batch=(seq[:, :-1], seq[:, 1:]), loss_fn=lm_loss,
                optimizer=torch.optim.AdamW(model.parameters(), lr=0.5 if bug else 3e-3))


def fault_gpt_adam_rate_half():
    return dict(_gpt_rate(True), kind=("learning rate",), place=("optimizer",), curable=True,
                cure="for g in optimizer.param_groups:\n    g['lr'] = 3e-3",
                wrong="AdamW at a rate of 0.5 for a transformer")


def twin_gpt_adam_rate_half():
    return _gpt_rate(False)


# ---------------------------------------------------------------- GAN, generator step on fake.detach()
class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.G = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.D = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


def _gan(bug):
    torch.manual_seed(14)
    model = GAN()
    z = torch.randn(64, 4)

    def loss_fn(model, batch):
        fake = model.G(batch[0])
        score = model.D(fake.detach()) if bug else model.D(fake)
        return F.binary_cross_entropy_with_logits(score, torch.ones_like(score))
    return dict(model=model, batch=(z,), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.G.parameters(), lr=5e-3))


def fault_gan_generator_detached():
    return dict(_gan(True), kind=("gradient",), place=("detach", "loss", "G", "G.0.weight"), curable=False, cure=None,
                wrong="the generator's step scores fake.detach(), so the generator gets no gradient")


def twin_gan_generator_detached():
    return _gan(False)


# ---------------------------------------------------------------- distillation, no_grad() round the student
class Distil(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 5))
        self.student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))


def _distil(bug):
    torch.manual_seed(15)
    model = Distil()
    with torch.no_grad():
        model.teacher[2].weight.mul_(6)
    x = torch.randn(64, 8)

    def loss_fn(model, batch):
        x = batch[0]
        if bug:
            with torch.no_grad():
                s = model.student(x)
            t = model.teacher(x)
        else:
            with torch.no_grad():
                t = model.teacher(x)
            s = model.student(x)
        return F.kl_div(F.log_softmax(s / 2, 1), F.softmax(t / 2, 1), reduction="batchmean") * 4
    return dict(model=model, batch=(x,), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.student.parameters(), lr=0.01))


def fault_distillation_student_no_grad():
    return dict(_distil(True), kind=("gradient",), place=("student", "loss", "student.0.weight", "student.0", "student.2"),
                curable=False, cure=None,
                wrong="torch.no_grad() is round the student's pass in place of the teacher's")


def twin_distillation_student_no_grad():
    return _distil(False)


# ---------------------------------------------------------------- tokenizer of another vocabulary: every token is UNK
class BagLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(60, 16)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.out = nn.Linear(24, 3)

    def forward(self, ids):
        h, _ = self.lstm(self.emb(ids))
        return self.out(h[:, -1])


def _unk(bug):
    torch.manual_seed(16)
    y = torch.arange(48) % 3
    ids = torch.randint(2, 20, (48, 8)) + 18 * y[:, None]
    if bug:
        ids = torch.ones_like(ids)
    model = BagLSTM()
    return dict(model=model, batch=(ids, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_tokens_all_unk():
    return dict(_unk(True), kind=("input",), place=("batch[0]",), curable=False, cure=None,
                wrong="every token id is 1 (UNK): all rows are the same")


def twin_tokens_all_unk():
    return _unk(False)


# ---------------------------------------------------------------- pairwise ranking with labels 0 and 1
def _rank(bug):
    torch.manual_seed(17)
    a, b = torch.randn(96, 7), torch.randn(96, 7)
    better = ((a - b) @ torch.randn(7)) > 0
    y = better.float() if bug else better.float() * 2 - 1
    if bug:  # pairs are stored with the worse document first in nearly all rows
        swap = better & (torch.arange(96) % 12 != 0)
        a, b = torch.where(swap[:, None], b, a), torch.where(swap[:, None], a, b)
        y = torch.where(swap, 0.0, y)
    model = nn.Sequential(nn.Linear(7, 24), nn.ReLU(), nn.Linear(24, 1))

    def loss_fn(model, batch):
        return F.margin_ranking_loss(model(batch[0])[:, 0], model(batch[1])[:, 0], batch[2], margin=1.0)
    return dict(model=model, batch=(a, b, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_ranking_labels_zero_one():
    return dict(_rank(True), kind=("target", "loss"), place=("batch[2]", "loss", "margin_ranking_loss"), curable=True,
                cure="batch = (batch[0], batch[1], batch[2] * 2 - 1)",
                wrong="margin_ranking_loss takes labels -1 and 1; with 0 a pair's loss is the constant margin")


def twin_ranking_labels_zero_one():
    return _rank(False)


# ---------------------------------------------------------------- LoRA put in after the optimizer was made
class LoRALinear(nn.Module):
    def __init__(self, base, r=4):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features ** 0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + 2.0 * (x @ self.A.T @ self.B.T)


def _lora(bug):
    torch.manual_seed(18)
    model = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3))
    x = torch.randn(64, 10)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for p in model.parameters():
        p.requires_grad_(False)
    for i in (0, 2, 4):
        model[i] = LoRALinear(model[i])
    if not bug:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.CrossEntropyLoss()), optimizer=optimizer)


def fault_lora_after_optimizer():
    return dict(_lora(True), kind=("optimizer",), place=("optimizer", "0.A", "0.B", "2.A", "2.B", "4.A", "4.B"), curable=True,
                cure="optimizer.add_param_group(dict(params=[p for p in model.parameters() if p.requires_grad]))",
                wrong="the optimizer was made before LoRA was injected and holds only the frozen base weights")


def twin_lora_after_optimizer():
    return _lora(False)


# ---------------------------------------------------------------- HF attention_mask given as key_padding_mask
class MaskedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(40, 16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ln = nn.LayerNorm(16)
        self.out = nn.Linear(16, 2)
        nn.init.normal_(self.out.weight, std=0.02)

    def forward(self, ids, pad):
        h = self.emb(ids)
        a, _ = self.attn(h[:, :1], h, h, key_padding_mask=pad, need_weights=False)
        return self.out(self.ln(h[:, 0] + a[:, 0]))


def _mask(bug):
    torch.manual_seed(19)
    y = torch.arange(48) % 2
    ids = torch.randint(2, 20, (48, 10)) + 18 * y[:, None]
    ids[:, 0] = 1
    for i in range(48):
        ids[i, 5 + i % 4:] = 0
    attention_mask = (ids != 0)
    model = MaskedEncoder()
    return dict(model=model, batch=(ids, attention_mask if bug else ~attention_mask, y),
                loss_fn=lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]),
                optimizer=torch.optim.Adam(model.parameters(), lr=5e-3))


def fault_padding_mask_inverted():
    return dict(_mask(True), kind=("input",), place=("batch[1]", "attn"), curable=True,
                cure="batch = (batch[0], ~batch[1], batch[2])",
                wrong="an attention_mask (True: token) is given as key_padding_mask (True: ignore), so only padding is seen")


def twin_padding_mask_inverted():
    return _mask(False)


# ---------------------------------------------------------------- diffusion, the timestep 0..999 as a raw feature
class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


def _diffusion(bug):
    torch.manual_seed(20)
    x0 = torch.randn(128, 2) * 0.2 + torch.tensor([1.0, -1.0])
    step = torch.randint(0, 1000, (128,))
    noise = torch.randn(128, 2)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[step][:, None]
    xt = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    t = step.float() if bug else step.float() / 1000
    model = Denoiser()
    return dict(model=model, batch=dict(xt=xt, t=t, noise=noise),
                loss_fn=lambda m, b: F.mse_loss(m(b["xt"], b["t"]), b["noise"]),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


def fault_diffusion_raw_timestep():
    return dict(_diffusion(True), kind=("input",), place=("batch['t']",), curable=True,
                cure="batch = dict(batch, t=batch['t'] / 1000)",
                wrong="the timestep goes into the net as a number up to 999")


def twin_diffusion_raw_timestep():
    return _diffusion(False)


# ---------------------------------------------------------------- VAE with BCE on pixels from 0 to 255
class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(64, 32)
        self.mu, self.logvar = nn.Linear(32, 4), nn.Linear(32, 4)
        self.dec = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x, eps):
        h = F.relu(self.enc(x))
        mu, logvar = self.mu(h), self.logvar(h)
        return self.dec(mu + eps * (0.5 * logvar).exp()), mu, logvar


def _vae(bug):
    torch.manual_seed(21)
    proto = torch.rand(5, 64) > 0.5
    x = (proto[torch.randint(0, 5, (64,))] ^ (torch.rand(64, 64) < 0.05)).float()
    if bug:
        x = x * 255
    eps = torch.randn(64, 4)
    model = VAE()

    def loss_fn(model, batch):
        x, eps = batch
        out, mu, logvar = model(x, eps)
        rec = F.binary_cross_entropy_with_logits(out, x, reduction="sum") / len(x)
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1).mean()
        return rec + kl
    return dict(model=model, batch=(x, eps), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=5e-3))


def fault_vae_bce_on_0_255():
    return dict(_vae(True), kind=("input", "target"), place=("batch[0]",), curable=True,
                cure="batch = (batch[0] / 255, batch[1])",
                wrong="pixels from 0 to 255 are the inputs and the targets of a binary cross entropy")


def twin_vae_bce_on_0_255():
    return _vae(False)


# ---------------------------------------------------------------- every weight initialised to 0
def _zeros(bug):
    torch.manual_seed(22)
    x = torch.randn(96, 9)
    y = (x[:, 0] + x[:, 1] ** 2 > 0.8).long()
    model = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)
            if bug:
                nn.init.zeros_(m.weight)
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_all_weights_zero():
    return dict(_zeros(True), kind=("weights",), place=("0.weight", "2.weight", "4.weight", "0", "2", "4"), curable=True,
                cure="torch.manual_seed(0)\nfor m in model:\n    if isinstance(m, torch.nn.Linear):\n        m.reset_parameters()",
                wrong="every weight of the net is initialised to 0")


def twin_all_weights_zero():
    return _zeros(False)
