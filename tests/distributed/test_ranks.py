"""Scenarios on real ranks, over gloo: scenarios/*.py, run by ranks.py."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import ranks

_LONG = ("beside_torch", "clipping_nonfinite", "library_models", "watching")  # modules
CASES = [
    (world, name) for world in (2, 3, 4, 8) for module in ranks.modules() for name in ranks.scenarios(module, world)
]


@functools.cache
def outcome(world, names):
    return ranks.run(world, names)


@pytest.mark.xdist_group("ranks")  # a world has as many processes as ranks, and runs all of its scenarios at once
@pytest.mark.long_if.with_args(lambda world, name: world > 2 or name.startswith(_LONG))
@pytest.mark.parametrize(("world", "name"), CASES)
def test_scenario(world, name, request):
    items = (item for item in request.session.items if getattr(item, "originalname", "") == "test_scenario")
    chosen = [item.callspec.params for item in items]
    wrong = outcome(world, tuple(params["name"] for params in chosen if params["world"] == world))[name]
    assert not wrong, wrong


@pytest.mark.long
@pytest.mark.xdist_group("ranks")
def test_the_example_of_the_docs():
    """docs/distributed.md shows what it prints."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "4", root / "examples" / "sharded_training.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(lines) == 6
    page = (root / "docs" / "distributed.md").read_text()
    assert "\n".join(lines) in page
