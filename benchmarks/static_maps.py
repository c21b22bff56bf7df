"""Instructions per element of the stream's maps on sm_90, counted in the compiled code: no GPU is needed.

``python benchmarks/static_maps.py`` compiles one Triton kernel per map and dtype, the path of full blocks alone (no
tail, no table, 32-bit block numbers), disassembles it with the cuobjdump that Triton ships, and divides the
instructions by the elements that one thread writes. Needs Triton >= 3.6. On an H100 about 39 instructions per element
keep up with the memory for 4-byte elements and 20 for 2-byte ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from initlab.kernels import stream
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCKS, WARPS = 512, 4  # 4 warps x 32 threads x 4 blocks of 4 elements: 16 elements a thread

LOW = tl.constexpr(stream._float_bits(stream.LOG_LOW))
L0, L1, L2, L3, L4 = (tl.constexpr(c) for c in stream.LOG)
STEP = tl.constexpr(stream.LOG_STEP)
MAGIC = tl.constexpr(stream.ROOT_MAGIC)
ROOT_A, ROOT_B = tl.constexpr(stream.ROOT_A), tl.constexpr(stream.ROOT_B)
ANGLE = tl.constexpr(stream.ANGLE)
S0, S1 = (tl.constexpr(c) for c in stream.SIN)
C0, C1, C2 = (tl.constexpr(c) for c in stream.COS)
CENTRE = tl.constexpr(stream.CENTRE)
TAIL = tl.constexpr(stream.TAIL)
FAR = tl.constexpr(stream.FAR)


@triton.jit
def words(block, k0, k1):
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = (k0 + 0x9E3779B9).to(tl.uint32)
        k1 = (k1 + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def log_poly(f):
    return (((((f + L4) * f + L3) * f + L2) * f + L1) * f + L0) * f


@triton.jit
def scaled_log(x, UNIT: tl.constexpr):
    b = x.to(tl.int32, bitcast=True)
    k = (b - (LOW + (UNIT << 23))) & -8388608
    f = (b - k - (UNIT << 23)).to(tl.float32, bitcast=True) - 1.0
    return log_poly(f) + k.to(tl.float32) * STEP


@triton.jit
def roots(x):
    y = (MAGIC - (x.to(tl.int32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    y = y * (ROOT_A - (x * y) * y)
    t = x * y
    g = t * y - ROOT_B
    return t * g, y * g


@triton.jit
def box_muller(a, b):
    r, _ = roots(scaled_log(a.to(tl.float32) + 0.5, 32))
    x = (b << 1).to(tl.int32, bitcast=True).to(tl.float32) * ANGLE
    x2 = x * x
    sine = ((x2 + S1) * x2 + S0) * x
    cosine = ((x2 + C2) * x2 + C1) * x2 + C0
    r = (r.to(tl.uint32, bitcast=True) ^ (b & 0x80000000)).to(tl.float32, bitcast=True)
    odd = (b & 1) != 0
    return r * tl.where(odd, sine, cosine), r * tl.where(odd, cosine, sine)


@triton.jit
def centre(w, scale, offset):
    t = w.to(tl.float32) * scale + offset
    x = scaled_log(1.0 - t * t, 0)
    y = x * CENTRE[7] + CENTRE[6]
    for i in tl.static_range(5, -1, -1):
        y = y * x + CENTRE[i]
    return y * t


@triton.jit
def tail(w, scale, below_start, above_start, split, flip):
    w = w ^ flip
    below = w < split
    p = tl.where(below, w, ~w).to(tl.float32) * scale + tl.where(below, below_start, above_start)
    t = 1.0 - p
    b = (p * (2.0 - p)).to(tl.int32, bitcast=True)
    k = (b - LOW) & -8388608
    f = (b - k).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(k == 0, -(t * t), f)
    x = log_poly(f) + k.to(tl.float32) * STEP
    y = x * TAIL[10] + TAIL[9]
    for i in tl.static_range(8, -1, -1):
        y = y * x + TAIL[i]
    z = y * roots(x)[0]
    return tl.where(below == (flip == 0), -z, z)


@triton.jit
def far(w, scale, offset, log_scale, flip):
    q = (~(w ^ flip)).to(tl.float32) * scale + offset
    root, x = roots(scaled_log(q, 0) + log_scale)
    y = x * FAR[7] + FAR[6]
    for i in tl.static_range(5, -1, -1):
        y = y * x + FAR[i]
    z = y * root
    return tl.where(flip != 0, -z, z)


@triton.jit
def one(w, MAP: tl.constexpr, a, b, c, split, flip, std, mean, low, high):
    if MAP == "uniform":
        return tl.minimum((w >> 8).to(tl.int32).to(tl.float32) * a + b, c)
    if MAP == "centre":
        z = centre(w, a, b)
    elif MAP == "tail":
        z = tail(w, a, b, c, split, flip)
    else:
        z = far(w, a, b, c, flip)
    return tl.minimum(tl.maximum(z * std, low), high)


@triton.jit
def kernel(out, k0, k1, split, flip, a, b, c, std, mean, low, high, MAP: tl.constexpr, B: tl.constexpr):
    pid = tl.program_id(0)
    block = pid * B + tl.arange(0, B)
    if MAP == "randn4x":
        x0, x1, x2, x3 = tl.randn4x(k0.to(tl.uint64), block)
        x0, x1, x2, x3 = x0 * std, x1 * std, x2 * std, x3 * std
    else:
        w0, w1, w2, w3 = words(block, k0.to(tl.uint32), k1.to(tl.uint32))
        if MAP == "normal":
            x0, x1 = box_muller(w0, w1)
            x2, x3 = box_muller(w2, w3)
            x0, x1, x2, x3 = x0 * std, x1 * std, x2 * std, x3 * std
        else:
            x0 = one(w0, MAP, a, b, c, split, flip, std, mean, low, high)
            x1 = one(w1, MAP, a, b, c, split, flip, std, mean, low, high)
            x2 = one(w2, MAP, a, b, c, split, flip, std, mean, low, high)
            x3 = one(w3, MAP, a, b, c, split, flip, std, mean, low, high)
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(B * 4)
    tl.store(out + pid * (B * 4) + tl.arange(0, B * 4), x.to(out.dtype.element_ty))


def count(name: str, dtype: str) -> tuple[float, Counter[str], int, list[str]]:
    """(instructions per element, by opcode, registers, store widths) of one map on sm_90."""
    arguments = ["out", "k0", "k1", "split", "flip", "a", "b", "c", "std", "mean", "low", "high"]
    types = [f"*{dtype}"] + ["u32"] * 4 + ["fp32"] * 7
    source = ASTSource(
        fn=kernel,
        signature={**dict(zip(arguments, types, strict=True)), "MAP": "constexpr", "B": "constexpr"},
        constexprs={(12,): name, (13,): BLOCKS},
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    code = [m.group(1) for m in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", sass)]
    end = max(i for i, op in enumerate(code) if op == "EXIT") + 1
    code = code[:end]  # behind it only a trap loop and padding
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    local = re.search(r"STACK:(\d+).* LOCAL:(\d+)", usage)
    if local is None or local.groups() != ("0", "0"):
        print(f"{name} {dtype}: local memory: {usage}", file=sys.stderr)
    stores = [op for op in code if op.startswith("STG")]
    elements = BLOCKS * 4 / (WARPS * 32)
    return len(code) / elements, Counter(op.split(".")[0] for op in code), registers, stores


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    for name in ("uniform", "normal", "centre", "tail", "far", "randn4x"):
        for dtype in ("fp32", "bf16"):
            per, kinds, registers, stores = count(name, dtype)
            print(f"{name:8s} {dtype} {per:6.1f} instructions/element, {registers} registers, stores {Counter(stores)}")
            print("          ", ", ".join(f"{k} {v}" for k, v in kinds.most_common(9)))
