"""torch.nn.utils' contracts, policies, names and reports. Several ranks: tests/distributed/scenarios/clipping*.py."""

import inspect
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import utils

import initlab
from initlab.clipping import PartialNorm

PAIRS = [
    (initlab.clip_grad_norm_, utils.clip_grad_norm_),
    (initlab.get_total_norm, utils.get_total_norm),
    (initlab.clip_grads_with_norm_, utils.clip_grads_with_norm_),
    (initlab.clip_grad_value_, utils.clip_grad_value_),
]


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


def torch_clips_sparse_gradients():
    """Since 2.14."""
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    try:
        utils.clip_grad_norm_(table.parameters(), 1.0)
    except NotImplementedError:
        return False
    return True


@pytest.mark.skipif(not torch_clips_sparse_gradients(), reason="this torch refuses sparse gradients")
def test_sparse_gradients_are_clipped_as_torch_does():
    def gradients(clip):
        table, dense = nn.Embedding(5, 2, sparse=True), parameters((3,))[0]
        table(torch.tensor([1, 3, 1])).sum().backward()
        norm = clip([dense, table.weight])
        return norm, dense.grad, table.weight.grad.to_dense()

    ours = gradients(lambda ps: initlab.clip_grad_norm_(ps, 1.0))
    torch.testing.assert_close(ours, gradients(lambda ps: utils.clip_grad_norm_(ps, 1.0)))


@pytest.mark.skipif(torch_clips_sparse_gradients(), reason="this torch clips sparse gradients")
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
    with pytest.raises(ValueError, match="'ignore'; it must be one of propagate, raise, keep, zero"):
        initlab.clip_grad_norm_(p, 1.0, nonfinite="ignore")
    with pytest.raises(ValueError, match="'keep' leaves gradients as they are, for a step to apply"):
        initlab.clip_grad_norm_(p, 1.0, nonfinite="skip")
    with pytest.raises(ValueError, match="'ignore'; it must be one of propagate, raise, skip, zero"):
        initlab.GradClipper(torch.optim.SGD([p]), 1.0, nonfinite="ignore")
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
    for nonfinite in ("propagate", "keep", "zero"):

        def step(params, policy=nonfinite):
            return initlab.clip_grad_norm_(params, 0.5, nonfinite=policy)

        compiled = torch.compile(step, backend="eager", fullgraph=True)
        ours, theirs = parameters(), parameters()
        torch.testing.assert_close(compiled(ours), initlab.clip_grad_norm_(theirs, 0.5))
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    torch.compiler.reset()


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
    for extra in ({"nonfinite": "keep"}, {"report": True}):
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
    report = initlab.clip_grad_norm_(named(params), 1.0, nonfinite="keep", report=True)
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
    initlab.clip_grads_with_norm_(p, 1.0, bad, nonfinite="keep")
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


@BOTH
def test_the_norm_of_each_parameter(backend):
    params = parameters((50,), (60, 2), (0,), (), (70,), seed=3)
    gradients = [p.grad for p in params]
    gradients[0].mul_(1e-25)
    gradients[4].mul_(1e25)
    norm, norms = initlab.get_total_norm(named_gradients(params), per_parameter=True)
    assert torch.equal(norm, initlab.get_total_norm(gradients))
    assert (norms.dtype, norms.shape, norms.requires_grad) == (torch.float32, (5,), False)
    expected = torch.stack([torch.linalg.vector_norm(g.double()) for g in gradients])
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0.0)
    gradients[1][3] = math.nan
    norm, norms = initlab.get_total_norm(gradients, per_parameter=True)
    assert norm.isnan()
    assert norms.isnan().tolist() == [False, True, False, False, False]
    with pytest.raises(RuntimeError, match="gradient 1 of shape"):
        initlab.get_total_norm(gradients, error_if_nonfinite=True, per_parameter=True)
    wide = torch.tensor([3e200, 4e200], dtype=torch.float64)
    norm, norms = initlab.get_total_norm([wide, gradients[0]], per_parameter=True)
    assert norm.dtype == norms.dtype == torch.float64
    assert norms[0].item() == pytest.approx(5e200, rel=1e-14)
    norm, norms = initlab.get_total_norm([], per_parameter=True)
    assert (norm.item(), norms.dtype, norms.shape) == (0.0, torch.float32, (0,))
    norm, norms = initlab.get_total_norm(wide, per_parameter=True)
    assert norms.tolist() == [norm.item()]


def named_gradients(params):
    return [(name, p.grad) for name, p in named(params)]


def test_what_goes_with_the_norm_of_each_parameter():
    gradients = [p.grad for p in parameters()]
    for p in (1.0, 0.0, 3.0, math.inf, "inf"):
        with pytest.raises(ValueError, match=rf"norm_type=2 alone, not with {float(p)}.* for each tensor"):
            initlab.get_total_norm(gradients, p, per_parameter=True)
    for other in ("report", "partial"):
        with pytest.raises(ValueError, match=f"does not go with {other}=True; make two calls"):
            initlab.get_total_norm(gradients, per_parameter=True, **{other: True})
    from torch.testing._internal.two_tensor import TwoTensor

    wrapped = TwoTensor(torch.ones(3), torch.ones(3))
    with pytest.raises(NotImplementedError, match="per_parameter=True does not work with tensors that wrap"):
        initlab.get_total_norm([wrapped], per_parameter=True)


def test_the_norm_of_each_parameter_under_torch_compile():
    gradients = [p.grad for p in parameters()]
    compiled = torch.compile(
        lambda tensors: initlab.get_total_norm(tensors, per_parameter=True), backend="eager", fullgraph=True
    )
    for found, expected in zip(compiled(gradients), initlab.get_total_norm(gradients, per_parameter=True), strict=True):
        torch.testing.assert_close(found, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("clip", [initlab.clip_grad_norm_, nn.utils.clip_grad_norm_])
@pytest.mark.parametrize("item", [None, "weight", {"params": []}, 1.0])
def test_what_is_no_parameter_is_named_as_torch_names_it(clip, item):
    with pytest.raises(AttributeError, match=f"'{type(item).__name__}' object has no attribute 'grad'"):
        clip([nn.Parameter(torch.ones(2)), item], 1.0)
