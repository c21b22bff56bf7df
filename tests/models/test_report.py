"""Reports and digests: what they say, and what they do not depend on."""

import copy
import io
import json
import pickle

import pytest
import torch
from initlab.kernels import Constant, Normal, TruncatedNormal, Uniform
from torch import nn

import initlab


def model():
    tied = nn.ModuleDict({"emb": nn.Embedding(5, 4, padding_idx=-1), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    tied["head"].weight = tied["emb"].weight
    return tied


def test_a_report_is_a_table():
    report = initlab.init_model_(model(), 3, {"mid": "he", "*": "torch"})
    lines = str(report).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[:6]] == [
        *("name", "-" * 10, "emb.weight", "mid.weight", "mid.bias", "head.bias")
    ]
    assert "normal(0, 1); [4] 0" in lines[2]
    assert lines[2].endswith("Embedding, tied: head.weight")
    assert lines[-1] == "4 tensors, 45 elements: recipe torch with rules for mid, seed 3, stream 1"
    assert len({len(line) for line in lines[1:2]}) == 1
    assert not any(line != line.rstrip() for line in lines)


def test_guesses_are_marked():
    class RMSNormOfMine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

    report = initlab.init_model_(nn.Sequential(nn.Linear(3, 3), RMSNormOfMine()), 0, "torch")
    assert [row.name for row in report.guesses] == ["1.weight"]
    lines = str(report).splitlines()
    assert lines[4].endswith("* RMSNormOfMine is called a norm")
    assert lines[-1] == "* 1 guessed, from names or from the order of modules"


def test_plain_data_for_json():
    report = initlab.init_model_(model(), 3, {"mid.bias": TruncatedNormal(0.0, 1.0, 0.0, float("inf"))})
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["seed"] == 3
    emb, _, bias, _ = plain["rows"]
    assert emb["slices"] == [{"dim": 0, "start": 4, "length": 1, "distribution": {"kind": "Constant", "value": 0.0}}]
    assert emb["aliases"] == ["head.weight"]
    assert bias["distribution"]["high"] == "inf"
    assert int(bias["key"], 16) == report.rows[2].key
    assert "digest" not in plain


def test_digests_on_request():
    start = model()
    report = initlab.init_model_(start, 3)
    assert "digest" not in str(report)
    digest = report.digest()
    assert digest == initlab.model_digest(start)
    assert str(report).splitlines()[-1].endswith(f"digest {digest}")
    assert digest.parameters["mid.bias"] in str(report).splitlines()[4]
    plain = report.to_dict()
    assert plain["digest"] == digest.total
    assert [row["digest"] for row in plain["rows"]] == [digest.parameters[row["name"]] for row in plain["rows"]]


def test_a_report_travels_without_its_model():
    start = model()
    report = initlab.init_model_(start, 3, names=lambda name: f"stage.{name}")
    for digests in (None, report.digest()):
        report.digests = digests
        buffer = io.BytesIO()
        torch.save(report, buffer)
        buffer.seek(0)
        for other in (pickle.loads(pickle.dumps(report)), torch.load(buffer, weights_only=False)):
            assert other == report
            assert str(other) == str(report)
            assert other.to_dict() == report.to_dict()
            with pytest.raises(RuntimeError, match=r"is not there: .*unpickled.*initlab\.model_digest\(model\)"):
                other.digest()
            assert pickle.loads(pickle.dumps(other)) == other
    for other in (copy.copy(report), copy.deepcopy(report), copy.deepcopy([start, report])[1]):
        assert other == report
        assert other.digest() == report.digest()  # in this process the model is there
    assert pickle.loads(pickle.dumps(report.digest())) == report.digest()


def test_a_digest_is_of_names_shapes_dtypes_and_bits():
    start = model()
    initlab.init_model_(start, 3)
    digest = initlab.model_digest(start)

    def changed(change):
        other = model()
        initlab.init_model_(other, 3)
        with torch.no_grad():
            replaced = change(other)
            other = replaced if isinstance(replaced, nn.Module) else other
        return initlab.model_digest(other)

    assert changed(lambda m: None) == digest
    assert digest.differing(changed(lambda m: m["mid"].bias[2].neg_())) == ["mid.bias"]
    assert digest.differing(changed(lambda m: m["emb"].weight[0, 0].add_(1e-3))) == ["emb.weight", "head.weight"]
    assert len(digest.differing(changed(lambda m: m.double()))) == 5
    assert changed(lambda m: nn.ModuleDict({"body": m})).total != digest.total
    reshaped = nn.ParameterDict({"w": torch.zeros(2, 3)}), nn.ParameterDict({"w": torch.zeros(3, 2)})
    assert initlab.model_digest(reshaped[0]) != initlab.model_digest(reshaped[1])


def test_a_digest_does_not_depend_on_ties_order_or_wrappers():
    start, untied = model(), model()
    initlab.init_model_(start, 3)
    untied["head"].weight = nn.Parameter(torch.empty(5, 4))
    untied.load_state_dict(start.state_dict())
    digest = initlab.model_digest(start)
    assert initlab.model_digest(untied) == digest
    assert initlab.model_digest(nn.DataParallel(start)) == digest
    assert initlab.model_digest(nn.ModuleDict(dict(reversed(list(start.items()))))) == digest
    assert list(digest.parameters) == sorted(digest.parameters)


def test_what_has_no_digest():
    with torch.device("meta"), pytest.raises(NotImplementedError, match=r"weight: .*materialise it first"):
        initlab.model_digest(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("distribution", "text"),
    [
        (Constant(0.25), "0.25"),
        (Constant(1 + 2j), "(1+2j)"),
        (Uniform(-0.5, 0.5), "uniform[-0.5, 0.5)"),
        (Normal(0.0, 0.02), "normal(0, 0.02)"),
        (TruncatedNormal(0.0, 0.02, -0.04, float("inf")), "truncated(0, 0.02, [-0.04, inf])"),
    ],
)
def test_distributions_in_a_few_characters(distribution, text):
    assert str(distribution) == text
