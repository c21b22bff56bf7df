"""What is wrong with a script's loop, which no single step shows; and loops that only look so."""

import textwrap

import pytest
import torch

from initlab import cli
from initlab.scripts import run_script, running

pytestmark = pytest.mark.long  # each script trains for some hundred steps

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
torch.manual_seed(0)
x = torch.randn(256, 8)
y = (x[:, :1] * 2).tanh() + 0.5 * x[:, 1:2]
labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
def net(out):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, out))
def batches(n):
    for i in range(n):
        at = torch.arange(32) + 32 * (i % 8)
        yield x[at], y[at], labels[at]
"""

WRONG = {
    "gradients that pile up": (
        """
        model = net(1)
        opt = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for a, b, _ in batches(120):
            F.mse_loss(model(a), b).backward()
            opt.step()
        """,
        "gradient",
        "not set to zero",
    ),
    "gradients that pile up, clipped": (
        """
        model = net(1)
        opt = torch.optim.SGD(model.parameters(), lr=1e-3)
        for a, b, _ in batches(60):
            F.mse_loss(model(a), b).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        """,
        "gradient",
        "not set to zero",
    ),
    "inputs beyond a tanh's range": (  # what 25 steps without them do not show
        """
        from sklearn.datasets import load_digits
        x, y = map(torch.tensor, load_digits(return_X_y=True))
        x = x.float() * 100
        torch.manual_seed(0)
        layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(64, 10))
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for epoch in range(7):
            for i in range(0, 1792, 64):
                opt.zero_grad()
                F.cross_entropy(model(x[i : i + 64]), y[i : i + 64]).backward()
                opt.step()
        """,
        "input",
        "root mean square",
    ),
    "a schedule that counts batches as epochs": (
        """
        model = net(4)
        opt = torch.optim.Adam(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.1)
        for a, _, c in batches(300):
            opt.zero_grad()
            F.cross_entropy(model(a), c).backward()
            opt.step()
            schedule.step()
        """,
        "learning rate",
        "its schedule has taken it away",
    ),
    "a discriminator that steps before the generator's backward pass": (
        """
        made, judge = net(2), nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        of_made = torch.optim.Adam(made.parameters(), lr=1e-3)
        of_judge = torch.optim.Adam(judge.parameters(), lr=1e-3)
        for a, b, _ in batches(20):
            scores = judge(made(a))
            of_judge.zero_grad()
            F.softplus(scores).mean().backward(retain_graph=True)
            of_judge.step()
            of_made.zero_grad()
            F.softplus(-scores).mean().backward()
            of_made.step()
        """,
        "optimizer",
        "between the forward pass and this backward()",
    ),
    "a warm-up without an end": (
        """
        model = net(1)
        opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: (step + 1) / 10)
        for a, b, _ in batches(2000):
            opt.zero_grad()
            F.mse_loss(model(a), b).backward()
            opt.step()
            schedule.step()
        """,
        "learning rate",
        "its schedule has raised it",
    ),
    "no step": (
        """
        model = net(1)
        opt = torch.optim.Adam(model.parameters())
        for a, b, _ in batches(60):
            opt.zero_grad()
            F.mse_loss(model(a), b).backward()
        """,
        "optimizer",
        "no optimizer has taken a step",
    ),
    "an optimizer of another model": (
        """
        model, other = net(1), net(1)
        opt = torch.optim.Adam(other.parameters())
        for a, b, _ in batches(60):
            model.zero_grad()
            F.mse_loss(model(a), b).backward()
            opt.step()
        """,
        "optimizer",
        "no optimizer that takes steps has 0.weight",
    ),
    "a schedule of 0": (
        """
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: (step + 1) // 1000)
        for a, b, _ in batches(60):
            opt.zero_grad()
            F.mse_loss(model(a), b).backward()
            opt.step()
            schedule.step()
        """,
        "learning rate",
        "0.001: its schedule",
    ),
    "a loss of numbers": (
        """
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-3)
        for a, b, _ in batches(60):
            opt.zero_grad()
            loss = torch.tensor(F.mse_loss(model(a), b).item(), requires_grad=True)
            loss.backward()
            opt.step()
        """,
        "gradient",
        "depends on no parameter",
    ),
    "hidden units that are dead": (
        """
        model = net(1)
        nn.init.constant_(model[0].bias, -50.0)
        opt = torch.optim.Adam(model.parameters(), lr=5e-2)
        for a, b, _ in batches(60):
            opt.zero_grad()
            F.mse_loss(model(a), b + 3).backward()
            opt.step()
        """,
        "weights",
        "zero for every row",
    ),
    "a short run with a rate that is too large": (
        """
        model = net(3)
        opt = torch.optim.SGD(model.parameters(), lr=30.0)
        for a, _, c in batches(40):
            opt.zero_grad()
            F.cross_entropy(model(a), c).backward()
            opt.step()
        """,
        "learning rate",
        "too large",
    ),
    "a loss that falls, of probabilities": (
        """
        model = nn.Sequential(net(3), nn.Softmax(1))
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        for a, _, c in batches(60):
            opt.zero_grad()
            F.cross_entropy(model(a), c).backward()
            opt.step()
        """,
        "loss",
        "a softmax of a softmax",
    ),
    "an optimizer whose model runs under no_grad": (
        """
        g, d = net(8), net(1)
        og, od = torch.optim.Adam(g.parameters(), 1e-3), torch.optim.Adam(d.parameters(), 1e-3)
        def sample():
            with torch.no_grad():
                return g(torch.randn(32, 8))
        for a, _, _ in batches(40):
            ld = F.softplus(-d(a)).mean() + F.softplus(d(sample())).mean()
            od.zero_grad(); ld.backward(); od.step()
            lg = F.softplus(-d(sample())).mean()
            og.zero_grad(); lg.backward(); og.step()
        """,
        "gradient",
        "og takes steps, and no parameter of g that it has gets a gradient: g ran under torch.no_grad()",
    ),
    "a model that was loaded anew": (
        """
        import copy
        def train(model, opt, n):
            for a, b, _ in batches(n):
                loss = F.mse_loss(model(a), b)
                opt.zero_grad(); loss.backward(); opt.step()
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        train(model, opt, 30)
        model = copy.deepcopy(model)
        train(model, opt, 60)
        """,
        "optimizer",
        "made with the parameters of another model",
    ),
    "steps that are taken back": (
        """
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-3)
        shadow = [p.detach().clone() for p in model.parameters()]
        for a, b, _ in batches(80):
            loss = F.mse_loss(model(a), b)
            opt.zero_grad(); loss.backward(); opt.step()
            with torch.no_grad():
                for p, s in zip(model.parameters(), shadow):
                    p.lerp_(s, 0.95)
        """,
        "optimizer",
        "writes to the weights between steps, and takes back",
    ),
    "gradients clipped to nothing": (
        """
        model = net(1)
        opt = torch.optim.SGD(model.parameters(), lr=0.05)
        for a, b, _ in batches(80):
            loss = F.mse_loss(model(a), b)
            opt.zero_grad(); loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
            opt.step()
        """,
        "gradient",
        "clipped to a norm of 0.0001",
    ),
    "a schedule that multiplies by a rate": (
        """
        model = net(3)
        opt = torch.optim.Adam(model.parameters(), lr=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1e-2 * min((i + 1) / 20, 1))
        for a, _, c in batches(100):
            loss = F.cross_entropy(model(a), c)
            opt.zero_grad(); loss.backward(); opt.step(); schedule.step()
        """,
        "learning rate",
        "The optimizer was made with 0.0001, and its schedule multiplies that",
    ),
    "a loss without a bottom": (
        """
        model = net(4)
        opt = torch.optim.Adam(model.parameters(), lr=0.05)
        for a, b, _ in batches(300):
            mean, log_var = model(a).chunk(2, -1)
            kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(-1).mean()
            loss = F.mse_loss(mean, b.expand(-1, 2)) - kl
            opt.zero_grad(); loss.backward(); opt.step()
        """,
        "loss",
        "A sign is wrong",
    ),
    "labels of other rows": (
        """
        model = net(3)
        opt = torch.optim.Adam(model.parameters(), lr=2e-2)
        for i in range(200):
            at = torch.randint(0, 256, (24,))
            loss = F.cross_entropy(model(torch.randn(24, 8)), labels[at])
            opt.zero_grad(); loss.backward(); opt.step()
        """,
        "target",
        "the targets do not follow from the inputs",
    ),
    "a division that the loop makes": (
        """
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-3)
        for i, (a, b, _) in enumerate(batches(30)):
            reward = b[: 32 - i]
            advantage = (reward - reward.mean()) / (reward.std() if i < 20 else reward[:1].std(correction=0))
            loss = -(model(a[: 32 - i]) * advantage).mean()
            opt.zero_grad(); loss.backward(); opt.step()
        """,
        "operation",
        "div in line",
    ),
    "tensors without a module": (
        """
        w = torch.randn(8, 1, requires_grad=True)
        layers = [(w, torch.zeros(1, requires_grad=True))]
        opt = torch.optim.SGD([w, layers[0][1]], lr=0.1)
        x[40, 3] = float("nan")
        for a, b, _ in batches(8):
            opt.zero_grad()
            F.mse_loss(a @ w + layers[0][1], b).backward()
            opt.step()
        """,
        "input",
        "NaN",
    ),
}


@pytest.fixture(autouse=True)
def as_it_was(one_thread, unhurried):
    """The scripts run in this process, and seed torch."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def script(tmp_path, body):
    path = tmp_path / "train.py"
    path.write_text(HEAD + textwrap.dedent(body))
    return str(path)


@pytest.mark.parametrize("name", WRONG)
def test_the_first_cause(tmp_path, name):
    body, kind, said = WRONG[name]
    report = run_script(script(tmp_path, body))
    assert report.diagnosis is not None, str(report)
    cause = report.diagnosis.causes[0]
    assert (cause.kind, said in cause.explanation) == (kind, True), str(report)
    assert report.verdict != "healthy"


RIGHT = {
    "one cycle": """
        model = net(1)
        opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=120)
        for a, b, _ in batches(120):
            opt.zero_grad()
            F.mse_loss(model(a), b).backward()
            opt.step()
            schedule.step()
        """,
    "a schedule that ends at 0, of a run that has learned": """
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 150)
        for a, b, _ in batches(150):
            opt.zero_grad()
            F.mse_loss(model(a), b).backward()
            opt.step()
            schedule.step()
        """,
    "manual steps": """
        model = net(1)
        for a, b, _ in batches(60):
            model.zero_grad()
            F.mse_loss(model(a), b).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.05 * p.grad
        """,
    "a frozen first layer": """
        model = net(1)
        model[0].requires_grad_(False)
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        for a, b, _ in batches(60):
            opt.zero_grad()
            F.mse_loss(model(a), b).backward()
            opt.step()
        """,
    "a first layer that no optimizer has": """
        model = net(1)
        opt = torch.optim.Adam(model[2].parameters(), lr=1e-2)
        for a, b, _ in batches(60):
            opt.zero_grad()
            F.mse_loss(model(a), b).backward()
            opt.step()
        """,
    "gradients set to 0 in place, and accumulated": """
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        for i, (a, b, _) in enumerate(batches(120)):
            F.mse_loss(model(a), b).backward()
            if i % 4 == 3:
                opt.step()
                opt.zero_grad(set_to_none=False)
        """,
    "a function of one's own": """
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x
            @staticmethod
            def backward(ctx, g):
                return 2 * g
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        for a, b, _ in batches(60):
            loss = F.mse_loss(Double.apply(model(a)), b)
            opt.zero_grad(); loss.backward(); opt.step()
        """,
    "weights that are clipped after each step": """
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        for a, b, _ in batches(80):
            loss = F.mse_loss(model(a), b)
            opt.zero_grad(); loss.backward(); opt.step()
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.5, 0.5)
        """,
    "gradients of one norm under Adam": """
        model = net(1)
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        for a, b, _ in batches(80):
            loss = F.mse_loss(model(a), b)
            opt.zero_grad(); loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            opt.step()
        """,
    "a second model from the same line": """
        def train(model, opt):
            for a, b, _ in batches(40):
                loss = F.mse_loss(model(a), b)
                opt.zero_grad(); loss.backward(); opt.step()
        for seed in range(12):
            model = net(1)
            train(model, torch.optim.Adam(model.parameters(), lr=1e-2))
        """,
    "a tuned model that has little left to learn": """
        model = net(3)
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        for a, _, c in batches(400):
            loss = F.cross_entropy(model(a), c)
            opt.zero_grad(); loss.backward(); opt.step()
        opt = torch.optim.Adam(model.parameters(), lr=1e-5)
        for a, _, c in batches(100):
            loss = F.cross_entropy(model(a), c)
            opt.zero_grad(); loss.backward(); opt.step()
        """,
    "two networks that push each other": """
        g, d = net(8), net(1)
        og, od = torch.optim.Adam(g.parameters(), 1e-4), torch.optim.Adam(d.parameters(), 1e-4)
        for a, _, _ in batches(60):
            fake = g(torch.randn(32, 8))
            ld = F.softplus(-d(a)).mean() + F.softplus(d(fake.detach())).mean()
            od.zero_grad(); ld.backward(); od.step()
            lg = F.softplus(-d(fake)).mean()
            og.zero_grad(); lg.backward(); og.step()
        """,
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_loop_that_is_right(tmp_path, name):
    report = run_script(script(tmp_path, RIGHT[name]))
    assert report.verdict == "healthy", str(report)
    assert report.over


def test_a_fault_of_the_watch_does_not_end_the_script(tmp_path, monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(running.Line, "stands_still", fails)
    monkeypatch.setattr(running, "leaves_of", fails)
    path = script(tmp_path, RIGHT["manual steps"] + "\n        print('the end')")
    assert cli.main(["doctor", path]) == 70
    out, err = capsys.readouterr()
    assert "the end" in out
    assert "a fault of ours" in err


def test_a_step_that_raises_an_error(tmp_path):
    body = """
        model = net(1)
        class Failing(torch.optim.SGD):
            def step(self):
                raise ArithmeticError("no step")
        opt = Failing(model.parameters(), lr=0.1)
        for a, b, _ in batches(3):
            F.mse_loss(model(a), b).backward()
            try:
                opt.step()
            except ArithmeticError:
                pass
        (model(x).sum() * float("nan")).backward()
        """
    report = run_script(script(tmp_path, body))
    assert report.stopped == "the loss is nan"
    report = run_script(script(tmp_path, body.replace("except ArithmeticError:", "except KeyError:")))
    assert isinstance(report.error, ArithmeticError)
    assert not torch._C._len_torch_function_stack()
