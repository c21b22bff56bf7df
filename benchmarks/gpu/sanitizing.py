"""Every kernel under NVIDIA's compute-sanitizer: memory out of bounds or not aligned, and races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from initlab.kernels import Draw, Normal, TruncatedNormal, Uniform, add_flag_, fill_, named_key
from initlab.kernels import _linear_triton as linear

import initlab

from .config import DEVICE, DRY, ROOT
from .report import Findings

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # the sanitizer's exit status for a fault, which no run of ours has


def sanitizer() -> str | None:
    """Where compute-sanitizer lies: on PATH, or in the CUDA toolkit's usual folder."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def check_sanitizer(findings: Findings) -> None:
    """Run `touch` in a process of its own under each tool; each takes a minute or two on a GPU."""
    tool_path = sanitizer()
    if tool_path is None:
        findings.check("compute-sanitizer is installed, as --sanitize asks", False)
        return
    # Each tensor is an allocation of its own, so that an access beside it is seen.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        script = [sys.executable, str(Path(__file__).parent), "--touch", *(["--dry"] if DRY else [])]
        command = [tool_path, "--tool", tool, "--error-exitcode", str(FOUND), *script]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        findings.check(f"compute-sanitizer, {tool}: every kernel, small and odd sizes", done.returncode == 0)
        if done.returncode:
            findings.notes.append(f"{tool}, exit status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")


def touch() -> None:
    """Run each kernel on small, odd and unaligned tensors."""
    distributions = (Uniform(-1.0, 1.0), Normal(0.0, 1.0), TruncatedNormal(), TruncatedNormal(0.0, 1.0, -2.0, 2.0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for place, distribution in enumerate(distributions):
            tensors = [torch.empty(n + 1, dtype=dtype, device=DEVICE)[1:] for n in (1, 63, 4097)]
            fill_([Draw(x, distribution, named_key(place, str(n))) for n, x in enumerate(tensors)])
        parameters = [torch.nn.Parameter(torch.empty_like(x)) for x in tensors]
        for parameter, x in zip(parameters, tensors, strict=True):
            parameter.grad = x
        for nonfinite in ("propagate", "keep"):
            initlab.clip_grad_norm_(parameters, 0.5, nonfinite=nonfinite)
        initlab.get_total_norm(tensors, norm_type=float("inf"))
        add_flag_(torch.zeros(1, dtype=torch.int32, device=DEVICE), tensors[-1])
        if dtype == torch.float64:
            continue
        for rows, depth, columns in ((1, 64, 8), (19, 24, 40), (130, 72, 136)):
            x, w, b = (torch.randn(s, device=DEVICE).to(dtype) for s in ((rows, depth), (columns, depth), (columns,)))
            x, w, b = (t.requires_grad_() for t in (x, w, b))
            flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
            for activation in ("relu", "relu_squared"):
                initlab.linear_relu(x, w, b, flags=flags, activation=activation).sum().backward()
            with torch.no_grad():  # both ways, whichever the op chose
                linear.gemm(x, w, b, flags, 8)
                linear.relu_in_place(torch.addmm(b, x, w.t()), flags)
    if not DRY:
        torch.cuda.synchronize()
