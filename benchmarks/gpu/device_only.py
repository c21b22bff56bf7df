"""What no emulator can show: atomics among all processors, equal bits from run to run, NaN, graphs, streams."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from initlab.kernels import Draw, Normal, add_flag_, fill_, named_key

import initlab

from .config import DEVICE, DRY
from .report import Findings

RUNS = 3 if DRY else 1000


def check_device(findings: Findings) -> None:
    """What the emulator could not show, first."""
    for check in (_norms_repeat, _atomics, _nan_stays, _graphs, _streams):
        check(findings)


def _norms_repeat(findings: Findings) -> None:
    """Norms have equal bits 1,000 times, beside other work that keeps part of the processors busy."""
    same, busy = True, _stream()
    noise = torch.randn(1 << (6 if DRY else 11), 1 << (6 if DRY else 11), device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        torch.manual_seed(0)
        sizes = (5, 1000) if DRY else (5, 4097, 100_003, (1 << 22) + 1)
        gradients = [torch.randn(n, device=DEVICE).to(dtype) for n in sizes]
        norms = []
        for _ in range(RUNS):
            with _on(busy):
                noise = noise @ noise * 1e-3
            norms.append(initlab.get_total_norm(gradients).double())
        same &= bool((torch.stack(norms).view(torch.int64) == norms[0].view(torch.int64)).all())
    findings.check(f"a norm has equal bits {RUNS:,} times, in four dtypes", same)


def _atomics(findings: Findings) -> None:
    """Blocks on all processors or into one flag; none is lost."""
    n, lost = 1 << (14 if DRY else 26), 0
    x = torch.zeros(n, device=DEVICE)
    kinds = (float("nan"), 1), (float("inf"), 2), (-float("inf"), 4)
    for run in range(2 if DRY else 100):
        places = [(n // 7) * (run % 6) + 11 * k for k in range(3)]
        for (value, _), place in zip(kinds, places, strict=True):
            x[place] = value
        lost += int(add_flag_(torch.zeros(1, dtype=torch.int32, device=DEVICE), x)) != 7
        x[places] = 0.0
    findings.check("no flag of many blocks is lost", lost == 0)


def _nan_stays(findings: Findings) -> None:
    """A maximum keeps a NaN: ReLU's, and that of the norm of infinity."""
    good = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(64, 64, device=DEVICE).to(dtype)
        x[3] = float("nan")
        y = initlab.linear_relu(x, torch.eye(64, device=DEVICE).to(dtype))
        good &= bool(y[3].isnan().all()) and not bool(y[4:].isnan().any())
        good &= bool(initlab.get_total_norm([x.float()], norm_type=float("inf")).isnan())
    findings.check("a maximum keeps a NaN", good)


def _graphs(findings: Findings) -> None:
    """Captured clipping, GradClipper and flags, replayed with other values in the same memory; fills are refused."""
    sizes = (7, 1000) if DRY else (7, 4097, (1 << 20) + 3)
    grads = [torch.randn(n, device=DEVICE) for n in sizes]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def step() -> torch.Tensor:
        add_flag_(flag, grads[-1])
        return initlab.clip_grad_norm_(params, 1.0)

    replay = _captured(step)
    good = True
    for scale in (3.0, 0.001):
        fresh = [torch.randn_like(g) * scale for g in grads]
        for g, f in zip(grads, fresh, strict=True):
            g.copy_(f)
        norm = replay()
        exact = torch.cat([f.double() for f in fresh]).norm()
        clipped = torch.cat([f.double() for f in fresh]) * min(1.0, 1.0 / (float(exact) + 1e-6))
        good &= abs(float(norm) / float(exact) - 1) < 1e-6 and int(flag) == 0
        good &= bool((torch.cat([g.double() for g in grads]) - clipped).norm() <= 1e-6 * clipped.norm())
    grads[-1][-1] = float("nan")
    replay()
    findings.check("a captured clip_grad_norm_ and its flag are replayed", good and int(flag) == 1)

    sgd = torch.optim.SGD(params, 1.0)
    initlab.GradClipper(sgd, 1.0, nonfinite="propagate")
    replay = _captured(sgd.step)
    for p, g in zip(params, grads, strict=True):
        p.data.zero_()
        g.copy_(torch.randn_like(g))
    expected = torch.cat([g.double() for g in grads])
    expected /= -max(1.0, float(expected.norm()) + 1e-6)
    replay()
    close = (torch.cat([p.detach().double() for p in params]) - expected).norm() <= 1e-6 * expected.norm()
    findings.check("a captured GradClipper is replayed", bool(close))
    if DRY:
        findings.notes.append("without a GPU nothing is captured: the steps were called")
        return
    refused = False
    try:
        _captured(lambda: fill_([Draw(grads[0], Normal(0.0, 1.0), 1)]), warm=False)
    except RuntimeError as error:
        refused = "CUDA graph" in str(error)
    findings.check("a fill in a capture is refused", refused)


def _streams(findings: Findings) -> None:
    """Two streams fill and measure at once, again and again: tables in pinned memory are not written over too early."""
    count, n = (3, 100) if DRY else (200, 4097)
    streams = (_stream(), _stream())
    distribution = Normal(0.0, 1.0)
    tensors = [[torch.empty(n + k, device=DEVICE) for k in range(count)] for _ in streams]
    for round_ in range(1 if DRY else 20):
        for index, (stream, mine) in enumerate(zip(streams, tensors, strict=True)):
            with _on(stream):
                keys = [named_key(round_, f"{index}.{k}") for k in range(count)]
                fill_([Draw(x, distribution, key) for x, key in zip(mine, keys, strict=True)])
    norms = []
    for stream, mine in zip(streams, tensors, strict=True):
        with _on(stream):
            norms.append(initlab.get_total_norm(mine))
    if not DRY:
        torch.cuda.synchronize()
    same = True
    for index, (mine, norm) in enumerate(zip(tensors, norms, strict=True)):
        for k, x in enumerate(mine):
            y = torch.empty_like(x)
            fill_([Draw(y, distribution, named_key(0 if DRY else 19, f"{index}.{k}"))])
            same &= torch.equal(x, y)
        exact = torch.cat([x.double() for x in mine]).norm()
        same &= abs(float(norm) / float(exact) - 1) < 1e-6
    findings.check("two streams fill and measure at once", same)


def _stream() -> Any:
    return None if DRY else torch.cuda.Stream()


def _on(stream: Any) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def _captured(call: Callable[[], Any], warm: bool = True) -> Callable[[], Any]:
    """A call that replays what `call` launched; without a GPU `call` itself. Warmed up, so that all is compiled."""
    if DRY:
        return call
    if warm:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
