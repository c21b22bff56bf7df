"""Checks and times the GPU kernels: `make gpu`, or `python benchmarks/gpu [--dry] [OUT]`, from the bare checkout.

No network, nothing installed, meant for 8 minutes. It prints, and saves in gpu.json and gpu.md of the folder OUT
(benchmarks/results without one): the machine; whether the GPU gives the stream's golden values, what no emulator shows
and the CPU's bits; then timings by CUDA events, contestants in turns, each on memory that was not written last, median
with 10th and 90th percentile, and how much of the write bandwidth that ``fill_`` reaches they use; and a verdict for
each figure that the docs claim. Nothing is timed unless every check has passed.

``--sanitize`` runs every kernel once, at small sizes, under compute-sanitizer (memcheck, racecheck), and nothing else.

``--dry`` runs all of it on a machine without a GPU: Triton's interpreter, tiny sizes, the clock of the host. Its
figures mean nothing and are marked so; it is there so that the script cannot fail on its first contact with a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:1] = [str(FOLDER.parent), str(FOLDER.parent.parent)]  # in place of this folder: `gpu`, and `initlab`

from gpu.config import DRY  # noqa: E402, I001 - before triton is imported

import torch  # noqa: E402


def main() -> int:
    """Run everything; 0 if all checks hold."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu", description="Check and time the GPU kernels.")
    parser.add_argument("out", nargs="?", default=os.environ.get("OUT"), help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="without a GPU: interpreter, tiny sizes")
    parser.add_argument("--sanitize", action="store_true", help="every kernel under compute-sanitizer, and no timings")
    parser.add_argument("--touch", action="store_true", help=argparse.SUPPRESS)  # what runs under it
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; --dry runs this script without one", file=sys.stderr)
        return 64
    if arguments.touch:
        from gpu.sanitizing import touch  # needs triton

        touch()
        return 0
    return run(arguments.out or (None if DRY else FOLDER.parent / "results"), arguments.sanitize)


def run(out: str | Path | None, sanitize: bool = False) -> int:
    """Check, and time where every check holds; save to the folder `out`. `sanitize`: see --sanitize."""
    from gpu import claims, clipping, device_only, linear_relu, sampling, sanitizing, suite, watching  # need triton
    from gpu.report import Findings, environment, save

    checks = (
        *(sampling.check_golden, device_only.check_device),
        *(sampling.check_bits, clipping.check_clipping, clipping.check_sharded),
        *(watching.check_watch, linear_relu.check_linear_relu, suite.check_tests),
    )
    timings = (
        *(sampling.time_tensors, sampling.time_model, clipping.time_clipping),
        *(linear_relu.time_linear_relu, watching.time_watch, claims.check_claims),
    )
    if sanitize:
        checks, timings = (sanitizing.check_sanitizer,), ()
    findings = Findings(environment=environment())
    for name, value in findings.environment.items():
        print(f"{name:12s} {value}")
    began = time.perf_counter()
    for step in checks:
        step(findings)
    green = all(findings.checks.values())
    for step in timings if green else ():
        step(findings)
    if not green:
        findings.notes.append("nothing was timed, because a check failed")
    findings.environment["seconds"] = f"{time.perf_counter() - began:.0f}"
    if out:
        save(findings, Path(out), "sanitizer" if sanitize else "gpu")
    print(f"{findings.environment['seconds']} s, {'all checks hold' if green else 'a check FAILED'}")
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
