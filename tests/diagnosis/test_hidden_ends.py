"""diagnose() where what is to be learned does not arrive: gradients that end, masks and rows that hide it, rewards."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose, supervised

G = torch.Generator().manual_seed(0)
X = torch.randn(64, 8, generator=G)
CLASSES = torch.randint(0, 3, (64,), generator=G)
BITS = (X[:, :1] > 0).float()
CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())


def net(out=1, width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, out))


def causes(model, batch, loss_fn, optimizer, **options):
    found = diagnose(model, batch, loss_fn, optimizer, **options)
    return found.causes[0] if found.causes else None, found


def adam(model, lr=1e-2):
    return torch.optim.Adam(model.parameters(), lr)


# A comparison before the loss, and a penalty that gives every parameter some gradient.


def dice(how):
    def loss_fn(model, batch):
        x, y = batch
        p = model(x).sigmoid()
        hits = (p > 0.5).float()
        p = {"compared": hits, "rounded for the log": p, "straight through": p + (hits - p).detach()}[how]
        accuracy = (hits == y).float().mean()  # for the log
        assert accuracy >= 0
        penalty = sum(w.square().sum() for w in model.parameters())
        return 1 - 2 * (p * y).sum() / (p.sum() + y.sum() + 1e-6) + 1e-4 * penalty

    return loss_fn


def test_a_comparison_between_model_and_loss():
    model = net()
    cause, found = causes(model, (X, BITS), dice("compared"), adam(model))
    assert (cause.kind, cause.place.op) == ("gradient", "gt"), found
    assert "gives it no gradient" in cause.explanation


@pytest.mark.parametrize("how", ["rounded for the log", "straight through"])
def test_a_comparison_beside_the_way_is_none(how):
    model = net()
    assert causes(model, (X, BITS), dice(how), adam(model))[1].verdict == "healthy"


def test_a_comparison_that_is_all_of_the_loss():
    model = net()
    cause, found = causes(model, (X, BITS), lambda m, b: ((m(b[0]) > 0).float() - b[1]).abs().mean(), adam(model))
    assert (cause.kind, cause.place.op) == ("loss", "gt"), found
    assert "comparison" in cause.remedy


def test_an_output_that_only_the_log_reads():
    """The loss is made of something else that the model keeps."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = net(4), nn.Linear(4, 1)

        def forward(self, x):
            self.hidden = self.body(x)
            return self.head(self.hidden).detach()

    torch.manual_seed(0)
    model = Keeps()
    target = X[:, :4] * 0.1 + 3.0

    def loss_fn(model, batch):
        model(batch[0])
        return F.mse_loss(model.hidden, batch[1])

    cause, found = causes(model, (X, target), loss_fn, torch.optim.SGD(model.body.parameters(), 1e-9))
    assert cause is None or cause.kind != "gradient", found


# A nearest row of a table, whose choice a small disturbance does not change.


class Nearest(nn.Module):
    def __init__(self, straight_through):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder = nn.Linear(8, 2), nn.Linear(2, 8)
        self.table = nn.Parameter(torch.eye(2) * torch.tensor([[4.0], [-4.0]]), requires_grad=False)
        self.straight_through = straight_through

    def forward(self, x):
        z = self.encoder(x)
        chosen = self.table[torch.cdist(z + 3.0, self.table).argmin(1)]
        return self.decoder(z + (chosen - z).detach() if self.straight_through else chosen)


def test_an_encoder_behind_argmin():
    model = Nearest(False)
    cause, found = causes(model, (X,), lambda m, b: F.mse_loss(m(b[0]), b[0]), adam(model))
    assert (cause.kind, cause.place.op) == ("gradient", "argmin"), found
    assert cause.place.module == "encoder"


def test_an_encoder_with_a_straight_through_estimator():
    model = Nearest(True)
    cause, found = causes(model, (X,), lambda m, b: F.mse_loss(m(b[0]), b[0]), adam(model))
    assert cause is None or cause.place.op != "argmin", found


# no_grad() at the wrong one of two networks.


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = net(3), net(3)
        with torch.no_grad():
            self.teacher[2].weight.mul_(4.0)


def distilled(turned):
    def loss_fn(model, batch):
        with torch.set_grad_enabled(not turned):
            prediction = model.student(batch[0]).log_softmax(1)
        with torch.set_grad_enabled(turned):
            target = model.teacher(batch[0]).softmax(1)
        return F.kl_div(prediction, target, reduction="batchmean")

    return loss_fn


def test_the_teacher_learns_in_place_of_the_student():
    model = Pair()
    cause, found = causes(model, (X,), distilled(True), adam(model.student))
    assert (cause.kind, cause.place.op) == ("gradient", "kl_div"), found
    assert cause.place.parameter.startswith("student.")
    assert "add_param_group" not in cause.remedy  # it would train the teacher


def test_a_student_that_learns():
    model = Pair()
    assert causes(model, (X,), distilled(False), adam(model.student))[1].verdict == "healthy"


def test_an_optimizer_that_has_the_target_network():
    model = nn.ModuleDict({"online": net(3), "target": net(3)})

    def loss_fn(model, batch):
        with torch.no_grad():
            wanted = model["target"](batch[0]) + 1.0
        return F.mse_loss(model["online"](batch[0]), wanted)

    cause, found = causes(model, (X,), loss_fn, adam(model["target"]))
    assert cause.kind == "optimizer", found


# Masks that mean the opposite.


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.attention = nn.Embedding(20, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, ids, ignored):
        x = self.embedding(ids)
        return self.head(self.attention(x, x, x, key_padding_mask=ignored)[0][:, 0])


def padded(inverted):
    ids = torch.randint(2, 20, (64, 10), generator=torch.Generator().manual_seed(3))
    ids[:, 6:] = 0
    labels = (ids[:, 1:6] > 10).sum(1) > 2
    ids[:, 0] = 1  # a first token that says nothing
    return ids, (ids != 0) if inverted else (ids == 0), labels.long()


def masked_loss(model, batch):
    return F.cross_entropy(model(batch[0], batch[1]), batch[2])


def test_a_mask_that_is_inverted():
    model = Masked()
    cause, found = causes(model, padded(True), masked_loss, adam(model))
    assert (cause.kind, cause.place.tensor, cause.tried) == ("input", "batch[1]", True), found
    assert "inverted" in cause.explanation


def test_a_mask_that_is_right():
    model = Masked()
    assert causes(model, padded(False), masked_loss, adam(model))[1].verdict == "healthy"


# Rows that are all the same.


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.EmbeddingBag(20, 16), nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("ids", [torch.ones(64, 5, dtype=torch.long), torch.arange(5).repeat(64, 1)])
def test_rows_that_are_all_the_same(ids):
    model = Bag()
    cause, found = causes(model, (ids, CLASSES), CROSS_ENTROPY, adam(model))
    assert (cause.kind, cause.place.tensor) == ("input", "batch[0]"), found


def test_positions_that_are_the_same_beside_rows_that_are_not():
    class Placed(Bag):
        def forward(self, batch):
            ids, places = batch
            return self.head(self.embedding(ids) + self.embedding(places))

    model = Placed()
    ids = torch.where(torch.rand(64, 5, generator=G) < 0.7, CLASSES[:, None], torch.randint(3, 20, (64, 5)))
    batch = ((ids, torch.arange(5).repeat(64, 1)), CLASSES)
    assert causes(model, batch, CROSS_ENTROPY, adam(model))[1].verdict == "healthy"


# Labels that the code makes, and those of the data.


def contrasted(model, batch):
    one, other = (F.normalize(model(x)) for x in batch)
    logits = torch.cat([(one * other).sum(1, keepdim=True), one @ one.roll(1, 0).T], 1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def test_labels_of_a_contrastive_loss_are_all_one_class():
    model = net(4)
    batch = (X, X + 0.1 * torch.randn(64, 8, generator=G))
    assert causes(model, batch, contrasted, adam(model))[1].verdict == "healthy"


def test_labels_of_the_data_that_are_all_one_class():
    model = net(3)
    labels = torch.rand(64, generator=G)
    cause, found = causes(model, (X, labels), lambda m, b: F.cross_entropy(m(b[0]), b[1].long()), adam(model))
    assert cause.kind == "target", found


# Losses of pairs.


@pytest.mark.parametrize("function", [F.margin_ranking_loss, F.cosine_embedding_loss])
def test_pairs_with_labels_of_0_and_1(function):
    model = net(1 if function is F.margin_ranking_loss else 4)
    labels = (X[:, 0] > X[:, 1]).float()

    def loss_fn(model, batch):
        one, other = model(batch[0]), model(batch[1])
        pair = (one.flatten(), other.flatten()) if function is F.margin_ranking_loss else (one, other)
        return function(*pair, batch[2], margin=0.5)

    batch = (X, X.roll(1, 0), labels)
    cause, found = causes(model, batch, loss_fn, adam(model))
    assert (cause.kind, cause.place.op, cause.place.tensor) == ("target", function.__name__, "batch[2]"), found
    scope = {"batch": batch}
    exec(cause.remedy, scope)
    assert set(scope["batch"][2].unique().tolist()) == {-1.0, 1.0}
    fresh = copy.deepcopy(model)
    found = diagnose(fresh, scope["batch"], loss_fn, adam(fresh))
    assert not any(one.kind == "target" for one in found.causes), found


# Whose scale it is, of tensors that are joined before the first weight.


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(8, width=9)

    def forward(self, x, time):
        return self.net(torch.cat([x, time[:, None]], 1))


@pytest.mark.parametrize("first", ["x", "time"])
def test_the_loud_one_of_joined_inputs(first):
    model = Joined()
    time = torch.randint(0, 1000, (64,), generator=G).float()
    batch = {"x": X, "time": time} if first == "x" else {"time": time, "x": X}
    batch["noise"] = torch.randn(64, 8, generator=G)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    cause, found = causes(model, batch, lambda m, b: F.mse_loss(m(b["x"], b["time"]), b["noise"]), optimizer)
    assert (cause.kind, cause.place.tensor) == ("input", "batch['time']"), found
    assert cause.tried


# Rewards, which the loss makes its targets of.


@pytest.mark.parametrize("scale", [1.0, 3000.0])
def test_rewards_that_are_large(scale):
    torch.manual_seed(0)
    model = nn.ModuleDict({"online": net(3), "target": net(3).requires_grad_(False)})
    rewards = scale * (X[:, 0] + 1.5)
    actions = CLASSES

    def loss_fn(model, batch):
        states, actions, rewards = batch
        value = model["online"](states).gather(1, actions[:, None])[:, 0]
        wanted = rewards + 0.9 * model["target"](states).max(1).values
        return F.mse_loss(value, wanted)

    optimizer = torch.optim.SGD(model["online"].parameters(), 0.05)
    cause, found = causes(model, (X, actions, rewards), loss_fn, optimizer)
    if scale == 1.0:
        assert found.verdict == "healthy", found
    else:
        assert (cause.kind, cause.place.tensor, cause.tried) == ("target", "batch[2]", True), found


# A residual branch that begins as nothing, and rows that break an operation.


def test_a_norm_with_a_weight_of_0_learns_first():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            return x + self.norm(self.inner(x))

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(8, 1))
    assert causes(model, (X, X[:, :1] * 2), supervised(nn.MSELoss()), adam(model, 0.05))[1].verdict == "healthy"


def test_rows_that_an_operation_of_the_model_fails_for():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores, self.head = nn.Linear(8, 1), nn.Linear(8, 3)

        def forward(self, batch):
            x, kept = batch
            weights = self.scores(x)[..., 0].masked_fill(~kept, -torch.inf).softmax(1)
            return self.head((weights[..., None] * x).sum(1))

    torch.manual_seed(0)
    x = torch.randn(32, 5, 8, generator=G)
    kept = torch.ones(32, 5, dtype=torch.bool)
    kept[11] = kept[20] = False
    model = Pooled()
    labels = CLASSES[:32]
    cause, found = causes(model, ((x, kept), labels), CROSS_ENTROPY, adam(model))
    assert (cause.kind, cause.place.op, cause.tried) == ("operation", "softmax", True), found
    assert "(11, 20)" in cause.remedy
