"""The GPU backend: the reference's bits, in few launches, at the cost that was worked out for it.

On a machine without a GPU the kernels run in Triton's interpreter, on CPU tensors, with smaller chunks.
"""

import itertools
import math
import sys

import pytest
import torch
from initlab.kernels import Constant, Draw, Normal, Region, TruncatedNormal, Uniform, backends, fill_, named_key
from initlab.kernels.sampling import fill

import initlab

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("initlab.kernels.sampling._triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

INF = math.inf
DISTRIBUTIONS = {
    "uniform": Uniform(-1.0, 2.0),
    "normal": Normal(0.0, 0.02),
    "normal with mean": Normal(0.3, 1.5),
    "centre": TruncatedNormal(0.0, 0.02, -0.04, 0.04),
    "centre with mean": TruncatedNormal(0.1, 1.0, -1.0, 3.0),
    "tail": TruncatedNormal(0.0, 0.02, -2.0, 2.0),
    "half a line": TruncatedNormal(0.0, 1.0, 0.0, INF),
    "lower half": TruncatedNormal(0.0, 1.0, -INF, 0.0),
    "far": TruncatedNormal(0.0, 1.0, 4.0, 9.0),
    "far below": TruncatedNormal(1.0, 1.0, -9.0, -4.0),
    "narrow": TruncatedNormal(0.0, 1.0, 0.5, 0.6),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REGIONS = {  # by what the kernel does with them, at 256 blocks of four a chunk
    "less than a block": None,
    "a block's end and a chunk's": Region((3000,), (3,), (1100,)),
    "rows that begin anywhere": Region((5, 1001), (1, 3), (3, 998)),
    "rows of whole chunks": Region((4, 4096), (1, 256), (2, 2048)),
    "short rows": Region((9, 7, 11), (2, 1, 3), (5, 6, 7)),
    "a chunk that spills over": Region((5000,), (3,), (1024,)),
    "block numbers carry in a full chunk": Region((2**40,), (2**34 - 512,), (1024,)),
    "wide block numbers": Region((2**20, 2**22), (2**15, 5), (2, 601)),
}
CASES = list(itertools.product(DISTRIBUTIONS, DTYPES, REGIONS))
KEY = 0xFEDC_BA98_7654_3210


def nan(sizes, dtype=torch.float32):
    return torch.full(sizes, math.nan, dtype=dtype, device=DEVICE)


@pytest.fixture(scope="module")
def reference(serving):
    """What the torch backend makes of draws like the given ones."""

    def reference(draws):
        draws = [Draw(torch.empty_like(d.tensor), d.distribution, d.key, d.region) for d in draws]
        with serving("torch"):
            fill_(draws)
        return [d.tensor for d in draws]

    return reference


@pytest.fixture
def filling(serving, monkeypatch):
    """Lets triton fill, in chunks of 1,024 elements where it is interpreted; counts launches and copies of a table."""
    counts = {"launches": 0, "copies": 0}
    launch, copy = kernels._launch, kernels.on_device

    def counted(name, function):
        def call(*arguments):
            counts[name] += 1
            return function(*arguments)

        return call

    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "BLOCK_SIZE", 256)
        monkeypatch.setattr(kernels, "SHORT_BLOCK_SIZE", 64)
    monkeypatch.setattr(kernels, "SHORT", 40)
    monkeypatch.setattr(kernels, "_launch", counted("launches", launch))
    monkeypatch.setattr(kernels, "on_device", counted("copies", copy))
    with serving("triton"):
        yield counts


# ---------------------------------------------------------------------------------------------------------------
# Equal bits


def is_off_the_diagonal(distribution, dtype):
    """The other pairs meet each distribution once, and each dtype with at least two of them."""
    return DTYPES[[*DISTRIBUTIONS].index(distribution) % len(DTYPES)] != dtype


@pytest.mark.long_if.with_args(is_off_the_diagonal)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_bits_of_the_reference(distribution, dtype, filling, reference, bits):
    """One fill of eight regions: short rows go apart, so it takes two launches."""
    draws = []
    for place, region in enumerate(REGIONS.values()):
        tensor = nan((3,) if region is None else region.sizes, dtype)
        draws.append(Draw(tensor, DISTRIBUTIONS[distribution], KEY + place, region))
    fill_(draws)
    for name, draw, expected in zip(REGIONS, draws, reference(draws), strict=True):
        assert torch.equal(bits(draw.tensor), bits(expected)), name
    assert filling == {"launches": 2, "copies": 1}


def test_there_are_more_than_300_cases():
    assert len(CASES) == 352


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.complex128, torch.complex32], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_numbers(dtype, filling, reference):
    sizes = Region((9, 131), (1, 2), (5, 129))
    x, y = torch.zeros(67, dtype=dtype, device=DEVICE), torch.zeros((5, 129), dtype=dtype, device=DEVICE)
    draws = [Draw(x, Normal(0.5, 2.0), KEY), Draw(y, Uniform(-1.0, 1.0), KEY, sizes)]
    fill_(draws)
    for draw, expected in zip(draws, reference(draws), strict=True):
        assert torch.equal(torch.view_as_real(draw.tensor), torch.view_as_real(expected))


@pytest.mark.parametrize("offset", range(5))
def test_memory_at_any_address(offset, filling, reference):
    """A view of a tensor may begin where no vector store may."""
    for dtype in (torch.float32, torch.bfloat16):
        whole = nan((700,), dtype)
        draws = [Draw(whole[offset:-3], Normal(), KEY, Region((2000,), (8,), (697 - offset,)))]
        fill_(draws)
        assert torch.equal(whole[offset:-3], reference(draws)[0])
        assert whole[:offset].isnan().all()
        assert whole[-3:].isnan().all()


def test_any_strides(filling, reference):
    draws = [
        Draw(nan((4, 6, 5, 3)).contiguous(memory_format=torch.channels_last), Normal(), KEY),
        Draw(nan((40, 30)).t(), Uniform(), KEY),
        Draw(nan((50, 30))[:, 3:9], TruncatedNormal(), KEY),
    ]
    fill_(draws)
    for draw, expected in zip(draws, reference(draws), strict=True):
        assert torch.equal(draw.tensor, expected)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (0.25, torch.float32), (-0.0, torch.float32), (INF, torch.bfloat16), (1e-7, torch.float16),
        (0.1, torch.float64), (7, torch.int64), (-3, torch.int8), (True, torch.bool),
        (1 + 2j, torch.complex64), (1 - 2j, torch.complex128), (0.5, torch.float8_e4m3fn),
    ],
)  # fmt: skip
def test_constants_of_every_dtype(value, dtype, filling, bits):
    x = torch.zeros(901, dtype=dtype, device=DEVICE)
    fill_([Draw(x, Constant(value)), Draw(torch.zeros(3, dtype=dtype, device=DEVICE), Constant(0))])
    assert torch.equal(bits(x.cpu()), bits(torch.full((901,), value, dtype=dtype)))
    assert filling["launches"] == (dtype != torch.complex128)  # no integer has its size: torch fills it


def test_a_zeros_sign_is_not_lost_between_two_fills(filling):
    x, y = torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)
    fill_([Draw(x, Constant(0.0)), Draw(y, Constant(-0.0))])
    assert not x.signbit().any()
    assert y.signbit().all()


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the GPU rounds by itself")
def test_rounding_to_bfloat16_of_every_float32():
    """The interpreter's conversion cuts off; the kernel's integers do what torch does, for all 2^32 but the NaNs."""
    for start in range(-(2**31), 2**31, 2**24):
        x = torch.arange(start, start + 2**24, dtype=torch.int64).to(torch.int32).view(torch.float32)
        y = _round_by_kernel(x)
        rounded = x.to(torch.bfloat16)
        assert torch.equal(y[~x.isnan()].view(torch.int16), rounded[~x.isnan()].view(torch.int16))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the GPU rounds by itself")
def test_rounding_to_bfloat16():
    """Every exponent and sign, all upper halves, and the lower ones around a tie."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int64)[:, None] << 16
    x = (upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).to(torch.int32).view(torch.float32).flatten()
    y = _round_by_kernel(x)
    assert torch.equal(y[~x.isnan()].view(torch.int16), x.to(torch.bfloat16)[~x.isnan()].view(torch.int16))


def _round_by_kernel(x):
    y = torch.empty_like(x, dtype=torch.bfloat16)
    _rounding[(triton.cdiv(x.numel(), 1 << 20),)](x, y, x.numel(), COUNT=1 << 20)
    return y


@triton.jit
def _rounding(x, y, n, COUNT: tl.constexpr):
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    rounded = kernels.rounded(tl.load(x + place, mask=place < n, other=0.0), tl.bfloat16, True)
    tl.store(y + place, rounded, mask=place < n)


# ---------------------------------------------------------------------------------------------------------------
# Many tensors


def test_a_model_in_one_launch_per_distribution_and_dtype(filling, reference):
    """Tensors of 0 to 5,000 elements in no order: seven distributions and dtypes, seven launches."""
    kinds = [
        *((DISTRIBUTIONS[distribution], torch.float32) for distribution in ("uniform", "normal", "centre", "tail")),
        *((DISTRIBUTIONS[distribution], torch.bfloat16) for distribution in ("normal", "normal with mean")),
        (Constant(1.0), torch.float32),
    ]
    sizes = [1, 5000, 2, 1023, 1024, 1025, 0, 4, 4]
    draws = [
        Draw(nan((size,), dtype), distribution, named_key(i, f"{size}"))
        for i, (size, (distribution, dtype)) in enumerate(itertools.product(sizes, kinds))
    ]
    fill_(draws)
    assert filling == {"launches": 7, "copies": 1}
    for draw, expected in zip(draws, reference(draws), strict=True):
        assert torch.equal(draw.tensor, expected)


def test_init_model_uses_it(filling, serving):
    def model():
        return torch.nn.Sequential(
            torch.nn.Linear(30, 40), torch.nn.Embedding(9, 5, padding_idx=2), torch.nn.BatchNorm1d(8)
        ).to(DEVICE)

    ours = model()
    initlab.init_model_(ours, 3)
    # Uniform, normal and constants of float32; the padding row after its embedding; num_batches_tracked.
    assert filling == {"launches": 5, "copies": 2}
    assert not ours[1].weight[2].any()
    theirs = model()
    with serving("torch"):
        initlab.init_model_(theirs, 3)
    assert initlab.model_digest(ours) == initlab.model_digest(theirs)


def test_draws_that_meet_in_memory_keep_their_order(filling):
    x = nan((10, 8))
    fill_(
        [
            Draw(x, Normal(), KEY),
            Draw(x[3], Constant(0.0)),
            Draw(x[3:5], Constant(2.0)),
            Draw(x[:, 2:4], Constant(3.0)),
            Draw(x[4], Uniform(), KEY),
        ]
    )
    whole = torch.empty((10, 8), device=DEVICE)
    fill_([Draw(whole, Normal(), KEY)])
    whole[3:5] = 2.0
    whole[:, 2:4] = 3.0
    fill_([Draw(whole[4], Uniform(), KEY)])
    assert torch.equal(x, whole)


def test_parts_of_one_storage_that_do_not_meet_are_one_launch(filling):
    flat = nan((200,))
    fill_([Draw(flat[i * 10 : i * 10 + 10], Normal(), KEY + i) for i in range(20)])
    assert filling == {"launches": 1, "copies": 1}
    assert flat.isfinite().all()


def test_work_is_cut_into_equal_items(filling, monkeypatch):
    """However uneven the tensors are: the items of a launch differ by one row's spill at most."""
    seen = []
    monkeypatch.setattr(kernels, "_launch", lambda launch, table, items, chunks, device: seen.append((items, chunks)))
    monkeypatch.setattr(kernels, "_BUSY", 4)
    fill_([Draw(nan((100_000,)), Normal(), KEY), *(Draw(nan((64,)), Normal(), KEY) for _ in range(50))])
    ((items, chunks),) = seen
    assert chunks == kernels.CHUNKS
    assert items == math.ceil(100_000 / (chunks * kernels.BLOCK_SIZE * 4)) + 50


def test_versions_progress_and_inference(filling):
    x, y = nan((30,)), nan((0,))
    done = []
    before = x._version
    fill_([Draw(x, Normal(), KEY), Draw(y, Normal(), KEY), Draw(x[:4], Constant(1.0))], done.append)
    assert x._version == before + 2
    assert done == [30, 4]
    with torch.inference_mode():
        z = nan((9,))
        fill_([Draw(z, Normal(), KEY)])
        assert z.isfinite().all()


def test_a_refused_draw_writes_nothing(filling):
    x = nan((9,))
    with pytest.raises(ValueError, match="key is"):
        fill_([Draw(x, Normal(), KEY), Draw(x, Normal(), -1)])
    assert x.isnan().all()
    assert filling == {"launches": 0, "copies": 0}


# ---------------------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize(
    ("capability", "hip", "chosen"),
    [((9, 0), None, "triton"), ((8, 0), None, "triton"), ((7, 5), None, "torch"), ((7, 0), "6.2", "triton")],
)
def test_auto_on_a_gpu(capability, hip, chosen, monkeypatch, forget):
    monkeypatch.delenv("INITLAB_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert initlab.kernels.backend_of(torch.device("cuda", 1)) == chosen
    forget()
    monkeypatch.setenv("INITLAB_BACKEND", "triton")
    if chosen == "torch":
        with pytest.raises(RuntimeError, match=r"cuda:1 has compute capability 7.5, and it needs 8.0; unset"):
            initlab.kernels.backend_of(torch.device("cuda", 1))


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch, forget):
    monkeypatch.setenv("INITLAB_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="a tensor on cpu needs its interpreter: set TRITON_INTERPRET=1; unset"):
        initlab.kernels.backend_of(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"CUDA and ROCm devices only, and this tensor is on xpu"):
        initlab.kernels.backend_of(torch.device("xpu"))


def test_triton_that_cannot_be_imported(monkeypatch, forget):
    monkeypatch.setattr(backends, "_too_old", lambda index: None)
    monkeypatch.setitem(sys.modules, "initlab.kernels.sampling._triton", None)
    monkeypatch.delattr(initlab.kernels.sampling, "_triton", raising=False)
    monkeypatch.delenv("INITLAB_BACKEND", raising=False)
    with pytest.warns(UserWarning, match="triton cannot be imported, so plain torch takes its place"):
        assert initlab.kernels.backend_of(torch.device("cuda", 0)) == "torch"


def test_a_graph_cannot_capture_a_fill(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*before the capture"):
        fill._fill_together([], torch.device("cuda"))
