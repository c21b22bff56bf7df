"""What init_model_ makes of a model of a library: equal to the library's own start, refused, or silently different."""

import traceback

import torch

import initlab

from .comparison import differences, values
from .zoo import Build

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
