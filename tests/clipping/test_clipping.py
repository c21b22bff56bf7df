"""initlab/clipping: torch.nn.utils' contracts, policies and names, GradClipper around torch's optimizers."""

import copy
import importlib
import inspect
import math
import warnings

import pytest
import torch
from initlab.kernels import backends
from torch import nn
from torch.nn import utils

import initlab
from initlab.clipping import ClipStats, PartialNorm

PAIRS = [
    (initlab.clip_grad_norm_, utils.clip_grad_norm_),
    (initlab.get_total_norm, utils.get_total_norm),
    (initlab.clip_grads_with_norm_, utils.clip_grads_with_norm_),
    (initlab.clip_grad_value_, utils.clip_grad_value_),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small here; on a busy machine torch's threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


BOTH = pytest.mark.parametrize("backend", ["torch", "numba"], indirect=True)


def parameters(*shapes, dtype=torch.float32, scale=1.0, seed=0):
    torch.manual_seed(seed)
    made = []
    for shape in shapes or ((3, 4), (5,), (2, 3, 4), ()):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = (torch.randn(shape) * scale).to(dtype)
        made.append(p)
    return made


def named(params):
    return [(f"layer.{i}.weight", p) for i, p in enumerate(params)]


# ---------------------------------------------------------------------------------------------------------------
# torch's contracts


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda f: f.__name__)
def test_signatures_are_torchs_with_keywords_behind(ours, theirs):
    mine, other = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    assert [(p.name, p.default, p.kind) for p in mine[: len(other)]] == [(p.name, p.default, p.kind) for p in other]
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in mine[len(other) :])


@BOTH
@pytest.mark.parametrize("norm_type", [2.0, 2, "inf", math.inf, 1, 0.5, 1.5, 4, -math.inf, -1.0, 0])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_results_are_torchs(backend, norm_type, foreach):
    for max_norm in (0.3, 1e4, 0.0):
        ours, theirs = parameters(), parameters()
        norm = initlab.clip_grad_norm_(ours, max_norm, norm_type, False, foreach)
        expected = utils.clip_grad_norm_(theirs, max_norm, norm_type, False, foreach)
        torch.testing.assert_close(norm, expected)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    ours, theirs = parameters(), parameters()
    norm = initlab.get_total_norm([p.grad for p in ours], norm_type, foreach=foreach)
    assert initlab.clip_grads_with_norm_(ours, 0.3, norm, foreach) is None
    utils.clip_grads_with_norm_(theirs, 0.3, utils.get_total_norm([p.grad for p in theirs], norm_type), foreach)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@BOTH
def test_clipping_in_one_step_and_in_two_gives_equal_bits(backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        one, two = parameters(dtype=dtype), parameters(dtype=dtype)
        initlab.clip_grad_norm_(one, 0.5)
        initlab.clip_grads_with_norm_(two, 0.5, initlab.get_total_norm([p.grad for p in two]))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(one, two, strict=True))


@BOTH
def test_what_may_be_given(backend):
    expected = None
    for form in (list, tuple, iter, lambda ps: (p for p in ps), named, lambda ps: iter(named(ps)), dict.fromkeys):
        params = parameters()
        params.insert(2, nn.Parameter(torch.zeros(3)))  # without a gradient
        norm = initlab.clip_grad_norm_(form(params), 0.5)
        got = [p.grad for p in params if p.grad is not None]
        expected = expected or (norm, got)
        assert torch.equal(norm, expected[0])
        assert all(torch.equal(g, e) for g, e in zip(got, expected[1], strict=True))
        assert not norm.requires_grad
    p = parameters((4,))[0]
    assert float(initlab.clip_grad_norm_(p, 0.5)) == pytest.approx(float(parameters((4,))[0].grad.norm()))
    assert float(p.grad.norm()) == pytest.approx(0.5, rel=1e-5)
    assert float(initlab.get_total_norm(p.grad)) == float(initlab.get_total_norm([("w", p.grad)]))
    assert float(initlab.get_total_norm({"a": p.grad}.values())) == pytest.approx(0.5, rel=1e-5)


def test_nothing_to_clip():
    for given in ([], [nn.Parameter(torch.zeros(2))], nn.Parameter(torch.zeros(2))):
        norm = initlab.clip_grad_norm_(given, 1.0)
        assert (float(norm), norm.dtype, norm.shape) == (0.0, torch.float32, ())
        initlab.clip_grads_with_norm_(given, 1.0, torch.tensor(3.0))
        initlab.clip_grad_value_(given, 1.0)
    with pytest.warns(UserWarning, match="is an empty generator") as seen:
        initlab.clip_grad_norm_((p for p in []), 1.0)
    assert seen[0].filename == __file__  # it points at the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initlab.clip_grad_norm_(iter([]), 1.0)


@BOTH
def test_the_norms_dtype(backend):
    for dtype, expected in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ):
        assert initlab.clip_grad_norm_(parameters(dtype=dtype), 1.0).dtype == expected
    mixed = parameters() + parameters(dtype=torch.float64) + parameters(dtype=torch.bfloat16)
    assert initlab.clip_grad_norm_(mixed, 1.0).dtype == torch.float64


@BOTH
def test_overflowing_squares_clip_where_torch_zeroes(backend):
    for dtype, scale in ((torch.float16, 3e4), (torch.bfloat16, 1e30), (torch.float32, 1e30)):
        params = parameters((40,), (3, 7), dtype=dtype, scale=scale / 4)
        before = [p.grad.double() for p in params]
        norm = initlab.clip_grad_norm_(params, 1.0)
        exact = math.sqrt(sum(float(g.square().sum()) for g in before))
        assert float(norm) == pytest.approx(exact, rel=1e-6)
        for g, p in zip(before, params, strict=True):
            torch.testing.assert_close(p.grad.double(), g / exact, rtol=1e-2, atol=1e-6)


@BOTH
def test_gradients_that_require_gradients(backend):
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    (w.grad,) = torch.autograd.grad((w**2).sum() / 2, w, create_graph=True)
    assert not initlab.clip_grad_norm_(w, 1.0).requires_grad
    assert w.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


def test_a_written_gradient_counts_as_changed(backend):
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3, requires_grad=True) * 2
    y = w.grad.pow(2).sum()  # autograd keeps w.grad for the derivative
    initlab.clip_grad_norm_(w, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_foreach_is_refused_where_torch_refuses_it():
    p = nn.Parameter(torch.zeros(2, device="meta"))
    p.grad = torch.zeros(2, device="meta")
    for call in (
        lambda f: initlab.clip_grad_norm_(p, 1.0, foreach=f),
        lambda f: initlab.get_total_norm(p.grad, foreach=f),
        lambda f: initlab.clip_grads_with_norm_(p, 1.0, torch.tensor(1.0), f),
    ):
        with pytest.raises(RuntimeError, match="foreach=True was passed, but can't use the foreach API on meta"):
            call(True)
        call(None)


def test_sparse_gradients_are_refused_by_name():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    before = table.weight.grad
    dense = parameters((3,))[0]
    untouched = dense.grad.clone()
    for call in (
        lambda ps: initlab.clip_grad_norm_(ps, 1.0),
        lambda ps: initlab.clip_grads_with_norm_(ps, 1.0, torch.tensor(9.0)),
    ):
        with pytest.raises(NotImplementedError, match=r"table\.weight has layout torch\.sparse_coo"):
            call([("dense", dense), ("table.weight", table.weight)])
        assert torch.equal(dense.grad, untouched)
    assert table.weight.grad is before
    with pytest.raises(NotImplementedError):  # as torch
        utils.clip_grad_norm_(table.parameters(), 1.0)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_values_that_would_ruin_every_gradient_are_refused(value):
    p = parameters((3,))[0]
    before = p.grad.clone()
    for call in (
        lambda: initlab.clip_grad_norm_(p, value),
        lambda: initlab.clip_grads_with_norm_(p, value, torch.tensor(1.0)),
        lambda: initlab.clip_grad_value_(p, value),
    ):
        with pytest.raises(ValueError, match=f"{value}; it must be 0 or more"):
            call()
    for call in (initlab.clip_grad_norm_, initlab.GradClipper):
        with pytest.raises(ValueError, match="'ignore'; it must be one of propagate, raise, skip, zero"):
            call(p if call is initlab.clip_grad_norm_ else torch.optim.SGD([p]), 1.0, nonfinite="ignore")
    assert torch.equal(p.grad, before)


@BOTH
def test_norms_given_as_numbers_and_other_dtypes(backend):
    for norm in (10.0, 10, torch.tensor(10.0), torch.tensor(10.0).bfloat16(), torch.tensor(10.0).double()):
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([6.0, 8.0])
        initlab.clip_grads_with_norm_(p, 1.0, norm)
        assert p.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_clip_grad_value_is_torchs():
    ours, theirs = parameters(), parameters()
    ours[0].grad[0, 0] = theirs[0].grad[0, 0] = math.nan
    initlab.clip_grad_value_(named(ours), 0.4)
    utils.clip_grad_value_(theirs, 0.4)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


def test_under_torch_compile():
    """One graph, no break: the plain torch backend is traced."""
    for nonfinite in ("propagate", "skip", "zero"):

        def step(params, policy=nonfinite):
            return initlab.clip_grad_norm_(params, 0.5, nonfinite=policy)

        compiled = torch.compile(step, backend="eager", fullgraph=True)
        ours, theirs = parameters(), parameters()
        torch.testing.assert_close(compiled(ours), initlab.clip_grad_norm_(theirs, 0.5))
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------------------
# Tensors that wrap others. What needs several ranks is in tests/distributed/scenarios/clipping.py


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("fake", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def spread(params, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    made = []
    for p in params:
        q = nn.Parameter(distribute_tensor(torch.zeros_like(p), mesh, [Shard(0)]))
        q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        made.append(q)
    return made


SHAPES = (3, 4), (5,), (2, 3, 4)


@BOTH
def test_dtensors_are_clipped_where_they_lie(backend, mesh):
    ours, theirs, plain = spread(parameters(*SHAPES), mesh), spread(parameters(*SHAPES), mesh), parameters(*SHAPES)
    version = ours[0].grad._version
    norm, expected = initlab.clip_grad_norm_(named(ours), 0.3), utils.clip_grad_norm_(theirs, 0.3)
    assert type(norm) is type(expected)
    assert norm.placements == expected.placements
    torch.testing.assert_close(norm.full_tensor(), expected.full_tensor())
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad.to_local(), q.grad.to_local())
    assert ours[0].grad._version > version  # or autograd would not see that it was written to
    initlab.clip_grads_with_norm_(plain, 0.3, expected)
    for p, q in zip(plain, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad.to_local())
    report = initlab.get_total_norm([p.grad for p in (*ours, *plain)], report=True)
    torch.testing.assert_close(float(report.norm), 0.3 * 2**0.5)
    assert str(report) == f"norm {float(report.norm):.6g}"
    initlab.clip_grad_value_([*ours, *plain], 0.01)
    for p, q in zip(plain, ours, strict=True):
        torch.testing.assert_close(p.grad, q.grad.to_local())


def test_norms_that_are_not_yet_reduced_serve_too(mesh):
    """As torch's older versions return them."""
    from torch.distributed.tensor import DTensor, Partial

    for params in (parameters(*SHAPES), spread(parameters(*SHAPES), mesh)):
        norm = DTensor.from_local(torch.tensor(4.0), mesh, [Partial("sum")])
        initlab.clip_grads_with_norm_(params, 1.0, norm)
        p, q = params[0].grad, parameters(*SHAPES)[0].grad
        torch.testing.assert_close(getattr(p, "_local_tensor", p), q / (4.0 + 1e-6))


def test_dtensors_under_torch_compile(mesh):
    """torch's own way is traced."""
    compiled = torch.compile(lambda ps: initlab.clip_grad_norm_(ps, 0.5), backend="eager")
    ours, theirs = spread(parameters(*SHAPES), mesh), parameters(*SHAPES)
    torch.testing.assert_close(compiled(ours).full_tensor(), initlab.clip_grad_norm_(theirs, 0.5))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad.to_local(), q.grad)
    torch.compiler.reset()


def test_a_grad_scaler_over_dtensors(mesh):
    for fused in (True, False):
        (p,) = spread(parameters((3, 4)), mesh)
        optimizer = torch.optim.AdamW([p], lr=0.1, fused=fused)
        clipper = initlab.GradClipper(optimizer, 1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for bad in (False, True, False):
            optimizer.zero_grad()
            scaler.scale((p * (math.inf if bad else 3.0)).sum().full_tensor()).backward()
            before = p.to_local().detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, p.to_local()) == bad
            if not bad:
                torch.testing.assert_close(float(clipper.report.norm), 3.0 * 12**0.5)


def test_other_wrappers_are_left_to_torch():
    from torch.testing._internal.two_tensor import TwoTensor

    p = nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))
    p.grad = TwoTensor(torch.ones(3), torch.ones(3))
    assert type(initlab.clip_grad_norm_([p], 0.5)) is TwoTensor
    torch.testing.assert_close(p.grad.a, torch.full((3,), 0.5 / 3**0.5))
    for extra in ({"nonfinite": "skip"}, {"report": True}):
        with pytest.raises(NotImplementedError, match=f"{next(iter(extra))}=.* leave it out"):
            initlab.clip_grad_norm_([p], 0.5, **extra)
    optimizer = torch.optim.SGD([p])
    initlab.GradClipper(optimizer, 1.0)
    with pytest.raises(NotImplementedError, match="GradClipper"):
        optimizer.step()


def test_a_pp_group_that_is_none():
    params = parameters()
    optimizer = torch.optim.SGD(params)
    for call in (
        lambda: initlab.get_total_norm([p.grad for p in params], pp_group="pp"),
        lambda: initlab.clip_grad_norm_(params, 0.1, pp_group="pp"),
        lambda: initlab.GradClipper(optimizer, 0.1, pp_group="pp"),
    ):
        with pytest.raises(ValueError, match="pp_group is 'pp'"):
            call()
    for p, q in zip(params, parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    initlab.GradClipper(optimizer, 0.1)  # the one that failed left nothing behind


# ---------------------------------------------------------------------------------------------------------------
# Non-finite gradients


@BOTH
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_planted_values_are_named_and_nothing_is_half_written(backend, value, kind, place):
    for i in range(3):
        at = i + (i > 0)
        check_planted(value, kind, place, at)


def plant(value, place, at):
    params = parameters((4, 5), (7,), (2, 2, 2))
    params.insert(1, nn.Parameter(torch.zeros(3)))  # without a gradient
    params[at].grad.view(-1)[place] = value
    return params


def equal(params, gradients):
    return all(
        p.grad is g or torch.allclose(p.grad, g, rtol=0, atol=0, equal_nan=True)
        for p, g in zip(params, gradients, strict=True)
    )


def check_planted(value, kind, place, at):
    params = plant(value, place, at)
    before = [None if p.grad is None else p.grad.clone() for p in params]
    for extra in ({"error_if_nonfinite": True}, {"nonfinite": "raise"}):
        with pytest.raises(RuntimeError, match=f"layer.{at}.weight is the first of those that hold {kind}"):
            initlab.clip_grad_norm_(named(params), 1.0, **extra)
        with pytest.raises(RuntimeError, match=rf"non-finite, so it cannot be clipped: gradient {at} of shape \("):
            initlab.clip_grad_norm_(params, 1.0, **extra)
        assert equal(params, before)
    report = initlab.clip_grad_norm_(named(params), 1.0, nonfinite="skip", report=True)
    assert report.nonfinite
    assert report.first_bad == f"layer.{at}.weight"
    assert f"{kind[-3:]}" in str(report)
    assert equal(params, before)
    report = initlab.clip_grad_norm_(params, 1.0, nonfinite="zero", report=True)
    assert report.first_bad == f"gradient {at} of shape {tuple(params[at].shape)}"
    assert all(p.grad is None or not p.grad.any() for p in params)
    params, theirs = plant(value, place, at), plant(value, place, at)
    norm = initlab.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm, utils.clip_grad_norm_(theirs, 1.0), equal_nan=True)
    assert equal(params, [p.grad for p in theirs])


def test_two_step_clipping_has_the_policies_too():
    p = parameters((4,))[0]
    before = p.grad.clone()
    bad = torch.tensor(math.inf)
    with pytest.raises(RuntimeError, match="total_norm is inf"):
        initlab.clip_grads_with_norm_(p, 1.0, bad, nonfinite="raise")
    initlab.clip_grads_with_norm_(p, 1.0, bad, nonfinite="skip")
    assert torch.equal(p.grad, before)
    initlab.clip_grads_with_norm_(p, 1.0, bad, nonfinite="zero")
    assert not p.grad.any()


def test_a_norm_beyond_its_dtype_is_no_bad_gradient():
    p = nn.Parameter(torch.zeros(1000))
    p.grad = torch.full((1000,), 3e38)
    with pytest.raises(RuntimeError, match=r"every gradient is finite, but their norm, 9.48683e\+39, is beyond"):
        initlab.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    report = initlab.clip_grad_norm_(p, 1.0, nonfinite="raise", report=True)
    assert (report.nonfinite, report.first_bad, float(report.norm)) == (False, None, math.inf)
    assert float(p.grad.norm()) == pytest.approx(1.0)


def test_reports_keep_no_tensor_alive():
    import gc
    import weakref

    g = torch.ones(3)
    there = weakref.ref(g)
    report = initlab.get_total_norm([g], report=True)
    del g
    gc.collect()
    assert there() is None
    assert str(report) == "norm 1.73205"


@BOTH
def test_partial_norms_add_up(backend):
    params = parameters((50,), (60,), (70,), seed=3)
    gradients = [p.grad for p in params]
    for p in (2.0, 1.0, 3.0, math.inf, -math.inf):
        whole = initlab.get_total_norm(gradients, p)
        first, second = (initlab.get_total_norm(g, p, partial=True) for g in (gradients[:1], gradients[1:]))
        assert first.sum_of_powers.dtype == torch.float64
        reduce = torch.maximum if p == math.inf else torch.minimum if p == -math.inf else torch.add
        both = PartialNorm(reduce(first.sum_of_powers, second.sum_of_powers), first.flag | second.flag, p)
        torch.testing.assert_close(both.norm(), whole)
    gradients[2][3] = math.nan
    assert int(initlab.get_total_norm(gradients[2], partial=True).flag) == 1
    for options in ({"report": True}, {"norm_type": 0.0}):
        with pytest.raises(ValueError, match="partial=True"):
            initlab.get_total_norm(gradients, partial=True, **options)


# ---------------------------------------------------------------------------------------------------------------
# GradClipper


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
    assert (stats.first_bad_step, stats.first_bad_parameter) == (min(bad_steps), "2.bias")
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
    assert clipper.stats() == ClipStats(2, 1, 1, 0, "2.weight")
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
    if mine.param_groups[0].get("fused"):  # the scaler does not call the others' step() at all
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
    assert seen == ClipStats(3, 2, 1, 1, "0.weight")
    saved = clipper.state_dict()
    assert saved == {"steps": 3, "counts": [2, 1, 1, 0]}
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
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(closure=lambda: 1.0)
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
    monkeypatch.setattr(op, "_visible", lambda tensor: False)
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
