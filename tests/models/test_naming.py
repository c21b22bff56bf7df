"""Canonical names: wrappers, ties, stages, and memory that parameters share."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from initlab.models.memory import shared_memory
from initlab.models.naming import tensor_refs, walk
from initlab.models.patterns import compile_pattern, matches


def mlp():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), nn.BatchNorm1d(2))


def names_of(model, names=None):
    return [ref.name for group in tensor_refs(model, names) for ref in group]


class Ddp(nn.parallel.DistributedDataParallel):
    """By its class one of torch's, without the process group that it wants."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def test_the_names_are_torchs():
    model = mlp()
    expected = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
    assert names_of(model) == expected
    assert [name for name, _ in walk(model)] == [name for name, _ in model.named_modules()]


def compiled(module):
    return torch.compile(module, backend="eager")  # inductor's import warns


@pytest.mark.parametrize("wrap", [Ddp, nn.DataParallel, compiled, checkpoint_wrapper], ids=lambda w: w.__name__)
def test_wrappers_leave_no_trace(wrap):
    plain = names_of(mlp())
    assert names_of(wrap(mlp())) == plain
    inner = mlp()
    inner[1][1] = wrap(inner[1][1])
    assert names_of(inner) == plain
    assert names_of(wrap(inner)) == plain


def test_a_wrapper_is_told_by_its_class_not_by_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "_orig_mod": nn.Linear(2, 2)})
    assert names_of(model)[0] == "module.weight"
    assert "_orig_mod.weight" in names_of(model)


def test_a_tied_weight_has_its_smallest_name_and_its_first_owner():
    model = nn.ModuleDict({"out": nn.Linear(3, 4, bias=False), "emb": nn.Embedding(4, 3)})
    model["out"].weight = model["emb"].weight
    (ref,), _ = tensor_refs(model)
    assert (ref.name, ref.names) == ("emb.weight", ("out.weight", "emb.weight"))
    assert (ref.module, ref.attribute, ref.module_name) == (model["out"], "weight", "out")
    assert ref.places == ((model["out"], "weight"), (model["emb"], "weight"))


def test_smallest_is_by_bytes():
    shared = nn.Linear(1, 1, bias=False)
    model = nn.ModuleDict({"a": shared, "B": shared, "é": shared, "z": shared, "10": shared, "9": shared})
    (ref,), _ = tensor_refs(model)
    assert ref.name == "10.weight" == min(name.encode() for name in ref.names).decode()


def test_a_module_registered_twice_has_both_names():
    shared = nn.Linear(2, 2)
    (weight, bias), _ = tensor_refs(nn.Sequential(shared, nn.ReLU(), shared))
    assert weight.names == ("0.weight", "2.weight")
    assert bias.names == ("0.bias", "2.bias")


@pytest.mark.parametrize("names", ["stage.3", "stage.3.", lambda name: f"stage.3.{name}"], ids=["bare", "dot", "call"])
def test_stages_map_their_names(names):
    assert names_of(nn.Linear(2, 2), names) == ["stage.3.weight", "stage.3.bias"]


def test_an_empty_prefix_changes_nothing():
    assert names_of(nn.Linear(2, 2), "") == ["weight", "bias"]


def test_a_collision_names_both():
    with pytest.raises(ValueError, match=r"'same'.*weight and bias.*names="):
        tensor_refs(nn.Linear(2, 2), lambda name: "same")
    wrapped = nn.Module()
    wrapped.register_module("a", nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"a\.weight and a\.bias"):
        tensor_refs(wrapped, lambda name: name.replace("bias", "weight"))


@pytest.mark.parametrize("names", [lambda name: None, lambda name: "", lambda name: 3, 7])
def test_junk_names(names):
    with pytest.raises(TypeError, match="names"):
        tensor_refs(nn.Linear(2, 2), names)


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("h.0", ["h.0.w", "h.0.ln.w"]),
        ("h", ["h.0.w", "h.0.ln.w", "h.10.w"]),
        ("h.*.w", ["h.0.w", "h.0.ln.w", "h.10.w"]),
        ("h.?.w", ["h.0.w"]),
        ("*.ln", ["h.0.ln.w"]),
        ("H.*", []),
        ("h.1", []),
        ("head.w", ["head.w"]),
        ("h*", ["h.0.w", "h.0.ln.w", "h.10.w", "head.w"]),
    ],
)
def test_patterns(pattern, selected):
    every = ["h.0.w", "h.0.ln.w", "h.10.w", "head.w"]
    assert [name for name in every if matches(name, pattern)] == selected
    assert list(filter(compile_pattern(pattern, every), every)) == selected


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("w[0]", ["w[0]"]),
        ("w[1]", ["w1"]),  # no exact name: a glob
        ("h[0]", ["h[0].w", "h[0].ln.w"]),
        ("h[0].*", ["h[0].w", "h[0].ln.w"]),
        ("h[0].ln", ["h[0].ln.w"]),
        ("h[0].l?.w", ["h[0].ln.w"]),
        ("h[0", []),
        ("*.w", ["h[0].w", "h[0].ln.w", "h0.w", "h0.ln.w"]),
        ("a*b", ["a*b"]),
        ("a?b", ["a*b", "axb"]),
    ],
)
def test_an_exact_name_comes_before_a_glob(pattern, selected):
    every = ["w[0]", "w0", "w1", "h[0].w", "h[0].ln.w", "h0.w", "h0.ln.w", "a*b", "axb"]
    assert list(filter(compile_pattern(pattern, every), every)) == selected
    assert pattern not in every or matches(pattern, pattern)


# ---------------------------------------------------------------------------------------------------------------
# Shared memory


def holding(**tensors):
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor))
    return tensor_refs(model)[0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_that_meet(device):
    x = torch.empty(6, 4, device=device)
    assert shared_memory(holding(a=x, b=x.view(24))) == [("a", "b")]
    assert shared_memory(holding(a=x[:4], b=x[3:])) == [("a", "b")]
    assert shared_memory(holding(a=x[:, :3], b=x[:, 2:])) == [("a", "b")]
    assert shared_memory(holding(a=x, b=x[5], c=x[0])) == [("a", "c"), ("a", "b")]
    assert shared_memory(holding(a=x, b=x.view(torch.int32).view(torch.float32)[:2, ::2])) == [("a", "b")]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_of_one_storage_that_do_not_meet(device):
    x = torch.empty(6, 4, device=device)
    assert shared_memory(holding(a=x[:3], b=x[3:])) == []
    assert shared_memory(holding(a=x[:, :2], b=x[:, 2:])) == []  # interleaved
    assert shared_memory(holding(a=x[::2], b=x[1::2])) == []
    assert shared_memory(holding(a=x[:0], b=x)) == []


def test_nothing_shared_in_copies():
    model = mlp()
    assert shared_memory(tensor_refs(nn.ModuleList([model, copy.deepcopy(model)]))[0]) == []
