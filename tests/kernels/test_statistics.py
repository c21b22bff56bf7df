"""Distributions against scipy's closed forms: moments, Kolmogorov-Smirnov, Anderson-Darling, tails, correlations.

The default run takes 3 x 10^6 draws of each distribution, ``-m exhaustive`` 10^9. This file, run as a script,
measures 10^9 and writes docs/statistics.md and its plot (needs matplotlib).
"""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from initlab.kernels import Draw, Normal, Region, TruncatedNormal, Uniform, fill_, named_key
from scipy import integrate, special, stats

DISTRIBUTIONS = {
    "uniform": Uniform(0.0, 1.0),
    "normal": Normal(0.0, 1.0),
    "truncated at 2 sigma": TruncatedNormal(0.0, 1.0, -2.0, 2.0),
    "truncated at 100 sigma": TruncatedNormal(0.0, 1.0, -100.0, 100.0),
}
BINS = 1 << 24  # of u = F(x): a uniform's own resolution
CHUNK = 1 << 23
LAGS = (1, 2, 3, 4, 5, 8, 64, 4096)
# What a sound stream exceeds once in about 10^6 runs. The seeds are fixed, so nothing here is flaky.
SCORE = 5.0  # standard errors
KS = 2.7  # sqrt(n) D
AD = 12.0  # A^2


def cdf(distribution, x):
    if isinstance(distribution, Uniform):
        return (x - distribution.low) / (distribution.high - distribution.low)
    if isinstance(distribution, Normal):
        return special.ndtr((x - distribution.mean) / distribution.std)
    low, high = (
        special.ndtr((distribution.low - distribution.mean) / distribution.std),
        special.ndtr((distribution.high - distribution.mean) / distribution.std),
    )
    return (special.ndtr((x - distribution.mean) / distribution.std) - low) / (high - low)


def moment(distribution, k):
    if isinstance(distribution, Uniform):
        return (distribution.high ** (k + 1) - distribution.low ** (k + 1)) / (
            (k + 1) * (distribution.high - distribution.low)
        )
    low, high = (
        (-40.0, 40.0)
        if isinstance(distribution, Normal)
        else (max(distribution.low, -40.0), min(distribution.high, 40.0))
    )
    mass = special.ndtr(high) - special.ndtr(low)
    density = lambda x: x**k * math.exp(-x * x / 2) / math.sqrt(2 * math.pi) / mass  # noqa: E731
    return integrate.quad(density, low, high, epsabs=1e-13, limit=500, points=[0.0])[0]


def chunks(distribution, key, n):
    """The first n elements of the stream under a key, as float32, CHUNK at a time."""
    for start in range(0, n, CHUNK):
        x = torch.empty(min(CHUNK, n - start))
        fill_([Draw(x, distribution, key, Region((n,), (start,), (len(x),)))])
        yield x


def anderson_darling(counts):
    """A^2 of a sample given as counts in equal bins of u, every draw at its bin's centre: u + 2^-25."""
    n = int(counts.sum())
    ends = np.cumsum(counts).astype(np.longdouble)
    starts = ends - counts
    u = (np.arange(len(counts), dtype=np.longdouble) + 0.5) / len(counts)
    below = (ends - starts) * (ends + starts) * np.log(u)
    above = (ends - starts) * (2 * n - ends - starts) * np.log1p(-u)
    return float(-n - (below.sum() + above.sum()) / n)


def poisson_score(count, expected):
    """The normal score of a count's tail probability: a standard error where the expectation is large."""
    low, high = stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected)
    return float(stats.norm.isf(high)) if high < low else float(-stats.norm.isf(low))


def measure(name, n):
    """Scores of n draws: how far each statistic is from its closed form, in standard errors or as its own statistic.

    Each distribution has a key of its own: under one key all are functions of the same uniforms, and agree in their
    deviations.
    """
    distribution, key = DISTRIBUTIONS[name], named_key(0, f"statistics {name}")
    counts = np.zeros(BINS, np.int64)
    powers, lagged, squared = np.zeros(4), dict.fromkeys(LAGS, 0.0), dict.fromkeys(LAGS, 0.0)
    others = {"next key": key + 1, "top bit": key ^ (1 << 63), "another name": named_key(0, "statistics.1")}
    crossed = dict.fromkeys(others, 0.0)
    tails = dict.fromkeys((3.0, 4.0, 5.0, 6.0), 0)
    mean, variance = moment(distribution, 1), moment(distribution, 2) - moment(distribution, 1) ** 2
    second = moment(distribution, 2)
    spread = moment(distribution, 4) - second**2
    largest = 0.0
    for chunk, *rest in zip(
        chunks(distribution, key, n), *(chunks(distribution, k, n) for k in others.values()), strict=True
    ):
        x = chunk.double()
        u = torch.from_numpy(cdf(distribution, x.numpy()))
        counts += torch.bincount((u * BINS).long().clamp_(0, BINS - 1), minlength=BINS).numpy()
        for k in range(4):
            powers[k] += float((x ** (k + 1)).sum())
        centred, square = x - mean, x * x - second
        for lag in LAGS:
            lagged[lag] += float(centred[lag:] @ centred[:-lag])
            squared[lag] += float(square[lag:] @ square[:-lag])
        for name, other in zip(others, rest, strict=True):
            crossed[name] += float(centred @ (other.double() - mean))
        size = x.abs()
        largest = max(largest, float(size.max()))
        for t in tails:
            tails[t] += int((size > t).sum())

    edges = np.arange(1, BINS + 1) / BINS
    result = {"largest": largest, "KS": math.sqrt(n) * float(np.abs(np.cumsum(counts) / n - edges).max())}
    result["AD"] = anderson_darling(counts)
    for k in range(1, 5):
        error = math.sqrt((moment(distribution, 2 * k) - moment(distribution, k) ** 2) / n)
        result[f"moment {k}"] = (powers[k - 1] / n - moment(distribution, k)) / error
    for lag in LAGS:
        result[f"lag {lag}"] = lagged[lag] / variance / math.sqrt(n)
        result[f"squares, lag {lag}"] = squared[lag] / spread / math.sqrt(n)
    for name, value in crossed.items():
        result[f"against {name}"] = value / variance / math.sqrt(n)
    for t, count in tails.items():
        expected = n * 2 * special.ndtr(-t)
        if (
            not isinstance(distribution, Uniform)
            and not (isinstance(distribution, TruncatedNormal) and distribution.high < t)
            and expected > 1
        ):
            result[f"beyond {t:g} sigma"] = poisson_score(count, expected)
    return result, counts


def check(result):
    bad = {
        name: value
        for name, value in result.items()
        if name != "largest" and not abs(value) < {"KS": KS, "AD": AD}.get(name, SCORE)
    }
    assert not bad, bad
    assert result["largest"] < 6.8


@pytest.mark.long_if.with_args(lambda name: name not in ("uniform", "truncated at 2 sigma"))
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_statistics(name):
    check(measure(name, 3 * 10**6)[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_statistics_of_10_to_9(name):
    check(measure(name, 10**9)[0])


def test_a_shift_of_one_in_a_thousand_is_seen():
    with pytest.raises(AssertionError, match="moment 1"):
        check(measure_shifted(10**8 // 4))


def measure_shifted(n):
    key, total = named_key(0, "statistics"), 0.0
    for x in chunks(Normal(0.0, 1.0), key, n):
        total += float((x.double() + 1.1e-3).sum())
    return {"largest": 0.0, "moment 1": total / math.sqrt(n)}


HARD = [  # (low, high), of a standard normal
    (-2.0, 2.0), (-3.0, 3.0), (2.0, 2.0001), (5.0, math.inf), (11.0, 12.0), (-12.0, -11.0), (-1.0, 8.0),
    (2.9, math.inf), (1.0, 1.5), (-math.inf, -3.2), (0.0, math.inf), (12.0, math.inf),
]  # fmt: skip


@pytest.mark.parametrize(("low", "high"), HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_truncated_normal_follows_its_distribution(low, high, dtype):
    n = 10**6
    x = torch.empty(n, dtype=dtype)
    fill_([Draw(x, TruncatedNormal(0.0, 1.0, low, high), named_key(1, "hard"))])
    x = x.double().numpy()
    bottom, top = (float(torch.tensor(b, dtype=dtype)) for b in (low, high))
    assert bottom <= x.min() <= x.max() <= top
    # By the survival function of the mirrored distribution: it keeps its digits in the tail.
    sign, a, b = (1.0, low, high) if low + high >= 0 or math.isnan(low + high) else (-1.0, -high, -low)
    q = lambda y: np.exp(special.log_ndtr(-y) - special.log_ndtr(-a))  # noqa: E731

    def above(y):
        return (q(y) - q(b)) / (1.0 - q(b))

    values, counts = np.unique(sign * x, return_counts=True)
    # A dtype's values are what rounds to them: the distribution is compared at the midpoints between neighbours.
    edges = (values[1:] + values[:-1]) / 2
    empirical = 1.0 - np.cumsum(counts)[:-1] / n
    distance = np.abs(empirical - above(edges)).max() if len(edges) else 0.0
    assert math.sqrt(n) * distance < KS


def report(n, folder):
    import matplotlib.pyplot as plt

    lines = ["| statistic | " + " | ".join(DISTRIBUTIONS) + " | bound |", "|---|" + "---|" * (len(DISTRIBUTIONS) + 1)]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), constrained_layout=True)
    results = {}
    for axis, name in zip(axes.flat, DISTRIBUTIONS, strict=True):
        results[name], counts = measure(name, n)
        print(name, results[name], flush=True)
        coarse = counts.reshape(256, -1).sum(1)
        axis.bar(np.arange(256), (coarse - n / 256) / math.sqrt(n / 256), width=1.0)
        axis.axhline(3, lw=0.5), axis.axhline(-3, lw=0.5)
        axis.set(title=name, xlabel="256 equal bins of F(x)", ylabel="count, standard errors", ylim=(-5, 5))
        check(results[name])
    names = dict.fromkeys(itertools.chain.from_iterable(results.values()))
    for statistic in names:
        bound = {"largest": "6.8", "KS": f"{KS}", "AD": f"{AD:g}"}.get(statistic, f"±{SCORE:g}")
        cells = [f"{r[statistic]:.3f}" if statistic in r else "" for r in results.values()]
        lines.append(f"| {statistic} | " + " | ".join(cells) + f" | {bound} |")
    figure.savefig(folder / "statistics.png", dpi=90)
    return "\n".join(lines)


if __name__ == "__main__":
    docs = Path(__file__).resolve().parents[2] / "docs"
    draws = int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**9
    table = report(draws, docs)
    page = docs / "statistics.md"
    head = page.read_text().split("\n| statistic")[0] if page.exists() else "# Statistics of the stream\n"
    page.write_text(head + "\n" + table + "\n")
