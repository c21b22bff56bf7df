"""What a launch depends on, checked on an emulated GPU: sizes about 2^31, grids, many tensors, streams, devices.

Tensors beyond 2^31 elements take memory only where they are touched, and of their grids a few blocks run.
test_devices.py runs these checks. By hand: ``INITLAB_TEST_DEVICE=sm_90 pytest tests/ptx/launch_checks.py``
"""

import contextlib
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from initlab.kernels import Draw, Normal, Region, Uniform, clip_, fill_, grad_norm
from initlab.kernels import _common_triton as common
from initlab.kernels import _linear_epilogue_triton as epilogue
from initlab.kernels import _linear_triton as linear
from initlab.kernels import _nonfinite_triton as nonfinite
from initlab.kernels import _norms_table_triton as table
from initlab.kernels import _norms_triton as norms

sys.path.insert(0, str(Path(__file__).parent.parent))
from ptx import launch
from ptx.memory import untouched_zeros

INF, NAN = math.inf, math.nan
OVER = 2**31 + 5003  # elements
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def compiled(serving):
    with serving("triton"):
        yield
    table._plans.clear()


@pytest.fixture
def only(monkeypatch):
    """Lets these blocks of every launch run, and no others."""
    return lambda *blocks: monkeypatch.setattr(launch, "only", set(blocks))


def sparse(*sizes, dtype=BF16):
    numel = math.prod(sizes)
    return torch.from_numpy(untouched_zeros(numel * dtype.itemsize, np.uint8)).view(dtype).view(sizes)


# ----------------------------------------------------------------------------------------------------------------
# Sizes and offsets about 2^31


def test_relu_of_more_than_2_to_the_31_elements(only):
    y, flags = sparse(OVER), torch.zeros(1, dtype=torch.int32)
    places = torch.tensor([3, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, OVER - 1])
    y[places] = torch.tensor([-1.0, 2.0, -3.0, 4.0, -INF, 6.0]).to(BF16)
    only(0, *(int(p) // epilogue.RELU_BLOCK for p in places))
    epilogue.relu_in_place(y, flags)
    assert y[places].tolist() == [0.0, 2.0, 0.0, 4.0, 0.0, 6.0]
    assert int(flags) == 4


def test_the_flag_of_more_than_2_to_the_31_elements(only, monkeypatch):
    monkeypatch.setattr(nonfinite, "_max_programs", lambda device: 2**31 - 1)  # so that each takes one block
    x, blocks = sparse(OVER), (0, 2**31 // 4096 - 1, 2**31 // 4096, OVER // 4096)
    only(*blocks)
    for place, value, expected in ((2**31 - 1, NAN, 1), (2**31, INF, 2), (OVER - 1, -INF, 4), (0, 1.0, 0)):
        x[place] = value
        flag = torch.zeros(1, dtype=torch.int32)
        nonfinite.launch(flag, x)
        assert int(flag) == expected
        x[place] = 0.0


@pytest.mark.parametrize("dtype", [BF16, torch.float64], ids=str)
def test_norm_and_scaling_of_more_than_2_to_the_31_elements(dtype, only):
    x = sparse(OVER, dtype=dtype)
    table._plans.clear()
    plan = table.prepare(table.Entries([x.data_ptr()], [OVER], [table.DTYPES.index(dtype)], [0]), x.device)
    per_item = plan.blocks * table.BLOCK_SIZE
    places = [5, 2**31 - 1, 2**31, OVER - 1]
    x[places] = torch.tensor([3.0, 4.0, 12.0, 84.0], dtype=dtype)
    items = sorted({place // per_item for place in places})
    only(*items)
    sums = torch.full((plan.items,), NAN, dtype=torch.float64)
    meta = {"FP64": dtype == torch.float64, "BLOCK_SIZE": table.BLOCK_SIZE}
    norms._launch(norms.norm_kernel, plan.items, plan.table, plan.columns, plan.blocks, 0, sums, **meta)
    assert sums[items].sum() == 3**2 + 4**2 + 12**2 + 84**2
    assert sums.isnan().sum() == plan.items - len(items)
    clip_([x], torch.tensor(8.0 - 1e-6, dtype=torch.float64), 2.0)
    assert x[places].tolist() == [0.75, 1.0, 3.0, 21.0]


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_filling_more_than_2_to_the_31_elements(dtype, only, serving):
    x, last = sparse(OVER, dtype=dtype), 9001
    per_item = 8 * 4096
    only(2**31 // per_item - 1, *range(2**31 // per_item, OVER // per_item + 1))
    fill_([Draw(x, Normal(), 7)])
    for start, numel in ((OVER - last, last), (2**31 - 100, 200)):
        expected = torch.empty(numel, dtype=dtype)
        with serving("torch"):
            fill_([Draw(expected, Normal(), 7, Region((OVER,), (start,), (numel,)))])
        assert torch.equal(x[start : start + numel], expected)


@pytest.mark.parametrize("M", [65535 * 256 + 1, 2**31 + 300])
def test_the_mask_of_more_rows_than_a_grid_has(M, only, monkeypatch):
    """A grid has 65,535 programs in y at most: with more rows each takes more of them."""
    monkeypatch.setattr(torch, "empty_like", lambda y: sparse(*y.shape, dtype=y.dtype))
    y, grad = sparse(M, 1), torch.ones((), dtype=BF16).expand(M, 1)
    y[-1] = y[-3] = 2.0
    rows = 256
    while -(-M // rows) > 65535:
        rows *= 2
    only(-(-M // rows) - 1)
    out, _ = epilogue.mask_and_sum(grad, y)
    assert out[-4:, 0].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_a_gemm_of_as_many_rows_as_32_bits_count(only, monkeypatch):
    """And one more: torch's serves."""
    M, K, N = linear.ONE_KERNEL_MAX_SIZE, 8, 8
    x, w = sparse(M + 1, K), torch.randn(N, K).to(BF16)
    assert linear._fits_one_kernel(x[:-1], w)
    assert not linear._fits_one_kernel(x, w)
    assert not linear._fits_one_kernel(w, x)
    x = x[:-1]
    x[-40:] = torch.randn(40, K).to(BF16)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **o: sparse(*s) if s == (M, N) else empty(*s, **o))
    major = linear._device(None)[0]
    monkeypatch.setattr(linear, "_device", lambda index: (major, 2**31 - 1))  # a program for each tile
    tile = linear.TILES[major][-1]
    last = linear._num_tiles(M, N, tile) - 1
    only(last)
    flags = torch.zeros(1, dtype=torch.int32)
    y = linear.gemm(x, w, None, flags, None, tile)
    expected = torch.relu(x[-40:].double() @ w.double().T)
    assert ((y[-40:].double() - expected).abs() <= 2.0**-8 * (1.0 + expected)).all()
    assert int(flags) == 0


# ----------------------------------------------------------------------------------------------------------------
# Grids and tables


def test_nothing_is_launched_for_nothing(monkeypatch):
    monkeypatch.setattr(launch, "only", ())
    launched = []
    monkeypatch.setattr(launch, "program_of", lambda ptx: launched.append(ptx))
    fill_([Draw(torch.empty(0), Normal(), 1), Draw(torch.empty(3, 0), Uniform(), 2)])
    assert epilogue.relu_in_place(torch.empty(0, 4), torch.zeros(1, dtype=torch.int32)).shape == (0, 4)
    assert not launched


def test_more_work_items_than_are_added_at_once(serving):
    """1,500 tensors: the last programs add up 1,024 sums at a time."""
    torch.manual_seed(0)
    tensors = [torch.randn(1 + i % 3, dtype=(torch.float32, torch.float64, BF16)[i % 3 :: 3][0]) for i in range(1500)]
    found = grad_norm(tensors, per_tensor=True)
    exact = torch.cat([t.double() for t in tensors]).norm()
    torch.testing.assert_close(found.norm64, exact, rtol=1e-6, atol=0.0)
    each = torch.stack([t.double().norm() for t in tensors])
    torch.testing.assert_close(found.tensor_norms, each, rtol=1e-6, atol=0.0)
    tensors[1400][0] = -INF
    assert (int(grad_norm(tensors).flag), int(grad_norm(tensors).first_nonfinite_index)) == (4, 1400)


def test_a_fill_of_1500_tensors(serving):
    ours, theirs = ([torch.full((1 + i % 40,), NAN) for i in range(1500)] for _ in range(2))
    fill_([Draw(t, Normal(), i) for i, t in enumerate(ours)])
    with serving("torch"):
        fill_([Draw(t, Normal(), i) for i, t in enumerate(theirs)])
    assert torch.equal(torch.cat(ours), torch.cat(theirs))


# ----------------------------------------------------------------------------------------------------------------
# Devices and streams, as if there were several


@pytest.fixture
def second_gpu(monkeypatch):
    """Where `cuda:1` is said, the CPU serves; tells the current device at each launch, and the host's copies."""
    seen = types.SimpleNamespace(current=0, launched_on=[], stream=0, copies=[])
    second = torch.device("cuda", 1)

    @contextlib.contextmanager
    def current(device):
        before, seen.current = seen.current, torch.device(device).index
        yield
        seen.current = before

    def on_cpu(function):
        def call(*args, **options):
            if options.pop("pin_memory", False):
                seen.copies.append("pinned")
            return function(*args, **{k: ("cpu" if v == second else v) for k, v in options.items()})

        return call

    to, execute_packed = torch.Tensor.to, launch._packed

    def copied(tensor, *args, **options):
        if second in args:
            seen.copies.append(options)
            args = [torch.device("cpu") if a == second else a for a in args]
            return to(tensor, *args).clone()
        return to(tensor, *args, **options)

    def packed(*args):
        seen.launched_on.append(seen.current)
        return execute_packed(*args)

    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(launch, "_packed", packed)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=seen.stream))
    seen.device = second
    return seen


def entries_of(x):
    return table.Entries([x.data_ptr()], [x.numel()], [table.DTYPES.index(x.dtype)], [0])


def test_kernels_run_on_a_device_that_is_not_the_current_one(second_gpu):
    x = torch.randn(5000)
    plan = table.prepare(entries_of(x), second_gpu.device)
    norm = norms.norm(plan)[0]
    assert float(norm) == pytest.approx(float(x.norm()), rel=1e-6)
    norms.scale(plan, norm, 1.0, "keep")
    assert float(x.norm()) == pytest.approx(1.0, rel=1e-5)
    prepared = filled(second_gpu.device)
    assert prepared.isfinite().all()
    assert set(second_gpu.launched_on) == {1}
    assert second_gpu.current == 0


def filled(device):
    from initlab.kernels.sampling import _triton as sampling
    from initlab.kernels.sampling._maps import map_of

    x = torch.full((300,), NAN)
    prepared = sampling.prepare(map_of(Normal(), torch.float32), torch.float32)
    sampling.fill([(x.data_ptr(), 300, prepared, 5, None)], device)
    return x


def test_a_table_belongs_to_the_stream_that_it_was_copied_on(second_gpu):
    """On another stream it might not have arrived yet."""
    x = torch.randn(50)
    first = table.prepare(entries_of(x), second_gpu.device)
    second_gpu.stream = 7
    second = table.prepare(entries_of(x), second_gpu.device)
    assert second.table.data_ptr() != first.table.data_ptr()
    second_gpu.stream = 0
    assert table.prepare(entries_of(x), second_gpu.device) is first
    assert second_gpu.copies == ["pinned", {"non_blocking": True}] * 2


def test_each_table_has_pinned_memory_of_its_own(second_gpu):
    """What is still being copied is not written again: the next table may not share the memory of the last."""
    tables = [np.arange(9), np.arange(9, 20)]
    first, second = (common.on_device(tables, second_gpu.device) for _ in range(2))
    assert first.tolist() == second.tolist() == list(range(20))
    assert second_gpu.copies == ["pinned", {"non_blocking": True}] * 2
