"""GradClipper around accelerate's optimizers, as in docs/integrations.md. 200 steps of it: test_loops.py."""

import pytest
import torch
from torch import nn

import initlab

# accelerate warns of versions of torch.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("transformers"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def accelerator():
    """A function that makes Accelerators."""
    from accelerate import Accelerator

    return lambda **options: Accelerator(cpu=True, **options)


def prepared(accelerator, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return accelerator.prepare(model, optimizer(model.parameters(), 0.01, **options))


def step(accelerator, model, optimizer, x):
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.full((2, 4), x)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def test_a_wrapped_optimizer_takes_one_clipper(accelerator):
    _, optimizer = prepared(accelerator())
    with pytest.raises(ValueError, match="max_norm is -1"):
        initlab.GradClipper(optimizer, -1.0)
    clipper = initlab.GradClipper(optimizer, 0.1)  # the one that failed has left nothing behind
    with pytest.raises(RuntimeError, match="has a GradClipper already"):
        initlab.GradClipper(optimizer.optimizer, 0.1)
    clipper.remove()
    assert not optimizer.optimizer._optimizer_step_pre_hooks
    initlab.GradClipper(optimizer.optimizer, 0.1)


def test_accumulation_clips_once_for_all_batches_of_a_step(accelerator):
    accelerator = accelerator(gradient_accumulation_steps=3)
    model, optimizer = prepared(accelerator)
    clipper = initlab.GradClipper(optimizer, 0.1)
    for i in range(9):
        step(accelerator, model, optimizer, torch.nan if i == 4 else 1.0)
    assert (clipper.stats().steps, clipper.stats().nonfinite, clipper.stats().first_bad_step) == (3, 1, 2)
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_its_scaler(accelerator, fused):
    """On a CPU accelerate makes none, so it is put in its place."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator = accelerator()
    model, optimizer = prepared(accelerator, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    wrapped = AcceleratedOptimizer(optimizer.optimizer, scaler=scaler)
    accelerator.scaler = scaler
    clipper = initlab.GradClipper(wrapped, 0.1, scaler=accelerator.scaler)
    skipped = []
    for x in (1.0, torch.nan, 1.0):
        scaler.scale(model(torch.full((2, 4), x)).square().mean()).backward()
        before = model.weight.detach().clone()
        wrapped.step()
        skipped.append(torch.equal(model.weight, before))
        wrapped.zero_grad()
    assert skipped == [False, True, False]
    assert (clipper.stats().steps, clipper.stats().nonfinite, clipper.stats().first_bad_step) == (3, 1, 2)
    assert scaler.get_scale() == 2.0**7


def test_counts_go_on_from_its_checkpoints(accelerator, tmp_path):
    first = accelerator()
    model, optimizer = prepared(first)
    clipper = initlab.GradClipper(optimizer, 0.1)
    first.register_for_checkpointing(clipper)
    for x in (1.0, torch.nan, 1.0):
        step(first, model, optimizer, x)
    first.save_state(str(tmp_path))

    second = accelerator()
    model, optimizer = prepared(second)
    resumed = initlab.GradClipper(optimizer, 0.1)
    second.register_for_checkpointing(resumed)
    second.load_state(str(tmp_path))
    assert resumed.stats() == clipper.stats()
    step(second, model, optimizer, torch.nan)
    assert (resumed.stats().steps, resumed.stats().nonfinite, resumed.stats().first_bad_step) == (4, 2, 2)
