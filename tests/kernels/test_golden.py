"""Version 1 of the stream: every backend is held to tests/golden/stream_v1.json.

`PYTHONPATH=. python tests/kernels/test_golden.py --write` writes that file anew, with the reference in plain torch. The
version is frozen: a file that differs is another version, see docs/stream.md.
"""

import functools
import hashlib
import json
import re
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from initlab.kernels import STREAM_VERSION, Draw, Normal, Region, TruncatedNormal, Uniform, backends, fill_, named_key
from initlab.kernels.sampling import stream
from initlab.kernels.sampling._maps import map_of

FILE = Path(__file__).resolve().parents[1] / "golden" / f"stream_v{STREAM_VERSION}.json"
INF = float("inf")
DISTRIBUTIONS = {
    "uniform": Uniform(-0.3, 0.7),
    "normal": Normal(0.0, 0.02),
    "normal with mean": Normal(1.0, 0.3),
    "centre": TruncatedNormal(0.0, 0.02, -0.04, 0.04),
    "centre with mean": TruncatedNormal(0.1, 1.5, -2.0, 3.0),
    "tail": TruncatedNormal(0.0, 0.02, -2.0, 2.0),
    "tail, upper longer": TruncatedNormal(0.3, 1.1, -1.0, 8.0),
    "tail, lower longer": TruncatedNormal(0.3, 1.1, -8.0, 1.0),
    "far, upper": TruncatedNormal(0.0, 0.7, 3.5, INF),
    "far, lower": TruncatedNormal(1.0, 0.3, -2.6, -2.3),
    "narrow": TruncatedNormal(0.0, 1.1, 2.2, 2.3),
    "uniform, a span that rounds": Uniform(-0.1, 0.3),
    "uniform, narrower than float32": Uniform(1.0, 1.00000001),
    "centre, at its edge": TruncatedNormal(0.0, 1.0, -3.1, 3.125),
    "far, at its edge": TruncatedNormal(0.0, 1.0, 3.0, 4.0),
    "tail, half a line": TruncatedNormal(0.0, 1.0, 0.5, INF),
    "tail, the whole line": TruncatedNormal(0.0, 1.0, -INF, INF),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
COMPLEX = {"complex64": torch.complex64, "complex128": torch.complex128}
CASES = [(distribution, dtype) for distribution in DISTRIBUTIONS for dtype in DTYPES]
CASES += [(distribution, dtype) for distribution in ("uniform", "normal with mean") for dtype in COMPLEX]
REGIONS = {
    "whole": Region((10_007,), (0,), (10_007,)),
    "block": Region((311, 127), (13, 7), (63, 65)),
    "2**31 - 3": Region((2**40,), (2**31 - 3,), (1025,)),
    "2**32 - 5": Region((2**40,), (2**32 - 5,), (1025,)),
    "2**34 - 6": Region((2**40,), (2**34 - 6,), (1025,)),
}
NAMES = [
    (0, ""),
    (0, "weight"),
    (1, "weight"),
    (-1, "weight"),
    (2**64 - 1, "weight"),
    (0, "layers.0.mlp.up_proj.weight"),
]


def key_of(distribution):
    return named_key(0, f"golden.{distribution}")


def digest(x):
    """Of the elements' bytes, little end first, a complex number's real part before its imaginary one."""
    raw = (
        (torch.view_as_real(x) if x.is_complex() else x)
        .contiguous()
        .view(torch.uint8)
        .view(-1, x.dtype.to_real().itemsize)
    )
    if sys.byteorder == "big":
        raw = raw.flip(-1)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def first(x, n=8):
    """The bit patterns of the first n elements, as hexadecimal numbers."""
    x = (torch.view_as_real(x).flatten() if x.is_complex() else x)[:n]
    width = x.dtype.itemsize
    pattern = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[width]).tolist()
    return " ".join(f"{number & (1 << 8 * width) - 1:0{2 * width}x}" for number in pattern)


def measured(distribution, dtype):
    """What the file holds of a distribution in a dtype."""
    entry = {"first": None}
    for name, region in REGIONS.items():
        x = torch.empty(region.sizes, dtype=(DTYPES | COMPLEX)[dtype])
        fill_([Draw(x, DISTRIBUTIONS[distribution], key_of(distribution), None if name == "whole" else region)])
        entry[name] = digest(x)
        if name == "whole":
            entry["first"] = first(x)
    return entry


def document():
    return {
        "version": STREAM_VERSION,
        "about": "first: bit patterns of the first 8 real numbers; the others: SHA-256 of a region's little-endian "
        "bytes. Keys are hexadecimal. Regions count a tensor's own elements, row-major: a complex number is one",
        "keys: seed, name, key": [[seed, name, f"{named_key(seed, name):016x}"] for seed, name in NAMES],
        "regions: shape, offsets, sizes": {name: [*map(list, astuple(region))] for name, region in REGIONS.items()},
        "laws": {  # the file keeps the words of its day
            name: {
                "law": repr(distribution),
                "key": f"{key_of(name):016x}",
                "values": {
                    dtype: measured(name, dtype) for distribution_name, dtype in CASES if distribution_name == name
                },
            }
            for name, distribution in DISTRIBUTIONS.items()
        },
    }


@functools.cache
def golden():
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_distributions_meet_every_map():
    maps = [map_of(distribution, torch.float32) for distribution in DISTRIBUTIONS.values()]
    assert {type(m) for m in maps} == set(stream.Map.__args__)
    flips = {type(m).__name__: {n.flip for n in maps if type(n) is type(m)} for m in maps if hasattr(m, "flip")}
    assert flips == {"TailMap": {0, 2**32 - 1}, "FarMap": {0, 2**32 - 1}}


@pytest.mark.long
def test_the_file_tells_what_it_holds():
    """Everything but the values, which the tests below compare: a distribution or region changed here only is seen."""

    def plain(document):
        for distribution in document["laws"].values():
            distribution["values"] = {dtype: sorted(entry) for dtype, entry in distribution["values"].items()}
        return document

    ours = json.loads(json.dumps(document()))
    assert plain(ours) == plain(json.loads(FILE.read_text(encoding="utf-8")))


MAPS = ("uniform", "normal with mean", "centre", "tail", "far, upper", "narrow")  # one distribution for each map


@pytest.mark.long_if.with_args(
    lambda backend, distribution, dtype: backend == "triton" and (distribution not in MAPS or dtype != "float32")
)
@pytest.mark.parametrize("backend", ["torch", "numba", "triton"], indirect=True)
@pytest.mark.parametrize(("distribution", "dtype"), CASES)
def test_values(backend, distribution, dtype):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("these tensors lie on the CPU; benchmarks/gpu.py checks the values on a GPU")
    assert measured(distribution, dtype) == golden()["laws"][distribution]["values"][dtype]


@pytest.mark.parametrize("distribution", ["normal", "tail"])
def test_one_bit_is_seen(backend, distribution):
    """The digest covers the last element, and its last bit."""
    x = torch.empty(10_007)
    fill_([Draw(x, DISTRIBUTIONS[distribution], key_of(distribution))])
    whole = golden()["laws"][distribution]["values"]["float32"]["whole"]
    assert digest(x) == whole
    x.view(torch.int32)[-1] ^= 1
    assert digest(x) != whole


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    backends.requested = lambda: "torch"
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    text = json.dumps(document(), indent=1, ensure_ascii=False)
    one_line = lambda match: f"[{' '.join(match[1].split())}]"  # noqa: E731
    FILE.write_text(re.sub(r"\[\s+([^][]*?)\s+\]", one_line, text) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
