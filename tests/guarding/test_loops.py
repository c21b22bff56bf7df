"""Loops that people write, each with one bad step: what is left is a run without that step, bit for bit."""

import contextlib
import copy
import dataclasses
import itertools
import warnings

import pytest
import torch
from torch import nn

import initlab

pytestmark = pytest.mark.usefixtures("one_thread")
BAD = 3  # which batch is bad, from 0
QUICK = {"budget": 2.0, "limit": 1}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))


def batches(bad, count=8, rows=8):
    generator = torch.Generator().manual_seed(1)
    found = [
        (torch.randn(rows, 4, generator=generator), torch.randn(rows, 1, generator=generator)) for _ in range(count)
    ]
    if bad:
        found[BAD][0][2, 1] = torch.nan
    return found


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def tensors(*owners):
    """All tensors in state_dicts, copied, in order."""
    found = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            found.append(value.detach().clone())
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif isinstance(value, int | float):
            found.append(torch.tensor(value))

    for owner in owners:
        walk(owner.state_dict())
    return found


class Loop:
    """A loop with a guard, or without one and without its bad step. `run` returns what has a state_dict."""

    loss_fn = staticmethod(mse)

    def guard(self, model, optimizer, **options):
        if not self.guarded:
            return contextlib.nullcontext(self)
        self.one = initlab.guard(model, optimizer, loss_fn=type(self).loss_fn, **QUICK, **options)
        return self.one

    # of a run without a guard
    def batch(self, batch):
        return batch

    def loss(self, loss):
        return loss

    def leaves_out(self, number):
        """Whether a run without a guard passes over this batch."""
        return not self.guarded and number == BAD


class Schedule(Loop):
    """Clipping of its own, a schedule that goes on, an average of the weights, evaluation between steps."""

    def run(self):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=8)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        with self.guard(model, optimizer) as guard:
            for number, batch in enumerate(map(guard.batch, batches(self.guarded))):
                if not self.leaves_out(number):
                    model.train()
                    optimizer.zero_grad(set_to_none=number % 2 == 0)
                    guard.loss(mse(model, batch)).backward()
                    nn.utils.clip_grad_value_(model.parameters(), 10.0)
                    optimizer.step()
                schedule.step()
                average.update_parameters(model)
                model.eval()
                with torch.no_grad():
                    mse(model, batches(False)[0])
        return model, optimizer, average


class Accumulation(Loop):
    """Three micro-batches a step, and two in the last."""

    def run(self):
        model, count = net(), 3
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        given = batches(self.guarded, rows=6)
        with self.guard(model, optimizer) as guard:
            for number, batch in enumerate(given):
                last = number + 1 == len(given)
                if self.guarded or number // count != BAD // count:
                    guard.batch(batch)
                    guard.loss(mse(model, batch) / count).backward()
                    if (number + 1) % count == 0 or last:
                        optimizer.step()
                        optimizer.zero_grad()
        return model, optimizer


class Scaler(Loop):
    """A GradScaler, unscaled and clipped by hand."""

    def run(self):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000, backoff_factor=1.0 - 1e-12)
        options = {"scaler": scaler} if self.guarded else {}
        with self.guard(model, optimizer, **options) as guard:
            for number, batch in enumerate(map(guard.batch, batches(self.guarded))):
                if self.leaves_out(number):
                    continue
                optimizer.zero_grad()
                scaler.scale(guard.loss(mse(model, batch))).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 100.0)
                scaler.step(optimizer)
                scaler.update()
        return model, optimizer


class Closure(Loop):
    """LBFGS."""

    def run(self):
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, 0.0, 0.3)
        optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)
        with self.guard(model, optimizer) as guard:
            for number, batch in enumerate(map(guard.batch, batches(self.guarded))):
                if self.leaves_out(number):
                    continue

                def closure(batch=batch):
                    optimizer.zero_grad()
                    loss = guard.loss(mse(model, batch))
                    loss.backward()
                    return loss

                optimizer.step(closure)
        return (model,)


class Adversarial(Loop):
    """Two networks whose optimizers step apart, each with a guard of its own."""

    def run(self):
        maker, judge = net(1), net(2)
        judge[1] = nn.Identity()
        maker[3] = nn.Linear(16, 4)
        ours, theirs = torch.optim.Adam(maker.parameters(), 0.01), torch.optim.Adam(judge.parameters(), 0.01)

        def judged(judge, batch):
            return judge(batch[0]).square().mean() - judge(batch[1]).mean()

        def made(maker, batch):
            return -judge(maker(batch[2])).mean()

        first = initlab.guard(judge, theirs, loss_fn=judged, **QUICK) if self.guarded else contextlib.nullcontext(self)
        other = initlab.guard(maker, ours, loss_fn=made, **QUICK) if self.guarded else contextlib.nullcontext(self)
        self.one = first
        with first as a, other as b:
            for number, (x, _) in enumerate(batches(self.guarded)):
                noise = torch.ones(8, 4) * torch.arange(8.0)[:, None] * (number + 1) / 8
                if not self.leaves_out(number):
                    theirs.zero_grad()
                    batch = a.batch((x, maker(noise).detach()))
                    a.loss(judged(judge, batch)).backward()
                    theirs.step()
                elif maker.training:
                    maker(noise)  # its running statistics
                ours.zero_grad()
                b.loss(made(maker, b.batch((None, None, noise)))).backward()
                ours.step()
        return maker, judge, ours, theirs


class Frozen(Loop):
    """Frozen layers, a norm in eval mode, a dict that holds more than tensors, and (loss, aux)."""

    @staticmethod
    def loss_fn(model, batch):
        return Frozen.both(model, batch)[0]

    @staticmethod
    def both(model, batch):
        out = model(batch["x"])
        return nn.functional.mse_loss(out, batch["y"]), {"out": out}

    def run(self):
        model = net()
        model[0].requires_grad_(False)
        model[1].eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
        with self.guard(model, optimizer) as guard:
            for number, (x, y) in enumerate(batches(self.guarded)):
                batch = guard.batch({"x": x, "y": y, "id": [str(number)], "none": None})
                if self.leaves_out(number):
                    continue
                loss, _ = self.both(model, batch)
                guard.loss(loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model, optimizer


@dataclasses.dataclass
class Data:
    x: torch.Tensor
    y: torch.Tensor


class Resumed(Loop):
    """Saved in the middle, and gone on with by a new model, optimizer and guard; batches are dataclasses."""

    @staticmethod
    def loss_fn(model, batch):
        return mse(model, (batch.x, batch.y))

    def run(self):
        given = [Data(*batch) for batch in batches(self.guarded)]
        saved = None
        for part in (range(2), range(2, 8)):
            model = net(len(part))
            optimizer = torch.optim.AdamW(model.parameters(), 0.01)
            if saved is not None:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            with self.guard(model, optimizer) as guard:
                for number in part:
                    if self.leaves_out(number):
                        continue
                    if self.guarded:
                        guard.step(given[number])
                    else:
                        optimizer.zero_grad()
                        self.loss_fn(model, given[number]).backward()
                        optimizer.step()
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        return model, optimizer


class Compiled(Loop):
    def run(self):
        model = net()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        with self.guard(compiled, optimizer) as guard:
            for number, batch in enumerate(map(guard.batch, batches(self.guarded))):
                if self.leaves_out(number):
                    continue
                optimizer.zero_grad()
                guard.loss(mse(compiled, batch)).backward()
                optimizer.step()
        return model, optimizer


class Recorded(Loop):
    """Losses are kept in a module's attribute and penalties added; gradients are set to zeros in place."""

    def run(self):
        model = net()
        model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        optimizer = torch.optim.RMSprop(model.parameters(), 0.01, momentum=0.5)
        with self.guard(model, optimizer) as guard:
            for number, batch in enumerate(map(guard.batch, batches(self.guarded))):
                if self.leaves_out(number):
                    continue
                model.seen += 1
                for p in model.parameters():
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
                loss = mse(model, batch)
                for p in model.parameters():
                    loss = loss + 1e-4 * p.square().sum()
                guard.loss(loss).backward()
                optimizer.step()
        return model, optimizer


LOOPS = [Schedule, Accumulation, Scaler, Closure, Adversarial, Frozen, Resumed, Compiled, Recorded]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("kind", LOOPS, ids=lambda kind: kind.__name__.lower())
def test_a_loop_without_its_bad_step(kind):
    ends = []
    for guarded in (True, False):
        loop = kind()
        loop.guarded = guarded
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ends.append(tensors(*loop.run()))
        if guarded:
            said = [str(one.message) for one in caught if "the step was skipped" in str(one.message)]
            report = loop.one.report()
            assert len(said) == 1, [str(one.message) for one in caught]
            assert report.bad_steps == report.skipped == 1
            cause = loop.one.diagnosis.causes[0]
            assert (cause.kind, cause.place.feature) == ("input", 1), str(report)
    assert len(ends[0]) == len(ends[1])
    assert all(a.isfinite().all() for a in ends[0])
    different = [place for place, (a, b) in enumerate(zip(*ends, strict=True)) if not torch.equal(a, b)]
    assert not different


class Gone(Exception):
    """What a loop catches."""


@pytest.mark.parametrize("how", ["continue", "error", "error in step"])
def test_batches_that_a_loop_leaves_out_by_itself(how):
    """Its gradients are in no step: the next one is no bad step, and one that is bad later is told by itself."""
    model = net()
    model[1] = nn.Identity()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    given = batches(False)
    given[6][0][0, 1] = torch.nan
    left_out = 2

    def loss_fn(model, batch):
        if how != "continue" and batch is given[left_out]:
            raise Gone
        return mse(model, batch)

    if how == "continue":
        given[left_out][0][0, 0] = torch.inf
    kept = []
    with warnings.catch_warnings(record=True) as caught, initlab.guard(model, optimizer, loss_fn=loss_fn, **QUICK) as g:
        warnings.simplefilter("always")
        for batch in given:
            kept.append(tensors(model))
            with contextlib.suppress(Gone):
                if how == "error in step":
                    g.step(batch)
                    continue
                optimizer.zero_grad()
                loss = g.loss(loss_fn(model, g.batch(batch)))
                if how == "continue" and batch is given[left_out] and not loss.isfinite():
                    continue
                loss.backward()
                optimizer.step()
    report = g.report()
    assert (report.steps, report.bad_steps) == (7, 1), str(report)
    [found] = report.examined
    assert found.micro_batch is None
    assert (g.diagnosis.causes[0].kind, g.diagnosis.causes[0].place.feature) == ("input", 1)
    assert len(caught) == 1
    moved = [not all(map(torch.equal, a, b)) for a, b in itertools.pairwise(kept)]
    assert moved == [place not in (left_out, 6) for place in range(7)]


def test_ctrl_c_in_a_step_and_a_guard_again(tmp_path, capsys):
    """Nothing is left on the optimizer; a second guard goes on; without a bad step nothing is said or written."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)

    def loss_fn(model, batch):
        if batch is None:
            raise KeyboardInterrupt
        return mse(model, batch)

    first = initlab.guard(model, optimizer, loss_fn=loss_fn, folder=tmp_path / "guard")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(False)[:2]:
            first.step(batch)
        with pytest.raises(KeyboardInterrupt), first:
            first.step(None)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        with initlab.guard(model, optimizer, loss_fn=loss_fn, folder=tmp_path / "guard") as second:
            for batch in batches(False):
                second.step(batch)
    assert str(first.report()) == "2 steps: 0 bad, 0 skipped, 0 clipped"
    assert str(second.report()) == "8 steps: 0 bad, 0 skipped, 0 clipped"
    assert not (tmp_path / "guard").exists()
    assert capsys.readouterr() == ("", "")
