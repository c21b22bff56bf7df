"""The emulator itself: its arithmetic against torch and exact fractions, and what it must see, by PTX made by hand."""

import math
import random
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("numba")
sys.path.insert(0, str(Path(__file__).parent.parent))
from ptx import driver, launch, scalar, values
from ptx.memory import Fault, SharedMemory

HEAD = """
.version 8.7
.target sm_90
.visible .entry kernel(
	.param .u64 .ptr .global .align 4 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid {threads}
{{
	.reg .pred %p<4>;
	.reg .b32 %r<20>;
	.reg .b64 %rd<20>;
	ld.param.b64 %rd1, [kernel_param_0];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mad.wide.u32 %rd2, %r1, 4, %rd1;
	shl.b32 %r3, %r1, 2;
	add.s32 %r4, global_smem, %r3;
{body}
	ret;
}}
"""


def run(body, *, threads=64, blocks=1, numel=64, shared=1024, pointer=None):
    """What a kernel writes to int32 numbers that start as 0, 1, 2, ... Its registers: %rd1 the numbers' address, %r1
    the thread, %r2 the block, %rd2 the address of the thread's number, %r4 that of its word in shared memory."""
    x = torch.arange(numel, dtype=torch.int32)
    argument = driver.Argument("u64", x.data_ptr() if pointer is None else pointer(x), x)
    arguments = [argument, driver.Argument("u64", 0, None)]
    ptx = HEAD.format(threads=threads, body=body)
    launch.execute(driver.Launch("kernel", ptx, (blocks, 1, 1), threads, shared, arguments, {}))
    return x


def test_a_kernel_runs():
    assert torch.equal(run("st.global.b32 [ %rd2 + 0 ], %r1;"), torch.arange(64, dtype=torch.int32))
    doubled = run("ld.global.b32 %r5, [ %rd2 + 0 ];\nadd.s32 %r5, %r5, %r5;\nst.global.b32 [ %rd2 + 0 ], %r5;")
    assert torch.equal(doubled, 2 * torch.arange(64, dtype=torch.int32))


def test_branches_and_loops():
    """Each thread adds up the numbers below its own; odd threads then take their result's negative."""
    body = """
	mov.b32 %r5, 0;
	mov.b32 %r6, 0;
$L_loop:
	setp.ge.u32 %p1, %r6, %r1;
	@%p1 bra $L_done;
	add.s32 %r5, %r5, %r6;
	add.s32 %r6, %r6, 1;
	bra.uni $L_loop;
$L_done:
	and.b32 %r7, %r1, 1;
	setp.eq.b32 %p2, %r7, 0;
	@%p2 bra $L_store;
	neg.s32 %r5, %r5;
$L_store:
	st.global.b32 [ %rd2 + 0 ], %r5;
	"""
    expected = [sum(range(n)) * (-1) ** n for n in range(64)]
    assert run(body).tolist() == expected


EXCHANGE = """
	st.shared.b32 [ %r4 + 0 ], %r1;
	{barrier}
	xor.b32 %r5, %r3, 128;
	add.s32 %r6, global_smem, %r5;
	ld.shared.b32 %r7, [ %r6 + 0 ];
	st.global.b32 [ %rd2 + 0 ], %r7;
"""


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_warps_exchange_words_through_shared_memory(space):
    body = EXCHANGE.format(barrier="bar.sync 0;").replace("shared.", f"{space}.")
    assert torch.equal(run(body), torch.arange(64, dtype=torch.int32) ^ 32)


@pytest.mark.parametrize(
    ("extreme", "numbers"),
    [("max.s32", (0, -32)), ("max.u32", (-1, -32)), ("min.s32", (-31, -63)), ("min.u32", (0, -63))],
)
def test_a_warp_finds_its_extremes(extreme, numbers):
    """Of 0 to -31 in the first warp, and -32 to -63 in the second; as unsigned numbers -1 is more than 0."""
    found = run(f"""
	sub.s32 %r5, 0, %r1;
	redux.sync.{extreme} %r6, %r5, -1;
	st.global.b32 [ %rd2 + 0 ], %r6;""")
    assert found.view(2, 32).tolist() == [[number] * 32 for number in numbers]


FAULTS = {
    "load of 4 bytes out of bounds": "ld.global.b32 %r5, [ %rd2 + 4 ];",
    "store of 4 bytes out of bounds": "st.global.b32 [ %rd2 + -4 ], %r1;",
    "misaligned load of 4 bytes": "ld.global.b32 %r5, [ %rd2 + 2 ];",
    "misaligned load of 16 bytes": "ld.global.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd1 + 4 ];",
    "misaligned shared store": "st.shared.b32 [ %r4 + 2 ], %r1;",
    "shared load out of bounds": "ld.shared.b32 %r5, [ %r4 + 1024 ];",
    "reads shared memory that nobody wrote": "ld.shared.b32 %r5, [ %r4 + 0 ];",
    "race: reads what another warp wrote since the last barrier": EXCHANGE.format(barrier=""),
    "race: writes what another warp touched": """
	st.shared.b32 [ %r4 + 0 ], %r1;
	bar.sync 0;
	ld.shared.b32 %r7, [ %r4 + 0 ];
	xor.b32 %r5, %r3, 128;
	add.s32 %r6, global_smem, %r5;
	st.shared.b32 [ %r6 + 0 ], %r1;""",
    "several writers of one address": "st.global.b32 [ %rd1 + 0 ], %r1;",
    "several writers of one shared address": """
	shr.u32 %r5, %r1, 5;
	shl.b32 %r6, %r5, 2;
	add.s32 %r7, global_smem, %r6;
	st.shared.b32 [ %r7 + 0 ], %r1;""",
    "a barrier in a divergent warp": """
	setp.lt.u32 %p1, %r1, 7;
	@%p1 bra $L_out;
	bar.sync 0;
$L_out:""",
    "not all threads of a warp take part": """
	setp.lt.u32 %p1, %r1, 7;
	@%p1 shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;""",
    "does not end": "$L_on:\n\tbra.uni $L_on;",
    "a parameter of 64 bits is read as 32": "ld.param.b32 %r5, [kernel_param_0];",
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault(message, monkeypatch):
    monkeypatch.setattr("ptx.machine._MOST_STEPS", 100)
    with pytest.raises(Fault, match=message):
        run(FAULTS[message])


def test_faults_between_blocks():
    with pytest.raises(Fault, match=r"writes what another block of this launch wrote|several writers"):
        run("st.global.b32 [ %rd2 + 0 ], %r2;", blocks=2)
    body = "mad.wide.u32 %rd3, %r2, 128, %rd2;\nst.global.b32 [ %rd3 + 0 ], %r1;\nld.global.b32 %r5, [ %rd2 + 0 ];"
    with pytest.raises(Fault, match="reads what another block of this launch wrote"):
        run(body, threads=32, blocks=64, numel=64 * 32)
    with pytest.raises(Fault, match="must be a multiple of 4"):
        run("", pointer=lambda x: x.data_ptr() + 2)


def test_the_same_value_may_be_written_twice():
    assert run("st.global.b32 [ %rd1 + 0 ], 7;")[0] == 7


def test_the_order_of_lanes_can_be_chosen(monkeypatch):
    """Where lanes of a warp store different values to one shared address, the first or the last of them stays."""
    body = FAULTS["several writers of one shared address"] + (
        "\n\tbar.sync 0;\n\tld.shared.b32 %r8, [ %r7 + 0 ];\n\tst.global.b32 [ %rd2 + 0 ], %r8;"
    )
    for order, lane in (("first", 0), ("last", 31)):
        monkeypatch.setattr(SharedMemory, "lane_order", order)
        assert run(body).tolist() == [lane] * 32 + [32 + lane] * 32


@pytest.mark.parametrize(
    "body",
    [
        "tanh.approx.f32 %r5, %r1;", "add.sat.s32 %r5, %r1, %r1;", "ex2.approx.ftz.f32 %r5, %r1;",
        "ld.volatile.global.b32 %r5, [ %rd2 + 0 ];", "atom.global.add.u32 %r5, [ %rd2 + 0 ], %r1;",
        "shfl.sync.up.b32 %r5, %r1, 1, 0, -1;", "mov.u32 %r5, %clock;", "add.rz.f32 %r5, %r1, %r1;",
        "tcgen05.wait::ld.sync.aligned;", "setp.lt.and.u32 %p1, %r1, %r2, %p2;", "bar.sync 0, 32;",
        "add.f16 %r5, %r1, %r1;", "fma.rn.f16 %r5, %r1, %r1, %r1;",
        "div.full.f32 %r5, %r1, %r1;", "mul.hi.s32 %r5, %r1, %r1;", "cvt.rzi.s32.f32 %r5, %r1;",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(body):
    with pytest.raises((NotImplementedError, KeyError)):
        run(body)


# ----------------------------------------------------------------------------------------------------------------
# Arithmetic


def random_floats(count):
    bits = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    ties = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0xFFF], np.uint32)
    bits[: count // 2] = (bits[: count // 2] & 0xFFFF0000) | np.random.default_rng(1).choice(ties, count // 2)
    return bits.view(np.float32)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_as_torch_does(kind, dtype):
    x = random_floats(1 << 16)
    nan = np.isnan(x)
    with np.errstate(over="ignore"):
        ours = values.to_bits(x, kind)
    theirs = torch.from_numpy(x.copy()).to(dtype)
    assert (ours[~nan] == theirs.view(torch.int16).numpy().view(np.uint16)[~nan]).all()
    assert (ours[nan] == 0x7FFF).all()
    assert (values.as_real(ours[~nan], kind) == theirs.float().numpy()[~nan]).all()


@pytest.mark.parametrize(("kind", "digits", "lowest"), [(np.float32, 24, -149), (np.float64, 53, -1074)])
def test_fused_multiply_adds_are_rounded_once(kind, digits, lowest):
    chance = random.Random(1)
    for _ in range(2000):
        a, b, c = (kind(math.ldexp(chance.uniform(-2, 2), chance.randint(-20, 20))) for _ in range(3))
        if chance.random() < 0.5:
            c = kind(-float(a) * float(b))  # only the product's low bits are left
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        found = Fraction(float(values.fma(a, b, c)))
        unit = Fraction(2) ** max(math.frexp(float(exact))[1] - digits, lowest)
        assert abs(found - exact) <= unit / 2, (a, b, c)


@pytest.mark.parametrize(
    ("kind", "dtype", "digits", "lowest"), [("bf16", torch.bfloat16, 8, -133), ("f16", torch.float16, 11, -24)]
)
def test_products_of_halves_are_rounded_once(kind, dtype, digits, lowest):
    bits = np.random.default_rng(2).integers(0, 2**16, (2, 4000), dtype=np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        found = values.as_real(values.half_product(*bits, kind), kind)
        pairs = scalar._of_both(values.half_product, *(bits[:, ::2].astype(np.uint32) << 16 | bits[:, 1::2]), kind)
        high, low = (values.as_real(half.astype(np.uint16), kind) for half in (pairs >> 16, pairs & 0xFFFF))
    assert np.array_equal(np.stack([high, low], 1).ravel(), found, equal_nan=True)
    a, b = values.as_real(bits[0], kind), values.as_real(bits[1], kind)
    for x, y, z in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        exact = x * y  # in float64
        if math.isnan(exact) or math.isinf(exact):
            assert math.isnan(z) if math.isnan(exact) else z == exact
            continue
        unit = 2.0 ** max(math.frexp(exact)[1] - digits, lowest)
        if math.isinf(z):
            assert abs(exact) >= torch.finfo(dtype).max + unit / 2
        else:
            assert abs(Fraction(z) - Fraction(exact)) <= Fraction(unit) / 2, (x, y)


def test_fused_multiply_adds_of_bfloat16_are_rounded_once():
    a, b, c = np.random.default_rng(3).integers(0x3000, 0x4800, (3, 4000), dtype=np.uint16)
    c[:1000] |= 0x8000
    found = values.as_real(values.half_fma(a, b, c, "bf16"), "bf16").tolist()
    for x, y, z, w in zip(*(values.as_real(bits, "bf16").tolist() for bits in (a, b, c)), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert abs(Fraction(w) - exact) <= Fraction(2) ** (math.frexp(float(exact))[1] - 8) / 2, (x, y, z)
    zero = np.full_like(a, 0x8000)
    assert np.array_equal(values.half_fma(a, b, zero, "bf16"), values.half_product(a, b, "bf16"))


def test_minima_maxima_and_divisions():
    z = np.array([0.0, -0.0, 1.0, -1.0, np.nan, np.inf], np.float32)
    a, b = (v.ravel() for v in np.meshgrid(z, z))
    bits = a.view(np.uint32), b.view(np.uint32)
    for x, y, m in zip(a, b, values.extreme(*bits, "f32", True, True).view(np.float32), strict=True):
        assert np.isnan(m) == (np.isnan(x) or np.isnan(y))
        assert np.isnan(m) or m == max(x, y)
        assert not (x == 0 == y) or np.signbit(m) == (np.signbit(x) and np.signbit(y))
    least = values.extreme(*bits, "f32", False, False).view(np.float32)
    assert np.array_equal(least, np.fmin(a, b), equal_nan=True)
    i, d = np.array([7, -7, 7, -7, 0]), np.array([2, 2, -2, -2, 3])
    quotient, remainder = values.divide(i, d)
    assert (quotient.tolist(), remainder.tolist()) == ([3, -3, -3, 3, 0], [1, -1, 1, -1, 0])


def test_the_magnitude_of_a_half():
    """Of the lower half of -1, -2, ...: the bits of a NaN, whose sign goes."""
    found = run("""
	.reg .b16 %rs<3>;
	sub.s32 %r5, 0, %r1;
	cvt.u16.u32 %rs1, %r5;
	abs.f16 %rs2, %rs1;
	cvt.u32.u16 %r6, %rs2;
	st.global.b32 [ %rd2 + 0 ], %r6;""")
    assert found.tolist() == [-n & 0x7FFF for n in range(64)]


def test_shifts_by_the_width_and_more():
    by, x = np.array([0, 1, 31, 32, 40], np.uint32), np.full(5, 0x80000001, np.uint32)
    assert values.shift_left(x, by, 32).tolist() == [0x80000001, 2, 0x80000000, 0, 0]
    assert values.shift_right(x, by, 32, False).tolist() == [0x80000001, 0x40000000, 1, 0, 0]
    assert values.shift_right(x, by, 32, True).tolist() == [0x80000001, 0xC0000000, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF]
