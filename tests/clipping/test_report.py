"""ClipReport as a value: copied, pickled, compared, and without tensors of its own."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import initlab


def gradients(value=1.0):
    return [torch.ones(3), torch.tensor([[value, 2.0]])]


def reports(value):
    """One with names, one without, one of a GradClipper with its labels."""
    tensors = gradients(value)
    yield initlab.get_total_norm(zip(("first", "second"), tensors, strict=True), report=True)
    yield initlab.get_total_norm(tensors, report=True)
    for named in (True, False):
        model = nn.Linear(2, 1)
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer = torch.optim.SGD(model.named_parameters() if named else model.parameters(), 0.1)
        clipper = initlab.GradClipper(optimizer, 1.0)
        optimizer.step()
        yield clipper.report


def saved_and_loaded(report):
    file = io.BytesIO()
    torch.save({"report": report}, file)
    file.seek(0)
    with torch.serialization.safe_globals([initlab.ClipReport]):
        return torch.load(file)["report"]


WAYS = {
    "pickle": lambda report: pickle.loads(pickle.dumps(report)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "a checkpoint, weights_only": saved_and_loaded,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("value", [1.0, math.nan, -math.inf])
def test_reports_are_equal_after_a_round_trip(way, value):
    for report in reports(value):
        again = way(report)
        assert again is not report
        assert again == report
        assert hash(again) == hash(report)
        assert str(again) == str(report)
        assert again.first_bad == report.first_bad


def test_reports_differ_in_what_they_say():
    names = initlab.get_total_norm([("a", torch.ones(3))], report=True)
    for tensors in ([("b", torch.ones(3))], [torch.ones(3)], [("a", torch.ones(4))], [("a", torch.ones(3).double())]):
        assert initlab.get_total_norm(tensors, report=True) != names
    bad = [initlab.get_total_norm([torch.tensor([value])], report=True) for value in (math.nan, math.inf)]
    assert bad[0] != bad[1]
    assert names != "norm 1.73205"


def test_a_clippers_report_speaks_of_its_own_step():
    """Parameters that join the optimizer afterwards do not change what an earlier report names."""
    first, second = (nn.Parameter(torch.zeros(n)) for n in (2, 3))
    optimizer = torch.optim.SGD([first], 0.1)
    clipper = initlab.GradClipper(optimizer, 1.0)
    first.grad = torch.tensor([1.0, math.nan])
    optimizer.step()
    report = clipper.report
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.full((3,), math.nan)
    first.grad = None
    optimizer.step()
    assert report.first_bad == "parameter 0 of group 0, of shape (2,)"
    assert clipper.report.first_bad == "parameter 0 of group 1, of shape (3,)"


def test_reports_keep_no_tensor_alive():
    import gc
    import weakref

    g = torch.ones(3)
    there = weakref.ref(g)
    report = initlab.get_total_norm([g], report=True)
    del g
    gc.collect()
    assert there() is None
    assert str(report) == "norm 1.73205"
