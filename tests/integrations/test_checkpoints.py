"""A GradClipper in torch's own checkpoints."""

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.stateful import Stateful

import initlab


def training(bad=()):
    """A clipper that has seen four steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.named_parameters(), 0.01)
    clipper = initlab.GradClipper(optimizer, 0.1)
    run(model, optimizer, 4, bad)
    return model, optimizer, clipper


def run(model, optimizer, steps, bad=()):
    for i in range(steps):
        model(torch.full((2, 3), torch.nan if i in bad else 1.0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process is what this is about
def test_as_a_stateful_of_torch_distributed_checkpoint(tmp_path):
    _, _, clipper = training(bad=(1, 3))
    assert isinstance(clipper, Stateful)
    checkpoint.save({"clipper": clipper}, checkpoint_id=tmp_path)

    model, optimizer, resumed = training()
    checkpoint.load({"clipper": resumed}, checkpoint_id=tmp_path)
    assert resumed.stats() == clipper.stats()
    run(model, optimizer, 2, bad=(0,))
    stats = resumed.stats()
    assert (stats.steps, stats.nonfinite, stats.first_bad_step, stats.first_bad_parameter) == (6, 3, 2, "weight")


def test_in_a_file_that_loads_with_weights_only(tmp_path):
    _, _, clipper = training(bad=(2,))
    torch.save(clipper.state_dict(), tmp_path / "clipper.pt")
    _, _, resumed = training()
    resumed.load_state_dict(torch.load(tmp_path / "clipper.pt", weights_only=True))
    assert resumed.stats() == clipper.stats()
