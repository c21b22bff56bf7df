"""The stream against what others published: Random123's vectors, float64 closed forms, hashlib, torch's generators."""

import hashlib
import itertools
import math
import re
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from initlab.kernels import Constant, Draw, Normal, Region, TruncatedNormal, Uniform, fill_, generator_key, named_key
from initlab.kernels.sampling import stream
from scipy.special import ndtr, ndtri
from torch import tensor

DOCS = Path(__file__).resolve().parents[2] / "docs"
MASK = 0xFFFFFFFF
TOP = 2**32 - 1
INF = math.inf
KEY = 0xA4093822299F31D0


# ---------------------------------------------------------------------------------------------------------------
# Words

# Random123's kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
BLOCKS = [0, 1, 2**29, 2**30 - 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33 - 1, 2**61 - 1, *(np.arange(50) * 3**33)]
KEYS = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, KEY]


def philox(counter, key):
    """The paper's figure, in plain integers."""
    c, k = list(counter), [key & MASK, key >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & MASK, (p >> 32) ^ c[3] ^ k[1], p & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def words_of(block, key):
    return philox((block & MASK, block >> 32, 0, 0), key)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    counter, (k0, k1), answer = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert philox(counter, k0 | k1 << 32) == answer
    ours = stream.philox4x32(tuple(tensor([word]) for word in counter), k0 | k1 << 32)
    assert [int(word) for word in ours] == answer


@pytest.mark.parametrize("key", KEYS)
def test_words_of_a_block(key):
    expected = [words_of(int(block), key) for block in BLOCKS]
    assert torch.stack(stream.block_words(key, tensor(BLOCKS)), -1).tolist() == expected


def test_numba_philox():
    numba_backend = pytest.importorskip("initlab.kernels.sampling._numba", exc_type=ImportError)
    zero, *_ = KNOWN_ANSWERS  # the only vector whose counter has no more than 64 bits
    assert " ".join(f"{word:08x}" for word in numba_backend._philox(*(np.uint64([0, 0, 0])))) == zero[2]
    for key in KEYS:
        for block in BLOCKS:
            words = numba_backend._philox(np.uint64(block), np.uint64(key & MASK), np.uint64(key >> 32))
            assert list(words) == words_of(int(block), key)


@pytest.mark.parametrize("start", [0, 5, 2**31 - 3, 2**34 - 6, 2**62 - 7])
def test_element_takes_word_mod_4_of_block_div_4(backend, start):
    """k = word >> 8 of a uniform on [0, 1) in float64 is the value itself, in units of 2^-24."""
    x = torch.empty(23, dtype=torch.float64)
    fill_([Draw(x, Uniform(), KEY, Region((2**62 + 100,), (start,), (23,)))])
    expected = [words_of(i // 4, KEY)[i % 4] >> 8 for i in range(start, start + 23)]
    assert (x * 2**24).tolist() == expected


# ---------------------------------------------------------------------------------------------------------------
# Constants


def test_constants_are_float32_and_the_documents():
    text = (DOCS / "stream.md").read_text().split("Constants")[-1]
    rows = {match[1]: match[2] for match in re.finditer(r"^\| ([A-Z_]+)[^|]* \| ([^|]+) \|$", text, re.MULTILINE)}
    names = {"LOG_LOW", "LOG", "LOG_STEP", "ROOT_A", "ROOT_B", "ANGLE", "SIN", "COS", "CENTRE", "TAIL", "FAR"}
    assert int(rows.pop("ROOT_MAGIC").split()[0], 16) == stream.ROOT_MAGIC
    assert rows.keys() == names
    for name, row in rows.items():
        values = getattr(stream, name)
        values = values if isinstance(values, tuple) else (values,)
        assert tuple(float(word) for word in row.split(",")) == values
        assert all(stream.fl32(value) == value for value in values)


# ---------------------------------------------------------------------------------------------------------------
# Maps against float64


def some_words(*places, near=2000, n=200_000):
    """Both ends, the neighbourhoods of `places`, and n others."""
    places = [*places, 0, 2**24, 2**31, TOP]
    near_them = torch.cat([torch.arange(max(0, at - near), min(TOP, at + near) + 1) for at in places])
    others = torch.randint(0, 2**32, (n,), generator=torch.Generator().manual_seed(0))
    return torch.cat([near_them, others]).unique()


def test_uniform_is_fl32_of_product_and_sum(monkeypatch):
    words = some_words(n=30_000)
    words = words[: len(words) // 4 * 4].view(-1, 4)
    monkeypatch.setattr(stream, "block_words", lambda key, blocks: words.unbind(1))
    k = (words >> 8).numpy()
    for low, high in [(0.0, 1.0), (-0.3, 0.7), (1e-3, 1e30), (-5.0, -4.999)]:
        scale = np.float32((high - low) * 2.0**-24)
        top = np.nextafter(np.float32(high), np.float32(-INF))
        expected = np.minimum(k.astype(np.float32) * scale + np.float32(low), top)
        m = stream.uniform_map(low, high, torch.float32)
        assert np.array_equal(stream.block_values(m, 0, None, torch.float32).numpy(), expected)
        m = stream.uniform_map(low, high, torch.float64)
        expected = np.minimum(k * ((high - low) * 2.0**-24) + low, np.nextafter(high, -INF))
        assert np.array_equal(stream.block_values(m, 0, None, torch.float64).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_top_of_a_uniform_is_torchs_next_number_below_high(dtype):
    bounds = [0.0, 1.0, 1.0 + 2.0**-8, 0.1, 65504.0, 6e-8, 2.9e-8, 1e-10, 2.0**-14, 1e-40, 3.3e4, 1.0 + 2.0**-30]
    bounds += torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64).exp().tolist()
    for low, high in itertools.combinations(sorted([*bounds, *(-x for x in bounds)]), 2):
        first, end = torch.tensor([low, high]).float().to(dtype)
        top = torch.nextafter(end, torch.full_like(end, -INF)) if end > first else first
        assert stream.uniform_map(low, high, dtype).top == float(top), (low, high)


def test_box_muller():
    """Within 1e-5 of r cos and r sin of v = fl32(a) + 1/2, relatively; docs/stream.md states 5.7e-6."""
    a = some_words()
    b = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(1))]
    r = torch.sqrt(-2.0 * torch.log((a.float() + 0.5).double() * 2.0**-32))
    turned = 2 * b % 2**32
    phi = torch.where(turned >= 2**31, turned - 2**32, turned).double() * (math.pi / 4 / 2**31)
    # Reflected about pi/4 where b is odd, which swaps sine and cosine; turned by pi where its top bit is set.
    sine, cosine = (torch.where(b >= 2**31, -r, r) * part for part in (phi.sin(), phi.cos()))
    odd = b % 2 == 1
    expected = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    for ours, true in zip(stream._box_muller(a, b), expected, strict=True):
        assert torch.all((ours.double() - true).abs() <= 1e-5 * true.abs())
        assert ours.abs().max() < 6.8  # sqrt(2 ln 2^33) = 6.764


def test_box_muller_goes_round_the_circle_once():
    """2^20 angles, one of each block of 4096 words, even and odd: every one of 1024 sectors gets its share."""
    b = torch.arange(0, 2**32, 4096) + torch.arange(2**20) % 2
    cosine, sine = stream._box_muller(torch.zeros_like(b), b)
    sector = torch.atan2(sine, cosine).add(math.pi).mul(1024 / (2 * math.pi)).floor().long().clamp(0, 1023)
    counts = sector.bincount(minlength=1024)
    assert (counts - 1024).abs().max() <= 4  # angles on a sector's edge fall on either side


INTERVALS = [  # of z; their mirror images are tested too
    ("CentreMap", [(-2.0, 2.0), (-3.0, 3.0), (-3.125, 3.125), (-1.0, 0.5), (0.0, 3.0), (1.0, 1.6), (2.5, 2.75)]),
    ("TailMap", [(-100.0, 100.0), (-INF, INF), (-2.0, 5.0), (-1.0, 8.0), (0.0, INF), (2.9, INF), (2.0, 4.0)]),
    ("TailMap", [(-3.126, 3.126), (-0.2, 3.2), (-12.0, 12.0), (-INF, 1.0)]),
    ("FarMap", [(3.0, INF), (3.0, 3.2), (5.0, INF), (5.0, 7.0), (11.0, 12.0), (12.0, INF), (12.0, 100.0)]),
    ("NarrowMap", [(-0.24, 0.24), (2.0, 2.2), (2.0, 2.0001), (12.0, 12.04), (0.0, 1e-6), (3.0, 3.0 + 2e-5)]),
]


MIRRORED = [
    (kind, bounds) for kind, pairs in INTERVALS for a, b in pairs for bounds in dict.fromkeys([(a, b), (-b, -a)])
]


def tolerance(kind, low, high, true):
    """Of z. Docs/stream.md's measured bounds, rounded up."""
    if kind == "NarrowMap":  # a polynomial, 3e-7 of the width, and the rounding of two sums, half an ulp each
        return 3e-7 * (high - low) + 2.0**-23 * max(abs(low), abs(high))
    # The other maps' errors are relative (a float32 polynomial after the logarithm's 4.7e-6, which far halves more
    # than once), except where z crosses zero: there they are those of p, some 2^-24.
    return (2e-6 if kind == "FarMap" else 7e-6) * np.maximum(np.abs(true), 1.0)


@pytest.mark.parametrize(("kind", "bounds"), MIRRORED)
def test_truncated_normal_inverts_the_cdf(kind, bounds):
    low, high = bounds
    m = stream.truncated_normal_map(0.0, 1.0, low, high, torch.float32)
    assert type(m).__name__ == kind
    words = some_words(m.split ^ m.flip) if kind == "TailMap" else some_words()
    ours = deviates(m, words)

    u = (words.double().numpy() + 0.5) * 2.0**-32
    below, above = ndtr(low) + u * (ndtr(high) - ndtr(low)), ndtr(-high) + (1 - u) * (ndtr(-low) - ndtr(-high))
    true = np.where(above < 0.5, -ndtri(above), ndtri(below))
    assert np.all(np.abs(ours - true) <= tolerance(kind, low, high, true))

    assert np.all(np.diff(ours) >= -2e-6)  # it rises with the word, but for the last bits (1e-6 is an ulp at 12)
    evenly = deviates(m, torch.arange(10_000, 2**32, 20_021))
    outside = np.maximum(np.float32(low) - evenly, evenly - np.float32(high))
    # docs/stream.md: a clamp touches fewer than 3e-5, but for an ulp in an interval that is only hundreds wide.
    assert np.mean(outside > (2.0**-22 if kind == "NarrowMap" else 0.0)) < 3e-5


def deviates(m, words):
    if isinstance(m, stream.NarrowMap):
        return (stream._narrow_y(m, words) * m.half + m.half + m.low).double().numpy()
    of = {"CentreMap": stream._centre_z, "TailMap": stream._tail_z, "FarMap": stream._far_z}
    return of[type(m).__name__](m, words).double().numpy()


@pytest.mark.parametrize("bound", [8.0, 100.0, INF])
def test_far_bounds_never_reach_a_probability_of_0_or_1(bound):
    """The ends are the quantiles of half a word, 2^-33: fp32(word) * 2^-32 would have given 1, so +-100 sigma."""
    m = stream.truncated_normal_map(0.0, 1.0, -bound, bound, torch.float32)
    z = deviates(m, torch.cat([torch.arange(100_000), torch.arange(2**32 - 100_000, 2**32)]))
    assert np.abs(z).max() < 6.8
    assert z[0] == pytest.approx(ndtri(2.0**-33), rel=7e-6)  # as in tolerance()
    assert z[-1] == -z[0]


def test_a_distribution_in_units_of_sigma_is_the_same_distribution():
    """alpha and beta alone choose the map and its shape: mean and std only stretch it."""
    for _, (low, high) in MIRRORED:
        one = stream.truncated_normal_map(0.0, 1.0, low, high, torch.float64)
        other = stream.truncated_normal_map(-8.0, 4.0, 4 * low - 8, 4 * high - 8, torch.float64)
        assert type(one) is type(other)
        words = some_words(n=1000, near=5)
        if isinstance(one, stream.NarrowMap):
            # alpha and beta of the second are those of the first but for two roundings of some 2^-50.
            assert np.allclose(stream._narrow_y(one, words), stream._narrow_y(other, words), rtol=0, atol=1e-6)
        else:
            assert np.allclose(deviates(one, words), deviates(other, words), rtol=2e-6, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------
# What the host works out


def test_host_functions_against_mpmath():
    """1e-12: 150 levels of a fraction and 40 terms of a series, each good to 2^-53."""
    with mpmath.workdps(40):
        for i in range(1, 1481):
            x = i / 40  # to 37 sigma: below 2.2e-308 doubles lose their precision
            upper, half = (mpmath.mpf(v) / 2 for v in (mpmath.erfc(x / mpmath.sqrt(2)), mpmath.erf(x / mpmath.sqrt(2))))
            assert abs(stream._upper_tail(x) / upper - 1) < 1e-12
            assert abs(stream._half_mass(x) / half - 1) < 1e-12
            assert stream._half_mass(-x) == -stream._half_mass(x)
    assert (stream._upper_tail(0.0), stream._half_mass(0.0)) == (0.5, 0.0)
    assert (stream._upper_tail(INF), stream._half_mass(INF), stream._half_mass(-INF)) == (0.0, 0.5, -0.5)


# ---------------------------------------------------------------------------------------------------------------
# Keys


def blake2b(message):
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"initlab.stream.1").digest(), "little")


@pytest.mark.parametrize(
    ("seed", "name", "frozen"),
    [
        (0, "", "04396598d348bbca"),
        (0, "transformer.wte.weight", "953ff8ca7c069734"),
        (1, "transformer.wte.weight", "0c85ce8d25b9c90b"),
        (-1, "w", "13a95d3f49086c5b"),
        (2**64 - 1, "w", "13a95d3f49086c5b"),
        (2**63, "é.重み", "017e891566315830"),
    ],
)
def test_named_key(seed, name, frozen):
    key = named_key(seed, name)
    assert key == blake2b((seed % 2**64).to_bytes(8, "little") + name.encode("utf-8"))
    assert f"{key:016x}" == frozen


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_named_key_refuses_a_seed_of_more_than_64_bits(seed):
    with pytest.raises(ValueError, match=rf"seed is {seed}; .* -2\*\*63 <= seed < 2\*\*64"):
        named_key(seed, "w")


@pytest.mark.parametrize(
    "seed", [np.int64(-3), np.uint8(7), torch.tensor(5), torch.tensor([5], dtype=torch.int8)], ids=repr
)
def test_named_key_takes_every_kind_of_integer(seed):
    assert named_key(seed, "a") == named_key(int(seed), "a")


@pytest.mark.parametrize(
    "seed",
    [1.5, 1.0, None, "0", b"0", True, np.float64(1.0), np.bool_(True), torch.tensor(1.0), torch.tensor(True)],
    ids=repr,
)
def test_named_key_refuses_a_seed_that_is_no_integer(seed):
    message = f"seed is {seed!r}, a {type(seed).__name__}; it must be an integer: pass an int, such as 0"
    with pytest.raises(TypeError, match=re.escape(message)):
        named_key(seed, "a")


@pytest.mark.parametrize("seed", [np.uint64(2**64 - 1), np.int64(-(2**63))], ids=repr)
def test_named_key_takes_numpys_extremes(seed):
    assert named_key(seed, "a") == named_key(int(seed), "a")


@pytest.mark.parametrize("name", [None, b"a", 3, ("a",)], ids=repr)
def test_named_key_refuses_a_name_that_is_no_text(name):
    with pytest.raises(TypeError, match=re.escape(f"name is {name!r}, a {type(name).__name__}; it must be a str")):
        named_key(0, name)


@pytest.mark.parametrize("generator", [0, "cpu", torch.Generator, np.random.default_rng(0)], ids=type)
def test_generator_key_refuses_what_is_no_generator(generator):
    with pytest.raises(TypeError, match=r"generator is .*; it must be a torch\.Generator or None: .*manual_seed"):
        generator_key(generator)


def test_generator_key_draws_one_int64():
    ours, by_hand = (torch.Generator().manual_seed(7) for _ in range(2))
    for _ in range(3):
        drawn = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=by_hand))
        assert generator_key(ours) == drawn % 2**64
        assert torch.equal(ours.get_state(), by_hand.get_state())
    # Both halves vary; three draws share a half once in 10^9.
    keys = [generator_key(ours) for _ in range(3)]
    assert len({key >> 32 for key in keys}) == len({key & MASK for key in keys}) == 3


def test_generator_key_uses_the_default_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        keys = [generator_key(), generator_key(None)]
    generator = torch.Generator().manual_seed(7)
    assert keys == [generator_key(generator), generator_key(generator)]


def test_generator_key_in_the_context_of_another_device():
    expected = generator_key(torch.Generator().manual_seed(7))
    with torch.device("meta"):
        assert generator_key(torch.Generator().manual_seed(7)) == expected


class OtherDevice(torch.Generator):
    """Stands in for a CUDA generator."""

    device = torch.device("cuda", 0)

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, seed, offset):
        self.seed, self.offset = seed, offset

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


def test_generator_key_of_another_device_hashes_seed_and_offset():
    generator = OtherDevice(-3, 8)
    for offset in (8, 12):
        message = b"generator" + (2**64 - 3).to_bytes(8, "little") + offset.to_bytes(8, "little")
        assert generator_key(generator) == blake2b(message)
        assert generator.offset == offset + 4


def test_generator_without_an_offset():
    class NoOffset(OtherDevice):
        def get_offset(self):
            raise RuntimeError("no offset")

    with pytest.raises(NotImplementedError, match=r"cuda:0 has no offset .* pass a CPU generator"):
        generator_key(NoOffset(0, 0))


def test_fill_takes_nothing_from_the_generator():
    """Keys are drawn by the caller: neither a Constant nor a draw with a key touches torch's generator."""
    state = torch.random.get_rng_state()
    fill_(
        [
            Draw(torch.empty(5), distribution, 3)
            for distribution in (Constant(1.0), Uniform(), Normal(), TruncatedNormal())
        ]
    )
    assert torch.equal(torch.random.get_rng_state(), state)
