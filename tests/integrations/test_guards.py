"""Guards in the loops of Lightning, Hugging Face's Trainer and accelerate: bad steps are skipped and diagnosed."""

import importlib
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import initlab

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # of the packages, about small machines
BAD = 3  # the batch with a NaN
PRECISIONS = ["32-true", "bf16-mixed"]


def data(count=6):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(count)]
    batches[BAD][0][2, 1] = torch.nan
    return batches


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def check(report, model, folder, step, micro_batch=None):
    """One bad step, diagnosed and saved; the model is finite."""
    assert all(x.isfinite().all() for x in model.state_dict().values())
    assert (report.bad_steps, report.skipped) == (1, 1)
    [found] = report.examined
    assert (found.step, found.micro_batch) == (step, micro_batch)
    cause = found.diagnosis.causes[0]
    assert (found.diagnosis.verdict, cause.kind, cause.place.feature) == ("broken", "input", 1)
    names = {path.name for path in folder.iterdir()}
    assert {f"step-{step}-batch.pt", f"step-{step}.json", f"step-{step}.txt", f"step-{step}.html"} == names
    torch.load(folder / f"step-{step}-batch.pt", weights_only=True)


def lightning_module(lightning, manual=False):
    class Module(lightning.LightningModule):
        automatic_optimization = not manual

        def __init__(self):
            super().__init__()
            self.net = net()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

        def training_step(self, batch, batch_idx):
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True)
            return loss

    return Module()


@pytest.mark.xdist_group("lightning")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("every", [1, 2])
def test_lightning(tmp_path, precision, every):
    import lightning.pytorch as lightning

    from initlab.integrations.lightning import TrainingGuardCallback

    callback = TrainingGuardCallback(max_norm=1.0, folder=tmp_path / "guard", budget=3.0)
    module = lightning_module(lightning)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=1,
        callbacks=[callback],
        precision=precision,
        accumulate_grad_batches=every,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=None))
    place = None if every == 1 else BAD % 2
    check(callback.report(), module, tmp_path / "guard", BAD // every + 1, place)
    assert callback.report().steps == 6 // every
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "log" not in vars(module)


@pytest.mark.xdist_group("lightning")
def test_lightning_refuses_what_it_cannot_run_again(tmp_path):
    import lightning.pytorch as lightning

    from initlab.integrations.lightning import TrainingGuardCallback

    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    loader = torch.utils.data.DataLoader(data(), batch_size=None)
    with pytest.raises(NotImplementedError, match="manual optimization"):
        lightning.Trainer(**quiet, max_epochs=1, callbacks=[TrainingGuardCallback()]).fit(
            lightning_module(lightning, manual=True), loader
        )
    with pytest.raises(RuntimeError, match="gradient_clip_val"):
        lightning.Trainer(**quiet, max_epochs=1, gradient_clip_val=1.0, callbacks=[TrainingGuardCallback()]).fit(
            lightning_module(lightning), loader
        )
    with pytest.raises(RuntimeError, match="before training"):
        TrainingGuardCallback().report()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_transformers(tmp_path, every, bf16):
    import transformers

    from initlab.integrations.transformers import TrainingGuardMixin

    class Trainer(TrainingGuardMixin, transformers.Trainer):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    rows = [{"x": x, "labels": y} for xs, ys in data() for x, y in zip(xs, ys, strict=True)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run",
        per_device_train_batch_size=8,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        bf16=bf16,
        gradient_accumulation_steps=every,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        save_strategy="no",
    )
    options = {"folder": tmp_path / "guard", "budget": 3.0}
    trainer = Trainer(Model(), arguments, train_dataset=rows, guard_options=options)
    trainer.train()
    place = None if every == 1 else BAD % 2
    check(trainer.guard.report(), trainer.model, tmp_path / "guard", BAD // every + 1, place)
    assert trainer.guard.report().steps == 6 // every


@pytest.mark.xdist_group("transformers")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("own_loop", [False, True])
def test_accelerate(tmp_path, every, own_loop):
    from accelerate import Accelerator

    from initlab.integrations.accelerate import AcceleratedGuard

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=every, mixed_precision="bf16")
    model = net()
    loader = torch.utils.data.DataLoader(data(), batch_size=None)
    loss_fn = initlab.supervised(nn.functional.mse_loss)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    options = {"loss_fn": loss_fn, "folder": tmp_path / "guard", "budget": 3.0}
    if own_loop:
        with initlab.guard(prepared, optimizer, scaler=accelerator.scaler, **options) as guard:
            for batch in map(guard.batch, loader):
                with accelerator.accumulate(prepared):
                    accelerator.backward(guard.loss(loss_fn(prepared, batch)))
                    optimizer.step()
                    optimizer.zero_grad()
    else:
        with AcceleratedGuard(accelerator, prepared, optimizer, **options) as guard:
            for batch in loader:
                guard.step(batch)
    place = None if every == 1 else BAD % 2
    check(guard.report(), model, tmp_path / "guard", BAD // every + 1, place)
    assert guard.report().steps == 6 // every


@pytest.mark.parametrize("every", [1, 3])
def test_accelerate_steps_as_its_own_loop_does(every):
    """Weights of guard.step() are those of the loop that accelerate's documentation shows."""
    from accelerate import Accelerator

    from initlab.integrations.accelerate import AcceleratedGuard

    ends = []
    for guarded in (False, True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=every)
        model = net()
        batches = [(x.nan_to_num(), y) for x, y in data()]
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
        loss_fn = initlab.supervised(nn.functional.mse_loss)
        if guarded:
            with AcceleratedGuard(accelerator, prepared, optimizer, loss_fn=loss_fn) as guard:
                for batch in batches:
                    guard.step(batch)
        else:
            for batch in batches:
                with accelerator.accumulate(prepared):
                    accelerator.backward(loss_fn(prepared, batch))
                    optimizer.step()
                    optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.state_dict().values()])
    assert all(map(torch.equal, *ends))


def test_tensorboard_and_wandb(tmp_path):
    """The real packages take the rows, where they are installed."""
    if not find_spec("tensorboard"):
        pytest.skip("no tensorboard here: the tests do not bring it")  # nor wandb, which is large
    tensorboard = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path / "board")
    logs = [writer]
    run = None
    try:
        import wandb

        run = wandb.init(mode="offline", dir=str(tmp_path), project="guard")
        logs.append(run)
    except ImportError:
        pass
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss_fn = initlab.supervised(nn.functional.mse_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initlab.guard(model, optimizer, loss_fn=loss_fn, log=logs, log_every=2, budget=1.0) as guard:
            for batch in data():
                guard.step(batch)
    writer.close()
    events = tensorboard.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [one.step for one in events.Scalars("initlab/norm")] == [2, 4, 6]
    assert "initlab/top/0.weight" in events.Tags()["scalars"]
    if run is not None:
        assert run.summary["initlab/step"] == 6
        run.finish()
