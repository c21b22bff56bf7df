"""The stream, version 1: which number element i of a parameter with key k is. The reference, in plain torch.

``docs/stream.md`` is the normative text; this file follows its sections 2 to 5 (keys.py is section 1) and runs on any
device. It is made of integer operations and of IEEE float32 ``+ - x``, each rounded on its own, so that every backend
can give the same bits: no libm, no square root, no division, no fused multiply-add. The faster backends must equal it
bit for bit.

The constants below are the only copy; ``tools/fit_stream.py`` fitted them and measures their bounds.
"""

from __future__ import annotations

import ctypes
import math
import struct
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..torch_internals import without_dispatch_modes

_MASK32 = 0xFFFFFFFF

# Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC'11): multipliers and key increments.
PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

# Every value is a float32. Bounds: docs/stream.md, "Approximations".
LOG_LOW = 0.6499999761581421
LOG = (-4.151175498962402, 2.076369524002075, -1.3809419870376587, 1.0068670511245728, -0.9197058081626892)
LOG_STEP = -3.4301095297450956e-07
ROOT_MAGIC = 0x5F4ABBC9
ROOT_A = 3.7594852447509766
ROOT_B = 23.573673248291016
ANGLE = -6.09368666637522e-11
SIN = (0.09456253051757812, -0.5675663948059082)
COS = (-0.015755776315927505, 0.28377118706703186, -0.8515703678131104)
CENTRE = (
    1.2533137798309326, 0.07904474437236786, 0.0009440836729481816, -4.44530051026959e-05,
    -9.925112181008444e-07, 9.986697335762074e-08, -2.495541107094823e-09, 2.2380161959767442e-11,
)  # fmt: skip
TAIL = (
    -0.01396323274821043, -3.958291927119717e-05, 2.2410389988181123e-07, 2.157548983916513e-08,
    -8.801285811266268e-10, 1.771624860702481e-11, -2.1764977786633416e-13, 1.6801662956023944e-15,
    -7.861622149016256e-18, 1.996030438943071e-20, -2.0264691229093412e-23,
)  # fmt: skip
FAR = (
    -0.015763379633426666, -2.4947101337602362e-05, 6.080577804823406e-05, 5.945762040937552e-06,
    6.585793812519114e-07, 5.446442230550019e-08, 2.7219191345295712e-09, 6.041345895768657e-11,
)  # fmt: skip

CENTRE_SIGMA = 3.125  # the centre map serves truncation bounds within this many sigma
FAR_SIGMA = 3.0  # the far map serves intervals that begin at least this far out
LIMIT_SIGMA = 12.0  # beyond it the mass of a tail leaves float32's range
NARROW = 0.5  # the narrow map serves (beta - alpha) * max(1, |alpha|, |beta|) below this
NARROW_TERMS = 10


# Section 2: random words. Philox4x32-10, counter block = element // 4, word = element % 4.


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors that hold 32-bit words; k0 is the low half of the key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK32, key >> 32
    for _ in range(PHILOX_ROUNDS):
        # An int64 product wraps modulo 2^64 and its sign is shed by the mask: the exact 64 bits of both halves.
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        high0, high1 = (p0 >> 32) & _MASK32, (p1 >> 32) & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK32, high0 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + PHILOX_W[0]) & _MASK32, (k1 + PHILOX_W[1]) & _MASK32
    return c0, c1, c2, c3


def block_words(key: int, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each block (int64 tensor of block numbers): counter (block low, block high, 0, 0)."""
    zero = torch.zeros_like(blocks)
    return philox4x32((blocks & _MASK32, (blocks >> 32) & _MASK32, zero, zero), key)


# Section 3: shared arithmetic. Words are int64 in [0, 2^32); reals are float32.


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _real(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def _float_bits(x: float) -> int:
    """The bits of float32(x) as a signed 32-bit integer."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(x)).value


def fl32(x: float) -> float:
    """x rounded once to float32 (to an infinity where it overflows)."""
    return ctypes.c_float(x).value


def _as_signed(words: Tensor) -> Tensor:
    """int64 words in [0, 2^32) reinterpreted as int32."""
    return ((words ^ 0x80000000) - 0x80000000).to(torch.int32)


def _horner(coefficients: tuple[float, ...], x: Tensor, leading_one: bool = False) -> Tensor:
    """sum c_i x^i (+ x^n where the leading coefficient is 1 and left out), every step rounded."""
    if leading_one:
        y = x + coefficients[-1]
        rest = coefficients[:-1]
    else:
        y = x * coefficients[-1] + coefficients[-2]
        rest = coefficients[:-2]
    for c in reversed(rest):
        y = y * x + c
    return y


def _scaled_log(x: Tensor, unit: int = 0, below_one: Tensor | None = None) -> Tensor:
    """L = -ln(x / 2^unit) / 0.2409 for 0 < x <= 2^unit: the logarithm's own scale is left in.

    `below_one` is x - 1 where the caller knows it better than x, which near 1 has lost its low bits.
    """
    offset = unit << 23
    k = (_bits(x) - (_float_bits(LOG_LOW) + offset)) & -(1 << 23)  # (exponent - unit) * 2^23
    f = _real(_bits(x) - k - offset) - 1.0  # mantissa in [0.65, 1.3), less 1: exact
    if below_one is not None:
        f = torch.where(k == 0, below_one, f)
    return _horner(LOG, f, leading_one=True) * f + k.to(torch.float32) * LOG_STEP


def _roots(x: Tensor) -> tuple[Tensor, Tensor]:
    """-kappa * sqrt(x) and -kappa / sqrt(x), kappa = 44.05; 0 gives a 0."""
    y = _real(ROOT_MAGIC - (_bits(x) >> 1))
    y = y * (ROOT_A - (x * y) * y)
    t = x * y
    g = t * y - ROOT_B
    return t * g, y * g


# Section 4: maps. What the host works out once per distribution and dtype, and what each does to words.
#
# Parameters are Python floats: float32 values for float32, bfloat16 and float16 tensors, float64 for float64 ones.


class UniformMap(NamedTuple):
    """x = min(k * scale + low, top), k = word >> 8."""

    scale: float
    low: float
    top: float


class NormalMap(NamedTuple):
    """x = z * std + mean by Box-Muller; the addition is left out where mean == 0."""

    std: float
    mean: float


class CentreMap(NamedTuple):
    """Truncated normal, both bounds within 3.125 sigma: z = t * CENTRE(L), t = 2 p - 1."""

    std: float
    mean: float
    low: float
    high: float
    scale: float
    offset: float


class TailMap(NamedTuple):
    """Truncated normal that reaches further: p is counted from the nearer end of the line."""

    std: float
    mean: float
    low: float
    high: float
    scale: float
    below: float
    above: float
    split: int
    flip: int


class FarMap(NamedTuple):
    """Truncated normal that begins 3 to 12 sigma out: q is scaled by a power of two, or float32 would lose it."""

    std: float
    mean: float
    low: float
    high: float
    scale: float
    offset: float
    log_scale: float
    flip: int


class NarrowMap(NamedTuple):
    """Truncated normal on a narrow interval: a power series in the uniform, x = (half * y + half) + low."""

    low: float
    high: float
    half: float
    scale: float
    offset: float
    c2: float
    c3: float
    c4: float
    c5: float
    c6: float
    c7: float
    c8: float
    c9: float
    c10: float


Map: TypeAlias = UniformMap | NormalMap | CentreMap | TailMap | FarMap | NarrowMap


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal deviates of two words: radius from all 32 bits of a, angle from all 32 bits of b.

    Source: G. E. P. Box and M. E. Muller, 1958. u = v * 2^-32, v = fl32(a) + 1/2; the angle is phi, reflected
    about pi/4 where b is odd and turned by pi where b's top bit is set, phi = (pi/4) * signed(2 b mod 2^32) / 2^31.
    """
    v = a.to(torch.float32) + 0.5
    r, _ = _roots(_scaled_log(v, unit=32))
    x = _as_signed((b << 1) & _MASK32).to(torch.float32) * ANGLE
    x2 = x * x
    sine = _horner(SIN, x2, leading_one=True) * x
    cosine = _horner(COS, x2, leading_one=True)
    r = _real(_bits(r) ^ _as_signed(b & 0x80000000))
    odd = (b & 1) != 0
    return r * torch.where(odd, sine, cosine), r * torch.where(odd, cosine, sine)


def _centre_z(m: CentreMap, w: Tensor) -> Tensor:
    t = w.to(torch.float32) * m.scale + m.offset
    return _horner(CENTRE, _scaled_log(1.0 - t * t)) * t


def _tail_z(m: TailMap, w: Tensor) -> Tensor:
    w = w ^ m.flip
    below = w < m.split
    p = torch.where(below, w, w ^ _MASK32).to(torch.float32) * m.scale
    p = p + torch.full_like(p, m.above).masked_fill(below, m.below)  # torch.where would take the default dtype
    t = 1.0 - p
    size = _scaled_log(p * (2.0 - p), below_one=-(t * t))
    z = _horner(TAIL, size) * _roots(size)[0]
    return torch.where(below == (m.flip == 0), -z, z)


def _far_z(m: FarMap, w: Tensor) -> Tensor:
    q = (w ^ m.flip ^ _MASK32).to(torch.float32) * m.scale + m.offset
    root, inverse = _roots(_scaled_log(q) + m.log_scale)
    z = _horner(FAR, inverse) * root
    return -z if m.flip else z


def _narrow_y(m: NarrowMap, w: Tensor) -> Tensor:
    x = w.to(torch.float32) * m.scale + m.offset
    return _horner((1.0, *m[5:]), x) * x


def block_values(m: Map, key: int, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The four values of each block, shape (n, 4), in `dtype` (float64, float32, bfloat16 or float16)."""
    return _values(m, block_words(key, blocks), dtype)


def extremes(m: Map, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest value that a map can give, in `dtype`.

    A normal's radius is largest at a = 0, and its cosine at b = 0 and, with the other sign, at b = 2^31. The value of
    every other map rises with its word.
    """
    extreme = (0, 0, 0, 1 << 31) if isinstance(m, NormalMap) else (0, 1, _MASK32 - 1, _MASK32)
    with without_dispatch_modes():  # fake tensors hold no values
        words = torch.tensor(extreme, dtype=torch.int64, device="cpu")
        values = _values(m, (words[:1], words[1:2], words[2:3], words[3:]), dtype)
        return values.min().item(), values.max().item()


def _values(m: Map, words: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The four values that a map makes of the four words of each block."""
    with torch.no_grad():
        real = torch.float64 if dtype == torch.float64 else torch.float32
        if isinstance(m, UniformMap):
            k = torch.stack(words, -1) >> 8
            x = k.to(torch.float32).to(real) * m.scale + m.low
            return torch.where(x > m.top, m.top, x).to(dtype)
        if isinstance(m, NormalMap):
            z = torch.stack((*_box_muller(*words[:2]), *_box_muller(*words[2:])), -1).to(real)
            x = z * m.std
            return (x if m.mean == 0.0 else x + m.mean).to(dtype)
        w = torch.stack(words, -1)
        if isinstance(m, NarrowMap):
            x = _narrow_y(m, w).to(real) * m.half + m.half + m.low
        else:
            if isinstance(m, CentreMap):
                z = _centre_z(m, w)
            else:
                z = _tail_z(m, w) if isinstance(m, TailMap) else _far_z(m, w)
            x = z.to(real) * m.std
            x = x if m.mean == 0.0 else x + m.mean
        x = torch.where(x < m.low, m.low, x)
        return torch.where(x > m.high, m.high, x).to(dtype)


# Section 5: what the host works out. float64 + - x / only, so that every host gives the same parameters.


def uniform_map(low: float, high: float, dtype: torch.dtype) -> UniformMap:
    """Uniform on [low, high)."""
    scale = (high - low) * 2.0**-24
    if dtype == torch.float64:
        return UniformMap(scale, low, max(low, math.nextafter(high, -math.inf)))
    bottom, end = _rounded_bits(low, dtype), _rounded_bits(high, dtype)
    top = _value(_bits_below(end, dtype), dtype)
    return UniformMap(fl32(scale), fl32(low), max(top, _value(bottom, dtype)))


# Python's own arithmetic on bit patterns: tensors would follow torch's default device, or be fake.


def _rounded_bits(x: float, dtype: torch.dtype) -> int:
    """The bits of x rounded to float32 and then to the dtype; a zero's sign is dropped."""
    if dtype == torch.float16:
        return int.from_bytes(struct.pack("<e", fl32(x) + 0.0), "little")
    bits = int.from_bytes(struct.pack("<f", fl32(x) + 0.0), "little")
    return bits if dtype == torch.float32 else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _bits_below(bits: int, dtype: torch.dtype) -> int:
    """The bits of the next number towards minus infinity."""
    sign = 1 << (31 if dtype == torch.float32 else 15)
    if bits == 0:
        return sign | 1
    return bits + 1 if bits & sign else bits - 1


def _value(bits: int, dtype: torch.dtype) -> float:
    if dtype == torch.float16:
        return float(struct.unpack("<e", bits.to_bytes(2, "little"))[0])
    return float(struct.unpack("<f", (bits if dtype == torch.float32 else bits << 16).to_bytes(4, "little"))[0])


def normal_map(mean: float, std: float, dtype: torch.dtype) -> NormalMap:
    """Normal with this mean and standard deviation."""
    rounded = (lambda x: x) if dtype == torch.float64 else fl32
    return NormalMap(rounded(std), rounded(mean))


def truncated_normal_map(mean: float, std: float, low: float, high: float, dtype: torch.dtype) -> Map:
    """Normal conditioned on [low, high], low < high, whose nearer bound is within LIMIT_SIGMA."""
    rounded = (lambda x: x) if dtype == torch.float64 else fl32
    alpha, beta = (low - mean) / std, (high - mean) / std
    width = beta - alpha
    if width * max(1.0, abs(alpha), abs(beta)) < NARROW:
        half = (high - low) * 0.5
        return NarrowMap(rounded(low), rounded(high), rounded(half), *_narrow_series((alpha + beta) * 0.5, width * 0.5))
    affine = (rounded(std), rounded(mean), rounded(low), rounded(high))
    if max(abs(alpha), abs(beta)) <= CENTRE_SIGMA:
        step = (_half_mass(beta) - _half_mass(alpha)) * 2.0**-32
        return CentreMap(*affine, fl32(step * 2.0), fl32(_half_mass(alpha) * 2.0 + step))
    flip = alpha + beta < 0.0
    if flip:  # mirrored, so that the upper tail is the longer one
        alpha, beta = -beta, -alpha
    flip_word = _MASK32 if flip else 0
    end = _upper_tail(beta)
    if alpha >= FAR_SIGMA:
        begin = _upper_tail(alpha)
        unit = 1 - math.frexp(begin)[1]  # begin * 2^unit lies in [1, 2)
        step = math.ldexp(begin - end, unit - 32)
        offset = math.ldexp(end, unit) + step * 0.5
        return FarMap(*affine, fl32(step), fl32(offset), fl32(-(unit << 23) * LOG_STEP), flip_word)
    step = (_half_mass(beta) - _half_mass(alpha)) * 2.0**-32
    start = _upper_tail(-alpha) if alpha < 0.0 else 0.0  # not met where no word is below the split
    split = math.ceil(-_half_mass(alpha) / step - 0.5) if alpha < 0.0 else 0
    return TailMap(
        *affine, fl32(step * 2.0), fl32(start * 2.0 + step), fl32(end * 2.0 + step), max(split, 0), flip_word
    )


def _exp_minus(t: float) -> float:
    """e^-t for t >= 0: t = n ln 2 + r, a Taylor series in r, and an exact power of two."""
    n = int(t * 1.4426950408889634 + 0.5)
    r = (t - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10  # ln 2 in two parts (fdlibm)
    total = term = 1.0
    for i in range(1, 20):
        term = term * -r / i
        total = total + term
    return math.ldexp(total, -n)


def _density(x: float) -> float:
    return _exp_minus(x * x * 0.5) * 0.39894228040143267794


def _half_mass(x: float) -> float:
    """Phi(x) - 1/2. Source: G. Marsaglia, Evaluating the Normal Distribution, J. Stat. Softw. 11 (2004)."""
    if x < 0.0:
        return -_half_mass(-x)
    if x >= 3.0:
        return 0.5 - _upper_tail(x)
    total, term, i = x, x, 1.0
    while term > total * 1e-18:
        i = i + 2.0
        term = term * x * x / i
        total = total + term
    return total * _density(x)


def _upper_tail(x: float) -> float:
    """1 - Phi(x) for x >= 0: Laplace's continued fraction from 3 on, 150 terms, evaluated backwards."""
    if x < 3.0:
        return 0.5 - _half_mass(x)
    if x > 38.0:
        return 0.0
    fraction = x
    for i in range(150, 0, -1):
        fraction = x + i / fraction
    return _density(x) / fraction


def _narrow_series(middle: float, half: float) -> tuple[float, ...]:
    """Scale, offset and coefficients 2..10 of y(x), the deviate's place in [-1, 1], for x = word * scale + offset.

    The density at middle + half * y is proportional to exp(-a y - b y^2), a = middle * half, b = half^2 / 2. With
    E(y) = integral of it from 0, E is a power series, and its inverse solves y' = exp(a y + b y^2), y(0) = 0.
    """
    a, b = middle * half, half * half * 0.5
    e = [1.0, -a]
    for n in range(1, 24):
        e.append((-a * e[n] - 2.0 * b * e[n - 1]) / (n + 1))
    ends = []
    for sign in (-1.0, 1.0):
        total = 0.0
        for n in range(len(e) - 1, -1, -1):
            total = total * sign + e[n] / (n + 1)
        ends.append(total * sign)
    step = (ends[1] - ends[0]) * 2.0**-32
    # y'' = (a + 2 b y) y'^2, coefficient by coefficient: y = sum c_n x^n
    c = [0.0, 1.0]
    for n in range(NARROW_TERMS - 1):
        slope = [(i + 1) * c[i + 1] for i in range(n + 1)]
        square = [sum(slope[i] * slope[j - i] for i in range(j + 1)) for j in range(n + 1)]
        factor = [a + 2.0 * b * c[0]] + [2.0 * b * c[i] for i in range(1, n + 1)]
        c.append(sum(factor[i] * square[n - i] for i in range(n + 1)) / ((n + 2) * (n + 1)))
    return (fl32(step), fl32(ends[0] + step * 0.5), *(fl32(x) for x in c[2:]))
