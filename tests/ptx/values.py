"""Arithmetic on registers: bits to numbers and back, with the roundings, NaNs and zeros of NVIDIA's GPUs."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, vectorize
from numba.extending import intrinsic

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I32, I64 = np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
UNSIGNED = {8: U8, 16: U16, 32: U32, 64: U64}
SIGNED = {8: np.int8, 16: np.int16, 32: I32, 64: I64}
REALS = {"f16": F16, "f32": F32, "f64": F64}
WIDTHS = {
    "pred": 1,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "f64": 64,
    "f16x2": 32,
    "bf16x2": 32,
    "f32x2": 64,
    **{f"{kind}{width}": width for kind in "bus" for width in (8, 16, 32, 64)},
}  # of types, in bits
CANONICAL_NAN = {F16: U16(0x7FFF), F32: U32(0x7FFFFFFF), F64: U64(0x7FF8000000000000)}


@intrinsic
def _fma(typing_context, a, b, c):
    def generate(context, builder: ir.IRBuilder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, b, c), generate


_fma_scalar = njit(lambda a, b, c: _fma(a, b, c))
_fma_arrays = vectorize(["float32(float32, float32, float32)", "float64(float64, float64, float64)"])(
    lambda a, b, c: _fma_scalar(a, b, c)
)


def fma(a, b, c):
    """a * b + c, rounded once."""
    return np.asarray(_fma_arrays(a, b, c), np.asarray(a).dtype)


def as_real(bits, kind):
    """The numbers that registers hold; bfloat16 as float32."""
    if kind == "bf16":
        return (bits.astype(U32) << U32(16)).view(F32)
    return bits.view(REALS[kind])


def to_bits(x, kind):
    """The bits of a result. Its NaNs are the one that the hardware makes."""
    if kind == "bf16":
        bits = np.asarray(x, F32).view(U32)
        rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
        return np.where(np.isnan(x), U16(0x7FFF), rounded)
    x = np.asarray(x).astype(REALS[kind], copy=False)
    bits = x.view(UNSIGNED[x.itemsize * 8])
    nan = np.isnan(x)
    return np.where(nan, CANONICAL_NAN[REALS[kind]], bits) if nan.any() else bits


def half_product(a, b, kind):
    """The bits of the product of two halves, which float64 holds exactly, rounded once."""
    exact = as_real(a, kind).astype(F64) * as_real(b, kind).astype(F64)
    if kind == "f16":
        return to_bits(exact, kind)
    rounded = np.asarray(exact.astype(F32))  # to odd: then a second rounding gives what one would have given
    bits = rounded.view(U32)
    inexact = (rounded != exact) & ~np.isnan(exact)
    bits = bits - (inexact & (np.abs(rounded) > np.abs(exact))).astype(U32)
    return to_bits((bits | inexact.astype(U32)).view(F32), kind)


def tf32(bits):
    """What tensor cores read of a float32: its upper 19 bits."""
    return (bits & U32(0xFFFFE000)).view(F32)


def pairwise(f, *registers):
    """f on the two float32 numbers that a 64-bit register holds."""
    low = [np.asarray(x & U64(0xFFFFFFFF)).astype(U32).view(F32) for x in registers]
    high = [np.asarray(x >> U64(32)).astype(U32).view(F32) for x in registers]
    return to_bits(f(*low), "f32").astype(U64) | (to_bits(f(*high), "f32").astype(U64) << U64(32))


def shift_left(a, by, width):
    """a << by; 0 where that is the width or more."""
    if np.ndim(by) == 0:
        return a << a.dtype.type(by) if int(by) < width else a & a.dtype.type(0)
    return np.where(by < U32(width), a << np.minimum(by, U32(width - 1)).astype(a.dtype), a.dtype.type(0))


def shift_right(a, by, width, signed):
    """a >> by; zeros, or the sign, where that is the width or more."""
    t = SIGNED[width] if signed else UNSIGNED[width]
    shifted = a.view(t) >> np.minimum(by, U32(width - 1)).astype(t)
    if not signed:
        shifted = np.where(by < U32(width), shifted, t(0))
    return shifted.view(UNSIGNED[width])


def divide(a, b):
    """Quotient and remainder of integers, towards zero."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    if a.dtype.kind == "i":
        remainder = a - quotient * b
        quotient = quotient + ((remainder != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return quotient, a - quotient * b


def extreme(a, b, kind, largest, nan_wins):
    """min or max of numbers given as bits: -0 is less than +0, and a NaN loses unless it wins."""
    x, y = a.view(REALS[kind]), b.view(REALS[kind])
    x_nan, y_nan = np.isnan(x), np.isnan(y)
    result = np.where((x > y) if largest else (x < y), a, b)
    result = np.where(x == y, (a & b) if largest else (a | b), result)
    if nan_wins:
        return np.where(x_nan | y_nan, CANONICAL_NAN[REALS[kind]], result)
    result = np.where(x_nan, b, np.where(y_nan, a, result))
    return np.where(x_nan & y_nan, CANONICAL_NAN[REALS[kind]], result)


_ORDERED = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def compare_integers(name):
    """A comparison of setp, as a function."""
    return np.not_equal if name == "ne" else _ORDERED[name]


def compare_reals(name):
    """As compare_integers: false where one is a NaN, but for equ, neu, ltu, leu, gtu, geu."""

    def unordered(a, b):
        return np.isnan(a) | np.isnan(b)

    if name == "nan":
        return unordered
    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if name == "ne":
        return lambda a, b: (a != b) & ~unordered(a, b)
    if name in _ORDERED:
        return _ORDERED[name]
    or_nan = compare_integers(name[:-1])
    return lambda a, b: or_nan(a, b) | unordered(a, b)
