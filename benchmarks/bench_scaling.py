"""How time grows: with elements, threads and tensors; each contestant in turns with ours.

``pytest benchmarks/bench_scaling.py --benchmark-only``; INITLAB_BENCH_ELEMENTS caps the elements. Peers: torch.nn.init,
numpy's Generator, transformers' and timm's trunc_normal_ where they are installed, torch's clipping with foreach and
without, torch.compile of the same formula where there is a compiler.
"""

import importlib.util
import math
import os
import shutil

import numpy
import pytest
import torch
import torch.nn.functional as F
from bench_clip import gate as clip_gate
from bench_clip import parameters
from bench_linear_relu import gate as linear_gate
from bench_linear_relu import operands, plain
from bench_sampling import gate
from initlab.kernels import Draw, Normal, TruncatedNormal, fill_, named_key

import initlab
from initlab import init

LARGEST = int(os.environ.get("INITLAB_BENCH_ELEMENTS", 1 << 28))
POWERS = [power for power in range(10, 29, 2) if 1 << power <= LARGEST]


def rounds_for(elements):
    """Fewer where a round takes long; never so few that compare.py can say nothing."""
    return 7 if elements >= 1 << 26 else 15


def repeated(call, elements):
    """As often as it takes until a round is no matter of microseconds, and that number."""
    times = max(1, (1 << 16) // elements)
    if times == 1:
        return call, 1

    def calls():
        for _ in range(times):
            call()

    return calls, times


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", ["uniform_", "normal_"])
def test_elements(versus, name, power):
    """One float32 tensor of 2^power elements."""
    gate(Normal(), torch.float32)
    x = torch.empty(1 << power)
    generator, array = numpy.random.default_rng(0), x.numpy()
    draw = generator.standard_normal if name == "normal_" else generator.random
    contestants = {
        "ours": lambda: getattr(init, name)(x),
        "peer": lambda: getattr(torch.nn.init, name)(x),
        "numpy": lambda: draw(out=array, dtype=numpy.float32),
        "floor": lambda: x.fill_(1.0),
    }
    calls = {key: repeated(call, x.numel()) for key, call in contestants.items()}
    ours, times = calls["ours"]
    versus(
        ours=ours,
        peer=calls["peer"][0],
        others={"numpy's Generator": calls["numpy"][0]},
        floor=calls["floor"][0],
        elements=x.numel() * times,
        element_size=4,
        rounds=rounds_for(x.numel()),
        sweep=(name, "elements", x.numel()),
    )


@pytest.mark.parametrize("threads", range(1, (os.cpu_count() or 1) + 1))
def test_threads(versus, threads):
    """normal_ on 2^24 elements."""
    gate(Normal(), torch.float32)
    x, before = torch.empty(min(1 << 24, LARGEST)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        versus(
            ours=lambda: init.normal_(x),
            peer=lambda: torch.nn.init.normal_(x),
            floor=lambda: x.fill_(1.0),
            elements=x.numel(),
            element_size=4,
            rounds=11,
            sweep=("normal_", "threads", threads),
        )
    finally:
        torch.set_num_threads(before)


COUNTS = [1, 10, 100, 1000, 10_000]


@pytest.mark.parametrize("count", COUNTS)
def test_tensors(versus, count):
    """2^22 elements in all, in one call of fill_; the peer draws tensor by tensor."""
    gate(Normal(), torch.float32)
    tensors = [torch.empty((1 << 22) // count) for _ in range(count)]
    draws = [Draw(x, Normal(), named_key(0, str(place))) for place, x in enumerate(tensors)]
    versus(
        ours=lambda: fill_(draws),
        peer=lambda: [torch.nn.init.normal_(x) for x in tensors],
        floor=lambda: [x.fill_(1.0) for x in tensors],
        elements=sum(x.numel() for x in tensors),
        element_size=4,
        rounds=11,
        sweep=("fill_ of normals", "tensors", count),
    )


@pytest.mark.parametrize("count", COUNTS)
def test_gradients(versus, count):
    """clip_grad_norm_ of 2^22 gradients in all, nothing clipped."""
    params = parameters(count, 1 << 22)
    clip_gate(params)
    limit = 1e9

    def torchs(foreach):
        return lambda: torch.nn.utils.clip_grad_norm_(params, limit, foreach=foreach)

    flat = torch.ones(1 << 22)
    versus(
        ours=lambda: initlab.clip_grad_norm_(params, limit),
        peer=torchs(True),
        others={"foreach=False": torchs(False)},
        floor=lambda: flat.sum(),
        elements=sum(p.numel() for p in params),
        element_size=4,
        rounds=11,
        sweep=("clip_grad_norm_", "tensors", count),
    )


def _library(name):
    """A library's own trunc_normal_, or None where it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    if name == "timm":
        from timm.layers import trunc_normal_
    else:
        from transformers.initialization import trunc_normal_
    return trunc_normal_


@pytest.mark.parametrize("name", ["transformers", "timm"])
def test_libraries(versus, name):
    """trunc_normal_ as libraries call it, at their own bounds: 2 and 0.02."""
    theirs = _library(name)
    if theirs is None:
        pytest.skip(f"{name} is not installed")
    gate(TruncatedNormal(0.0, 0.02), torch.float32)
    x = torch.empty(min(1 << 24, LARGEST))
    versus(
        ours=lambda: init.trunc_normal_(x, std=0.02),
        peer=lambda: theirs(x, std=0.02),
        floor=lambda: x.fill_(1.0),
        elements=x.numel(),
        element_size=4,
        rounds=11,
        sweep=(f"trunc_normal_ of {name}", None, None),
    )


def with_compiler(test):
    """A test of what torch.compile makes of our formula."""
    missing = not any(map(shutil.which, ("c++", "g++", "clang++")))
    # The compiler's own imports warn.
    return pytest.mark.filterwarnings("default")(pytest.mark.skipif(missing, reason="no C++ compiler")(test))


@with_compiler
def test_compiled_linear_relu(versus):
    """F.relu(F.linear) with a count of what is not finite, compiled by torch; ours has the flag in its kernel."""
    x, w, b = operands("K=128", torch.float32)
    flags = linear_gate(x, w, b)

    def formula(x, w, b):
        z = F.linear(x, w, b)
        return F.relu(z), z.isfinite().all()

    compiled = torch.compile(formula)
    y, finite = compiled(x, w, b)
    assert bool(finite)
    torch.testing.assert_close(y, plain(x, w, b))
    versus(
        ours=lambda: initlab.linear_relu(x, w, b, flags=flags),
        peer=lambda: compiled(x, w, b),
        floor=lambda: F.linear(x, w, b),
        elements=y.numel(),
        element_size=4,
        rounds=15,
        sweep=("linear_relu, torch.compile", None, None),
    )


@with_compiler
def test_compiled_norm(versus):
    """The norm of 16 gradients as torch compiles its formula; one read of 2^24 elements each."""
    params = parameters(16, min(1 << 24, LARGEST))
    clip_gate(params)
    grads = [p.grad for p in params]

    def formula(grads):
        return torch.stack([g.square().sum() for g in grads]).sum().sqrt()

    compiled = torch.compile(formula)
    norm = float(compiled(grads))
    assert math.isclose(norm, float(initlab.get_total_norm(grads)), rel_tol=1e-4)
    flat = torch.ones(sum(g.numel() for g in grads))
    versus(
        ours=lambda: initlab.get_total_norm(grads),
        peer=lambda: compiled(grads),
        floor=lambda: flat.sum(),
        elements=flat.numel(),
        element_size=4,
        rounds=15,
        sweep=("get_total_norm, torch.compile", None, None),
    )
