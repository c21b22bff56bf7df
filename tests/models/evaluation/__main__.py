"""python tests/models/evaluation [PACKAGE or part of a model's name ...]: the table of docs/models.md, measured again.

For every model: is the start that init_model_ gives it the library's own? Equal, refused, or silently different, for a
recorded build (on the CPU and on meta) and for recipe="own" on a model that is there already (likewise).
"""

import argparse
import collections
import gc
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation.comparison import start
from evaluation.judging import WAYS, verdict
from evaluation.zoo import GROUPS, models

SEEDS = 5


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
