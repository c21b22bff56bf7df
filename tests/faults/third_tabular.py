"""A third set of planted faults and healthy models, held out: tables, images, physics, graphs, optimizers."""

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .case import POW, Fault, Healthy, healthy_keeper, planter, supervised, train

FAULTS: list[Fault] = []
HEALTHY: list[Healthy] = []

tab = planter(FAULTS, "tab")
hand = planter(FAULTS, "hand")
cnn = planter(FAULTS, "cnn")
ae = planter(FAULTS, "ae")
pinn = planter(FAULTS, "pinn")
gnn = planter(FAULTS, "gnn")
ts = planter(FAULTS, "ts")
surv = planter(FAULTS, "surv")
rank = planter(FAULTS, "rank")
reco = planter(FAULTS, "reco")
density = planter(FAULTS, "density")
fn = planter(FAULTS, "fn")
norm = planter(FAULTS, "norm")
opt = planter(FAULTS, "opt")
amp = planter(FAULTS, "amp")
healthy = healthy_keeper(HEALTHY)


# ------------------------------------------------------------------ tabular


# "I fed the CSV straight in: areas in the thousands, smoothness below 0.2. Loss sits at 0.66."
@tab("input", place={"feature": (3, 23)}, steps=3)
def raw_columns_into_sigmoids(planted: bool = True):
    x, y = data.cancer(200, raw=planted)
    model = nn.Sequential(nn.Linear(30, 32), nn.Sigmoid(), nn.Linear(32, 16), nn.Sigmoid(), nn.Linear(16, 1))
    batch = (x, y.float().unsqueeze(1))
    return model, batch, supervised(nn.BCEWithLogitsLoss()), torch.optim.Adam(model.parameters(), lr=0.01)


# "My net ends in Softmax because it is a classifier; CrossEntropyLoss does it again."
@tab("loss", fixable=False, steps=3)
def softmax_before_cross_entropy(planted: bool = True):
    class DigitNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(64, 48)
            self.fc2 = nn.Linear(48, 10)

        def forward(self, x):
            x = torch.relu(self.fc1(x))
            x = self.fc2(x)
            return F.softmax(x, dim=1) if planted else x

    model = DigitNet()
    return model, data.digits(), supervised(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr=0.1)


# "Binary target, one output neuron, CrossEntropyLoss with float labels of shape (n, 1): the loss is 0.0."
@tab("loss", "gradient", fixable=False, steps=3)
def cross_entropy_on_one_logit(planted: bool = True):
    x, y = data.cancer(128)
    model = nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 1))
    criterion = nn.CrossEntropyLoss() if planted else nn.BCEWithLogitsLoss()
    batch = (x, y.float().view(-1, 1))
    return model, batch, supervised(criterion), torch.optim.Adam(model.parameters(), lr=0.01)


# "NLLLoss, and the log_softmax before it went missing in a clean-up. The loss is negative and then NaN."
@tab("loss", fixable=False, steps=5)
def nll_of_raw_scores(planted: bool = True):
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(13, 64)
            self.fc2 = nn.Linear(64, 32)
            self.fc3 = nn.Linear(32, 3)

        def forward(self, x):
            x = F.relu(self.fc1(x))
            x = F.relu(self.fc2(x))
            x = self.fc3(x)
            return x if planted else F.log_softmax(x, dim=1)

    model = Scorer()
    return model, data.wine(120), supervised(nn.NLLLoss()), torch.optim.SGD(model.parameters(), lr=0.2)


# "Classes in the CSV are 1, 2, 3. I have 3 outputs."
@tab("target")
def labels_from_one(planted: bool = True):
    x, y = data.wine(128)
    y = y + 1 if planted else y
    model = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))
    return model, (x, y), supervised(nn.CrossEntropyLoss()), torch.optim.Adam(model.parameters(), lr=0.01)


# "A linear SVM in torch: hinge loss, y straight from sklearn, that is 0 and 1 and not -1 and 1."
@tab("target", "loss", steps=3)
def hinge_with_zero_one(planted: bool = True):
    x, y = data.cancer(200)
    y = (1 - y).float()  # 1: malignant
    y = y if planted else 2 * y - 1

    def hinge(score, y):
        return torch.clamp(1 - y * score.squeeze(1), min=0).mean()

    model = nn.Linear(30, 1)
    return model, (x, y), supervised(hinge), torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)


# "backward() said the loss does not require grad, so I wrote loss.requires_grad = True. Now it learns nothing."
@tab("gradient", "loss", fixable=False, steps=3)
def loss_requires_grad_set_by_hand(planted: bool = True):
    x, y = data.wine(128)
    model = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))

    def loss_fn(model, batch):
        x, y = batch
        out = model(x)
        if not planted:
            return F.cross_entropy(out, y)
        predicted = out.argmax(dim=1)
        loss = F.mse_loss(predicted.float(), y.float())
        loss.requires_grad = True
        return loss

    return model, (x, y), loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# "y is a pandas column, so it has shape (n,); my predictions are (n, 1). The loss is stuck at 1."
@tab("loss", steps=3)
def squared_error_of_all_pairs(planted: bool = True):
    x, y = data.diabetes(128)
    y = y.squeeze(1) if planted else y

    class Regressor(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(10, 32)
            self.out = nn.Linear(32, 1)

        def forward(self, x):
            return self.out(F.relu(self.hidden(x)))

    def rmse(pred, y):
        return torch.sqrt(((pred - y) ** 2).mean() + 1e-8)

    model = Regressor()
    return model, (x, y), supervised(rmse), torch.optim.Adam(model.parameters(), lr=0.01)


# "House prices in dollars as the target, features standardised, SGD at 0.01: NaN after some steps."
@tab("target", steps=3)
def prices_in_dollars(planted: bool = True):
    x, y = data.diabetes(128, raw_y=True)
    y = y * 1500
    if not planted:
        y = (y - y.mean()) / y.std()
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    return model, (x, y), supervised(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=0.02)


# "Kaggle scores with RMSLE, so I train on it. The head is linear, and its first outputs are partly below 0."
@tab("operation", place={"op": ("log", "log1p")}, fixable=False)
def rmsle_of_a_linear_head(planted: bool = True):
    x, y = data.diabetes(128, raw_y=True)
    y = y / 100

    class Sales(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(10, 32), nn.ReLU())
            self.head = nn.Linear(32, 1)

        def forward(self, x):
            out = self.head(self.body(x))
            return out if planted else F.softplus(out)

    def loss_fn(model, batch):
        x, y = batch
        return (torch.log(model(x)) - torch.log(y)).pow(2).mean().sqrt()

    model = Sales()
    return model, (x, y), loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# "The frame still has its customer_id, 8 digits, as the fifth column."
@tab("input", place={"feature": 4}, steps=3)
def customer_id_among_the_features(planted: bool = True):
    x, y = data.diabetes(128)
    ids = torch.randint(10_000_000, 99_999_999, (128, 1)).float()
    if not planted:
        ids = data.standardised(ids)
    x = torch.cat([x[:, :4], ids, x[:, 4:]], dim=1)
    model = nn.Sequential(nn.Linear(11, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
    return model, (x, y), supervised(nn.MSELoss()), torch.optim.Adam(model.parameters(), lr=0.01)


# --------------------------------------------------------- hand-made layers


# "My own Dense layer: nn.Parameter(torch.randn(in, out))."
@hand("weights", place={"parameter": ("layers.0.weight", "layers.1.weight", "layers.2.weight", "layers.3.weight")})
def dense_from_randn(planted: bool = True):
    class Dense(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            scale = 1.0 if planted else math.sqrt(2 / n_in)
            self.weight = nn.Parameter(torch.randn(n_in, n_out) * scale)
            self.bias = nn.Parameter(torch.zeros(n_out))

        def forward(self, x):
            return x @ self.weight + self.bias

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = [64, 128, 128, 128, 10]
            self.layers = nn.ModuleList(Dense(a, b) for a, b in itertools.pairwise(sizes))

        def forward(self, x):
            for layer in self.layers[:-1]:
                x = F.leaky_relu(layer(x), 0.1)
            return self.layers[-1](x)

    model = Net()
    return model, data.digits(), supervised(F.cross_entropy), torch.optim.SGD(model.parameters(), lr=0.05)


# "nn.Parameter(torch.empty(...)) as in the source of nn.Linear, but I forgot reset_parameters()."
@hand("uninitialised", "weights", place={"parameter": "mix.weight"})
def bilinear_from_empty(planted: bool = True):
    class Mix(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(n_out, n_in))
            self.bias = nn.Parameter(torch.zeros(n_out))
            if not planted:
                nn.init.xavier_uniform_(self.weight)

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(13, 32)
            self.mix = Mix(32, 32)
            self.out = nn.Linear(32, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.mix(torch.tanh(self.stem(x)))))

    model = Net()
    if planted:  # what the memory held on that machine: half zeros, half the bits of something else
        bits = torch.randint(-(2**31), 2**31 - 1, (32, 32), dtype=torch.int64).to(torch.int32)
        bits[:16] = 0
        model.mix.weight.data.copy_(bits.view(torch.float32))
    return model, data.wine(), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=0.01)


# "self.W = torch.randn(..., requires_grad=True), as in the numpy-to-torch tutorial: parameters() does not list it."
@hand("optimizer", steps=3)
def plain_tensors_as_weights(planted: bool = True):
    class Layer(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            W = torch.randn(n_in, n_out) / math.sqrt(n_in)
            self.W = W.requires_grad_() if planted else nn.Parameter(W)
            self.b = nn.Parameter(torch.zeros(n_out))

        def forward(self, x):
            return x @ self.W + self.b

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l1 = Layer(64, 64)
            self.l2 = Layer(64, 10)

        def forward(self, x):
            return self.l2(torch.relu(self.l1(x)))

    model = Net()
    return model, data.digits(), supervised(F.cross_entropy), torch.optim.SGD(model.parameters(), lr=0.1)


# --------------------------------------------------------------------- CNNs


# "Normalize with the ImageNet mean and std, but on uint8 values: ToTensor() was lost, so nothing divided by 255."
@cnn("input", steps=3)
def imagenet_statistics_on_bytes(planted: bool = True):
    x, y = data.images(96, top=255.0 if planted else 1.0)
    x = x.expand(-1, 3, 8, 8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    x = (x - mean) / std

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
            self.fc = nn.Linear(16 * 4, 10)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.max_pool2d(F.relu(self.conv2(x)), 2)
            return self.fc(x.flatten(1))

    def loss_fn(model, batch):
        x, y = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        return F.cross_entropy(logits.float(), y)

    model = Small()
    return model, (x, y), loss_fn, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


# "Images from OpenCV: (n, height, width, channels)."
@cnn("input", "operation")
def channels_last(planted: bool = True):
    x, y = data.images(64)
    x = x.expand(-1, 3, 8, 8)
    if planted:
        x = x.permute(0, 2, 3, 1).contiguous()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return model, (x, y), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=0.01)


# "Transfer learning: froze the body, made the optimizer, and only then put the new head on."
@cnn("optimizer", steps=3)
def head_replaced_after_the_optimizer(planted: bool = True):
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
            )
            self.fc = nn.Linear(256, 100)

        def forward(self, x):
            return self.fc(self.features(x).flatten(1))

    model = Backbone()
    for p in model.features.parameters():
        p.requires_grad_(False)
    if not planted:
        model.fc = nn.Linear(256, 10)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    if planted:
        model.fc = nn.Linear(256, 10)
    return model, data.images(128), supervised(F.cross_entropy), optimizer


# -------------------------------------------------------------- autoencoders


# "The decoder ends in Sigmoid, the images are 0..255, MSE."
@ae("target", "input", "loss", steps=3)
def sigmoid_decoder_for_bytes(planted: bool = True):
    x, _ = data.images(128, top=255.0 if planted else 1.0)

    class AutoEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
            self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())

        def forward(self, x):
            return self.decoder(self.encoder(x)).view_as(x)

    model = AutoEncoder()
    return model, (x, x), supervised(nn.MSELoss()), torch.optim.Adam(model.parameters(), lr=5e-3)


class VAE(nn.Module):
    def __init__(self, n_in=64, hidden=48, latent=6):
        super().__init__()
        self.enc = nn.Linear(n_in, hidden)
        self.mu = nn.Linear(hidden, latent)
        self.logvar = nn.Linear(hidden, latent)
        self.dec1 = nn.Linear(latent, hidden)
        self.dec2 = nn.Linear(hidden, n_in)

    def forward(self, x):
        h = torch.relu(self.enc(x))
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.dec2(torch.relu(self.dec1(z))), mu, logvar


# "ELBO = reconstruction - KL, and I copied the KL with its minus in front twice, so the loss wants a large KL."
@ae("loss", fixable=False, steps=5)
def kl_with_the_wrong_sign(planted: bool = True):
    x, _ = data.images(128)
    sign = 0.5 if planted else -0.5

    def loss_fn(model, x):
        recon, mu, logvar = model(x)
        bce = F.binary_cross_entropy_with_logits(recon, x, reduction="sum") / len(x)
        kld = sign * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(x)
        return bce + kld

    model = VAE()
    return model, x.flatten(1), loss_fn, torch.optim.SGD(model.parameters(), lr=0.05)


# "model.bfloat16() to save memory, with the fine-tuning rate of the float32 run. The loss does not move."
@ae("precision", steps=3)
def bfloat16_weights_and_small_steps(planted: bool = True):
    x, _ = data.digits(128)
    layers = []
    for n_in, n_out in ((64, 256), (256, 32), (32, 256), (256, 64)):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
    model = nn.Sequential(*layers[:-1])
    if planted:
        model, x = model.bfloat16(), x.bfloat16()

    def loss_fn(model, x):
        return F.mse_loss(model(x).float(), x.float())

    return model, x, loss_fn, torch.optim.Adam(model.parameters(), lr=3e-5)


# --------------------------------------------------------------------- PINNs


# "Poisson, u'' = -pi^2 sin(pi x), u(0) = u(1) = 0, with my usual ReLU net. Its second derivative is 0 everywhere."
@pinn("gradient", "operation", fixable=False, steps=3)
def relu_has_no_second_derivative(planted: bool = True):
    class Field(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 1))

        def forward(self, x):
            return self.net(x)

    def loss_fn(model, batch):
        x = batch["interior"].clone().requires_grad_(True)
        u = model(x)
        du = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        d2u = torch.autograd.grad(du.sum(), x, create_graph=True)[0]
        residual = d2u + math.pi**2 * torch.sin(math.pi * x)
        return residual.pow(2).mean() + model(batch["boundary"]).pow(2).mean()

    model = Field(nn.ReLU if planted else nn.Tanh)
    batch = {"interior": torch.linspace(0, 1, 64).view(-1, 1), "boundary": torch.tensor([[0.0], [1.0]])}
    return model, batch, loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# "Advection over one day: x from -1 to 1, t in seconds up to 86400. tanh sees nothing but +-1."
@pinn("input", place={"feature": 1}, fixable=False, steps=3)
def time_in_seconds(planted: bool = True):
    day = 86400.0 if planted else 2.0
    c = 2.0 / day
    x = torch.rand(200, 1) * 2 - 1
    t = torch.rand(200, 1) * day

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.l1 = nn.Linear(2, 48)
            self.l2 = nn.Linear(48, 48)
            self.l3 = nn.Linear(48, 1)

        def forward(self, xt):
            return self.l3(torch.tanh(self.l2(torch.tanh(self.l1(xt)))))

    def loss_fn(model, batch):
        xt, u_seen = batch
        xt = xt.clone().requires_grad_(True)
        u = model(xt)
        g = torch.autograd.grad(u, xt, torch.ones_like(u), create_graph=True)[0]
        residual = g[:, 1:] / c + g[:, :1]
        return F.mse_loss(u, u_seen) + 0.1 * residual.pow(2).mean()

    model = Field()
    u_seen = torch.sin(2 * (x - c * t))
    return model, (torch.cat([x, t], 1), u_seen), loss_fn, torch.optim.Adam(model.parameters(), lr=5e-3)


# "Polar features in the net, r = sqrt(x^2 + y^2), the Laplacian by torch.func; the grid holds the origin."
@pinn("operation", place={"op": ("sqrt", "norm", "linalg_norm", "linalg_vector_norm")}, fixable=False)
def radius_at_the_origin(planted: bool = True):
    class Membrane(nn.Module):
        def __init__(self):
            super().__init__()
            self.l1 = nn.Linear(3, 24)
            self.l2 = nn.Linear(24, 1)

        def forward(self, xy):
            r2 = (xy**2).sum(-1, keepdim=True)
            r = torch.sqrt(r2 if planted else r2 + 1e-2)
            return self.l2(torch.tanh(self.l1(torch.cat([xy, r], -1))))

    def loss_fn(model, xy):
        def u(point):
            return model(point).squeeze(-1)

        laplace = torch.func.vmap(lambda p: torch.func.hessian(u)(p).diagonal().sum())(xy)
        inside = ((laplace + 1.0) ** 2).mean()
        edge = xy[xy.abs().amax(1) > 0.99]
        return inside + model(edge).pow(2).mean()

    side = torch.arange(-3, 4) / 3
    model = Membrane()
    grid = torch.cartesian_prod(side, side)
    return model, grid, loss_fn, torch.optim.Adam(model.parameters(), lr=5e-3)


# ---------------------------------------------------------------------- GNNs


def a_graph(nodes=60, edges=240, classes=3, isolated=0):
    """Edges mostly within a class; features that say a little of the class; the last nodes may be isolated."""
    y = torch.arange(nodes) % classes
    live = nodes - isolated
    src = torch.randint(0, live, (edges,))
    same = (src + classes * torch.randint(1, live // classes, (edges,))) % (live - live % classes)
    dst = torch.where(torch.rand(edges) < 0.8, same, torch.randint(0, live, (edges,)))
    if not isolated:  # every node has an edge from its next
        src, dst = torch.cat([src, torch.arange(nodes)]), torch.cat([dst, (torch.arange(nodes) + classes) % nodes])
    x = torch.randn(nodes, 12) + 1.5 * F.one_hot(y, 12)
    return x, torch.stack([src, dst]), y


# "GCN by hand, D^-1/2 A D^-1/2. I left the self-loops out, and a few nodes have no edge: inf times 0."
@gnn("operation", place={"op": (*POW, "rsqrt")}, fixable=False)
def degree_to_the_minus_half(planted: bool = True):
    class GCNConv(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            self.lin = nn.Linear(n_in, n_out)

        def forward(self, x, edge_index):
            src, dst = edge_index
            deg = torch.zeros(len(x)).index_add_(0, dst, torch.ones(len(dst)))
            if not planted:
                deg = deg + 1
            norm = deg.pow(-0.5)
            h = self.lin(x) * norm.unsqueeze(1)
            out = torch.zeros_like(h).index_add_(0, dst, h[src])
            if not planted:
                out = out + h
            return out * norm.unsqueeze(1)

    class GCN(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = GCNConv(12, 16)
            self.conv2 = GCNConv(16, 3)

        def forward(self, x, edge_index):
            return self.conv2(F.relu(self.conv1(x, edge_index)), edge_index)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["x"], batch["edge_index"]), batch["y"])

    x, edge_index, y = a_graph(isolated=6)
    model = GCN()
    batch = {"x": x, "edge_index": edge_index, "y": y}
    return model, batch, loss_fn, torch.optim.Adam(model.parameters(), lr=0.02)


# "A temporal graph net keeps a memory per node between steps. I store it with its graph."
@gnn("gradient", "operation", fixable=False, steps=3)
def memory_kept_with_its_graph(planted: bool = True):
    class TGN(nn.Module):
        def __init__(self, nodes):
            super().__init__()
            self.cell = nn.GRUCell(12, 16)
            self.out = nn.Linear(16, 3)
            self.register_buffer("memory", torch.zeros(nodes, 16))

        def forward(self, x, edge_index):
            src, dst = edge_index
            message = torch.zeros_like(x).index_add(0, dst, x[src])
            memory = self.cell(message + x, self.memory)
            self.memory = memory if planted else memory.detach()
            return self.out(memory)

    def loss_fn(model, batch):
        x, edge_index, y = batch
        return F.cross_entropy(model(x, edge_index), y)

    model = TGN(60)
    return model, a_graph(), loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# --------------------------------------------------------------- time series


def a_series(n, noise=0.1):
    t = torch.arange(n, dtype=torch.float32)
    return torch.sin(2 * math.pi * t / 24) + 0.5 * torch.sin(2 * math.pi * t / 7) + noise * torch.randn(n)


def windows(series, length, rows):
    x = torch.stack([series[i : i + length] for i in range(rows)])
    return x.unsqueeze(-1), series[length : length + rows].unsqueeze(-1)


# "Bitcoin closes, about 40,000, as they are: into the LSTM and as what it is to predict. The loss stays at 1.6e9."
@ts("input", "target", several=True, steps=3)
def raw_closes_in_and_out(planted: bool = True):
    closes = 40_000 + 3_000 * a_series(160) + 20 * torch.arange(160)
    if not planted:
        closes = (closes - closes.mean()) / closes.std()
    x, y = windows(closes, 24, 100)

    class Forecaster(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(1, 24, batch_first=True)
            self.fc = nn.Linear(24, 1)

        def forward(self, x):
            out, _ = self.lstm(x)
            return self.fc(out[:, -1])

    model = Forecaster()
    return model, (x, y), supervised(nn.MSELoss()), torch.optim.Adam(model.parameters(), lr=0.02)


# "Elman net by hand, randn times 0.5 for the hidden matrix, ReLU, 120 hours."
@ts("weights", "gradient", place={"parameter": "cell.W_hh"})
def hidden_matrix_from_randn(planted: bool = True):
    class Cell(nn.Module):
        def __init__(self, n_in, hidden):
            super().__init__()
            self.W_xh = nn.Parameter(torch.randn(n_in, hidden) * 0.3)
            self.W_hh = nn.Parameter(torch.randn(hidden, hidden) * 0.5)
            self.b = nn.Parameter(torch.zeros(hidden))
            if not planted:
                nn.init.orthogonal_(self.W_hh)

        def forward(self, x, h):
            return F.relu(x @ self.W_xh + h @ self.W_hh + self.b)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = Cell(1, 32)
            self.out = nn.Linear(32, 1)

        def forward(self, x):
            h = x.new_zeros(x.shape[0], 32)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return self.out(h)

    x, y = windows(a_series(220), 120, 48)
    model = Net()
    return model, (x, y), supervised(F.mse_loss), torch.optim.Adam(model.parameters(), lr=1e-3)


# "Continued from a checkpoint after CosineAnnealingLR had run to its end: the rate in the optimizer is 0."
@ts("learning rate", steps=3)
def scheduler_had_ended(planted: bool = True):
    x, y = windows(a_series(150), 24, 96)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if planted:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return model, (x, y), supervised(nn.SmoothL1Loss()), optimizer


# ------------------------------------------- survival, ordinal and ranking


# "Cox's partial likelihood as in the paper, lab values as the hospital sends them: exp(risk) overflows."
@surv("input", "operation", "loss", steps=3)
def cox_on_raw_lab_values(planted: bool = True):
    x, y = data.cancer(160, raw=planted)
    time = torch.rand(160) * 5 + 3 * y
    event = (torch.rand(160) < 0.6).float()

    class DeepSurv(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, x):
            return self.net(x).squeeze(1)

    def neg_partial_log_likelihood(model, batch):
        order = torch.argsort(batch["time"], descending=True)
        risk = model(batch["x"])[order]
        event = batch["event"][order]
        at_risk = torch.log(torch.cumsum(torch.exp(risk), dim=0))
        return -((risk - at_risk) * event).sum() / event.sum()

    model = DeepSurv()
    batch = {"x": x, "time": time, "event": event}
    return model, batch, neg_partial_log_likelihood, torch.optim.Adam(model.parameters(), lr=0.01)


# "The function used to return the log-likelihood, so the optimizer has maximize=True. Now it returns minus that."
@surv("optimizer", steps=3)
def maximize_left_from_the_likelihood(planted: bool = True):
    x, _ = data.wine(128)
    time = torch.exp(0.5 * x[:, 0] - 0.5 * x[:, 6]) * torch.rand(128).clamp_min(0.05)
    event = (torch.rand(128) < 0.7).float()

    def negative_log_likelihood(model, batch):
        x, time, event = batch
        log_hazard = model(x).squeeze(1)
        return (log_hazard.exp() * time - event * log_hazard).mean()

    model = nn.Sequential(nn.Linear(13, 24), nn.Tanh(), nn.Linear(24, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, maximize=planted)
    return model, (x, time, event), negative_log_likelihood, optimizer


# "Cumulative-link ordinal regression; the cutpoints start as torch.zeros(4), so the middle levels have probability 0."
@rank("weights", "operation")
def cutpoints_all_zero(planted: bool = True):
    x, y = data.diabetes(128)
    level = torch.bucketize(y.squeeze(1), torch.tensor([-0.9, -0.3, 0.3, 0.9]))

    class Ordinal(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 1))
            self.cutpoints = nn.Parameter(torch.zeros(4) if planted else torch.linspace(-1.5, 1.5, 4))

        def forward(self, x):
            below = torch.sigmoid(self.cutpoints - self.score(x))
            ones = torch.ones(len(x), 1)
            return torch.diff(torch.cat([0 * ones, below, ones], dim=1), dim=1)

    def loss_fn(model, batch):
        x, level = batch
        return -torch.log(model(x).gather(1, level[:, None])).mean()

    model = Ordinal()
    return model, (x, level), loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# "ListNet: relevance / relevance.sum() per query. One query of this batch has no relevant document."
@rank("operation", "target", fixable=False)
def query_without_relevant_documents(planted: bool = True):
    docs = torch.randn(16, 12, 8)
    relevance = (docs[..., 0] + 0.5 * torch.randn(16, 12) > 1).float() * 2
    relevance[:, 0] = 1
    if planted:
        relevance[11] = 0

    class Ranker(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(8, 32)
            self.fc2 = nn.Linear(32, 1)

        def forward(self, docs):
            return self.fc2(F.relu(self.fc1(docs))).squeeze(-1)

    def listnet(scores, relevance):
        wanted = relevance / relevance.sum(dim=1, keepdim=True)
        return -(wanted * F.log_softmax(scores, dim=1)).sum(dim=1).mean()

    model = Ranker()
    return model, (docs, relevance), supervised(listnet), torch.optim.Adam(model.parameters(), lr=0.01)


# -------------------------------------------------------------- recommenders


def some_ratings(users=80, items=60, rows=512):
    u, i = torch.randint(0, users, (rows,)), torch.randint(0, items, (rows,))
    taste, style = torch.randn(users, 3), torch.randn(items, 3)
    stars = (3 + (taste[u] * style[i]).sum(1)).round().clamp(1, 5)
    return u, i, stars


# "Matrix factorisation, 64 factors, nn.Embedding as it comes, N(0, 1): dot products of +-8 for stars of 1 to 5."
@reco("weights", place={"parameter": ("user.weight", "item.weight")}, steps=3)
def factors_from_a_unit_normal(planted: bool = True):
    class MF(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = nn.Embedding(80, 64)
            self.item = nn.Embedding(60, 64)
            self.user_bias = nn.Embedding(80, 1)
            self.item_bias = nn.Embedding(60, 1)
            for table in (self.user_bias, self.item_bias):
                nn.init.zeros_(table.weight)
            if not planted:
                nn.init.normal_(self.user.weight, std=0.1)
                nn.init.normal_(self.item.weight, std=0.1)

        def forward(self, u, i):
            dot = (self.user(u) * self.item(i)).sum(1)
            return 3 + dot + self.user_bias(u).squeeze(1) + self.item_bias(i).squeeze(1)

    def loss_fn(model, batch):
        u, i, stars = batch
        return F.mse_loss(model(u, i), stars)

    model = MF()
    return model, some_ratings(), loss_fn, torch.optim.SGD(model.parameters(), lr=3.0)


# "Stars are whole numbers, so forward() rounds what it predicts. round() has the gradient 0."
@reco("gradient", "operation", place={"op": "round"}, fixable=False, steps=3)
def forward_rounds_the_stars(planted: bool = True):
    class NeuMF(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = nn.Embedding(80, 8)
            self.item = nn.Embedding(60, 8)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, u, i):
            out = self.mlp(torch.cat([self.user(u), self.item(i)], dim=-1)).squeeze(-1)
            stars = 1 + 4 * torch.sigmoid(out)
            return torch.round(stars) if planted else stars

    def loss_fn(model, batch):
        u, i, stars = batch
        return F.mse_loss(model(u, i), stars)

    model = NeuMF()
    return model, some_ratings(), loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# ----------------------------------------------------------------- densities


# "Mixture density network on the raw progression score, 25 to 346. All five densities underflow: log(0)."
@density("target", "loss", "operation")
def mixture_far_from_raw_targets(planted: bool = True):
    x, y = data.diabetes(128, raw_y=planted)

    class MDN(nn.Module):
        def __init__(self, k=5):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(10, 32), nn.Tanh())
            self.pi = nn.Linear(32, k)
            self.mu = nn.Linear(32, k)
            self.sigma = nn.Linear(32, k)

        def forward(self, x):
            h = self.body(x)
            return F.softmax(self.pi(h), dim=-1), self.mu(h), torch.exp(self.sigma(h))

    def mdn_loss(out, y):
        pi, mu, sigma = out
        gauss = torch.exp(-0.5 * ((y - mu) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return -torch.log((pi * gauss).sum(dim=1)).mean()

    model = MDN()
    return model, (x, y), supervised(mdn_loss), torch.optim.Adam(model.parameters(), lr=0.01)


# "Two heads, mean and log-variance, as everyone does. GaussianNLLLoss wants the variance."
@density("loss", "operation", fixable=False)
def log_variance_as_variance(planted: bool = True):
    x, y = data.diabetes(128)

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(10, 32), nn.ReLU())
            self.mean = nn.Linear(32, 1)
            self.log_var = nn.Linear(32, 1)

        def forward(self, x):
            h = self.trunk(x)
            return self.mean(h), self.log_var(h)

    nll = nn.GaussianNLLLoss()

    def loss_fn(model, batch):
        mean, log_var = model(batch[0])
        return nll(mean, batch[1], log_var if planted else log_var.exp())

    model = TwoHeads()
    return model, (x, y), loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# ----------------------------------------------------------- custom Function


class GoodSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad_output * s * (1 + x * (1 - s))


class BadSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))


# "A Swish of my own that saves memory. Its backward() returns the derivative, and forgets grad_output."
@fn("gradient", "operation", place={"module": ("act1", "act2")}, fixable=False, steps=3)
def backward_forgets_grad_output(planted: bool = True):
    class MemoryEfficientSwish(nn.Module):
        def forward(self, x):
            return (BadSwish if planted else GoodSwish).apply(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(64, 48)
            self.act1 = MemoryEfficientSwish()
            self.fc2 = nn.Linear(48, 32)
            self.act2 = MemoryEfficientSwish()
            self.fc3 = nn.Linear(32, 10)

        def forward(self, x):
            return self.fc3(self.act2(self.fc2(self.act1(self.fc1(x)))))

    model = Net()
    return model, data.digits(), supervised(F.cross_entropy), torch.optim.SGD(model.parameters(), lr=0.25)


# ------------------------------------------------------ normalisation layers


# "A loop puts Linear and LayerNorm for every size in the list; the last size is 1, and LayerNorm(1) gives its bias."
@norm("gradient", "operation", place={"module": "net.7"}, fixable=False, steps=3)
def layer_norm_of_one_output(planted: bool = True):
    x, y = data.diabetes(128)
    sizes = [10, 32, 32, 1]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if planted or b > 1:
            layers.append(nn.LayerNorm(b))
        if i < len(sizes) - 2:
            layers.append(nn.GELU())

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*layers)

        def forward(self, x):
            return self.net(x)

    model = MLP()
    return model, (x, y), supervised(F.mse_loss), torch.optim.Adam(model.parameters(), lr=0.01)


# "'Zero-init the last BatchNorm of each branch' became zero-init of all, in a net without any skip."
@norm("weights", "gradient", place={"parameter": ("0.1.weight", "1.1.weight", "2.1.weight")}, steps=3)
def all_gammas_zero(planted: bool = True):
    def block(n_in, n_out):
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

    model = nn.Sequential(block(1, 8), block(8, 16), block(16, 16), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and planted:
            nn.init.zeros_(m.weight)
    return model, data.images(96), supervised(F.cross_entropy), torch.optim.SGD(model.parameters(), lr=0.1)


# ---------------------------------------------------------------- optimizers


# "weight_decay=5.0 with SGD at 0.1, meant was 5e-4: it halves every weight in every step."
@opt("optimizer", steps=5)
def weight_decay_of_five(planted: bool = True):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5.0 if planted else 5e-4)
    return model, data.digits(), supervised(nn.CrossEntropyLoss(label_smoothing=0.05)), optimizer


# "The sweep drew the momentum from 0.8 to 1.3. Above 1 the old steps grow instead of fading; here a few steps in."
@opt("optimizer", steps=5)
def momentum_above_one(planted: bool = True):
    x, y = data.diabetes(128)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=1.25 if planted else 0.8)
    batch, loss_fn = (x, y), supervised(nn.MSELoss())
    train(model, batch, loss_fn, optimizer, 7)
    return model, batch, loss_fn, optimizer


# "I standardised the targets and loaded the optimizer's state of the earlier run, which had seen them raw."
@opt("optimizer", steps=3)
def moments_of_another_scale(planted: bool = True):
    x, raw = data.diabetes(128, raw_y=True)
    y = (raw - raw.mean()) / raw.std()
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    start = copy.deepcopy(model.state_dict())
    old = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        old.zero_grad()
        F.mse_loss(model(x), raw).backward()
        old.step()
    model.load_state_dict(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if planted:
        optimizer.load_state_dict(old.state_dict())
    optimizer.zero_grad()
    return model, (x, y), supervised(F.mse_loss), optimizer


# ----------------------------------------------------------- mixed precision


# "model.half() and Adam: squares of small gradients and eps=1e-8 are both 0 in float16, so it divides by 0."
@amp("precision", "optimizer", steps=3)
def half_weights_in_adam(planted: bool = True):
    x, y = data.digits(128)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    if planted:
        model, x = model.half(), x.half()
    return model, (x, y), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=1e-3)


# ------------------------------------------------------------------- healthy


# Attention pooling over padded rows: -inf where there is no item, one entry is always left.
@healthy()
def attention_pool_with_padding():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.key = nn.Linear(8, 16)
            self.query = nn.Parameter(torch.randn(16) / 4)
            self.out = nn.Linear(8, 2)

        def forward(self, items, mask):
            score = torch.tanh(self.key(items)) @ self.query
            weight = score.masked_fill(~mask, float("-inf")).softmax(dim=1)
            return self.out((weight.unsqueeze(-1) * items).sum(1))

    items = torch.randn(64, 9, 8)
    lengths = torch.randint(1, 10, (64,))
    mask = torch.arange(9) < lengths[:, None]
    y = (items[:, 0, 0] > 0).long()

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["items"], batch["mask"]), batch["labels"])

    model = Pool()
    batch = {"items": items, "mask": mask, "labels": y}
    return model, batch, loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# The last column is a unix time stamp that the model does not read.
@healthy(steps=3)
def time_stamp_not_read():
    x, y = data.diabetes(128)
    x = torch.cat([x, 1.7e9 + torch.rand(128, 1) * 1e7], dim=1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, x):
            return self.net(x[:, :10])

    model = Net()
    return model, (x, y), supervised(F.mse_loss), torch.optim.Adam(model.parameters(), lr=0.01)


# Category codes lie in a float tensor beside the numbers, and go through long() into an embedding.
@healthy(steps=3)
def shop_ids_in_a_float_column():
    x, y = data.diabetes(128)
    shop = torch.randint(0, 500, (128, 1)).float()

    class Tabular(nn.Module):
        def __init__(self):
            super().__init__()
            self.shop = nn.Embedding(500, 4)
            self.net = nn.Sequential(nn.Linear(14, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, x):
            return self.net(torch.cat([self.shop(x[:, 0].long()), x[:, 1:]], dim=1))

    model = Tabular()
    return model, (torch.cat([shop, x], 1), y), supervised(F.mse_loss), torch.optim.Adam(model.parameters(), lr=0.01)


# Bytes as uint8 in the batch; the model divides by 255.
@healthy()
def uint8_images():
    x, y = data.images(96, top=255.0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 12, 3, padding=1)
            self.fc = nn.Linear(12 * 16, 10)

        def forward(self, x):
            x = x.float().div(255)
            return self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))

    model = Net()
    return model, (x.to(torch.uint8), y), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=5e-3)


# Raw wine columns, but the first layer is a BatchNorm.
@healthy(steps=3)
def batch_norm_takes_raw_columns():
    x, y = data.wine(128, raw=True)
    model = nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))
    return model, (x, y), supervised(F.cross_entropy), torch.optim.SGD(model.parameters(), lr=0.1)


# Skewed raw columns through log1p in the forward pass.
@healthy()
def log1p_of_raw_columns():
    x, y = data.cancer(160, raw=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(30)
            self.fc1 = nn.Linear(30, 32)
            self.fc2 = nn.Linear(32, 1)

        def forward(self, x):
            return self.fc2(F.relu(self.fc1(self.norm(torch.log1p(x))))).squeeze(1)

    model = Net()
    return (
        model,
        (x, y.float()),
        supervised(F.binary_cross_entropy_with_logits),
        torch.optim.Adam(model.parameters(), lr=0.01),
    )


# ImageNet statistics on gray digits: a mean of about -0.6, values from -2.1 to 2.6.
@healthy(steps=3)
def imagenet_statistics():
    x, y = data.images(96)
    x = x.expand(-1, 3, 8, 8)
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return model, (x, y), supervised(nn.CrossEntropyLoss(label_smoothing=0.1)), optimizer


# Targets around 5, not centred: a first loss of 29, which falls.
@healthy(steps=3)
def targets_off_zero():
    x, y = data.diabetes(128)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    return model, (x, 5 + y), supervised(F.mse_loss), torch.optim.Adam(model.parameters(), lr=0.01)


# Raw targets of 25 to 346, the head's bias starts at their mean, a rate to match.
@healthy(steps=3)
def raw_targets_with_a_bias_at_their_mean():
    x, y = data.diabetes(128, raw_y=True)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    nn.init.constant_(model[2].bias, float(y.mean()))
    return model, (x, y), supervised(nn.L1Loss()), torch.optim.Adam(model.parameters(), lr=0.3)


# Fine-tuning: one epoch in, a rate of 1e-4 with Adam. It learns slowly, as it should.
@healthy(steps=3)
def small_rate_that_learns():
    x, y = data.digits(128)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, (x, y), supervised(F.cross_entropy), torch.optim.Adam(model.parameters(), lr=1e-4)


# The first step of a warm-up: 1/20 of the rate.
@healthy(steps=3)
def first_step_of_a_warm_up():
    x, y = data.digits(128)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    return model, (x, y), supervised(F.cross_entropy), optimizer


# Fraud: 3 % positives, pos_weight in the loss.
@healthy()
def three_percent_positives():
    x = torch.randn(400, 12)
    y = (x[:, 0] + x[:, 1] > 2.7).float()
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 1))
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([30.0]))

    def loss_fn(model, batch):
        return criterion(model(batch["x"]).squeeze(-1), batch["y"])

    return model, {"x": x, "y": y}, loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# A Gaussian likelihood of a nearly noiseless curve: the loss is negative, and goes on falling.
@healthy(steps=3)
def negative_log_likelihood_below_zero():
    x = torch.linspace(-2, 2, 128).unsqueeze(1)
    y = 0.05 * torch.sin(2 * x)

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1, 32), nn.Tanh())
            self.mean, self.log_var = nn.Linear(32, 1), nn.Linear(32, 1)
            nn.init.constant_(self.log_var.bias, -3.0)

        def forward(self, x):
            h = self.body(x)
            return self.mean(h), self.log_var(h)

    def loss_fn(model, batch):
        x, y = batch
        mean, log_var = model(x)
        return 0.5 * (log_var + (y - mean) ** 2 * torch.exp(-log_var)).mean()

    model = Heads()
    return model, (x, y), loss_fn, torch.optim.Adam(model.parameters(), lr=3e-3)


# SimSiam: minus a cosine, one side detached.
@healthy(steps=3)
def simsiam():
    class SimSiam(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
            self.predictor = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))

        def forward(self, x):
            z = self.encoder(x)
            return z.detach(), self.predictor(z)

    def loss_fn(model, views):
        (z1, p1), (z2, p2) = model(views[0]), model(views[1])
        return -0.5 * (F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean())

    x, _ = data.digits(128)
    views = (x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x))
    model = SimSiam()
    return model, views, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# bfloat16 autocast, no scaler, float32 weights.
@healthy(steps=3)
def autocast_bfloat16():
    model = nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10)
    )

    def loss_fn(model, batch):
        x, y = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y)

    return model, data.digits(128), loss_fn, torch.optim.AdamW(model.parameters(), lr=2e-3)


# Linear probe: the body is frozen and in eval mode, the optimizer has the head.
@healthy(steps=3)
def linear_probe():
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU()).eval()
            self.head = nn.Linear(128, 10)
            self.body.requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                h = self.body(x)
            return self.head(h)

    model = Probe()
    return model, data.digits(128), supervised(F.cross_entropy), torch.optim.SGD(model.head.parameters(), lr=0.5)


# The generator's half of a GAN step: the discriminator is there, the optimizer has only the generator.
@healthy()
def generator_step():
    class Gan(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Tanh())
            self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

        def forward(self, z):
            return self.discriminator(self.generator(z))

    def loss_fn(model, batch):
        return F.binary_cross_entropy_with_logits(model(batch["z"]), torch.ones(64, 1))

    model = Gan()
    optimizer = torch.optim.Adam(model.generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    return model, {"z": torch.randn(64, 8)}, loss_fn, optimizer


# BYOL-like: an EMA copy gives the targets; its parameters need no gradient.
@healthy()
def ema_teacher():
    class Byol(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24))
            self.target = copy.deepcopy(self.online).requires_grad_(False)
            self.predictor = nn.Linear(24, 24)

        def forward(self, a, b):
            with torch.no_grad():
                wanted = F.normalize(self.target(b), dim=-1)
            return (F.normalize(self.predictor(self.online(a)), dim=-1) - wanted).pow(2).sum(-1).mean()

    x, _ = data.digits(128)
    model = Byol()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    batch = (x, x + 0.2 * torch.randn_like(x))
    return model, batch, lambda model, batch: model(*batch), optimizer


# Session-based recommender: item embedding (std 0.02) tied to the output, padding_idx, ignore_index.
@healthy(steps=3)
def tied_item_embedding():
    class Gru4Rec(nn.Module):
        def __init__(self, items=200):
            super().__init__()
            self.item = nn.Embedding(items, 32, padding_idx=0)
            nn.init.normal_(self.item.weight, std=0.02)
            self.gru = nn.GRU(32, 32, batch_first=True)
            self.norm = nn.LayerNorm(32)

        def forward(self, session):
            h, _ = self.gru(self.item(session))
            return F.linear(self.norm(h), self.item.weight)

    def loss_fn(model, session):
        logits = model(session[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), session[:, 1:].flatten(), ignore_index=0)

    start = torch.randint(1, 30, (48, 1))
    session = (start + torch.arange(12) * 3) % 199 + 1
    session = torch.where(torch.arange(12) < torch.randint(4, 13, (48, 1)), session, 0)
    model = Gru4Rec()
    return model, session, loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# BPR with sparse embeddings and SparseAdam; most rows get no gradient in a batch.
@healthy()
def sparse_bpr():
    class Bpr(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = nn.Embedding(300, 16, sparse=True)
            self.item = nn.Embedding(2000, 16, sparse=True)
            for table in (self.user, self.item):
                nn.init.normal_(table.weight, std=0.05)

        def forward(self, u, i, j):
            return (self.user(u) * (self.item(i) - self.item(j))).sum(1)

    def loss_fn(model, batch):
        return -F.logsigmoid(model(*batch)).mean()

    batch = (torch.randint(0, 300, (128,)), torch.randint(0, 1000, (128,)), torch.randint(1000, 2000, (128,)))
    model = Bpr()
    return model, batch, loss_fn, torch.optim.SparseAdam(model.parameters(), lr=0.02)


# A driven oscillator as a PINN, u'' + 100 u = 100 cos(3t): the loss starts in the thousands, and falls.
@healthy(steps=3)
def pinn_with_a_high_first_loss():
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss_fn(model, t):
        t = t.clone().requires_grad_(True)
        u = model(t)
        du = torch.autograd.grad(u.sum(), t, create_graph=True)[0]
        d2u = torch.autograd.grad(du.sum(), t, create_graph=True)[0]
        residual = d2u + 100 * u - 100 * torch.cos(3 * t)
        return residual.pow(2).mean()

    return net, torch.linspace(0, 1, 80).view(-1, 1), loss_fn, torch.optim.Adam(net.parameters(), lr=2e-3)


# Physics with torch.func: functional_call, grad and vmap over points.
@healthy()
def heat_by_functional_call():
    net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def loss_fn(model, batch):
        params = dict(model.named_parameters())

        def u(point):
            return torch.func.functional_call(model, params, (point,)).squeeze(-1)

        first = torch.func.vmap(torch.func.grad(u))(batch["inside"])
        second = torch.func.vmap(torch.func.hessian(u))(batch["inside"])
        residual = first[:, 1] - 0.1 * second[:, 0, 0]
        start = torch.func.vmap(u)(batch["start"]) - torch.sin(math.pi * batch["start"][:, 0])
        return residual.pow(2).mean() + start.pow(2).mean()

    start = torch.cat([torch.linspace(0, 1, 30).view(-1, 1), torch.zeros(30, 1)], 1)
    return net, {"inside": torch.rand(40, 2), "start": start}, loss_fn, torch.optim.Adam(net.parameters(), lr=3e-3)


# Mean over neighbours with isolated nodes: clamp(min=1). Only a few nodes have labels.
@healthy()
def sage_with_isolated_nodes():
    class Sage(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.other = nn.Linear(12, 16), nn.Linear(12, 16, bias=False)
            self.out = nn.Linear(16, 3)

        def forward(self, x, edge_index):
            src, dst = edge_index
            total = torch.zeros_like(x).index_add(0, dst, x[src])
            degree = torch.bincount(dst, minlength=len(x)).clamp(min=1)
            return self.out(F.relu(self.own(x) + self.other(total / degree[:, None])))

    x, edge_index, y = a_graph(isolated=9)
    train_mask = torch.zeros(60, dtype=torch.bool)
    train_mask[:24] = True

    def loss_fn(model, batch):
        logits = model(batch["x"], batch["edge_index"])
        return F.cross_entropy(logits[batch["mask"]], batch["y"][batch["mask"]])

    model = Sage()
    batch = {"x": x, "edge_index": edge_index, "y": y, "mask": train_mask}
    return model, batch, loss_fn, torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)


# Graph attention: softmax over a node's edges by scatter_reduce (the largest taken off) and index_add.
@healthy()
def graph_attention_by_scatter():
    class Gat(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(12, 16, bias=False)
            self.a_src, self.a_dst = nn.Linear(16, 1, bias=False), nn.Linear(16, 1, bias=False)
            self.out = nn.Linear(16, 3)

        def forward(self, x, edge_index):
            src, dst = edge_index
            h = self.lin(x)
            score = F.leaky_relu(self.a_src(h)[src] + self.a_dst(h)[dst], 0.2).squeeze(1)
            top = torch.full((len(x),), float("-inf")).scatter_reduce(0, dst, score.detach(), "amax")
            e = torch.exp(score - top[dst])
            total = torch.zeros(len(x)).index_add(0, dst, e)
            return self.out(F.elu(torch.zeros_like(h).index_add(0, dst, (e / total[dst])[:, None] * h[src])))

    def loss_fn(model, batch):
        x, edge_index, y = batch
        return F.cross_entropy(model(x, edge_index), y)

    model = Gat()
    return model, a_graph(), loss_fn, torch.optim.Adam(model.parameters(), lr=0.02)


# Quantized activations with a straight-through estimator; round itself has no gradient.
@healthy()
def straight_through_round():
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.round(x * 8) / 8

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x):
            return self.fc2(Round.apply(torch.clamp(self.fc1(x), -2, 2)))

    model = Net()
    return model, data.digits(128), supervised(F.cross_entropy), torch.optim.SGD(model.parameters(), lr=0.1)


# A mixture density network with logsumexp, standardised targets.
@healthy(steps=3)
def mixture_by_logsumexp():
    x, y = data.diabetes(128)

    class Mdn(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(10, 32)
            self.head = nn.Linear(32, 12)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x))).chunk(3, dim=1)

    def loss_fn(model, batch):
        x, y = batch
        logits, mu, log_sigma = model(x)
        normal = torch.distributions.Normal(mu, log_sigma.clamp(-4, 3).exp())
        return -torch.logsumexp(F.log_softmax(logits, dim=1) + normal.log_prob(y), dim=1).mean()

    model = Mdn()
    return model, (x, y), loss_fn, torch.optim.Adam(model.parameters(), lr=0.01)


# Cox with logcumsumexp; 70 % are censored.
@healthy()
def cox_with_logcumsumexp():
    x, y = data.cancer(160)
    time = torch.rand(160) * 5 + 3 * y
    event = (torch.rand(160) < 0.3).float()
    order = torch.argsort(time, descending=True)

    def loss_fn(model, batch):
        x, event = batch
        risk = model(x).squeeze(1)
        return -((risk - torch.logcumsumexp(risk, 0)) * event).sum() / event.sum()

    model = nn.Linear(30, 1)
    return model, (x[order], event[order]), loss_fn, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


# Three quantiles at once: (n, 3) against (n, 1) is meant to broadcast.
@healthy()
def pinball_for_three_quantiles():
    x, y = data.diabetes(128)
    q = torch.tensor([0.1, 0.5, 0.9])

    def pinball(pred, y):
        error = y - pred
        return torch.maximum(q * error, (q - 1) * error).mean()

    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
    return model, (x, y), supervised(pinball), torch.optim.Adam(model.parameters(), lr=0.01)


# Gaps in a sensor series are NaN in the targets; the loss takes the others only.
@healthy()
def missing_targets_are_left_out():
    x, y = windows(a_series(140), 24, 96)
    y = y.clone()
    y[torch.rand(96) < 0.2] = float("nan")

    class Forecaster(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(1, 16, batch_first=True)
            self.out = nn.Linear(16, 1)

        def forward(self, x):
            return self.out(self.gru(x)[0][:, -1])

    def loss_fn(model, batch):
        x, y = batch
        seen = ~torch.isnan(y)
        return F.mse_loss(model(x)[seen], y[seen])

    model = Forecaster()
    return model, (x, y), loss_fn, torch.optim.Adam(model.parameters(), lr=0.02)


# Twenty residual blocks, each branch ends in a gamma of 0.
@healthy(steps=3)
def twenty_blocks_with_zero_gammas():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.fc1, self.fc2 = nn.Linear(32, 32), nn.Linear(32, 32)
            self.gamma = nn.Parameter(torch.zeros(32))

        def forward(self, x):
            return x + self.gamma * self.fc2(F.silu(self.fc1(self.norm(x))))

    model = nn.Sequential(nn.Linear(64, 32), *(Block() for _ in range(20)), nn.LayerNorm(32), nn.Linear(32, 10))
    return model, data.digits(96), supervised(F.cross_entropy), torch.optim.AdamW(model.parameters(), lr=2e-3)
