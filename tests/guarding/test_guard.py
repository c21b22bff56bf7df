"""guard(): healthy runs are untouched; bad steps leave no trace, are diagnosed in their own state, and saved."""

import copy
import csv
import json
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import initlab
from initlab.guarding.saving import plain

pytestmark = pytest.mark.usefixtures("one_thread")
MSE = initlab.supervised(nn.functional.mse_loss)
QUICK = {"budget": 2.0}


def net(dropout=0.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def batches(bad=None, count=6):
    generator = torch.Generator().manual_seed(1)
    found = [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(count)]
    if bad is not None:
        found[bad][0][2, 1] = torch.nan
    return found


def state(model, optimizer):
    """All that a step may change, as copies."""
    held = [x for of in optimizer.state.values() for x in of.values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in (*model.state_dict().values(), *held)]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def warned(text, run):
    """Runs a loop, which gives a warning that says so."""
    with pytest.warns(UserWarning, match=text):
        run()


def steps(guard, batches):
    """All steps of a loop, and the end of the guard."""
    with guard:
        for batch in batches:
            guard.step(batch)


def hooks(optimizer):
    return [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]


def noting(batches, kept, state):
    """Batches; before each the state is kept."""
    for batch in batches:
        kept.append(state())
        yield batch


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_healthy_run_is_the_same_bit_for_bit(name):
    """Weights, moments, running statistics and dropout's random numbers are those of a loop with a GradClipper."""
    ends = []
    for guarded in (False, True):
        model = net()
        optimizer = OPTIMIZERS[name](model.parameters())
        torch.manual_seed(5)
        if guarded:
            with initlab.guard(model, optimizer, loss_fn=MSE, max_norm=0.5) as guard:
                losses = [guard.step(batch) for batch in batches()]
            assert guard.report().bad_steps == 0
        else:
            initlab.GradClipper(optimizer, 0.5)
            losses = []
            for batch in batches():

                def closure(batch=batch, model=model, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = MSE(model, batch)
                    loss.backward()
                    return loss

                if name == "lbfgs":
                    losses.append(optimizer.step(closure).detach())
                else:
                    losses.append(closure().detach())
                    optimizer.step()
        ends.append([*state(model, optimizer), torch.get_rng_state(), *losses])
    assert same(*ends)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_leaves_no_trace(name):
    """No weight, moment or buffer changes, the running statistics of BatchNorm included; the run goes on."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    kept = []
    guard = initlab.guard(model, optimizer, loss_fn=MSE, **QUICK)
    warned("step 4", lambda: steps(guard, noting(batches(3), kept, lambda: state(model, optimizer))))
    assert same(kept[3], kept[4])
    assert not same(kept[4], kept[5])
    assert all(x.isfinite().all() for x in state(model, optimizer))
    report = guard.report()
    assert (report.steps, report.bad_steps, report.skipped, report.last_bad_step) == (6, 1, 1, 4)
    [found] = report.examined
    assert found.reason == "the loss is nan"
    cause = guard.diagnosis.causes[0]
    assert (cause.kind, cause.place.feature) == ("input", 1)
    assert "1 bad" in str(report)
    assert hooks(optimizer) == []


class Draw(nn.Module):
    """Fails for some random numbers only, and depends on a buffer: a replay from another state would not fail."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.drawn = []

    def forward(self, x):
        self.calls += 1
        draw = torch.rand(())
        self.drawn.append(float(draw))
        fails = draw < 0.2 and self.calls % 2 == 0
        return self.linear(x) / (0.0 if fails else 1.0)


def test_the_very_step_runs_again():
    """The diagnosis sees the random numbers and buffers of the bad step, and leaves those of the run alone."""
    after = []
    for limit in (0, 1):
        torch.manual_seed(3)
        model = Draw()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with initlab.guard(model, optimizer, loss_fn=MSE, limit=limit, **QUICK) as guard:
                for batch in batches(count=12):
                    guard.step(batch)
        assert guard.report().bad_steps >= 1
        after.append([torch.get_rng_state(), model.calls, model.linear.weight.detach()])
    [found] = guard.report().examined
    assert found.diagnosis.verdict == "broken"
    assert (found.diagnosis.causes[0].kind, found.diagnosis.causes[0].place.op) == ("operation", "div")
    assert same(*after)


def test_raise_saves_and_leaves_no_hooks(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    guard = initlab.guard(model, optimizer, loss_fn=MSE, nonfinite="raise", folder=tmp_path / "a" / "b", **QUICK)
    kept = []
    with pytest.raises(FloatingPointError, match=r"(?s)step 2: the loss is nan; cause: input.*saved: "):
        steps(guard, noting(batches(1), kept, lambda: state(model, optimizer)))
    assert same(kept[-1], state(model, optimizer))
    assert hooks(optimizer) == []
    assert not hasattr(optimizer, "_initlab_clipper")
    names = [path.name for path in guard.saved]
    assert names == ["step-2-batch.pt", "step-2.txt", "step-2.json", "step-2.html"]
    saved = torch.load(guard.saved[0], weights_only=True)
    assert torch.equal(saved["batch"][0], batches(1)[1][0]) or saved["batch"][0].isnan().sum() == 1
    assert saved["step"] == 2
    assert saved["buffers"]["1.running_mean"].isfinite().all()
    assert json.loads(guard.saved[2].read_text())["verdict"] == "broken"
    assert "<html" in guard.saved[3].read_text()


def test_propagate_diagnoses_before_it_steps():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"nonfinite": "propagate", "limit": 1, **QUICK}
    guard = initlab.guard(model, optimizer, loss_fn=MSE, **options)
    warned("taken as it was", lambda: steps(guard, batches(3)))
    assert model[0].weight.isnan().any()
    report = guard.report()
    assert (report.bad_steps, report.skipped) == (3, 0)
    assert [cause.kind for cause in guard.diagnosis.causes] == ["input"]  # not that weights are NaN


def test_a_loop_of_ones_own_with_accumulation():
    """The bad micro-batch is found, whose state is that before its own pass; the loop's step is the guard's."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    kept = []
    guard = initlab.guard(model, optimizer, loss_fn=MSE, **QUICK)

    def run():
        for number, batch in enumerate(map(guard.batch, batches(3))):
            if number % 2 == 0:
                kept.append(state(model, optimizer))
            MSE(model, batch).backward()  # the loss is not even noted
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()

    with guard:
        warned("micro-batch", run)
    assert same(kept[1], kept[2])
    [found] = guard.report().examined
    assert (found.step, found.micro_batch, found.loss) == (2, 1, None)
    assert found.reason == "the gradient of 0.weight is not finite"
    assert guard.diagnosis.causes[0].kind == "input"


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_finds_its_scale_is_no_bad_step(fused):
    """Overflows that come of the scale are the scaler's; a batch that is bad without one is not."""
    model = net(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.float16):
            return nn.functional.mse_loss(model(batch[0]).float(), batch[1])

    with initlab.guard(model, optimizer, loss_fn=loss_fn, scaler=scaler, **QUICK) as guard:
        for _ in range(5):
            for batch in batches():
                guard.step(batch)
        good = guard.report()
        with pytest.warns(UserWarning, match="the loss is nan"):
            guard.step(batches(0)[0])
    assert good.left_to_scaler > 2
    assert good.bad_steps == 0
    assert guard.report().bad_steps == 1
    assert scaler.get_scale() < 2.0**24
    assert "step" not in vars(scaler)


def test_gradients_that_no_scale_helps():
    """The loss is finite, its gradient is not, at any scale: that is a bad step under a scaler too."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x):
            return (self.linear(x) * x[:, :1]).abs().sqrt()  # whose slope at 0 is infinite

    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    given = batches()
    given[2][0][0] = 0.0
    guard = initlab.guard(model, optimizer, loss_fn=MSE, scaler=scaler, **QUICK)
    warned("is not finite", lambda: steps(guard, given))
    [found] = guard.report().examined
    assert (found.step, guard.report().left_to_scaler) == (3, 0)
    assert guard.diagnosis.causes[0].place.op == "sqrt"


def test_spikes_that_are_skipped_are_bad_steps():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    given = batches(count=8)
    given[6] = (given[6][0] * 1e3, given[6][1])
    spikes = initlab.MedianSpikes(3.0, warmup=4, action="skip")
    with initlab.guard(model, optimizer, loss_fn=MSE, spikes=spikes, **QUICK) as guard:
        for batch in given[:6]:
            guard.step(batch)
        before = state(model, optimizer)
        with pytest.warns(UserWarning, match="is a spike"):
            guard.step(given[6])
        assert same(before, state(model, optimizer))
        guard.step(given[7])
    assert (guard.report().bad_steps, guard.report().examined[0].step) == (1, 7)


def test_the_first_the_tenth_and_no_more_are_examined():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bad = batches(0)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with initlab.guard(model, optimizer, loss_fn=MSE, limit=2, budget=0.5) as guard:
            for _ in range(12):
                guard.step(bad)
    assert [found.step for found in guard.report().examined] == [1, 10]
    assert len(caught) == 2
    assert guard.report().bad_steps == 12


def test_a_device_that_is_a_step_behind():
    """As on a GPU: the host reads flags a step late. The step in between is skipped, and the state is the bad one's."""
    from initlab.guarding import training

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = initlab.guard(model, optimizer, loss_fn=MSE, **QUICK)
    guard._is_behind = lambda device: True
    kept = []
    given = noting(batches(3, count=8), kept, lambda: [p.detach().clone() for p in model.parameters()])
    warned("step 4", lambda: steps(guard, given))
    assert training._LAG == 1
    assert same(kept[3], kept[4])
    assert same(kept[4], kept[5])
    assert not same(kept[5], kept[6])
    assert (guard.report().steps, guard.report().bad_steps, guard.report().skipped) == (8, 1, 2)
    assert all(x.isfinite().all() for x in state(model, optimizer))
    assert guard.diagnosis.causes[0].kind == "input"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of inductor's own imports
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.long_if(lambda backend: backend != "eager")
def test_compiled_models(backend):
    """A compiled model is guarded by its gradients; the diagnosis runs it uncompiled."""
    model = torch.compile(net(), backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    guard = initlab.guard(model, optimizer, loss_fn=MSE, **QUICK)
    warned("step 2", lambda: steps(guard, batches(1, count=3)))
    assert all(x.isfinite().all() for x in state(model, optimizer))
    assert guard.diagnosis.causes[0].kind == "input"
    assert any("uncompiled" in note for note in guard.diagnosis.notes)


def test_a_run_that_had_left_its_path():
    """Steps of a rate that is far too large: the last one shows weights that no start has, and the rate is to blame."""
    model = net(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), 100.0)
    guard = initlab.guard(model, optimizer, loss_fn=MSE, limit=1, **QUICK)
    warned("the steps? before|steps before", lambda: steps(guard, batches(count=30)))
    kinds = [cause.kind for cause in guard.diagnosis.causes]
    assert kinds[0] == "learning rate"
    assert "uninitialised" not in kinds


def test_several_optimizers():
    model = net()
    optimizers = [torch.optim.SGD(model[0].parameters(), 0.01), torch.optim.AdamW(model[4].parameters())]
    guard = initlab.guard(model, optimizers, loss_fn=MSE, **QUICK)
    warned("step 2", lambda: steps(guard, batches(1, count=3)))
    assert all(p.isfinite().all() for p in model.parameters())
    assert (guard.report().steps, guard.report().bad_steps) == (3, 1)
    assert not any(map(hooks, optimizers))


def test_refusals():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with initlab.guard(model, optimizer, loss_fn=MSE) as guard:
        with pytest.raises(RuntimeError, match="guarded already"):
            initlab.guard(model, optimizer, loss_fn=MSE)
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(guard)
        with pytest.raises(TypeError, match="cannot be copied"):
            pickle.dumps(guard.clipper)
        twin = copy.deepcopy(optimizer)
        assert hooks(twin) == []
        pickle.loads(pickle.dumps(model))
    with pytest.raises(RuntimeError, match="removed"):
        guard.step(batches()[0])
    clipper = initlab.GradClipper(optimizer, 1.0)
    with pytest.raises(RuntimeError, match="has a GradClipper"):
        initlab.guard(model, optimizer, loss_fn=MSE)
    clipper.remove()
    for wrong, error, message in (
        ({"loss_fn": nn.MSELoss()}, TypeError, "supervised"),
        ({"loss_fn": 3}, TypeError, "function of model and batch"),
        ({"nonfinite": "ignore"}, ValueError, "skip, raise, propagate"),
        ({"limit": -1}, ValueError, "limit"),
        ({"budget": 0}, ValueError, "budget"),
        ({"max_norm": 0.0}, ValueError, "max_norm"),
        ({"log": 3}, TypeError, "CSV"),
        ({"log_every": 0}, ValueError, "log_every"),
    ):
        with pytest.raises(error, match=message):
            initlab.guard(model, optimizer, **{"loss_fn": MSE} | wrong)
        assert hooks(optimizer) == []
    with pytest.raises(TypeError, match="one element"):
        initlab.guard(model, optimizer, loss_fn=lambda model, batch: model(batch[0])).step(batches()[0])


def test_an_exception_in_the_loop_leaves_no_hooks():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(KeyError), initlab.guard(model, optimizer, loss_fn=MSE):
        raise KeyError("the user's own")
    assert hooks(optimizer) == []


class Writer:
    def __init__(self):
        self.rows = []

    def add_scalar(self, tag, value, step):
        self.rows.append((tag, value, step))


def test_logs(tmp_path):
    """Norms are torch's own of the same run; each sink gets the same rows."""
    given, norms = batches(count=5), []
    model = nn.Linear(4, 1)
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), 0.01)
    for batch in given:
        other.zero_grad()
        MSE(twin, batch).backward()
        norms.append(float(nn.utils.clip_grad_norm_(twin.parameters(), 0.5)))
        other.step()
    writer, rows = Writer(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    log = [tmp_path / "new" / "log.csv", writer, rows.append]
    with initlab.guard(model, optimizer, loss_fn=MSE, max_norm=0.5, log=log, log_every=2) as guard:
        losses = [float(guard.step(batch)) for batch in given]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["norm"] for row in rows] == pytest.approx([norms[1], norms[3], norms[4]], rel=1e-5)
    assert rows[0]["norm_max"] == pytest.approx(max(norms[:2]), rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-6)
    share = sum(norm > 0.5 for norm in norms[:2]) / 2
    assert rows[0]["clipped_share"] == share
    assert set(rows[0]["top"]) == {"weight", "bias"}
    with (tmp_path / "new" / "log.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [int(row["step"]) for row in read] == [2, 4, 5]
    assert float(read[0]["norm"]) == rows[0]["norm"]
    assert ("initlab/norm", rows[0]["norm"], 2) in writer.rows
    assert ("initlab/top/weight", rows[0]["top"]["weight"], 2) in writer.rows


def test_batches_of_any_kind_can_be_saved(tmp_path):
    """What is saved is read by torch.load(weights_only=True)."""
    import collections
    import dataclasses

    import numpy as np

    @dataclasses.dataclass
    class Data:
        x: torch.Tensor
        name: str

    Pair = collections.namedtuple("Pair", "x y")
    view = torch.arange(1_000_000.0)[:3]
    batch = {
        "data": Data(view, "a"),
        "pair": Pair(torch.ones(2, dtype=torch.bfloat16), [None, 2.5, True]),
        "array": np.arange(3, dtype=np.int32),
        "number": np.float64(2.0),
        "parameter": nn.Parameter(torch.ones(1)),
        "other": object(),
        "text": collections.UserDict(ids=torch.ones(1)),
        ("key",): math.inf,
    }
    torch.save(plain(batch), tmp_path / "batch.pt")
    read = torch.load(tmp_path / "batch.pt", weights_only=True)
    assert torch.equal(read["data"]["x"], view)
    assert read["data"]["name"] == "a"
    assert read["pair"][0].dtype is torch.bfloat16
    assert read["pair"][1] == [None, 2.5, True]
    assert read["array"].tolist() == [0, 1, 2]
    assert read["text"]["ids"].tolist() == [1.0]
    assert (tmp_path / "batch.pt").stat().st_size < 10_000  # not the whole memory behind a view
