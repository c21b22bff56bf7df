"""content_sum, against Python's own integers, and what must not change it."""

import math

import pytest
import torch
from initlab.kernels import Region, checksum, content_sum
from torch._subclasses import FakeTensorMode

import initlab

MASK = (1 << 64) - 1

pytestmark = pytest.mark.usefixtures("backend")  # every test, by plain torch and by compiled code


def mix(x):
    """SplitMix64's finaliser, on unsigned Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def expected(words):
    """The sum as the docstring has it; `words` are signed integers."""
    return sum(mix((word + i * 0x9E3779B97F4A7C15) & MASK) for i, word in enumerate(words)) & MASK


def test_published_values_of_splitmix64():
    """Vigna's reference sequence of seed 1234567: it adds the increment before it mixes."""
    values = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    seed = torch.tensor([1234567 + 0x9E3779B97F4A7C15 - (1 << 64)])
    zeros = torch.zeros(1, dtype=torch.int64)
    assert [mix((1234567 + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i in range(5)] == values
    assert content_sum(seed) == values[0]
    # The sum over a constant tensor is that of consecutive values of the sequence that starts one increment before.
    assert content_sum(seed.expand(5)) == sum(values) & MASK
    assert content_sum(zeros) == 0


@pytest.mark.parametrize(
    ("dtype", "integer"),
    [
        (torch.float32, torch.int32),
        (torch.bfloat16, torch.int16),
        (torch.float16, torch.int16),
        (torch.float64, torch.int64),
        (torch.int64, torch.int64),
        (torch.float8_e4m3fn, torch.int8),
        (torch.uint8, torch.int8),
        (torch.bool, torch.int8),
    ],
)
def test_every_dtype_by_its_bits(dtype, integer):
    x = torch.arange(-30, 33).mul(0.37).to(dtype).view(7, 9)
    assert content_sum(x) == expected(x.view(integer).view(-1).tolist())


def test_complex_is_its_parts_and_views_are_resolved():
    x = torch.complex(torch.arange(5.0), -torch.arange(5.0))
    parts = torch.view_as_real(x).contiguous()
    assert content_sum(x) == expected(parts.view(torch.int32).view(-1).tolist())
    assert content_sum(x.conj()) == content_sum(x.conj().clone().resolve_conj())
    assert content_sum(x.conj().imag) == content_sum(-x.imag)  # a view with the negative bit


def test_bits_count_not_values():
    assert content_sum(torch.tensor([0.0])) != content_sum(torch.tensor([-0.0]))
    nan = torch.tensor([math.nan])
    other = (nan.view(torch.int32) + 1).view(torch.float32)
    assert content_sum(nan) != content_sum(other)
    assert content_sum(nan) == content_sum(nan.clone())


@pytest.mark.parametrize(
    "size", [1, 3, checksum._CHUNK["cpu"] - 1, checksum._CHUNK["cpu"], 3 * checksum._CHUNK["cpu"] + 5]
)
def test_chunks_do_not_show(size, monkeypatch):
    x = torch.arange(size, dtype=torch.float32)
    whole = content_sum(x)
    monkeypatch.setitem(checksum._CHUNK, "cpu", 17)
    assert content_sum(x[:1000]) == expected(x[:1000].view(torch.int32).tolist())
    if size <= 1000:
        assert content_sum(x) == whole


def test_parts_add_up_to_the_whole_on_any_number_of_threads(backend, monkeypatch):
    """Rows shorter and longer than a piece, and blocks of more dimensions than two."""
    if backend == "numba":
        from initlab.kernels import _checksum_numba

        monkeypatch.setattr(_checksum_numba, "PIECE_SIZE", 64)
        monkeypatch.setattr(_checksum_numba, "ONE_THREAD", 64)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setitem(checksum._CHUNK, "cpu", 100)
    for dtype in (torch.int8, torch.bfloat16, torch.float32, torch.float64):
        x = (torch.arange(6 * 5 * 151) * 7919 % 251 - 125).to(dtype).view(6, 5, 151)
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        whole = expected(x.view(integer).flatten().tolist())
        assert content_sum(x) == whole
        for dim, at in ((0, 2), (1, 1), (2, 7), (2, 130)):
            parts = []
            for offset, size in ((0, at), (at, x.shape[dim] - at)):
                region = Region.whole(x.shape).narrow(dim, offset, size)
                parts.append(content_sum(x.narrow(dim, offset, size), region))
            assert sum(parts) & MASK == whole


@pytest.mark.parametrize("chunk", [4, 100, 1 << 14])
def test_strides_do_not_show(chunk, monkeypatch):
    monkeypatch.setitem(checksum._CHUNK, "cpu", chunk)
    x = torch.randn(5, 6, 7, 3)
    whole = content_sum(x)
    assert content_sum(x.contiguous(memory_format=torch.channels_last)) == whole
    assert content_sum(x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)) == whole
    padded = torch.empty(5, 6, 7, 4)[..., :3]
    assert content_sum(padded.copy_(x)) == whole
    assert content_sum(x.transpose(0, 1)) != whole
    assert content_sum(x[:, :, ::2]) == content_sum(x[:, :, ::2].clone())


def test_one_changed_bit_anywhere_shows():
    x = torch.randn(1000)
    whole = content_sum(x)
    for place in (0, 499, 999):
        for bit in (0, 13, 31):
            y = x.clone()
            y.view(torch.int32)[place] ^= (1 << bit) - (1 << 32) * (bit == 31)
            assert content_sum(y) != whole
    assert content_sum(x.flip(0)) != whole
    assert content_sum(x.roll(1)) != whole


def test_empty_scalar_and_parameters():
    assert content_sum(torch.empty(0, 3)) == 0
    assert content_sum(torch.tensor(1.5)) == content_sum(torch.tensor([1.5]))
    weight = torch.nn.Parameter(torch.ones(3))
    assert content_sum(weight) == content_sum(torch.ones(3))


@pytest.mark.parametrize(
    "tensor", [lambda: torch.empty(3, device="meta"), lambda: torch.eye(3).to_sparse()], ids=["meta", "sparse"]
)
def test_nothing_to_read(tensor):
    with pytest.raises(NotImplementedError, match="holds no dense values"):
        content_sum(tensor())


QUANTISED = {
    "per tensor, quint8": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
    "per tensor, qint8": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "per tensor, qint32": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint32),
    "per channel": lambda: torch.quantize_per_channel(
        torch.ones(2, 4), torch.full((2,), 0.1), torch.zeros(2), 0, torch.qint8
    ),
    "four bits": lambda: torch.quantize_per_channel(
        torch.ones(4, 4), torch.full((4,), 0.1), torch.zeros(4), 0, torch.quint4x2
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_tensor_is_refused(make):
    """Reading its bits ended the process with a segmentation fault."""
    with pytest.raises(NotImplementedError, match=r"a quantised tensor \(torch\.qu?int.*int_repr\(\).*dequantize\(\)"):
        content_sum(make())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_model_with_a_quantised_tensor_has_no_digest():
    model = torch.nn.Linear(2, 2)
    model.packed = torch.nn.Parameter(QUANTISED["per tensor, qint8"](), requires_grad=False)
    with pytest.raises(NotImplementedError, match="packed: a quantised tensor"):
        initlab.model_digest(model)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_holds_no_values_is_refused():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    freed = torch.ones(10)
    part = freed[3:]
    freed.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.ones(3)
    for tensor, message in (
        (nested, "a nested tensor .* digest its parts"),
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo .* digest its parts or its dense values"),
        (torch.ones(3, device="meta"), "on meta .* materialise it first"),
        (fake, "a fake tensor on cpu .* materialise it first"),
        (freed, "freed or resized"),
        (part, "freed or resized"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            content_sum(tensor)


@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint4", "int4", "bits8"])
def test_dtypes_of_a_byte_or_less_by_their_bytes(name):
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    raw = torch.arange(24, dtype=torch.uint8)
    assert content_sum(raw.view(getattr(torch, name))) == content_sum(raw)
