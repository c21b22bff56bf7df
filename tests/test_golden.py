"""Version 1 of the stream: every engine is held to tests/golden/stream_v1.json.

`PYTHONPATH=. python tests/test_golden.py --write` writes that file anew, with the reference in plain torch. Once the
version is frozen, a file that differs is another version: see docs/stream.md.
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
from initlab.kernels import (
    STREAM_VERSION,
    Draw,
    Normal,
    Region,
    TruncatedNormal,
    Uniform,
    engines,
    fill_,
    named_key,
    sampling,
    stream,
)

FILE = Path(__file__).parent / "golden" / f"stream_v{STREAM_VERSION}.json"
INF = float("inf")
LAWS = {
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
CASES = [(law, dtype) for law in LAWS for dtype in DTYPES]
CASES += [(law, dtype) for law in ("uniform", "normal with mean") for dtype in COMPLEX]
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


def key_of(law):
    return named_key(0, f"golden.{law}")


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


def measured(law, dtype):
    """What the file holds of a law in a dtype."""
    entry = {"first": None}
    for name, region in REGIONS.items():
        x = torch.empty(region.sizes, dtype=(DTYPES | COMPLEX)[dtype])
        fill_([Draw(x, LAWS[law], key_of(law), None if name == "whole" else region)])
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
        "laws": {
            name: {
                "law": repr(law),
                "key": f"{key_of(name):016x}",
                "values": {dtype: measured(name, dtype) for law_name, dtype in CASES if law_name == name},
            }
            for name, law in LAWS.items()
        },
    }


@functools.cache
def golden():
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_laws_meet_every_map():
    maps = [sampling.map_of(law, torch.float32) for law in LAWS.values()]
    assert {type(m) for m in maps} == set(stream.Map.__args__)
    flips = {type(m).__name__: {n.flip for n in maps if type(n) is type(m)} for m in maps if hasattr(m, "flip")}
    assert flips == {"TailMap": {0, 2**32 - 1}, "FarMap": {0, 2**32 - 1}}


def test_the_file_tells_what_it_holds():
    """Everything but the values, which the tests below compare: a law or region changed here only is seen."""

    def plain(document):
        for law in document["laws"].values():
            law["values"] = {dtype: sorted(entry) for dtype, entry in law["values"].items()}
        return document

    ours = json.loads(json.dumps(document()))
    assert plain(ours) == plain(json.loads(FILE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("engine", ["torch", "numba", "triton"], indirect=True)
@pytest.mark.parametrize(("law", "dtype"), CASES)
def test_values(engine, law, dtype):
    if engine == "triton" and torch.cuda.is_available():
        pytest.skip("these tensors lie on the CPU; benchmarks/gpu.py checks the values on a GPU")
    assert measured(law, dtype) == golden()["laws"][law]["values"][dtype]


@pytest.mark.parametrize("law", ["normal", "tail"])
def test_one_bit_is_seen(engine, law):
    """The digest covers the last element, and its last bit."""
    x = torch.empty(10_007)
    fill_([Draw(x, LAWS[law], key_of(law))])
    whole = golden()["laws"][law]["values"]["float32"]["whole"]
    assert digest(x) == whole
    x.view(torch.int32)[-1] ^= 1
    assert digest(x) != whole


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    engines.requested = lambda: "torch"
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    text = json.dumps(document(), indent=1, ensure_ascii=False)
    one_line = lambda match: f"[{' '.join(match[1].split())}]"  # noqa: E731
    FILE.write_text(re.sub(r"\[\s+([^][]*?)\s+\]", one_line, text) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
