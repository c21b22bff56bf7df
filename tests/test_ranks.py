"""Scenarios on real ranks, over gloo: tests/ranks_*.py, run by tests/ranks.py."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import ranks

CASES = [
    (world, module, name)
    for module in ranks.modules()
    for name, worlds in ranks.scenarios(module).items()
    for world in worlds
]


@functools.cache
def outcome(world, module, names):
    return ranks.run(world, module, names)


@pytest.mark.parametrize(("world", "module", "name"), sorted(CASES, key=lambda case: case[:2]))
def test_scenario(world, module, name, request):
    chosen = [
        item.callspec.params for item in request.session.items if getattr(item, "originalname", "") == "test_scenario"
    ]
    names = tuple(p["name"] for p in chosen if (p["world"], p["module"]) == (world, module))
    wrong = outcome(world, module, names)[name]
    assert not wrong, wrong
