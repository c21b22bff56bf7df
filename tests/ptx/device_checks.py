"""What only compiled kernels can show. test_devices.py runs these checks on an emulated GPU, in a process of their own.

By hand: ``INITLAB_TEST_DEVICE=sm_90 pytest tests/ptx/device_checks.py``
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from initlab.kernels import Constant, Draw, Normal, Region, TruncatedNormal, Uniform, clip_, fill_, grad_norm

sys.path.insert(0, str(Path(__file__).parent.parent))
from ptx import launch
from ptx.memory import SharedMemory

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def compiled(serving):
    with serving("triton"):
        yield


# ----------------------------------------------------------------------------------------------------------------
# A norm has the same bits, whichever lane and block comes first


def random_tensors(count, seed):
    """Of 1 to 9,000 elements, at any address, of all magnitudes; the four dtypes in turn."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        dtype = DTYPES[i % 4]
        numel, offset = (int(torch.randint(1, most, (), generator=generator)) for most in (9000, 9))
        scale = 10.0 ** int(torch.randint(-3, 4, (), generator=generator))
        whole = torch.randn(numel + offset, generator=generator, dtype=torch.float64) * scale
        yield whole.to(dtype)[offset:]


def bits_of_norm(tensors, lane_order, backward, monkeypatch):
    monkeypatch.setattr(SharedMemory, "lane_order", lane_order)
    monkeypatch.setattr(launch, "backward", backward)
    found = grad_norm(tensors, per_tensor=True)
    return torch.cat([found.norm64[None], found.sum_of_powers[None], found.tensor_norms]).view(torch.int64)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_a_norm_does_not_depend_on_the_order_of_lanes_and_blocks(count, monkeypatch):
    """Random shapes, as many in each dtype as `count` says, 100 tensors a norm, and the norm of each."""
    tensors = list(random_tensors(4 * count, seed=0))
    for start in range(0, len(tensors), 100):
        some = tensors[start : start + 100]
        expected = bits_of_norm(some, None, False, monkeypatch)  # where lanes that differ would raise
        for lane_order, backward in (("first", True), ("last", False)):
            assert torch.equal(bits_of_norm(some, lane_order, backward, monkeypatch), expected)


# ----------------------------------------------------------------------------------------------------------------
# Arguments arrive whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_norm_reaches_the_kernel_whole(dtype, serving):
    """All of float64's range, by the reference's bits: a launch cuts Python's floats to float32."""
    norms = [1e-300, 1e-40, 2.5, 1.0 - 1e-6, 1e38, 1e200, 1.7e308]
    limits = [0.0, 5e-324, 1e-310, 3e-46, 5e-40, 0.37, 1.0 / 3.0, 1e100, 1.7e308, math.inf]
    before = torch.tensor([3.0, -1e-3, 60000.0, 1.0, 0.0]).to(dtype)
    for norm in norms:
        for max_norm in limits:
            ours, theirs = before.clone(), before.clone()
            clip_([ours], torch.tensor(norm, dtype=torch.float64), max_norm)
            with serving("torch"):
                clip_([theirs], torch.tensor(norm, dtype=torch.float64), max_norm)
            assert torch.equal(ours, theirs), (norm, max_norm)


# ----------------------------------------------------------------------------------------------------------------
# Blocks as large as on a GPU: tests/kernels fills by smaller ones


MAPS = {
    "uniform": Uniform(-1.0, 2.0),
    "normal": Normal(0.3, 1.5),
    "centre": TruncatedNormal(0.0, 0.02, -0.04, 0.04),
    "tail": TruncatedNormal(0.0, 1.0, 0.0, math.inf),
    "far": TruncatedNormal(0.0, 1.0, 4.0, 9.0),
    "narrow": TruncatedNormal(0.0, 1.0, 0.5, 0.6),
    "constant": Constant(-0.25),
}


@pytest.mark.long_if.with_args(lambda name, dtype: (name, dtype) not in (("normal", DTYPES[1]), ("tail", DTYPES[0])))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_filling_by_whole_blocks(name, dtype, serving, bits):
    """A full chunk and its rest, a region that begins anywhere at an odd address, a carry between counters' halves."""

    def draws():
        regions = [((9001,), None, 0), ((8500,), Region((9000,), (3,), (8500,)), 1)]
        regions.append(((4096,), Region((2**40,), (2**34 - 2048,), (4096,)), 0))
        for place, (sizes, region, offset) in enumerate(regions):
            whole = torch.full((sizes[0] + offset + 40,), 7, dtype=dtype)
            yield whole, Draw(whole[offset : offset + sizes[0]], MAPS[name], 0xFEDC_BA98_7654_3210 + place, region)

    ours, theirs = list(draws()), list(draws())
    fill_([draw for _, draw in ours])
    with serving("torch"):
        fill_([draw for _, draw in theirs])
    for (x, _), (y, _) in zip(ours, theirs, strict=True):
        assert torch.equal(bits(x), bits(y))
