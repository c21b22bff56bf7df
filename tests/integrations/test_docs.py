"""The code in docs/integrations.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import initlab
from initlab import ClipStats

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # of the packages, about small machines
PAGE = Path(__file__).resolve().parents[2] / "docs/integrations.md"


def block(heading, number=0):
    """The code under a heading."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]
    return compile(code, f"{PAGE.name}: {heading}", "exec")


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(4)]


def net():
    torch.manual_seed(0)
    return nn.Linear(4, 1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own: some of the code writes where it runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def module_of(lightning):
    """The net as a LightningModule."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

        def training_step(self, batch):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    return Module()


@pytest.mark.xdist_group("lightning")
def test_lightning(here):
    import lightning

    scope = {"model": module_of(lightning), "data": torch.utils.data.DataLoader(batches(), batch_size=None)}
    exec(block("Lightning"), scope)
    assert scope["callback"].clippers[0].stats().steps == 4


@pytest.mark.xdist_group("transformers")
def test_transformers(here, monkeypatch):
    import transformers

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    monkeypatch.setenv("DISABLE_TQDM", "1")
    scope = {"model": Model(), "data": [{"x": x[i], "labels": y[i]} for x, y in batches() for i in range(8)]}
    exec(block("Hugging Face's Trainer"), scope)
    assert scope["trainer"].clipper.stats().steps == 12  # 32 rows, 8 a batch, three epochs
    assert isinstance(scope["trainer"], transformers.Trainer)


@pytest.mark.xdist_group("transformers")
def test_accelerate(here):
    model = net()
    scope = {"initlab": initlab, "model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    scope |= {"data": torch.utils.data.DataLoader(batches(), batch_size=None), "loss_fn": nn.functional.mse_loss}
    exec(block("accelerate"), scope)
    assert scope["clipper"].stats().steps == 2


def test_checkpoints_of_torch(here):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.1)
    clipper = initlab.GradClipper(optimizer, 1.0)
    parameter.grad = torch.ones(2)
    optimizer.step()
    exec(block("Checkpoints of torch"), {"clipper": clipper, "folder": here})
    assert clipper.stats() == ClipStats(1, 1, 0, None, None)


@pytest.mark.xdist_group("lightning")
def test_guards(here):
    import lightning
    import transformers
    from accelerate import Accelerator

    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    scope = {"lightning": lightning, "model": module_of(lightning), "data": loader}
    exec(block("Guards"), scope)
    assert scope["callback"].report().steps == 4

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    rows = [{"x": x, "labels": y} for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    arguments = transformers.TrainingArguments(
        here / "run", per_device_train_batch_size=8, num_train_epochs=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    scope = {"transformers": transformers, "net": Net(), "arguments": arguments, "rows": rows}
    exec(block("Guards", 1), scope)
    assert scope["trainer"].guard.report().steps == 4

    accelerator, model = Accelerator(cpu=True), net()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01))
    loss_fn = initlab.supervised(nn.functional.mse_loss)
    scope = {"accelerator": accelerator, "prepared": prepared, "optimizer": optimizer, "loss_fn": loss_fn}
    exec(block("Guards", 2), scope | {"loader": loader})
