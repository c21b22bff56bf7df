"""scan_data() on loaders with planted faults, each with the batch and the row that it has to name."""

import json
import math

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import initlab

NAN, INF = math.nan, math.inf
BATCH = 8


def sound(batches=500, columns=5, classes=10):
    """Standardised features of many kinds, labels of every class."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * BATCH, columns, generator=generator)
    x[:, 0] = (x[:, 0] > 0.5).float()  # a flag
    x[:, 1] = x[:, 1].exp() / 2  # skewed
    return x, torch.randint(0, classes, (len(x),), generator=generator)


def scan(x, y, **options):
    return initlab.scan_data(DataLoader(TensorDataset(x, y), batch_size=BATCH), **options)


def faults(report):
    return {fault.kind: fault for fault in report.faults}


def test_nothing_to_say_of_sound_data():
    x, y = sound()
    report = scan(x, y)
    assert (report.faults, report.verdict, report.worst) == ((), "healthy", None)
    assert (report.batches, report.rows, report.complete) == (500, 4000, True)
    for column, row in enumerate(report.columns[:-1]):
        assert row.mean == pytest.approx(float(x[:, column].double().mean()), abs=1e-12)
        assert row.std == pytest.approx(float(x[:, column].double().std(correction=0)), rel=1e-9)
        assert (row.lowest, row.highest) == (float(x[:, column].min()), float(x[:, column].max()))


@pytest.mark.parametrize(("bad", "batch", "row"), [(NAN, 371, 3), (INF, 0, 0), (-INF, 499, 7)])
def test_a_value_that_is_not_finite(bad, batch, row):
    x, y = sound()
    x[batch * BATCH + row, 2] = bad
    report = scan(x, y)
    fault = faults(report)["not finite"]
    assert (fault.severity, fault.code, fault.places, fault.columns) == ("broken", "batch[0]", ((batch, row),), (2,))
    assert report.worst == batch


def test_a_target_that_is_not_finite():
    x, _ = sound(50)
    y = torch.randn(len(x))
    y[33] = NAN
    fault = faults(scan(x, y))["not finite"]
    assert (fault.code, fault.places) == ("batch[1]", ((4, 1),))


@pytest.mark.parametrize("label", [10, 11, -3])
def test_a_label_out_of_range_of_the_model(label):
    x, y = sound()
    y[123 * BATCH + 6] = label
    fault = faults(scan(x, y, classes=10))["labels"]
    assert (fault.severity, fault.code, fault.places) == ("broken", "batch[1]", ((123, 6),))


@pytest.mark.parametrize("label", [37, 255, -1])
def test_a_label_that_stands_apart(label):
    x, y = sound()
    y[123 * BATCH + 6] = label
    assert faults(scan(x, y))["labels"].places == ((123, 6),)


def test_labels_that_are_only_rare():
    x, y = sound()
    y[77] = 10  # the eleventh class
    y[78] = -100  # torch's ignore_index
    fault = faults(scan(x, y))["labels"]
    assert (fault.severity, fault.places) == ("warning", ())


@pytest.mark.parametrize("factor", [10.0, 0.05])
@pytest.mark.parametrize("column", [1, 3])
def test_a_column_that_changes_scale_half_way(factor, column):
    x, y = sound()
    x[250 * BATCH :, column] *= factor
    fault = faults(scan(x, y))["change"]
    assert (fault.columns, fault.places) == ((column,), ((250, -1),))


def test_no_change_in_noise():
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(60 * BATCH, 50, generator=generator) * torch.rand(60 * BATCH, 1, generator=generator)
        assert "change" not in faults(scan(x, torch.arange(len(x)) % 7))


def test_scale_and_constant_columns():
    x, y = sound()
    x[:, 4] = 3.0
    x[:, 2] *= 1000
    found = faults(scan(x, y))
    assert found["constant"].columns == (4,)
    assert found["scale"].columns == (2,)


def test_pixels_that_are_not_scaled():
    images = torch.randint(0, 256, (40, 3, 6, 6), generator=torch.Generator().manual_seed(0)).float()
    found = faults(scan(images, torch.arange(40) % 4))
    assert found["scale"].columns == (0, 1, 2)
    assert scan(images / 255, torch.arange(40) % 4).verdict == "healthy"


def test_repeated_and_empty_batches():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 2, generator=generator), torch.tensor([0, 1, 0, 1])) for _ in range(6)]
    batches[4] = (torch.empty(0, 2), torch.empty(0, dtype=torch.int64))
    batches[5] = tuple(tensor.clone() for tensor in batches[1])
    found = faults(initlab.scan_data(batches))
    assert (found["duplicate"].places, found["duplicate"].severity) == (((5, -1),), "warning")
    assert (found["empty"].places, found["empty"].severity) == (((4, -1),), "broken")


def test_a_loader_without_batches():
    assert faults(initlab.scan_data([]))["empty"].severity == "broken"


def test_all_labels_alike_and_out_of_balance():
    x, y = sound()
    assert "the same" in faults(scan(x, torch.zeros_like(y)))["labels"].explanation
    rare = torch.zeros_like(y)
    rare[:9] = 1
    assert faults(scan(x, rare))["labels"].severity == "warning"


def test_dicts_and_iterables_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            for index in range(64):
                values = torch.randn(3, generator=generator)
                yield {"pixels": values.fill_(NAN) if index == 20 else values, "label": index % 2}

    report = initlab.scan_data(DataLoader(Stream(), batch_size=16))
    fault = faults(report)["not finite"]
    assert (fault.code, fault.places, fault.columns) == ("batch['pixels']", ((1, 4),), (0, 1, 2))
    assert report.batches == 4


def test_half_precision_and_booleans():
    x, y = sound(20)
    assert scan(x.half(), y).faults == ()
    assert scan(x > 0, y).faults == ()


def test_a_budget_that_ends_first():
    x, y = sound()
    report = scan(x, y, budget=0.0)
    assert (report.batches, report.complete) == (1, False)
    assert "the budget ended" in str(report)


def test_json():
    x, y = sound(20)
    x[3, 2] = NAN
    assert json.loads(scan(x, y).to_json())["faults"][0]["places"] == [[0, 3]]


@pytest.mark.long
def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = scan(*sound(20)).to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 6


@pytest.mark.parametrize("loader", [torch.ones(3), 5, None])
def test_what_is_no_loader(loader):
    with pytest.raises(TypeError, match="iterable of batches"):
        initlab.scan_data(loader)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_tensor_is_scanned_with_its_zeros(layout):
    dense = torch.eye(8)
    dense[3, 5] = torch.nan
    batches = [(getattr(dense, layout)(), torch.ones(8, 2)), (torch.ones(8, 8), torch.ones(8, 2))]
    found, wanted = (initlab.scan_data(each) for each in (batches, [(dense, batches[0][1]), batches[1]]))
    assert str(found) == str(wanted)
    assert found.faults[0].places[0] == (0, 3)
    huge = torch.sparse_coo_tensor(
        torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (1 << 14, 1 << 14), check_invariants=True
    )
    with pytest.raises(ValueError, match=r"batch\[0\] is sparse, of shape \(16384, 16384\)"):
        initlab.scan_data([(huge, torch.ones(1))])
