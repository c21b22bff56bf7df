"""The stream's maps as Triton functions: what stream.py does to random words, on blocks of them.

Shapes: [N] is a block of N elements, or of N counter blocks, of which each gives four elements. A map `m` is the
NamedTuple of stream.py with scalars of the arithmetic's type (COMPUTE_DTYPE: float64 for float64 tensors, else float32)
in its fields; TRANSFORM is its name in TRANSFORMS.

Every + - x is rounded on its own, as the stream demands: compile with enable_fp_fusion=False; no libdevice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import stream
from .stream import CentreMap, FarMap, NarrowMap, NormalMap, TailMap, UniformMap

TRANSFORMS = {
    UniformMap: "uniform",
    NormalMap: "normal",
    CentreMap: "centre",
    TailMap: "tail",
    FarMap: "far",
    NarrowMap: "narrow",
}

_PHILOX_M0, _PHILOX_M1 = (tl.constexpr(m) for m in stream.PHILOX_M)
_PHILOX_W0, _PHILOX_W1 = (tl.constexpr(w) for w in stream.PHILOX_W)
_ROUNDS = tl.constexpr(stream.PHILOX_ROUNDS)
_LOG_LOW = tl.constexpr(stream._float_bits(stream.LOG_LOW))
_LOG = tl.constexpr(stream.LOG)
_LOG_STEP = tl.constexpr(stream.LOG_STEP)
_ROOT_MAGIC = tl.constexpr(stream.ROOT_MAGIC)
_ROOT_A, _ROOT_B = tl.constexpr(stream.ROOT_A), tl.constexpr(stream.ROOT_B)
_ANGLE = tl.constexpr(stream.ANGLE)
_SIN, _COS = tl.constexpr(stream.SIN), tl.constexpr(stream.COS)
_CENTRE, _TAIL, _FAR = tl.constexpr(stream.CENTRE), tl.constexpr(stream.TAIL), tl.constexpr(stream.FAR)
_NARROW_C2 = tl.constexpr(NarrowMap._fields.index("c2"))
_NARROW_C8 = tl.constexpr(NarrowMap._fields.index("c8"))
_EXPONENT = tl.constexpr(-(1 << 23))
_SIGN = tl.constexpr(1 << 31)
_ALL_BITS = tl.constexpr((1 << 32) - 1)


@triton.jit
def _philox(counter_low, counter_high, k0, k1):
    """Philox4x32-10 of the counters (counter_low, counter_high, 0, 0).

    counter_low: [N] uint32, counter_high: [N] or scalar uint32, k0, k1: scalar uint32 -> four times [N] uint32
    """
    c0 = counter_low
    c1 = tl.zeros_like(counter_low) + counter_high
    c2 = tl.zeros_like(counter_low)
    c3 = tl.zeros_like(counter_low)
    for _ in tl.static_range(_ROUNDS):
        p0 = c0.to(tl.uint64) * _PHILOX_M0
        p1 = c2.to(tl.uint64) * _PHILOX_M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = (k0 + _PHILOX_W0).to(tl.uint32)
        k1 = (k1 + _PHILOX_W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _real(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _horner(C: tl.constexpr, TERMS: tl.constexpr, x):
    """C[0] + C[1] x + ... + C[TERMS - 1] x^(TERMS - 1), from the highest coefficient down. x: [N] float32"""
    y = x * C[TERMS - 1] + C[TERMS - 2]
    for i in tl.static_range(TERMS - 3, -1, -1):
        y = y * x + C[i]
    return y


@triton.jit
def _log(k, f):
    """f LOG(f) + k LOG_STEP, LOG with the leading coefficient 1. k: [N] int32, f: [N] float32 -> [N] float32"""
    y = f + _LOG[4]
    for i in tl.static_range(3, -1, -1):
        y = y * f + _LOG[i]
    return y * f + k.to(tl.float32) * _LOG_STEP


@triton.jit
def _scaled_log(x, EXPONENT_OF_ONE: tl.constexpr):
    """-ln(x / 2^EXPONENT_OF_ONE) / 0.2409. x: [N] float32 -> [N] float32"""
    k = (_bits(x) - (_LOG_LOW + (EXPONENT_OF_ONE << 23))) & _EXPONENT
    return _log(k, _real(_bits(x) - k - (EXPONENT_OF_ONE << 23)) - 1.0)


@triton.jit
def _roots(x):
    """-kappa sqrt(x) and -kappa / sqrt(x), kappa = 44.05. x: [N] float32 -> twice [N] float32"""
    # Not ROOT_MAGIC - ...: in the interpreter a constexpr on the left makes a constexpr of the difference.
    y = _real(-(_bits(x) >> 1) + _ROOT_MAGIC)
    y = y * (-((x * y) * y) + _ROOT_A)
    t = x * y
    g = t * y - _ROOT_B
    return t * g, y * g


@triton.jit
def _box_muller(a, b):
    """Two normal deviates: radius from a, angle from b. a, b: [N] uint32 -> twice [N] float32"""
    r, _ = _roots(_scaled_log(a.to(tl.float32) + 0.5, 32))
    x = (b << 1).to(tl.int32, bitcast=True).to(tl.float32) * _ANGLE
    x2 = x * x
    sine = ((x2 + _SIN[1]) * x2 + _SIN[0]) * x
    cosine = ((x2 + _COS[2]) * x2 + _COS[1]) * x2 + _COS[0]
    r = (r.to(tl.uint32, bitcast=True) ^ (b & _SIGN)).to(tl.float32, bitcast=True)
    odd = (b & 1) != 0
    return r * tl.where(odd, sine, cosine), r * tl.where(odd, cosine, sine)


@triton.jit
def _centre_z(w, m):
    """z = t CENTRE(log(1 - t^2)), t = w scale + offset. w: [N] uint32 -> [N] float32"""
    t = w.to(tl.float32) * m.scale.to(tl.float32) + m.offset.to(tl.float32)
    return _horner(_CENTRE, 8, _scaled_log(1.0 - t * t, 0)) * t


@triton.jit
def _tail_z(w, m):
    """z = +-TAIL(L) root(L), L = log(p (2 - p)), p counted from the nearer end. w: [N] uint32 -> [N] float32"""
    w = w ^ m.flip
    below = w < m.split
    p = tl.where(below, w, w ^ _ALL_BITS).to(tl.float32) * m.scale.to(tl.float32) + tl.where(
        below, m.below.to(tl.float32), m.above.to(tl.float32)
    )
    t = 1.0 - p
    b = _bits(p * (2.0 - p))
    k = (b - _LOG_LOW) & _EXPONENT
    f = tl.where(k == 0, -(t * t), _real(b - k) - 1.0)  # near 1 the product has lost the low bits of p
    x = _log(k, f)
    z = _horner(_TAIL, 11, x) * _roots(x)[0]
    return tl.where(below == (m.flip == 0), -z, z)


@triton.jit
def _far_z(w, m):
    """z = +-FAR(inverse(L)) root(L), L = log(q) + log_scale. w: [N] uint32 -> [N] float32"""
    q = (w ^ m.flip ^ _ALL_BITS).to(tl.float32) * m.scale.to(tl.float32) + m.offset.to(tl.float32)
    root, inverse = _roots(_scaled_log(q, 0) + m.log_scale.to(tl.float32))
    z = _horner(_FAR, 8, inverse) * root
    return tl.where(m.flip != 0, -z, z)


@triton.jit
def _narrow_y(w, m):
    """y = x + c2 x^2 + ... + c10 x^10, x = w scale + offset. w: [N] uint32 -> [N] float32"""
    x = w.to(tl.float32) * m.scale.to(tl.float32) + m.offset.to(tl.float32)
    y = x * m.c10.to(tl.float32) + m.c9.to(tl.float32)
    for i in tl.static_range(_NARROW_C8, _NARROW_C2 - 1, -1):
        y = y * x + m[i].to(tl.float32)
    return (y * x + 1.0) * x


@triton.jit
def _clamp(x, low, high):
    # Not tl.maximum: of two zeros it takes the positive one, the stream the element's own.
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _value(w, m, TRANSFORM: tl.constexpr, HAS_MEAN: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """The value of a random word, by every map but the normal's. w: [N] uint32 -> [N] COMPUTE_DTYPE"""
    if TRANSFORM == "uniform":
        return tl.minimum((w >> 8).to(tl.int32).to(tl.float32).to(COMPUTE_DTYPE) * m.scale + m.low, m.top)
    elif TRANSFORM == "narrow":
        return _clamp(_narrow_y(w, m).to(COMPUTE_DTYPE) * m.half + m.half + m.low, m.low, m.high)
    else:
        if TRANSFORM == "centre":
            z = _centre_z(w, m)
        elif TRANSFORM == "tail":
            z = _tail_z(w, m)
        else:
            z = _far_z(w, m)
        x = z.to(COMPUTE_DTYPE) * m.std
        if HAS_MEAN:
            x = x + m.mean
        return _clamp(x, m.low, m.high)


@triton.jit
def _normal_pair(a, b, m, HAS_MEAN: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """x = z std + mean. a, b: [N] uint32 -> twice [N] COMPUTE_DTYPE"""
    x, y = _box_muller(a, b)
    x, y = x.to(COMPUTE_DTYPE) * m.std, y.to(COMPUTE_DTYPE) * m.std
    if HAS_MEAN:
        x, y = x + m.mean, y + m.mean
    return x, y


@triton.jit
def four_values(
    counter_low, counter_high, k0, k1, m,
    TRANSFORM: tl.constexpr, HAS_MEAN: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
):  # fmt: skip
    """The four values of each counter block.

    counter_low: [N] uint32, counter_high: [N] or scalar uint32, k0, k1: scalar uint32 -> four times [N] COMPUTE_DTYPE
    """
    w0, w1, w2, w3 = _philox(counter_low, counter_high, k0, k1)
    if TRANSFORM == "normal":
        x0, x1 = _normal_pair(w0, w1, m, HAS_MEAN, COMPUTE_DTYPE)
        x2, x3 = _normal_pair(w2, w3, m, HAS_MEAN, COMPUTE_DTYPE)
    else:
        x0 = _value(w0, m, TRANSFORM, HAS_MEAN, COMPUTE_DTYPE)
        x1 = _value(w1, m, TRANSFORM, HAS_MEAN, COMPUTE_DTYPE)
        x2 = _value(w2, m, TRANSFORM, HAS_MEAN, COMPUTE_DTYPE)
        x3 = _value(w3, m, TRANSFORM, HAS_MEAN, COMPUTE_DTYPE)
    return x0, x1, x2, x3
