"""fill_: distributions, regions and every kind of tensor, on both backends of the CPU, bit for bit."""

import itertools
import math
import os
import random
import re
import textwrap

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from initlab.kernels import Constant, Draw, Normal, Region, TruncatedNormal, Uniform, fill_
from initlab.kernels.sampling import _maps, _memory, _torch, fill, stream
from initlab.kernels.sampling._maps import map_of
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

INF, NAN = math.inf, math.nan
KEY = 0x9E3779B97F4A7C15
DISTRIBUTIONS = {
    "uniform": Uniform(-0.5, 1.25),
    "normal": Normal(0.0, 0.02),
    "normal with mean": Normal(-1.0, 3.0),
    "centre": TruncatedNormal(0.1, 1.5, -2.0, 3.0),
    "tail": TruncatedNormal(0.0, 0.9, -2.0, 5.0),
    "tail, flipped": TruncatedNormal(0.0, 0.02, -2.0, 0.0),
    "far": TruncatedNormal(0.0, 0.7, 4.0, INF),
    "far, flipped": TruncatedNormal(1.0, 0.3, -2.0, -1.0),
    "narrow": TruncatedNormal(0.0, 1.1, 0.3, 0.4),
}
REAL = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHORT = [torch.bfloat16, torch.float16]

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
every_dtype = pytest.mark.parametrize("dtype", REAL, ids=str)


def poisoned(*shape, dtype=torch.float32, device=None):
    fill = complex(NAN, NAN) if dtype.is_complex else NAN
    return torch.full(shape, fill, dtype=dtype, device=device)


def filled(shape, distribution, dtype=torch.float32, key=KEY, region=None):
    x = poisoned(*shape, dtype=dtype)
    fill_([Draw(x, distribution, key, region)])
    return x


def elements(region):
    """The numbers of a region's elements, in its shape: straight from what row-major means."""
    number = torch.zeros(region.sizes, dtype=torch.int64)
    stride = 1
    for dim in reversed(range(len(region.shape))):
        along = torch.arange(region.offsets[dim], region.offsets[dim] + region.sizes[dim]) * stride
        number += along.view(-1, *[1] * (len(region.shape) - dim - 1))
        stride *= region.shape[dim]
    return number


def whole(shape):
    return Region(tuple(shape), (0,) * len(shape), tuple(shape))


def values(distribution, dtype, region, key=KEY):
    """A region's values by the reference's maps, one element at a time: no runs, no chunks, no blocks shared."""
    number = elements(region)
    if dtype.is_complex:
        return torch.view_as_complex(
            values(distribution_of_a_part(distribution), dtype.to_real(), doubled(region), key)
        )
    blocks = stream.block_values(map_of(distribution, dtype), key, number.flatten() >> 2, dtype)
    return blocks.gather(1, (number.flatten() & 3)[:, None]).view(region.sizes)


def distribution_of_a_part(distribution):
    return (
        Normal(distribution.mean, distribution.std / math.sqrt(2)) if isinstance(distribution, Normal) else distribution
    )


def doubled(region):
    return Region((*region.shape, 2), (*region.offsets, 0), (*region.sizes, 2))


def test_the_distributions_above_meet_every_map():
    maps = [map_of(distribution, torch.float32) for distribution in DISTRIBUTIONS.values()]
    assert [type(m).__name__.removesuffix("Map") for m in maps] == (
        ["Uniform", "Normal", "Normal", "Centre", "Tail", "Tail", "Far", "Far", "Narrow"]
    )
    assert [m.flip != 0 for m in maps if hasattr(m, "flip")] == [False, True, False, True]


# ---------------------------------------------------------------------------------------------------------------
# Distributions


@pytest.mark.parametrize(
    ("distribution", "parameters", "error", "message"),
    [
        (Uniform, (NAN, 1.0), RuntimeError, "low is nan; it must be finite"),
        (Uniform, (0.0, INF), RuntimeError, "high is inf; it must be finite"),
        (Uniform, ("0", 0.5), TypeError, "low is '0'; it must be a number"),
        (Normal, (0.0, "1"), TypeError, "std is '1'; it must be a number"),
        (TruncatedNormal, (0.0, 1.0, 0.0, "inf"), TypeError, "high is 'inf'; it must be a number"),
        (Uniform, (1.0, 0.5), RuntimeError, r"\[1.0, 0.5\): low must not exceed high; swap them"),
        (Normal, (0.0, -1.0), RuntimeError, "normal expects std >= 0.0, but found std -1.0"),  # torch's own words
        (Normal, (0.0, NAN), RuntimeError, "normal expects std >= 0.0, but found std nan"),
        (Normal, (0.0, INF), ValueError, "std is inf; it must be finite"),
        (Normal, (NAN, 1.0), ValueError, "mean is nan; it must be finite"),
        (TruncatedNormal, (INF, 1.0), ValueError, "mean is inf; it must be finite"),
        (TruncatedNormal, (0.0, 0.0), ValueError, "std is 0.0; .* std > 0; use constant_"),
        (TruncatedNormal, (0.0, -2.0), ValueError, "std is -2.0; .* std > 0; use constant_"),
        (TruncatedNormal, (0.0, NAN), ValueError, "std is nan; it must be finite"),
        (TruncatedNormal, (0.0, 1.0, NAN, 1.0), ValueError, r"bounds are \[nan, 1.0\]; they must be numbers"),
        (TruncatedNormal, (0.0, 1.0, INF, INF), ValueError, r"bounds are \[inf, inf\]; .* only outwards infinite"),
        (TruncatedNormal, (0.0, 1.0, -INF, -INF), ValueError, r"bounds are \[-inf, -inf\]; .* outwards infinite"),
        (TruncatedNormal, (0.0, 1.0, 2.0, 1.0), RuntimeError, r"\[2.0, 1.0\]: low must not exceed high; swap them"),
        (TruncatedNormal, (0.0, 1.0, 12.1, 13.0), ValueError, r"\[12.1, 13.0\] lie 12.1 .* 12 is the limit; move"),
        (TruncatedNormal, (5.0, 0.1, -INF, 3.0), ValueError, r"\[-inf, 3.0\] lie 20 .* mean 5.0 \(std 0.1\)"),
    ],
)
def test_a_bad_distribution(distribution, parameters, error, message):
    with pytest.raises(error, match=message) as raised:
        distribution(*parameters)
    assert raised.type is error


def test_distributions_hold_floats():
    assert repr(Uniform(0, torch.tensor(2))) == "Uniform(low=0.0, high=2.0)"
    assert TruncatedNormal(0, 1, -12, 12) == TruncatedNormal(0.0, 1.0, -12.0, 12.0)
    assert TruncatedNormal(0, 1, 12, INF).low == 12.0  # the limit itself is allowed


@pytest.mark.parametrize(
    ("distribution", "value"),
    [(Uniform(0.1, 0.1), 0.1), (Normal(0.1, 0.0), 0.1), (TruncatedNormal(0.0, 1.0, 50.0, 50.0), 50.0)],
)
@every_dtype
def test_a_distribution_without_width_is_a_constant(backend, distribution, value, dtype):
    x = filled((5,), distribution, dtype)
    assert torch.equal(x, torch.full((5,), value, dtype=dtype))


@pytest.mark.parametrize(
    ("distribution", "dtype"),
    [
        (Uniform(-7e4, 0.0), torch.float16),
        (Uniform(0.0, 7e4), torch.float16),
        (Uniform(-6e4, 6e4), torch.float16),
        (Uniform(-3e38, 3e38), torch.float32),
        (Uniform(-1e308, 1e308), torch.float64),
        (Normal(1e39, 1.0), torch.float32),
        (Normal(0.0, 1e39), torch.bfloat16),
        (TruncatedNormal(1e39, 1.0, -INF, INF), torch.float32),
    ],
)
def test_parameters_that_the_dtype_cannot_hold(distribution, dtype):
    with pytest.raises(RuntimeError, match=r"out of bounds for torch\.|overflows float32"):
        filled((5,), distribution, dtype)


def largest_normal():
    """The largest |z| of the stream: where the radius is largest, and where the cosine is."""
    a, b = torch.arange(2**20), torch.zeros(2**20, dtype=torch.int64)
    radius = stream._box_muller(a, b)[0]
    assert radius.argmax() == 0
    angles = torch.cat([torch.arange(2**20), 2**31 + torch.arange(-(2**19), 2**19), torch.arange(0, 2**32, 4099)])
    z = torch.stack(stream._box_muller(torch.zeros_like(angles), angles))
    assert z.abs().max() == radius[0]
    return radius[0].item()


def first_infinite(dtype):
    """The least float64 that the dtype, or the float32 before it, rounds to infinity."""
    info = torch.finfo(dtype)
    return info.max + info.max / (2 - info.eps) * info.eps / 2  # half a step beyond the largest; exact but for float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.25, -0.25])
def test_the_line_between_what_a_normal_may_and_may_not(dtype, mean):
    """Refused where the extreme words give infinity, and drawn where they are finite: float32 by float32."""
    mean *= torch.finfo(dtype).max
    largest = largest_normal()
    std = torch.tensor((first_infinite(dtype) - abs(mean)) / largest).float()
    near = [std]
    for _ in range(8):
        near = [torch.nextafter(near[0], torch.tensor(0.0)), *near, torch.nextafter(near[-1], torch.tensor(INF))]
    refused = []
    for s in torch.stack(near):
        ends = torch.tensor([largest, -largest]) * s
        ends = (ends if mean == 0.0 else ends + torch.tensor(mean)).to(dtype)
        try:
            map_of(Normal(mean, s.item()), dtype)
            refused.append(False)
        except RuntimeError:
            refused.append(True)
        assert refused[-1] == bool(ends.isinf().any())
    assert refused == sorted(refused)
    assert {*refused} == {False, True}


BEYOND = [
    (Normal(0.0, 7e4), torch.float16),
    (Normal(7e4, 0.0), torch.float16),
    (Normal(6e4, 2e3), torch.float16),
    (Normal(-6e4, 2e3), torch.float16),
    (Normal(0.0, 1e38), torch.float32),
    (Normal(3.33e38, 1e36), torch.bfloat16),
    (Normal(0.0, 1e308), torch.float64),
    (Normal(0.0, 1.4e4), torch.complex32),
    (Normal(0.0, 1e38), torch.complex64),
    (TruncatedNormal(0.0, 2e4, -INF, INF), torch.float16),
    (TruncatedNormal(0.0, 2e4, -INF, 0.0), torch.float16),
    (TruncatedNormal(0.0, 2e4, -1e5, 1e5), torch.float16),
    (TruncatedNormal(0.0, 5e4, 6.5e4, 7e4), torch.float16),
    (TruncatedNormal(0.0, 1e4, 7e4, 8e4), torch.float16),
    (TruncatedNormal(0.0, 1e5, 7e4, 7e4), torch.float16),
    (TruncatedNormal(0.0, 1e38, -INF, INF), torch.float32),
    (TruncatedNormal(0.0, 1e308, -INF, INF), torch.float64),
]
WITHIN = [
    (Normal(0.0, 9e3), torch.float16),
    (Normal(65504.0, 0.0), torch.float16),
    (Normal(0.0, 5e37), torch.float32),
    (Normal(0.0, 5e37), torch.bfloat16),
    (Normal(0.0, 2e307), torch.float64),
    (TruncatedNormal(0.0, 7e4, -6e4, 6e4), torch.float16),
    (TruncatedNormal(0.0, 7e4, -65504.0, 65504.0), torch.float16),
    (TruncatedNormal(0.0, 1.0, -2.0, 1e30), torch.float16),
    (TruncatedNormal(0.0, 9e3, -INF, INF), torch.float16),
    (TruncatedNormal(0.0, 9e3, -2e5, 2e5), torch.float16),
    (TruncatedNormal(0.0, 3e38, -3.4e38, 3.4e38), torch.float32),
    (TruncatedNormal(0.0, 1e308, -1e308, 1.7e308), torch.float64),
]


@pytest.mark.parametrize(("distribution", "dtype"), BEYOND)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_distribution_that_reaches_beyond_the_dtype(distribution, dtype, device):
    x = torch.ones(3, dtype=dtype, device=device)
    largest = f"{torch.finfo(dtype).max:.6g}"
    with pytest.raises(RuntimeError, match=rf"can draw a value beyond {re.escape(largest)}, .*{dtype}.*use") as raised:
        fill_([Draw(x, distribution, KEY)])
    assert repr(distribution) in str(raised.value)
    assert device == "meta" or torch.all(x == 1)


@pytest.mark.parametrize(("distribution", "dtype"), WITHIN)
def test_a_distribution_that_just_fits_the_dtype(backend, distribution, dtype):
    assert filled((20_000,), distribution, dtype).isfinite().all()


def test_the_range_is_judged_under_a_fake_mode_too():
    _maps._mapped.cache_clear()
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            with pytest.raises(RuntimeError, match="can draw a value beyond 65504"):
                fill_([Draw(torch.empty(3, dtype=torch.float16), Normal(0.0, 7e4), KEY)])
            fill_([Draw(torch.empty(3, dtype=torch.float16), TruncatedNormal(0.0, 9e3, -INF, INF), KEY)])


@every_distribution
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str
)
def test_a_dtype_that_a_distribution_cannot_fill(bits, distribution, dtype):
    if dtype.is_complex and not isinstance(distribution, TruncatedNormal):
        pytest.skip("defined")
    for device in ("cpu", "meta"):
        x = torch.ones(3, device=device).to(dtype)
        before = x.clone()
        with pytest.raises(NotImplementedError, match=rf"not defined for {dtype}; .* and convert it"):
            fill_([Draw(x, distribution, KEY)])
        assert device == "meta" or torch.equal(bits(x), bits(before))


@pytest.mark.parametrize("dtype", [*REAL, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_constant_serves_every_dtype_and_layout(bits, dtype):
    x, expected = torch.zeros(4, 6).to(dtype), torch.zeros(4, 6)
    expected[:, 1:5:2] = 1
    fill_([Draw(x.t()[1:5:2], Constant(1.0))])
    assert torch.equal(bits(x), bits(expected.to(dtype)))


# ---------------------------------------------------------------------------------------------------------------
# Values


@every_distribution
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_short_dtypes_hold_the_rounded_float32(backend, distribution, dtype):
    expected = filled((5001,), distribution).to(dtype)
    if isinstance(distribution, Uniform):  # rounded first, then clamped
        high, down = torch.tensor([distribution.high, -INF], dtype=dtype)
        expected = expected.clamp(max=torch.nextafter(high, down))
    assert torch.equal(filled((5001,), distribution, dtype), expected)


@pytest.mark.parametrize("std", [1e-7, 5e-6, 1e-4, 9.6e3])
def test_float16_subnormals_and_large_numbers(backend, bits, std):
    x, expected = filled((5001,), Normal(0.0, std), torch.float16), filled((5001,), Normal(0.0, std)).half()
    assert torch.equal(bits(x), bits(expected))  # with the signs of zeros
    assert x.isfinite().all()
    assert (x.abs() < 2.0**-14).any() == (std < 1)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_numba_rounds_as_torch_does(dtype):
    """Every value of the dtype, the midpoints between two, and their neighbours: all cases of a rounding."""
    numba = pytest.importorskip("numba")
    from initlab.kernels import _common_numba

    rounded, tag = _common_numba.rounded, _common_numba.TAGS[dtype]

    @numba.njit
    def convert(x, out):
        for i in range(len(x)):
            out[i] = rounded(x[i], tag)

    held = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype).float()
    held = held[held.isfinite()].sort().values
    middles = ((held[1:].double() + held[:-1].double()) / 2).float()
    exact = torch.cat([held, middles])
    x = torch.cat([exact, *(torch.nextafter(exact, torch.full_like(exact, end)) for end in (-INF, INF))])
    x = torch.cat([x, x * 1.0009765625, torch.tensor([INF, -INF, 65519.99, 65520.0, 3.39e38, -1e-45, 1e-45])])
    out = np.empty(len(x), type(tag))
    convert(x.numpy(), out)
    assert np.array_equal(out.view(np.uint16), x.to(dtype).view(torch.uint16).numpy())


@every_distribution
def test_float64_agrees_with_float32(backend, distribution):
    """Within an ulp of the largest number met on the way.

    In float32 the parameters, the product and the sum are rounded, half an ulp each at most, but a float32 parameter
    of a deviate of several units moves the product by as much relatively: 2^-24 + 2^-24 of it, and 2^-24 of the sum.
    """
    single, double = filled((20_000,), distribution), filled((20_000,), distribution, torch.float64)
    met = double.abs() + (abs(distribution.low) if isinstance(distribution, Uniform) else abs(distribution.mean))
    assert torch.all((single.double() - double).abs() <= met * 2.0**-23)
    assert not torch.equal(single.double(), double)  # it has more digits, the uniform where its bounds give them


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        *itertools.product(REAL, [0.0], [1.0, 0.3]),
        *itertools.product(REAL, [0.99, -1e-3], [1.0]),
        *itertools.product(REAL, [-1.0], [-0.99, 1e-6, -1e-30]),
        (torch.float16, 0.999, 1.0),
        (torch.float16, -1.0, -1e-10),
        (torch.float16, -1e-10, 1.0),
        (torch.float32, 1.0, 1.0 + 2.0**-23),
        (torch.float32, 1.0, 1.0 + 2.0**-21),
        (torch.float32, -(1.0 + 2.0**-23), -1.0),
        (torch.float32, 0.0, 1e-44),
        (torch.float32, 16777216.0, 16777220.0),
        (torch.float32, -1.7e38, 1.7e38),
        (torch.float16, 65472.0, 65504.0),
        (torch.float16, 0.0, 1e-7),
        (torch.float16, 0.5, 0.75001),
        (torch.bfloat16, 1.0, 1.01),
        (torch.bfloat16, 100.0, 100.7),
        (torch.float64, 1.0, 1.0 + 2.0**-51),
        (torch.float64, -5e-324, 5e-324),
    ],
)
def test_uniform_stays_below_high(backend, dtype, low, high):
    x = filled((40_000,), Uniform(low, high), dtype).double()
    first, end = (float(torch.tensor(bound, dtype=dtype)) for bound in (low, high))
    assert first < end
    assert x.max() < high
    assert first <= x.min()
    step = end - float(torch.nextafter(*torch.tensor([end, -INF], dtype=dtype)))
    if end - first > 200 * step:  # wide enough to hold more than a few numbers: all of it is used
        assert x.min() < first + 0.01 * (end - first)
        assert x.max() > end - 0.01 * (end - first)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_uniform_between_two_numbers_of_the_dtype_is_its_low(backend, dtype):
    assert torch.all(filled((100,), Uniform(1.0, 1.0001), dtype) == 1)


CLOSE = [(0.0, 1.0, 1.001, 1.002), (0.0, 1.0, 11.99, INF), (0.3, 0.02, -0.1, 0.1), (0.0, 1.0, -3.001, 3.001)]


@pytest.mark.parametrize(
    "distribution",
    [distribution for distribution in DISTRIBUTIONS.values() if isinstance(distribution, TruncatedNormal)]
    + [TruncatedNormal(*p) for p in CLOSE],
    ids=str,
)
@every_dtype
def test_truncated_normal_stays_within_its_bounds(backend, distribution, dtype):
    x = filled((40_000,), distribution, dtype)
    bounds = torch.tensor([distribution.low, distribution.high], dtype=torch.float64)
    low, high = bounds if dtype == torch.float64 else bounds.float().to(dtype)
    assert low <= x.min()
    assert x.max() <= high
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    "distribution", [Normal(0.5, 3.0), Normal(0.5, 0.0), Uniform(0.1, 0.3), Uniform(0.1, 0.1)], ids=str
)
def test_complex_is_the_real_stream_of_its_parts(backend, bits, distribution, dtype):
    parts = filled((7, 9, 2), distribution_of_a_part(distribution), dtype.to_real())
    z = torch.empty(7, 9, dtype=dtype)
    fill_([Draw(z, distribution, KEY)])
    assert torch.equal(torch.view_as_real(z), parts)
    block = torch.empty(3, 5, dtype=dtype)
    fill_([Draw(block, distribution, KEY, Region((7, 9), (2, 3), (3, 5)))])
    assert torch.equal(bits(block), bits(z[2:5, 3:8]))


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_keys(backend, key):
    assert torch.equal(filled((9,), Normal(), key=key), values(Normal(), torch.float32, whole((9,)), key))
    others = [filled((9,), Normal(), key=key ^ 1 << bit) for bit in (0, 31, 32, 63)]
    assert not any(torch.equal(filled((9,), Normal(), key=key), other) for other in others)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_a_key_of_more_than_64_bits(key):
    with pytest.raises(ValueError, match=rf"key is {key}; a key is 64 bits: 0 <= key < 2\*\*64"):
        filled((3,), Normal(), key=key)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@every_distribution
def test_torchs_default_dtype_does_not_matter(backend, distribution, dtype):
    expected = filled((100,), distribution)
    _maps._mapped.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(filled((100,), distribution), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@every_distribution
def test_torchs_default_device_does_not_matter(backend, distribution):
    expected = filled((6,), distribution)
    _maps._mapped.cache_clear()
    x = poisoned(6)
    with torch.device("meta"):
        fill_([Draw(x, distribution, KEY)])
    assert torch.equal(x, expected)


def test_torchs_default_device_does_not_hide_overlap():
    apart, overlapping = (poisoned(9).as_strided((3, 2), stride) for stride in ((2, 3), (1, 1)))
    with torch.device("meta"):
        fill_([Draw(apart, Normal(), KEY)])
        with pytest.raises(RuntimeError, match="overlaps itself"):
            fill_([Draw(overlapping, Normal(), KEY)])
    assert torch.equal(apart, filled((3, 2), Normal()))


# ---------------------------------------------------------------------------------------------------------------
# The two backends


def check_agreement(serving, distribution, start, n):
    pair = []
    for name in ("torch", "numba"):
        with serving(name):
            pair.append(filled((n,), distribution, region=Region((start + n,), (start,), (n,))))
    assert torch.equal(*pair)
    assert pair[0].isfinite().all()


@every_distribution
def test_backends_agree_on_a_million_draws(serving, distribution):
    check_agreement(serving, distribution, 12345, 1_000_003)


@pytest.mark.exhaustive
@every_distribution
def test_backends_agree_on_10_to_8_draws(serving, distribution):
    n = 4_000_001
    for start in range(0, 10**8, n):
        check_agreement(serving, distribution, start, n)


class Case:
    """A random tensor in a random place of a buffer, and what to fill it with."""

    def __init__(self, seed):
        rng = self.rng = random.Random(seed)
        self.dtype = rng.choice([*REAL, *REAL, torch.complex64])
        names = ["uniform", "normal", "normal with mean"] if self.dtype.is_complex else [*DISTRIBUTIONS]
        self.name = rng.choice(names)
        self.key = rng.getrandbits(64)
        self.region = None
        self.shape = self.random_shape()
        if rng.random() < 0.8:
            # The backend of plain torch takes a millisecond for each run of a region.
            while self.region is None or sum(1 for _ in self.region.runs()) > 30:
                self.shape = self.random_shape()
                self.region = self.random_region()
        self.kind = rng.choice(
            ["contiguous", "permuted", "permuted", "sliced", "sliced", "channels_last", "conj", "neg"]
        )
        self.buffer, self.tensor = self.random_layout()

    def random_shape(self):
        rng = self.rng
        dims = rng.choice([0, 1, 1, 2, 2, 2, 3, 3, 4, 5])
        longest = [0, 3000, 70, 16, 9, 6][dims]
        return tuple(
            rng.choice([rng.randint(0, 5), 1, rng.randint(1, longest), rng.randint(1, longest)]) for _ in range(dims)
        )

    def random_region(self):
        rng = self.rng
        before, after = ([rng.choice([0, 0, rng.randint(0, 9)]) for _ in self.shape] for _ in range(2))
        if self.shape and rng.random() < 0.6:  # far into a huge tensor: elements around 2^31 ... 2^40
            inner = math.prod(sum(x) for x in zip(before[1:], self.shape[1:], after[1:], strict=True))
            target = rng.choice([2**31, 2**32, 2**33, 2**34, 2**40])
            before[0] = max(0, target // max(1, inner) - rng.randint(0, self.shape[0] + 1))
        shape = tuple(sum(x) for x in zip(before, self.shape, after, strict=True))
        return Region(shape, tuple(before), self.shape)

    def random_layout(self):
        rng, dims = self.rng, len(self.shape)
        order = list(range(dims))
        if self.kind == "permuted":
            rng.shuffle(order)
        elif self.kind == "channels_last" and dims == 4:
            order = [0, 2, 3, 1]
        steps = [rng.choice([1, 2, 2, 3]) if self.kind == "sliced" else 1 for _ in self.shape]
        lead, trail = rng.randint(1, 9), rng.randint(1, 9)
        room = [size * step for size, step in zip(self.shape, steps, strict=True)]
        numel = math.prod(room)
        buffer = poisoned(lead + numel + trail, dtype=self.dtype)
        inverse = [order.index(d) for d in range(dims)]
        block = buffer[lead : lead + numel].view([room[d] for d in order]).permute(inverse)
        tensor = block[tuple(slice(0, None, step) for step in steps)] if dims else block
        if self.kind == "conj" and self.dtype.is_complex:
            tensor = tensor.conj()
        if self.kind == "neg":
            tensor = torch._neg_view(tensor)
        return buffer, tensor

    def __repr__(self):
        return (
            f"{self.name} {self.dtype} {self.kind} shape {self.shape} strides {self.tensor.stride()} "
            f"offset {self.tensor.storage_offset()} key {self.key:#x} {self.region}"
        )


@pytest.mark.parametrize("hundred", range(10))
def test_backends_agree_on_random_tensors_and_write_nothing_else(serving, bits, hundred):
    """1,000 random (shape, region, dtype, stride) cases: each backend against values(), and the rest untouched."""
    for seed in range(100 * hundred, 100 * hundred + 100):
        case = Case(seed)
        distribution = DISTRIBUTIONS[case.name]
        expected = values(distribution, case.dtype, case.region or whole(case.shape), case.key)
        assert not expected.isnan().any()
        untouched = bits(case.buffer)
        inside = torch.zeros_like(case.buffer, dtype=torch.bool)
        inside.as_strided(case.tensor.shape, case.tensor.stride(), case.tensor.storage_offset()).fill_(True)
        for name in ("torch", "numba"):
            case.buffer.fill_(poisoned(1, dtype=case.dtype)[0])
            with serving(name):
                fill_([Draw(case.tensor, distribution, case.key, case.region)])
            assert torch.equal(bits(case.tensor), bits(expected)), (name, case)
            outside = ~inside
            assert torch.equal(bits(case.buffer)[outside], untouched[outside]), (name, case)


def test_random_cases_are_varied():
    cases = [Case(seed) for seed in range(1000)]
    assert {case.name for case in cases} == {*DISTRIBUTIONS}
    assert {case.dtype for case in cases} == {*REAL, torch.complex64}
    regions = [case.region for case in cases if case.region and case.region.numel]
    for bound in (2**31, 2**32, 2**34):
        assert sum(int(elements(region).max()) >= bound for region in regions) > 50
        assert any(elements(region).min() < bound <= elements(region).max() for region in regions)
    assert sum(not case.tensor.is_contiguous() for case in cases) > 150
    assert sum(case.tensor.numel() == 0 for case in cases) > 20
    assert sum(case.tensor.numel() > 1000 for case in cases) > 50
    assert {case.tensor.dim() for case in cases} == {*range(6)}
    assert sum(len([*region.runs()]) > 1 for region in regions) > 50


@pytest.mark.parametrize("start", [2**31, 2**32, 2**33, 2**34, 2**40])
@every_distribution
def test_elements_around_powers_of_two(backend, distribution, start):
    region = Region((2**50,), (start - 11,), (23,))
    assert torch.equal(filled((23,), distribution, region=region), values(distribution, torch.float32, region))


@pytest.mark.parametrize("length", range(1, 6))
def test_short_rows_at_every_alignment(backend, length):
    for offset, width in itertools.product(range(5), range(length + 4, length + 8)):
        region = Region((40, width), (3, offset), (33, length))
        assert torch.equal(filled(region.sizes, Normal(), region=region), values(Normal(), torch.float32, region))


@pytest.mark.parametrize(
    "region", [None, Region((50, 1201), (3, 5), (17, 1101)), Region((91, 9, 37), (1, 2, 3), (83, 5, 31))]
)
def test_pieces_do_not_show(backend, region, monkeypatch):
    """Chunks, slabs and pieces of 512 elements, where they are many thousands; 3 threads claim the pieces."""
    distribution = DISTRIBUTIONS["normal with mean"]
    shape = region.sizes if region else (12_345,)
    expected = values(distribution, torch.float32, region or whole(shape))
    monkeypatch.setattr(fill, "_SLAB", 4096)
    monkeypatch.setattr(_torch, "CHUNK", {"cpu": 512})
    if backend == "numba":
        from initlab.kernels.sampling import _numba

        monkeypatch.setattr(_numba, "PIECE_SIZE", 512)
        monkeypatch.setattr(_numba, "ONE_THREAD", 512)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    strided = poisoned(*shape[:-1], 2 * shape[-1])[..., ::2]
    fill_([Draw(strided, distribution, KEY, region)])
    assert torch.equal(filled(shape, distribution, region=region), expected)
    assert torch.equal(strided, expected)


# ---------------------------------------------------------------------------------------------------------------
# Regions


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes", "message"),
    [
        ((4,), (0, 0), (4,), "one number per dimension each"),
        ((4, 4), (0, 0), (4,), "one number per dimension each"),
        ((), (0,), (), "one number per dimension each"),
        ((4,), (-1,), (2,), r"0 <= offset and offset \+ size <= shape must hold"),
        ((4,), (1,), (-1,), r"0 <= offset and offset \+ size <= shape must hold"),
        ((4, 4), (0, 3), (4, 2), r"0 <= offset and offset \+ size <= shape must hold"),
        ((4,), (5,), (0,), r"0 <= offset and offset \+ size <= shape must hold"),
    ],
)
def test_a_bad_region(shape, offsets, sizes, message):
    with pytest.raises(ValueError, match=message) as raised:
        Region(shape, offsets, sizes)
    assert f"shape={shape}, offsets={offsets}, sizes={sizes}" in str(raised.value)


def test_a_region_holds_tuples_of_ints():
    region = Region(torch.Size([4, 6]), [np.int64(1), 2], torch.tensor([3, 4]))
    assert region == Region((4, 6), (1, 2), (3, 4))
    assert repr(region) == "Region(shape=(4, 6), offsets=(1, 2), sizes=(3, 4))"
    assert region.numel == 12
    assert region.narrow(1, 1, 2) == Region((4, 6), (1, 3), (3, 2))
    assert Region((), (), ()).numel == 1


def test_a_region_of_another_shape_than_the_tensors():
    with pytest.raises(ValueError, match=r"tensor's shape is \(2, 3\), its region's sizes are \(3, 2\)"):
        filled((2, 3), Normal(), region=Region((9, 9), (0, 0), (3, 2)))


@st.composite
def regions(draw, longest=6, dims=5):
    """Blocks of tensors of up to five dimensions, the empty ones and those of size one among them."""
    shape, offsets, sizes = [], [], []
    for _ in range(draw(st.integers(0, dims))):
        shape.append(draw(st.integers(0, longest)))
        offsets.append(draw(st.integers(0, shape[-1])))
        sizes.append(draw(st.integers(0, shape[-1] - offsets[-1])))
    return Region(tuple(shape), tuple(offsets), tuple(sizes))


repeatable = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@repeatable
@given(regions())
def test_runs_tile_the_block(region):
    runs = [*region.runs()]
    listed = [run.start + r * run.stride + i for run in runs for r in range(run.rows) for i in range(run.length)]
    slices = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
    assert listed == np.arange(math.prod(region.shape)).reshape(region.shape)[slices].flatten().tolist()
    assert listed == elements(region).flatten().tolist()
    assert len(runs) <= math.prod(region.sizes[:-2])  # each takes two dimensions at least


@repeatable
@given(regions(longest=7), st.sampled_from([*DISTRIBUTIONS.values()]), st.sampled_from(REAL))
def test_filling_a_region_is_slicing_the_whole(region, distribution, dtype):
    full = filled(region.shape, distribution, dtype)
    slices = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
    assert torch.equal(filled(region.sizes, distribution, dtype, region=region), full[slices])


@repeatable
@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), st.integers(1, 30), st.integers(0, 1))
def test_uneven_shards_make_up_the_whole(sizes, across, dim):
    shape, total = [across, across], sum(sizes)
    shape[dim] = total
    full = filled(shape, Normal())
    parts = []
    for i, size in enumerate(sizes):
        region = whole(shape).narrow(dim, sum(sizes[:i]), size)
        parts.append(filled(region.sizes, Normal(), region=region))
    assert torch.equal(torch.cat(parts, dim), full)


# ---------------------------------------------------------------------------------------------------------------
# Tensors


def test_strides_do_not_matter(backend):
    """By name what the random cases meet by chance."""
    expected = filled((2, 3, 4, 5), Normal())
    images = torch.empty(2, 3, 4, 5, memory_format=torch.channels_last)
    transposed = poisoned(5, 4, 3, 2).permute(3, 2, 1, 0)
    stepped = poisoned(4, 9, 4, 20)[::2, 1::3, :, 3::4]
    for x in (images, transposed, stepped):
        assert not x.is_contiguous()
        fill_([Draw(x, Normal(), KEY)])
        assert torch.equal(x, expected)


def test_lazy_views_of_complex_tensors(backend):
    expected = filled((6, 4), Normal(), torch.complex64)
    z = torch.empty(6, 4, dtype=torch.complex64)
    fill_([Draw(z.conj(), Normal(), KEY)])
    assert torch.equal(z.conj(), expected)
    fill_([Draw(z.conj().imag, Normal(), KEY)])  # strided, and negated on the way
    assert torch.equal(-z.imag, filled((6, 4), Normal()))


def test_scalars_and_empty_tensors(backend):
    for region in (None, whole(())):
        assert torch.equal(filled((), Normal(), region=region), filled((1,), Normal())[0])
    for shape in [(0,), (3, 0), (0, 3, 2)]:
        filled(shape, Normal())
        filled(shape, Normal(), region=whole(shape))


@pytest.mark.parametrize(
    ("size", "stride"),
    [((3, 4), (0, 1)), ((4,), (0,)), ((3, 3), (1, 1)), ((3, 4), (2, 1)), ((4, 3), (2, 3)), ((2, 2, 2), (1, 2, 3))],
)
@pytest.mark.parametrize("distribution", [Normal(), Uniform(), Constant(1.0)], ids=str)
def test_a_tensor_that_overlaps_itself(distribution, size, stride):
    x = poisoned(40).as_strided(size, stride)
    with pytest.raises(RuntimeError, match=r"overlaps itself: more than one .* clone\(\) it") as raised:
        fill_([Draw(x, distribution, KEY)])
    assert f"shape {size} and strides {stride}" in str(raised.value)
    assert x.isnan().all()


@pytest.mark.parametrize(
    ("size", "stride"),
    [((3, 2), (2, 3)), ((2, 3), (3, 2)), ((4, 3), (3, 4)), ((1, 4), (0, 1)), ((2, 2, 2), (1, 2, 4)), ((5, 2), (2, 5))],
)
def test_strides_that_interleave_without_meeting(backend, size, stride):
    buffer = poisoned(40)
    x = buffer.as_strided(size, stride)
    fill_([Draw(x, Normal(), KEY)])
    assert torch.equal(x, filled(size, Normal()))
    assert buffer.isnan().sum() == 40 - math.prod(size)


@pytest.mark.parametrize("seed", range(5))
def test_overlap_is_decided_exactly(seed):
    rng = random.Random(seed)
    for _ in range(200):
        dims = rng.randint(1, 4)
        size, stride = [rng.randint(1, 4) for _ in range(dims)], [rng.randint(0, 9) for _ in range(dims)]
        places = [sum(i * s for i, s in zip(index, stride, strict=True)) for index in np.ndindex(*size)]
        assert _memory.overlaps_itself(poisoned(128).as_strided(size, stride)) == (len({*places}) < len(places))


LAYOUTS = [None, lambda x: x.t(), lambda x: x[:, ::2]]


@pytest.mark.parametrize("view", LAYOUTS)
@pytest.mark.parametrize(
    "distribution", [Normal(), Uniform(), Uniform(1.0, 1.0), TruncatedNormal(), Constant(2.0)], ids=str
)
def test_autograd_sees_a_change_and_records_nothing(backend, distribution, view):
    base = torch.ones(4, 6, requires_grad=True)
    x = view(base.detach()) if view else base
    loss = (base**2).sum()
    before = base._version
    fill_([Draw(x, distribution, KEY)])
    assert base._version > before
    assert base.requires_grad
    assert base.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_view_of_a_leaf_is_filled_in_place(backend):
    weight = torch.nn.Parameter(poisoned(4, 6))
    fill_([Draw(weight, Normal(), KEY), Draw(weight[:, :3], Normal(), KEY), Draw(weight[3], Constant(2.0))])
    assert weight.is_leaf
    assert weight.grad_fn is None
    assert torch.equal(weight[:3, :3], filled((4, 3), Normal())[:3])
    assert torch.equal(weight[:3, 3:], filled((4, 6), Normal())[:3, 3:])


@pytest.mark.parametrize("view", LAYOUTS)
def test_inference_tensors(backend, view):
    with torch.inference_mode():
        x = torch.ones(4, 6)
        x = view(x) if view else x
    for distribution in (Normal(), Constant(2.0)):
        with pytest.raises(RuntimeError, match=r"outside InferenceMode .*; fill it inside torch\.inference_mode"):
            fill_([Draw(x, distribution, KEY)])
        assert torch.all(x == 1)
    with torch.inference_mode():
        fill_([Draw(x, Normal(), KEY)])
    assert torch.equal(x, filled(x.shape, Normal()))


@pytest.mark.parametrize("view", LAYOUTS)
def test_other_tensors_inside_inference_mode(backend, view):
    base = poisoned(4, 6)
    x = view(base) if view else base
    with torch.inference_mode():
        fill_([Draw(x, Normal(), KEY)])
    assert base._version > 0
    assert torch.equal(x, filled(x.shape, Normal()))


OVERLAPPING = torch.zeros(1).expand(4)
BAD = {
    "key": Draw(torch.zeros(3), Normal(), -1),
    "region": Draw(torch.zeros(3), Normal(), 0, Region((9,), (0,), (4,))),
    "dtype": Draw(torch.zeros(3, dtype=torch.int32), Normal()),
    "overlap": Draw(OVERLAPPING, Constant(1.0)),
    "sparse": Draw(torch.zeros(3).to_sparse(), Normal()),
    "range": Draw(torch.zeros(3, dtype=torch.float16), Uniform(0.0, 1e5)),
    "constant too large": Draw(torch.zeros(3, dtype=torch.int8), Constant(300.0)),
    "complex constant": Draw(torch.zeros(3), Constant(1j)),
    "meta dtype": Draw(torch.zeros(3, dtype=torch.int32, device="meta"), Uniform()),
    "element numbers": Draw(torch.zeros(1, 3), Normal(), 0, Region((2**40, 2**40), (2**39, 5), (1, 3))),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_nothing_is_written_when_a_later_draw_is_bad(backend, bad):
    good = [poisoned(3), poisoned(4, 3).t()]
    with pytest.raises((RuntimeError, ValueError, OverflowError)):
        fill_([*(Draw(x, Normal(), KEY) for x in good), bad])
    assert all(x.isnan().all() for x in good)


def test_draws_may_come_from_a_generator(backend):
    tensors = [poisoned(n) for n in range(4)]
    fill_(Draw(x, distribution, KEY) for x, distribution in zip(tensors, DISTRIBUTIONS.values(), strict=False))
    for x, distribution in zip(tensors, DISTRIBUTIONS.values(), strict=False):
        assert torch.equal(x, filled(x.shape, distribution))
    fill_([])


@every_distribution
def test_meta_tensors_are_left_alone(backend, distribution):
    x = torch.empty(3, 4, device="meta")
    fill_(
        [
            Draw(x, distribution, KEY),
            Draw(x.t(), distribution, KEY),
            Draw(torch.empty(10**6, 10**6, device="meta"), distribution, KEY),
        ]
    )


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("distribution", [Normal(), Constant(1.0)], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_layouts(distribution, layout):
    with pytest.raises(NotImplementedError, match=rf"layout {layout}; fill its dense values"):
        fill_([Draw(torch.eye(3).to_sparse(layout=layout), distribution, KEY)])


def test_tensors_that_wrap_others():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner, context, size, stride):
            return Wrapper(inner["inner"])

        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
            raise AssertionError(f"{function} should not be reached")

    inner = poisoned(3)
    with pytest.raises(NotImplementedError, match="cannot fill a Wrapper, which wraps other tensors; fill those"):
        fill_([Draw(Wrapper(inner), Normal(), KEY)])
    assert inner.isnan().all()


def test_fake_tensors_are_left_alone(backend):
    with FakeTensorMode():
        x = torch.empty(3)
    fill_([Draw(x, Normal(), KEY)])


@pytest.mark.parametrize("distribution", [Normal(), Constant(1.0)], ids=str)
def test_a_tensor_whose_storage_was_freed(backend, distribution):
    """Writing to it ended the process."""
    for size, view in ((0, lambda x: x), (0, lambda x: x[3:]), (8, lambda x: x), (0, lambda x: x.view(2, 5).t())):
        storage, good = torch.ones(10), poisoned(3)
        x = view(storage)
        storage.untyped_storage().resize_(size)
        with pytest.raises(RuntimeError, match=r"freed or resized.*fill it while its storage is there"):
            fill_([Draw(good, Normal(), KEY), Draw(x, distribution, KEY)])
        assert good.isnan().all()


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize])
def test_a_tensor_without_memory_of_its_own(serving, transform):
    """Inside a function transform. Writing to the address it gives, 0, would end the process."""

    def fill_and_sum(x):
        fill_([Draw(x, Normal(), KEY)])
        return x.sum()

    x = torch.zeros(3)
    with serving("numba"), pytest.raises(RuntimeError, match=r"no memory of its own|doesn't have storage"):
        transform(fill_and_sum)(x)
    assert torch.all(x == 0)


@pytest.mark.parametrize("distribution", [Constant(2.0), Uniform(2.0, 2.0)])
def test_a_constant_is_torchs_to_write_where_torch_follows(backend, distribution):
    """Inside a function transform, and for a dispatch mode: neither sees what compiled code writes."""

    def filled_twice(x):
        fill_([Draw(y := x.clone(), distribution, KEY)])
        return y * 2

    assert torch.equal(torch.func.functionalize(filled_twice)(torch.zeros(3)), torch.full((3,), 4.0))

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names, x = [], poisoned(3)
    with Names():
        fill_([Draw(x, distribution, KEY)])
    assert names == ["aten.fill_.Scalar"]
    assert torch.all(x == 2)


# ---------------------------------------------------------------------------------------------------------------
# Large

LARGE = 4 * 10**9
LARGE_SCRIPT = textwrap.dedent("""
    import torch
    from initlab.kernels import Draw, Normal, Region, TruncatedNormal, Uniform, fill_
    from initlab.kernels import backends

    DISTRIBUTIONS = [Uniform(), Normal(0.0, 0.02), TruncatedNormal(0.0, 0.02), TruncatedNormal()]
    KEY, N = 0x9E3779B97F4A7C15, {n}
    small = torch.empty(1000, dtype=torch.bfloat16)
    for distribution in DISTRIBUTIONS:
        fill_([Draw(small, distribution, KEY)])

    def peak():
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    before = peak()
    x = torch.empty(N, dtype=torch.bfloat16)
    for distribution in DISTRIBUTIONS:
        x.view(torch.int16)[-1] = 0x7FC0
        fill_([Draw(x, distribution, KEY)])
        for name in ("torch", "numba"):
            backends.requested = lambda: name
            for start in (0, N // 2 + 1, 2**31 - 500, 2**32 - 500, N - 1000):
                start = min(start, N - 1000)
                fill_([Draw(small, distribution, KEY, Region((N,), (start,), (1000,)))])
                assert torch.equal(small, x[start : start + 1000]), (distribution, name, start)
        backends.requested = lambda: "auto"
    print(peak() - before - 2 * N)
""")


def free_memory():
    if not os.path.exists("/proc/meminfo"):
        return 0
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.large
def test_four_billion_elements(python):
    pytest.importorskip("numba")
    if free_memory() < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    extra = int(python(LARGE_SCRIPT.format(n=LARGE), timeout=600))
    assert extra < 64 * 2**20  # beyond the tensor itself: the threads' stacks, not a copy of anything
