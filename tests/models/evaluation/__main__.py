"""python tests/models/evaluation [PACKAGE or part of a model's name ...]: the table of docs/models.md, measured again.

For every model: is the start that init_model_ gives it the library's own? Equal, refused, or silently different, for a
recorded build (on the CPU and on meta) and for recipe="own" on a model that is there already (likewise).
"""

import argparse
import collections
import gc
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

import initlab

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from models.evaluation.comparison import differences, start, values
from models.evaluation.zoo import GROUPS, Build, models

SEEDS = 5
WAYS = ("recorded", "recorded, meta", "own", "own, meta")


def ours(build: Build, way: str, seeds: int) -> list[dict[str, torch.Tensor]]:
    """Starts of a model by one of the ways, under several seeds."""
    torch.manual_seed(12345)
    device = "meta" if way.endswith("meta") else "cpu"
    if way.startswith("recorded"):
        with initlab.record_build() as recipe, torch.device(device):
            model = build()
    else:
        recipe = "own"
        with torch.device(device):
            model = build()
    found = []
    for seed in range(seeds):
        initlab.init_model_(model, seed, recipe, device="cpu")
        found.append(values(model))
    return found


def verdict(build: Build, way: str, theirs: list[dict[str, torch.Tensor]]) -> tuple[str, str]:
    """(equal, refused, different or unbuilt; the first line of why)."""
    try:
        mine = ours(build, way, len(theirs))
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        inside = any("initlab" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        refused = (isinstance(error, ValueError) and "cannot fill" in str(error)) or "set by nobody" in str(error)
        lines = [line for line in str(error).splitlines() if line.strip()]
        return ("refused" if refused else "error" if inside else "unbuilt"), "; ".join(
            lines[1:3] if refused else lines[:1]
        )
    found = differences(theirs, mine)
    return ("different", f"{len(found)}: {found[0]}") if found else ("equal", "")


def main(names: list[str], ways: list[str], seeds: int, limit: float) -> collections.Counter:
    groups = [name for name in names if name in GROUPS] or list(GROUPS)
    parts = [name for name in names if name not in GROUPS]
    count: collections.Counter = collections.Counter()
    warnings.simplefilter("ignore")
    for name, build in models(groups).items():
        if parts and not any(part in name for part in parts):
            continue
        began = time.time()
        try:
            theirs = [start(build, 0)]
            if sum(t.numel() for t in theirs[0].values()) <= limit:
                theirs += [start(build, seed) for seed in range(1, seeds)]
        except Exception as error:  # a configuration that does not fit together
            print(
                f"{name:44s} not built: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
                    :150
                ],
                flush=True,
            )
            continue
        if sum(t.numel() for t in theirs[0].values()) > limit:
            continue
        group = name.partition(" ")[0]
        count[group, "models"] += 1
        told = []
        for way in ways:
            result, why = verdict(build, way, theirs)
            count[group, way, result] += 1
            told.append((result, why))
            gc.collect()
        print(f"{name:44s} " + " ".join(f"{r:10s}" for r, _ in told) + f" {time.time() - began:5.1f} s", flush=True)
        for way, (result, why) in zip(ways, told, strict=True):
            if result not in ("equal", "unbuilt"):
                print(f"    {way}: {result}: {why[:220]}", flush=True)
    print(
        f"\n{'':14s} models  "
        + "".join(f"{way:30s}" for way in ways)
        + "\n"
        + " " * 23
        + "equal / refused / different / other  " * 1
    )
    for group in GROUPS:
        if count[group, "models"]:
            cells = []
            for way in ways:
                e, r, d = (count[group, way, kind] for kind in ("equal", "refused", "different"))
                other = count[group, "models"] - e - r - d
                cells.append(f"{e} / {r} / {d} / {other}")
            print(f"{group:14s} {count[group, 'models']:6d}  " + "".join(f"{cell:30s}" for cell in cells))
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="builds of each model by its library")
    parser.add_argument("--limit", type=float, default=1e8, help="elements of the largest model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.names, arguments.ways, arguments.seeds, arguments.limit)
