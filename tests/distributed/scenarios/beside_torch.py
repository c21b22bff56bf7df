"""FSDP2's flow from the meta device, by torch and under swap(): how many weights are those of a single process.

python tests/distributed/ranks.py 4 beside_torch prints the table of docs/distributed.md.
"""

import contextlib
from collections.abc import Callable

import sharded_models as spread
import torch
import torch.distributed as dist
from ranks import on
from scenarios.filling import gathered
from sharded_models import MODELS
from torch import Tensor, nn

import initlab


def reset(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    torch.manual_seed(11)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "norm" not in name}


def compare(parallel: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], within: bool) -> tuple[int, int]:
    """(random weights that are those of a single process, random weights)."""
    with initlab.swap() if within else contextlib.nullcontext():
        single = random_weights(reset(make()))
        with torch.device("meta"):
            model = make()
        model = reset(parallel(model))
    equal = 0
    for name, weight in random_weights(model).items():
        equal += torch.equal(gathered(weight), single[name].detach())
    return equal, len(single)


@on(4, 8)
def table() -> None:
    world, rows = dist.get_world_size(), []
    ways = [spread.fsdp, spread.tensor_parallel, spread.two_dimensional, spread.hybrid]
    for parallel in ways + [spread.three_dimensional] * (world == 8):
        for make in MODELS:
            ours, total = compare(parallel, make, within=True)
            torchs, _ = compare(parallel, make, within=False)
            assert ours == total
            rows.append(
                f"{parallel.__name__:18s} {make.__name__:5s} {ours:3d} of {total:2d}   {torchs:3d} of {total:2d}"
            )
    if dist.get_rank() == 0:
        print(f"{world} ranks                  under swap()  torch alone\n" + "\n".join(rows))
