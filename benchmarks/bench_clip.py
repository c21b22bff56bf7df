"""initlab's gradient clipping against torch.nn.utils on 2^26 float32 gradients, in 16 and in 2,000 tensors.

``pytest benchmarks/bench_clip.py --benchmark-only``; INITLAB_BENCH_ELEMENTS sets another size. Moved: unclipped one
read, clipped two reads and a write; torch always does the latter. The floor, in the column fill_, is a sum: one read.
It comes right before each of our calls, so torch's OpenMP threads still spin then, as they do after a backward pass.
"""

import itertools
import os

import pytest
import torch

import initlab

ELEMENTS = int(os.environ.get("INITLAB_BENCH_ELEMENTS", 1 << 26))


def parameters(count, elements=ELEMENTS, dtype=torch.float32):
    """`count` parameters whose gradients have `elements` elements in all."""
    torch.manual_seed(0)
    sizes = torch.rand(count) + 0.5
    sizes = (sizes / sizes.sum() * elements).long().tolist()
    params = []
    for n in sizes:
        p = torch.nn.Parameter(torch.empty(n, dtype=dtype))
        p.grad = torch.randn(n).to(dtype)
        params.append(p)
    return params


def gate(params):
    """The norm is right before anything is timed."""
    exact = sum(p.grad.double().square().sum() for p in params).sqrt()
    assert abs(float(initlab.get_total_norm(p.grad for p in params)) / float(exact) - 1) < 1e-6


@pytest.mark.parametrize("clipped", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("count", [16, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_clip_grad_norm(versus, count, clipped, dtype):
    time_clip_grad_norm(versus, count, clipped, dtype)


@pytest.mark.parametrize("clipped", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("count", [16, 2000])
def test_on_the_pool(versus, count, clipped, monkeypatch):
    """As where OpenMP cannot be called: on threads beside torch's."""
    monkeypatch.setattr(pytest.importorskip("initlab.kernels._common_numba"), "_openmp", None)
    time_clip_grad_norm(versus, count, clipped, torch.float32)


def time_clip_grad_norm(versus, count, clipped, dtype):
    params = parameters(count, dtype=dtype)
    gate(params)
    n = sum(p.numel() for p in params)
    norm = float(initlab.get_total_norm(p.grad for p in params))
    flat = torch.ones(n, dtype=dtype)
    falling = itertools.accumulate(itertools.repeat(0.999), lambda a, b: a * b, initial=norm)  # so that each call clips

    def max_norm():
        return next(falling) if clipped else 2.0 * norm

    versus(
        ours=lambda: initlab.clip_grad_norm_(params, max_norm()),
        peer=lambda: torch.nn.utils.clip_grad_norm_(params, max_norm()),
        floor=lambda: flat.sum(),
        elements=n,
        element_size=flat.element_size(),
        rounds=11,
    )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_step_with_clipper(versus, fused):
    """A step of AdamW with clipping: GradClipper against clip_grad_norm_ before the same step."""
    n = max(16, ELEMENTS // 4)
    ours, theirs = parameters(16, n), parameters(16, n)
    our_optimizer = torch.optim.AdamW(ours, fused=fused, foreach=not fused)
    their_optimizer = torch.optim.AdamW(theirs, fused=fused, foreach=not fused)
    initlab.GradClipper(our_optimizer, max_norm=1.0)
    flat = torch.ones(n)

    def step():
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        their_optimizer.step()

    versus(ours=our_optimizer.step, peer=step, floor=lambda: flat.sum(), elements=n, element_size=4, rounds=11)
