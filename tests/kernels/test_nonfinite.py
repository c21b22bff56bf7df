"""The non-finite flag: exact on planted values, wherever they lie, and never raised by finite ones."""

import math
import warnings

import pytest
import torch
from initlab.kernels import FlagBuffer, add_flag_, all_finite_fast, describe, nonfinite_flag, nonfinite_flag_fast
from torch import nn

VALUES = {1: math.nan, 2: math.inf, 4: -math.inf}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = (1, 2, 5, 4095, 4096, 4097, 12_305)  # around the GPU backend's block of 4,096 and CPUs' vectors


def seen_by_torch(x):
    """The flag, element by element, in float64."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    x = x.to(torch.float64)
    return sum(bit for bit, hits in ((1, x.isnan()), (2, x == math.inf), (4, x == -math.inf)) if bool(hits.any()))


@pytest.fixture(params=["exact", "fast", "into a flag", "without numba", "GPU backend"])
def flag_of(request, serving):
    """Every function that finds a flag, the Triton kernel among them: from a tensor to an int."""
    if request.param == "exact":
        yield lambda x: int(nonfinite_flag(x))
    elif request.param == "fast":
        yield lambda x: int(nonfinite_flag_fast(x))
    elif request.param == "into a flag":
        yield lambda x: int(add_flag_(torch.zeros(1, dtype=torch.int32), x))
    else:
        with serving("triton" if request.param == "GPU backend" else "torch"):
            yield lambda x: int(add_flag_(torch.zeros(1, dtype=torch.int32), x))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_planted_values(flag_of, dtype):
    for size in SIZES:
        clean = torch.randn(size).to(dtype)
        assert flag_of(clean) == 0
        for place in {0, size // 2, size * 3 // 4, size - 1}:
            for bit, value in VALUES.items():
                planted = clean.clone()
                planted[place] = value
                assert flag_of(planted) == bit
        if size > 2:
            for flag in (3, 5, 6, 7):
                planted, places = clean.clone(), iter((size - 1, 0, size // 2))
                for bit, value in VALUES.items():
                    if flag & bit:
                        planted[next(places)] = value
                assert flag_of(planted) == flag


def test_nans_of_any_bits(flag_of):
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    for pattern in bits:
        assert flag_of(torch.cat([torch.zeros(3), pattern.view(1).view(torch.float32)])) == 1


@pytest.mark.parametrize(
    "shaped",
    [
        lambda x: x.view(8, 64, 5, 5).to(memory_format=torch.channels_last),
        lambda x: x.view(100, 128).t(),
        lambda x: x.view(100, 128)[:, 3:77],
        lambda x: x.view(100, 128)[::7, ::3],
        lambda x: x.view(100, 128)[3],
        lambda x: x[1:],  # not aligned
        lambda x: x[:50].view(50, 1).expand(50, 90),
        lambda x: x.view(2, 6400).transpose(0, 1).unsqueeze(1),
        lambda x: torch.complex(x[:6400], x[6400:]).conj(),
        lambda x: x.clone().requires_grad_() * 1,
        lambda x: nn.Parameter(x),
    ],
)
def test_shapes_and_strides(flag_of, shaped):
    x = shaped(torch.randn(12_800))
    assert flag_of(x) == 0
    flat = x.detach()
    for at in ((0,) * x.dim(), tuple(size - 1 for size in x.shape)):
        for bit, value in VALUES.items():
            before = flat[at].clone()
            flat[at] = value
            assert flag_of(x) == bit == seen_by_torch(flat)
            flat[at] = before
    assert flag_of(x) == 0


def test_what_lies_between_the_elements_is_not_read(flag_of):
    whole = torch.full((64, 64), math.nan)
    whole[::2, 1::2] = 1.0
    assert flag_of(whole[::2, 1::2]) == 0


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(0),
        torch.empty(3, 0, 2, dtype=torch.float16),
        torch.tensor(1.0),
        torch.arange(5),
        torch.tensor([True]),
        torch.ones(4, dtype=torch.complex64),
        torch.ones(4).to(torch.float8_e5m2),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_mkldnn(),
    ],
    ids=lambda x: f"{str(x.dtype)[6:]} {tuple(x.shape)}",
)
def test_nothing_to_find(flag_of, x):
    assert flag_of(x) == 0


def test_other_kinds_of_tensors(flag_of):
    bad = torch.tensor([1.0, -math.inf, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about prototypes
        nested = torch.nested.nested_tensor([torch.ones(2), bad])
        jagged = torch.nested.nested_tensor([torch.ones(2), bad], layout=torch.jagged)
        compressed = torch.diag(bad).to_sparse_csr()
    kinds = [bad.to(torch.float8_e5m2), torch.diag(bad).to_sparse(), bad.to_mkldnn(), nested, jagged, compressed]
    assert [flag_of(x) for x in kinds] == [4] * len(kinds)
    assert flag_of(torch.tensor([complex(1, math.nan), complex(math.inf, 0)])) == 3


def test_quantised_tensors_hold_only_finite_values(flag_of):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about their deprecation
        x = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
        assert flag_of(x) == 0


def test_freed_memory_is_refused(flag_of):
    """Reading it would end the process."""
    x = torch.ones(3)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"shape \(3,\) has no memory: its storage was freed"):
        flag_of(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_no_false_flag_in_10_000_finite_cases(dtype, flag_of, request):
    """Among them sums that overflow, values at the ends of the range, zeros of either sign; 2,500 for each dtype."""
    interpreted = "GPU backend" in request.node.name and not torch.cuda.is_available()
    g = torch.Generator().manual_seed(0)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for case in range(100 if interpreted else 2500):
        size = int(torch.randint(1, 200, (), generator=g))
        x = torch.randn(size, generator=g, dtype=torch.float64)
        scale = (1.0, largest, largest / size, smallest)[case % 4]
        x = (x.clamp(-1, 1) * scale).to(dtype)
        if case % 3 == 0:
            x = x.abs()
        if case % 7 == 0:
            x.fill_(largest if case % 2 else -largest)
        assert bool(x.isfinite().all())
        assert flag_of(x) == 0
        if case % 50 == 0:  # and the same with one value planted is seen
            flag = (1, 2, 4)[case // 50 % 3]
            x[case % size] = VALUES[flag]
            assert flag_of(x) == flag


def test_infinities_that_cancel_and_sums_that_overflow():
    opposite = torch.tensor([math.inf, -math.inf])
    assert not all_finite_fast(opposite)
    assert int(nonfinite_flag_fast(opposite)) == 6
    for dtype in DTYPES:
        huge = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
        assert int(nonfinite_flag_fast(huge)) == 0
    # Ordinary values in float16 whose sum is far beyond 65,504: one read is enough.
    assert all_finite_fast(torch.full((1 << 17,), 2.0, dtype=torch.float16))


def test_one_cheap_read_is_all_that_finite_tensors_cost(monkeypatch):
    from initlab.kernels import nonfinite

    def never(tensor):
        raise AssertionError("a rescan of a finite tensor")

    monkeypatch.setattr(nonfinite, "nonfinite_flag", never)
    for dtype in DTYPES:
        assert int(nonfinite_flag_fast(torch.randn(1000).to(dtype))) == 0


def test_flags_add_up_and_nothing_is_written_by_the_clean():
    flags = torch.tensor([8], dtype=torch.int32)
    add_flag_(flags, torch.ones(3))
    assert int(flags) == 8
    assert add_flag_(flags, torch.tensor([math.inf])) is flags
    add_flag_(flags, torch.tensor([math.nan]))
    assert int(flags) == 8 | 2 | 1
    assert describe(7) == "NaN, +inf and -inf"


@pytest.mark.parametrize(
    "flags",
    [torch.zeros(1), torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32, device="meta")],
)
def test_flags_of_the_wrong_kind(flags):
    with pytest.raises(ValueError, match="must be int32, one element, on cpu"):
        add_flag_(flags, torch.ones(3))


def test_meta_tensors_have_meta_flags():
    x = torch.empty(3, device="meta")
    assert nonfinite_flag_fast(x).device.type == nonfinite_flag(x).device.type == "meta"
    assert nonfinite_flag_fast(x).dtype == torch.int32


def test_traced_without_branches():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        assert nonfinite_flag_fast(mode.from_tensor(torch.ones(3))).shape == ()

    def f(x):
        return x + 1, nonfinite_flag_fast(x + 1)

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert int(compiled(torch.tensor([1.0, math.inf]))[1]) == 2

    def g(flags, x):
        add_flag_(flags, x)
        return x

    flags = torch.zeros(1, dtype=torch.int32)
    torch.compile(g, backend="eager", fullgraph=True)(flags, torch.tensor([math.nan]))
    assert int(flags) == 1
    assert torch.func.vmap(nonfinite_flag)(torch.tensor([[1.0, math.nan], [math.inf, 1.0]])).tolist() == [1, 2]


def test_modes():
    bad = torch.tensor([math.inf], requires_grad=True)
    with torch.inference_mode():
        assert int(nonfinite_flag_fast(bad * 1)) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert int(nonfinite_flag_fast(bad)) == 2
    assert not nonfinite_flag_fast(bad).requires_grad


def test_a_buffer_hands_out_flags_in_order():
    buffer = FlagBuffer(torch.device("cpu"))
    buffer.send()
    assert buffer.landed()
    assert buffer.flags() == []
    with torch.inference_mode():
        flags = [buffer.new_flag() for _ in range(2500)]
    for place in (0, 1023, 1024, 2499):
        flags[place].add_(place + 1)
    buffer.send()
    flags[7].add_(1)  # after the copy
    copied = buffer.flags()
    assert len(copied) == 2500
    assert {i: flag for i, flag in enumerate(copied) if flag} == {0: 1, 1023: 1024, 1024: 1025, 2499: 2500}
