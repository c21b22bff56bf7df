"""Guards on ranks that step together: all skip alike, whoever has the bad batch, and say what they know."""

import copy
import tempfile
import warnings
from pathlib import Path

import pytest
import sharded_models as spread
import torch
import torch.distributed as dist
from ranks import on
from scenarios._clipping import fused, one_by_one
from sharded_models import GPT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import initlab
from initlab.distributed.dtensors import local


class Scaled(GPT):
    """A GPT whose logits are multiplied by what the batch says, so that inf in it makes the loss NaN."""

    def forward(self, batch):
        tokens, scale = batch
        return super().forward(tokens) * scale


def loss_fn(model, batch):
    logits = model(batch)
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[0].roll(-1, 1).flatten())


def batches(bad, rank):
    """Six batches of this rank's own; on `rank` that of place `bad` is bad."""
    found = []
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * dist.get_rank() + step)
        scale = torch.tensor(float("inf") if step == bad and dist.get_rank() == rank else 1.0)
        found.append((torch.randint(0, 53, (2, 7), generator=generator), scale))
    return found


def folder():
    """One of the same name on all ranks."""
    name = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(name)
    return Path(name[0])


def state(model, optimizer):
    moments = [x for held in optimizer.state.values() for x in held.values() if isinstance(x, torch.Tensor)]
    return [local(x).detach().clone() for x in (*model.parameters(), *moments)]


def guarded(model, optimizer, where, **options):
    """The guard after six steps, the fourth of them bad on rank 1; weights and moments before and after that one."""
    kept = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with initlab.guard(model, optimizer, loss_fn=loss_fn, folder=where, **options) as guard:
            for step, batch in enumerate(batches(3, 1)):
                kept[step] = state(model, optimizer)
                guard.step(batch)
        kept[6] = state(model, optimizer)
    assert sum("step 4" in str(one.message) for one in caught) == 1
    assert all(map(torch.equal, kept[3], kept[4]))
    assert not all(map(torch.equal, kept[4], kept[5]))
    assert all(x.isfinite().all() for x in kept[6])
    return guard


@on(2)
def shards_skip_alike() -> None:
    for optimizer in (fused, one_by_one):
        torch.manual_seed(0)
        model, where = spread.fsdp(Scaled()), folder()
        guard = guarded(model, optimizer(model.parameters()), where)
        report = guard.report()
        assert (report.steps, report.bad_steps, report.skipped) == (6, 1, 1)
        [found] = report.examined
        assert found.diagnosis is None
        assert "no diagnosis" in found.notes[0]
        assert "FSDP" in found.notes[0]
        assert found.watched.fault.rank == 1, found.watched
        assert found.watched.ranks == (0, 1)
        dist.barrier()
        names = sorted(path.name for path in where.iterdir())
        assert names == ["step-4-rank-0-batch.pt", "step-4-rank-1-batch.pt", "step-4.txt"]
        saved = torch.load(where / "step-4-rank-1-batch.pt", weights_only=True)
        assert saved["batch"][1].isinf()
        assert all(p.grad is None or not p.grad.requires_grad for p in model.parameters())


@on(2)
def replicas_get_the_diagnosis_of_the_bad_rank() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(Scaled())
    where = folder()
    guard = guarded(model, torch.optim.AdamW(model.parameters()), where, budget=6.0)
    assert guard.diagnosis.rank == 1
    assert guard.diagnosis.verdict == "broken"
    both = [None, None]
    dist.all_gather_object(both, [p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *both))


@on(2)
def a_loss_that_one_rank_alone_sees() -> None:
    """Its gradients are finite everywhere: ranks that went by their own loss would go apart."""

    def hidden(model, batch):
        loss = loss_fn(model, (batch[0], torch.ones(())))
        return loss + batch[1].detach().clamp(min=1.0) - 1.0

    torch.manual_seed(0)
    model = DistributedDataParallel(Scaled())
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initlab.guard(model, optimizer, loss_fn=hidden, budget=2.0) as guard:
            for batch in batches(3, 1):
                guard.step(batch)
    assert (guard.report().bad_steps, guard.report().skipped) == (1, 1)
    assert ("another rank" in guard.report().examined[0].reason) == (dist.get_rank() == 0)
    both = [None, None]
    dist.all_gather_object(both, [p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *both))


@on(2)
def ranks_must_be_known() -> None:
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"2 ranks.*across=True"):
        initlab.guard(model, optimizer, loss_fn=loss_fn)
    assert not optimizer._optimizer_step_pre_hooks
    before = copy.deepcopy(model.state_dict())
    guard = initlab.guard(model, optimizer, loss_fn=loss_fn, across=False)
    guard.step(batches(9, 0)[0])
    guard.remove()
    assert any(not torch.equal(before[name], p) for name, p in model.state_dict().items())
