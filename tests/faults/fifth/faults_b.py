"""Training faults, part B. Each fault_NAME has a twin_NAME: the same program without the mistake."""
import copy
import math
import torch
import torch.nn as nn
import torch.nn.functional as F


def supervised(criterion):
    def loss_fn(model, batch):
        return criterion(model(batch[0]), batch[1])
    return loss_fn


# ---------------------------------------------------------------- DQN on raw game scores
class DQN(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
        self.target = copy.deepcopy(self.online).requires_grad_(False)


def dqn_loss(model, batch):
    s, a, r, s2, done = batch
    q = model.online(s).gather(1, a[:, None])[:, 0]
    with torch.no_grad():
        y = r + 0.95 * (1 - done) * model.target(s2).max(1).values
    return F.mse_loss(q, y)


def _dqn(bug):
    torch.manual_seed(0)
    s, s2 = torch.randn(64, 6), torch.randn(64, 6)
    a = torch.randint(0, 3, (64,))
    r = s[:, 0] + (a == 1).float()
    if bug:
        r = (r * 2000 + 5000).round()
    done = (torch.rand(64) < 0.1).float()
    model = DQN()
    return dict(model=model, batch=(s, a, r, s2, done), loss_fn=dqn_loss,
                optimizer=torch.optim.SGD(model.online.parameters(), lr=0.1))


def fault_dqn_raw_scores():
    return dict(_dqn(True), kind=("target", "input"), place=("batch[2]",), curable=True,
                cure="r = batch[2]\nbatch = (*batch[:2], (r - r.mean()) / r.std(), *batch[3:])",
                wrong="rewards are raw game scores in the thousands")


def twin_dqn_raw_scores():
    return _dqn(False)


# ---------------------------------------------------------------- instruction tuning, every label is masked out
class TinyLM(nn.Module):
    def __init__(self, vocab=40, d=24):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.gru = nn.GRU(d, d, batch_first=True)
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        return self.head(self.gru(self.emb(ids))[0])


def _labels(bug):
    torch.manual_seed(1)
    ids = (torch.randint(0, 40, (16, 1)) + 2 * torch.arange(13)) % 40
    labels = ids.clone()
    labels[:, :40 if bug else 5] = -100  # the prompt's length, in characters in place of tokens
    model = TinyLM()

    def loss_fn(model, batch):
        logits = model(batch["input_ids"])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    return dict(model=model, batch=dict(input_ids=ids, labels=labels), loss_fn=loss_fn,
                optimizer=torch.optim.AdamW(model.parameters(), lr=0.01))


def fault_lm_every_label_ignored():
    return dict(_labels(True), kind=("target",), place=("batch['labels']",), curable=False, cure=None,
                wrong="every label is -100: the mean over no token is NaN")


def twin_lm_every_label_ignored():
    return _labels(False)


# ---------------------------------------------------------------- pinball loss with min in place of max
def _pinball(bug):
    torch.manual_seed(2)
    x = torch.randn(96, 5)
    y = x[:, :1] * 1.5 + torch.randn(96, 1) * 0.5
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 3))
    q = torch.tensor([0.1, 0.5, 0.9])
    pick = torch.minimum if bug else torch.maximum

    def loss_fn(model, batch):
        e = batch[1] - model(batch[0])
        return pick(q * e, (q - 1) * e).mean()
    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=0.02))


def fault_pinball_min():
    return dict(_pinball(True), kind=("loss",), place=("loss", "minimum"), curable=False, cure=None,
                wrong="the quantile loss takes the minimum of its two branches, and has no lower bound")


def twin_pinball_min():
    return _pinball(False)


# ---------------------------------------------------------------- heteroscedastic regression, variance is a raw output
class MeanVar(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 32), nn.Tanh())
        self.mean, self.var = nn.Linear(32, 1), nn.Linear(32, 1)
        self.bug = bug

    def forward(self, x):
        h = self.body(x)
        var = self.var(h)
        return self.mean(h), var if self.bug else F.softplus(var) + 1e-3


def _meanvar(bug):
    torch.manual_seed(3)
    x = torch.randn(96, 4)
    y = x[:, :1] * 2 + torch.randn(96, 1) * (0.2 + x[:, 1:2].abs())
    model = MeanVar(bug)

    def loss_fn(model, batch):
        mean, var = model(batch[0])
        return (0.5 * torch.log(var) + 0.5 * (batch[1] - mean).pow(2) / var).mean()
    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_variance_not_positive():
    return dict(_meanvar(True), kind=("operation", "loss"), place=("log", "var", "loss"), curable=False, cure=None,
                wrong="the variance is a linear layer's raw output: negative for some rows, and its log is NaN")


def twin_variance_not_positive():
    return _meanvar(False)


# ---------------------------------------------------------------- beta regression, shares of exactly 0 and 1
def _beta(bug):
    torch.manual_seed(4)
    x = torch.randn(80, 4)
    share = torch.sigmoid(1.5 * x[:, 0] + 0.3 * torch.randn(80))
    share = (share * 20).round() / 20
    share = share if bug else share.clamp(0.01, 0.99)
    model = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 2))

    def loss_fn(model, batch):
        a, b = (F.softplus(model(batch[0])) + 0.1).unbind(1)
        y = batch[1]
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        return -((a - 1) * torch.log(y) + (b - 1) * torch.log(1 - y) - log_beta).mean()
    return dict(model=model, batch=(x, share), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=0.02))


def fault_beta_shares_zero_one():
    return dict(_beta(True), kind=("target", "operation"), place=("batch[1]", "log", "loss"), curable=True,
                cure="batch = (batch[0], batch[1].clamp(0.01, 0.99))",
                wrong="some shares are exactly 0 or 1, where a beta density's log is infinite")


def twin_beta_shares_zero_one():
    return _beta(False)


# ---------------------------------------------------------------- ArcFace, acos of cosines that reach 1
class ArcHead(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.emb = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.weight = nn.Parameter(torch.randn(5, 8))
        self.eps = 0.0 if bug else 1e-4

    def forward(self, x, y):
        cos = F.normalize(self.emb(x), dim=1) @ F.normalize(self.weight, dim=1).T
        theta = torch.acos(cos.clamp(-1 + self.eps, 1 - self.eps))
        return 8 * torch.cos(theta + 0.2 * F.one_hot(y, 5))


def _arc(bug):
    torch.manual_seed(5)
    y = torch.randint(0, 5, (60,))
    x = torch.randn(60, 6) * 0.5 + 2 * F.one_hot(y, 6)
    model = ArcHead(bug)
    with torch.no_grad():  # class centres are taken from the embeddings of the first row of each class
        first = torch.stack([x[y == c][0] for c in range(5)])
        model.weight.copy_(F.normalize(model.emb(first), dim=1))
    return dict(model=model, batch=(x, y), loss_fn=lambda m, b: F.cross_entropy(m(b[0], b[1]), b[1]),
                optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_arcface_acos_at_one():
    return dict(_arc(True), kind=("operation",), place=("acos", "clamp"), curable=False, cure=None,
                wrong="acos of a cosine of 1 has an infinite slope: clamp(-1, 1) leaves the ends in")


def twin_arcface_acos_at_one():
    return _arc(False)


# ---------------------------------------------------------------- custom autograd function that returns no gradient
class GatherRows(torch.autograd.Function):
    """x[index] without the memory of advanced indexing."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, g):
        index, = ctx.saved_tensors
        grad = g.new_zeros(ctx.rows, g.shape[1])
        grad.index_add_(0, index, g)
        return grad, None


class GatherRowsNoUnderscore(torch.autograd.Function):
    """x[index] without the memory of advanced indexing."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, g):
        index, = ctx.saved_tensors
        grad = g.new_zeros(ctx.rows, g.shape[1])
        grad.index_add(0, index, g)
        return grad, None


class EdgeNet(nn.Module):
    def __init__(self, gather):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 6)
        self.gather = gather

    def forward(self, x, src, dst):
        h = self.fc2(torch.tanh(self.fc1(x)))
        return (self.gather(h, src) * self.gather(h, dst)).sum(1)


def _custom(bug):
    torch.manual_seed(6)
    group = torch.randint(0, 4, (40,))
    x = torch.randn(40, 8) * 0.5 + 1.5 * F.one_hot(group, 8)
    src, dst = torch.randint(0, 40, (2, 200))
    y = (group[src] == group[dst]).float()
    model = EdgeNet((GatherRowsNoUnderscore if bug else GatherRows).apply)
    return dict(model=model, batch=(x, src, dst, y),
                loss_fn=lambda m, b: F.binary_cross_entropy_with_logits(m(b[0], b[1], b[2]), b[3]),
                optimizer=torch.optim.Adam(model.parameters(), lr=0.02))


def fault_gather_backward_out_of_place():
    return dict(_custom(True), kind=("gradient",), place=("GatherRowsNoUnderscore", "GatherRowsNoUnderscoreBackward", "fc1",
                "fc2", "fc1.weight", "fc2.weight"), curable=False, cure=None,
                wrong="the custom function's backward calls index_add in place of index_add_ and returns zeros")


def twin_gather_backward_out_of_place():
    return _custom(False)


# ---------------------------------------------------------------- weight_norm of a zero-initialised layer
def _wn(bug):
    torch.manual_seed(7)
    x = torch.randn(64, 1, 32).cumsum(2) * 0.2
    y = (x[:, 0, -1:] - x[:, 0, :1])
    head = nn.Linear(128, 1)
    if bug:
        nn.init.zeros_(head.weight)  # start from a prediction of 0
    model = nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(),
                          nn.utils.parametrizations.weight_norm(head))
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.MSELoss()),
                optimizer=torch.optim.Adam(model.parameters(), lr=5e-3))


def fault_weight_norm_of_zeros():
    return dict(_wn(True), kind=("weights", "operation"), place=("4.parametrizations.weight.original1", "4",
                "4.parametrizations.weight", "4.weight", "4.parametrizations.weight.0", "4.parametrizations.weight.original0"),
                curable=True,
                cure="torch.manual_seed(0)\np = model[4].parametrizations.weight\ntorch.nn.init.normal_(p.original1, std=0.05)\n"
                     "p.original0.data = p.original1.data.norm(dim=1, keepdim=True)",
                wrong="weight_norm divides the head's direction by its norm, and the head was initialised to 0")


def twin_weight_norm_of_zeros():
    return _wn(False)


# ---------------------------------------------------------------- log-mel, a silent clip
class LogSpec(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.net = nn.Sequential(nn.Linear(33, 24), nn.ReLU(), nn.Linear(24, 3))
        self.floor = 0.0 if bug else 1e-5

    def forward(self, wave):
        spec = torch.stft(wave, 64, 32, window=self.window, return_complex=True).abs().pow(2)
        logspec = torch.log(spec + self.floor)
        return self.net(logspec.mean(2) / 4)


def _silence(bug):
    torch.manual_seed(8)
    y = torch.randint(0, 3, (32,))
    t = torch.arange(512.0)
    wave = torch.sin(t * (0.2 + 0.4 * y[:, None])) + 0.1 * torch.randn(32, 512)
    wave[9] = 0
    model = LogSpec(bug)
    return dict(model=model, batch=(wave, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.Adam(model.parameters(), lr=5e-3))


def fault_log_spectrum_of_silence():
    return dict(_silence(True), kind=("operation", "input"), place=("log", "batch[0]"), curable=False, cure=None,
                wrong="clip 9 is silent, and the log of its spectrum, without a floor, is -inf")


def twin_log_spectrum_of_silence():
    return _silence(False)


# ---------------------------------------------------------------- forecasting, windows normalised by their own std
class RevIN(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 6))
        self.eps = 0.0 if bug else 1e-5

    def forward(self, x):
        mu = x.mean(1, keepdim=True)
        sd = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + self.eps)
        return self.net((x - mu) / sd) * sd + mu


def _revin(bug):
    torch.manual_seed(9)
    t = torch.arange(30.0)
    s = torch.sin(t * 0.4 + torch.rand(48, 1) * 6) * torch.rand(48, 1) * 3 + torch.randn(48, 1)
    s[20] = 0.0  # a shop that was closed
    model = RevIN(bug)
    return dict(model=model, batch=(s[:, :24], s[:, 24:]), loss_fn=supervised(nn.MSELoss()),
                optimizer=torch.optim.Adam(model.parameters(), lr=5e-3))


def fault_forecast_constant_window():
    return dict(_revin(True), kind=("operation", "input"), place=("div", "sqrt", "batch[0]"), curable=False, cure=None,
                wrong="window 20 is constant: it is divided by a standard deviation of 0")


def twin_forecast_constant_window():
    return _revin(False)


# ---------------------------------------------------------------- missing values left in the table
def _missing(bug):
    torch.manual_seed(10)
    x = torch.randn(100, 8)
    y = (x[:, :1] - x[:, 3:4]) + 0.1 * torch.randn(100, 1)
    if bug:
        x[torch.randperm(100)[:7], 3] = float("nan")
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    return dict(model=model, batch=dict(features=x, label=y), loss_fn=lambda m, b: F.l1_loss(m(b["features"]), b["label"]),
                optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_table_missing_values():
    return dict(_missing(True), kind=("input",), place=("batch['features']", "feature 3"), curable=True,
                cure="batch = dict(batch, features=torch.nan_to_num(batch['features']))",
                wrong="7 rows have NaN in feature 3")


def twin_table_missing_values():
    return _missing(False)


# ---------------------------------------------------------------- SAC, log(1 - tanh(u)^2) of a saturated action
class SquashedActor(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 32), nn.ReLU())
        self.mu, self.log_std = nn.Linear(32, 2), nn.Linear(32, 2)
        self.bug = bug

    def forward(self, s, eps):
        h = self.body(s)
        mu, log_std = self.mu(h) * 4, self.log_std(h).clamp(-5, 2)
        u = mu + 3 * log_std.exp() * eps
        a = torch.tanh(u)
        logp = -0.5 * eps.pow(2) - log_std
        if self.bug:
            logp = logp - torch.log(1 - a.pow(2))
        else:
            logp = logp - 2 * (math.log(2) - u - F.softplus(-2 * u))
        return a, logp.sum(1)


def _sac(bug):
    torch.manual_seed(11)
    s = torch.randn(256, 5)
    eps = torch.randn(256, 2)
    goal = torch.tanh(s[:, :2])
    model = SquashedActor(bug)

    def loss_fn(model, batch):
        s, eps, goal = batch
        a, logp = model(s, eps)
        return (0.2 * logp + (a - goal).pow(2).sum(1)).mean()
    return dict(model=model, batch=(s, eps, goal), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=3e-3))


def fault_sac_log_one_minus_tanh():
    return dict(_sac(True), kind=("operation",), place=("log",), curable=False, cure=None,
                wrong="log(1 - tanh(u)^2) of a saturated action is -inf")


def twin_sac_log_one_minus_tanh():
    return _sac(False)


# ---------------------------------------------------------------- a summed loss at the rate of a mean
def _summed(bug):
    torch.manual_seed(12)
    x = torch.randn(256, 10)
    y = torch.tanh(x[:, :1]) + 0.5 * x[:, 1:2]
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.MSELoss(reduction="sum" if bug else "mean")),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def fault_loss_summed_at_rate_of_mean():
    return dict(_summed(True), kind=("learning rate", "loss"), place=("optimizer", "loss"), curable=True,
                cure="for g in optimizer.param_groups:\n    g['lr'] = 0.1 / 256",
                wrong="the loss is summed over 256 rows, and the rate is one for a mean")


def twin_loss_summed_at_rate_of_mean():
    return _summed(False)


# ---------------------------------------------------------------- masked autoencoder, nothing is masked
class MAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(96, 48), nn.GELU(), nn.Linear(48, 96))

    def forward(self, x, mask):
        h = torch.where(mask[..., None] > 0, self.token, x)
        return self.net(h).view_as(x)


def _mae(bug):
    torch.manual_seed(13)
    x = (torch.randn(64, 3) @ torch.randn(3, 96) * 0.5).view(64, 12, 8)
    ratio = 0.5
    keep = math.ceil(12 * (1 if bug else 1 - ratio))
    mask = torch.ones(64, 12)
    mask[torch.arange(64)[:, None], torch.rand(64, 12).argsort(1)[:, :keep]] = 0
    model = MAE()

    def loss_fn(model, batch):
        x, mask = batch
        err = (model(x, mask) - x).pow(2).mean(-1)
        return (err * mask).sum() / mask.sum()
    return dict(model=model, batch=(x, mask), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=5e-3))


def fault_mae_empty_mask():
    return dict(_mae(True), kind=("operation", "input"), place=("batch[1]", "div", "loss"), curable=True,
                cure="torch.manual_seed(0)\nbatch = (batch[0], (torch.rand(64, 12) < 0.5).float())",
                wrong="no patch is masked: the loss is 0 / 0")


def twin_mae_empty_mask():
    return _mae(False)


# ---------------------------------------------------------------- bfloat16 weights, fine-tuned with a small rate
class BagNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.EmbeddingBag(60, 512, mode="mean")
        self.head = nn.Linear(512, 3)
        nn.init.normal_(self.head.weight, std=0.5)

    def forward(self, ids):
        return self.head(self.emb(ids))


def _bf16(bug):
    torch.manual_seed(14)
    y = torch.arange(48) % 3
    ids = torch.randint(0, 20, (48, 8)) + 20 * y[:, None]
    model = BagNet()
    if bug:
        model = model.bfloat16()
    return dict(model=model, batch=(ids, y), loss_fn=lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
                optimizer=torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0))


def fault_bf16_updates_rounded_away():
    return dict(_bf16(True), kind=("precision",), place=("emb.weight", "head.weight", "optimizer", "emb", "head"),
                curable=True,
                cure="model = model.float()\n"
                     "optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)",
                wrong="weights are bfloat16 without a float32 copy: updates of 3e-4 are rounded away")


def twin_bf16_updates_rounded_away():
    return _bf16(False)


# ---------------------------------------------------------------- DQN, the optimizer was given the target network
def _dqn_opt(bug):
    torch.manual_seed(15)
    s, s2 = torch.randn(64, 6), torch.randn(64, 6)
    a = torch.randint(0, 3, (64,))
    r = s[:, 0] + (a == 1).float()
    model = DQN()
    net = model.target if bug else model.online
    return dict(model=model, batch=(s, a, r, s2, torch.zeros(64)), loss_fn=dqn_loss,
                optimizer=torch.optim.Adam(net.parameters(), lr=5e-3))


def fault_dqn_optimizer_of_target_net():
    return dict(_dqn_opt(True), kind=("optimizer",), place=("optimizer", "online", "online.0.weight", "online.0", "online.2",
                "online.2.weight"), curable=True,
                cure="optimizer = torch.optim.Adam(model.online.parameters(), lr=5e-3)",
                wrong="the optimizer holds the target network's parameters in place of the online network's")


def twin_dqn_optimizer_of_target_net():
    return _dqn_opt(False)


# ---------------------------------------------------------------- BCE with labels -1 and 1
def _pm1(bug):
    torch.manual_seed(16)
    x = torch.randn(96, 1, 12)
    y = torch.sign(x.mean(2) + 0.02)
    y = y if bug else (y + 1) / 2
    model = nn.Sequential(nn.Conv1d(1, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1))
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.BCEWithLogitsLoss()),
                optimizer=torch.optim.Adam(model.parameters(), lr=0.02))


def fault_bce_labels_plus_minus_one():
    return dict(_pm1(True), kind=("target", "loss"), place=("batch[1]", "loss"), curable=True,
                cure="batch = (batch[0], (batch[1] + 1) / 2)",
                wrong="labels are -1 and 1, and BCEWithLogitsLoss takes 0 and 1: the loss has no lower bound")


def twin_bce_labels_plus_minus_one():
    return _pm1(False)


# ---------------------------------------------------------------- softmax before cross_entropy, 40 classes
def _twice(bug):
    torch.manual_seed(17)
    y = torch.randint(0, 40, (160,))
    x = torch.randn(160, 1, 6, 6) * 0.3 + torch.randn(40, 1, 6, 6)[y]
    model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 40),
                          nn.Softmax(dim=1) if bug else nn.Identity())
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.Adam(model.parameters(), lr=3e-3))


def fault_softmax_before_cross_entropy():
    return dict(_twice(True), kind=("loss",), place=("4", "loss", "softmax"), curable=True,
                cure="model[4] = torch.nn.Identity()",
                wrong="the model ends in a softmax, and CrossEntropyLoss takes another")


def twin_softmax_before_cross_entropy():
    return _twice(False)


# ---------------------------------------------------------------- VQ-VAE without the straight-through estimator
class VQ(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
        self.code = nn.Embedding(16, 4)
        self.dec = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 12))
        nn.init.uniform_(self.code.weight, -1 / 16, 1 / 16)
        self.code.requires_grad_(False)  # moved by EMA elsewhere
        self.bug = bug

    def forward(self, x):
        z = self.enc(x)
        q = self.code(torch.cdist(z, self.code.weight).argmin(1))
        if not self.bug:
            q = z + (q - z).detach()
        return self.dec(q)


def _vq(bug):
    torch.manual_seed(18)
    x = torch.randn(16, 12)[torch.randint(0, 16, (96,))] + 0.05 * torch.randn(96, 12)
    model = VQ(bug)
    with torch.no_grad():
        model.code.weight.mul_(4)
        model.enc[2].bias.copy_(model.code.weight[3] * 3)
        model.enc[2].weight.mul_(0.1)
    return dict(model=model, batch=(x,), loss_fn=lambda m, b: F.mse_loss(m(b[0]), b[0]),
                optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_vq_no_straight_through():
    return dict(_vq(True), kind=("gradient",), place=("argmin", "enc", "enc.0", "enc.2", "enc.0.weight", "enc.2.weight", "code"),
                curable=False, cure=None,
                wrong="the decoder gets code[argmin] without the straight-through term, and the encoder no gradient")


def twin_vq_no_straight_through():
    return _vq(False)


# ---------------------------------------------------------------- soft F1 of thresholded predictions
def _f1(bug):
    torch.manual_seed(20)
    x = torch.randn(96, 8)
    y = (x[:, :1] + 0.5 * x[:, 1:2] > 0.3).float()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def loss_fn(model, batch):
        p = torch.sigmoid(model(batch[0]))
        if bug:
            p = (p > 0.5).float()
        tp = (p * batch[1]).sum()
        f1 = 2 * tp / (p.sum() + batch[1].sum() + 1e-7)
        l2 = sum(w.pow(2).sum() for w in model.parameters())
        return 1 - f1 + 1e-4 * l2
    return dict(model=model, batch=(x, y), loss_fn=loss_fn, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))


def fault_f1_of_thresholded_predictions():
    return dict(_f1(True), kind=("gradient", "loss"), place=("gt", "loss", "float", "to"), curable=False, cure=None,
                wrong="predictions are thresholded (p > 0.5) before the F1 loss: only the weight penalty has a gradient")


def twin_f1_of_thresholded_predictions():
    return _f1(False)


# ---------------------------------------------------------------- Adadelta at Adam's rate
def _adadelta(bug):
    torch.manual_seed(21)
    y = torch.randint(0, 4, (64,))
    x = torch.randn(64, 12, 5) + F.one_hot(y, 5)[:, None]
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(5, 24, batch_first=True)
            self.out = nn.Linear(24, 4)

        def forward(self, x):
            return self.out(self.gru(x)[0].mean(1))
    model = Tagger()
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.Adadelta(model.parameters(), lr=1e-3 if bug else 5.0))


def fault_adadelta_rate_of_adam():
    return dict(_adadelta(True), kind=("learning rate", "optimizer"), place=("optimizer",), curable=True,
                cure="for g in optimizer.param_groups:\n    g['lr'] = 5.0",
                wrong="Adadelta at Adam's rate of 1e-3: its own is 1.0, and the weights hardly move")


def twin_adadelta_rate_of_adam():
    return _adadelta(False)


# ---------------------------------------------------------------- (n, 1) against (n,)
class SalesNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.store = nn.Embedding(12, 6)
        self.net = nn.Sequential(nn.Linear(10, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, store, x):
        return self.net(torch.cat([self.store(store), x], 1))


def _broadcast(bug):
    torch.manual_seed(22)
    store = torch.randint(0, 12, (96,))
    x = torch.randn(96, 4)
    y = torch.randn(12)[store] + x[:, 0]
    y = (y - y.mean()) / y.std()
    model = SalesNet()

    def loss_fn(model, batch):
        pred = model(batch["store"], batch["x"])
        return (pred - batch["y"]).abs().pow(1.5).mean()
    return dict(model=model, batch=dict(store=store, x=x, y=y if bug else y[:, None]), loss_fn=loss_fn,
                optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


def fault_sales_broadcast():
    return dict(_broadcast(True), kind=("loss", "target"), place=("loss", "batch['y']", "sub"), curable=True,
                cure="batch = dict(batch, y=batch['y'].reshape(-1, 1))",
                wrong="predictions (n, 1) minus targets (n,) is (n, n): every prediction is compared with every target")


def twin_sales_broadcast():
    return _broadcast(False)


# ---------------------------------------------------------------- highway net, the transform gate's bias is -30
class Highway(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.t = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        for gate in self.t:
            nn.init.constant_(gate.bias, bias)
        self.out = nn.Linear(8, 1, bias=False)
        self.out.weight.requires_grad_(False)  # a fixed read-out

    def forward(self, x):
        for h, t in zip(self.h, self.t):
            g = torch.sigmoid(t(x))
            x = g * torch.tanh(h(x)) + (1 - g) * x
        return self.out(x)


def _highway(bug):
    torch.manual_seed(23)
    x = torch.randn(64, 8)
    y = torch.sin(2 * x[:, :1])
    model = Highway(-30.0 if bug else -1.0)
    return dict(model=model, batch=(x, y), loss_fn=supervised(nn.SmoothL1Loss()),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))


def fault_highway_gate_closed():
    return dict(_highway(True), kind=("weights", "gradient"), place=("t.0.bias", "t.1.bias", "t.2.bias", "t.0", "t.1", "t.2",
                "sigmoid"), curable=True,
                cure="for gate in model.t:\n    torch.nn.init.constant_(gate.bias, -1.0)",
                wrong="the transform gates start with a bias of -30: sigmoid is 1e-13, and no layer gets a gradient")


def twin_highway_gate_closed():
    return _highway(False)


# ---------------------------------------------------------------- 16-bit audio samples as they are, into tanh
def _int16(bug):
    torch.manual_seed(19)
    y = torch.randint(0, 3, (40,))
    t = torch.arange(200.0)
    wave = torch.sin(t * 0.3 + torch.rand(40, 1) * 6) + 0.1 * torch.randn(40, 200)
    wave = (wave * torch.tensor([0.15, 0.5, 1.5])[y][:, None])[:, None]  # the class is the loudness
    if bug:
        wave = (wave * 32767 / 2).round()
    model = nn.Sequential(nn.Conv1d(1, 8, 16, stride=2), nn.Tanh(), nn.Conv1d(8, 8, 8, stride=4), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8 * 22, 3))
    return dict(model=model, batch=(wave, y), loss_fn=supervised(nn.CrossEntropyLoss()),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def fault_audio_raw_int16():
    return dict(_int16(True), kind=("input",), place=("batch[0]",), curable=True,
                cure="batch = (batch[0] / 16384, batch[1])",
                wrong="samples are raw 16-bit integers: the first tanh is saturated everywhere")


def twin_audio_raw_int16():
    return _int16(False)
