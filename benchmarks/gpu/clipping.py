"""Gradient norms and clipping: against float64, on one rank of eight, and against torch's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import initlab
from initlab.distributed.dtensors import local
from initlab.distributed.shards import local_shards

from .backends import with_backend
from .config import DEVICE, DRY
from .report import Findings
from .timing import host_seconds, race, seconds


def check_clipping(findings: Findings) -> None:
    """Norms, scaling, flags and a GradClipper's training against float64 on the CPU; no wait for the device."""
    sizes = (3, 4097) if DRY else (1, 7, 4095, 4097, 1 << 20, (1 << 24) + 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for exponent in (0, 30, -30) if dtype != torch.float16 else (0,):
            torch.manual_seed(0)
            gradients = [(torch.randn(n + 1) * 10.0**exponent).to(dtype).to(DEVICE)[1:] for n in sizes]
            exact = float(torch.cat([g.double().cpu().div(10.0**exponent) for g in gradients]).norm()) * 10.0**exponent
            before = [g.clone() for g in gradients]
            params = _with_gradients(gradients)
            norm = initlab.clip_grad_norm_(params, 3 * (exact + 1e-6))
            good = abs(float(norm) / exact - 1) < 1e-6
            good &= all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
            initlab.clip_grad_norm_(params, (exact + 1e-6) / 3)
            after = float(initlab.get_total_norm(p.grad for p in params))
            good &= abs(3 * after / exact - 1) < (2e-3 if dtype.itemsize == 2 else 3e-6)
            findings.check(f"clipping, {str(dtype)[6:]}, 1e{exponent}: norm and scale", good)
    for value, word in ((float("nan"), 1), (float("inf"), 2), (float("-inf"), 4)):
        gradients = [torch.randn(n, device=DEVICE) for n in sizes]
        gradients[1][-1] = value
        report = initlab.get_total_norm(gradients, report=True)
        findings.check(
            f"a planted {value} is found", (int(report.flag), int(report.first_nonfinite_index)) == (word, 1)
        )
    one, two = ([p.clone() for p in _trained(clipper)] for clipper in (True, False))
    close = all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(one, two, strict=True))
    findings.check("GradClipper with fused AdamW trains as clip_grad_norm_ before it, and never waits", close)


def _trained(clipper: bool) -> list[torch.Tensor]:
    """A small network after some steps, one of them with a NaN in a gradient."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16)).to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, fused=True)
    x = torch.randn(64, 16, device=DEVICE)
    if clipper:
        initlab.GradClipper(optimizer, 0.1)
    for step in range(5 if DRY else 50):
        optimizer.zero_grad()
        (net(x) - x.flip(1)).square().mean().backward()
        if step == 3:
            if not clipper:
                continue
            net[0].weight.grad[3, 3] = float("nan")
        if not clipper:
            initlab.clip_grad_norm_(net.parameters(), 0.1)
        if not DRY and step > 5:  # whatever waits for the device raises
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            if not DRY:
                torch.cuda.set_sync_debug_mode("default")
    return [p.detach() for p in net.parameters()]


def check_sharded(findings: Findings) -> None:
    """One rank of eight, without the others: its shards from meta, and clipping them without a wait for the device."""
    whole = torch.nn.Sequential(torch.nn.Linear(63, 129), torch.nn.Linear(129, 63))
    with_backend("auto" if not DRY else "torch", lambda: initlab.init_model_(whole, 3, "gpt2"))
    dist.init_process_group("fake", rank=5, world_size=8)  # its collectives do nothing
    try:
        with torch.device("meta"):
            mine = torch.nn.Sequential(torch.nn.Linear(63, 129), torch.nn.Linear(129, 63))
        fully_shard(mine, mesh=dist.init_device_mesh(DEVICE.type, (8,)))
        initlab.init_model_(mine, 3, "gpt2", device=DEVICE)
        same = True
        for name, parameter in mine.named_parameters():
            for part, region in local_shards(parameter):
                where = zip(region.offsets, region.sizes, strict=True)
                expected = whole.get_parameter(name)[tuple(slice(start, start + size) for start, size in where)]
                same &= torch.equal(part.cpu(), expected)
            parameter.grad = parameter.detach().clone()
        findings.check("a rank of eight fills its shards with its part of the CPU's bits", same)
        exact = torch.cat([local(p).double().flatten().cpu() for p in mine.parameters()]).norm()
        initlab.clip_grad_norm_(mine.parameters(), 1e9)  # compiles
        if not DRY:
            torch.cuda.set_sync_debug_mode("error")
        try:
            norm = initlab.clip_grad_norm_(mine.parameters(), float(exact) / 2, nonfinite="keep")
        finally:
            if not DRY:
                torch.cuda.set_sync_debug_mode("default")
        after = torch.cat([local(p.grad).double().flatten().cpu() for p in mine.parameters()]).norm()
        good = abs(float(norm) / exact - 1) < 1e-6 and abs(2 * after / exact - 1) < 3e-6
        findings.check("its gradients are clipped by their norm, and nothing waits", good)
    finally:
        dist.destroy_process_group()


def time_clipping(findings: Findings) -> None:
    """Clipping against torch's, unclipped and clipped, and inside a step of a fused optimizer."""
    total = 1 << 14 if DRY else 1 << 30
    for dtype in (torch.bfloat16, torch.float32):
        for count in (16, 20 if DRY else 2000):
            n = total // dtype.itemsize // count
            params = _with_gradients([torch.randn(n, device=DEVICE).to(dtype) for _ in range(count)])
            norm = float(initlab.get_total_norm(p.grad for p in params))
            for clipped in (False, True):
                largest = [norm if clipped else 2 * norm]

                def max_norm(largest: list[float] = largest, factor: float = 0.999 if clipped else 1.0) -> float:
                    largest[0] *= factor
                    return largest[0]

                contestants: dict[str, Callable[[], Any]] = {
                    "initlab": lambda ps=params, m=max_norm: initlab.clip_grad_norm_(ps, m()),
                    "torch, foreach": lambda ps=params, m=max_norm: torch.nn.utils.clip_grad_norm_(ps, m()),
                    "torch._foreach_norm and _mul_": lambda ps=params, m=max_norm: _foreach_clip_(ps, m()),
                }
                for peer, clip in peers(count):
                    contestants[peer] = lambda clip=clip, ps=params, m=max_norm: clip(ps, m())
                name = f"clip_grad_norm_, {count} tensors, {'clipped' if clipped else 'unclipped'}, {str(dtype)[6:]}"
                # Bytes: one read; clipped, two reads and a write.
                race(findings, name, contestants, (3 if clipped else 1) * n * count * dtype.itemsize, seconds)
            small = _with_gradients([torch.randn(64, device=DEVICE).to(dtype) for _ in range(count)])
            name = f"clip_grad_norm_ from the host, {count} tensors of 64, {str(dtype)[6:]}"
            contestants = {
                "initlab": lambda ps=small: initlab.clip_grad_norm_(ps, 1e30),
                "torch, foreach": lambda ps=small: torch.nn.utils.clip_grad_norm_(ps, 1e30),
            }
            race(findings, name, contestants, 64 * count * dtype.itemsize, host_seconds)
            del params, small
    n, count = (1 << 10, 4) if DRY else (1 << 24, 16)
    steps: dict[str, Callable[[], Any]] = {}
    for name in ("GradClipper", "clip_grad_norm_, initlab", "clip_grad_norm_, torch", "no clipping"):
        params = _with_gradients([torch.randn(n, device=DEVICE) for _ in range(count)])
        optimizer = torch.optim.AdamW(params, fused=True)
        clip: Callable[[Any, float], Any] | None = None
        if name == "GradClipper":
            initlab.GradClipper(optimizer, 1.0)
        elif name != "no clipping":
            clip = initlab.clip_grad_norm_ if name.endswith("initlab") else torch.nn.utils.clip_grad_norm_

        def step(params: Any = params, optimizer: Any = optimizer, clip: Any = clip) -> None:
            if clip is not None:
                clip(params, 1.0)
            optimizer.step()

        steps[name] = step
    # AdamW reads gradient, parameter and two moments, and writes three of them; the norm reads once more.
    race(findings, "a step of fused AdamW with clipping, float32", steps, 8 * 4 * n * count, seconds)


def _foreach_clip_(params: list[torch.nn.Parameter], max_norm: float | torch.Tensor) -> torch.Tensor:
    """Clipping by torch's operations on lists, and nothing else."""
    return _scale_(cast(list[torch.Tensor], [p.grad for p in params]), max_norm)


def _scale_(gradients: list[torch.Tensor], max_norm: float | torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(gradients)]))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].dtype))
    return norm


def peers(count: int) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Others' clipping of `count` tensors, where it is installed."""
    if DRY:
        return
    if count <= 16:  # of 2,000 tensors it compiles for minutes
        compiled = torch.compile(_scale_)

        def compiled_clip(params: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
            # The bound is a tensor: a float would be compiled in, and each of them anew.
            return compiled([p.grad for p in params], torch.tensor(max_norm, device=DEVICE))

        yield "torch.compile", compiled_clip
    try:
        yield "apex", importlib.import_module("apex.contrib.clip_grad").clip_grad_norm_
    except Exception as error:  # whatever goes wrong on another's import, it is no peer here
        print(f"  apex: {type(error).__name__}: {error}"[:160])
    try:
        optimizers = importlib.import_module("transformer_engine.pytorch.optimizers")
        skip = torch.zeros(1, dtype=torch.int32, device=DEVICE)

        def clip(params: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
            gradients = [p.grad for p in params]
            apply = optimizers.multi_tensor_applier
            norm, _ = apply(optimizers.multi_tensor_l2norm, skip, [gradients], False)
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            apply(optimizers.multi_tensor_scale, skip, [gradients, gradients], float(factor))  # as Megatron does
            return norm

        clip(_with_gradients([torch.ones(4, device=DEVICE)]), 1.0)
        yield "Transformer Engine", clip
    except Exception as error:
        print(f"  Transformer Engine: {type(error).__name__}: {error}"[:160])


def _with_gradients(gradients: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.empty_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    return params
