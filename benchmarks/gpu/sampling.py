"""Fills: golden values and the CPU's bits; one large tensor, many small ones, a whole model."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from initlab.kernels import Draw, Normal, Region, TruncatedNormal, Uniform, fill_, named_key

import initlab

from .backends import fill_on_cpu, with_backend
from .config import DEVICE, DRY, ELEMENTS, ROOT
from .report import Findings
from .timing import Rotation, host_seconds, race, seconds

GOLDEN = ROOT / "tests" / "golden" / "stream_v1.json"


def check_golden(findings: Findings) -> None:
    """The stream's golden values, on the device."""
    golden = json.loads(GOLDEN.read_text())
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    regions = {name: Region(*map(tuple, sizes)) for name, sizes in next(_values(golden, "regions")).items()}
    names = {"Uniform": Uniform, "Normal": Normal, "TruncatedNormal": TruncatedNormal, "inf": float("inf")}
    wrong, total = [], 0
    for name, entry in golden["laws"].items():
        distribution = eval(entry["law"], {"__builtins__": {}}, names)
        for dtype_name, values in entry["values"].items():
            if dtype_name not in dtypes or (DRY and dtype_name not in ("float32", "bfloat16")):
                continue
            for region_name, region in regions.items():
                if DRY and region_name != "block":
                    continue  # tests/kernels/test_golden.py holds the interpreter to all of them
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
                fill_on_cpu([Draw(y, distribution, named_key(place, "check"))])
                same &= torch.equal(x[3:].cpu(), y)
    findings.check("large and unaligned tensors have the CPU's bits", same)
    ours, theirs = model(), model("cpu")
    for seed in (0, 1):
        report = initlab.init_model_(ours, seed, "gpt2")
        with_backend("auto" if not DRY else "torch", lambda seed=seed: initlab.init_model_(theirs, seed, "gpt2"))
        there, here = initlab.model_digest(ours), initlab.model_digest(theirs)
        findings.check(f"a model of {len(report.rows)} tensors, seed {seed}: digests {there} and {here}", there == here)


def model(device: torch.device | str = DEVICE) -> torch.nn.Module:
    """A transformer of some 300 tensors; tiny in a dry run."""
    layers, width = (2, 16) if DRY else (24, 1024)
    block = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, device=device)
    body = torch.nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
    return torch.nn.ModuleDict({"embed": torch.nn.Embedding(32 * width, width, device=device), "body": body})


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
    """The formulas of FlagGems' kernels as operations of torch; and other generators, where they are installed."""
    formula = {"uniform_": _scaled_uniform_, "normal_": _box_muller_}.get(name)
    if formula is None:
        return
    yield "FlagGems' formula, torch ops", formula
    if DRY:
        return
    yield "the same, torch.compile", torch.compile(formula)
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


def _scaled_uniform_(x: torch.Tensor) -> torch.Tensor:
    """Uniform numbers of [0, 1), scaled."""
    return x.copy_(torch.rand(x.shape, device=x.device) * 0.2 - 0.1)


def _box_muller_(x: torch.Tensor) -> torch.Tensor:
    """Two normal numbers of two uniform ones (Box and Muller 1958); `x` has an even number of elements."""
    u, v = torch.rand((2, x.numel() // 2), device=x.device).unbind()
    radius, angle = (-2.0 * torch.log1p(-u)).sqrt(), 2.0 * math.pi * v
    return x.copy_(0.02 * torch.cat((radius * angle.cos(), radius * angle.sin())))


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
