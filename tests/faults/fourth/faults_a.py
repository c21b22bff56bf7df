"""Faults in MLPs, CNNs and tabular models."""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine


def _z(x):
    s = x.std(0)
    return (x - x.mean(0)) / np.where(s > 0, s, 1)


def _t(x):
    return torch.tensor(np.asarray(x), dtype=torch.float32)


def _digits(n=256):
    d = load_digits()
    return _t(d.data[:n]), torch.tensor(d.target[:n])


def _mlp(*sizes, act=nn.ReLU):
    layers = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def _ce(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


# 1 ---- z-scores of pixels that are always 0
def fault_zscore():
    torch.manual_seed(1)
    model = _mlp(64, 64, 10)

    def loss_fn(model, batch):
        x, y = batch
        x = (x - x.mean(0)) / x.std(0)
        return F.cross_entropy(model(x), y)
    return dict(model=model, batch=_digits(), loss_fn=loss_fn, optimizer=None,
                kind=("operation", "input"), place=("div", "feature 0", "batch[0]"), curable=False, cure=None,
                wrong="pixels that are 0 in all rows have a standard deviation of 0: 0 / 0")


def twin_zscore():
    torch.manual_seed(1)
    model = _mlp(64, 64, 10)

    def loss_fn(model, batch):
        x, y = batch
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-3)
        return F.cross_entropy(model(x), y)
    return dict(model=model, batch=_digits(), loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 3e-3))


# 2 ---- house prices in dollars, Adam at 1e-3
def _prices(fixed):
    torch.manual_seed(2)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(256, 8))
    price = 210_000 + 70_000 * np.tanh(x[:, 0] + x[:, 1] * x[:, 2]) + 20_000 * x[:, 3] + 5_000 * rng.normal(size=256)
    y = _t(price)[:, None]
    if fixed:
        y = (y - y.mean()) / y.std()
    model = _mlp(8, 64, 64, 1)
    return dict(model=model, batch={"features": _t(x), "price": y},
                loss_fn=lambda model, b: F.l1_loss(model(b["features"]), b["price"]),
                optimizer=torch.optim.Adam(model.parameters(), 1e-3),
                kind=("target",), place=("batch['price']", "price"), curable=True,
                cure="y = batch['price']; batch = {**batch, 'price': (y - y.mean()) / y.std()}",
                wrong="prices of 200,000 as raw targets: Adam at 1e-3 would take ten thousands of steps to get there")


def fault_prices():
    return _prices(False)


def twin_prices():
    return _prices(True)


# 3 ---- RMSLE of raw outputs
def _rmsle_net():
    torch.manual_seed(3)
    d = load_diabetes()
    model = _mlp(10, 64, 64, 1)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)
    return model, (_t(_z(d.data)), _t(d.target / 25)), torch.optim.Adam(model.parameters(), 3e-3)


def fault_rmsle():
    model, batch, _ = _rmsle_net()

    def loss_fn(model, batch):
        x, y = batch
        pred = model(x).squeeze(1)
        return torch.sqrt(F.mse_loss(torch.log1p(pred), torch.log1p(y)))
    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=None, kind=("operation", "loss"), place=("log1p", "log"),
                curable=False, cure=None, wrong="log1p of predictions below -1")


def twin_rmsle():
    model, batch, opt = _rmsle_net()

    def loss_fn(model, batch):
        x, y = batch
        pred = F.softplus(model(x)).squeeze(1)
        return torch.sqrt(F.mse_loss(torch.log1p(pred), torch.log1p(y)))
    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=opt)


# 4 ---- -999999 stands for "missing" in one column, put in after scaling
def _sentinel(fixed):
    torch.manual_seed(4)
    d = load_wine()
    x = _z(d.data)
    gone = np.random.default_rng(4).choice(len(x), 9, replace=False)
    x[gone, 4] = 0 if fixed else -999999.0
    model = _mlp(13, 32, 3, act=nn.LeakyReLU)
    return dict(model=model, batch=(_t(x), torch.tensor(d.target)), loss_fn=_ce,
                optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
                kind=("input",), place=("feature 4", "batch[0]"), curable=True,
                cure="x = batch[0].clone(); x[x < -9e5] = 0; batch = (x, batch[1])",
                wrong="feature 4 holds -999999 where a value is missing")


def fault_sentinel():
    return _sentinel(False)


def twin_sentinel():
    return _sentinel(True)


# 5 ---- labels -1 and 1 for a loss that takes 0 and 1
def _plusminus(fixed):
    torch.manual_seed(5)
    d = load_breast_cancer()
    y = _t(d.target)
    if not fixed:
        y = y * 2 - 1
    model = _mlp(30, 32, 1)
    return dict(model=model, batch=(_t(_z(d.data)), y),
                loss_fn=lambda model, b: F.binary_cross_entropy_with_logits(model(b[0]).squeeze(-1), b[1]),
                optimizer=torch.optim.Adam(model.parameters(), 1e-2),
                wrong_end=True,  # falls without bound below 0: cross entropy has none for a label of -1
                kind=("target", "loss"), place=("batch[1]", "loss", "binary_cross_entropy"), curable=True,
                cure="batch = (batch[0], (batch[1] + 1) / 2)", wrong="labels are -1 and 1, binary cross entropy wants 0 and 1")


def fault_plusminus():
    return _plusminus(False)


def twin_plusminus():
    return _plusminus(True)


# 6 ---- one against all hinge loss with labels 0 and 1
def _hinge(fixed):
    torch.manual_seed(6)
    x, y = _digits()
    onehot = F.one_hot(y, 10).float()
    model = _mlp(64, 48, 10)

    def loss_fn(model, batch):
        x, y = batch
        return torch.relu(1 - y * model(x)).mean()
    return dict(model=model, batch=(x / 16, onehot * 2 - 1 if fixed else onehot), loss_fn=loss_fn,
                optimizer=torch.optim.Adam(model.parameters(), 1e-2),
                kind=("target", "loss", "gradient"), place=("batch[1]", "loss", "relu"), curable=True,
                cure="batch = (batch[0], batch[1] * 2 - 1)", wrong="a hinge loss with labels 0 and 1 instead of -1 and 1: nine of ten terms are constant")


def fault_hinge():
    return _hinge(False)


def twin_hinge():
    return _hinge(True)


# 7 ---- weight decay of 5
def _decay(fixed):
    torch.manual_seed(7)
    x, y = _digits()
    model = _mlp(64, 64, 64, 10)
    decay = [p for n, p in model.named_parameters() if n.endswith("weight")]
    rest = [p for n, p in model.named_parameters() if n.endswith("bias")]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=1e-2 if fixed else 50.0), dict(params=rest, weight_decay=0.0)], lr=1e-2)
    return dict(model=model, batch=(x / 16, y), loss_fn=_ce, optimizer=opt, kind=("optimizer",), place=("optimizer", "weight_decay"),
                curable=True, cure="for g in optimizer.param_groups: g['weight_decay'] = 0.01",
                wrong="a weight decay of 50 in AdamW shrinks every weight by half in each step")


def fault_decay():
    return _decay(False)


def twin_decay():
    return _decay(True)


# 8 ---- a schedule meant for epochs, stepped with every batch
def _schedule(fixed):
    torch.manual_seed(8)
    d = load_wine()
    model = _mlp(13, 32, 3, act=nn.Tanh)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    sched = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.95)
    opt.step()
    for _ in range(3 if fixed else 400):
        sched.step()
    return dict(model=model, batch=(_t(_z(d.data)), torch.tensor(d.target)), loss_fn=_ce, optimizer=opt,
                kind=("learning rate",), place=("optimizer",), curable=True,
                cure="for g in optimizer.param_groups: g['lr'] = 0.01",
                wrong="ExponentialLR was stepped 400 times: the rate is 1e-11")


def fault_schedule():
    return _schedule(False)


def twin_schedule():
    return _schedule(True)


class SmallCNN(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.fc = nn.Linear(2 * width * 4, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


# 9 ---- Adadelta with Adam's rate
def _adadelta(fixed):
    torch.manual_seed(9)
    x, y = _digits(128)
    model = SmallCNN()
    return dict(model=model, batch=(x.view(-1, 1, 8, 8) / 8 - 1, y), loss_fn=_ce,
                optimizer=torch.optim.Adadelta(model.parameters(), lr=1.0 if fixed else 1e-3),
                kind=("learning rate", "optimizer"), place=("optimizer",), curable=True,
                cure="for g in optimizer.param_groups: g['lr'] = 1.0",
                wrong="Adadelta at 1e-3: its own rate is 1, and it starts slowly even there")


def fault_adadelta():
    return _adadelta(False)


def twin_adadelta():
    return _adadelta(True)


# 10 ---- RMSprop at 0.5 kills a CNN
def _bigrate(fixed):
    torch.manual_seed(10)
    x, y = _digits(128)
    model = SmallCNN()
    return dict(model=model, batch=(x.view(-1, 1, 8, 8) / 8 - 1, y), loss_fn=_ce,
                optimizer=torch.optim.RMSprop(model.parameters(), lr=2e-3 if fixed else 0.5),
                kind=("learning rate",), place=("optimizer",), curable=True,
                cure="for g in optimizer.param_groups: g['lr'] = 2e-3",
                wrong="RMSprop at 0.5: the first step moves each weight by 5")


def fault_bigrate():
    return _bigrate(False)


def twin_bigrate():
    return _bigrate(True)


# 11 ---- GroupNorm with one channel in a group, at 1 x 1
class TailNorm(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
                                  nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.norm = nn.GroupNorm(groups, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.norm(self.body(x)).flatten(1))


def _groupnorm(fixed):
    torch.manual_seed(11)
    x, y = _digits(128)
    model = TailNorm(4 if fixed else 32)
    return dict(model=model, batch=(x.view(-1, 1, 8, 8) / 8 - 1, y), loss_fn=_ce, optimizer=torch.optim.Adam(model.parameters(), 1e-2),
                kind=("gradient", "operation"), place=("norm", "group_norm"), curable=True, cure="model.norm.num_groups = 4",
                wrong="GroupNorm(32, 32) over 1 x 1 maps normalises single numbers: all become 0")


def fault_groupnorm():
    return _groupnorm(False)


def twin_groupnorm():
    return _groupnorm(True)


# 13 ---- ten tanh layers, drawn from N(0, 0.01)
def _tinyweights(fixed):
    torch.manual_seed(13)
    x, y = _digits()
    model = _mlp(64, *[64] * 10, 10, act=nn.Tanh)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)
            if fixed:
                nn.init.xavier_normal_(m.weight, 5 / 3)
            else:
                nn.init.normal_(m.weight, std=0.01)
    return dict(model=model, batch=(x / 8 - 1, y), loss_fn=_ce, optimizer=torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
                kind=("weights", "gradient"), place=("weight",), curable=True,
                cure="for m in model:\n    if isinstance(m, nn.Linear): nn.init.xavier_normal_(m.weight, 5 / 3)",
                wrong="N(0, 0.01) in eleven layers of 64: signal and gradient vanish")


def fault_tinyweights():
    return _tinyweights(False)


def twin_tinyweights():
    return _tinyweights(True)


# 14 ---- a layer by hand on torch.empty
class MyDense(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_in, n_out))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.w + self.b


def _uninit(fixed):
    torch.manual_seed(14)
    d = load_breast_cancer()
    model = nn.Sequential(MyDense(30, 24), nn.Tanh(), MyDense(24, 1))
    with torch.no_grad():
        for m in (model[0], model[2]):
            if fixed:
                nn.init.xavier_uniform_(m.w)
            else:  # what malloc hands out, made repeatable: any bits
                m.w.copy_(torch.randint(-2**31, 2**31 - 1, m.w.shape, dtype=torch.int32).view(torch.float32))
    return dict(model=model, batch=(_t(_z(d.data)), _t(d.target)),
                loss_fn=lambda model, b: F.binary_cross_entropy_with_logits(model(b[0])[:, 0], b[1]),
                optimizer=torch.optim.Adam(model.parameters(), 1e-2),
                kind=("uninitialised", "weights"), place=("0.w", "2.w"), curable=True,
                cure="for m in (model[0], model[2]): nn.init.xavier_uniform_(m.w)",
                wrong="weights from torch.empty that nobody initialised: arbitrary bits")


def fault_uninit():
    return _uninit(False)


def twin_uninit():
    return _uninit(True)


# 15 ---- correlation of constant outputs
class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 32), nn.ELU())
        self.head = nn.Linear(32, 1)

    def forward(self, x):
        return self.head(self.body(x))[:, 0]


def _pearson(fixed):
    torch.manual_seed(15)
    d = load_diabetes()
    model = Scorer()
    if not fixed:
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)

    def loss_fn(model, batch):
        p, y = model(batch["x"]), batch["y"]
        vp, vy = p - p.mean(), y - y.mean()
        corr = (vp * vy).sum() / (torch.sqrt((vp ** 2).sum()) * torch.sqrt((vy ** 2).sum()))
        return 1 - corr
    return dict(model=model, batch={"x": _t(_z(d.data)), "y": _t(d.target)}, loss_fn=loss_fn, optimizer=torch.optim.Adam(model.parameters(), 1e-2),
                kind=("operation", "weights"), place=("div", "sqrt", "head.weight", "head"), curable=True,
                cure="nn.init.xavier_normal_(model.head.weight)",
                wrong="a zero-initialised head gives constant outputs, whose correlation is 0 / 0")


def fault_pearson():
    return _pearson(False)


def twin_pearson():
    return _pearson(True)


# 16 ---- the loss is wrapped into a new tensor
def _rewrap_net():
    torch.manual_seed(16)
    d = load_diabetes()
    model = _mlp(10, 32, 32, 1, act=nn.SiLU)
    return model, (_t(_z(d.data)), _t(_z(d.target[:, None]))), torch.optim.Adam(model.parameters(), 5e-3)


def fault_rewrap():
    model, batch, opt = _rewrap_net()

    def loss_fn(model, batch):
        x, y = batch
        losses = [F.smooth_l1_loss(model(xi), yi) for xi, yi in zip(x.chunk(4), y.chunk(4))]
        return torch.tensor(losses, requires_grad=True).mean()
    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=opt, kind=("gradient",),
                place=("tensor", "loss", "detach"), curable=False, cure=None,
                wrong="torch.tensor(losses, requires_grad=True) makes a new leaf: nothing reaches the weights")


def twin_rewrap():
    model, batch, opt = _rewrap_net()

    def loss_fn(model, batch):
        x, y = batch
        losses = [F.smooth_l1_loss(model(xi), yi) for xi, yi in zip(x.chunk(4), y.chunk(4))]
        return torch.stack(losses).mean()
    return dict(model=model, batch=batch, loss_fn=loss_fn, optimizer=opt)
