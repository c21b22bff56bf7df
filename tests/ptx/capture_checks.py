"""Captures of CUDA graphs, as a stand-in reports them: nothing is copied from the host, and replays see new values.

A graph replays kernels with the arguments that they were captured with. Here launches are recorded, and executed again
on an emulated GPU after the tensors' values have changed. test_devices.py runs these checks.
"""

import contextlib
import math
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from initlab.kernels import Draw, Normal, add_flag_, fill_, grad_norm, linear_relu, norms
from initlab.kernels import _common_triton as common
from initlab.kernels import _norms_table_triton as table
from initlab.kernels import _norms_triton as kernels
from initlab.kernels.sampling import fill
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import initlab

sys.path.insert(0, str(Path(__file__).parent.parent))
from ptx import launch

INF, NAN = math.inf, math.nan
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def compiled(serving):
    with serving("triton"):
        yield


@pytest.fixture
def capturing(monkeypatch):
    """`with capturing() as launches:` reports a capture, in which a copy from the host raises; `cuda:0` is the CPU."""
    launches, state = [], {"on": False}
    pack, empty = launch._packed, torch.empty

    def record(launched, program):
        if state["on"]:
            launches.append(launched)
        return pack(launched, program)

    def refuse(*_, **__):
        raise AssertionError("a copy from the host, or memory of it, in the capture of a graph")

    def empty_on_cpu(*sizes, **options):
        if options.get("pin_memory"):
            refuse()
        return empty(*sizes, **{k: ("cpu" if v == CUDA else v) for k, v in options.items()})

    @contextlib.contextmanager
    def capturing():
        launches.clear()
        state["on"] = True
        with monkeypatch.context() as patch:
            for where, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (common, "on_device")):
                patch.setattr(where, name, refuse)
            patch.setattr(table, "on_device", refuse)
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "pin_memory"):
                patch.setattr(torch.Tensor, name, refuse)
            yield launches
        state["on"] = False

    monkeypatch.setattr(launch, "_packed", record)
    monkeypatch.setattr(torch, "empty", empty_on_cpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    streams = lambda device: types.SimpleNamespace(cuda_stream=7 if state["on"] else 0)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", streams)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["on"])
    monkeypatch.setattr(table, "on_device", lambda tables, device: common.on_device(tables, torch.device("cpu")))
    return capturing


def replay(launches):
    """What a graph does: the kernels, and torch's operations between them, in their order, on what memory holds now."""
    for recorded in list(launches):
        if not isinstance(recorded, _Operation):
            launch.execute(recorded)
            continue
        with torch.no_grad():
            results = recorded.function(*recorded.args, **recorded.kwargs)
            for old, new in zip(*map(pytree.tree_leaves, (recorded.results, results)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Operation(NamedTuple):
    function: Any
    args: Any
    kwargs: Any
    results: Any


class _Operations(TorchDispatchMode):
    """Records torch's own operations among the launches."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.launches.append(_Operation(function, args, kwargs or {}, results))
        return results


def entries_of(tensors):
    codes = [norms.DTYPES.index(t.dtype) for t in tensors]
    return norms.Entries([t.data_ptr() for t in tensors], [t.numel() for t in tensors], codes, [*range(len(tensors))])


def gradients():
    torch.manual_seed(0)
    return [torch.randn(n).to(d) for n, d in ((9001, torch.bfloat16), (77, torch.float32), (300, torch.float64))]


def test_a_norm_and_its_scaling(capturing):
    tensors = gradients()
    table._plans.clear()
    warm = table.prepare(entries_of(tensors), CUDA)
    with capturing() as launches:
        plan = table.prepare(entries_of(tensors), CUDA)
        assert plan is warm
        norm64, *_, each = kernels.norm(plan, len(tensors))
        kernels.scale(plan, norm64, 1.0, "zero")
    assert len(launches) == 8  # two dtypes' norms and scalings, four more kernels
    for scale in (1.0, 1e3, 1e-25, 1e30):
        for t in tensors:
            t.copy_(torch.randn(t.shape) * scale)
        exact = torch.stack([t.double().norm() for t in tensors])
        replay(launches)
        torch.testing.assert_close(norm64, exact.norm(), rtol=1e-6, atol=0.0)
        torch.testing.assert_close(each, exact, rtol=1e-6, atol=0.0)
        left = torch.stack([t.double().norm() for t in tensors]).norm()
        torch.testing.assert_close(left, exact.norm().clamp(max=1.0), rtol=1e-3, atol=0.0)
    tensors[1][5] = NAN
    replay(launches)
    assert norm64.isnan()
    assert not any(t.any() for t in tensors)


def test_a_table_lives_as_long_as_graphs_may(capturing):
    """However many other gradients are clipped after it."""
    tensors = gradients()
    table._plans.clear()
    table.prepare(entries_of(tensors), CUDA)
    with capturing() as launches:
        plan = table.prepare(entries_of(tensors), CUDA)
        norm64 = kernels.norm(plan)[0]
        assert table.prepare(entries_of(tensors), CUDA) is plan
    assert sum(kept is plan for kept in table._captured) == 1
    address = plan.table.data_ptr()
    del plan
    for n in range(1, 40):
        table.prepare(entries_of([torch.zeros(n)]), CUDA)
    assert any(plan.table.data_ptr() == address for plan in table._captured)
    replay(launches)
    torch.testing.assert_close(norm64, torch.cat([t.double() for t in tensors]).norm(), rtol=1e-6, atol=0.0)


def test_gradients_that_were_not_seen_before_are_left_to_torch(capturing):
    with capturing():
        assert table.prepare(entries_of(gradients()), CUDA) is None


@pytest.mark.parametrize("indices", [[0, 1, 2], [1, 4, 5]])
def test_what_is_left_to_torch_copies_nothing_from_the_host(indices, capturing, serving, monkeypatch):
    tensors = gradients()
    tensors[1][3] = INF
    monkeypatch.setattr(norms, "_host_readable", lambda tensor: False)  # as on a GPU
    with serving("torch"):
        with capturing():
            found = grad_norm(norms.TensorGroups(tensors, indices), per_tensor=True)
            norms.clip_(tensors, found.norm64, 1.0, nonfinite="zero")
        assert (int(found.flag), int(found.first_nonfinite_index)) == (2, indices[1])
    assert not any(t.any() for t in tensors)


@pytest.fixture
def parameters(monkeypatch):
    """Parameters with gradients, which the backend takes to be on `cuda:0`."""
    prepare = kernels.prepare
    monkeypatch.setattr(kernels, "prepare", lambda entries, device: prepare(entries, CUDA))
    monkeypatch.setattr(norms, "_host_readable", lambda tensor: False)
    table._plans.clear()
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (9001, 77)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    return parameters


def check_replays(launches, gradients):
    assert sum(not isinstance(recorded, _Operation) for recorded in launches) > 2
    for scale in (1.0, 1e-3, 1e20):
        for g in gradients:
            g.copy_(torch.randn(g.shape) * scale)
        expected = [g.double() for g in gradients]
        norm = torch.cat(expected).norm()
        replay(launches)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(
                ours.double(), theirs * (1.0 / (norm + 1e-6)).clamp(max=1.0), rtol=1e-5, atol=0.0
            )


def test_clip_grad_norm_(capturing, parameters):
    initlab.clip_grad_norm_(parameters, 1.0)
    with capturing() as launches, _Operations(launches):
        initlab.clip_grad_norm_(parameters, 1.0)
    check_replays(launches, [p.grad for p in parameters])


def test_grad_clipper(capturing, parameters):
    clipper = initlab.GradClipper(torch.optim.SGD(parameters, lr=0.0), max_norm=1.0, nonfinite="propagate")
    (optimizer,) = clipper._optimizers
    optimizer.step()
    with capturing() as launches, _Operations(launches):
        optimizer.step()
    check_replays(launches, [p.grad for p in parameters])


def test_a_fused_optimizer_skips_without_the_host(capturing, parameters):
    optimizer = torch.optim.AdamW(parameters, fused=True)
    initlab.GradClipper(optimizer, max_norm=1.0)
    optimizer.step()
    with capturing() as launches:
        optimizer.step()
    assert launches


def test_flags(capturing):
    x, flags = torch.zeros(9000), torch.zeros(1, dtype=torch.int32)
    add_flag_(flags, x)
    with capturing() as launches:
        add_flag_(flags, x)
    for value, expected in ((NAN, 1), (-INF, 5), (1.0, 5)):
        x[8999] = value
        replay(launches)
        assert int(flags) == expected


def test_linear_relu(capturing):
    torch.manual_seed(0)
    x, w, b = torch.randn(70, 72).bfloat16(), torch.randn(136, 72).bfloat16(), torch.randn(136).bfloat16()
    flags = torch.zeros(1, dtype=torch.int32)
    linear_relu(x, w, b, flags=flags)
    with capturing() as launches:
        y = linear_relu(x, w, b, flags=flags)
    for _ in range(2):
        x.copy_(torch.randn(70, 72))
        replay(launches)
        exact = torch.relu(x.double() @ w.double().T + b.double())
        torch.testing.assert_close(y.double(), exact, rtol=2.0**-7, atol=0.1)
        assert int(flags) == 0
    x[3, 5] = NAN
    replay(launches)
    assert int(flags) == 1


def test_a_fill_is_refused_with_a_way_out(capturing, monkeypatch):
    with capturing(), pytest.raises(RuntimeError, match="Fill before the capture"):
        fill._fill_together([], CUDA)
    x = torch.empty(9)
    fill_([Draw(x, Normal(), 1)])
    assert x.isfinite().all()
