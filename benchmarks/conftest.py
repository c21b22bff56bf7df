"""Interleaved timing against a peer, and the table of ratios at the end of a run.

INITLAB_BENCH_RESULTS names a file for all rounds as JSON; `compare.py` tells two of them apart.
"""

import datetime
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

if importlib.util.find_spec("initlab") is None:  # a bare checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

sys.path.insert(0, str(Path(__file__).parent))  # suites share their gates

import initlab

_rows = []
_rounds = []
_left_out = {}


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.fixture
def versus(benchmark, request):
    """Time `ours` with pytest-benchmark and, before each of its rounds, the others once: interleaved."""

    def run(ours, peer, floor, elements, element_size, rounds=7, others=None, sweep=None):
        calls = {"peer": peer, **(others or {}), "floor": floor}
        seconds = {name: [] for name in calls}

        def setup():
            for name, call in calls.items():
                seconds[name].append(_seconds(call))

        for call in (ours, *(others or {}).values()):
            call()  # compiles, and faults the pages in
        benchmark.pedantic(ours, setup=setup, rounds=rounds, iterations=1)
        mine = benchmark.stats.stats.median if benchmark.stats else float("nan")
        theirs, least = (statistics.median(seconds[name]) for name in ("peer", "floor"))
        row = {
            "case": request.node.name.split("[")[-1].rstrip("]"),
            "ns": mine / elements * 1e9,
            "peer_ns": theirs / elements * 1e9,
            "ratio": theirs / mine,
            "fill_ns": least / elements * 1e9,
            "over_fill": mine / least,
            "gigabytes_per_second": elements * element_size / mine / 1e9,
        }
        benchmark.extra_info.update(row)
        _rows.append(row)
        if benchmark.stats:
            found = {name: seconds.pop(name) for name in ("peer", "floor")}
            found |= {"others": seconds, "elements": elements, "element_size": element_size, "sweep": sweep}
            _rounds.append({"case": request.node.nodeid, "ours": list(benchmark.stats.stats.data), **found})
        return row

    return run


def _ceiling(elements=1 << 26, rounds=7):
    """Bytes per second that a copy reads and writes: what memory gives here, with torch's threads."""
    source, target = torch.ones(elements), torch.empty(elements)
    target.copy_(source)
    return 2 * 4 * elements / statistics.median(_seconds(lambda: target.copy_(source)) for _ in range(rounds))


def _commit():
    """Of the checkout; empty where it is none, or where git is not there."""
    if shutil.which("git") is None:
        return ""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def _result():
    """All rounds, in seconds, and where and how they were measured."""
    return {
        "made": {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "command": os.environ.get("INITLAB_BENCH_COMMAND") or " ".join(sys.argv),
            "commit": _commit(),
            "copy_bytes_per_second": _ceiling(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "initlab": initlab.__version__,
            },
        },
        "rows": _rounds,
        "left_out": _left_out,
    }


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        _left_out[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter):
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("initlab against torch, medians, interleaved")
    write(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, "
        f"initlab {initlab.__version__}"
    )
    write(f"{'case':34s} {'initlab':>9s} {'torch':>9s} {'ratio':>7s} {'fill_':>9s} {'x fill_':>8s} {'GB/s':>7s}")
    write(f"{'':34s} {'ns/elem':>9s} {'ns/elem':>9s} {'':>7s} {'ns/elem':>9s}")
    for row in _rows:
        write(
            f"{row['case']:34s} {row['ns']:9.3f} {row['peer_ns']:9.3f} {row['ratio']:6.3g}x {row['fill_ns']:9.3f} "
            f"{row['over_fill']:7.1f}x {row['gigabytes_per_second']:7.2f}"
        )
    path = os.environ.get("INITLAB_BENCH_RESULTS")
    if path and _rounds and not terminalreporter.stats.get("failed"):  # half a run is no result
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(_result(), indent=1) + "\n", encoding="utf-8")
        write(f"all rounds: {path}")
