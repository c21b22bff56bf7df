"""diagnose() on a DataLoader: the batch that breaks is found and named."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import initlab

CLASSIFIED = initlab.supervised(nn.CrossEntropyLoss())


def setup(classes=5):
    torch.manual_seed(0)
    x, y = torch.randn(640, 6), torch.randint(0, 5, (640,))
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, classes))
    return model, x, y, torch.optim.Adam(model.parameters(), 1e-3)


def diagnose(model, x, y, optimizer, wrap=lambda loader: loader):
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    return initlab.diagnose(model, wrap(loader), CLASSIFIED, optimizer, steps=1)


@pytest.mark.parametrize("wrap", [lambda loader: loader, iter], ids=["loader", "iterator"])
def test_a_value_in_one_batch(wrap):
    model, x, y, optimizer = setup()
    x[33 * 16 + 5, 2] = float("nan")
    found = diagnose(model, x, y, optimizer, wrap)
    assert (found.verdict, found.batch_index) == ("broken", 33)
    assert (found.causes[0].kind, found.causes[0].place.feature) == ("input", 2)
    assert found.data.faults[0].places == ((33, 5),)
    assert found.notes[0].startswith("batch 33 (from 0), one of ")
    assert json.loads(found.to_json())["data"]["worst"] == 33


def test_a_label_that_the_model_has_no_output_for():
    model, x, y, optimizer = setup()
    y[21 * 16] = 5  # next to the others: only the model tells that it is one too many
    found = diagnose(model, x, y, optimizer)
    assert (found.verdict, found.batch_index, found.causes[0].kind) == ("broken", 21, "target")


def test_sound_data():
    model, x, y, optimizer = setup()
    before = [p.detach().clone() for p in model.parameters()]
    found = diagnose(model, x, y, optimizer)
    assert (found.verdict, found.data.verdict, found.data.batches) == ("healthy", "healthy", 40)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_loader_without_batches():
    model, _, _, optimizer = setup()
    with pytest.raises(TypeError, match="the loader gave no batch"):
        initlab.diagnose(model, iter([]), CLASSIFIED, optimizer)


def test_json_has_no_numbers_that_json_does_not_know():
    model, x, y, optimizer = setup()
    x[0, 0] = float("inf")
    text = initlab.diagnose(model, (x[:16], y[:16]), CLASSIFIED, optimizer).to_json()

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(text, parse_constant=refuse)
    assert found["losses"][0] is None or isinstance(found["losses"][0], float)
    assert '"inf"' not in text
    assert '"nan"' not in text
