"""GradClipper around torch's optimizers. Several ranks: tests/distributed/scenarios/grad_clipper.py."""

import copy
import importlib
import math

import pytest
import torch
from initlab.kernels import backends
from torch import nn
from torch.nn import utils

import initlab
from initlab.clipping import ClipStats


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 6, generator=generator)
    return x, (x[:, :3] * 4).sin()


def backward(model, step, scale=1.0, bad=None):
    x, y = batch(step)
    (nn.functional.mse_loss(model(x), y) * scale).backward()
    if bad is not None:
        list(model.parameters())[bad].grad.view(-1)[-1] = math.nan


FUSED = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.05, fused=True),
    "SGD with momentum": lambda ps: torch.optim.SGD(
        ps, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True
    ),
    "SGD with dampening": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, dampening=0.3, fused=True),
    "Adam": lambda ps: torch.optim.Adam(ps, 0.01, amsgrad=True, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 0.01, fused=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 0.05, fused=True),
}
OTHERS = {
    "SGD, foreach": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, foreach=True),
    "AdamW, foreach": lambda ps: torch.optim.AdamW(ps, 0.01, foreach=True),
    "AdamW, one by one": lambda ps: torch.optim.AdamW(ps, 0.01, foreach=False),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 0.01),
}
EVERY = FUSED | OTHERS


def state_of(model, optimizer):
    """Everything that a step may change, as numbers."""
    values = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        for _, value in sorted(optimizer.state.get(p, {}).items()):
            values.append(torch.zeros(()) if value is None else torch.as_tensor(value).detach().clone())
    return values


def same(left, right):
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_training_with_a_clipper_is_training_with_clipping_before_each_step(make):
    ours, theirs = net(), net()
    mine, other = make(ours.parameters()), make(theirs.parameters())
    clipper = initlab.GradClipper(mine, 0.1)
    clipped = 0
    for step in range(200):
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            backward(model, step)
            if model is theirs:
                clipped += float(utils.clip_grad_norm_(model.parameters(), 0.1)) > 0.1
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    stats = clipper.stats()
    assert stats == ClipStats(200, stats.clipped, 0, None, None)
    assert abs(stats.clipped - clipped) <= 1  # a norm within rounding of the bound
    assert stats.clipped > 20
    assert not hasattr(mine, "grad_scale")
    assert not hasattr(mine, "found_inf")


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("bad_steps", [{0}, {0, 1, 5}, {3}], ids=str)
def test_bad_steps_change_nothing(make, bad_steps):
    """And the steps after them go as if they had not been."""
    ours, theirs = net(), net()
    mine, other = make(ours.parameters()), make(theirs.parameters())
    clipper = initlab.GradClipper(mine, 0.3, named_parameters=ours.named_parameters())
    for step in range(8):
        mine.zero_grad()
        backward(ours, step, bad=3 if step in bad_steps else None)
        before = state_of(ours, mine)
        gradients = [p.grad for p in ours.parameters()]
        mine.step()
        assert all(p.grad is g for p, g in zip(ours.parameters(), gradients, strict=True))
        if step in bad_steps:
            after = state_of(ours, mine)
            # A first step may make its state; then that is zero.
            if len(after) == len(before):
                assert same(before, after)
            else:
                assert same(before, after[: len(before)])
                assert all(not x.any() for x in after[len(before) :])
            continue
        other.zero_grad()
        backward(theirs, step)
        utils.clip_grad_norm_(theirs.parameters(), 0.3)
        other.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    stats = clipper.stats()
    assert (stats.steps, stats.nonfinite) == (8, len(bad_steps))
    assert (stats.first_bad_step, stats.first_bad_parameter) == (min(bad_steps) + 1, "2.bias")
    assert clipper.report is not None
    assert not clipper.report.nonfinite


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_the_other_policies(make):
    model = net()
    optimizer = make(model.parameters())
    clipper = initlab.GradClipper(optimizer, 0.01, "raise", named_parameters=model.named_parameters())
    backward(model, 0, bad=2)
    before = state_of(model, optimizer)
    with pytest.raises(RuntimeError, match=r"2\.weight is the first of those that hold NaN"):
        optimizer.step()
    assert same(state_of(model, optimizer), before)
    assert str(clipper.report) == "norm nan; 2.weight is the first of those that hold NaN"
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()  # the one that raised left nothing behind
    assert clipper.stats() == ClipStats(2, 1, 1, 1, "2.weight")
    clipper.remove()

    theirs = copy.deepcopy(model)
    clipper = initlab.GradClipper(optimizer, 0.3, "zero")
    optimizer.zero_grad()
    backward(model, 2, bad=2)
    optimizer.step()
    assert all(not p.grad.any() for p in model.parameters())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    clipper.remove()

    initlab.GradClipper(optimizer, 0.3, "propagate")
    optimizer.zero_grad()
    backward(model, 3, bad=2)
    optimizer.step()
    assert all(bool(p.isnan().all()) for p in model.parameters())
    del theirs


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
def test_under_a_grad_scaler(make, unscale):
    """Gradients are measured as what they stand for, infinite ones back the scale off."""
    ours, theirs = net(), net()
    mine, other = make(ours.parameters()), make(theirs.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**k, growth_interval=3) for k in (12, 12)]
    clipper = initlab.GradClipper(mine, 0.3)
    skipped = 0
    for step in range(12):
        bad = 1 if step in (0, 6) else None
        for model, optimizer, scaler in ((ours, mine, scalers[0]), (theirs, other, scalers[1])):
            if (
                model is theirs
                and step == 0
                and "momentum" in str(optimizer)
                and optimizer.param_groups[0].get("momentum")
            ):
                # torch's fused SGD would start from momentum buffers without values
                scaler.scale(torch.tensor(1.0))
                scaler._scale.mul_(0.5)
                continue
            optimizer.zero_grad()
            backward(model, step, float(scaler.scale(torch.tensor(1.0))), bad)
            if unscale or model is theirs:
                scaler.unscale_(optimizer)
            if model is theirs:
                utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(optimizer)
            scaler.update()
        if bad is None:
            assert 0 < float(clipper.report.norm) < 30  # not the scaled one
        skipped += bad is not None
    assert scalers[0].get_scale() == scalers[1].get_scale()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert not hasattr(mine, "grad_scale")
    seen = clipper.stats()
    if getattr(mine, "_step_supports_amp_scaling", False):  # the scaler does not call the others' step() at all
        assert (seen.steps, seen.nonfinite) == (12, skipped)


def test_raise_leaves_infs_to_the_scaler():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    initlab.GradClipper(optimizer, 0.3, "raise")
    backward(model, 0, 4.0, bad=0)
    scaler.scale(torch.tensor(1.0))
    before = state_of(model, optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert same([p.detach() for p in model.parameters()], before[: len(list(model.parameters()))])
    assert scaler.get_scale() == 2.0


def test_a_step_that_only_the_scaler_gives_up_is_given_up():
    """As where another optimizer of the same scaler, or another rank, found the inf."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = initlab.GradClipper(optimizer, 0.3)
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert same([p.detach() for p in model.parameters()], before)
    assert clipper.stats().nonfinite == 0


def test_groups_accumulation_and_missing_gradients():
    def run(clip):
        model = net()
        layers = [model[0], model[2], model[4]]
        optimizer = torch.optim.AdamW(
            [
                {"params": layer.parameters(), "lr": 0.01 * (i + 1), "weight_decay": 0.1 * i}
                for i, layer in enumerate(layers)
            ],
            fused=True,
        )
        model[2].bias.requires_grad_(False)
        clipper = initlab.GradClipper(optimizer, 0.3) if clip else None
        for step in range(6):
            optimizer.zero_grad()
            for micro in range(3):
                backward(model, 10 * step + micro, 1 / 3)
            if not clip:
                utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
        return model, clipper

    (ours, clipper), (theirs, _) = run(True), run(False)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert clipper.stats().steps == 6


def test_parameters_that_get_a_gradient_later(recwarn):
    """Fused SGD's momentum buffers exist for some and not for others."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=True)
    clipper = initlab.GradClipper(optimizer, 0.3)
    first = list(model.parameters())[:2]
    for p in first:
        p.grad = torch.ones_like(p)
    optimizer.step()
    backward(model, 0, bad=4)
    optimizer.step()
    assert clipper.stats().first_bad_parameter == "parameter 4 of group 0, of shape (3, 16)"
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_dampened_momentum_beside_another_group():
    """Its first step is skipped without found_inf; the other group's buffers start as zeros."""
    for order in (slice(None), slice(None, None, -1)):
        ours, theirs = net(), net()
        groups = [
            [{"params": m[0].parameters(), "dampening": 0.3}, {"params": m[2].parameters()}][order]
            for m in (ours, theirs)
        ]
        mine, other = (torch.optim.SGD(group, 0.05, momentum=0.9, fused=True) for group in groups)
        clipper = initlab.GradClipper(mine, 0.3)
        for step in range(5):
            bad = step in (0, 3)
            for model, optimizer in ((ours, mine), (theirs, other)):
                optimizer.zero_grad()
                model.zero_grad()
                backward(model, step, bad=1 if bad and model is ours else None)
            before = [p.detach().clone() for p in ours.parameters()]
            mine.step()
            if bad:
                assert same([p.detach() for p in ours.parameters()], before)
                continue
            utils.clip_grad_norm_([*theirs[0].parameters(), *theirs[2].parameters()], 0.3)
            other.step()
        assert clipper.stats().nonfinite == 2
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_step_without_gradients_is_none():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = initlab.GradClipper(optimizer, 1.0)
    optimizer.step()
    assert clipper.stats().steps == 0
    assert clipper.report is None


def test_names_come_from_the_optimizer_or_the_caller():
    for fused in (True, False):
        model = net()
        optimizer = torch.optim.AdamW(model.named_parameters(), fused=fused)
        clipper = initlab.GradClipper(optimizer, 1.0)
        backward(model, 0, bad=5)
        optimizer.step()
        assert clipper.report.first_bad == "4.bias"
        assert clipper.stats().first_bad_parameter == "4.bias"


def test_counts_are_saved_and_loaded():
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters(), fused=True)
    clipper = initlab.GradClipper(optimizer, 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, bad=0 if step == 1 else None)
        optimizer.step()
    seen = clipper.stats()
    assert seen == ClipStats(3, 2, 1, 2, "0.weight")
    saved = clipper.state_dict()
    assert saved == {"steps": 3, "counts": [2, 1, 2, 0, 0]}
    clipper.remove()
    again = initlab.GradClipper(optimizer, 1e-3)
    again.load_state_dict(saved)
    assert again.stats() == seen
    optimizer.step()
    assert again.stats().steps == 4


def test_max_norm_may_change():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=True)
    clipper = initlab.GradClipper(optimizer, 1e-3)
    for max_norm in (1e-3, 1e-2, math.inf):
        clipper.max_norm = max_norm
        optimizer.zero_grad()
        backward(model, 0)
        before = [p.detach().clone() for p in model.parameters()]
        norm = initlab.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        moved = initlab.get_total_norm([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
        assert float(moved) == pytest.approx(min(max_norm, float(norm)), rel=1e-4)


def test_other_norms():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=True)
    initlab.GradClipper(optimizer, 1e-3, norm_type="inf")
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    largest = max(float((p.detach() - q).abs().max()) for p, q in zip(model.parameters(), before, strict=True))
    assert largest == pytest.approx(1e-3, rel=1e-3)


def test_what_a_clipper_refuses():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for max_norm in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="it must be more than 0"):
            initlab.GradClipper(optimizer, max_norm)
    clipper = initlab.GradClipper(optimizer, 1.0)
    with pytest.raises(RuntimeError, match=r"has a GradClipper already; remove\(\)"):
        initlab.GradClipper(optimizer, 1.0)
    clipper.remove()
    assert optimizer.step(lambda: 1.0) == 1.0
    initlab.GradClipper(optimizer, 1.0).remove()
    clipper.remove()


def test_a_step_that_raises_leaves_nothing_behind():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    initlab.GradClipper(optimizer, 0.3)
    hook = optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("mine")))
    backward(model, 0)
    with pytest.raises(KeyError):
        optimizer.step()
    hook.remove()
    optimizer.step()
    assert not hasattr(optimizer, "grad_scale")


def test_copies_and_checkpoints_of_the_optimizer_are_free_of_it():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    initlab.GradClipper(optimizer, 0.3)
    backward(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    other = copy.deepcopy(optimizer)
    initlab.GradClipper(other, 0.3)


def test_no_look_at_values_with_a_fused_optimizer(monkeypatch):
    """Nothing in a step asks a tensor for a number, which would wait for a GPU.

    The backends on a CPU do, so plain torch stands in, as for a device.
    """
    monkeypatch.setattr(backends, "requested", lambda: "torch")

    op = importlib.import_module("initlab.kernels.norms")
    monkeypatch.setattr(op, "_host_readable", lambda tensor: False)
    for policy in ("skip", "zero", "propagate"):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        clipper = initlab.GradClipper(optimizer, 0.3, policy)
        backward(model, 0, bad=1)

        def looked(*args):
            raise AssertionError("looked at a value")

        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
                patch.setattr(torch.Tensor, name, looked)
            optimizer.step()
        assert clipper.stats().nonfinite == 1
