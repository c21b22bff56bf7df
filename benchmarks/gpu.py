"""Checks and times the GPU kernels: `make gpu`, or `python benchmarks/gpu.py [--dry] [OUT]`, from the bare checkout.

No network, nothing installed, under 8 minutes. It prints and, where a folder is given, saves ``gpu.json`` and
``gpu.md``: the machine; whether the GPU gives the stream's golden values and the CPU's bits; then timings by CUDA
events, contestants in turns, each on memory that was not written last, median with 10th and 90th percentile, and how
much of the write bandwidth that ``fill_`` reaches they use. Nothing is timed unless every check has passed.

``--dry`` runs all of it on a machine without a GPU: Triton's interpreter, tiny sizes, the clock of the host. Its
figures mean nothing and are marked so; it is there so that the script cannot fail on its first contact with a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    os.environ["INITLAB_BACKEND"] = "triton"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402, I001

import initlab  # noqa: E402 - in a checkout it makes initlab.kernels importable
from initlab.kernels import Draw, Normal, Region, TruncatedNormal, Uniform, backend_of, fill_, named_key  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
GOLDEN = ROOT / "tests" / "golden" / "stream_v1.json"
ELEMENTS = 1 << (12 if DRY else 28)
ROUNDS = 2 if DRY else 15


@dataclass
class Findings:
    """What a run found."""

    environment: dict[str, str] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    timings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, holds: bool) -> None:
        """Record a check and print it."""
        self.checks[name] = bool(holds)
        print(f"[{'ok' if holds else 'FAILED'}] {name}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# The machine


def environment() -> dict[str, str]:
    """What the figures depend on."""

    def git(*arguments: str) -> str:
        try:
            command = ["git", "-C", str(ROOT), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    facts = {
        "date": date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + ("" if not git("status", "--porcelain") else " and changes"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numba": _version("numba"),
    }
    if DRY:
        return facts | {"device": "none: a dry run in Triton's interpreter; its figures mean nothing"}
    properties = torch.cuda.get_device_properties(DEVICE)
    major, minor = torch.cuda.get_device_capability(DEVICE)
    return facts | {
        "device": torch.cuda.get_device_name(DEVICE),
        "capability": f"{major}.{minor}, {properties.multi_processor_count} processors",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "cuda": str(torch.version.cuda or torch.version.hip),
        "backend": backend_of(DEVICE),
    }


def _version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return "not installed"


# ---------------------------------------------------------------------------------------------------------------
# Checks


def check_golden(findings: Findings) -> None:
    """The stream's golden values, on the device."""
    import hashlib

    golden = json.loads(GOLDEN.read_text())
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    regions = {name: Region(*map(tuple, sizes)) for name, sizes in next(_values(golden, "regions")).items()}
    names = {"Uniform": Uniform, "Normal": Normal, "TruncatedNormal": TruncatedNormal, "inf": float("inf")}
    wrong, total = [], 0
    for name, entry in golden["distributions"].items():
        distribution = eval(entry["distribution"], {"__builtins__": {}}, names)
        for dtype_name, values in entry["values"].items():
            if dtype_name not in dtypes or (DRY and dtype_name not in ("float32", "bfloat16")):
                continue
            for region_name, region in regions.items():
                if DRY and region_name == "whole":
                    continue
                x = torch.empty(region.sizes, dtype=dtypes[dtype_name], device=DEVICE)
                fill_([Draw(x, distribution, int(entry["key"], 16), None if region_name == "whole" else region)])
                raw = x.cpu().contiguous().view(torch.uint8).numpy().tobytes()
                total += 1
                if hashlib.sha256(raw).hexdigest() != values[region_name]:
                    wrong.append(f"{name}, {dtype_name}, {region_name}")
    findings.check(f"golden values: {total - len(wrong)} of {total}", not wrong)
    findings.notes += [f"differs from the golden value: {place}" for place in wrong[:20]]


def _values(document: dict[str, Any], prefix: str) -> Iterator[Any]:
    return (value for name, value in document.items() if name.startswith(prefix))


def check_bits(findings: Findings) -> None:
    """Large tensors, unaligned ones and a whole model, against the CPU."""
    sizes = (1000,) if DRY else (1 << 24, (1 << 24) + 5, 12_345_677)
    distributions = (Uniform(-1.0, 1.0), Normal(0.0, 0.02), TruncatedNormal(), TruncatedNormal(0.0, 0.02, -2.0, 2.0))
    same = True
    for place, distribution in enumerate(distributions):
        for size in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                x, y = torch.empty(size + 3, dtype=dtype, device=DEVICE), torch.empty(size, dtype=dtype)
                fill_([Draw(x[3:], distribution, named_key(place, "check"))])
                _on_cpu([Draw(y, distribution, named_key(place, "check"))])
                same &= torch.equal(x[3:].cpu(), y)
    findings.check("large and unaligned tensors have the CPU's bits", same)
    ours, theirs = model(), model("cpu")
    for seed in (0, 1):
        report = initlab.init_model_(ours, seed, "gpt2")
        _with_backend("auto" if not DRY else "torch", lambda seed=seed: initlab.init_model_(theirs, seed, "gpt2"))
        there, here = initlab.model_digest(ours), initlab.model_digest(theirs)
        findings.check(f"a model of {len(report.rows)} tensors, seed {seed}: digests {there} and {here}", there == here)


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


def check_sharded(findings: Findings) -> None:
    """One rank of eight, without the others: its shards from meta, and clipping them without a wait for the device."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from initlab.distributed.dtensors import local
    from initlab.distributed.shards import local_shards

    whole = torch.nn.Sequential(torch.nn.Linear(63, 129), torch.nn.Linear(129, 63))
    _with_backend("auto" if not DRY else "torch", lambda: initlab.init_model_(whole, 3, "gpt2"))
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
            norm = initlab.clip_grad_norm_(mine.parameters(), float(exact) / 2, nonfinite="skip")
        finally:
            if not DRY:
                torch.cuda.set_sync_debug_mode("default")
        after = torch.cat([local(p.grad).double().flatten().cpu() for p in mine.parameters()]).norm()
        good = abs(float(norm) / exact - 1) < 1e-6 and abs(2 * after / exact - 1) < 3e-6
        findings.check("its gradients are clipped by their norm, and nothing waits", good)
    finally:
        dist.destroy_process_group()


def _with_gradients(gradients: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.empty_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    return params


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


def check_watch(findings: Findings) -> None:
    """Flag words of planted values; a fault planted on the device is found, and nothing waits before the report."""
    from initlab.kernels import add_flag_, nonfinite_flag

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


def check_tests(findings: Findings) -> None:
    """The suite's GPU part, where pytest is at hand."""
    if DRY:
        findings.notes.append(
            "tests/kernels/test_sampling_triton.py is left out of a dry run: the test command runs it"
        )
        return
    try:
        importlib.import_module("pytest")
    except ImportError:
        findings.notes.append("pytest is not installed: tests/kernels/test_sampling_triton.py did not run")
        return
    # Options of pyproject.toml that an older pytest does not know are left out.
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib"]
    command += [
        "-p",
        "no:cacheprovider",
        "-k",
        "not hopper and not target",
        str(ROOT / "tests" / "kernels" / "test_sampling_triton.py"),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    print(done.stdout[-2000:], flush=True)
    findings.check(f"tests: {(done.stdout.strip().splitlines() or ['nothing'])[-1]}", done.returncode == 0)


def _on_cpu(draws: list[Draw]) -> None:
    _with_backend("torch" if DRY else "auto", lambda: fill_(draws))


def _with_backend(name: str, call: Callable[[], Any]) -> None:
    from initlab.kernels import backends

    before = backends.requested
    backends.requested = lambda: name  # type: ignore[assignment]
    try:
        call()
    finally:
        backends.requested = before


# ---------------------------------------------------------------------------------------------------------------
# linear_relu


def linear_relu_operands(rows: int, depth: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """input, weight and bias."""
    shapes = ((rows, depth), (columns, depth), (columns,))
    x, w, b = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    return [x, w / depth**0.5, b]


def check_linear_relu(findings: Findings) -> None:
    """Both candidates: values against float64, gradients, flags, NaN, and a CUDA graph."""
    from initlab.kernels import _linear_triton as kernels

    units = {torch.float32: 2.0**-10, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}  # float32: TF32's products
    shapes = ((19, 24, 40),) if DRY else ((4096, 1024, 4096), (1000, 520, 1096), (1, 64, 8), (77, 4096, 264))
    kinds = {float("nan"): 1, float("inf"): 2, -float("inf"): 4}
    capability_major = None if DRY else torch.cuda.get_device_capability(DEVICE)[0]
    values = flags_hold = True
    for dtype, unit in units.items():
        for shape in shapes:
            x, w, b = linear_relu_operands(*shape, dtype)
            exact = torch.relu(x.double() @ w.double().T + b.double())
            size = x.double().abs() @ w.double().abs().T + b.double().abs()
            candidates: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
                lambda b, flags, x=x, w=w: kernels.gemm(x, w, b, flags),
                lambda b, flags, x=x, w=w: kernels.gemm(x, w, b, flags, 8),  # ordinary loads
                lambda b, flags, x=x, w=w: kernels.relu_in_place(torch.addmm(b, x, w.t()), flags),
                lambda b, flags, x=x, w=w: initlab.linear_relu(x, w, b, flags=flags),
            ]
            for call in candidates if DRY or capability_major != 8 else candidates[1:]:
                flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
                values &= bool(((call(b, flags).double() - exact).abs() <= unit * size).all()) and int(flags) == 0
                for value, kind in kinds.items():
                    planted = b.clone()
                    planted[-1] = value
                    flags.zero_()
                    y = call(planted, flags)
                    flags_hold &= int(flags) == kind and bool(y[:, -1].isnan().all()) == (kind == 1)
    findings.check("linear_relu: three kernels and the op against float64, without a false flag", values)
    findings.check("linear_relu: NaN, +inf and -inf are flagged, NaN stays", flags_hold)

    x, w, b = (t.requires_grad_() for t in linear_relu_operands(*shapes[0], torch.bfloat16))
    flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    y = initlab.linear_relu(x, w, b, flags=flags)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, w, b), grad)
    masked = grad.double() * (y > 0)
    theirs = (masked @ w.double(), masked.T @ x.double(), masked.sum(0))
    close = [(o.double() - t).norm() <= 2.0**-7 * t.norm() for o, t in zip(ours, theirs, strict=True)]
    findings.check("linear_relu: gradients against float64", all(map(bool, close)))
    if DRY:
        return

    x, w, b = linear_relu_operands(*shapes[0], torch.bfloat16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        initlab.linear_relu(x, w, b, flags=flags)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = initlab.linear_relu(x, w, b, flags=flags)
    x[0, 0] = float("nan")
    graph.replay()
    expected = initlab.linear_relu(x, w, b)
    same = torch.equal(captured.nan_to_num(9.0), expected.nan_to_num(9.0))
    findings.check("linear_relu: a CUDA graph replays it and its flag", same and int(flags) == 1)
    compiled = torch.compile(lambda x, w, b, flags: initlab.linear_relu(x, w, b, flags=flags), fullgraph=True)
    same = torch.equal(compiled(x, w, b, flags.zero_()).nan_to_num(9.0), expected.nan_to_num(9.0))
    findings.check("linear_relu: torch.compile holds it", same and int(flags) == 1)
    nan = torch._addmm_activation(b, x, w.t())[0].isnan().all()
    findings.notes.append(f"torch._addmm_activation keeps a NaN: {bool(nan)}")


def time_linear_relu(findings: Findings) -> None:
    """Over K, with what it is made of and with its peers; only those that check do the same work."""
    from initlab.kernels import _linear_triton as kernels

    linear, relu = torch.nn.functional.linear, torch.nn.functional.relu

    def checked(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = relu(linear(x, w, b))
        return y, torch.isfinite(y).all()

    side, depths = (16, (16, 32)) if DRY else (8192, (512, 1024, 2048, 4096, 8192, 16384))
    compiled, compiled_checked = (
        (f if DRY else torch.compile(f)) for f in (lambda x, w, b: relu(linear(x, w, b)), checked)
    )
    for dtype in (torch.bfloat16,) if DRY else (torch.bfloat16, torch.float16):
        for depth in depths:
            x, w, b = linear_relu_operands(side, depth, side, dtype)
            flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
            contestants: dict[str, Callable[[], Any]] = {
                "linear_relu, flagged": lambda x=x, w=w, b=b, flags=flags: initlab.linear_relu(x, w, b, flags=flags),
                "  one kernel": lambda x=x, w=w, b=b, flags=flags: kernels.gemm(x, w, b, flags),
                "  addmm and one pass": lambda x=x, w=w, b=b, flags=flags: kernels.relu_in_place(
                    torch.addmm(b, x, w.t()), flags
                ),
                "torch, checked": lambda x=x, w=w, b=b: checked(x, w, b),
                "torch.compile, checked": lambda x=x, w=w, b=b: compiled_checked(x, w, b),
                "linear_relu": lambda x=x, w=w, b=b: initlab.linear_relu(x, w, b),
                "torch": lambda x=x, w=w, b=b: relu(linear(x, w, b)),
                "torch.compile": lambda x=x, w=w, b=b: compiled(x, w, b),
                "_addmm_activation": lambda x=x, w=w, b=b: torch._addmm_activation(b, x, w.t()),
            }
            nbytes = (x.numel() + w.numel() + side * side) * x.element_size()
            race(findings, f"linear_relu K={depth}, {str(dtype)[6:]}", contestants, nbytes, seconds)
    for depth in depths[:2]:
        x, w, b = (t.requires_grad_() for t in linear_relu_operands(side, depth, side, torch.bfloat16))
        grad = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
        flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        steps: dict[str, Callable[..., torch.Tensor]] = {
            "linear_relu, flagged": lambda x, w, b, flags=flags: initlab.linear_relu(x, w, b, flags=flags),
            "torch, checked": lambda x, w, b: checked(x, w, b)[0],
            "torch": lambda x, w, b: relu(linear(x, w, b)),
        }
        race(
            findings,
            f"linear_relu K={depth} and its gradients, bfloat16",
            {
                name: lambda f=f, x=x, w=w, b=b, grad=grad: torch.autograd.grad(f(x, w, b), (x, w, b), grad)
                for name, f in steps.items()
            },
            3 * (x.numel() + w.numel() + side * side) * x.element_size(),
            seconds,
        )


# ---------------------------------------------------------------------------------------------------------------
# Timings


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


def time_tensors(findings: Findings) -> None:
    """One large tensor: initlab, torch, and what else is at hand; fill_ and copy_ are the ceilings."""
    init = torch.nn.init
    for dtype in (torch.float32, torch.bfloat16):
        turn, short = Rotation(ELEMENTS, dtype), str(dtype)[6:]
        nbytes = ELEMENTS * turn.tensors[0].element_size()
        race(
            findings,
            f"ceilings, {short}",
            {
                "fill_": lambda turn=turn: turn.next().fill_(1.0),
                "copy_ (reads and writes)": lambda turn=turn: turn.next().copy_(turn.tensors[turn.at - 1]),
            },
            nbytes,
            seconds,
        )
        calls: dict[str, Callable[[Any, torch.Tensor], Any]] = {
            "uniform_": lambda module, x: module.uniform_(x, -0.1, 0.1),
            "normal_": lambda module, x: module.normal_(x, std=0.02),
            "trunc_normal_ at 2 sigma": lambda module, x: module.trunc_normal_(x, std=0.02, a=-0.04, b=0.04),
            "trunc_normal_ at 100 sigma": lambda module, x: module.trunc_normal_(x, std=0.02),
        }
        for name, call in calls.items():
            contestants: dict[str, Callable[[], Any]] = {
                "initlab": lambda call=call, turn=turn: call(initlab.init, turn.next()),
                "torch.nn.init": lambda call=call, turn=turn: call(init, turn.next()),
            }
            for peer, function in peers(name, dtype):
                contestants[peer] = lambda function=function, turn=turn: function(turn.next())
            race(findings, f"{name}, {short}", contestants, nbytes, seconds)


def peers(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[torch.Tensor], Any]]]:
    """Other generators, where they are installed."""
    if name not in ("uniform_", "normal_") or DRY:
        return
    try:
        random = importlib.import_module("torch.func._random")
        function = getattr(random, name.rstrip("_"))
        key = random.key(0, device=DEVICE) if hasattr(random, "key") else None
        function(key, (4,), dtype=dtype)
        yield "torch.func._random", lambda x: function(key, x.shape, dtype=dtype)
    except Exception as error:  # a private module: whatever goes wrong, it is no peer here
        print(f"  torch.func._random.{name}: {type(error).__name__}: {error}"[:160])
    try:
        gems = importlib.import_module("flag_gems")
        function = getattr(gems, name)
        yield "FlagGems", lambda x: function(x)
    except Exception as error:
        print(f"  FlagGems {name}: {type(error).__name__}: {error}"[:160])


def model(device: torch.device | str = DEVICE) -> torch.nn.Module:
    """A transformer of some 300 tensors; tiny in a dry run."""
    layers, width = (2, 16) if DRY else (24, 1024)
    block = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, device=device)
    body = torch.nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
    return torch.nn.ModuleDict({"embed": torch.nn.Embedding(32 * width, width, device=device), "body": body})


def time_model(findings: Findings) -> None:
    """A whole model: one fill of everything against a loop of torch.nn.init over its parameters."""
    net = model()
    parameters = list(net.parameters())
    nbytes = sum(p.numel() * p.element_size() for p in parameters)

    def loop() -> None:
        for p in parameters:
            torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.zeros_(p)

    distribution = Normal(0.0, 0.02)
    draws = [Draw(p, distribution, named_key(0, str(i))) for i, p in enumerate(parameters)]
    race(
        findings,
        f"a model of {len(parameters)} tensors",
        {
            "fill_ of all": lambda: fill_(draws),
            "init_model_": lambda: initlab.init_model_(net, 0, "gpt2"),
            "torch.nn.init, one by one": loop,
        },
        nbytes,
        host_seconds,
    )
    small = [torch.empty(64, device=DEVICE) for _ in range(20 if DRY else 2000)]
    draws = [Draw(x, distribution, named_key(0, str(i))) for i, x in enumerate(small)]
    race(
        findings,
        f"{len(small)} tensors of 64 elements",
        {
            "fill_ of all": lambda: fill_(draws),
            "torch.nn.init, one by one": lambda: [torch.nn.init.normal_(x, std=0.02) for x in small],
        },
        256 * len(small),
        host_seconds,
    )


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
                }
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


# ---------------------------------------------------------------------------------------------------------------


def markdown(findings: Findings) -> str:
    """The run as a page."""
    lines = ["# GPU run", ""]
    if DRY:
        lines += ["**A dry run: no GPU, Triton's interpreter, tiny sizes. The figures mean nothing.**", ""]
    lines += [*(f"- {name}: {value}" for name, value in findings.environment.items()), "", "## Checks", ""]
    lines += [f"- {'ok' if holds else '**FAILED**'}: {name}" for name, holds in findings.checks.items()]
    lines += [f"- note: {note}" for note in findings.notes]
    if findings.timings:
        ceilings = {row["what"].split(", ")[1]: row["GB/s"] for row in findings.timings if row["contestant"] == "fill_"}
        lines += ["", "## Timings", "", "Medians; ratio to the first of each group; % of the bandwidth of `fill_`.", ""]
        lines += [
            "| what | contestant | ms | p10 | p90 | GB/s | % of fill_ | ratio |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in findings.timings:
            ceiling = ceilings.get(row["what"].split(", ")[-1])
            share = f"{100 * row['GB/s'] / ceiling:.0f}" if ceiling else ""
            lines.append(
                f"| {row['what']} | {row['contestant']} | {row['ms']:.3f} | {row['p10_ms']:.3f} | {row['p90_ms']:.3f} "
                f"| {row['GB/s']:.0f} | {share} | {row['ratio']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run everything; 0 if all checks hold."""
    parser = argparse.ArgumentParser(description="Check and time the GPU kernels.")
    parser.add_argument("out", nargs="?", default=os.environ.get("OUT"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--dry", action="store_true", help="without a GPU: interpreter, tiny sizes")
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; --dry runs this script without one", file=sys.stderr)
        return 64
    findings = Findings(environment=environment())
    for name, value in findings.environment.items():
        print(f"{name:12s} {value}")
    began = time.perf_counter()
    for step in (check_golden, check_bits, check_clipping, check_sharded, check_watch, check_linear_relu, check_tests):
        step(findings)
    green = all(findings.checks.values())
    for step in (time_tensors, time_model, time_clipping, time_linear_relu, time_watch) if green else ():
        step(findings)
    if not green:
        findings.notes.append("nothing was timed, because a check failed")
    findings.environment["seconds"] = f"{time.perf_counter() - began:.0f}"
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(asdict(findings), indent=1) + "\n")
        (folder / "gpu.md").write_text(markdown(findings))
    print(f"{findings.environment['seconds']} s, {'all checks hold' if green else 'a check FAILED'}")
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
