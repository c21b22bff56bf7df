"""Fits the approximations of stream version 1 and measures the bounds that docs/stream.md states.

``python tools/fit_stream.py`` fits again and prints the constants as they stand in ``kernels/sampling/stream.py``;
``python tools/fit_stream.py --check`` measures the frozen constants, every rounding included, against float64: the
radius over every float32 that it can meet (2.8e8 of them), the other maps over dense grids. Needs numpy and scipy.

Each polynomial is a weighted minimax fit (a linear programme on a Chebyshev-spaced grid). Three tricks save
operations, since on a GPU instructions per element decide the speed:

* polynomials are *monic* wherever a scale can be absorbed further on: one multiplication less each;
* the square root is a bit trick and two tuned Newton steps. It ends in kappa * sqrt, and the low bits of its magic
  constant move kappa continuously, so kappa is chosen to cancel the scales of the logarithm before it and of the
  sine and cosine after it;
* the angle carries a scale, lam, that gives sine and cosine one common leading coefficient.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from scipy.optimize import brentq, linprog
from scipy.special import erf, log_ndtr, ndtr, ndtri

LOG_LOW = float(np.float32(0.65))  # mantissas in [0.65, 1.3): 4.7e-6 with 6 terms; [sqrt(1/2), sqrt 2) gives 6.1e-6
CENTRE_Z = 3.13  # the centre map serves bounds within 3.125 sigma: +-3 is what large models ask for
TAIL_Z = 7.32  # the tail map's largest |z|: 2^-33 of the mass beyond 3 sigma
LEAD = -63.46878433  # cos = LEAD * COS(X^2): the scale that the root carries, which fit() finds
FAR_Z = (2.99, 14.2)  # the far map: intervals that begin 3 to 12 sigma out


def minimax(basis: np.ndarray, target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients c minimising max |basis @ c - target| * weight, and that maximum."""
    a, b = basis * weight[:, None], target * weight
    scale = np.abs(a).max(0)
    a = a / scale
    slack = np.ones((len(b), 1))
    result = linprog(
        np.r_[np.zeros(a.shape[1]), 1.0],
        A_ub=np.block([[a, -slack], [-a, -slack]]),
        b_ub=np.r_[b, -b],
        bounds=[(None, None)] * a.shape[1] + [(0, None)],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    return result.x[:-1] / scale, float(result.x[-1])


def polynomial(x: np.ndarray, target: np.ndarray, weight: np.ndarray, terms: int) -> tuple[np.ndarray, float]:
    """Minimax polynomial in x as monomials, fitted in the better conditioned Chebyshev basis."""
    mid, half = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2
    c, error = minimax(np.polynomial.chebyshev.chebvander((x - mid) / half, terms - 1), target, weight)
    fitted = np.polynomial.Chebyshev(c, domain=[mid - half, mid + half])
    return fitted.convert(kind=np.polynomial.Polynomial).coef, error


def grid(low: float, high: float, points: int = 4001) -> np.ndarray:
    return low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, points))) / 2


def fit_log() -> tuple[np.ndarray, float]:
    """ln m = sum p_i (m - 1)^i, i = 1..6, on [0.65, 1.3), its error relative to the smallest -ln u it serves."""
    m = grid(LOG_LOW, 2 * LOG_LOW)
    m = m[np.abs(m - 1) > 1e-5]
    y = np.log(m)
    smallest = np.where(m < 1, -y, math.log(2) - y)  # m >= 1 occurs only for u = m / 2 or less
    return minimax(np.stack([(m - 1) ** i for i in range(1, 7)], 1), y, 1 / smallest)


def newton(magic: int) -> tuple[float, float, float, float]:
    """A, B of the two tuned steps that follow this magic constant, the kappa they end in, and the error left."""
    x = np.linspace(1, 4, 600001).astype(np.float32)  # the trick repeats itself every factor of 4
    guess = (magic - (x.view(np.int32).astype(np.int64) >> 1)).astype(np.int32).view(np.float32)
    c = x.astype(np.float64) * guess.astype(np.float64) ** 2

    def level(c: np.ndarray) -> float:
        """a for which sqrt(c) * (a - c) is equal at both ends of the range of c: the minimax choice."""
        low, high = math.sqrt(c.min()), math.sqrt(c.max())
        return brentq(lambda a: low * (a - low**2) - high * (a - high**2), high**2, 9 * high**2)

    a = level(c)
    c = c * (a - c) ** 2
    b = level(c)
    root = np.sqrt(c) * (b - c)
    kappa = (root.max() + root.min()) / 2
    return a, b, kappa, root.max() / kappa - 1


def fit_root(kappa: float) -> tuple[int, float, float, float]:
    low, high = 0x5E000000, 0x60000000  # kappa grows with the ninth power of the first guess, so with the magic
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if newton(mid)[2] < kappa else (low, mid)
    a, b, _, error = newton(low)
    return low, a, b, error


def half_space(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """2 Phi(z) - 1, -ln(4 Phi(z) (1 - Phi(z))) and -ln(1 - Phi(z)), without cancellation."""
    t = erf(z / math.sqrt(2))
    log_q = log_ndtr(-z)
    near = -np.log1p(-(np.where(z < 1, t, 0.0) ** 2))
    return t, np.where(z < 1, near, -math.log(4) - log_q - np.log1p(-np.exp(log_q))), -log_q


def fit() -> dict[str, tuple[list[float], float]]:
    """Name in kernels/sampling/stream.py -> (values before they are rounded to float32, error of the fit)."""
    p, log_error = fit_log()
    x2 = grid(0.0, (math.pi / 4) ** 2)[1:]
    x = np.sqrt(x2)
    s, sin_error = polynomial(x2, np.sin(x) / x, x / np.sin(x), 3)
    c, cos_error = polynomial(x2, np.cos(x), 1 / np.cos(x), 4)
    lam = c[3] / s[2]
    lead = c[3] / lam**6  # = s[2] / lam^5: cos = lead * COS(X^2), sin = lead * X * SIN(X^2), monic, X = lam * angle
    unit = math.sqrt(2 * -p[5])  # sqrt(-2 ln u) = unit * sqrt(L), where L = ln(u) / p[5]
    kappa = unit * -lead  # and the root gives -kappa * sqrt(L) = lead * sqrt(-2 ln u)
    magic, a, b, root_error = fit_root(kappa)

    z = CENTRE_Z * np.sin(np.linspace(0, np.pi / 2, 4001))[1:]
    t, w, _ = half_space(z)
    centre, centre_error = polynomial(w / -p[5], z / t, t / z, 8)
    z = grid(0.0, TAIL_Z)[1:]
    root = -kappa * np.sqrt(half_space(z)[1] / -p[5])
    tail, tail_error = polynomial(half_space(z)[1] / -p[5], z / root, root / z, 11)
    z = grid(*FAR_Z)
    size = half_space(z)[2] / -p[5]
    far, far_error = polynomial(-kappa / np.sqrt(size), -z / (kappa * np.sqrt(size)), kappa * np.sqrt(size) / z, 8)
    return {
        "LOG_LOW": ([LOG_LOW], 0.0),
        "LOG": (list(p[:5] / p[5]), log_error),
        "LOG_STEP": ([math.log(2) * 2.0**-23 / p[5]], 0.0),
        "ROOT_MAGIC": ([magic], 0.0),
        "ROOT_A": ([a], 0.0),
        "ROOT_B": ([b], root_error),
        "ANGLE": ([lam * math.pi / 4 * 2.0**-31], 0.0),
        "SIN": (list(s[:2] / np.array([lam, lam**3]) / lead), sin_error),
        "COS": (list(c[:3] / np.array([1, lam**2, lam**4]) / lead), cos_error),
        "CENTRE": (list(centre), centre_error),
        "TAIL": (list(tail), tail_error),
        "FAR": (list(far), far_error),
        "LEAD": ([lead], 0.0),
    }


def check() -> None:
    """Errors of the frozen constants against float64, every float32 rounding included."""
    import torch
    from initlab.kernels.sampling import stream

    first, last = (int(np.float32(x).view(np.int32)) for x in (2.0**24, 2.0**32))
    step = 1 << 22
    worst, moments = 0.0, np.zeros(3)
    for low in [*range(-(1 << 24), 0, step), *range(first, last + 1, step)]:
        if low < 0:  # words below 2^24, one by one
            v = torch.arange(low + (1 << 24), low + (1 << 24) + step).float() + 0.5
            weight = torch.ones(len(v), dtype=torch.float64)
        else:  # above, every float32 there is; an ulp's worth of words rounds to each
            v = torch.arange(low, min(low + step, last + 1), dtype=torch.int32).view(torch.float32)
            weight = torch.nextafter(v, torch.tensor(torch.inf)).double() - v.double()
        true = torch.sqrt(-2.0 * torch.log(v.double() * 2.0**-32))
        ours = stream._roots(stream._scaled_log(v, unit=32))[0].double() / LEAD
        error = torch.where(true > 0, ours / true - 1.0, ours.abs())
        worst = max(worst, float(error.abs().max()))
        for i, power in enumerate((0, 2, 4)):
            moments[i] += float((weight * (ours**power - true**power)).sum() if power else weight.sum())
    print(f"radius: relative error {worst:.2e}; E r^2 off by {moments[1] / moments[0] / 2:.1e} of itself, "
          f"E r^4 by {moments[2] / moments[0] / 8:.1e}")  # fmt: skip

    b = torch.arange(0, 1 << 32, 509)
    angle = np.where(b & 1 == 1, np.pi / 2, 0.0) + np.where(b & 1 == 1, -1.0, 1.0) * (
        stream._as_signed((b << 1) & 0xFFFFFFFF).double().numpy() / 2.0**31 * np.pi / 4
    )
    angle = angle + np.where(b >> 31 == 1, np.pi, 0.0)
    a = torch.full_like(b, 0x12345678)
    radius = math.sqrt(-2.0 * math.log((float(np.float32(0x12345678)) + 0.5) * 2.0**-32))
    expected = {"cosine": np.cos(angle), "sine": np.sin(angle)}
    for (name, true), ours in zip(expected.items(), stream._box_muller(a, b), strict=True):
        known = np.abs(true) > 1e-12  # nearer to a zero float64 does not know it either
        error = (ours.double().numpy() / radius)[known] / true[known] - 1.0
        print(f"{name} times one radius: relative error {np.abs(error).max():.2e}")

    w = torch.from_numpy(np.r_[np.arange(2000), np.linspace(0, 2.0**32 - 1, 4_000_001).astype(np.int64)])
    u = (w.double().numpy() + 0.5) * 2.0**-32
    deviates = {"CentreMap": stream._centre_z, "TailMap": stream._tail_z, "FarMap": stream._far_z}
    for low, high in (-2, 2), (-3, 3), (-math.inf, math.inf), (-1, 8), (0, math.inf), (2.9, math.inf), (1, 1.6), (
        2.5, 2.75), (3, math.inf), (5, 7), (11, 12), (12, math.inf), (-0.24, 0.24), (2, 2.2), (12, 12.04):  # fmt: skip
        m = stream.truncated_normal_map(0.0, 1.0, low, high, torch.float32)
        if isinstance(m, stream.NarrowMap):
            z = (stream._narrow_y(m, w) * m.half + m.half + m.low).double().numpy()
        else:
            z = deviates[type(m).__name__](m, w).double().numpy()
        q = ndtr(-high) + (1.0 - u) * (ndtr(-low) - ndtr(-high))
        p = ndtr(low) + u * (ndtr(high) - ndtr(low))
        true = np.where(q < 0.5, -ndtri(q), ndtri(p))
        error = np.abs(z - true)
        mass = ndtr(-low) - ndtr(-high)
        shift = (error * np.exp(-true * true / 2) / math.sqrt(2 * math.pi) / mass).max()
        clamped = ((z < np.float32(low)) | (z > np.float32(high)))[2000:].mean()
        print(f"{type(m).__name__:9s} [{low}, {high}]: |z| <= {np.abs(z).max():.4g}, error {error.max():.1e}, "
              f"cdf moved by at most {shift:.1e}, clamped {clamped:.1e}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="measure the frozen constants instead of fitting")
    if parser.parse_args().check:
        check()
    else:
        for name, (values, error) in fit().items():
            text = [hex(v) if name == "ROOT_MAGIC" else repr(float(np.float32(v))) for v in values]
            shown = text[0] if len(text) == 1 else "(" + ", ".join(text) + ")"
            print(f"{name} = {shown}" + (f"  # fit: {error:.2g}" if error else ""))
