"""scan_checkpoint() on files that torch, safetensors and torch.distributed.checkpoint wrote, with planted faults."""

import json
import math
import os
import pickle
import shutil
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import initlab
from initlab import cli
from initlab.checkpoints import formats

# What torch.distributed.checkpoint says of a single process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAN, INF = math.nan, math.inf


def tensors():
    """Many parts, an odd number of elements, every width of dtype."""
    generator = torch.Generator().manual_seed(0)
    return {
        "plain": torch.randn(700, 901, generator=generator),
        "half": torch.randn(33, generator=generator).half(),
        "brain": torch.randn(5, 7, 3, generator=generator).bfloat16(),
        "double": torch.randn(11, generator=generator).double(),
        "count": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(0.5),
    }


def _write(kind, values, folder):
    if kind == "safetensors":
        save_file(values, path := folder / "w.safetensors")
    elif kind == "torch":
        torch.save({"model": values, "epoch": 3}, path := folder / "w.pt")
    elif kind == "old torch":
        torch.save({"model": values}, path := folder / "w.bin", _use_new_zipfile_serialization=False)
    elif kind == "compressed":
        torch.save({"model": values}, plain := folder / "plain.pt")
        with (
            zipfile.ZipFile(plain) as archive,
            zipfile.ZipFile(path := folder / "w.pt", "w", zipfile.ZIP_DEFLATED) as to,
        ):
            for record in archive.infolist():
                to.writestr(record.filename, archive.read(record))
    else:
        dcp.save({"model": values, "epoch": 3}, checkpoint_id=(path := folder / "dcp"), no_dist=True)
    return path


@pytest.fixture(params=["safetensors", "torch", "old torch", "compressed", "distributed"])
def write(request, tmp_path):
    return lambda values, at="a": _write(request.param, values, (tmp_path / at).mkdir() or tmp_path / at)


def rows_of(report):
    return {row.name.removeprefix("model."): row for row in report.rows}


def test_counts_and_sizes_are_torchs(write):
    values = tensors()
    found = rows_of(initlab.scan_checkpoint(write(values)))
    assert found.keys() == values.keys()
    for name, value in values.items():
        row = found[name]
        assert (row.dtype, row.shape) == (value.dtype, tuple(value.shape))
        if value.is_floating_point() and value.numel():
            assert row.rms == pytest.approx(float(value.double().square().mean().sqrt()), rel=1e-12)
            assert row.largest == float(value.abs().max())
        assert not row.faults
        assert not row.nonfinite


@pytest.mark.parametrize(
    ("name", "bad", "said", "at"),
    [
        ("plain", NAN, "1 NaN", -1),
        ("half", INF, "1 inf", 0),
        ("brain", -INF, "1 -inf", -1),
        ("double", NAN, "1 NaN", 0),
    ],
)
def test_a_planted_value_is_found(write, name, bad, said, at):
    values = tensors()
    values[name].view(-1)[at] = bad
    report = initlab.scan_checkpoint(write(values))
    assert report.verdict == "broken"
    assert [(row.name.removeprefix("model."), row.faults) for row in report.problems] == [(name, (said,))]


def test_other_faults(write):
    values = {
        "huge": torch.tensor([[1.0, -3e7]]),
        "huge half": torch.tensor([1.0, 3e4]).half(),
        "tiny": torch.full((4,), 1e-40),
        "zero": torch.zeros(3, 2),
        "bias": torch.zeros(3),
        "mask": torch.tensor([[0.0, -INF], [0.0, 0.0]]),
        "finite mask": torch.tensor([0.0, torch.finfo(torch.float32).min]),
    }
    report = initlab.scan_checkpoint(write(values))
    found = {name: (row.faults, row.notes) for name, row in rows_of(report).items()}
    assert found == {
        "huge": (("huge: up to 3e+07",), ()),
        "huge half": (("huge: up to 3e+04",), ()),
        "tiny": ((), ("100% subnormal",)),
        "zero": ((), ("all zero",)),
        "bias": ((), ()),
        "mask": ((), ("a mask of -inf",)),
        "finite mask": ((), ("a mask",)),
    }
    assert report.verdict == "warning"


def test_views_transposed_and_overlapping(tmp_path):
    whole = torch.arange(60.0).view(6, 10)
    whole[5, 9] = NAN
    torch.save({"t": whole.t(), "rows": whole[:5], "columns": whole[:, ::3], "last": whole[:, 9]}, tmp_path / "w.pt")
    found = {row.name: (row.nonfinite, row.largest) for row in initlab.scan_checkpoint(tmp_path / "w.pt").rows}
    assert found == {"t": (1, 58.0), "rows": (0, 49.0), "columns": (1, 56.0), "last": (1, 49.0)}


def test_moments_of_a_parameter_that_never_had_a_gradient(write):
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.Adam([("used", used), ("unused", unused)])
    used.grad, unused.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    state = optimizer.state_dict()
    flat = {f"state.{i}.{k}": v for i, s in state["state"].items() for k, v in s.items()}
    report = initlab.scan_checkpoint(write(flat))
    assert {row.name.removeprefix("model.") for row in report.problems} == {"state.1.exp_avg", "state.1.exp_avg_sq"}
    assert report.verdict == "warning"


def test_an_optimizers_state_goes_by_the_parameters_names(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "w.pt")
    names = {row.name for row in initlab.scan_checkpoint(tmp_path / "w.pt").rows}
    assert "optimizer.state.weight.exp_avg" in names
    assert "optimizer.state.bias.step" in names


def test_against_an_older_checkpoint(write):
    old, new = tensors(), tensors()
    new["plain"] = old["plain"] * 1.5
    new["brain"][0, 0, 0] = NAN
    new["added"] = torch.ones(2)
    new["half"] = torch.ones(34).half()
    old["gone"] = torch.ones(2)
    report = initlab.scan_checkpoint(write(new, "new"), since=write(old, "old"))
    found = rows_of(report)
    assert found["plain"].change == pytest.approx(1 / 3)
    assert found["plain"].notes == ()
    assert found["double"].notes == ("unchanged",)
    assert found["double"].change == 0
    assert found["added"].notes == ("not in the older checkpoint",)
    assert found["half"].notes == ("was float16 [33] before",)
    assert [name.removeprefix("model.") for name in report.missing] == ["gone"]
    assert [row.name.removeprefix("model.") for row in report.problems] == ["brain"]


# What is damaged, or would run code


class Runs:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_a_malicious_pickle_is_refused_unopened(tmp_path, old):
    mark = tmp_path / "ran"
    torch.save({"weight": torch.ones(2), "x": Runs(mark)}, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"w\.pt holds more than tensors .*mkdir.*Nothing of it was run"):
        initlab.scan_checkpoint(tmp_path / "w.pt")
    assert not mark.exists()


def test_a_malicious_description_is_refused_unopened(tmp_path):
    mark = tmp_path / "ran"
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Runs(mark)))
    with pytest.raises(ValueError, match=r"\.metadata holds more than tensors .*mkdir"):
        initlab.scan_checkpoint(tmp_path / "dcp")
    assert not mark.exists()


def test_a_description_may_not_point_elsewhere(tmp_path):
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with (tmp_path / "dcp" / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    next(iter(metadata.storage_data.values())).relative_path = "../secret"
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    (tmp_path / "secret").write_bytes(b"x")
    with pytest.raises(ValueError, match="outside the folder"):
        initlab.scan_checkpoint(tmp_path / "dcp")


def test_a_file_that_is_cut_short(write):
    path = write(tensors())
    files = [file for file in path.iterdir() if file.suffix == ".distcp"] if path.is_dir() else [path]
    data = files[0].read_bytes()
    for share in (0.0, 0.1, 0.5, 0.999):
        files[0].write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=r"damaged|cut short|no checkpoint|header"):
            initlab.scan_checkpoint(path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        initlab.scan_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        initlab.scan_checkpoint(tmp_path)
    (tmp_path / "w.pt").write_text("weights")
    with pytest.raises(ValueError, match="no checkpoint, or damaged"):
        initlab.scan_checkpoint(tmp_path / "w.pt")


def test_a_folder_is_scanned_as_far_as_it_can_be_read(tmp_path):
    save_file({"w": torch.tensor([NAN])}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"v": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    torch.save(Runs(tmp_path / "ran"), tmp_path / "training_args.bin")
    report = initlab.scan_checkpoint(tmp_path)
    assert {(row.name, row.file) for row in report.rows} == {
        ("w", "model-00001-of-00002.safetensors"),
        ("v", "model-00002-of-00002.safetensors"),
    }
    assert list(report.refused) == [str(tmp_path / "training_args.bin")]
    assert "not read:\n" in str(report)
    assert not (tmp_path / "ran").exists()


def test_parts_join_to_the_whole(write, monkeypatch):
    monkeypatch.setattr(formats, "PART", 7)
    values = {"x": torch.randn(5, 13, generator=torch.Generator().manual_seed(1))}
    row = rows_of(initlab.scan_checkpoint(write(values)))["x"]
    assert row.rms == pytest.approx(float(values["x"].double().square().mean().sqrt()), rel=1e-12)


# The command


@pytest.mark.parametrize(
    ("values", "status"),
    [({"w": torch.ones(2)}, 0), ({"w": torch.tensor([1e9])}, 1), ({"w": torch.tensor([INF])}, 2)],
)
def test_exit_status_and_json(tmp_path, capsys, values, status):
    torch.save(values, tmp_path / "w.pt")
    assert cli.main(["scan", str(tmp_path / "w.pt")]) == status
    assert capsys.readouterr().out.startswith("verdict: ")
    assert cli.main(["scan", str(tmp_path / "w.pt"), "--json"]) == status
    assert json.loads(capsys.readouterr().out)["rows"][0]["name"] == "w"


def test_exit_status_of_a_wrong_call(tmp_path, capsys):
    assert cli.main(["scan", str(tmp_path / "w.pt")]) == 64
    assert "no file or folder" in capsys.readouterr().err
    torch.save(Runs(tmp_path / "ran"), tmp_path / "w.pt")
    assert cli.main(["scan", str(tmp_path / "w.pt")]) == 64
    shutil.rmtree(tmp_path / "ran", ignore_errors=True)
