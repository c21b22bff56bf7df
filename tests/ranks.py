"""Scenarios that run on several ranks: real processes, gloo between them.

A module of scenarios, tests/ranks_*.py, holds functions marked `@on(2, 4)`: every rank of a world of 2, then of 4,
calls them. test_ranks.py runs each world once, with all its scenarios, and reports them one by one.

By hand: python tests/ranks.py WORLD MODULE [SCENARIO ...], with PYTHONPATH at the checkout.
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
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

_SECONDS = 60  # how long a collective waits for a rank that does not come
_LONGEST = 600  # how long a world may take
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def on(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Mark a function as a scenario for worlds of these many ranks."""

    def mark(scenario: Callable[[], None]) -> Callable[[], None]:
        scenario.worlds = worlds  # type: ignore[attr-defined]
        return scenario

    return mark


def modules() -> list[str]:
    """The modules of scenarios."""
    return sorted(path.stem for path in Path(__file__).parent.glob("ranks_*.py"))


@functools.cache
def scenarios(module: str) -> dict[str, tuple[int, ...]]:
    """A module's scenarios and their worlds, in order, read without importing anything that torch.distributed needs."""
    found = vars(importlib.import_module(module))
    return {name: f.worlds for name, f in found.items() if hasattr(f, "worlds")}


def run(world: int, module: str, names: Sequence[str]) -> dict[str, str]:
    """Run scenarios one after the other in a world of their own. By name: what went wrong; empty if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(world), module, *names],
                env={
                    **os.environ,
                    "INITLAB_RANK": f"{rank} {folder}",
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                },
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
        told = [dict(_told(Path(folder) / f"{rank}.jsonl")) for rank in range(world)]
    found = {}
    for name in names:
        wrong = [f"rank {rank}: {t.get(name, 'did not get here')}" for rank, t in enumerate(told) if t.get(name) != ""]
        found[name] = "\n".join(wrong)
    return found


def _told(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        yield tuple(json.loads(line))  # type: ignore[misc]


def _be_a_rank(rank: int, world: int, module: str, names: Sequence[str], folder: str) -> None:
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
    found = importlib.import_module(module)
    with open(f"{folder}/{rank}.jsonl", "w") as out:
        for name in names:
            torch.manual_seed(0)
            wrong = ""
            try:
                getattr(found, name)()
                dist.barrier()
            except BaseException:
                wrong = traceback.format_exc()
            print(json.dumps([name, wrong]), file=out, flush=True)
            if wrong:  # the other ranks may wait for this one: they learn of it when its connections close
                os._exit(1)
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # what the interpreter would tear down takes a second a rank


if __name__ == "__main__":
    world, module, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if "INITLAB_RANK" in os.environ:
        rank, folder = os.environ["INITLAB_RANK"].split(" ", 1)
        _be_a_rank(int(rank), world, module, names, folder)
    else:
        for name, wrong in run(world, module, names or [n for n, w in scenarios(module).items() if world in w]).items():
            print(f"{name}: {wrong or 'passed'}")
