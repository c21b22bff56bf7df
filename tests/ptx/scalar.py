"""Instructions of one thread: moves, logic, integers, reals, comparisons, conversions."""

from __future__ import annotations

import numpy as np

from .operands import elementwise, instruction, reader, readers, write
from .parser import Immediate, Register
from .values import (
    F32,
    REALS,
    SIGNED,
    U16,
    U32,
    U64,
    UNSIGNED,
    WIDTHS,
    as_real,
    compare_integers,
    compare_reals,
    divide,
    extreme,
    fma,
    half_fma,
    half_product,
    pairwise,
    shift_left,
    shift_right,
    to_bits,
)

_HALVES = ("f16", "bf16")
_REAL_KINDS = ("f16", "bf16", "f32", "f64")


def _integer(kind):
    """numpy's type of a kind: bits and unsigned ones are unsigned."""
    return (SIGNED if kind[0] == "s" else UNSIGNED)[WIDTHS[kind]]


@instruction("bra", "bar", "ret", "exit")
def control(i):
    """The machine sees to them."""
    return lambda machine, mask: None


@instruction("mov", "cvta")
def mov(i):
    i.require(len(i.parts) == 2 or i.operation == "cvta.param.u64" or i.operation.startswith("cvta.to.global"))
    target, source = i.operands
    width = WIDTHS[i.kind]
    if isinstance(target, list):  # a register into several
        get, part = reader(source, width), width // len(target)

        def unpack(machine, mask):
            bits = get(machine)
            for n, register in enumerate(target):
                write(machine, register, (bits >> bits.dtype.type(n * part)).astype(UNSIGNED[part]), mask)

        return unpack
    if isinstance(source, list):
        part, whole = width // len(source), UNSIGNED[width]

        def pack(*parts):
            bits = parts[0].astype(whole)
            for n, x in enumerate(parts[1:], 1):
                bits = bits | (x.astype(whole) << whole(n * part))
            return bits

        return elementwise(i, pack, *readers(source, part))
    return elementwise(i, lambda a: a, reader(source, width))


@instruction("and", "or", "xor")
def logic(i):
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.parts[0]]
    return elementwise(i, f, *readers(i.operands[1:], WIDTHS[i.kind]))


@instruction("not")
def complement(i):
    return elementwise(i, np.invert, reader(i.operands[1], WIDTHS[i.kind]))


@instruction("add", "sub", "mul")
def arithmetic(i):
    f = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[i.parts[0]]
    kind, modifiers = i.kind, set(i.parts[1:-1])
    if kind in ("f16x2", "bf16x2"):
        i.require(i.parts[0] == "mul" and modifiers <= {"rn"})
        return elementwise(i, lambda a, b: _of_both(half_product, a, b, kind[:-2]), *readers(i.operands[1:], 32))
    if kind in _HALVES and modifiers <= {"rn"}:
        i.require(i.parts[0] == "mul")
        return elementwise(i, lambda a, b: half_product(a, b, kind), *readers(i.operands[1:], 16))
    if kind in _HALVES:  # of a half and a float32
        i.require(modifiers == {"rn", "f32"})
        a, b = reader(i.operands[1], 16), reader(i.operands[2], 32)
        return elementwise(i, lambda a, b: to_bits(f(as_real(a, kind).astype(F32), b.view(F32)), "f32"), a, b)
    a, b = readers(i.operands[1:], WIDTHS[kind])
    if kind == "f32x2":
        i.require(modifiers <= {"rn"})
        return elementwise(i, lambda a, b: pairwise(f, a, b), a, b)
    if kind in ("f32", "f64"):
        i.require(modifiers <= {"rn"})
        t = REALS[kind]
        return elementwise(i, lambda a, b: to_bits(f(a.view(t), b.view(t)), kind), a, b)
    i.require(kind[0] in "us" and modifiers <= {"lo", "hi", "wide"})
    if "wide" in modifiers:
        return elementwise(i, lambda a, b: _wide_product(a, b, kind), a, b)
    if "hi" in modifiers:
        i.require(kind == "u32")
        return elementwise(i, lambda a, b: ((a.astype(U64) * b.astype(U64)) >> U64(32)).astype(U32), a, b)
    return elementwise(i, f, a, b)


def _wide_product(a, b, kind):
    t, width = _integer(kind), WIDTHS[kind]
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * width]
    return (a.view(t).astype(wide) * b.view(t).astype(wide)).view(UNSIGNED[2 * width])


@instruction("mad")
def multiply_add(i):
    kind, width = i.kind, WIDTHS[i.kind]
    i.require(kind[0] in "us" and i.parts[1] in ("lo", "wide"))
    gets = [*readers(i.operands[1:3], width), reader(i.operands[3], width if i.parts[1] == "lo" else 2 * width)]
    if i.parts[1] == "wide":
        return elementwise(i, lambda a, b, c: _wide_product(a, b, kind) + c, *gets)
    return elementwise(i, lambda a, b, c: a * b + c, *gets)


@instruction("fma")
def fused(i):
    kind = i.kind
    if i.parts[1:-1] == ["rn"] and kind in ("bf16", "bf16x2"):
        f = half_fma if kind == "bf16" else lambda *x: _of_both(half_fma, *x)
        return elementwise(i, lambda *x: f(*x, "bf16"), *readers(i.operands[1:], WIDTHS[kind]))
    if kind in _HALVES:  # halves, added to a float32
        i.require(i.parts[1:-1] == ["rn", "f32"])
        gets = [*readers(i.operands[1:3], 16), reader(i.operands[3], 32)]
        return elementwise(
            i,
            lambda a, b, c: to_bits(fma(*(as_real(x, kind).astype(F32) for x in (a, b)), c.view(F32)), "f32"),
            *gets,
        )
    i.require(i.parts[1:-1] == ["rn"])
    gets = readers(i.operands[1:], WIDTHS[kind])
    if kind == "f32x2":
        return elementwise(i, lambda *x: pairwise(fma, *x), *gets)
    i.require(kind in ("f32", "f64"))
    return elementwise(i, lambda *x: to_bits(fma(*(y.view(REALS[kind]) for y in x)), kind), *gets)


def _of_both(f, *pairs_and_kind):
    *pairs, kind = pairs_and_kind
    low = f(*(x.astype(U16) for x in pairs), kind).astype(U32)
    high = f(*((x >> U32(16)).astype(U16) for x in pairs), kind).astype(U32)
    return low | (high << U32(16))


@instruction("div", "rem")
def quotient(i):
    kind, width = i.kind, WIDTHS[i.kind]
    a, b = readers(i.operands[1:], width)
    if kind in ("f32", "f64"):
        i.require(i.parts[:-1] == ["div", "rn"])
        t = REALS[kind]
        return elementwise(i, lambda a, b: to_bits(a.view(t) / b.view(t), kind), a, b)
    i.require(kind[0] in "us" and len(i.parts) == 2)
    t, which = _integer(kind), i.parts[0] == "rem"

    def divided(a, b):
        return divide(np.asarray(a).view(t), np.asarray(b).view(t))[which].view(UNSIGNED[width])

    return elementwise(i, divided, a, b)


@instruction("sqrt")
def root(i):
    i.require(i.parts[1:-1] == ["rn"] and i.kind in ("f32", "f64"))
    t = REALS[i.kind]
    return elementwise(i, lambda a: to_bits(np.sqrt(a.view(t)), i.kind), reader(i.operands[1], WIDTHS[i.kind]))


@instruction("abs")
def magnitude(i):
    masks = {"f32": 0x7FFFFFFF, "f64": (1 << 63) - 1}
    masks |= {"f16": 0x7FFF, "bf16": 0x7FFF, "f16x2": 0x7FFF7FFF, "bf16x2": 0x7FFF7FFF}
    i.require(len(i.parts) == 2 and i.kind in masks)
    mask = UNSIGNED[WIDTHS[i.kind]](masks[i.kind])
    return elementwise(i, lambda a: a & mask, reader(i.operands[1], WIDTHS[i.kind]))


@instruction("neg")
def negated(i):
    width, zero = WIDTHS[i.kind], UNSIGNED[WIDTHS[i.kind]](0)
    i.require(len(i.parts) == 2 and i.kind in ("f32", "f64", "s16", "s32", "s64"))
    if i.kind[0] == "f":
        sign = UNSIGNED[width](1 << (width - 1))
        return elementwise(i, lambda a: a ^ sign, reader(i.operands[1], width))
    return elementwise(i, lambda a: zero - a, reader(i.operands[1], width))


@instruction("min", "max")
def least_or_largest(i):
    kind, width, largest = i.kind, WIDTHS[i.kind], i.parts[0] == "max"
    gets = readers(i.operands[1:], width)
    if kind in ("f32", "f64"):
        i.require(set(i.parts[1:-1]) <= {"NaN"} and (len(gets) == 2 or kind == "f32"))
        nan_wins = "NaN" in i.parts

        def of_all(first, *others):  # of three from sm_100 on
            for other in others:
                first = np.asarray(extreme(np.asarray(first), other, kind, largest, nan_wins))
            return first

        return elementwise(i, of_all, *gets)
    i.require(kind[0] in "us" and len(i.parts) == 2)
    t, f = _integer(kind), np.maximum if largest else np.minimum
    return elementwise(i, lambda a, b: f(a.view(t), b.view(t)).view(UNSIGNED[width]), *gets)


@instruction("shl", "shr")
def shift(i):
    width = WIDTHS[i.kind]
    a, by = reader(i.operands[1], width), reader(i.operands[2], 32)
    if i.parts[0] == "shl":
        return elementwise(i, lambda a, by: shift_left(a, by, width), a, by)
    return elementwise(i, lambda a, by: shift_right(a, by, width, i.kind[0] == "s"), a, by)


@instruction("bfe")
def bit_field(i):
    """Some bits of a number, with its sign where it has one."""
    width, (_, source, start, length) = WIDTHS[i.kind], i.operands
    i.require(isinstance(start, Immediate) and isinstance(length, Immediate))
    start, length = start.bits, length.bits
    i.require(0 < length <= width - start)
    t = _integer(i.kind)
    left, right = t(width - start - length), t(width - length)
    return elementwise(i, lambda a: ((a.view(t) << left) >> right).view(UNSIGNED[width]), reader(source, width))


@instruction("prmt")
def permute_bytes(i):
    i.require(i.operation == "prmt.b32" and isinstance(i.operands[3], Immediate))
    selector = i.operands[3].bits

    def permute(a, b):
        eight, result = a.astype(U64) | (b.astype(U64) << U64(32)), U32(0)
        for n in range(4):
            which = selector >> (4 * n) & 15
            byte = (eight >> U64(8 * (which & 7))).astype(U32) & U32(255)
            if which & 8:  # its sign only
                byte = np.where(byte & U32(128), U32(255), U32(0))
            result = result | (byte << U32(8 * n))
        return result

    return elementwise(i, permute, *readers(i.operands[1:3], 32))


@instruction("setp")
def compare(i):
    i.require(len(i.parts) == 3)
    kind, gets = i.kind, readers(i.operands[1:], WIDTHS[i.kind])
    if kind in _REAL_KINDS:
        f = compare_reals(i.parts[1])
        return elementwise(i, lambda a, b: f(as_real(a, kind), as_real(b, kind)), *gets)
    t, f = _integer(kind), compare_integers(i.parts[1])
    return elementwise(i, lambda a, b: f(a.view(t), b.view(t)), *gets)


@instruction("selp")
def select(i):
    gets = [*readers(i.operands[1:3], WIDTHS[i.kind]), reader(i.operands[3], 1)]
    return elementwise(i, lambda a, b, p: np.where(p, a, b), *gets)


@instruction("cvt")
def convert(i):
    modifiers, to, kind = i.parts[1:-2], i.parts[-2], i.kind
    if to in ("bf16x2", "f16x2"):
        i.require(modifiers == ["rn"] and kind == "f32")

        def both(a, b):
            high, low = (to_bits(x.view(F32), to[:-2]).astype(U32) for x in (a, b))
            return (high << U32(16)) | low

        return elementwise(i, both, *readers(i.operands[1:], 32))
    source, width = i.operands[1], WIDTHS[kind]
    i.require(not isinstance(source, Register) or source.width == width)
    i.require(i.operands[0].width == WIDTHS[to])
    get = reader(source, width)
    if kind not in _REAL_KINDS:
        t = _integer(kind)
        if to not in _REAL_KINDS:
            i.require(not modifiers)
            return elementwise(i, lambda a: a.view(t).astype(UNSIGNED[WIDTHS[to]]), get)
        i.require(modifiers == ["rn"] and to in ("f32", "f64"))
        return elementwise(i, lambda a: to_bits(a.view(t).astype(REALS[to]), to), get)
    i.require(to in _REAL_KINDS and modifiers == (["rn"] if WIDTHS[to] < width else []))
    i.require(to != "bf16" or kind == "f32")
    return elementwise(i, lambda a: to_bits(as_real(a, kind), to), get)
