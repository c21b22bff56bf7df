"""Scenarios on real ranks, over gloo: tests/ranks_*.py, run by tests/ranks.py."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import ranks

CASES = [
    (world, name) for world in (2, 3, 4, 8) for module in ranks.modules() for name in ranks.scenarios(module, world)
]


@functools.cache
def outcome(world, names):
    return ranks.run(world, names)


@pytest.mark.parametrize(("world", "name"), CASES)
def test_scenario(world, name, request):
    items = (item for item in request.session.items if getattr(item, "originalname", "") == "test_scenario")
    chosen = [item.callspec.params for item in items]
    wrong = outcome(world, tuple(params["name"] for params in chosen if params["world"] == world))[name]
    assert not wrong, wrong
