"""linear_relu: both candidates against float64, and a race over K with its parts and its peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from initlab.kernels import _linear_triton as kernels

import initlab

from .config import DEVICE, DRY
from .report import Findings
from .timing import race, seconds


def check_linear_relu(findings: Findings) -> None:
    """Both candidates: values against float64, gradients, flags, NaN, and a CUDA graph."""
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


def linear_relu_operands(rows: int, depth: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """input, weight and bias."""
    shapes = ((rows, depth), (columns, depth), (columns,))
    x, w, b = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    return [x, w / depth**0.5, b]
