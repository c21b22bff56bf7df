"""Scenarios that run on several ranks: real processes, gloo between them.

A module of scenarios, scenarios/*.py, holds functions marked `@on(2, 4)`: every rank of a world of 2, then of 4,
calls them. test_ranks.py starts each world once, with all scenarios for it, and reports them one by one.

By hand: python tests/distributed/ranks.py WORLD MODULE[:SCENARIO] ..., with PYTHONPATH at the checkout.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

_SECONDS = 60  # that a collective waits for other ranks
_LONGEST = 600  # seconds that a world may take
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
_NOT_REACHED = "did not reach it"


def on(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Mark a function as a scenario for worlds of these many ranks."""

    def mark(scenario: Callable[[], None]) -> Callable[[], None]:
        scenario.worlds = worlds  # type: ignore[attr-defined]
        return scenario

    return mark


def modules() -> list[str]:
    """The modules of scenarios."""
    return sorted(path.stem for path in (Path(__file__).parent / "scenarios").glob("[!_]*.py"))


@functools.cache
def scenarios(module: str, world: int) -> list[str]:
    """A module's scenarios for worlds of so many ranks, as module:name."""
    found = vars(importlib.import_module(f"scenarios.{module}"))
    return [f"{module}:{name}" for name, f in found.items() if world in getattr(f, "worlds", ())]


def run(world: int, names: Sequence[str]) -> dict[str, str]:
    """Run scenarios one after the other in one world. By name: what went wrong; empty if nothing did.

    What goes wrong ends a world; the scenarios that come after get another.
    """
    found: dict[str, str] = {}
    while len(found) < len(names):
        left = [name for name in names if name not in found]
        results = _start(world, left)
        for name in left:
            each = [rank.get(name, _NOT_REACHED) for rank in results]
            if name is not left[0] and _NOT_REACHED in each and any(found[n] for n in left if n in found):
                break
            found[name] = "\n".join(f"rank {rank}: {wrong}" for rank, wrong in enumerate(each) if wrong)
    return found


def _start(world: int, names: Sequence[str]) -> list[dict[str, str]]:
    """For each rank its results of the scenarios that it reached: empty, or a traceback."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, str(world), *names]
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **_ENVIRONMENT, "INITLAB_RANK": f"{rank} {folder}"},
                stdin=subprocess.DEVNULL,
            )
            for rank in range(world)
        ]
        end = time.monotonic() + _LONGEST
        try:
            for process in ranks:
                process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        files = [Path(folder) / f"{rank}.jsonl" for rank in range(world)]
        return [dict(map(json.loads, file.read_text().splitlines())) if file.exists() else {} for file in files]


def _be_a_rank(rank: int, world: int, names: Sequence[str], folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_SECONDS),
    )
    with open(f"{folder}/{rank}.jsonl", "w") as out:
        for name in names:
            torch.manual_seed(0)
            module, _, function = name.partition(":")
            wrong = ""
            try:
                getattr(importlib.import_module(f"scenarios.{module}"), function)()
                dist.barrier()
            except BaseException:
                wrong = traceback.format_exc()
            print(json.dumps([name, wrong]), file=out, flush=True)
            if wrong:  # the other ranks may wait for this one, until its connections close
                os._exit(1)
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # tearing the interpreter down takes a second a rank


if __name__ == "__main__":
    world, names = int(sys.argv[1]), sys.argv[2:]
    if "INITLAB_RANK" in os.environ:
        rank, folder = os.environ["INITLAB_RANK"].split(" ", 1)
        _be_a_rank(int(rank), world, names, folder)
    else:
        names = [one for name in names for one in ([name] if ":" in name else scenarios(name, world))]
        for name, wrong in run(world, names).items():
            print(f"{name}: {wrong or 'passed'}")
