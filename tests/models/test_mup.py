"""muP: distributions and learning rates against the paper's table, and the coordinate check."""

import copy
import importlib.util
import math
import pickle
from pathlib import Path

import pytest
import torch
from initlab.kernels import Constant, Normal
from torch import nn

import initlab
from initlab import recipes

ROOT = Path(__file__).parents[2]


class Model(nn.Module):
    def __init__(self, width, tied=False, experts=1):
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.position = nn.Parameter(torch.zeros(1, 7, width))
        self.attention = nn.MultiheadAttention(width, width // 8)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50, bias=False)
        self.temperature = nn.Parameter(torch.ones(()))
        if tied:
            self.head.weight = self.embedding.weight


PLAIN = {"position": Normal(0.0, 0.02), "temperature": Constant(1.0), "*": recipes.he(distribution="normal")}
ROLES = {
    "hidden": ("attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight"),
    "output": ("head.weight",),
    "same": (
        *("embedding.weight", "position", "norm.weight", "norm.bias", "temperature", "up.bias", "down.bias"),
        *("attention.in_proj_bias", "attention.out_proj.bias"),
    ),
}


def test_distributions_are_those_of_the_table():
    recipe = recipes.mup(Model(16), PLAIN)
    base = {row.name: row.std for row in initlab.plan_model(Model(16), 0, PLAIN).rows}
    found = {row.name: row for row in initlab.plan_model(Model(16 * 9), 0, recipe).rows}
    assert found.keys() == {name for names in ROLES.values() for name in names}
    for role, factor in (("hidden", 1 / 3), ("output", 1 / 9), ("same", 1.0)):
        for name in ROLES[role]:
            assert found[name].std == pytest.approx(base[name] * factor), name
    assert found["up.weight"].why == "muP hidden, 9 times the base: Linear"


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_learning_rates_are_those_of_the_table(optimizer):
    model = Model(64)
    model.norm.bias.requires_grad_(False)
    groups = recipes.mup(Model(16), PLAIN).param_groups(model, 0.1, 0.01, optimizer)
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    rates = {names[id(tensor)]: group["lr"] for group in groups for tensor in group["params"]}
    assert rates.keys() == {name for names in ROLES.values() for name in names} - {"norm.bias"}
    of_role = {"adam": (0.025, 0.025, 0.1), "sgd": (0.1, 0.025, 0.4)}[optimizer]
    for role, rate in zip(("hidden", "output", "same"), of_role, strict=True):
        for name in set(ROLES[role]) & rates.keys():
            expected = 0.1 if name == "temperature" else rate
            assert rates[name] == pytest.approx(expected), name
    assert all(group["lr"] * group["weight_decay"] == pytest.approx(0.001) for group in groups)
    assert len(groups) == len({group["lr"] for group in groups})
    torch.optim.AdamW(groups)


def test_a_model_as_wide_as_the_base_starts_by_the_recipe():
    for recipe in ("own", "gpt2"):
        mine = {"position": Constant(0.0), "temperature": Constant(1.0), "*": recipe}
        first, second = Model(16), Model(16)
        assert initlab.init_model_(first, 3, recipes.mup(Model(16), mine)).rows
        initlab.init_model_(second, 3, mine)
        assert initlab.model_digest(first) == initlab.model_digest(second)


def test_meta_base_pickles_and_keeps_no_model():
    with torch.device("meta"):
        base = Model(16)
    recipe = recipes.mup(base, PLAIN)
    again = pickle.loads(pickle.dumps(recipe))
    model = Model(32)
    plans = [initlab.plan_model(model, 0, each).rows for each in (recipe, again, copy.deepcopy(recipe))]
    assert plans[0] == plans[1] == plans[2]
    rules = initlab.plan_model(model, 0, {"head": Constant(0.0), "*": recipe})
    assert next(row for row in rules.rows if row.name == "head.weight").distribution == Constant(0.0)


def test_padding_rows_and_fused_projections_grow_with_the_model():
    def build(width):
        return nn.ModuleDict(
            {
                "embedding": nn.Embedding(9, width, padding_idx=2),
                "layers": nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)}) for _ in range(2)),
            }
        )

    recipe = recipes.mup(build(8), recipes.deepnorm(residual="*.qkv"))
    rows = {row.name: row for row in initlab.plan_model(build(16), 0, recipe).rows}
    assert rows["embedding.weight"].slices[0][0] == (0, 2, 1)
    assert rows["layers.0.qkv.weight"].slices[0][0] == (0, 0, 32)


def test_what_cannot_be_compared_is_refused_by_name():
    class Square(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.mix = nn.Parameter(torch.zeros(width, width))

    recipe = recipes.mup(Square(4), Constant(0.0))
    with pytest.raises(ValueError, match=r"mix \(in Square\): two of its dimensions grow"):
        initlab.plan_model(Square(8), 0, recipe)
    with pytest.raises(ValueError, match=r"mix \(in Square\): two of its dimensions grow"):
        recipe.param_groups(Square(8), 0.1)
    with pytest.raises(ValueError, match=r"1\.weight \(in Linear\): the base model has no parameter of this name"):
        initlab.plan_model(
            nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 8)), 0, recipes.mup(nn.Sequential(nn.Linear(2, 4)))
        )
    with pytest.raises(ValueError, match="optimizer is 'muon'"):
        recipes.mup(Model(8), PLAIN).param_groups(Model(16), 0.1, optimizer="muon")
    with pytest.raises(TypeError, match=r"base is 128 \(int\)"):
        recipes.mup(128)
    with pytest.raises(ValueError, match=r"recipes\.mup\(base\)"):
        initlab.plan_model(Model(8), 0, "mup")


def test_a_tied_head_is_an_output_and_warned_of():
    recipe = recipes.mup(Model(16, tied=True), PLAIN)
    with pytest.warns(UserWarning, match=r"embedding\.weight is the head as well as the embedding"):
        report = initlab.plan_model(Model(256, tied=True), 0, recipe)
    assert next(row for row in report.rows if row.aliases).std <= 4 / 256
    rates = {group["lr"]: len(group["params"]) for group in recipe.param_groups(Model(256, tied=True), 1.0)}
    assert rates == {1.0: 8, 1 / 16: 5}


@pytest.mark.long  # trains
def test_coordinates_do_not_depend_on_the_width():
    """Without muP they do: the larger model's change more with each step, and the check can fail."""
    where = importlib.util.spec_from_file_location("coordinate_check", ROOT / "tools" / "coordinate_check.py")
    tool = importlib.util.module_from_spec(where)
    where.loader.exec_module(tool)
    widths = (64, 128, 256)
    with_mup = tool.spread([tool.sizes(width, 64, steps=6) for width in widths])
    without = tool.spread([tool.sizes(width, None, steps=6) for width in widths])
    assert max(with_mup.values()) < 2.0
    assert without["logits"] > 2.5
    assert math.isfinite(without["block 1"])
