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
from initlab.kernels import _linear_epilogue_triton as epilogue
from initlab.kernels import _linear_triton as linear
from initlab.kernels import _nonfinite_triton as nonfinite
from initlab.kernels import _norms_triton as norms
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

FUSED = {"enable_fp_fusion": True}

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
def flag_block(x_ptr, out_ptr, BLOCK_SIZE: tl.constexpr):
    """What the check for non-finite values does with a block, and one store to keep it."""
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + tl.program_id(0), tl.max(nonfinite.flags_of(tl.load(x_ptr + offsets)), 0))


@triton.jit
def randn4x(ptr, seed, BLOCK_SIZE: tl.constexpr, OUT_DTYPE: tl.constexpr):
    """Triton's own generator, packed and stored as ours is."""
    counters = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x0, x1, x2, x3 = tl.randn4x(seed, counters)
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(BLOCK_SIZE * 4)
    offsets = tl.program_id(0).to(tl.int64) * (BLOCK_SIZE * 4) + tl.arange(0, BLOCK_SIZE * 4)
    tl.store(ptr + offsets, x.to(OUT_DTYPE))


NUM_BLOCKS = 8  # that a part reads one after the other: what a program does once counts an eighth


@triton.jit
def norm_blocks(address, sums_ptr, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """The path that large gradients take to their norm."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK_SIZE * NUM_BLOCKS)
    total = tl.zeros([BLOCK_SIZE // 8], tl.float64)
    for i in tl.static_range(NUM_BLOCKS):
        total += norms.full_block_squares(address, start + i * BLOCK_SIZE, DTYPE, BLOCK_SIZE)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def scale_blocks(address, a, b, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """The path that large gradients take when they are scaled."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK_SIZE * NUM_BLOCKS)
    for i in tl.static_range(NUM_BLOCKS):
        norms.scale_full_block(address, start + i * BLOCK_SIZE, a, b, a == 0.0, DTYPE, BLOCK_SIZE)


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
    bulk_stores: int = 0  # that one epilogue makes; 0 where there are none


def cases() -> Iterator[Case]:
    """Every kernel of the package."""
    yield from sampling_cases()
    yield from norm_cases()
    yield from nonfinite_cases()
    yield from linear_relu_cases()


def norm_cases() -> Iterator[Case]:
    """The norm and the scaling: paths of full blocks, then whole kernels."""
    block, elements = norms.BLOCK_SIZE, NUM_BLOCKS * norms.BLOCK_SIZE
    for element, (dtype, size) in ELEMENTS.items():
        constants = {"DTYPE": dtype, "BLOCK_SIZE": block, "NUM_BLOCKS": NUM_BLOCKS}
        signature = {"address": "i64", "sums_ptr": "*fp64"}
        yield Case("norm: full blocks", element, norm_blocks, signature, constants, elements, size, options=FUSED)
        signature = {"address": "i64", "a": "fp64", "b": "fp64"}
        yield Case("scale: full blocks", element, scale_blocks, signature, constants, elements, 2 * size, options=FUSED)
    table = {"table_ptr": "*i64", "columns": "i32", "blocks": "i32"}
    for fp64, element in ((False, ""), (True, "fp64")):
        signature = {**table, "first_item": "i32", "sums_ptr": "*fp64"}
        constants = {"FP64": fp64, "BLOCK_SIZE": block}
        yield Case("norm: kernel", element, norms.norm_kernel, signature, constants, 0, 0, options=FUSED)
        signature = {**table, "first_item": "i32", "norm_ptr": "*fp64"}
        signature |= {"max_norm_high": "i32", "max_norm_low": "i32"}
        constants = {"POLICY": "zero", "FP64": fp64, "BLOCK_SIZE": block}
        yield Case("scale: kernel", element, norms.scale_kernel, signature, constants, 0, 0, options=FUSED)
    signature = {"sums_ptr": "*fp64", "items": "i32", "sound": "fp32", "results_ptr": "*i64"}
    yield Case("norm: finish", "", norms.finish_norm_kernel, signature, {}, 0, 0, options=FUSED)
    signature = {**table, "items": "i32", "results_ptr": "*i64", "scratch_ptr": "*fp64"}
    constants = {"BLOCK_SIZE": block, "RESCAN_BLOCK": norms.RESCAN_BLOCK, "sums_ptr": None}
    yield Case("norm: rescan", "", norms.rescan_kernel, signature, constants, 0, 0, options=FUSED)
    signature |= {"sums_ptr": "*fp64"}
    constants = {"BLOCK_SIZE": block, "RESCAN_BLOCK": norms.RESCAN_BLOCK}
    yield Case("norm: rescan per tensor", "", norms.rescan_kernel, signature, constants, 0, 0, options=FUSED)
    signature |= {"norms_ptr": "*fp64"}
    constants = {"BLOCK_SIZE": block}
    yield Case("norm: per tensor", "", norms.tensor_norms_kernel, signature, constants, 0, 0, options=FUSED)
    signature = {"scratch_ptr": "*fp64", "items": "i32", "results_ptr": "*i64"}
    yield Case("norm: rescan finish", "", norms.finish_rescan_kernel, signature, {}, 0, 0, options=FUSED)


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
        yield Case("tl.randn4x", element, randn4x, types, constants, per_chunk, size, ("ptr",), options=FUSED)


def nonfinite_cases() -> Iterator[Case]:
    """The non-finite flag of a tensor: the whole kernel, and its path of full blocks."""
    constants, options = {"BLOCK_SIZE": nonfinite.BLOCK_SIZE}, {"warps": nonfinite.NUM_WARPS, "options": FUSED}
    elements, kernel = nonfinite.BLOCK_SIZE, nonfinite.add_flag_kernel
    for element, (_, size) in ELEMENTS.items():
        signature = {"flag_ptr": "*i32", "x_ptr": f"*{element}", "n_elements": "i64"}
        yield Case("flag: kernel", element, kernel, signature, constants, 0, size, ("flag_ptr", "x_ptr"), **options)
        signature = {"x_ptr": f"*{element}", "out_ptr": "*i32"}
        yield Case("flag: block", element, flag_block, signature, constants, elements, size, ("x_ptr",), **options)


@triton.jit
def flag_at_once(flag_ptr, y, start_m, start_n, M, N, LIMIT: tl.constexpr, POSITIVE_LIMIT: tl.constexpr):
    """In place of the rescan, which hardly any tile takes: what is left is the flag's cost for every tile."""
    tl.atomic_or(flag_ptr, 1, sem="relaxed")


def linear_relu_cases() -> Iterator[Case]:
    """A GEMM's whole kernel by what its epilogue does: each has one more thing to do than the one before it. Then
    the passes over memory."""
    variants: dict[str, dict[str, Any]] = {
        "relu": {"bias_ptr": None, "FLAG_TILE": None, "SQUARED": False},
        "relu, bias": {"FLAG_TILE": None, "SQUARED": False},
        "relu, bias, maximum": {"FLAG_TILE": flag_at_once, "SQUARED": False},
        "relu, bias, flag": {"FLAG_TILE": epilogue.flag_tile, "SQUARED": False},
        "relu squared, bias": {"FLAG_TILE": None, "SQUARED": True},
        "relu squared, bias, maximum": {"FLAG_TILE": flag_at_once, "SQUARED": True},
        "relu squared, bias, flag": {"FLAG_TILE": epilogue.flag_tile, "SQUARED": True},
    }
    targets_of = {10: ("sm_100",), 9: ("sm_90",), 8: ("sm_80",)}
    for element, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):  # float16 costs what bfloat16 does
        kind, size = ELEMENTS[element]
        common = {"LIMIT": epilogue.LIMITS[dtype], "DTYPE": kind, "INTERPRETED": False}
        for capability_major, targets in targets_of.items():
            for tile in linear.TILES[capability_major]:
                block_k = tile.BLOCK_K_BYTES // size
                sizes = {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": block_k}
                sizes |= {"EPILOGUE_SUBTILE": tile.EPILOGUE_SUBTILE}
                if capability_major >= 9:
                    function = linear.linear_relu_tma_kernel
                    sizes |= {"FLAG_PRODUCT": capability_major >= 10}
                    shapes = {"x_desc": (tile.BLOCK_M, block_k), "w_desc": (tile.BLOCK_N, block_k)}
                    shapes["y_desc"] = (tile.BLOCK_M, tile.BLOCK_N // tile.EPILOGUE_SUBTILE)
                    types = {name: f"tensordesc<{element}[{a},{b}]>" for name, (a, b) in shapes.items()}
                    integers = ("M", "N", "K", "num_programs")
                    aligned: tuple[str, ...] = ("bias_ptr", "flag_ptr")
                else:
                    function = linear.linear_relu_kernel
                    types = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), f"*{element}")
                    integers = ("M", "N", "K", "stride_xm", "stride_wn")
                    aligned = ("x_ptr", "w_ptr", "y_ptr", "bias_ptr", "flag_ptr", "N", "K", "stride_xm", "stride_wn")
                types |= {"bias_ptr": f"*{element}", "flag_ptr": "*i32"} | dict.fromkeys(integers, "i32")
                for variant, extra in variants.items():
                    limits = epilogue.SQUARE_LIMITS if extra["SQUARED"] else epilogue.LIMITS
                    constants = sizes | common | extra | {"POSITIVE_LIMIT": limits[dtype]}
                    yield Case(
                        f"linear_relu {tile.BLOCK_M}x{tile.BLOCK_N}: {variant}",
                        element,
                        function,
                        {name: kind for name, kind in types.items() if name not in constants},
                        constants,
                        tile.BLOCK_M * tile.BLOCK_N,
                        0,
                        tuple(name for name in aligned if name not in constants),
                        tile.num_warps,
                        {"num_stages": tile.num_stages, **FUSED},
                        targets,
                        tile.EPILOGUE_SUBTILE if capability_major >= 9 else 0,
                    )
        types = {"y_ptr": f"*{element}", "flag_ptr": "*i32", "n_elements": "i64"}
        for variant, (flag_tile, squared) in {
            "relu": (None, False),
            "relu, flag": (epilogue.flag_tile, False),
            "relu squared, flag": (epilogue.flag_tile, True),
        }.items():
            constants = {"BLOCK_SIZE": epilogue.RELU_BLOCK, "FLAG_TILE": flag_tile, "SQUARED": squared}
            constants |= {"LIMIT": epilogue.LIMITS[dtype], "INTERPRETED": False}
            constants |= {"POSITIVE_LIMIT": (epilogue.SQUARE_LIMITS if squared else epilogue.LIMITS)[dtype]}
            yield Case(
                f"linear_relu pass: {variant}", element, epilogue.relu_in_place_kernel, types, constants, 0, 2 * size,
                ("y_ptr", "flag_ptr"), 8, FUSED,
            )  # fmt: skip
        types = dict.fromkeys(("grad_ptr", "y_ptr", "out_ptr"), f"*{element}") | {"sums_ptr": "*fp32"}
        types |= dict.fromkeys(("M", "N", "stride_grad_m"), "i32")
        constants = {"stride_grad_n": 1, "ROWS": epilogue.MASK_ROWS, "BLOCK_M": epilogue.MASK_BLOCK_M}
        constants |= {"BLOCK_N": epilogue.MASK_BLOCK_N, "INTERPRETED": False}
        for variant, squared in {"": False, ", squared": True}.items():
            yield Case(
                f"linear_relu backward{variant}", element, epilogue.mask_and_sum_kernel, types,
                constants | {"SQUARED": squared}, 0, 3 * size,
                ("grad_ptr", "y_ptr", "out_ptr", "sums_ptr", "N", "stride_grad_m"), 4, FUSED,
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
    copies: int = 1  # of the epilogue in the code. An element passes one of them, and per_element counts all
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
    if case.bulk_stores:
        cost.copies = sum(n for op, n in cost.products.items() if op.startswith("UTMASTG")) // case.bulk_stores
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
