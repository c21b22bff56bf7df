"""What a page plots: histograms against numpy's, updates and scales against the numbers themselves."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import initlab
from initlab.diagnosis.histograms import Histogram, count, read, some
from initlab.diagnosis.limits import LIMITS

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def of(tensor):
    return read([count(some(tensor))])[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2000,), (40, 50), (5, 4, 3, 30), (1,), (), (60, 0)])
def test_counts_are_numpys(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    found = of(x)
    if x.numel() == 0:
        assert found is None
        return
    counts, edges = np.histogram(x.double().numpy(), LIMITS.bins, (found.low, found.high))
    assert (found.low, found.high) == (edges[0], edges[-1])
    # Beside an edge the two may round apart.
    assert sum(abs(a - b) for a, b in zip(found.counts, counts, strict=True)) <= 0.01 * x.numel()
    assert sum(found.counts) == counts.sum()
    assert found.outside * x.numel() == pytest.approx(x.numel() - counts.sum())
    assert found.outside <= 2 * LIMITS.far_share
    assert found.bad == 0.0


def test_a_few_far_elements_do_not_widen_a_histogram():
    x = torch.linspace(-1, 1, 2000)
    x[7], x[100] = 1e9, -1e9
    found = of(x)
    assert -1 <= found.low < found.high <= 1
    assert sum(found.counts) + round(found.outside * 2000) == 2000
    spike = torch.zeros(2000)
    spike[7] = 5.0  # among equal ones it is all that there is to see
    found = of(spike)
    assert (found.low, found.high, found.counts[0], found.counts[-1]) == (0.0, 5.0, 1999, 1)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30, 1e300])
def test_equal_elements_are_in_one_bin(value):
    found = of(torch.full((50,), value, dtype=torch.float64))
    assert found.low < value < found.high
    assert max(found.counts) == sum(found.counts) == 50


def test_what_is_not_finite_is_counted_apart():
    x = torch.linspace(0, 1, 100, dtype=torch.float16)
    x[:10], x[10:15], x[15:18] = math.nan, math.inf, -math.inf
    found = of(x)
    assert found.bad == pytest.approx(0.18)
    assert sum(found.counts) + round(found.outside * 100) == 82
    assert 0.17 < found.low < found.high <= 1
    assert of(torch.full((4,), math.nan)) == Histogram(0.0, 0.0, (), bad=1.0)
    x[10:18] = 0.5
    found = of(x)
    counts = np.histogram(x[10:].double().numpy(), LIMITS.bins, (found.low, found.high))[0]
    assert (found.bad, sum(found.counts)) == (pytest.approx(0.1), counts.sum())
    wide = of(torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64))
    assert (wide.counts[0], wide.counts[-1]) == (1, 1)


def test_large_tensors_are_sampled_the_same_way_each_time():
    torch.manual_seed(0)
    x = torch.randn(700, 900)
    found = of(x)
    assert found == of(x.clone())
    assert sum(found.counts) + round(found.outside * LIMITS.counted) == LIMITS.counted
    assert found.low == pytest.approx(float(x.quantile(LIMITS.far_share)), abs=0.4)


def test_integers_sparse_and_meta_tensors_have_none():
    empty = [torch.ones(3, dtype=torch.long), torch.ones(3, device="meta"), torch.eye(3).to_sparse(), torch.ones(0)]
    assert read([count(some(x)) for x in empty]) == [None] * 4


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, (torch.randn(40, 6), torch.arange(40) % 3), initlab.supervised(nn.CrossEntropyLoss())


def test_weights_have_their_std_their_update_and_what_is_wanted():
    model, batch, loss_fn = net()
    rate = 0.5
    found = initlab.diagnose(model, batch, loss_fn, torch.optim.SGD(model.parameters(), lr=rate), steps=2)
    loss_fn(model, batch).backward()
    for row, layer in zip(found.measurements.weights, (model[0], model[2], model[4]), strict=True):
        weight = layer.weight.detach()
        assert row.name.endswith("weight")
        assert row.std == pytest.approx(float(weight.double().std(correction=0)), rel=1e-6)
        assert row.update == pytest.approx(float(rate * layer.weight.grad.norm() / weight.norm()), rel=1e-3)
    gains = [nn.init.calculate_gain("tanh")] * 2 + [1.0]
    wanted = [gain / math.sqrt(fan) for gain, fan in zip(gains, (6, 16, 16), strict=True)]
    assert [row.wanted for row in found.measurements.weights] == pytest.approx(wanted)
    assert {row.name for row in found.measurements.weights if row.histogram} >= {"0.weight", "4.weight"}


def test_a_run_without_steps_has_no_updates_and_the_layers_that_matter():
    model, batch, loss_fn = net()
    nn.init.constant_(model[2].weight, float("inf"))
    found = initlab.diagnose(model, batch, loss_fn)
    assert [row.update for row in found.measurements.weights] == [None] * 3
    names = [row.name for row in found.measurements.activations]
    assert names == ["0", "2", "4"]
    first, middle, last = found.measurements.activations
    assert (first.function, first.output.bad, first.activated.bad) == ("tanh", 0.0, 0.0)
    assert (middle.output.bad, middle.output.counts) == (1.0, ())
    assert last.activated is None
    outputs = torch.tanh(model[0](batch[0])).detach().double()
    assert first.activated.high <= float(outputs.max()) + 1e-9


def test_scales_of_features_channels_and_classes():
    torch.manual_seed(0)
    x = torch.randn(50, 4) * torch.tensor([1.0, 10.0, 0.0, 1000.0]) + 3
    x[4, 1] = float("nan")
    found = initlab.diagnose(nn.Linear(4, 3), (x, torch.arange(50) % 3), initlab.supervised(nn.CrossEntropyLoss()))
    features, classes = found.measurements.scales
    assert (features.code, features.role, features.what, features.total) == ("batch[0]", "input", "feature", 4)
    mean, std = np.nanmean(x.double().numpy(), 0), np.nanstd(x.double().numpy(), 0)
    assert features.mean == pytest.approx(mean)
    assert features.std == pytest.approx(std, rel=1e-6, abs=1e-6)
    assert features.bad == (False, True, False, False)
    assert (classes.role, classes.what, classes.index, classes.mean) == (
        "target",
        "class",
        (0, 1, 2),
        (0.34, 0.34, 0.32),
    )
    images = torch.rand(8, 3, 5, 5) * torch.tensor([1.0, 2.0, 255.0]).view(3, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(18, 2))
    found = initlab.diagnose(model, (images, torch.zeros(8, 2)), initlab.supervised(nn.MSELoss()))
    channels, targets = found.measurements.scales
    assert (channels.what, targets.what, targets.mean) == ("channel", "feature", (0.0, 0.0))
    assert channels.mean == pytest.approx(images.double().mean((0, 2, 3)).tolist())


def test_wide_inputs_show_their_extremes():
    torch.manual_seed(0)
    x = torch.randn(20, 500)
    x[:, 123] *= 1e4
    x[:, 321] *= 1e-4
    x[3, 77] = float("inf")
    found = initlab.diagnose(nn.Linear(500, 1), (x, torch.zeros(20, 1)), initlab.supervised(nn.MSELoss()))
    scale = found.measurements.scales[0]
    assert scale.total == 500
    assert len(scale.index) == LIMITS.plotted_columns
    assert {77, 123, 321} <= set(scale.index)
    assert scale.index == tuple(sorted(set(scale.index)))
    assert [scale.index[at] for at, bad in enumerate(scale.bad) if bad] == [77]


def test_measurements_travel_and_change_no_verdict():
    model, batch, loss_fn = net()
    found = initlab.diagnose(model, batch, loss_fn, steps=2)
    assert pickle.loads(pickle.dumps(found)) == found
    assert dataclasses.replace(found, measurements=None).text() == found.text()
    assert found.to_dict()["measurements"]["weights"][0]["name"] == "0.weight"
