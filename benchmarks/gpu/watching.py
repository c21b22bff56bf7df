"""Flags of non-finite values, and watch(): planted faults are found, nothing waits, and what a step then costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from initlab.kernels import add_flag_, nonfinite_flag

import initlab

from .config import DEVICE, DRY, ELEMENTS
from .report import Findings
from .timing import host_seconds, race


def check_watch(findings: Findings) -> None:
    """Flag words of planted values; a fault planted on the device is found, and nothing waits before the report."""
    same = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for size in (1, 4097, ELEMENTS // 16 + 3):
            for value, word in ((1.0, 0), (float("nan"), 1), (float("inf"), 2), (-float("inf"), 4)):
                for shift in (0, 1):  # aligned, and not
                    x = torch.randn(size + shift, device=DEVICE).to(dtype)
                    x[-1] = value
                    flags = add_flag_(torch.zeros(1, dtype=torch.int32, device=DEVICE), x[shift:])
                    same &= int(flags) == word == int(nonfinite_flag(x[shift:]))
    findings.check("flag words of planted values", same)
    for phase in ("forward", "backward"):
        net, step = watched_mlp()
        net.planted.phase = phase
        with initlab.watch(net, backward=True) as watching:
            step()
            step()
            if not DRY:
                torch.cuda.set_sync_debug_mode("error")
            try:
                net.planted.at = 4
                for _ in range(5):
                    step()
                waited = False
            except RuntimeError as error:
                waited = True
                findings.notes.append(f"watch(), {phase}: {error}"[:300])
            finally:
                if not DRY:
                    torch.cuda.set_sync_debug_mode("default")
        fault = watching.report().fault
        place = (fault.step, fault.phase, fault.module) if fault else None
        findings.check(f"watch() finds {place} and waits for nothing", place == (4, phase, "planted") and not waited)


def watched_mlp() -> tuple[Any, Callable[[], None]]:
    """An MLP of ten layers with a place for a fault, and a training step of it."""
    width, batch = (16, 4) if DRY else (4096, 4096)
    layers = [make() for _ in range(5) for make in (lambda: torch.nn.Linear(width, width), torch.nn.ReLU)]
    net = torch.nn.Sequential()
    for place, layer in enumerate((*layers[:5], _Planted(), *layers[5:])):
        net.add_module("planted" if place == 5 else str(place), layer)
    net.to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)
    x = torch.randn(batch, width, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizer.step()

    return net, step


class _Planted(torch.nn.Module):
    """The identity; at one of its calls its output, or its gradient, is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.calls, self.at = "forward", 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        bad = self.calls == self.at
        if bad and self.phase == "backward":
            return x.sub(x.detach()).sqrt().mul(0.0) + x.detach()  # 0 * inf, going back
        return x * float("nan") if bad else x * 1.0


def time_watch(findings: Findings) -> None:
    """A training step with and without watch(), and with hooks that ask torch whether each output is finite."""
    watched, step = watched_mlp()
    both, both_step = watched_mlp()
    checked, checked_step = watched_mlp()
    _, plain_step = watched_mlp()
    words: list[torch.Tensor] = []
    for module in checked:
        module.register_forward_hook(lambda module, args, output: words.append(output.isfinite().all()))

    def with_hooks() -> None:
        words.clear()
        checked_step()

    name = f"a training step, {sum(p.numel() for p in watched.parameters()) / 1e6:.0f}M parameters"
    nbytes = sum(p.numel() * p.element_size() for p in watched.parameters())
    contestants = {
        "watch()": step,
        "watch(backward=True)": both_step,
        "not watched": plain_step,
        "isfinite().all() of outputs": with_hooks,
    }
    with initlab.watch(watched), initlab.watch(both, backward=True):
        race(findings, name, contestants, nbytes, host_seconds)
