"""What belongs together and does not: targets that broadcast, noise that no input has, numbers normalised alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initlab import diagnose

pytestmark = pytest.mark.long

G = torch.Generator().manual_seed(0)
X = torch.randn(96, 6, generator=G)
REWARD = X[:, 0] * X[:, 1]


def net(out=1, i=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(i, 32), nn.Tanh(), nn.Linear(32, out))


def run(model, batch, loss_fn, lr=1e-2):
    return diagnose(model, batch, loss_fn, torch.optim.Adam(model.parameters(), lr))


def values(m, b):
    """A target that was computed from the batch and the model, as in Q-learning."""
    with torch.no_grad():
        target = b[1] + 0.9 * m(b[0]).squeeze(1)
    return ((m(b[0]) - target) ** 2).mean()


def pairs(m, b):
    """A ranking loss compares every score with every other, on purpose."""
    scores = m(b[0]).squeeze(1)
    return F.softplus(-(scores[:, None] - scores) * (b[1][:, None] - b[1]).sign()).mean()


def test_a_computed_target_that_broadcasts():
    found = run(net(), (X, REWARD), values)
    assert (found.causes[0].kind, found.causes[0].place.op) == ("loss", "sub"), found
    assert not run(net(), (X, REWARD), pairs).causes


@pytest.mark.parametrize("by_hand", [False, True])
def test_noise_that_the_model_does_not_see(by_hand):
    def loss_fn(m, x, again=True):
        noise = torch.randn_like(x)
        seen = 0.6 * x + 0.8 * (torch.randn_like(x) if again else noise)
        return ((m(seen) - noise) ** 2).mean() if by_hand else F.mse_loss(m(seen), noise)

    found = run(net(6), X, loss_fn)
    assert found.causes[0].kind == "target", found
    assert "noise" in found.causes[0].explanation
    assert not run(net(6), X, lambda m, x: loss_fn(m, x, again=False)).causes


def test_soft_random_labels_are_no_such_noise():
    def loss_fn(m, x):
        return F.binary_cross_entropy_with_logits(m(x), 0.9 + 0.1 * torch.rand(len(x), 1))

    assert not run(net(), X, loss_fn).causes


@pytest.mark.parametrize("groups", [16, 4])
def test_numbers_that_are_normalised_alone(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 8), nn.GroupNorm(groups, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = (x[:, 0, 0, 0] > 0).long() + 2 * (x[:, 0, 1, 1] > 0).long()
    found = run(model, (x, labels), lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert [(c.kind, c.place.module, c.tried) for c in found.causes] == ([("operation", "1", True)] * (groups == 16))


def test_a_suspicion_that_the_experiment_refutes_hides_no_fact():
    """Standardising does not help where the weights are too large for exp: what fails is said all the same."""
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e3)
    x = X * torch.tensor([1.0, 1, 1, 1, 1, 1e4])
    found = diagnose(model, (x, REWARD), lambda m, b: (m(b[0]).exp() - m(b[0]).exp().mean()).mean())
    assert found.verdict == "broken", found
    assert "operation" in {cause.kind for cause in found.causes}, found


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD])
def test_a_break_is_never_healthy(optimizer):
    model = net()
    given = optimizer and optimizer(model.parameters(), 1e-2)
    found = diagnose(model, (X * 1e3, REWARD), lambda m, b: (m(b[0]) * 1e30).exp().log().sin().mean(), given)
    assert found.broke_at is None or found.verdict == "broken"
    assert found.verdict == "broken", found


CURED = {
    "outputs above 0": (lambda m, b: F.mse_loss(torch.log(m(b[0]).squeeze(1)), b[1]), "Softplus"),
    "embeddings of length 1": (lambda m, b: -torch.log(torch.sigmoid(m(b[2]) - m(b[3]) - 2.0)).mean(), "embedding_dim"),
}


class Factors(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(64, 2048), nn.Embedding(64, 2048)

    def forward(self, pair):
        return (self.user(pair[:, 0]) * self.item(pair[:, 1])).sum(-1)


@pytest.mark.parametrize("change", CURED)
def test_an_advice_comes_with_what_keeps_its_values_away(change):
    loss_fn, code = CURED[change]
    ids = torch.randint(0, 64, (256, 2), generator=torch.Generator().manual_seed(0))
    other = torch.randint(0, 64, (256, 2), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = Factors() if "embed" in change else net()
    found = run(model, (X, REWARD, ids, other), loss_fn)
    assert found.causes[0].change == change, found
    assert found.causes[0].tried
    assert code in found.causes[0].remedy
