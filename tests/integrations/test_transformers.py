"""GradClipperMixin in Hugging Face's Trainer. 200 steps of it: test_loops.py."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import utils

import initlab
from initlab.integrations.transformers import GradClipperMixin

# transformers warns of pinned memory and of itself.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("transformers"), pytest.mark.filterwarnings("ignore")]

BAD = 2  # the batch with a NaN


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, labels):
        out = self.net(x)
        if torch.isnan(labels).any():  # only the last layer's gradients become NaN
            out = out.detach() + self.net[2](torch.full((8, 8), torch.nan)) * 0
        return {"loss": (out - labels.nan_to_num()).square().mean()}


def data(count=6):
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(8, 4, generator=generator), "labels": torch.zeros(8, 1)} for _ in range(count)]
    batches[BAD]["labels"][0] = torch.nan
    return batches


def trainer(folder, mixin=True, options=None, trainer_options=None, **arguments):
    import transformers

    class Trainer(GradClipperMixin, transformers.Trainer):
        pass

    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    steps = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "num_train_epochs": 1}
    arguments = quiet | steps | {"logging_steps": 1, "learning_rate": 0.01, "max_grad_norm": 0.1} | arguments
    return (Trainer if mixin else transformers.Trainer)(
        Model(),
        transformers.TrainingArguments(str(folder), **arguments),
        data_collator=lambda items: items[0],
        train_dataset=data(),
        **({"clipper_options": options} if mixin else {}),
        **(trainer_options or {}),
    )


def logged(trainer, name="grad_norm"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_training_and_its_log(tmp_path, optim):
    ours, theirs = trainer(tmp_path, optim=optim), trainer(tmp_path, mixin=False, optim=optim)
    ours.train(), theirs.train()
    stats = ours.clipper.stats()
    assert (stats.steps, stats.nonfinite, stats.first_bad_step) == (6, 1, 3)
    assert stats.first_bad_parameter == "net.2.weight"  # Trainer's own clipping would have spread the NaN to net.0
    assert stats.clipped == 5
    assert all(p.isfinite().all() for p in ours.model.parameters())
    assert not any(p.isfinite().all() for p in theirs.model.parameters())
    norms = logged(ours)
    assert len(norms) == 6
    assert norms[:BAD] == pytest.approx(logged(theirs)[:BAD], rel=1e-6)
    assert [math.isnan(norm) for norm in norms] == [False, False, True, False, False, False]
    assert not ours.optimizer.optimizer._optimizer_step_pre_hooks


def test_gradients_are_not_read_by_the_trainer(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("torch's clipping was called")

    monkeypatch.setattr(utils, "clip_grad_norm_", fail)
    trainer(tmp_path).train()
    with pytest.raises(AssertionError, match="torch's clipping was called"):
        trainer(tmp_path, mixin=False).train()


def test_max_grad_norm_of_0_measures_and_guards(tmp_path):
    ours, theirs = trainer(tmp_path, max_grad_norm=0.0), trainer(tmp_path, mixin=False, max_grad_norm=0.0)
    ours.train(), theirs.train()
    assert (ours.clipper.stats().clipped, ours.clipper.stats().nonfinite) == (0, 1)
    assert logged(ours)[:BAD] == pytest.approx(logged(theirs)[:BAD], rel=1e-6)
    assert all(p.isfinite().all() for p in ours.model.parameters())


def test_accumulation(tmp_path):
    ours = trainer(tmp_path, gradient_accumulation_steps=3)
    ours.train()
    assert (ours.clipper.stats().steps, ours.clipper.stats().first_bad_step) == (2, 1)


def test_options_reach_the_clipper(tmp_path):
    ours = trainer(tmp_path, options={"nonfinite": "raise", "norm_type": "inf"})
    with pytest.raises(RuntimeError, match=r"net\.2\.weight is the first of those that hold NaN"):
        ours.train()
    assert ours.clipper.norm_type == math.inf


def test_training_that_was_interrupted_leaves_nothing_behind(tmp_path):
    ours = trainer(tmp_path, options={"nonfinite": "raise"})
    with pytest.raises(RuntimeError, match="hold NaN"):
        ours.train()
    ours.train_dataset = data()[:BAD]
    ours.train()
    assert ours.clipper.stats().steps == BAD


def test_a_second_training_counts_from_0(tmp_path):
    ours = trainer(tmp_path)
    assert ours.clipper is None
    ours.train()
    first = ours.clipper
    ours.train()
    assert ours.clipper is not first
    assert (first.stats().steps, ours.clipper.stats().steps) == (6, 6)


@pytest.mark.parametrize("by_trainer", [False, True])
def test_counts_go_on_where_training_resumes(tmp_path, by_trainer):
    first = trainer(tmp_path, save_strategy="steps", save_steps=4)
    first.train()
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["GradClipperState"]["attributes"]["saved"]["steps"] == 4

    second = trainer(
        tmp_path,
        restore_callback_states_from_checkpoint=by_trainer,
        options={"norm_type": "inf"},
        num_train_epochs=2,
    )
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    stats = second.clipper.stats()
    assert (stats.steps, stats.nonfinite, stats.first_bad_step) == (12, 2, 3)
    assert second.clipper.norm_type == math.inf  # options are those of this training


def test_statistics_of_spikes_go_on_too(tmp_path):
    options = {"spikes": initlab.ZScoreSpikes(warmup=2)}
    first = trainer(tmp_path, options=options, save_strategy="steps", save_steps=4)
    first.train()
    second = trainer(tmp_path, options=options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.clipper.state_dict() == first.clipper.state_dict()


def test_resuming_from_a_checkpoint_made_without_it(tmp_path):
    trainer(tmp_path, mixin=False, save_strategy="steps", save_steps=2).train()
    ours = trainer(tmp_path, save_strategy="steps", save_steps=3)
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ours.clipper.stats().steps == 4
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["GradClipperState"]["attributes"]["saved"]["steps"] == 4


def test_the_mixin_must_come_first():
    import transformers

    class Trainer(transformers.Trainer, GradClipperMixin):
        pass

    class Alone(GradClipperMixin):
        pass

    with pytest.raises(RuntimeError, match="name the mixin first, then a Trainer that has it"):
        Alone()
    assert Trainer._clip_grad_norm is transformers.Trainer._clip_grad_norm
