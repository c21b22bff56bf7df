"""Clocks, and races between contestants."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .config import DEVICE, DRY, ROUNDS
from .report import Findings


def seconds(call: Callable[[], Any]) -> float:
    """How long a call keeps the device busy."""
    if DRY:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(200_000)  # so that the host is ahead, and its own time is not measured
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def host_seconds(call: Callable[[], Any]) -> float:
    """How long a call takes from the host's first instruction to the device's last."""
    if not DRY:
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if not DRY:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def race(
    findings: Findings, name: str, contestants: dict[str, Callable[[], Any]], nbytes: int, clock: Callable[..., float]
) -> None:
    """Time contestants in turns; the first is ours, and ratios are to it."""
    taken: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for call in contestants.values():
        for _ in range(2):
            call()
    for _ in range(ROUNDS):
        for contestant, call in contestants.items():
            taken[contestant].append(clock(call))
    ours = statistics.median(taken[next(iter(taken))])
    for contestant, times in taken.items():
        ordered = sorted(times)
        median = statistics.median(ordered)
        row = {
            "what": name,
            "contestant": contestant,
            "ms": median * 1e3,
            "p10_ms": ordered[len(ordered) // 10] * 1e3,
            "p90_ms": ordered[-1 - len(ordered) // 10] * 1e3,
            "GB/s": nbytes / median / 1e9,
            "ratio": median / ours,
        }
        findings.timings.append(row)
        print(
            f"  {name:36s} {contestant:28s} {row['ms']:9.3f} ms ({row['p10_ms']:.3f} to {row['p90_ms']:.3f}) "
            f"{row['GB/s']:8.0f} GB/s {row['ratio']:7.2f}x",
            flush=True,
        )


class Rotation:
    """Tensors used in turns, so that none is the one that the cache still holds."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self.tensors = [torch.empty(elements, dtype=dtype, device=DEVICE) for _ in range(3)]
        self.at = 0

    def next(self) -> torch.Tensor:
        self.at = (self.at + 1) % len(self.tensors)
        return self.tensors[self.at]
