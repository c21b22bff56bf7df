"""What every Triton kernel of the package costs on a GPU, read off its compiled code: no GPU is needed.

``python benchmarks/static_cost.py [--target sm_90] [--json FILE] [KERNEL ...]`` compiles each kernel ahead of time for
sm_80, sm_90, sm_100 and gfx942, disassembles it (with the cuobjdump that Triton ships, or from Triton's own listing for
AMD), and prints registers, local and shared memory, widths of loads and stores, and instructions per element by class.
For sm_90 it adds the throughput of an H100 that the instructions and that the bytes allow, and which of them binds.

A kernel's parts have rows of their own: the path of full blocks is what large tensors take, the table lookup happens
once for up to 8 of its chunks, the tail at the ends of tensors. `tl.randn4x` is there to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # from the bare checkout too; before triton is imported
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())

import initlab  # noqa: F401, I001 - in a checkout it makes initlab.kernels importable
import torch
import triton
import triton.language as tl
from initlab.kernels import _norms_triton as grad_norm
from initlab.kernels import _nonfinite_triton as nonfinite
from initlab.kernels import _linear_triton as linear_relu
from initlab.kernels.sampling import _triton as sampling
from initlab.kernels._common_triton import find
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# An H100 SXM: 132 processors with 4 schedulers, each issuing for 32 threads a cycle, at 1.755 GHz; 3.35 TB/s, of which
# writes reach about nine tenths.
ISSUE = 132 * 4 * 32 * 1.755e9
BANDWIDTH = 0.9 * 3.35e12

ELEMENTS = {"fp32": (tl.float32, 4), "bf16": (tl.bfloat16, 2), "fp16": (tl.float16, 2), "fp64": (tl.float64, 8)}
CONSTANT_ELEMENTS = {"fp32": (tl.int32, 4), "bf16": (tl.int16, 2)}
MAPS = ("uniform", "normal", "centre", "tail", "far", "narrow")

# ---------------------------------------------------------------------------------------------------------------
# Parts of kernels, as kernels


@triton.jit
def full_blocks(
    ptr, counter, key, map_ptr,
    TRANSFORM: tl.constexpr, HAS_MEAN: tl.constexpr, OUT_DTYPE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    ITEMSIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The path that large tensors take, one chunk of it."""
    chunk = tl.program_id(0).to(tl.int64)
    m = sampling.load_map(map_ptr, 1, TRANSFORM, COMPUTE_DTYPE)
    counter += chunk * BLOCK_SIZE
    sampling.full_chunk(
        ptr + chunk * (BLOCK_SIZE * 4 * ITEMSIZE), counter.to(tl.uint32), (counter >> 32).to(tl.uint32),
        key.to(tl.uint32), (key >> 32).to(tl.uint32), m,
        TRANSFORM, HAS_MEAN, OUT_DTYPE, COMPUTE_DTYPE, BLOCK_SIZE, INTERPRETED,
    )  # fmt: skip


@triton.jit
def tail(
    row_ptr, start, length, counter, key, map_ptr,
    TRANSFORM: tl.constexpr, HAS_MEAN: tl.constexpr, OUT_DTYPE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    ITEMSIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A chunk at an end of a tensor, masked, with 64-bit counters."""
    m = sampling.load_map(map_ptr, 1, TRANSFORM, COMPUTE_DTYPE)
    sampling.part_chunk(
        row_ptr, start, length, counter, key.to(tl.uint32), (key >> 32).to(tl.uint32), m,
        TRANSFORM, HAS_MEAN, OUT_DTYPE, COMPUTE_DTYPE, BLOCK_SIZE, INTERPRETED,
    )  # fmt: skip


@triton.jit
def lookup(table_ptr, num_columns, out_ptr):
    """Finding a work item's column in the table, and reading it."""
    item = tl.program_id(0).to(tl.int64)
    column_ptr = table_ptr + find(table_ptr, num_columns, item)
    total = tl.load(column_ptr)
    for i in tl.static_range(1, 8):
        total += tl.load(column_ptr + i * num_columns)
    tl.store(out_ptr + item, total)


@triton.jit
def flag_chunk(x, out, CHUNK: tl.constexpr):
    """What the check for non-finite values does with a chunk, and one store to keep it."""
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    tl.store(out + tl.program_id(0), tl.max(nonfinite.flags_of(tl.load(x + place)), 0))


@triton.jit
def randn4x(ptr, seed, BLOCK_SIZE: tl.constexpr, OUT_DTYPE: tl.constexpr):
    """Triton's own generator, packed and stored as ours is."""
    counters = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x0, x1, x2, x3 = tl.randn4x(seed, counters)
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(BLOCK_SIZE * 4)
    offsets = tl.program_id(0).to(tl.int64) * (BLOCK_SIZE * 4) + tl.arange(0, BLOCK_SIZE * 4)
    tl.store(ptr + offsets, x.to(OUT_DTYPE))


CHUNKS = 8  # that a part reads one after the other: what a program does once counts an eighth


@triton.jit
def norm_chunks(address, sums, ELEMENT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The path that large gradients take to their norm."""
    at = tl.program_id(0).to(tl.int64) * (CHUNK * CHUNKS)
    total = tl.zeros([CHUNK // 8], tl.float64)
    for i in tl.static_range(CHUNKS):
        total += grad_norm.full_squares(address, at + i * CHUNK, ELEMENT, CHUNK)
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def scale_chunks(address, a, b, ELEMENT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The path that large gradients take when they are scaled."""
    at = tl.program_id(0).to(tl.int64) * (CHUNK * CHUNKS)
    for i in tl.static_range(CHUNKS):
        grad_norm.full_scale(address, at + i * CHUNK, a, b, a == 0.0, ELEMENT, CHUNK)


# ---------------------------------------------------------------------------------------------------------------
# What is compiled


@dataclass
class Case:
    """One kernel for one element type: what to compile, and what its numbers are to be divided by."""

    name: str
    element: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    elements: int  # that one program fills; 0 where instructions are not to be divided
    bytes_per_element: int
    aligned: tuple[str, ...] = ()
    warps: int = sampling.NUM_WARPS
    options: dict[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": False})
    targets: tuple[str, ...] = tuple(TARGETS)


def cases() -> Iterator[Case]:
    """Every kernel of the package."""
    yield from sampling_cases()
    yield from grad_norm_cases()
    yield from nonfinite_cases()
    yield from linear_relu_cases()


def grad_norm_cases() -> Iterator[Case]:
    chunk, elements = grad_norm.CHUNK, CHUNKS * grad_norm.CHUNK
    for element, (kind, size) in ELEMENTS.items():
        constants = {"ELEMENT": kind, "CHUNK": chunk, "CHUNKS": CHUNKS}
        signature = {"address": "i64", "sums": "*fp64"}
        yield Case("norm: full chunks", element, norm_chunks, signature, constants, elements, size, options={})
        signature = {"address": "i64", "a": "fp64", "b": "fp64"}
        yield Case("scale: full chunks", element, scale_chunks, signature, constants, elements, 2 * size, options={})
    table = {"table": "*i64", "columns": "i32", "chunks": "i32"}
    for wide, element in ((False, ""), (True, "fp64")):
        signature = {**table, "first_unit": "i32", "sums": "*fp64"}
        constants = {"WIDE": wide, "CHUNK": chunk}
        yield Case("norm: kernel", element, grad_norm.norm_units, signature, constants, 0, 0, options={})
        signature = {**table, "first_unit": "i32", "norm": "*fp64", "high": "fp32", "low": "fp32"}
        constants = {"POLICY": "zero", "WIDE": wide, "CHUNK": chunk}
        yield Case("scale: kernel", element, grad_norm.scale_units, signature, constants, 0, 0, options={})
    signature = {"sums": "*fp64", "units": "i32", "sound": "fp32", "results": "*i64"}
    yield Case("norm: finish", "", grad_norm.finish_norm, signature, {}, 0, 0, options={})
    signature = {**table, "units": "i32", "results": "*i64", "sums": "*fp64"}
    constants = {"CHUNK": chunk, "SMALL": grad_norm.SMALL}
    yield Case("norm: second look", "", grad_norm.look_units, signature, constants, 0, 0, options={})
    signature = {"sums": "*fp64", "units": "i32", "results": "*i64"}
    yield Case("norm: second finish", "", grad_norm.finish_look, signature, {}, 0, 0, options={})


def sampling_cases() -> Iterator[Case]:
    """The stream's maps, by the paths that elements take."""
    per_chunk = sampling.BLOCK_SIZE * 4
    for name in (*MAPS, "constant"):
        for element, (kind, size) in (CONSTANT_ELEMENTS if name == "constant" else ELEMENTS).items():
            constants = {
                "TRANSFORM": name,
                "HAS_MEAN": False,
                "OUT_DTYPE": kind,
                "COMPUTE_DTYPE": tl.float64 if element == "fp64" else tl.float32,
                "ITEMSIZE": size,
                "BLOCK_SIZE": sampling.BLOCK_SIZE,
                "INTERPRETED": False,
            }
            scalars = {"ptr": "i64", "counter": "i64", "key": "i64", "map_ptr": "*i64"}
            yield Case(f"{name}: full blocks", element, full_blocks, scalars, constants, per_chunk, size)
            table = {"table_ptr": "*i64", "num_columns": "i32", "chunks": "i32"}
            yield Case(f"{name}: kernel", element, sampling.fill_rows, table, constants, 0, size)
            if element in ("fp32", "bf16"):
                ends = dict.fromkeys(("row_ptr", "start", "length", "counter", "key"), "i64") | {"map_ptr": "*i64"}
                yield Case(f"{name}: tail", element, tail, ends, constants, per_chunk, size)
            if name != "constant":
                short, block = sampling.fill_short_rows, sampling.SHORT_BLOCK_SIZE
                constants = constants | {"BLOCK_SIZE": block}
                yield Case(f"{name}: short rows", element, short, table, constants, block, size)
    types = {"table_ptr": "*i64", "num_columns": "i32", "out_ptr": "*i64"}
    yield Case("table lookup", "", lookup, types, {}, 0, 0)
    for element in ("fp32", "bf16"):
        kind, size = ELEMENTS[element]
        types = {"ptr": f"*{element}", "seed": "u64"}
        constants = {"BLOCK_SIZE": sampling.BLOCK_SIZE, "OUT_DTYPE": kind}
        yield Case("tl.randn4x", element, randn4x, types, constants, per_chunk, size, ("ptr",), options={})


def nonfinite_cases() -> Iterator[Case]:
    """The flag word of a tensor: the whole kernel, and its path of full chunks."""
    constants, options = {"CHUNK": nonfinite.CHUNK}, {"warps": nonfinite.WARPS, "options": {}}
    for element, (_, size) in ELEMENTS.items():
        kernel = {"flags": "*i32", "x": f"*{element}", "elements": "i64"}
        yield Case("flag: kernel", element, nonfinite.add_flag, kernel, constants, 0, size, ("flags", "x"), **options)
        chunk = {"x": f"*{element}", "out": "*i32"}
        yield Case("flag: chunk", element, flag_chunk, chunk, constants, nonfinite.CHUNK, size, ("x",), **options)


@triton.jit
def glance(flags, v, row, column, rows, columns, LIMIT: tl.constexpr):
    """In place of the close look, which hardly any tile takes: what is left is the flag's cost for every tile."""
    tl.atomic_or(flags, 1, sem="relaxed")


def linear_relu_cases() -> Iterator[Case]:
    """A GEMM's whole kernel by what its epilogue does: each has one more thing to do than the one before it. Then
    the passes over memory."""
    variants: dict[str, dict[str, Any]] = {
        "relu": {"bias": None, "LOOK": None},
        "relu, bias": {"LOOK": None},
        "relu, bias, glance": {"LOOK": glance},
        "relu, bias, flag": {"LOOK": linear_relu.look},
    }
    generations = {10: ("sm_100",), 9: ("sm_90",), 8: ("sm_80",)}
    for element, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):  # float16 costs what bfloat16 does
        kind, size = ELEMENTS[element]
        common = {"LIMIT": linear_relu.LIMITS[dtype], "ELEMENT": kind, "INTERPRETED": False}
        for generation, targets in generations.items():
            for tile in linear_relu.TILES[generation]:
                step = tile.step // size
                sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": step, "PARTS": tile.parts}
                if generation >= 9:
                    function = linear_relu.tiles
                    shapes = {"x": (tile.rows, step), "w": (tile.columns, step)}
                    shapes["y"] = (tile.rows, tile.columns // tile.parts)
                    types = {name: f"tensordesc<{element}[{a},{b}]>" for name, (a, b) in shapes.items()}
                    integers = ("rows", "columns", "depth", "programs")
                    aligned: tuple[str, ...] = ("bias", "flags")
                else:
                    function = linear_relu.pointers
                    types = dict.fromkeys(("x", "w", "y"), f"*{element}")
                    integers = ("rows", "columns", "depth", "x_stride", "w_stride")
                    aligned = ("x", "w", "y", "bias", "flags", "columns", "depth", "x_stride", "w_stride")
                types |= {"bias": f"*{element}", "flags": "*i32"} | dict.fromkeys(integers, "i32")
                for variant, extra in variants.items():
                    constants = sizes | common | extra
                    yield Case(
                        f"linear_relu {tile.rows}x{tile.columns}: {variant}",
                        element,
                        function,
                        {name: kind for name, kind in types.items() if name not in constants},
                        constants,
                        tile.rows * tile.columns,
                        0,
                        tuple(name for name in aligned if name not in constants),
                        tile.warps,
                        {"num_stages": tile.stages},
                        targets,
                    )
        types = {"y": f"*{element}", "flags": "*i32", "size": "i64"}
        for variant, look in {"relu": None, "relu, flag": linear_relu.look}.items():
            constants = {"BLOCK": linear_relu.PASS, "LIMIT": 0x7F800000, "LOOK": look}
            yield Case(
                f"linear_relu pass: {variant}", element, linear_relu.relu_in_place, types, constants, 0, 2 * size,
                ("y", "flags"), 8, {},
            )  # fmt: skip
        types = dict.fromkeys(("grad", "y", "out"), f"*{element}") | {"sums": "*fp32"}
        types |= dict.fromkeys(("rows", "columns", "row_stride"), "i32")
        constants = {"column_stride": 1, "ROWS": linear_relu.SUM_ROWS, "STEP": linear_relu.SUM_STEP}
        constants |= {"COLUMNS": linear_relu.SUM_COLUMNS}
        yield Case(
            "linear_relu backward", element, linear_relu.mask_and_sum, types, constants, 0, 3 * size,
            ("grad", "y", "out", "sums", "columns", "row_stride"), 4, {},
        )  # fmt: skip


@dataclass
class Cost:
    """What the compiled code of a case says."""

    kernel: str
    element: str
    target: str
    instructions: int
    per_element: float | None
    classes: dict[str, float]  # per element, or in all where per_element is None
    registers: int
    local_bytes: int  # stack and spills, per thread
    shared_bytes: int
    fused: dict[str, int]  # multiply-adds that round once: the stream has none
    loads: dict[str, int]
    stores: dict[str, int]
    products: dict[str, int]  # matrix products, and what feeds them by bulk or asynchronous copies
    bytes_per_element: int  # 0 where they say nothing
    issue_bound: float | None = None  # elements per second on an H100
    bandwidth_bound: float | None = None

    @property
    def bound(self) -> str:
        """What binds the kernel on an H100."""
        if self.issue_bound is None or self.bandwidth_bound is None:
            return ""
        return "issue" if self.issue_bound < self.bandwidth_bound else "bandwidth"


def measure(case: Case, target: str) -> Cost:
    """Compile a case and read its listing."""
    names = case.function.arg_names
    source = ASTSource(
        fn=case.function,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    gpu = TARGETS[target]
    compiled = triton.compile(source, target=gpu, options={"num_warps": case.warps, **case.options})
    read: Callable[[Any], _Listing] = _read_amd if gpu.backend == "hip" else _read_nvidia
    listing = read(compiled)
    threads = case.warps * gpu.warp_size
    each = case.elements / threads if case.elements else None
    total = len(listing.code)
    cost = Cost(
        case.name,
        case.element,
        target,
        total,
        total / each if each else None,
        {kind: n / (each or 1) for kind, n in Counter(map(_class, listing.code)).most_common()},
        listing.registers,
        listing.local,
        listing.shared,
        dict(Counter(op for op in listing.code if op.startswith(_FUSED))),
        dict(Counter(op for op in listing.code if op.startswith(("LDG", "global_load", "buffer_load")))),
        dict(Counter(op for op in listing.code if op.startswith(("STG", "global_store", "buffer_store")))),
        dict(Counter(op for op in listing.code if op.startswith(_PRODUCTS))),
        case.bytes_per_element,
    )
    if target == "sm_90" and cost.per_element and case.bytes_per_element:
        cost.issue_bound = ISSUE / cost.per_element
        cost.bandwidth_bound = BANDWIDTH / case.bytes_per_element
    return cost


@dataclass
class _Listing:
    code: list[str]  # opcodes
    registers: int
    local: int
    shared: int


def _read_nvidia(compiled: Any) -> _Listing:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    code = [m.group(1) for m in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", sass)]
    end = max(i for i, op in enumerate(code) if op == "EXIT") + 1  # behind it only a trap loop and padding
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return _Listing(code[:end], found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def _read_amd(compiled: Any) -> _Listing:
    listing = compiled.asm["amdgcn"]
    body = listing[listing.index(":\n") : listing.index(".Lfunc_end")]  # the end of a program may lie in its middle
    code = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", body, re.MULTILINE)
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", listing).group(1))  # type: ignore[union-attr]
    local = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", listing).group(1))  # type: ignore[union-attr]
    return _Listing(code, registers, local, compiled.metadata.shared)


# HFMA2 is how NVIDIA's assembler loads some constants, and is not among them.
_FUSED = ("FFMA", "DFMA", "v_fma", "v_pk_fma", "v_mac_f", "v_fmac", "v_mad_f")
_PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG", "UBLKCP", "LDGSTS", "v_mfma")
_CLASSES = {
    "multiply-add, integer": ("IMAD", "IMUL", "UIMAD", "v_mad_u", "v_mul_lo", "v_mul_hi", "v_mad_i"),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "DADD", "DMUL", "DFMA", "HADD", "HMUL", "HFMA"),
    "conversion": ("I2F", "F2I", "F2F", "I2I", "F2FP", "v_cvt"),
    "logic and shifts": ("LOP3", "SHF", "PRMT", "ULOP3", "USHF", "v_xor", "v_and", "v_or", "v_lsh", "v_bfe", "v_perm"),
    "integer": ("IADD", "UIADD", "LEA", "ULEA", "IMNMX", "VIADD", "v_add_u", "v_add_co", "v_sub_u", "v_add3"),
    "select and compare": ("SEL", "FSEL", "ISETP", "FSETP", "DSETP", "USEL", "UISETP", "v_cndmask", "v_cmp", "PLOP3"),
    "memory": ("LD", "ST", "UTMA", "global_", "buffer_", "s_load", "ds_", "LDC", "ULDC", "LDS", "STS"),
    "special": ("MUFU",),
    "move": ("MOV", "UMOV", "S2R", "S2UR", "CS2R", "R2UR", "v_mov", "s_mov", "R2P"),
    "control": ("BRA", "EXIT", "BSSY", "BSYNC", "BAR", "WARPSYNC", "s_", "NOP"),
}


def _class(op: str) -> str:
    for kind, prefixes in _CLASSES.items():
        if op.startswith(prefixes):
            return kind
    return "float" if op.startswith("v_") else "other"


def report(costs: list[Cost]) -> str:
    """A table of costs."""
    lines = [
        f"{'kernel':42s} {'type':5s} {'target':7s} {'instr':>6s} {'/elem':>6s} {'regs':>5s} {'local':>5s} "
        f"{'shared':>6s} {'G elem/s on an H100':>22s}  stores (and products), most of its instructions"
    ]
    for c in costs:
        per = f"{c.per_element:6.1f}" if c.per_element else f"{'':6s}"
        speed = ""
        if c.issue_bound is not None and c.bandwidth_bound is not None:
            least = min(c.issue_bound, c.bandwidth_bound)
            speed = f"{least / 1e9:6.0f} ({c.bound})"
        store = ", ".join(f"{n} {op}" for op, n in (c.products | c.stores).items())
        classes = ", ".join(f"{kind} {n:.1f}" for kind, n in list(c.classes.items())[:4])
        lines.append(
            f"{c.kernel:42s} {c.element:5s} {c.target:7s} {c.instructions:6d} {per} {c.registers:5d} "
            f"{c.local_bytes:5d} {c.shared_bytes:6d} {speed:>22s}  {store}; {classes}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Static cost of the Triton kernels.")
    parser.add_argument("kernels", nargs="*", help="only kernels whose name begins with one of these")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all four")
    parser.add_argument("--json", metavar="FILE", help="save the costs too")
    arguments = parser.parse_args()
    wanted = [c for c in cases() if not arguments.kernels or c.name.startswith(tuple(arguments.kernels))]
    costs = [
        measure(case, target) for target in arguments.target or TARGETS for case in wanted if target in case.targets
    ]
    print(report(costs))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(c) for c in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()
