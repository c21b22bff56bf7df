"""values=: the caller's own start of a parameter, placed; all or nothing."""

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import initlab


def model(device: str = "cpu") -> nn.Module:
    with torch.device(device):
        made = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
        made.tied = made[0].weight
    return made


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_values_are_placed(device):
    made = model(device)
    report = initlab.init_model_(
        made,
        0,
        "he",
        device="cpu",
        values={
            "tied": torch.arange(6).view(2, 3),
            "1.weight": numpy.full((2, 3), 0.5),
            "*.bias": lambda ref: torch.ones(2, dtype=torch.float64) * len(ref.name) if ref.name == "1.bias" else None,
        },
    )
    assert torch.equal(made[0].weight, torch.arange(6.0).view(2, 3))
    assert made.tied is made[0].weight
    assert torch.equal(made[1].weight, torch.full((2, 3), 0.5))
    assert torch.equal(made[1].bias, torch.full((2,), 6.0))
    assert torch.equal(made[0].bias, torch.zeros(2))
    assert [row.source for row in report.rows if row.distribution is None] == ["given"] * 3
    plain = model()
    initlab.init_model_(plain, 0, "he", values=lambda ref: 0.25 if ref.name == "0.weight" else None)
    assert torch.equal(plain[0].weight, torch.full((2, 3), 0.25))


def test_what_no_recipe_fills_can_be_given():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    with pytest.raises(ValueError, match="cannot fill 1 of 1"):
        initlab.init_model_(Odd(), 0)
    made = Odd()
    rows = initlab.plan_model(made, 0, values={"token": 1 / 3}).rows
    initlab.init_model_(made, 0, values={"token": 1 / 3})
    assert rows[0].source == "given"
    assert torch.equal(made.token, torch.full((4,), 1 / 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        (
            {"0.weight": torch.ones(3, 2)},
            ValueError,
            r"0.weight has shape \(2, 3\), .*\(3, 2\); its transpose would fit",
        ),
        ({"0.weight": torch.ones(5)}, ValueError, "one number for all elements"),
        ({"0.weight": torch.ones(2, 3, dtype=torch.complex64)}, RuntimeError, r"\.to\(torch.float32\)"),
        ({"0.weight": torch.ones(2, 3, device="meta")}, ValueError, "on the meta device, and has no values"),
        ({"0.weight": "ones"}, TypeError, "a tensor, a number, or a function"),
        ({"0.weigth": 1.0}, ValueError, "did you mean '0.weight'"),
        ({"": 1.0, 3: 2.0}, (TypeError, ValueError), "values"),
        (1.0, TypeError, "a mapping from name patterns"),
        (torch.ones(2, 3), TypeError, "a mapping from name patterns"),
        ({"1.bias": lambda ref: torch.ones(3)}, ValueError, "1.bias has shape"),
    ],
)
def test_errors_name_the_way_out_and_nothing_is_written(values, error, match):
    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with pytest.raises(error, match=match):
        initlab.init_model_(made, 0, "he", values=values)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_shards_take_their_part():
    dist.init_process_group("fake", rank=1, world_size=2)
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        layer = nn.Linear(3, 5, bias=False)
        layer.weight = nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
        whole = torch.arange(15.0).view(5, 3)
        initlab.init_model_(layer, 0, values={"weight": whole})
        assert torch.equal(layer.weight._local_tensor, whole[3:])
        alike = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], shape=torch.Size((5, 3)), stride=(3, 1))
        initlab.init_model_(layer, 0, values={"weight": alike})
        assert torch.equal(layer.weight._local_tensor, torch.ones(2, 3))
        with pytest.raises(ValueError, match="full_tensor"):
            initlab.init_model_(layer, 0, values={"weight": distribute_tensor(whole, mesh, [Shard(1)])})
    finally:
        dist.destroy_process_group()
