"""linear_relu: values and gradients against float64, exact flags, and every way that leads to the op.

The torch backend serves the CPU; triton runs in its interpreter there, and on the GPU where there is one.
"""

import itertools
import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from initlab.kernels import backends, describe, linear_relu
from initlab.kernels import linear as linear_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import initlab

# NumPy's, in Triton's interpreter: infinities times zeros, and what float16 cannot hold.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = math.inf, math.nan
OP = torch.ops.initlab.linear_relu.default

# A value's error, as a part of |input| @ |weight|.T + |bias|: the roundings of the output's dtype times their size, and
# for each product one rounding of the accumulator. A GEMM may be rounded before the bias is added to it.
TOLERANCES = {
    torch.float64: (2, 2.0**-53, 2.0**-53),
    torch.float32: (2, 2.0**-24, 2.0**-24),
    torch.bfloat16: (2, 2.0**-9, 2.0**-24),
    torch.float16: (2, 2.0**-11, 2.0**-24),
}
DTYPES = list(TOLERANCES)


def bound(a, b, plus, dtype):
    """How far a @ b + plus may be from what float64 gives."""
    roundings, unit, accumulator = TOLERANCES[dtype]
    size = a.double().abs() @ b.double().abs() + plus.double().abs()
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # its subnormal numbers have fewer digits
    return (roundings * unit + (a.shape[-1] + 1) * accumulator) * size + tiny


def new_flag():
    return torch.zeros(1, dtype=torch.int32, device=DEVICE)


def kinds(values):
    """The flag of values, by float64 on the host."""
    v = values.detach().double().cpu()
    return bool(v.isnan().any()) * 1 | bool((v == INF).any()) * 2 | bool((v == -INF).any()) * 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Shapes are small, and on a busy machine torch's threads spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["numba", "triton"])  # numba looks at small tensors
def either(request, serving):
    with serving(request.param):
        yield request.param


def laid_out(layout, *shape):
    """Random numbers whose last two dimensions lie in memory as the layout says."""
    if layout == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2], device=DEVICE).mT
    if layout == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE)[..., ::2]
    return torch.randn(*shape, device=DEVICE)


SHAPES = {  # M, K, N
    "one": (1, 1, 1),
    "odd": (7, 63, 33),
    "K = 1": (9, 1, 17),
    "tall": (301, 8, 3),
    "wide": (2, 72, 200),
    "no tile divides them": (70, 72, 136),
    "no rows": (0, 5, 3),
    "no columns": (4, 8, 0),
    "nothing to add up": (4, 0, 3),
}


@pytest.mark.parametrize(("layout", "with_bias"), [("contiguous", True), ("transposed", False), ("strided", True)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(either, dtype, shape, layout, with_bias):
    M, K, N = SHAPES[shape]
    torch.manual_seed(0)
    x = laid_out(layout, M, K).to(dtype).requires_grad_()
    w = laid_out(layout, N, K).to(dtype).requires_grad_()
    b = laid_out(layout, 1, N)[0].to(dtype).requires_grad_() if with_bias else None
    flags = new_flag()
    y = linear_relu(x, w, b, flags=flags)
    plus = torch.zeros(N, device=DEVICE) if b is None else b
    exact = torch.relu(x.double() @ w.double().T + plus.double())
    assert y.dtype == dtype
    assert y.shape == (M, N)
    assert int(flags) == 0
    assert ((y.double() - exact).abs() <= bound(x, w.T, plus, dtype)).all()
    assert torch.equal(linear_relu(x, w, b), y)

    grad = laid_out(layout, M, N).to(dtype)
    y.backward(grad)
    masked = grad.double() * (y > 0)
    none = torch.zeros((), device=DEVICE)
    assert ((x.grad.double() - masked @ w.double()).abs() <= bound(masked, w, none, dtype)).all()
    assert ((w.grad.double() - masked.T @ x.double()).abs() <= bound(masked.T, x, none, dtype)).all()
    if b is not None:
        ones = torch.ones(M, 1, device=DEVICE)
        assert ((b.grad.double() - masked.sum(0)).abs() <= bound(masked.T, ones, none, dtype)[:, 0]).all()


def test_a_bias_of_any_stride(either):
    x, w = torch.randn(9, 8, device=DEVICE).bfloat16(), torch.randn(16, 8, device=DEVICE).bfloat16()
    for b in (torch.randn(16, 2, device=DEVICE).bfloat16()[:, 0], torch.ones((), device=DEVICE).bfloat16().expand(16)):
        assert torch.equal(linear_relu(x, w, b, flags=new_flag()), linear_relu(x, w, b.contiguous()))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3), (1, 1, 2, 2)])
def test_leading_dimensions(either, lead):
    x = torch.randn(*lead, 8, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    w, b = torch.randn(16, 8, device=DEVICE, dtype=x.dtype).requires_grad_(), torch.randn(16, device=DEVICE).to(x.dtype)
    y = linear_relu(x, w, b, flags=new_flag())
    assert y.shape == (*lead, 16)
    y.sum().backward()  # its gradient is one element, expanded
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape


def test_what_is_not_finite_passes_through_as_in_torch(either):
    w = torch.eye(8, device=DEVICE).bfloat16()
    b = torch.tensor([NAN, INF, -INF, -0.0, 1.0, -1.0, 0.0, 2.0], device=DEVICE).bfloat16()
    x = torch.zeros(3, 8, device=DEVICE).bfloat16().requires_grad_()
    flags = new_flag()
    y = linear_relu(x, w, b, flags=flags)
    theirs = F.relu(F.linear(x, w, b))
    assert torch.equal(y.isnan(), theirs.isnan())
    assert torch.equal(y.nan_to_num(5.0), theirs.nan_to_num(5.0))
    assert int(flags) == 7
    (mine,) = torch.autograd.grad(y.sum(), x)
    (its,) = torch.autograd.grad(theirs.sum(), x)
    assert torch.equal(mine, its)  # a NaN lets its gradient pass


PLANTS = [v for n in (1, 2, 3) for v in itertools.combinations((NAN, INF, -INF), n)]


@pytest.mark.long_if.with_args(
    lambda either, dtype, shape: either == "triton" and shape == (70, 72, 136) and dtype != torch.float32
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 72, 136), (9, 5, 3)], ids=str)
def test_planted_values_are_flagged(either, dtype, shape):
    """At corners and in the middle, each kind alone and with others: x is 0 but for what is planted in a column of
    its own, where w is 1 in one row only."""
    M, K, N = shape
    places = [(0, 0), (0, N - 1), (M - 1, 0), (M - 1, N - 1), (M // 2, N // 2)]
    for plants, shift in [(p, s) for p in PLANTS for s in range(len(places)) if len(p) == 1 or s == len(p)]:
        b = torch.zeros(N, dtype=dtype, device=DEVICE)
        w = torch.zeros(N, K, dtype=dtype, device=DEVICE)
        x = torch.zeros(M, K, dtype=dtype, device=DEVICE)
        for k, value in enumerate(plants):
            i, j = places[(shift + k) % len(places)]
            x[i, k] = value
            w[:, k] = 0.25
            b[j] = value if k == 0 else b[j]
        expected = kinds(F.linear(x, w, b))
        flags = new_flag().fill_(8)
        y = linear_relu(x, w, b, flags=flags)
        assert int(flags) == expected | 8, (plants, shift)
        assert torch.equal(y.isnan(), F.linear(x, w, b).isnan())


def test_a_row_of_infinities_does_not_make_nans_beyond_the_edge(either):
    """Beyond N a kernel may multiply infinities by zeros, and beyond M it may see the bias alone."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(3, 8, dtype=dtype, device=DEVICE)
        w = torch.ones(8, 8, dtype=dtype, device=DEVICE)
        x[:] = INF
        flags = new_flag()
        linear_relu(x, w, None, flags=flags)
        assert describe(int(flags)) == "+inf"
        b = torch.full((8,), -INF, dtype=dtype, device=DEVICE)
        flags = new_flag()
        linear_relu(x, w, b, flags=flags)
        assert describe(int(flags)) == "NaN"


def test_minus_infinity_that_relu_hides(either):
    flags = new_flag()
    x = torch.full((2, 8), -INF, device=DEVICE, dtype=torch.float16)
    y = linear_relu(x, torch.ones(8, 8, device=DEVICE, dtype=torch.float16), flags=flags)
    assert not y.any()
    assert describe(int(flags)) == "-inf"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_overflow_is_what_the_output_holds(either, dtype, sign):
    """The largest number plus less than half a step stays; plus half a step it is rounded to an infinity."""
    largest = torch.finfo(dtype).max
    half = 16.0 if dtype == torch.float16 else 2.0**119
    for extra, flag in ((0.0, 0), (half * 0.96875, 0), (half, 2 if sign > 0 else 4), (half * 8, 2 if sign > 0 else 4)):
        x = torch.zeros(5, 8, device=DEVICE, dtype=dtype)
        x[2, :2] = torch.tensor([largest, extra])
        w = torch.full((8, 8), float(sign), device=DEVICE, dtype=dtype)
        flags = new_flag()
        y = linear_relu(x, w, flags=flags)
        assert int(flags) == flag, extra
        assert bool(y.isinf().any()) == (flag == 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_no_false_flags(serving, dtype, backend):
    """2,500 cases for each dtype, most of them with values next to its largest, whose sums overflow."""
    torch.manual_seed(0)
    largest = torch.finfo(dtype).max
    w, flags = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    scales = [1.0, 0.99, 0.5, 1e-3]
    with serving(backend):
        for case in range(2500):
            rows = (1, 2, 5, 17, 64)[case % 5]  # few, since the CPU's library compiles for each in 16 bits
            x = torch.rand(rows, 1, dtype=torch.float64) * 2 - 1 if case % 7 else torch.ones(rows, 1).double()
            x = (x * scales[case % 4] * (largest if case % 11 else 1.0)).to(dtype)
            assert torch.equal(linear_relu(x, w, flags=flags), x.clamp_min(0)), case
    assert int(flags) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_false_flags_of_the_kernels(serving, dtype):
    torch.manual_seed(0)
    largest, flags = torch.finfo(dtype).max, new_flag()
    w = torch.eye(8, device=DEVICE, dtype=dtype)
    with serving("triton"):
        for case in range(12):
            x = ((torch.rand(1 + case * 17, 8, device=DEVICE) * 2 - 1).double() * largest).to(dtype)
            x[0, case % 8] = largest * (-1) ** case
            assert torch.equal(linear_relu(x, w, flags=flags), x.clamp_min(0))
    assert int(flags) == 0


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("rows", [100, 20_000])  # a small tensor, and one that is read by its sum
def test_the_sum_is_not_trusted_where_it_overflows(serving, backend, rows):
    with serving(backend):
        check_the_sum(torch.full((rows, 1), 3e38))


def check_the_sum(x):
    flags = torch.zeros(1, dtype=torch.int32)
    linear_relu(x, torch.ones(1, 1), flags=flags)
    assert int(flags) == 0
    x[50] = -INF
    linear_relu(x, torch.ones(1, 1), flags=flags)
    assert int(flags) == 4


SQUARED_SHAPES = [(7, 63, 33), (70, 72, 136), (4, 8, 0), (0, 5, 3)]  # M, K, N


@pytest.mark.long_if.with_args(lambda either, dtype, shape: shape != (70, 72, 136) or dtype == torch.float16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SQUARED_SHAPES, ids=str)
def test_squared_values_and_gradients(either, dtype, shape):
    """The value is the square of ReLU's, rounded once; gradients are held to float64 from that r on."""
    M, K, N = shape
    torch.manual_seed(0)
    x, w = (torch.randn(n, K, device=DEVICE).to(dtype).requires_grad_() for n in (M, N))
    b = torch.randn(N, device=DEVICE).to(dtype).requires_grad_()
    flags = new_flag()
    y = linear_relu(x, w, b, flags=flags, activation="relu_squared")
    with torch.no_grad():
        r = linear_relu(x, w, b)
        assert y.dtype == dtype
        assert torch.equal(y, r.square())
        assert torch.equal(linear_relu(x, w, b, flags=flags, activation="relu_squared"), y)
        assert torch.equal(linear_relu(x, w, b, activation="relu_squared"), y)
    assert int(flags) == 0

    grad = torch.randn(M, N, device=DEVICE).to(dtype)
    y.backward(grad)
    masked = grad.double() * 2 * r.double()
    none = torch.zeros((), device=DEVICE)
    one_more = 2.0  # rounding: of the gradient before ReLU
    assert ((x.grad.double() - masked @ w.double()).abs() <= one_more * bound(masked, w, none, dtype)).all()
    assert ((w.grad.double() - masked.T @ x.double()).abs() <= one_more * bound(masked.T, x, none, dtype)).all()
    ones = torch.ones(M, 1, device=DEVICE)
    error = (b.grad.double() - masked.sum(0)).abs()
    assert (error <= one_more * bound(masked.T, ones, none, dtype)[:, 0]).all()


def test_gradients_of_squares_that_are_no_longer_numbers(either):
    """Where the square is 0 or an infinity, ReLU's value still gives the gradient, as in torch's composition."""
    values = torch.tensor([2.0**-100, 2.0**100, 0.0, -1.0, NAN, INF, -INF, 1.0], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.eye(8, device=DEVICE, dtype=dtype)
        b = values.to(dtype).requires_grad_()
        x = torch.zeros(3, 8, device=DEVICE, dtype=dtype, requires_grad=True)
        for grad in (1.0, NAN, INF):
            grads = [
                torch.autograd.grad(y, (x, b), torch.full_like(y, grad))
                for y in (
                    linear_relu(x, w, b, flags=new_flag(), activation="relu_squared"),
                    F.relu(F.linear(x, w, b)).square(),
                )
            ]
            torch.testing.assert_close(*grads, rtol=0, atol=0, equal_nan=True)
        assert not grads[0][1][2:4].any()  # masked, whatever comes


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_squared_flags(serving, backend, dtype, grad):
    """+inf exactly where the square is an infinity, beside what the value before ReLU is; -2^200 is harmless."""
    with serving(backend):
        check_squared_flags(dtype, grad)


def check_squared_flags(dtype, grad):
    limit = 2.0 ** {torch.float64: 512, torch.float16: 8}.get(dtype, 64)
    below = math.nextafter(limit, 0) if dtype == torch.float64 else limit * (1 - torch.finfo(dtype).eps / 2)
    large = -torch.finfo(dtype).max / 2
    w = torch.eye(8, device=DEVICE, dtype=dtype)
    for planted in ([], [below], [limit], [large], [large, below], [-INF], [-INF, limit], [NAN], [NAN, limit], [INF]):
        b = torch.zeros(8, device=DEVICE, dtype=dtype)
        b[8 - len(planted) :] = torch.tensor(planted, dtype=torch.float64).to(dtype)
        x = torch.zeros(5, 8, device=DEVICE, dtype=dtype, requires_grad=grad)
        flags = new_flag().fill_(8)
        y = linear_relu(x, w, b, flags=flags, activation="relu_squared")
        theirs = F.relu(F.linear(x, w, b)).square()
        assert torch.equal(y.isnan(), theirs.isnan())
        assert torch.equal(y.nan_to_num(5.0), theirs.nan_to_num(5.0))
        assert int(flags) == 8 | kinds(b) | (2 if (theirs == INF).any() else 0), planted


def test_squared_flags_of_many_ordinary_values():
    """A norm beyond the limit is no proof: the squares of 0.9 of it fit, a hundred of them."""
    for rows, dtype in itertools.product((100, 20_000), (torch.float32, torch.float16)):
        x = torch.full((rows, 1), 0.9 * {torch.float32: 2.0**64, torch.float16: 256.0}[dtype], dtype=dtype)
        flags = torch.zeros(1, dtype=torch.int32)
        linear_relu(x, torch.ones(1, 1, dtype=dtype), flags=flags, activation="relu_squared")
        assert int(flags) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_square_limits_of_every_16_bit_number(dtype):
    """The limits of the CPU and of the kernels, held to torch's own square of every number there is."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite() & (x > 0)]
    overflows = x.square().isinf()
    assert torch.equal(x >= linear_op.SQUARE_LIMITS[dtype], overflows)
    assert torch.equal(x.float().view(torch.int32) >= epilogue.SQUARE_LIMITS[dtype], overflows)
    # And of float32 accumulators, before they are rounded: every one within two steps of the limit.
    step = 1 << (16 if dtype == torch.bfloat16 else 13)
    bits = torch.arange(epilogue.SQUARE_LIMITS[dtype] - 2 * step, epilogue.SQUARE_LIMITS[dtype] + 2 * step)
    z = bits.to(torch.int32).view(torch.float32)
    assert torch.equal(bits >= epilogue.SQUARE_LIMITS[dtype], z.to(dtype).square().isinf())


def test_square_limits_of_the_larger_types():
    for dtype in (torch.float32, torch.float64):
        limit = torch.tensor(linear_op.SQUARE_LIMITS[dtype], dtype=dtype)
        assert limit.square().isinf()
        assert limit.nextafter(torch.zeros((), dtype=dtype)).square().isfinite()
    assert torch.tensor(epilogue.SQUARE_LIMITS[torch.float32], dtype=torch.int32).view(torch.float32) == 2.0**64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_one_pass_gives_the_bits_of_torch(serving, backend, dtype):
    """Zeros and NaNs of both signs, infinities and what is next to them, in and between the chunks of the pass."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN], dtype=torch.float64, device=DEVICE).to(dtype)
    special = torch.cat((special, -special[-1:]))
    finite = special[:4].view(integers)
    edges = torch.cat((finite, special[4:6].view(integers) - 1)).view(dtype)  # the largest numbers
    with serving(backend):
        for n, kinds_of in itertools.product((1, 7, 4096, 4097, 20_000), ("finite", "infinite", "all")):
            values = {"finite": edges, "infinite": torch.cat((edges, special[4:6])), "all": special}[kinds_of]
            y = values[torch.arange(n, device=DEVICE) * 5 % len(values)]
            if kinds_of != "finite" and n > 4096:
                y[:4096] = y[:4096].nan_to_num(1.0, 1.0, 1.0)  # what is not finite lies in a later chunk alone
            # A product with one row that adds 0 to the bias: what is tested is what follows the product.
            flags = new_flag()
            x, w = torch.zeros(1, 1, dtype=dtype, device=DEVICE), torch.zeros(n, 1, dtype=dtype, device=DEVICE)
            product = F.linear(x, w, y)
            ours = linear_relu(x, w, y, flags=flags)
            theirs = torch.relu(product)
            assert torch.equal(ours.isnan(), theirs.isnan())  # torch has several NaNs
            assert torch.equal(*(r.masked_fill(r.isnan(), 0).view(integers) for r in (ours, theirs))), (n, kinds_of)
            assert int(flags) == kinds(product)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own call
def test_derivatives_forward_pass_through():
    """The pass over memory would leave a tangent as it was."""
    x, w, b = (t.detach() for t in operands())
    tangent = torch.ones_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        for activation, theirs in ACTIVATIONS.items():
            y = linear_relu(dual, w, b, flags=new_flag(), activation=activation)
            expected = theirs(F.linear(dual, w, b))
            for ours, its in zip(*map(torch.autograd.forward_ad.unpack_dual, (y, expected)), strict=True):
                assert torch.equal(ours, its)


def test_layouts_without_memory_of_their_own():
    x, w, b = (t.detach().float() for t in operands(lead=(3,)))
    expected = F.relu(F.linear(x, w, b))
    functional = linear_relu(torch._to_functional_tensor(x), torch._to_functional_tensor(w))
    assert torch.equal(torch._from_functional_tensor(functional), F.relu(F.linear(x, w)))
    if DEVICE == "cpu":
        assert torch.equal(linear_relu(x.to_sparse(), w, flags=new_flag()), F.relu(F.linear(x, w)))
        assert torch.allclose(linear_relu(x.to_mkldnn(), w.to_mkldnn(), b.to_mkldnn()).to_dense(), expected)


def operands(dtype=torch.float64, lead=(3, 2)):
    torch.manual_seed(1)
    make = {"dtype": dtype, "device": DEVICE, "requires_grad": True}
    return torch.randn(*lead, 5, **make), torch.randn(4, 5, **make), torch.randn(4, **make)


ACTIVATIONS = {"relu": torch.relu, "relu_squared": lambda x: torch.relu(x).square()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_derivatives_of_both_orders(flagged, with_bias, activation):
    inputs = operands() if with_bias else operands()[:2]

    def call(*inputs):
        return linear_relu(*inputs, flags=new_flag() if flagged else None, activation=activation)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_derivatives_of_the_registered_op():
    assert torch.autograd.gradcheck(lambda *inputs: OP(*inputs)[0], operands())
    assert torch.autograd.gradgradcheck(lambda *inputs: OP(*inputs)[0], operands())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_of_the_kernels(serving, activation):
    with serving("triton"):
        x, w, b = operands(torch.float32)
        y = linear_relu(x, w, b, flags=new_flag(), activation=activation)
        ours = torch.autograd.grad(y.square().sum(), (x, w, b), create_graph=True)
        ours += torch.autograd.grad(sum(g.square().sum() for g in ours), (x, w, b))
    z = ACTIVATIONS[activation](F.linear(x, w, b))
    theirs = torch.autograd.grad(z.square().sum(), (x, w, b), create_graph=True)
    theirs += torch.autograd.grad(sum(g.square().sum() for g in theirs), (x, w, b))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)  # sums of some hundred products in another order


def test_only_the_gradients_that_are_asked_for(either):
    for asked in itertools.product([True, False], repeat=3):
        x, w, b = (t.detach().bfloat16().requires_grad_(a) for t, a in zip(operands(), asked, strict=True))
        y = linear_relu(x, w, b, flags=new_flag())
        assert y.requires_grad == any(asked)
        if any(asked):
            y.sum().backward()
        assert tuple(t.grad is not None for t in (x, w, b)) == asked


@pytest.mark.parametrize("flagged", [True, False])
def test_squared_saves_the_value_of_relu_once(either, flagged):
    x, w, b = operands(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear_relu(x, w, b, flags=new_flag() if flagged else None, activation="relu_squared")
    places = {t.untyped_storage().data_ptr() for t in saved}
    (root,) = places - {t.untyped_storage().data_ptr() for t in (x, w)}
    assert root != y.untyped_storage().data_ptr()


def test_nothing_is_saved_beside_operands_and_output(either):
    x, w, b = operands(torch.float32)
    for call in (lambda: linear_relu(x, w, b, flags=new_flag()), lambda: OP(x, w, b)[0]):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = call()
        assert {t.untyped_storage().data_ptr() for t in saved} == {t.untyped_storage().data_ptr() for t in (x, w, y)}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(either, mode, activation):
    x, w, b = operands(torch.float32)
    flags = new_flag()
    with mode():
        y = linear_relu(x * INF, w, b, flags=flags, activation=activation)
    assert not y.requires_grad
    assert int(flags) & 6


@pytest.mark.parametrize("case", ["plain", "no bias", "leading dimensions", "no gradient", "empty"])
def test_opcheck(case):
    x, w, b = operands(torch.float32, lead={"leading dimensions": (3, 2), "empty": (0,)}.get(case, (3,)))
    if case == "no gradient":
        x, w, b = x.detach(), w.detach(), b.detach()
    # Recorded, and then there is none: from 2.14 on torch hides one of its own where warnings are shown, not raised.
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.library.opcheck(OP, (x, w, None if case == "no bias" else b))
        if case == "plain":
            torch.library.opcheck(OP, (x, w, b, True))
    assert not seen, [str(w.message) for w in seen]


@pytest.fixture
def without_jit(monkeypatch):
    """Forward-mode derivatives of torch's would call the deprecated torch.jit.script at their first use."""
    monkeypatch.setenv("PYTORCH_JIT", "0")


@pytest.mark.usefixtures("without_jit")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method")  # a module that inductor imports
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_without_a_graph_break(backend, activation):
    torch._dynamo.reset()

    def step(x, w, b, flags):
        return linear_relu(x.cos(), w, b, flags=flags, activation=activation) * 2

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    for function in (compiled, step):
        x, w, b = operands(torch.float32)
        flags = new_flag()
        y = function(x, w, b, flags)
        y.sum().backward()
        results.append((y, x.grad, w.grad, b.grad, flags))
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its)
    x, w, b = operands(torch.float32)
    compiled(x, w * INF, b, flags)
    assert int(flags)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_without_flags(activation):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w, b: linear_relu(x, w, b, activation=activation), fullgraph=True, backend="aot_eager"
    )
    x, w, b = operands(torch.float32)
    torch.testing.assert_close(compiled(x, w, b), linear_relu(x, w, b, activation=activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("flagged", [True, False])
def test_autocast(either, flagged, activation):
    x, w, b = operands(torch.float32)
    flags = new_flag() if flagged else None
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = linear_relu(x, w, b, flags=flags, activation=activation)
        theirs = ACTIVATIONS[activation](F.linear(x, w, b)).bfloat16()  # torch's square gives float32 there
        if flagged:
            assert OP(*(t.bfloat16() for t in (x, w, b)))[0].dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, theirs)
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "dims", [(0, None, None), (1, None, None), (None, 0, None), (0, 0, 0), (1, 1, 1), (None, None, 0)], ids=str
)
def test_vmap(dims, activation):
    x, w, b = torch.randn(4, 4, 5), torch.randn(4, 5), torch.randn(4)
    w = torch.randn(4, 4, 5) if dims[1] is not None else w
    b = torch.randn(4, 4) if dims[2] is not None else b
    x[1, 1, 1] = 1e25 if activation == "relu_squared" else INF
    flags = torch.zeros(1, dtype=torch.int32)
    y = torch.vmap(lambda *t: linear_relu(*t, flags=flags, activation=activation), dims)(x, w, b)
    before = torch.vmap(F.linear, dims)(x, w, b)
    torch.testing.assert_close(y, ACTIVATIONS[activation](before), equal_nan=True)
    assert int(flags) == kinds(before) | (2 if (y == INF).any() else 0)


@pytest.mark.usefixtures("without_jit")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_torch_func(activation):
    x, w, b = operands()

    def loss(w, x, flagged=True):
        flags = torch.zeros(1, dtype=torch.int32) if flagged else None  # made within the transform, it is its own
        return linear_relu(x, w, b, flags=flags, activation=activation).square().sum()

    (its,) = torch.autograd.grad(ACTIVATIONS[activation](F.linear(x, w, b)).square().sum(), w)
    torch.testing.assert_close(torch.func.grad(loss)(w, x), its)
    torch.testing.assert_close(torch.func.grad(loss)(w, x, False), its)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss), (None, 0))(w, x).sum(0), its)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda w: loss(w, x), (w,), (w,))
    torch.func.jvp(lambda w: loss(w, x, False), (w,), (w,))


def test_flags_of_outside_are_refused_within_a_gradient():
    x, w, b = operands()
    flags = new_flag()
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        torch.func.grad(lambda w: linear_relu(x, w, b, flags=flags).sum())(w)


def test_a_mode_sees_one_op():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x, w, b = (t.detach() for t in operands(torch.float32))
    flags = torch.zeros(1, dtype=torch.int32)
    with Mode():
        y = linear_relu(x, w * INF, b, flags=flags)
    assert OP in seen
    assert int(flags) & 6
    torch.testing.assert_close(y, linear_relu(x, w * INF, b), equal_nan=True)


def test_without_memory():
    flags = torch.zeros(1, dtype=torch.int32, device="meta")
    x = torch.empty(2, 3, 5, device="meta")
    assert linear_relu(x, torch.empty(4, 5, device="meta"), flags=flags).shape == (2, 3, 4)
    with FakeTensorMode():
        flags = torch.zeros(1, dtype=torch.int32)
        assert linear_relu(torch.empty(2, 3, 5), torch.empty(4, 5), torch.empty(4), flags=flags).shape == (2, 3, 4)


def test_subclasses():
    class Named(torch.Tensor):
        pass

    x, w, b = (t.detach() for t in operands(torch.float32))
    flags = torch.zeros(1, dtype=torch.int32)
    assert type(linear_relu(x.as_subclass(Named), w, b, flags=flags)) is Named
    both = TwoTensor(x, x.clone())
    assert type(linear_relu(both, TwoTensor(w, w), TwoTensor(b, b))) is TwoTensor
    with pytest.raises(NotImplementedError, match="TwoTensor, which wraps other tensors; leave flags out"):
        linear_relu(both, TwoTensor(w, w), TwoTensor(b, b), flags=flags)
    with pytest.raises(NotImplementedError, match="TwoTensor"):
        linear_relu(both, w, flags=flags)
    with pytest.raises(NotImplementedError, match="TwoTensor"):
        linear_relu(x, w, TwoTensor(b, b), flags=flags)
    assert int(flags) == 0


def test_nested_tensors():
    """A jagged batch wraps its values: they are read, and no padding is."""
    w, flags = torch.randn(4, 5), torch.zeros(1, dtype=torch.int32)
    parts = [torch.randn(2, 5), torch.full((3, 5), INF)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    y = linear_relu(jagged, w, flags=flags, activation="relu_squared")
    torch.testing.assert_close(y.values(), F.relu(F.linear(torch.cat(parts), w)).square(), equal_nan=True)
    assert int(flags) == kinds(F.linear(torch.cat(parts), w))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_traced_call_says_that_it_keeps_no_flags():
    w, flags = torch.randn(4, 5), torch.zeros(1, dtype=torch.int32)
    with pytest.warns(UserWarning, match="drops flags that are no input"):
        torch.jit.trace(lambda x: linear_relu(x, w, flags=flags), torch.randn(2, 5))
    with warnings.catch_warnings(action="ignore"):  # it says so here too, where they are
        traced = torch.jit.trace(lambda x, flags: (linear_relu(x, w, flags=flags), flags), (torch.randn(2, 5), flags))
    traced(torch.full((2, 5), NAN), flags)
    assert int(flags) == 1


def test_threads():
    x, w, b = (t.detach() for t in operands(torch.float32))
    flags = torch.zeros(1, dtype=torch.int32)
    bad = x.clone()
    bad[0] = NAN
    threads = [threading.Thread(target=linear_relu, args=(t, w, b), kwargs={"flags": flags}) for t in [x] * 7 + [bad]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int(flags) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(5)}, ValueError, r"input is \(2, 5\) and weight \(5,\); they must be \(..., K\) and"),
        ({"weight": torch.ones(4, 6)}, ValueError, r"weight \(4, 6\)"),
        ({"input": torch.ones(())}, ValueError, r"input is \(\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias is \(5,\); it must have one number for each row of weight: \(4,"),
        ({"bias": torch.ones(1, 4)}, ValueError, r"bias is \(1, 4\)"),
        ({"input": torch.ones(2, 5, dtype=torch.int64)}, TypeError, "needs a real floating-point tensor"),
        ({"input": torch.ones(2, 5, dtype=torch.complex64)}, TypeError, "needs a real floating-point tensor"),
        ({"input": torch.ones(2, 5).to(torch.float8_e5m2)}, TypeError, "float8_e5m2; linear_relu needs"),
        ({"weight": torch.ones(4, 5, dtype=torch.float16)}, RuntimeError, "dtype|agree"),
        ({"weight": torch.ones(4, 5, device="meta")}, RuntimeError, "on cpu, weight or bias on meta"),
        ({"bias": torch.ones(4, device="meta")}, RuntimeError, "on cpu, weight or bias on meta"),
        (
            {"flags": torch.zeros(1)},
            ValueError,
            r"flags is torch.float32, \(1,\), on cpu; make it by torch.zeros\(1, dt",
        ),
        ({"flags": torch.zeros((), dtype=torch.int32)}, ValueError, r"flags is torch.int32, \(\)"),
        ({"activation": "gelu"}, ValueError, """activation is 'gelu'; it must be "relu" or "relu_squared\""""),
        ({"activation": ["relu"]}, ValueError, "it must be"),
        ({"flags": torch.zeros(1, dtype=torch.int32, device="meta")}, ValueError, "on meta"),
    ],
)
def test_bad_input(either, change, error, message):
    flags = torch.zeros(1, dtype=torch.int32)
    good = {"input": torch.full((2, 5), INF), "weight": torch.ones(4, 5), "bias": torch.ones(4), "flags": flags}
    if DEVICE.type != "cpu":
        pytest.skip("its tensors lie on the CPU")
    with pytest.raises(error, match=message):
        linear_relu(**good | change)
    assert int(flags) == 0


def test_where_numba_is_asked_for_torch_serves(serving):
    """There it has nothing to add; INITLAB_BACKEND=numba is meant for other ops."""
    x, w, flags = torch.randn(3, 5), torch.randn(4, 5), torch.zeros(1, dtype=torch.int32)
    x[1, 1] = INF
    with serving("numba"):
        assert torch.equal(linear_relu(x[:1], w), torch.relu(x[:1] @ w.T))
        linear_relu(x, w, flags=flags)
    assert int(flags) & 6


linear = pytest.importorskip("initlab.kernels._linear_triton")
epilogue = pytest.importorskip("initlab.kernels._linear_epilogue_triton")
COMPILED = not linear.INTERPRETED  # for a GPU, or an emulated one, which computes in TF32
CAPABILITIES = [linear._device(DEVICE.index or 0)[0]] if COMPILED else [8, 9, 10]
if CAPABILITIES == [9]:  # it can run what is made for 10, whose products are not emulated
    CAPABILITIES.append(10)
TILES = [(major, tile) for major in CAPABILITIES for tile in linear.TILES.get(major, ())]


@pytest.mark.long_if.with_args(
    lambda capability_major, tile, dtype: (capability_major == 8) != (dtype == torch.float32)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("capability_major", "tile"), TILES, ids=str)
def test_every_tile(capability_major, tile, dtype):
    """Shapes that end within a tile, and more tiles than programs; outputs and flags as from float64."""
    torch.manual_seed(0)
    for M, K, N in ((tile.BLOCK_M + 3, 72, tile.BLOCK_N + 8), (5, 8, 8)):
        x = torch.randn(M, K, device=DEVICE).to(dtype)
        w = torch.randn(N, K, device=DEVICE).to(dtype)
        b = torch.randn(N, device=DEVICE).to(dtype)
        for bias in (b, None):
            flags = new_flag()
            y = linear.gemm(x, w, bias, flags, capability_major, tile)
            plus = torch.zeros(N, device=DEVICE) if bias is None else bias
            exact = torch.relu(x.double() @ w.double().T + plus.double())
            loose = 2.0**-10 / 2.0**-24 if dtype == torch.float32 and COMPILED else 1.0  # TF32
            assert ((y.double() - exact).abs() <= loose * bound(x, w.T, plus, dtype)).all()
            assert int(flags) == 0
            assert torch.equal(y, linear.gemm(x, w, bias, None, capability_major, tile))
            if bias is not None:
                square = linear.gemm(x, w, bias, flags, capability_major, tile, flag_square=True, squared=True)
                assert torch.equal(square, y.square())
                assert int(flags) == 0
        for value, (i, j) in zip((NAN, INF, -INF), ((0, 0), (M - 1, N - 1), (M // 2, 0)), strict=True):
            planted, of_bias, flags = x.clone(), torch.zeros_like(b), new_flag()
            of_bias[j] = value
            linear.gemm(planted, w, of_bias, flags, capability_major, tile)
            assert int(flags) == kinds(torch.tensor(value)), (value, j)
            of_bias[j], flags = 2.0**64 if value == INF else value, new_flag()
            linear.gemm(planted, w, of_bias, flags, capability_major, tile, flag_square=True)
            assert int(flags) == kinds(torch.tensor(value)), (value, j)
            planted[i, K - 1] = value
            flags = new_flag()
            linear.gemm(planted, w, None, flags, capability_major, tile)
            assert int(flags) == kinds(F.linear(planted.double(), w.double())), (value, i)


@pytest.mark.parametrize("shape", [(3, 7), (33, 63), (130, 129)], ids=str)
def test_ordinary_loads_need_no_alignment(shape):
    M, K = shape
    x, w = torch.randn(M, K, device=DEVICE).bfloat16(), torch.randn(65, K, device=DEVICE).bfloat16()
    y = linear.gemm(x, w, None, new_flag(), 8)
    none = torch.zeros((), device=DEVICE)
    exact = torch.relu(x.double() @ w.double().T)
    assert ((y.double() - exact).abs() <= bound(x, w.T, none, torch.bfloat16)).all()


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_pass(size, dtype):
    torch.manual_seed(0)
    before = torch.randn(size, device=DEVICE).to(dtype)
    for planted in ((), *PLANTS):
        y = before.clone()
        for k, value in enumerate(planted):
            y[size - 1 - k * (size // 3)] = value
        expected, flag, flags = F.relu(y), kinds(y), new_flag()
        root, square, flags_of_square = y.clone(), y.clone(), new_flag()
        ours = epilogue.relu_in_place(y, flags)
        assert ours is y
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(3.0), expected.nan_to_num(3.0))
        assert int(flags) == flag
        epilogue.relu_in_place(square, flags_of_square, True, True)
        torch.testing.assert_close(square, expected.square(), rtol=0, atol=0, equal_nan=True)
        root[size // 2] = 2.0 ** (8 if dtype == torch.float16 else 64)
        epilogue.relu_in_place(root, flags_of_square, True)
        torch.testing.assert_close(root[: size // 2], expected[: size // 2], rtol=0, atol=0, equal_nan=True)
        assert int(flags_of_square) == flag | 2
    assert torch.equal(epilogue.relu_in_place(before.clone(), None), F.relu(before))


@pytest.mark.long_if.with_args(lambda shape, dtype, layout: shape == (600, 300) and dtype != torch.float32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (255, 129), (257, 3), (600, 300)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_the_mask_and_its_sums(shape, dtype, layout):
    torch.manual_seed(0)
    y = torch.randn(shape, device=DEVICE).relu().to(dtype)
    y[0, 0] = NAN
    grad = torch.randn((), device=DEVICE).expand(shape) if layout == "expanded" else laid_out(layout, *shape)
    grad = grad.to(dtype)
    out, sums = epilogue.mask_and_sum(grad, y)
    theirs = torch.ops.aten.threshold_backward(grad, y, 0)
    assert torch.equal(out, theirs)
    error = (sums.double() - theirs.double().sum(0)).abs()
    assert (error <= shape[0] * 2.0**-24 * theirs.double().abs().sum(0)).all()
    out, sums = epilogue.mask_and_sum(grad, y, True)
    theirs = torch.ops.aten.threshold_backward(grad * (2 * y), y, 0)
    torch.testing.assert_close(out, theirs, rtol=0, atol=0, equal_nan=True)
    assert sums[0].isnan()
    error = (sums.double() - theirs.double().sum(0)).abs()[1:]
    assert (error <= shape[0] * 2.0**-24 * theirs.double().abs().sum(0)[1:]).all()


def test_which_candidate_serves(monkeypatch):
    x, w = torch.zeros(64, 512, device=DEVICE).bfloat16(), torch.zeros(256, 512, device=DEVICE).bfloat16()
    assert linear._fits_one_kernel(x, w)
    deep = torch.zeros(64, linear.ONE_KERNEL_MAX_K + 8, device=DEVICE).bfloat16()
    assert not linear._fits_one_kernel(deep, torch.zeros(256, deep.shape[1], device=DEVICE).bfloat16())
    assert not linear._fits_one_kernel(x[:0], w)
    assert not linear._fits_one_kernel(x, w[:0])
    assert not linear._fits_one_kernel(x[:, :0], w[:, :0])
    assert not linear._fits_one_kernel(x[:1].expand(64, -1), w)
    assert not linear._fits_one_kernel(x.T.contiguous().T, w)
    assert not linear._fits_one_kernel(x, w.T.contiguous().T)
    assert not linear._fits_one_kernel(x[:, 1:], w[:, 1:])
    assert not linear._fits_one_kernel(x, w[:255])  # the result's rows would not be aligned
    assert linear._fits_one_kernel(x[:, :511], w[:, :511])  # but these are
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert not linear._fits_one_kernel(x.float(), w.float())
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert linear._fits_one_kernel(x.float(), w.float())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not linear._fits_one_kernel(x, w)


def test_tiles_by_size():
    large, middle, small = linear.TILES[9]
    assert linear._tile(8192, 8192, 9, 132) == large
    assert linear._tile(1024, 2048, 9, 128) == middle
    assert linear._tile(1, 1, 9, 132) == small


def test_the_host_does_not_wait(serving, monkeypatch):
    """No value is read on the way of the kernels, forward and backward, whatever they find."""

    def wait(*_):
        raise AssertionError("the host waits for the device")

    x, w, b = (t.detach().bfloat16().requires_grad_() for t in operands(torch.float32))
    flags = new_flag()
    with serving("triton"), monkeypatch.context() as patch:
        for name in ("item", "__bool__", "__int__", "__float__", "tolist"):
            patch.setattr(torch.Tensor, name, wait)
        y = linear_relu(x * INF, w, b, flags=flags)
        y.backward(torch.ones_like(y))
    assert int(flags)


def test_the_choice_is_made_in_one_place():
    modules = {"numba": None, "triton": "._linear_triton"}
    assert backends.load(torch.device("cpu"), modules).name in ("torch", "triton")
    assert initlab.linear_relu is linear_relu
