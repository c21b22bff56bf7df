"""GradClipper in loops that others write: closures, compiled steps, interrupts, counters, several optimizers, scalers.

Loops of real libraries are in tests/integrations.
"""

import copy
import dataclasses
import math
import pickle
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter, utils

import initlab

NAN = math.nan
COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile raises them itself


def weight(optimizer=torch.optim.SGD, **options):
    p = Parameter(torch.ones(4))
    return p, optimizer([p], lr=0.1, **options)


COMPILED = {
    "SGD": (torch.optim.SGD, {"fused": True}),
    "SGD with momentum": (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"fused": True}),
    "AdamW": (torch.optim.AdamW, {"fused": True}),
    "Adagrad": (torch.optim.Adagrad, {"fused": True}),
    "SGD, foreach": (torch.optim.SGD, {"foreach": True, "momentum": 0.9}),
}


@COMPILES
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_steps_are_clipped(name, backend):
    torch._dynamo.reset()
    make, options = COMPILED[name]
    p, optimizer = weight(make, **options)
    q, reference = weight(make, **options)
    clipper = initlab.GradClipper(optimizer, 1.0)
    step = torch.compile(optimizer.step, backend=backend)
    for value in (100.0, NAN, 0.1, 50.0):
        p.grad, q.grad = torch.full((4,), value), torch.full((4,), value)
        before = p.detach().clone()
        step()
        if math.isnan(value):
            assert torch.equal(p, before)
            continue
        utils.clip_grad_norm_([q], 1.0)
        reference.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    stats = clipper.stats()
    assert (stats.steps, stats.clipped, stats.nonfinite, stats.first_bad_step) == (4, 2, 1, 2)
    assert not hasattr(optimizer, "grad_scale")


@COMPILES
def test_a_compiled_training_step_is_clipped():
    """torch breaks the graph at backward() and at the hooks; the results are those without a compiler."""

    def train(clips):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        clipper = initlab.GradClipper(optimizer, 0.1) if clips else None

        def step(x):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if not clips:
                utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

        run = torch.compile(step, backend="eager") if clips else step
        for i in range(6):
            x = torch.randn(2, 4)
            if i != 3:
                run(x)
            elif clips:
                run(x * NAN)
        return list(model.parameters()), clipper

    (ours, clipper), (theirs, _) = train(True), train(False)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert (clipper.stats().nonfinite, clipper.stats().first_bad_step) == (1, 4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_is_run_by_the_optimizer_and_clipped(fused, by_keyword):
    p, optimizer = weight(fused=fused)
    clipper = initlab.GradClipper(optimizer, 1.0)

    def step(value):
        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            (p * value).sum().backward()
            return value

        return optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)

    assert step(100.0) == 100.0
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.95))
    before = p.detach().clone()
    assert math.isnan(step(NAN))
    assert torch.equal(p, before)
    assert p.grad.isnan().all()
    stats = clipper.stats()
    assert (stats.steps, stats.clipped, stats.nonfinite, stats.first_bad_step) == (2, 1, 1, 2)
    clipper.nonfinite = "raise"
    with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        step(NAN)
    clipper.nonfinite = "skip"
    step(100.0)
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.90))


class IgnoresItsClosure(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p -= self.param_groups[0]["lr"] * p.grad


def test_an_optimizer_that_ignores_its_closure_is_named():
    p, optimizer = weight(IgnoresItsClosure)
    initlab.GradClipper(optimizer, 1.0)
    optimizer.step(lambda: 0.0)
    p.grad = torch.full((4,), NAN)
    with pytest.raises(RuntimeError, match="IgnoresItsClosure has moved its parameters without running the closure"):
        optimizer.step(lambda: 0.0)


def lbfgs(line_search):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(8, 3).double()
    options = {"lr": 0.1, "max_iter": 4, "line_search_fn": line_search}
    return model, torch.optim.LBFGS(model.parameters(), **options), x


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_is_clipped_in_each_call_of_its_closure(line_search):
    def train(clips):
        model, optimizer, x = lbfgs(line_search)
        if clips:
            initlab.GradClipper(optimizer, 0.5)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            if not clips:
                utils.clip_grad_norm_(model.parameters(), 0.5)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return list(model.parameters())

    for p, q in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("bad", [1, 2, 3])
def test_a_bad_call_of_lbfgs_leaves_everything_as_it_was(bad, line_search):
    model, optimizer, x = lbfgs(line_search)
    initlab.GradClipper(optimizer, 0.5)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = model(x).square().sum() * (NAN if calls == bad else 1.0)
        loss.backward()
        return loss

    calls = 100
    optimizer.step(closure)
    before = copy.deepcopy((optimizer.state_dict(), list(model.parameters())))
    calls = 0
    optimizer.step(closure)
    assert calls >= bad
    assert str((optimizer.state_dict(), list(model.parameters()))) == str(before)


def test_an_interrupted_step_takes_nothing_into_the_next():
    """The gradients that it hid held NaN; those of the next step are fresh, or there are none."""
    for zeroed in (True, False):
        p, optimizer = weight()
        other = Parameter(torch.ones(2))
        optimizer.add_param_group({"params": [other]})
        clipper = initlab.GradClipper(optimizer, 1.0)

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = optimizer.register_step_pre_hook(interrupt)
        p.grad, other.grad = torch.full((4,), NAN), torch.full((2,), NAN)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        hook.remove()
        if zeroed:
            optimizer.zero_grad()
        p.grad = torch.full((4,), 100.0)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((4,), 0.95))
        assert torch.equal(other, torch.ones(2))
        assert p.grad is not None
        assert clipper.stats().nonfinite == 1


def test_attributes_are_checked_whenever_they_are_set():
    _, optimizer = weight()
    clipper = initlab.GradClipper(optimizer, 1.0)
    for name, value, match in (
        ("max_norm", -1, "max_norm is -1; it must be more than 0"),
        ("max_norm", NAN, "max_norm is nan"),
        ("max_norm", 0.0, "max_norm is 0.0"),
        ("nonfinite", "skp", "'skp'; it must be one of propagate, raise, skip, zero"),
        ("nonfinite", "keep", "'skip' skips the step"),
        ("norm_type", NAN, "norm_type is nan"),
    ):
        with pytest.raises(ValueError, match=match):
            setattr(clipper, name, value)
    assert (clipper.max_norm, clipper.nonfinite, clipper.norm_type) == (1.0, "skip", 2.0)
    clipper.norm_type = "inf"
    assert clipper.norm_type == math.inf


class Counting(torch.optim.Optimizer):
    """Plain descent, with what third parties keep outside of `state`."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "k": 0, "weight_sum": torch.tensor(0.0), "history": [0.0]})
        self.calls, self.seen = 0, {"steps": [1]}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.calls += 1
        self.seen["steps"].append(self.calls)
        self.last = self.calls
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"]
            group["history"].append(float(group["k"]))
            group["new"] = True
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad
                    self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return loss


def held(optimizer):
    names = ("state", "param_groups", "calls", "seen", "last")
    return copy.deepcopy({name: vars(optimizer).get(name) for name in names if name != "state"}), {
        name: copy.deepcopy(value) for name, value in enumerate(optimizer.state.values())
    }


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_skipped_step_changes_nothing_that_the_optimizer_holds(with_closure):
    p = Parameter(torch.ones(4))
    optimizer = Counting([p])
    clipper = initlab.GradClipper(optimizer, 1.0)
    for values in ((NAN, 100.0), (100.0, NAN)):
        for value in values:
            before, weights = held(optimizer), p.detach().clone()

            def closure(value=value):
                p.grad = torch.full((4,), value)
                return value

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            unchanged = str(held(optimizer)) == str(before) and torch.equal(p, weights)
            assert unchanged == math.isnan(value)
            assert p.grad is not None
    assert (clipper.stats().steps, clipper.stats().nonfinite, optimizer.calls) == (4, 2, 2)


@dataclasses.dataclass
class Progress:
    steps: int
    total: torch.Tensor


class CountsElsewhere(torch.optim.SGD):
    """Its counters are in arrays and in objects that it holds, and its rate in a scheduler."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.counts, self.space = np.zeros(2), types.SimpleNamespace(steps=0)
        self.progress, self.schedule = Progress(0, torch.zeros(())), torch.optim.lr_scheduler.StepLR(self, 2)

    def step(self, closure=None):
        loss = super().step(closure)
        self.schedule.step()
        self.counts += 1
        self.space.steps += 1
        self.progress.steps += 1
        self.progress.total += 1
        return loss

    def held(self):
        schedule = self.schedule.state_dict(), self.param_groups[0]["lr"]
        return str((self.counts, self.space, self.progress, schedule))


def test_a_skipped_step_changes_no_array_and_no_record():
    p, optimizer = weight(CountsElsewhere)
    initlab.GradClipper(optimizer, 1.0)
    for value in (NAN, 1.0, NAN, 1.0, NAN, 1.0):
        before = optimizer.held()
        p.grad = torch.full((4,), value)
        optimizer.step()
        assert (optimizer.held() == before) == math.isnan(value)
    assert (optimizer.space.steps, optimizer.progress.steps, optimizer.schedule.last_epoch) == (3, 3, 3)


class Decaying(torch.optim.Optimizer):
    """Moves parameters without gradients too."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p *= 0.5


class OfAKnownPackage(Decaying):
    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p *= 0.5

    step.__module__ = "schedulefree.made_up"


class NeverAsks(torch.optim.Optimizer):
    """Takes every parameter's gradient for granted, and cannot do with NaN."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            assert p.grad.isfinite().all()
            p.sub_(p.grad * 0.1 + 0.01)
            self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p, 0.1)


@pytest.mark.parametrize("make", [Decaying, NeverAsks])
@pytest.mark.parametrize("size", [4, 5000])
def test_an_optimizer_that_moves_without_gradients_is_put_back(make, size):
    p = Parameter(torch.ones(size))
    optimizer = make([p])
    initlab.GradClipper(optimizer, 1.0)
    for value in (NAN, 1.0, NAN):
        p.grad = gradient = torch.full((size,), value)
        before = copy.deepcopy((optimizer.state_dict(), p))
        optimizer.step()
        assert p.grad is gradient
        if math.isnan(value):
            torch.testing.assert_close((optimizer.state_dict(), p), before, rtol=0, atol=0)
        else:
            assert not torch.equal(p, before[1])


def test_an_optimizer_that_was_to_pass_over_parameters_is_named():
    small, large = Parameter(torch.ones(4)), Parameter(torch.ones(5000))
    optimizer = OfAKnownPackage([small])
    initlab.GradClipper(optimizer, 1.0)
    small.grad = torch.full((4,), NAN)
    optimizer.step()
    assert torch.equal(small, torch.ones(4))
    optimizer = OfAKnownPackage([large])
    initlab.GradClipper(optimizer, 1.0)
    large.grad = torch.full((5000,), NAN)
    with pytest.raises(RuntimeError, match=r"OfAKnownPackage changed 1 of its tensors, the first of shape \(5000,\)"):
        optimizer.step()


class ClaimsToBeFused(torch.optim.Optimizer):
    """As some third parties do; it knows nothing of found_inf."""

    _step_supports_amp_scaling = True

    def __init__(self, params):
        super().__init__(params, {"fused": True})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p -= 0.1 * p.grad


class OwnStep(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


class OwnDefaults(torch.optim.AdamW):
    pass


def test_only_steps_that_are_known_to_skip_on_the_device_are_trusted():
    p = Parameter(torch.ones(4))
    optimizer = ClaimsToBeFused([p])
    initlab.GradClipper(optimizer, 1.0)
    for value, expected in ((100.0, 0.95), (NAN, 0.95), (100.0, 0.9)):
        p.grad = torch.full((4,), value)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((4,), expected))


@pytest.mark.parametrize("make", [OwnStep, OwnDefaults])
@pytest.mark.parametrize("fused", [False, True])
def test_subclasses_step_once(make, fused):
    """super().step() runs the hooks a second time."""
    weight(torch.optim.AdamW)  # from then on its step runs hooks
    p, optimizer = weight(make, fused=fused)
    q, reference = weight(torch.optim.AdamW, fused=fused)
    clipper = initlab.GradClipper(optimizer, 1.0)
    for value in (100.0, NAN, 3.0):
        p.grad, q.grad = torch.full((4,), value), torch.full((4,), value)
        optimizer.step()
        if not math.isnan(value):
            utils.clip_grad_norm_([q], 1.0)
            reference.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert float(clipper.report.norm) == pytest.approx(2 * value, nan_ok=True)
    assert (clipper.stats().steps, clipper.stats().clipped, clipper.stats().nonfinite) == (3, 2, 1)


class Wrapper:
    """As accelerate's and Lightning's: no torch.optim.Optimizer of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


class HalfAnOptimizer(torch.optim.Optimizer):
    """Inherits, and never calls the constructor that sets hooks up."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


@pytest.mark.parametrize("wrap", [Wrapper, HalfAnOptimizer, lambda o: Wrapper(HalfAnOptimizer(o))])
def test_wrappers_are_looked_into(wrap):
    p, optimizer = weight()
    wrapped = wrap(optimizer)
    clipper = initlab.GradClipper(wrapped, 1.0)
    p.grad = torch.full((4,), 100.0)
    wrapped.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.95))
    with pytest.raises(RuntimeError, match="has a GradClipper already"):
        initlab.GradClipper(optimizer, 1.0)
    clipper.remove()
    initlab.GradClipper(wrapped, 1.0)


def test_what_is_no_optimizer_is_refused_and_nothing_is_left_behind():
    p, optimizer = weight()
    for other in (object(), nn.Linear(1, 1), [p], Wrapper(None), HalfAnOptimizer(None)):
        with pytest.raises(TypeError, match=r"no torch.optim.Optimizer whose step\(\) runs hooks"):
            initlab.GradClipper(other, 1.0)
    with pytest.raises(ValueError, match="empty list"):
        initlab.GradClipper([], 1.0)
    for options in ({"max_norm": -1}, {"norm_type": "two"}, {"norm_type": 1, "per_parameter": True}):
        with pytest.raises(ValueError, match=r"max_norm|could not convert|norms of order 2"):
            initlab.GradClipper(optimizer, **{"max_norm": 1.0} | options)
    initlab.GradClipper(optimizer, 1.0)


WRONG_ARGUMENTS = {
    "max_norm is 'one'; it must be a number": {"max_norm": "one"},
    "max_norm is None; it must be a number": {"max_norm": None},
    "norm_type is 'two'; it must be a number": {"norm_type": "two"},
    "named_parameters has parameters without names": {"named_parameters": nn.Linear(2, 2).parameters()},
    "named_parameters has Linear in place of pairs": {"named_parameters": nn.Linear(2, 2)},
    "named_parameters has str in place of pairs": {"named_parameters": {"weight": Parameter(torch.ones(2))}},
    "spikes is 3.0; it must be a policy": {"spikes": 3.0},
    "spikes is .*MedianSpikes'>; it must be a policy": {"spikes": initlab.MedianSpikes},
    "scaler is True; it must be the torch.amp.GradScaler": {"scaler": True},
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named_and_leave_nothing_behind(message):
    _, optimizer = weight()
    with pytest.raises((TypeError, ValueError), match=message):
        initlab.GradClipper(optimizer, **{"max_norm": 1.0} | WRONG_ARGUMENTS[message])
    clipper = initlab.GradClipper(optimizer, 1.0)
    with pytest.raises(ValueError, match="the state has no steps and no counts, so it is none of a GradClipper"):
        clipper.load_state_dict({"state": {}})


def test_deepspeed_zero_is_refused_by_name():
    p, optimizer = weight()
    p.grad = torch.ones(4)
    p.ds_id = 3
    for call in (
        lambda: initlab.GradClipper(optimizer, 1.0),
        lambda: initlab.clip_grad_norm_([p], 1.0),
        lambda: initlab.clip_grads_with_norm_([p], 1.0, 2.0),
    ):
        with pytest.raises(NotImplementedError, match=r"partitioned by DeepSpeed's ZeRO \(it has ds_id\)"):
            call()
    assert torch.equal(p.grad, torch.ones(4))
    zero = type("DeepSpeedZeroOptimizer_Stage3", (), {"__module__": "deepspeed.runtime.zero.stage3"})()
    zero.optimizer = optimizer
    with pytest.raises(NotImplementedError, match="DeepSpeedZeroOptimizer_Stage3 is an optimizer of DeepSpeed's ZeRO"):
        initlab.GradClipper(zero, 1.0)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_tied_weight_counts_once(sparse):
    embedding, head = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)
    head.weight = embedding.weight
    head(embedding(torch.tensor([0, 1]))).sum().backward()
    gradient = embedding.weight.grad.clone()
    both = [*embedding.named_parameters(), *head.named_parameters()]
    if sparse:
        both = [p for _, p in both]
    assert float(initlab.clip_grad_norm_(both, 1.0)) == pytest.approx(float(gradient.norm()), rel=1e-6)
    torch.testing.assert_close(embedding.weight.grad, gradient / gradient.norm())
    assert float(initlab.get_total_norm([embedding.weight.grad] * 2)) == pytest.approx(1.0, rel=1e-5)


def test_lazy_modules_may_be_given_their_shapes_later():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = initlab.GradClipper(optimizer, 1.0)
    (model(torch.ones(2, 4)).sum() * 100.0).backward()
    optimizer.step()
    norm = utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(norm, torch.tensor(1.0))
    assert clipper.stats().clipped == 1


def test_float8_gradients_are_refused_before_anything_is_written():
    p, q = Parameter(torch.ones(4)), Parameter(torch.ones(2).to(torch.float8_e4m3fn))
    p.grad, q.grad = torch.full((4,), 9.0), torch.ones(2).to(torch.float8_e4m3fn)
    optimizer = torch.optim.SGD([p, q], lr=0.1)
    initlab.GradClipper(optimizer, 1.0)
    for call in (lambda: initlab.clip_grad_norm_([p, q], 1.0), optimizer.step):
        with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
            call()
    assert torch.equal(p.grad, torch.full((4,), 9.0))
    assert torch.equal(p, torch.ones(4))


@pytest.mark.parametrize("fused", [False, True])
def test_a_default_device_says_nothing_about_the_gradients(fused):
    p, optimizer = weight(fused=fused)
    q = Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [q]})
    with torch.device("meta"):
        clipper = initlab.GradClipper(optimizer, 1.0, spikes=initlab.clipping.ZScoreSpikes(warmup=2))
        for value in (100.0, NAN, 1.0):
            p.grad, q.grad = (torch.full(t.shape, value, device="cpu") for t in (p, q))
            optimizer.step()
        clipper.load_state_dict(clipper.state_dict())
        initlab.clip_grad_norm_([p, q], 1.0, nonfinite="keep", report=True)
        initlab.clip_grads_with_norm_([p, q], 1.0, 3.0)
        for norm_type in (1.0, 2.0, math.inf, 0.0):
            assert initlab.get_total_norm([p.grad, q.grad], norm_type).device.type == "cpu"
    assert (clipper.stats().steps, clipper.stats().nonfinite) == (3, 1)


def test_sparse_gradients():
    """SparseAdam steps by clipped ones; the drop-ins follow the torch at hand."""

    def embedding():
        torch.manual_seed(0)
        made = nn.Embedding(5, 3, sparse=True)
        made(torch.tensor([1, 1, 2])).square().sum().mul(10).backward()
        return made

    ours, theirs = embedding(), embedding()
    optimizer, reference = (torch.optim.SparseAdam(e.parameters(), lr=0.1) for e in (ours, theirs))
    clipper = initlab.GradClipper(optimizer, 1.0)
    dense = theirs.weight.grad.to_dense()
    optimizer.step()
    assert float(clipper.report.norm) == pytest.approx(float(dense.norm()), rel=1e-6)
    torch.testing.assert_close(ours.weight.grad.to_dense(), dense / dense.norm())
    theirs.weight.grad = theirs.weight.grad.coalesce() * (1.0 / dense.norm())
    reference.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    before = ours.weight.detach().clone()
    ours.weight.grad = (ours.weight.grad.coalesce() * NAN).coalesce()
    optimizer.step()
    assert torch.equal(ours.weight, before)
    try:
        expected = utils.clip_grad_norm_(embedding().parameters(), 1.0)
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match=r"layout torch\.sparse_coo.*leave it out"):
            initlab.clip_grad_norm_(embedding().parameters(), 1.0)
    else:
        torch.testing.assert_close(initlab.clip_grad_norm_(embedding().parameters(), 1.0), expected)


def two(fused=True):
    torch.manual_seed(0)
    matrix, vector = Parameter(torch.randn(4, 4)), Parameter(torch.randn(4))
    optimizers = [torch.optim.Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.1, fused=fused)]
    return [matrix, vector], optimizers


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [None, 0, 1])
@pytest.mark.parametrize("order", [1, -1])
def test_several_optimizers_have_one_norm_and_one_decision(bad, fused, order):
    (ours, optimizers), (theirs, references) = two(fused), two(fused)
    clipper = initlab.GradClipper(optimizers, 1.0)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for ps in (ours, theirs):
            generator.manual_seed(step)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator) * 9
        if step == 2 and bad is not None:
            ours[bad].grad.view(-1)[0] = NAN
            before = copy.deepcopy(([o.state_dict() for o in optimizers], ours))
            for optimizer in optimizers[::order]:
                optimizer.step()
            torch.testing.assert_close(([o.state_dict() for o in optimizers], ours), before, rtol=0, atol=0)
            continue
        utils.clip_grad_norm_(theirs, 1.0)
        for optimizer in (*optimizers[::order], *references[::order]):
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert clipper.stats().steps == 6
    assert clipper.stats().nonfinite == (bad is not None)
    if bad is not None:
        assert clipper.stats().first_bad_parameter.startswith(f"parameter 0 of group 0 of optimizer {bad}")


def test_gradients_that_change_between_the_steps_of_several_optimizers():
    (matrix, vector), optimizers = two()
    clipper = initlab.GradClipper(optimizers, 1.0)
    matrix.grad, vector.grad = torch.ones(4, 4), torch.ones(4)
    optimizers[0].step()
    vector.grad.mul_(2.0)
    with pytest.raises(RuntimeError, match="gradients of AdamW changed after the norm of all was taken"):
        optimizers[1].step()
    # One after another, each after its own backward pass: each step takes the norm of what there is.
    for step in range(4):
        for optimizer, p in zip(optimizers, (matrix, vector), strict=True):
            matrix.grad = vector.grad = None
            p.grad = torch.full(p.shape, 3.0 + step)
            norm = float(p.grad.norm())
            optimizer.step()
            assert float(clipper.report.norm) == pytest.approx(norm, rel=1e-6)
    assert clipper.stats().steps == 9


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_of_several_optimizers_may_have_nothing_to_step(order):
    """It is frozen at first."""
    pairs = weight(), weight()
    (p, _), (q, _) = pairs
    clipper = initlab.GradClipper([optimizer for _, optimizer in pairs], 1.0)
    for frozen in (True, True, False, True):
        p.grad, q.grad = torch.full((4,), 100.0), None if frozen else torch.zeros(4)
        for i in order:
            pairs[i][1].step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.8))
    assert torch.equal(q, torch.ones(4))
    assert clipper.stats().clipped == 4


def scaled(p, scaler, value):
    p.grad = None
    scaler.scale((p * value).sum()).backward()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_drops_are_counted(fused):
    p, optimizer = weight(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    clipper = initlab.GradClipper(optimizer, 1.0, scaler=scaler)
    for value in (100.0, math.inf, 100.0, NAN):
        scaled(p, scaler, value)
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.9))
    stats = clipper.stats()
    assert (stats.steps, stats.clipped, stats.nonfinite, stats.first_bad_step) == (4, 2, 2, 2)
    assert float(clipper.report.norm) != float(clipper.report.norm)
    clipper.remove()
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("fused", [False, True])
def test_several_optimizers_under_a_grad_scaler(fused):
    for unscales in (True, False):
        (matrix, vector), optimizers = two(fused)
        (q, r), references = two(fused)
        scaler, other = (torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2))
        clipper = initlab.GradClipper(optimizers, 1.0, scaler=scaler)
        for value in (5.0, math.inf, 7.0):
            for one, ps in ((scaler, (matrix, vector)), (other, (q, r))):
                for p in ps:
                    scaled(p, one, 2.0 if p.dim() == 2 else value)
            if unscales:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
            else:
                with pytest.raises(RuntimeError, match=r"call scaler\.unscale_"):
                    scaler.step(optimizers[0])
                break
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            if value < math.inf:  # torch would step one of them, and not the other
                for optimizer in references:
                    other.unscale_(optimizer)
                utils.clip_grad_norm_([q, r], 1.0)
                for optimizer in references:
                    other.step(optimizer)
            other.update(scaler.get_scale())
            for p, reference in ((matrix, q), (vector, r)):
                torch.testing.assert_close(p, reference, rtol=1e-5, atol=1e-6)
        if unscales:
            assert (clipper.stats().steps, clipper.stats().nonfinite, clipper.stats().first_bad_step) == (3, 1, 2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("action", ["clip", "skip"])
def test_spikes_are_clipped_or_skipped_and_counted(action, fused):
    p, optimizer = weight(fused=fused)
    policy = initlab.clipping.MedianSpikes(factor=2.0, window=8, warmup=3, action=action)
    clipper = initlab.GradClipper(optimizer, math.inf, spikes=policy)
    expected = torch.ones(4)
    for value in (1.0, 1.2, 0.8, 1.0, 50.0, NAN, 1.0, 30.0):
        p.grad = torch.full((4,), value)
        optimizer.step()
        if value > 2.0:
            value = 2.0 if action == "clip" else 0.0  # twice the median
        if not math.isnan(value):
            expected -= 0.1 * value
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-5)
    stats = clipper.stats()
    assert (stats.steps, stats.nonfinite, stats.spikes, stats.spike_steps) == (8, 1, 2, (5, 8))
    assert stats.clipped == (2 if action == "clip" else 0)


def test_a_run_with_spikes_goes_on_where_it_was():
    def run(steps, state=None):
        p, optimizer = weight()
        policy = initlab.clipping.ZScoreSpikes(warmup=5)
        clipper = initlab.GradClipper(optimizer, 10.0, spikes=policy)
        if state is not None:
            clipper.load_state_dict(state)
        for step in steps:
            p.grad = torch.full((4,), 1.0 + 0.1 * math.sin(step) + 30.0 * (step % 11 == 10))
            optimizer.step()
        return clipper

    state = run(range(20)).state_dict()
    resumed, whole = run(range(20, 40), state), run(range(40))
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.stats() == whole.stats()
    assert resumed.stats().spike_steps == (11, 22, 33)
    _, optimizer = weight()
    with pytest.raises(ValueError, match="take 'spikes' out of the state"):
        initlab.GradClipper(optimizer, 1.0).load_state_dict(state)


def test_the_doctor_leaves_the_counts_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    clipper = initlab.GradClipper(optimizer, 1.0)
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    before = clipper.state_dict(), clipper.stats(), clipper.report
    initlab.diagnose(model, torch.randn(5, 3), lambda out: out.square().mean(), optimizer)
    assert (clipper.state_dict(), clipper.stats(), clipper.report) == before


def test_two_clippers_of_one_scaler_come_and_go_in_any_order():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plain = scaler.step
    for order in ((0, 1), (1, 0)):
        pairs = [weight() for _ in range(2)]
        clippers = [initlab.GradClipper(optimizer, 1.0, scaler=scaler) for _, optimizer in pairs]
        for k in (*order, None):
            for p, optimizer in pairs:
                scaled(p, scaler, math.inf)
                scaler.step(optimizer)
            scaler.update()
            if k is not None:
                clippers[k].remove()
        assert sorted(clipper.stats().nonfinite for clipper in clippers) == [1, 2]
        assert scaler.step == plain


def test_an_interrupted_step_keeps_nothing_of_the_loop_alive():
    import weakref

    p, optimizer = weight()
    initlab.GradClipper(optimizer, 1.0)
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    p.grad = torch.full((4,), NAN)

    def loop():
        batch = torch.ones(3)
        try:
            optimizer.step()
        except ZeroDivisionError:
            return weakref.ref(batch)

    assert loop()() is None


@pytest.mark.parametrize("fused", [False, True])
def test_norms_of_single_parameters(fused):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 2))
    model[3].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.named_parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    clipper = initlab.GradClipper(optimizer, 0.1, per_parameter=True, scaler=scaler)
    assert clipper.norms() == {}
    scaler.scale(model(torch.randn(5, 3)).square().sum()).backward()
    expected = {name: float(p.grad.double().norm()) / 4.0 for name, p in model.named_parameters() if p.grad is not None}
    scaler.step(optimizer)
    scaler.update()
    assert clipper.norms() == pytest.approx(expected, rel=1e-6)
    assert list(clipper.norms()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    largest = sorted(expected, key=expected.get, reverse=True)
    assert [name for name, _ in clipper.top(2)] == largest[:2]
    assert float(clipper.report.norm) == pytest.approx(math.hypot(*expected.values()), rel=1e-6)
    model[2].bias.grad[0] = NAN
    optimizer.step()
    assert clipper.top(1)[0][0] == "2.bias"
    with pytest.raises(ValueError, match="per_parameter=True gives norms of order 2"):
        clipper.norm_type = 1.0
    clipper.remove()
    with pytest.raises(RuntimeError, match=r"GradClipper\(..., per_parameter=True\)"):
        initlab.GradClipper(optimizer, 1.0).norms()


def test_norms_of_tensors_that_are_passed_twice():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    norm, norms = initlab.get_total_norm([x, y, x], per_parameter=True)
    assert (float(norm), norms.tolist()) == (13.0, [5.0, 12.0, 5.0])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_clipper_clip_the_copied_optimizer(how, fused):
    p, optimizer = weight(fused=fused)
    clipper = initlab.GradClipper(optimizer, 1.0, named_parameters=[("w", p)])
    p.grad = torch.full((4,), NAN)
    optimizer.step()
    q, other, twin = how((p, optimizer, clipper))
    for value in (100.0, NAN):
        q.grad = torch.full((4,), value)
        other.step()
    torch.testing.assert_close(q.detach(), torch.full((4,), 0.95))
    stats = twin.stats()
    assert (stats.steps, stats.clipped, stats.nonfinite, stats.first_bad_parameter) == (3, 1, 2, "w")
    assert (clipper.stats().steps, clipper.stats().nonfinite) == (1, 1)
    assert torch.equal(p, torch.ones(4))
    with pytest.raises(RuntimeError, match="has a GradClipper already"):
        initlab.GradClipper(other, 1.0)
    initlab.GradClipper(how(optimizer), 1.0)
    clipper.remove()
    clipper = initlab.GradClipper(optimizer, 1.0, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(TypeError, match=r"with a scaler cannot be copied; save its state_dict\(\)"):
        how(clipper)


def test_a_parameter_belongs_to_one_of_several_optimizers():
    p, one = weight()
    other = torch.optim.SGD([p], lr=0.1)
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0 of optimizer 1, of shape \(4,\) is in optimizer 0 too"
    ):
        initlab.GradClipper([one, other], 1.0)
    initlab.GradClipper([one], 1.0)
    initlab.GradClipper(other, 1.0)
