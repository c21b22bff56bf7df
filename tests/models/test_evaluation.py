"""Starts of real libraries' models against the libraries' own: a third of `python tests/models/evaluation`."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from evaluation.comparison import differences, start
from evaluation.judging import WAYS, verdict
from evaluation.zoo import models

SEEDS = 3
EQUAL = {"transformers": 0.99, "diffusers": 0.97, "peft": 1.0}  # of the recorded builds


@pytest.mark.long
@pytest.mark.parametrize("group", [pytest.param(g, marks=pytest.mark.xdist_group(f"evaluation {g}")) for g in EQUAL])
def test_equal_or_refused(group):
    pytest.importorskip(group)
    found: dict[str, list[str]] = {way: [] for way in WAYS}
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, build in list(models([group]).items())[::3]:
            try:
                theirs = [start(build, seed) for seed in range(SEEDS)]
            except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError):
                continue  # a configuration that does not fit together when it is cut
            for way in WAYS:
                result, why = verdict(build, way, theirs)
                found[way].append(result)
                wrong += [f"{name}, {way}: {result}: {why}"] * (result not in ("equal", "refused", "unbuilt"))
    assert not wrong, "\n".join(wrong)
    assert len(found["recorded"]) >= 3
    assert found["recorded"].count("equal") >= EQUAL[group] * len(found["recorded"])


class Small(nn.Module):
    def __init__(self, std: float = 0.02, bias: float = 0.0, copies: bool = True, rows: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(100, 50) * std), nn.Parameter(torch.full((9,), bias))
        if rows:
            self.weight.data *= torch.linspace(0.5, 1.5, 100).unsqueeze(1)
        self.copy = nn.Parameter(self.weight.detach().clone() if copies else torch.randn(100, 50) * std)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"std": 0.026}, ["copy: values have", "weight: values have"]),
        ({"bias": 0.1}, ["bias: 0.1 to 0.1 for the fixed 0 to 0"]),
        ({"copies": False}, ["other copies"]),
        ({"rows": True}, ["copy: ", "weight: "]),
    ],
)
def test_the_comparison_sees(changed, said):
    theirs = [start(Small, seed) for seed in range(SEEDS)]
    ours = [start(lambda: Small(**changed), 100 + seed) for seed in range(SEEDS)]
    found = differences(theirs, ours)
    assert len(found) == len(said)
    assert all(line.startswith(beginning) for line, beginning in zip(found, said, strict=True))
