"""GradClipperCallback in Lightning's Trainer. 200 steps of it: test_loops.py."""

import importlib

import pytest
import torch
from torch import nn

from initlab import GradClipper
from initlab.integrations.lightning import GradClipperCallback

# Lightning warns of few workers, short epochs and of itself.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("lightning"), pytest.mark.filterwarnings("ignore")]

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
BAD = 2  # the batch with a NaN


def data(count=6):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 4, generator=generator) for _ in range(count)]
    batches[BAD][3, 1] = torch.nan
    return torch.utils.data.DataLoader(batches, batch_size=None)


def module(lightning, optimizers=1, fused=False, raises=None):
    """A module with one net for each optimizer; with several, under manual optimization, all step at each batch."""

    class Module(lightning.LightningModule):
        automatic_optimization = optimizers == 1

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.nets = nn.ModuleList(nn.Linear(4, 1) for _ in range(optimizers))

        def configure_optimizers(self):
            return [torch.optim.AdamW(net.parameters(), 0.01, fused=fused) for net in self.nets]

        def training_step(self, batch, batch_idx):
            if batch_idx == raises:
                raise KeyError("a fault of the module")
            losses = [net(batch).square().mean() for net in self.nets]
            if self.automatic_optimization:
                return losses[0]
            losses[-1] = self.nets[-1](batch.nan_to_num()).square().mean()  # the last one never sees the NaN
            for loss in losses:
                self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            return None

    return Module()


def fit(callback, lightning=None, model=None, resume=None, **options):
    lightning = importlib.import_module("lightning.pytorch") if lightning is None else lightning
    model = module(lightning) if model is None else model
    options = {"max_epochs": 1, "enable_checkpointing": False} | options
    trainer = lightning.Trainer(**QUIET, callbacks=[callback], **options)
    trainer.fit(model, data(), ckpt_path=resume)
    return trainer, model


def has_hooks(optimizer):
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_both_names_of_lightning(name):
    """Whichever of the two the callback is derived from."""
    callback = GradClipperCallback(0.1)
    trainer, model = fit(callback, importlib.import_module(name))
    stats = callback.clippers[0].stats()
    assert (stats.steps, stats.nonfinite, stats.first_bad_step) == (6, 1, 3)
    assert stats.first_bad_parameter == "nets.0.weight"
    assert stats.clipped > 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert not has_hooks(trainer.optimizers[0])


def test_a_trainer_that_clips_too_is_refused():
    with pytest.raises(RuntimeError, match=r"gradient_clip_val=0\.5\) clips before .* leave gradient_clip_val out"):
        fit(GradClipperCallback(1.0), gradient_clip_val=0.5)


def test_hooks_are_removed_when_training_ends_by_an_exception():
    import lightning.pytorch as lightning

    callback = GradClipperCallback(0.1)
    model = module(lightning, raises=4)
    trainer = lightning.Trainer(**QUIET, callbacks=[callback], max_epochs=1, enable_checkpointing=False)
    made = []
    callback_start = callback.on_train_start
    callback.on_train_start = lambda *args: (callback_start(*args), made.extend(trainer.optimizers))[0]
    with pytest.raises(KeyError, match="a fault of the module"):
        trainer.fit(model, data())
    assert len(made) == 1
    assert not has_hooks(made[0])
    assert callback.clippers[0].stats().steps == 4


def test_several_optimizers_have_a_clipper_each():
    import lightning.pytorch as lightning

    callback = GradClipperCallback(0.1)
    _, model = fit(callback, model=module(lightning, optimizers=2))
    first, second = (clipper.stats() for clipper in callback.clippers)
    assert (first.steps, first.nonfinite) == (6, 1)
    assert (second.steps, second.nonfinite) == (6, 0)  # the other's NaN is not its own
    assert all(p.isfinite().all() for p in model.parameters())


def test_several_optimizers_together():
    import lightning.pytorch as lightning

    callback = GradClipperCallback(0.1, together=True)
    _, model = fit(callback, model=module(lightning, optimizers=2))
    [clipper] = callback.clippers
    assert (clipper.stats().steps, clipper.stats().nonfinite) == (6, 1)
    assert clipper.stats().first_bad_parameter == "nets.0.weight"
    assert all(p.isfinite().all() for p in model.parameters())


def test_options_reach_the_clipper():
    callback = GradClipperCallback(0.1, "raise", norm_type="inf")
    with pytest.raises(RuntimeError, match=r"nets\.0\.weight is the first of those that hold NaN"):
        fit(callback)
    assert callback.clippers[0].norm_type == float("inf")


@pytest.mark.parametrize("fused", [False, True])
def test_mixed_precision_with_a_scaler(fused):
    """On a CPU, Trainer(precision="16-mixed") itself turns to bfloat16; its plugin does not."""
    import lightning.pytorch as lightning
    from lightning.pytorch.plugins import MixedPrecision

    callback = GradClipperCallback(0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    _, model = fit(callback, model=module(lightning, fused=fused), plugins=[plugin])
    stats = callback.clippers[0].stats()
    assert (stats.steps, stats.nonfinite, stats.first_bad_step) == (6, 1, 3)
    assert scaler.get_scale() == 2.0**7
    assert all(p.isfinite().all() for p in model.parameters())
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_by_name(precision):
    callback = GradClipperCallback(0.1)
    _, model = fit(callback, precision=precision)
    assert (callback.clippers[0].stats().steps, callback.clippers[0].stats().nonfinite) == (6, 1)
    assert all(p.isfinite().all() for p in model.parameters())


def test_accumulation():
    callback = GradClipperCallback(0.1)
    fit(callback, accumulate_grad_batches=3)
    assert (callback.clippers[0].stats().steps, callback.clippers[0].stats().first_bad_step) == (2, 1)


def test_counts_go_on_where_training_resumes(tmp_path):
    callback = GradClipperCallback(0.1)
    trainer, _ = fit(callback)
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")
    before = callback.clippers[0].stats()

    resumed = GradClipperCallback(0.1)
    fit(resumed, resume=tmp_path / "epoch.ckpt", max_epochs=2)
    stats = resumed.clippers[0].stats()
    assert (before.steps, before.nonfinite) == (6, 1)
    assert (stats.steps, stats.nonfinite, stats.first_bad_step) == (12, 2, 3)
    assert stats.clipped > before.clipped

    fit(resumed)  # a training of its own counts from 0
    assert resumed.clippers[0].stats().steps == 6


def test_a_checkpoint_of_another_number_of_optimizers_is_refused():
    callback = GradClipperCallback(0.1)
    clipper = GradClipper(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1), 1.0)
    callback.load_state_dict({"clippers": [clipper.state_dict()] * 2})
    with pytest.raises(ValueError, match="the checkpoint holds 2 GradClippers, and here are 1"):
        fit(callback)


@pytest.mark.parametrize("fused", [False, True])
def test_fabric(fused):
    """Lightning Fabric has no callbacks for this, and needs none."""
    from lightning import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 0.01, fused=fused))
    clipper = GradClipper(optimizer, 0.1)
    for batch in data():
        fabric.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert (clipper.stats().steps, clipper.stats().nonfinite, clipper.stats().first_bad_step) == (6, 1, 3)
    assert all(p.isfinite().all() for p in net.parameters())
