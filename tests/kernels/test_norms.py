"""kernels/norms.py on every backend: norms against float64 (and exact) arithmetic, scaling, flags, odd tensors."""

import concurrent.futures
import ctypes
import hashlib
import itertools
import math
import multiprocessing
import os
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from initlab.kernels import TensorGroups, clip_, clip_coefficient, combine_norms, grad_norm, nonfinite_flag, norms

BACKENDS = pytest.mark.parametrize("backend", ["torch", "numba", "triton"], indirect=True)
_TRITON_IS_LONG = pytest.mark.long_if.with_args(lambda backend: backend == "triton")  # in its interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Sums of squares are within n * 2^-53 in float64; up to 8 of them in float32 give 4 * 2^-24 in the worst case, half of
# it in the norm, and rounding the norm to float32 half a unit more: below 2.4e-7. The bound is 1e-6.
TOLERANCE = 1e-6

# The interpreter squares in numpy, which warns where a GPU says nothing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:underflow encountered:RuntimeWarning"),
]


def exact_norm(tensors):
    """The 2-norm by scaling with a power of two and summing in extended precision: numpy, no code of ours."""
    parts = [t.detach().reshape(-1) for t in tensors]
    parts = [torch.view_as_real(t).reshape(-1) if t.is_complex() else t for t in parts]
    flat = torch.cat([t.double() for t in parts]).numpy() if parts else np.zeros(0)
    largest = np.abs(flat).max(initial=0.0)
    if largest == 0.0:
        return 0.0
    shift = -math.frexp(largest)[1]
    scaled = np.ldexp(flat, shift).astype(np.longdouble)
    root = math.sqrt(float((scaled * scaled).sum()))
    # A Fraction holds it also where float64 does not.
    return Fraction(root) / (Fraction(2) ** shift)


def close(value, exact, tolerance=TOLERANCE):
    return exact == value or abs(Fraction(value) / Fraction(exact) - 1) <= tolerance


@BACKENDS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
def test_the_norm_is_the_true_one(backend, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(n, dtype=torch.float64).to(dtype) for n in (1, 7, 0, 4095, 4096, 4097, 9000, 2)]
    tensors.append(torch.randn(3, 5, 7).to(dtype))
    found = grad_norm(tensors)
    assert close(float(found.norm), exact_norm(tensors))
    assert found.norm.dtype == (torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32)
    assert found.norm.shape == ()
    assert close(float(found.sum_of_powers), exact_norm(tensors) ** 2, 2 * TOLERANCE)
    assert (int(found.flag), int(found.first_nonfinite_index)) == (0, -1)


@BACKENDS
def test_dtypes_mix(backend):
    torch.manual_seed(0)
    tensors = [torch.randn(100).to(dtype) for dtype in (*DTYPES, torch.complex64, *DTYPES)]
    found = grad_norm(tensors)
    assert found.norm.dtype == torch.float64
    assert close(float(found.norm), exact_norm(tensors))
    narrow = [t for t in tensors if t.dtype not in (torch.float64, torch.complex128)]
    assert grad_norm(narrow).norm.dtype == torch.float32


@BACKENDS
@pytest.mark.parametrize("small", [1e-200, 1e-300, 0.0, 1e200])
def test_float64_that_needs_a_rescan_beside_others(backend, small):
    tensors = [torch.tensor([3.0]), torch.tensor([small], dtype=torch.float64), torch.tensor([4.0]).half()]
    assert close(float(grad_norm(tensors).norm), exact_norm(tensors), 1e-14)


@_TRITON_IS_LONG
@BACKENDS
def test_the_first_bad_tensor_of_several_dtypes(backend):
    """Whichever dtype is read first."""
    for first, second in itertools.permutations((torch.float32, torch.bfloat16, torch.float16, torch.float64), 2):
        tensors = [torch.ones(3, dtype=d) for d in (second, first, second, first)]
        tensors[1][2], tensors[2][0] = math.inf, math.nan
        assert (int(grad_norm(tensors).flag), int(grad_norm(tensors).first_nonfinite_index)) == (3, 1)


# Largest and smallest exponents of two at which a norm of a few thousand such elements still fits the dtype.
REACH = {
    torch.float32: (-149, 121),
    torch.bfloat16: (-133, 121),
    torch.float16: (-24, 15),
    torch.float64: (-1074, 1015),
}


@pytest.mark.long_if.with_args(lambda backend, dtype: backend == "triton" and dtype != torch.bfloat16)
@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_from_the_smallest_subnormal_to_the_largest(backend, dtype):
    torch.manual_seed(1)
    low, high = REACH[dtype]
    for exponent in sorted({*range(low, high, 61 if dtype == torch.float64 else 13), low, high}):
        tensors = [torch.ldexp(torch.rand(n, dtype=torch.float64) + 0.5, torch.tensor(float(exponent))).to(dtype)
                   for n in (33, 1000)]  # fmt: skip
        found = grad_norm(tensors)
        exact = exact_norm(tensors)
        # Below the normal range the norm itself is rounded to a multiple of the smallest subnormal.
        smallest = 2.0**-1074 if dtype == torch.float64 else 2.0**-149
        assert abs(Fraction(float(found.norm)) - exact) <= exact / 10**6 + Fraction(smallest), exponent
        assert int(found.flag) == 0


@BACKENDS
def test_big_middling_and_tiny_float64_in_one(backend):
    mixtures = ([1e300, 1e-300, 1.0], [1e-170, 2e-160, 3e-155], [1e160, 1e150, 1e140], [1e-320, 1e-310])
    for values in (*mixtures, [2.0**-511, 2.0**-512], [1.01 * 2.0**486, 0.99 * 2.0**486]):
        tensors = [torch.tensor([x], dtype=torch.float64) for x in values]
        assert close(float(grad_norm(tensors).norm), exact_norm(tensors), 1e-14), values


@BACKENDS
def test_a_norm_beyond_float32_is_kept_in_norm64(backend):
    tensors = [torch.full((1000,), 3e38)]
    found = grad_norm(tensors)
    assert float(found.norm) == math.inf
    assert close(float(found.norm64), exact_norm(tensors))
    assert int(found.flag) == 0
    clip_(tensors, found.norm64, 1.0)
    assert close(float(grad_norm(tensors).norm), 1.0)


@BACKENDS
@pytest.mark.parametrize("p", [1.0, 0.5, 1.5, 3.0, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_other_norms_are_torchs(backend, p, dtype):
    if dtype.is_complex and p == 0.0:
        pytest.skip("torch itself warns that it drops imaginary parts")
    torch.manual_seed(2)
    tensors = [torch.randn(n).to(dtype) for n in (3, 50, 1)]
    wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]
    expected = torch.nn.utils.get_total_norm(wide, p, foreach=False)
    found = grad_norm(tensors, p)
    assert float(found.norm) == pytest.approx(float(expected), rel=1e-6)
    if not math.isinf(p) and p != 0.0:
        assert float(found.sum_of_powers) == pytest.approx(float(expected) ** p, rel=1e-6)
    tensors[1][7] = float("nan")
    assert (int(grad_norm(tensors, p).flag), int(grad_norm(tensors, p).first_nonfinite_index)) == (1, 1)


@BACKENDS
def test_other_norms_of_huge_values(backend):
    x = torch.full((4,), 1e300, dtype=torch.float64)
    assert float(grad_norm([x], 3.0).norm) == pytest.approx(4 ** (1 / 3) * 1e300)


@BACKENDS
def test_nothing(backend):
    for tensors in ([], [torch.empty(0)], [torch.empty(0, 3), torch.empty(0)], [torch.zeros(5)]):
        found = grad_norm(tensors)
        assert (float(found.norm), int(found.flag), int(found.first_nonfinite_index)) == (0.0, 0, -1)
        clip_(tensors, found.norm64, 1.0)


def test_combine_norms_is_the_norm_of_the_whole():
    torch.manual_seed(7)
    parts = [torch.randn(n, dtype=torch.float64) for n in (3, 50, 1, 8)]
    for p in (1.0, 1.5, 2.0, 3.0, -1.0, math.inf, -math.inf):
        combined = combine_norms(torch.stack([grad_norm([x], p).norm64 for x in parts]), p)
        assert float(combined) == pytest.approx(float(torch.cat(parts).norm(p)), rel=1e-14)
    assert float(combine_norms(torch.tensor([2.0, 0.0, 3.0]), 0.0)) == 5.0  # counts add up
    assert float(combine_norms(torch.tensor([3e200, 4e200], dtype=torch.float64))) == pytest.approx(5e200, rel=1e-14)
    assert float(combine_norms(torch.tensor([3e-200, 4e-200], dtype=torch.float64))) == pytest.approx(5e-200, rel=1e-14)
    assert float(combine_norms(torch.tensor([math.inf, 1.0]))) == math.inf
    assert math.isnan(float(combine_norms(torch.tensor([math.inf, math.nan]))))
    single = torch.tensor([0.1], dtype=torch.float64)
    assert torch.equal(combine_norms(single), single[0])
    assert float(combine_norms(torch.empty(0, dtype=torch.float64))) == 0.0


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.0, math.inf, -math.inf])
def test_groups_on_several_devices_combine(p):
    """The merger that several devices need, on the parts of one: there is one device to test on."""
    torch.manual_seed(8)
    tensors = [torch.randn(5), torch.zeros(3), torch.randn(9, dtype=torch.float64), torch.ones(2)]
    groups = [norms.TensorGroups(tensors[i : i + 2], [i, i + 1]).groups[0] for i in (0, 2)]
    combined = norms._combine_groups([norms._group_norm(group, p, True) for group in groups], p)
    whole = grad_norm(tensors, p)
    assert float(combined.norm64) == pytest.approx(float(whole.norm64), rel=1e-14)
    assert float(combined.sum_of_powers) == pytest.approx(float(whole.sum_of_powers), rel=1e-6)
    tensors[3][0] = math.inf
    combined = norms._combine_groups([norms._group_norm(group, p, True) for group in groups], p)
    assert (int(combined.flag), int(combined.first_nonfinite_index)) == (2, 3)


BAD = {math.nan: 1, math.inf: 2, -math.inf: 4}


@pytest.mark.long_if.with_args(lambda backend, dtype: backend == "triton" and dtype != torch.float32)
@BACKENDS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_planted_values_are_found_wherever_they_are(backend, dtype):
    torch.manual_seed(3)
    sizes = (5, 4096, 4097, 8200)
    for value, flag in BAD.items():
        for i, n in enumerate(sizes):
            for place in sorted({0, n // 2, n - 1, min(n - 1, 4095), min(n - 1, 4096)}):
                if backend == "triton" and (place + i + flag) % 3:
                    continue  # the interpreter is slow: a third of the places, other ones for each value
                tensors = [torch.randn(m).to(dtype) for m in sizes]
                tensors[i][place] = value
                found = grad_norm(tensors)
                assert (int(found.flag), int(found.first_nonfinite_index)) == (flag, i), (value, n, place)
                assert math.isnan(float(found.norm)) if flag == 1 else float(found.norm) == math.inf
    tensors = [torch.randn(m).to(dtype) for m in sizes]
    tensors[1][9], tensors[3][8199], tensors[2][0] = -math.inf, math.nan, math.inf
    found = grad_norm(TensorGroups(tensors, [10, 20, 30, 40]))
    assert (int(found.flag), int(found.first_nonfinite_index)) == (7, 20)
    assert math.isnan(float(found.norm))


def test_the_flag_of_a_tensor():
    for dtype in DTYPES:
        for values, flag in (([0.0, 1.0], 0), ([math.nan, -math.inf], 5), ([math.inf], 2), ([], 0)):
            assert int(nonfinite_flag(torch.tensor(values, dtype=dtype))) == flag
    assert int(nonfinite_flag(torch.tensor([complex(1, math.nan), complex(-math.inf, 0)]))) == 5
    assert int(nonfinite_flag(torch.tensor([1, 2]))) == 0


@BACKENDS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
def test_every_element_is_scaled_by_one_factor(backend, dtype, bits):
    torch.manual_seed(4)
    tensors = [torch.randn(n).to(dtype) for n in (1, 5, 4096, 4099, 3 * 4096 + 1)]
    before = [t.clone() for t in tensors]
    c = 0.37 / (2.5 + 1e-6)
    clip_(tensors, torch.tensor(2.5, dtype=torch.float64), 0.37)
    for x, y in zip(before, tensors, strict=True):
        real = torch.view_as_real(x) if x.is_complex() else x
        wide = torch.float64 if real.dtype == torch.float64 else torch.float32
        expected = (real.to(wide) * torch.tensor(c, dtype=wide)).to(real.dtype)  # rounded once
        expected = torch.view_as_complex(expected) if x.is_complex() else expected
        assert torch.equal(bits(y), bits(expected))


@BACKENDS
def test_backends_round_as_torch_does(backend, bits):
    """All float16 and bfloat16 numbers, scaled: subnormals and signed zeros included."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype)
        every = every[every.isfinite()]
        for c in (0.7, 2.0**-9, 1e-6):
            x = every.clone()
            clip_([x], torch.tensor(1.0, dtype=torch.float64) - 1e-6, c)
            assert torch.equal(bits(x), bits((every.float() * torch.tensor(c)).to(dtype)))


@BACKENDS
@pytest.mark.parametrize("c", [5e-40, 3e-46, 2.0**-100, 2.0**-163.5, 2.0**-165, 2.1e-58, 1e-70])
def test_a_tiny_coefficient_loses_no_digits(backend, c):
    start = torch.tensor([1e38, -3e38, 2e37, 6e33, 1.0, 1e-20])
    x = start.clone()
    clip_([x], torch.tensor(1.0 - 1e-6, dtype=torch.float64), c)
    torch.testing.assert_close(x.double(), start.double() * c, rtol=2e-7, atol=2.0**-149)


@BACKENDS
def test_nothing_is_written_below_the_largest_norm(backend, bits):
    x = torch.tensor([1e-45, -0.0, math.nan, 3.0])
    for norm in (0.0, 1.0, 2.0 - 2e-6):
        before, version = bits(x), x._version
        clip_([x], torch.tensor(norm, dtype=torch.float64), 2.0)
        assert torch.equal(bits(x), before)
        assert backend == "triton" or x._version == version
    clip_([x], torch.tensor(4.0), 2.0)
    assert x._version > version


@BACKENDS
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_policies(backend, norm, bits):
    start = [torch.tensor([1.0, math.inf, math.nan, -2.0]), torch.ones(5000, dtype=torch.bfloat16),
             torch.ones(3, dtype=torch.float16), torch.ones(4, 4, dtype=torch.float64).t()]  # fmt: skip
    left = [t.clone() for t in start]
    clip_(left, torch.tensor(norm), 1.0, nonfinite="keep")
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(left, start, strict=True))
    zeroed = [t.clone() for t in start]
    clip_(zeroed, torch.tensor(norm), 1.0, nonfinite="zero")
    assert all(bool((x == 0).all()) for x in zeroed)
    propagated = [t.clone() for t in start]
    clip_(propagated, torch.tensor(norm), 1.0)
    expected = [t * (1.0 / (norm + 1e-6)) for t in start]  # NaN, or 0 * inf = NaN
    assert all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(propagated, expected, strict=True))
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(propagated, expected, strict=True))
    with pytest.raises(ValueError, match="propagate, keep, zero"):
        clip_(start, torch.tensor(1.0), 1.0, nonfinite="ignore")


@BACKENDS
def test_odd_memory(backend):
    """Views that fill memory are taken as they lie, others are left to torch; what is around them stays."""
    torch.manual_seed(5)
    base = torch.randn(40, 50)
    views = {
        "transposed": base.clone().t(),
        "channels last": torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
        "every other": base.clone()[:, ::2],
        "inside": base.clone()[3:9, 5:11],
        "unaligned": base.clone().view(-1)[3:1001],
        "unaligned bf16": base.bfloat16().view(-1)[1:],
        "0-d": torch.tensor(3.0),
        "conjugate": torch.randn(9, dtype=torch.complex64).conj(),
        "negative": torch.randn(9, dtype=torch.complex64).conj().imag,
    }
    for name, view in views.items():
        owner = view if view._base is None else view._base
        around = owner.clone()
        before = view.clone()
        found = grad_norm([view])
        assert close(float(found.norm), exact_norm([before.resolve_conj().resolve_neg()])), name
        clip_([view], found.norm64, float(found.norm64) / 2)
        torch.testing.assert_close(view, before / 2, rtol=1e-2 if view.dtype == torch.bfloat16 else 2e-6, atol=0)
        if owner is not view and not owner.is_complex():
            changed = torch.view_as_real(owner) != torch.view_as_real(around) if owner.is_complex() else owner != around
            assert int(changed.sum()) == view.numel(), name


@BACKENDS
def test_a_tensor_given_twice_counts_and_scales_twice(backend):
    for second in (lambda x: x, lambda x: x[2:]):
        x, y = torch.ones(6), torch.ones(6)
        a, b = [x, second(x)], [y, second(y)]
        found = grad_norm(a)
        assert close(float(found.norm), exact_norm(b))
        clip_(a, found.norm64, 1.0)
        c = float(clip_coefficient(found.norm64, 1.0))
        for t in b:
            t.mul_(c)
        torch.testing.assert_close(x, y)


@BACKENDS
def test_expanded_gradients_are_refused_by_torch_as_ever(backend):
    x = torch.ones(1).expand(5)
    assert close(float(grad_norm([x]).norm), Fraction(math.sqrt(5)))
    with pytest.raises(RuntimeError, match="single memory location"):
        clip_([x], torch.tensor(5.0), 1.0)
    assert float(x[0]) == 1.0


@BACKENDS
def test_clipping_that_torch_would_refuse_half_way_writes_nothing(backend):
    """An expanded tensor, and one of float8, after another that could be scaled."""
    x, expanded, float8 = torch.ones(5), torch.ones(1).expand(5), torch.ones(3).to(torch.float8_e5m2)
    with pytest.raises(RuntimeError, match=r"shape \(5,\) and strides \(0,\) .*single memory location"):
        clip_([x, expanded], torch.tensor(5.0), 1.0)
    with pytest.raises(NotImplementedError, match=r"tensor 1 has dtype torch\.float8_e5m2"):
        clip_([x, float8], torch.tensor(5.0), 1.0)
    assert x.tolist() == [1.0] * 5
    assert close(float(grad_norm([x, float8]).norm), Fraction(math.sqrt(8)))
    if backend != "triton":  # which reads no norm on the host
        clip_([x, expanded], torch.tensor(0.5), 1.0)
        clip_([x, expanded], torch.tensor(math.nan), 1.0, nonfinite="keep")
    assert x.tolist() == [1.0] * 5


@BACKENDS
def test_freed_memory_is_refused(backend):
    """Reading it would end the process."""
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    for call in (lambda x: grad_norm(x), lambda x: clip_(x, torch.tensor(5.0), 1.0)):
        x = torch.ones(2)
        with pytest.raises(RuntimeError, match=r"shape \(3,\) has no memory: its storage was freed"):
            call([x, freed])
        assert x.tolist() == [1.0, 1.0]


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse .* is in beta state:UserWarning")
def test_tensors_of_other_kinds_are_refused_before_a_write():
    x, y = torch.ones(2, 2), torch.ones(2, 2)
    kinds = {
        NotImplementedError: [y.to_sparse(), y.to_sparse_csr(), y.to_mkldnn()],
        RuntimeError: [torch.quantize_per_tensor(y, 0.1, 0, dtype) for dtype in (torch.quint8, torch.qint32)],
    }
    for error, tensors in kinds.items():
        for t in tensors:
            with pytest.raises(error, match="tensor 1 of shape"):
                grad_norm([x, t])
            with pytest.raises(error, match="tensor 1 of shape"):
                clip_([x, t], torch.tensor(5.0), 1.0)
    assert x.tolist() == y.tolist()


@BACKENDS
def test_inference_tensors(backend):
    with torch.inference_mode():
        x = torch.ones(4)
        clip_([x], grad_norm([x]).norm64, 1.0)
        assert x.tolist() == pytest.approx([0.5] * 4)
    with pytest.raises(RuntimeError, match="inference"):
        clip_([torch.ones(4), x], torch.tensor(5.0), 1.0)
    assert x.tolist() == pytest.approx([0.5] * 4)


def test_what_is_refused():
    with pytest.raises(RuntimeError, match=r"tensor 1 of shape \(3,\) has dtype torch.int64"):
        grad_norm([torch.ones(1), torch.arange(3)])
    with pytest.raises(NotImplementedError, match=r"tensor 0 .*sparse_coo"):
        clip_([torch.eye(3).to_sparse()], torch.tensor(1.0), 1.0)


def test_meta_tensors_give_meta_results():
    found = grad_norm([torch.empty(3, device="meta")])
    assert found.norm.is_meta
    clip_([torch.empty(3, device="meta")], found.norm64, 1.0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def common():
    """What the CPU backends share; the OpenMP that torch runs on can be taken away there."""
    pytest.importorskip("numba")
    from initlab.kernels import _common_numba

    return _common_numba


def clipped_digest(tensors):
    """Norm and clipped values, to the bit."""
    copies = [torch.from_numpy(t.numpy().copy()) for t in tensors]  # torch's own copy hangs in a forked child
    found = grad_norm(copies)
    clip_(copies, found.norm64, 1.0)
    return float(found.norm64), hashlib.sha256(b"".join(t.numpy().tobytes() for t in copies)).hexdigest()


def several_tensors():
    generator = torch.Generator().manual_seed(6)
    sizes = (3_000_001, 5, 700_000, 1 << 20, *[1000] * 500)
    return [torch.randn(n, generator=generator) for n in sizes] + [torch.full((400_000,), 1e200, dtype=torch.float64)]


def test_equal_bits_for_any_number_of_threads(serving, threads, common, monkeypatch):
    """On torch's own threads, and on the pool."""
    tensors = several_tensors()
    with serving("numba"):
        seen = set()
        for openmp in (common._openmp, None):
            monkeypatch.setattr(common, "_openmp", openmp)
            for n in (1, 2, 3, 7, 2, 1):
                threads(n)
                seen.add(clipped_digest(tensors))
        assert len(seen) == 1


def test_threads_that_never_get_to_run_are_not_waited_for(serving, threads, common, monkeypatch):
    """Of the pool: the thread that calls takes every block that no other one claims."""

    class Never:
        def submit(self, work):
            return concurrent.futures.Future()  # nobody will run it; it can be cancelled

    monkeypatch.setattr(common, "_openmp", None)
    monkeypatch.setattr(common, "_shared_pool", Never)
    with serving("numba"):
        threads(4)
        x = torch.full((1_000_001,), 2.0)
        assert float(grad_norm([x]).norm) == pytest.approx(2 * 1_000_001**0.5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP is that of torch on Linux alone")
def test_on_the_threads_that_torch_has_already(serving, threads, common, monkeypatch):
    """A job runs once on each of them, and none are added. The pool adds its own."""
    if not torch.backends.openmp.is_available():
        pytest.skip("this torch has no OpenMP")
    assert common._openmp is not None

    from numba import cfunc

    claim = common.claim

    @cfunc("void(intp)")
    def job(address):
        claim(address)

    x = torch.ones(3_000_000)

    def run_and_count(n):
        monkeypatch.setattr(common, "_pool", None)
        before, counter = set(os.listdir("/proc/self/task")), np.zeros(1, dtype=np.int64)
        common.run_on_all(job, counter.ctypes.data, n)
        return int(counter[0]), len(set(os.listdir("/proc/self/task")) - before)

    for n in (3, 5):
        threads(n)
        x.exp()
        assert run_and_count(n) == (n, 0)
    assert run_and_count(1) == (1, 0)
    monkeypatch.setattr(common, "_openmp", None)
    calls, new = run_and_count(3)
    assert 1 <= calls <= 3
    assert new >= 1


def test_where_torch_runs_on_no_openmp_that_can_be_called(common, monkeypatch):
    def no_library(*args, **kwargs):
        raise OSError("cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(common.ctypes, "CDLL", no_library)
        assert common._openmp_parallel() is None
    with monkeypatch.context() as patch:
        patch.setattr(common.ctypes, "CDLL", lambda *args, **kwargs: object())  # without the function
        assert common._openmp_parallel() is None
    with monkeypatch.context() as patch:
        patch.delattr(common.os, "RTLD_NOLOAD", raising=False)  # Windows
        assert common._openmp_parallel() is None
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    assert common._openmp_parallel() is None


def test_python_threads_that_clip_at_once(serving, threads, common):
    """Each has OpenMP threads of its own, as with torch's operations."""
    tensors = several_tensors()
    with serving("numba"):
        threads(2)
        expected = clipped_digest(tensors)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert set(pool.map(clipped_digest, [tensors] * 18)) == {expected}


def test_inside_a_parallel_region_of_openmp(serving, threads, common):
    """There OpenMP starts no further threads: each one that calls claims all blocks itself."""
    if common._openmp is None:
        pytest.skip("no OpenMP that can be called")
    tensors, seen = several_tensors(), []
    with serving("numba"):
        threads(2)
        expected = clipped_digest(tensors)
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: seen.append(clipped_digest(tensors)))
        common._openmp(ctypes.cast(call, ctypes.c_void_p), None, 3, 0)
    assert seen == [expected] * 3


def digest_in_child(tensors, pipe):
    pipe.send([clipped_digest(tensors) for _ in range(2)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_after_a_fork_with_openmp_alive(serving, threads, common):
    """The threads of OpenMP are gone in the child, and it would wait for them for ever."""
    tensors = [torch.full((500_000,), 0.1), torch.ones(50)]
    context = multiprocessing.get_context("fork")
    with serving("numba"):
        threads(3)
        expected = clipped_digest(tensors)
        for _ in range(2):
            ours, theirs = context.Pipe()
            child = context.Process(target=digest_in_child, args=(tensors, theirs))
            child.start()
            theirs.close()
            try:
                assert ours.poll(30), "a forked child hangs"
                assert ours.recv() == [expected] * 2
            finally:
                child.kill()
                child.join()
            assert clipped_digest(tensors) == expected  # the parent goes on


@st.composite
def gradients(draw, dtypes=tuple(DTYPES), most=300):
    """Tensors of random sizes, dtypes and magnitudes, each with its own exponent."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    sizes = draw(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 20_000)), max_size=12))
    if draw(st.integers(0, 9)) == 0:
        sizes = sizes + [draw(st.integers(0, 9))] * draw(st.integers(0, most))
    reach = draw(st.sampled_from(["even", "wild"]))
    tensors = []
    middle = None
    for n in sizes:
        dtype = draw(st.sampled_from(dtypes))
        low, high = REACH[dtype]
        low, high = max(low, -530), min(high, 530)  # 1e-160 to 1e160
        if reach == "wild" or middle is None:
            middle = draw(st.integers(low, high - 7))
        x = torch.randn(n, dtype=torch.float64, generator=generator)
        x = torch.ldexp(x, torch.tensor(float(min(max(middle, low), high - 7))))
        top = torch.finfo(dtype).max
        tensors.append(x.clamp(-top, top).to(dtype))
    return tensors


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_property_the_norm_equals_the_exact_one(backend, serving):
    with serving(backend):

        @settings(max_examples=150, deadline=None, derandomize=True, database=None)
        @given(gradients())
        def check(tensors):
            found = grad_norm(tensors)
            exact = exact_norm(tensors)
            assert abs(Fraction(float(found.norm64)) - exact) <= exact / 10**6 + Fraction(2.0**-149)
            assert int(found.flag) == 0

        check()


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_property_clipping(backend, serving):
    """After it the norm is max_norm; twice is once; one factor; every element is there."""
    with serving(backend):

        @settings(max_examples=60, deadline=None, derandomize=True, database=None)
        @given(gradients(dtypes=(torch.float32, torch.float64)), st.floats(1.0, 1e4))
        def check(tensors, max_norm):
            before = [t.clone() for t in tensors]
            found = grad_norm(tensors)
            clip_(tensors, found.norm64, max_norm)
            after = grad_norm(tensors)
            c = min(1.0, max_norm / (float(found.norm64) + 1e-6))
            if c == 1.0:
                assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
                return
            for x, y in zip(before, tensors, strict=True):
                # A product below the normal range keeps fewer digits, and its coefficient may have too.
                torch.testing.assert_close(y.double(), x.double() * c, rtol=2e-7, atol=2.0**-147)
            assert float(after.norm64) == pytest.approx(max_norm, rel=2e-6)
            once = [t.clone() for t in tensors]
            clip_(tensors, after.norm64, max_norm)
            for x, y in zip(once, tensors, strict=True):
                torch.testing.assert_close(y.double(), x.double(), rtol=2e-6, atol=2.0**-149)

        check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_million_elements_in_five_thousand_tensors(serving, dtype):
    torch.manual_seed(8)
    with serving("numba"):
        tensors = [torch.randn(n, dtype=torch.float32).to(dtype) for n in (*[900] * 4999, 5_500_000)]
        assert close(float(grad_norm(tensors).norm), exact_norm(tensors), 1e-7)
        equal = torch.full((10_000_000,), 0.1)  # where float32 sums drift
        assert close(float(grad_norm([equal]).norm), exact_norm([equal]), 1e-7)


@pytest.mark.long
def test_the_interpreted_kernels_on_random_gradients(serving):
    with serving("triton"):

        @settings(max_examples=25, deadline=None, derandomize=True, database=None)
        @given(gradients(most=20))
        def check(tensors):
            found = grad_norm(tensors)
            exact = exact_norm(tensors)
            assert abs(Fraction(float(found.norm64)) - exact) <= exact / 10**6 + Fraction(2.0**-149)
            assert int(found.flag) == 0

        check()


def test_a_table_is_made_once_for_the_same_gradients(serving, monkeypatch):
    with serving("triton"):
        from initlab.kernels import _norms_table_triton as backend

        made = []
        monkeypatch.setattr(backend, "_plans", type(backend._plans)())
        make = backend.make_plan
        monkeypatch.setattr(backend, "make_plan", lambda *given: made.append(1) or make(*given))
        tensors = [torch.randn(9), torch.randn(5000)]
        for _ in range(3):
            clip_(tensors, grad_norm(tensors).norm64, 1.0)
        assert len(made) == 1
        tensors[0] = torch.randn(9)
        assert close(float(grad_norm(tensors).norm), exact_norm(tensors))
        assert len(made) == 2
        for _ in range(2 * backend._KEPT):
            other = torch.randn(3)
            tensors.append(other)
            grad_norm([other])
        assert len(backend._plans) == backend._KEPT


def test_blocks_begin_at_multiples_of_16_bytes(serving):
    """Which the kernels tell the compiler, and the interpreter does not check."""
    with serving("triton"):
        from initlab.kernels import _norms_triton as backend

        for dtype in DTYPES:
            for offset in range(9):
                x = torch.zeros(20_000, dtype=dtype)[offset:]
                plan = backend.prepare(norms.Entries([x.data_ptr()], [x.numel()], [DTYPES.index(dtype)], [0]), x.device)
                first_item, address, begin, end, code, index, place = plan.table.view(7, 1)[:, 0].tolist()
                assert address % 16 == 0
                assert address + begin * dtype.itemsize == x.data_ptr()
                assert (first_item, end - begin, code, index, place) == (0, x.numel(), DTYPES.index(dtype), 0, 0)


def test_work_items_of_several_blocks(serving, monkeypatch):
    """Large gradients are cut into longer work items; here after a few blocks already."""
    with serving("triton"):
        from initlab.kernels import _norms_table_triton as backend

        monkeypatch.setattr(backend, "WORK_ITEMS", 2)
        monkeypatch.setattr(backend, "_plans", type(backend._plans)())
        torch.manual_seed(9)
        tensors = [torch.randn(n) for n in (4096 * 7 + 5, 3, 4096 * 2)] + [torch.randn(30_000).bfloat16()[1:]]
        tensors.append(torch.randn(9001, dtype=torch.float64))
        found = grad_norm(tensors)
        assert close(float(found.norm), exact_norm(tensors))
        before = [t.clone() for t in tensors]
        clip_(tensors, found.norm64, 1.0)
        for x, y in zip(before, tensors, strict=True):
            torch.testing.assert_close(y.double(), x.double() / float(found.norm64), rtol=5e-3, atol=1e-9)
        tensors[3][-1] = -math.inf
        assert (int(grad_norm(tensors).flag), int(grad_norm(tensors).first_nonfinite_index)) == (4, 3)


def test_scratch_and_results_may_hold_anything_before(serving, monkeypatch):
    """Scratch that starts as NaN: nothing is read that was not written."""
    with serving("triton"):
        empty = torch.empty

        def poisoned(*size, **options):
            x = empty(*size, **options)
            return x.fill_(math.nan if x.is_floating_point() else -1)

        monkeypatch.setattr(torch, "empty", poisoned)
        for values in ([3.0, 4.0], [3e30, 4e30], [3e-30, 4e-30]):
            assert float(grad_norm([torch.tensor([x]) for x in values]).norm) == pytest.approx(values[1] * 1.25)
            found = grad_norm([torch.tensor([1.0]), *[torch.tensor([x]) for x in values]], per_tensor=True)
            assert found.tensor_norms.tolist() == pytest.approx([1.0, *values])


def check_each(tensors, tolerance=TOLERANCE):
    """The norm of each tensor against the exact one; the total has the bits that it has without them."""
    found, alone = grad_norm(tensors, per_tensor=True), grad_norm(tensors)
    assert found.tensor_norms.dtype == torch.float64
    assert found.tensor_norms.shape == (len(tensors),)
    for i, (t, norm) in enumerate(zip(tensors, found.tensor_norms.tolist(), strict=True)):
        exact = exact_norm([t.resolve_conj().resolve_neg()])
        # Below the normal range of float64 a norm is a multiple of the smallest subnormal.
        assert abs(Fraction(norm) - Fraction(exact)) <= Fraction(exact) * Fraction(tolerance) + Fraction(2.0**-1074), i
    assert alone.tensor_norms is None
    for x, y in zip(found[:5], alone[:5], strict=True):
        assert torch.equal(x, y)


@BACKENDS
def test_the_norm_of_each_tensor(backend):
    torch.manual_seed(10)
    sizes = (1, 7, 0, 4095, 4097, 9000, 0)
    tensors = [torch.randn(n, dtype=torch.float64).to(d) for n in sizes for d in (*DTYPES, torch.complex64)]
    tensors += [torch.randn(9, 8).t(), torch.randn(30, 7)[:, ::2], torch.randn(40).bfloat16()[1:], torch.tensor(-3.0)]
    tensors += [torch.randn(9, dtype=torch.complex64).conj(), torch.randn(9, dtype=torch.complex64).conj().imag]
    tensors += [torch.randn(5, dtype=torch.complex128), torch.ones(1).expand(5), tensors[4]]
    check_each(tensors)
    check_each([t for t in tensors if t.numel() > 0 and t.dtype == torch.float32])
    check_each([tensors[2], torch.empty(0, 3)])


# Squares of some of these vanish or overflow in float32, or float64.
EXTREMES = [1e-25, 1e25, 0.0, 3e38, 1e-38, 1e-44, 1.0]
WIDE_EXTREMES = [1e-200, 1e200, 0.0, 1e-310, 1e-161, 1e-155, 1e154, 1e300, 1.0]


@pytest.mark.long_if.with_args(lambda backend, total: backend == "triton" and total != "small")
@BACKENDS
@pytest.mark.parametrize("total", ["sound", "small", "large"])
def test_the_norm_of_a_tensor_that_is_tiny_or_huge_beside_others(backend, total):
    """Whether or not the total calls for a rescan by itself."""
    sizes = (3, 4200) if backend == "triton" else (3, 70_000)
    narrow = [torch.full((n,), x) for x in EXTREMES for n in sizes]
    narrow += [torch.full((33,), x).bfloat16() for x in EXTREMES] + [torch.tensor([6e-8, 1e-7]).half()]
    wide = [torch.full((n,), x, dtype=torch.float64) for x in WIDE_EXTREMES for n in sizes]
    wide += [torch.tensor(x, dtype=torch.float64) for x in ([1e-200, 1e-150, 1.0], [1e300, 1e-300, 1e140], [1e-320])]
    least, most = {"sound": (0.0, 1e15), "small": (0.0, 1e-24), "large": (0.0, math.inf)}[total]
    tensors = [t for t in [*wide, *narrow] if least <= float(t.abs().max()) <= most]
    check_each(tensors)
    check_each([t for t in tensors if t.dtype != torch.float64])


@BACKENDS
def test_the_norms_of_tensors_beside_non_finite_ones(backend):
    tensors = [torch.tensor(x) for x in ([3.0, 4.0], [math.inf, 1.0], [1.0, math.nan, math.inf], [1e-25], [0.0])]
    tensors += [torch.empty(0), torch.tensor([-math.inf], dtype=torch.float64), torch.ones(4).half()]
    tensors += [torch.tensor([math.inf, math.nan], dtype=torch.float64), torch.tensor([1e-200], dtype=torch.float64)]
    tensors += [torch.tensor([1e200] * 9, dtype=torch.float64), torch.tensor([complex(math.inf, math.nan)])]
    found = grad_norm(tensors, per_tensor=True).tensor_norms
    expected = [5.0, math.inf, math.nan, 1e-25, 0.0, 0.0, math.inf, 2.0, math.nan, 1e-200, 3e200, math.nan]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0.0, equal_nan=True)


@_TRITON_IS_LONG
@pytest.mark.parametrize("backend", ["numba", "triton"], indirect=True)
def test_the_norms_of_tensors_that_are_cut(backend, monkeypatch):
    """Into work items of which some can be trusted and others cannot."""
    if backend == "triton":
        from initlab.kernels import _norms_table_triton, _norms_triton

        monkeypatch.setattr(_norms_table_triton, "_plans", type(_norms_table_triton._plans)())
        monkeypatch.setattr(_norms_table_triton, "WORK_ITEMS", 9)
        if _norms_triton.INTERPRETED:  # compiled kernels keep the values that they were compiled with
            monkeypatch.setattr(_norms_triton, "_ADD_BLOCK", type(_norms_triton._ADD_BLOCK)(2))
    n = 20_000 if backend == "triton" else 150_000
    for dtype, low, high in ((torch.float32, 1e-25, 1e25), (torch.float64, 1e-200, 1e200)):
        x, y, z, w = (torch.randn(n + i, dtype=torch.float64).to(dtype) for i in range(4))
        x[: n // 2] *= low
        y[n // 2 :] *= high
        z[: n // 3] *= low
        z[: n // 2] *= low
        check_each([x, torch.ones(5), z, w * low, x[: n // 2], torch.empty(0), w])
        check_each([x, y, z, torch.ones(5), y[: n // 2], w * high])
    x = torch.full((n,), (4 / n) ** 0.5 * 1e154, dtype=torch.float64)  # whose parts' squares overflow only when added
    check_each([torch.ones(5), x, x[: n // 4]])


@_TRITON_IS_LONG
@pytest.mark.parametrize("backend", ["numba", "triton"], indirect=True)
def test_the_norms_of_many_small_tensors(backend):
    torch.manual_seed(11)
    magnitudes = [1.0, 1e-25, 1e25, 0.0]
    check_each([torch.randn(1 + i % 3) * magnitudes[i % 4] for i in range(40 if backend == "triton" else 3000)])


def test_the_norm_of_each_tensor_has_the_same_bits_for_any_number_of_threads(serving, threads):
    torch.manual_seed(12)
    tensors = [torch.randn(n, dtype=d) for n in (1_000_001, 5, 70_000) for d in (torch.float32, torch.float64)]
    tensors.append(torch.full((400_000,), 1e-200, dtype=torch.float64))
    with serving("numba"):
        seen = set()
        for n in (1, 2, 3, 1):
            threads(n)
            seen.add(tuple(grad_norm([t.clone() for t in tensors], per_tensor=True).tensor_norms.tolist()))
        assert len(seen) == 1


def test_the_norm_of_each_tensor_is_refused_for_other_orders():
    for p in (1.0, 0.0, 3.0, math.inf):
        with pytest.raises(ValueError, match="with p = 2 alone, and norm_type is"):
            grad_norm([torch.ones(2)], p, per_tensor=True)
    found = grad_norm([], per_tensor=True)
    assert found.tensor_norms.shape == (0,)


def test_norms_from_several_devices_come_in_the_tensors_order():
    """As if there were two: there is one to test on."""
    tensors = [types.SimpleNamespace(device=d) for d in "abbab"]
    groups = types.SimpleNamespace(tensors=tensors, groups=[types.SimpleNamespace(device=d) for d in "ab"])
    parts = [types.SimpleNamespace(tensor_norms=torch.tensor(x)) for x in ([1.0, 2.0], [3.0, 4.0, 5.0])]
    assert norms._in_order(parts, groups).tolist() == [1.0, 3.0, 4.0, 2.0, 5.0]


@pytest.fixture
def launches(serving, monkeypatch):
    """The kernels that the GPU backend launches, by name, in its interpreter."""
    with serving("triton"):
        from initlab.kernels import _norms_triton as backend

        seen = []
        launch = backend._launch

        def counted(kernel, programs, *arguments, **constants):
            if programs > 0:
                seen.append(kernel.fn.__name__)
            launch(kernel, programs, *arguments, **constants)

        monkeypatch.setattr(backend, "_launch", counted)
        yield seen


def test_the_norm_of_each_tensor_takes_one_more_launch(launches):
    finish = ["finish_norm_kernel", "rescan_kernel", "finish_rescan_kernel"]
    wide = torch.ones(3, dtype=torch.float64)
    for tensors in ([torch.ones(3)], [torch.ones(3)] * 9, [torch.ones(3), wide], [torch.zeros(3), torch.empty(0)]):
        first = ["norm_kernel"] * len({t.dtype for t in tensors})
        launches.clear()
        grad_norm(tensors)
        assert launches == [*first, *finish]
        launches.clear()
        grad_norm(tensors, per_tensor=True)
        assert launches == [*first, *finish, "tensor_norms_kernel"]


@_TRITON_IS_LONG
@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_property_the_norm_of_each_tensor(backend, serving):
    with serving(backend):

        @settings(max_examples=8 if backend == "triton" else 60, deadline=None, derandomize=True, database=None)
        @given(gradients(most=20))
        def check(tensors):
            check_each(tensors)

        check()
