"""Recipes for residual branches and experts, against closed forms, the published code's numbers and outputs."""

import math

import pytest
import torch
from initlab.kernels import Constant, TruncatedNormal, Uniform
from torch import nn

import initlab
from initlab import recipes

WIDTH, LAYERS = 16, 6


class Block(nn.Module):
    """A pre-norm block, with the names of Llama."""

    def __init__(self, width=WIDTH):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.gate_proj, self.up_proj = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down_proj, self.norm = nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.o_proj(self.v_proj(self.norm(x)))
        return x + self.down_proj(torch.relu(self.gate_proj(self.norm(x))) * self.up_proj(self.norm(x)))


class Model(nn.Module):
    def __init__(self, block=Block, layers=LAYERS):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(50, WIDTH), nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 50)


def rows(model, recipe, **named):
    return {row.name: row for row in initlab.plan_model(model, 0, recipe, **named).rows}


def test_depth_scaled_is_torchtitans():
    """depth_scaled_std(0.02, layer_id) = 0.02 / sqrt(2 (layer_id + 1))."""
    for recipe, std in (("depth_scaled", 0.02), (recipes.depth_scaled(0.1), 0.1)):
        found = rows(Model(), recipe)
        for layer in range(LAYERS):
            for name in ("o_proj", "down_proj"):
                row = found[f"layers.{layer}.{name}.weight"]
                assert row.distribution == TruncatedNormal(0.0, std / (2 * (layer + 1)) ** 0.5, -2.0, 2.0)
            assert found[f"layers.{layer}.gate_proj.weight"].distribution == TruncatedNormal(0.0, std, -2.0, 2.0)
        assert found["head.weight"].std == found["embedding.weight"].std == pytest.approx(std)
        assert found["layers.3.norm.weight"].distribution == Constant(1.0)
        assert found["layers.3.down_proj.bias"].distribution == Constant(0.0)


def test_mitchell_is_olmos():
    found = rows(Model(), "mitchell")
    for layer in range(LAYERS):
        for name, fan, depth in (
            ("o_proj", WIDTH, 2 * (layer + 1)),
            ("down_proj", 4 * WIDTH, 2 * (layer + 1)),
            ("q_proj", WIDTH, 1),
        ):
            distribution = found[f"layers.{layer}.{name}.weight"].distribution
            std = 1 / math.sqrt(fan * depth)
            assert distribution.std == pytest.approx(std)
            assert (distribution.low, distribution.high) == pytest.approx((-3 * std, 3 * std))
    assert found["embedding.weight"].distribution.std == pytest.approx(WIDTH**-0.5)


def test_the_depth_of_a_stage_is_that_of_the_whole_model():
    whole = rows(Model(), "depth_scaled")
    stage = nn.ModuleList(Block() for _ in range(2))
    found = rows(stage, "depth_scaled", names=lambda name: f"layers.{4 + int(name[0])}{name[1:]}")
    assert all(found[name].std == whole[name].std for name in found)
    alone = rows(Block(), "depth_scaled", names="layers.5")
    assert all(alone[name].std == whole[name].std for name in alone)


@pytest.mark.parametrize("layers", [6, 18])
def test_deepnorm_has_the_constants_of_the_paper(layers):
    """Table 1: encoder-only and decoder-only models have alpha = (2 N)^(1/4), beta = (8 N)^(-1/4)."""
    found = rows(Model(layers=layers), "deepnorm")
    alpha, beta = (2 * layers) ** 0.25, (8 * layers) ** -0.25
    xavier = math.sqrt(2 / (2 * WIDTH))
    for name, gain in (("q_proj", 1.0), ("k_proj", 1.0), ("v_proj", beta), ("o_proj", beta)):
        assert found[f"layers.2.{name}.weight"].std == pytest.approx(gain * xavier)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert found[f"layers.2.{name}.weight"].std == pytest.approx(beta * math.sqrt(2 / (5 * WIDTH)))
    assert found["head.weight"].std == pytest.approx(math.sqrt(2 / (50 + WIDTH)))
    assert f"{alpha:.4g} * x" in found["layers.2.up_proj.weight"].why


def test_deepnorm_of_an_encoder_and_a_decoder():
    model = nn.ModuleDict({"encoder": Model(layers=3), "decoder": Model(layers=5)})
    n, m = 3, 5
    for recipe in ("deepnorm", recipes.deepnorm(layers=5, encoder_layers=3)):
        found = rows(model, recipe)
        base = math.sqrt(2 / (2 * WIDTH))
        assert found["encoder.layers.0.v_proj.weight"].std == pytest.approx(0.87 * (n**4 * m) ** (-1 / 16) * base)
        assert found["decoder.layers.0.v_proj.weight"].std == pytest.approx((12 * m) ** -0.25 * base)
        assert f"{(3 * m) ** 0.25:.4g} * x" in found["decoder.layers.0.v_proj.weight"].why
        assert f"{0.81 * (n**4 * m) ** (1 / 16):.4g} * x" in found["encoder.layers.0.v_proj.weight"].why


def test_deepnorm_of_a_fused_projection():
    class Fused(nn.Module):
        def __init__(self, name="qkv", rows=3 * WIDTH):
            super().__init__()
            setattr(self, name, nn.Linear(WIDTH, rows))
            self.out_proj = nn.Linear(WIDTH, WIDTH)

    model = Model(Fused, 2)
    initlab.init_model_(model, 0, "deepnorm")
    stds = [float(part.std()) for part in model.layers[0].qkv.weight.detach().chunk(3)]
    xavier = math.sqrt(2 / (2 * WIDTH))
    assert stds == pytest.approx([xavier, xavier, xavier * 16**-0.25], rel=0.2)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 32), 2, enable_nested_tensor=False)
    assert rows(encoder, "deepnorm")["layers.0.self_attn.in_proj_weight"].slices[0][0] == (0, 0, 2 * WIDTH)
    for build in (lambda: Fused("query_key_value"), lambda: Fused(rows=2 * WIDTH)):
        with pytest.raises(ValueError, match=r"interleaved or not equal"):
            initlab.plan_model(Model(build, 2), 0, "deepnorm")
    with pytest.raises(ValueError, match=r"found no blocks.*deepnorm\(residual="):
        initlab.plan_model(nn.Sequential(nn.Linear(2, 2)), 0, "deepnorm")
    with pytest.raises(ValueError, match=r"a stage shows 2 blocks.*deepnorm\(layers=L\)"):
        initlab.plan_model(Model(layers=2), 0, "deepnorm", names="part")


def test_a_post_norm_model_of_many_layers_keeps_its_size_under_deepnorm():
    """A branch adds little to alpha x, the less the more there are."""
    layers = 200
    model = Model(layers=layers)
    initlab.init_model_(model, 0, "deepnorm")
    alpha, x = (2 * layers) ** 0.25, torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        share = [float(b.o_proj(b.v_proj(x)).std() / (alpha * x).std()) for b in model.layers]
    expected = (8 * layers) ** -0.5 / alpha
    assert sum(share) / layers == pytest.approx(expected, rel=0.2)


def test_small_embedding():
    found = rows(Model(), "small_embedding")
    assert found["embedding.weight"].distribution == Uniform(-1e-4, 1e-4)
    assert found["head.weight"].distribution == rows(Model(), "own")["head.weight"].distribution
    found = rows(Model(), recipes.small_embedding(0.01, "he"))
    assert found["embedding.weight"].distribution == Uniform(-0.01, 0.01)
    assert found["head.weight"].std == pytest.approx(math.sqrt(2 / WIDTH))
    with pytest.raises(ValueError, match=r"no torch\.nn\.Embedding"):
        initlab.plan_model(nn.Linear(2, 2), 0, "small_embedding")
    with pytest.raises(ValueError, match=r"scale is -1\.0"):
        recipes.small_embedding(-1)


@pytest.mark.parametrize("recipe", ["zero_residual", recipes.zero_residual(recipe="he")])
def test_blocks_start_as_the_identity(recipe):
    model = Model()
    initlab.init_model_(model, 0, recipe)
    x = torch.randn(5, WIDTH)
    for block in model.layers:
        assert torch.equal(block(x), x)
    assert float(model.layers[0].up_proj.weight.detach().std()) > 0
    assert float(model.head.weight.detach().std()) > 0


def test_zero_residual_of_a_resnet_is_torchvisions():
    """zero_init_residual: bn3 of a bottleneck, bn2 of a basic block, and nothing else."""

    class Basic(nn.Module):
        def __init__(self, norms):
            super().__init__()
            for index in range(1, norms + 1):
                setattr(self, f"conv{index}", nn.Conv2d(4, 4, 3, padding=1, bias=False))
                setattr(self, f"bn{index}", nn.BatchNorm2d(4))
            self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    model = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3), "bn1": nn.BatchNorm2d(4)})
    model["layer1"], model["layer2"] = nn.Sequential(Basic(2), Basic(2)), nn.Sequential(Basic(3))
    found = rows(model, "zero_residual")
    zero = {name for name, row in found.items() if row.distribution == Constant(0.0) and name.endswith("weight")}
    assert zero == {"layer1.0.bn2.weight", "layer1.1.bn2.weight", "layer2.0.bn3.weight"}
    with pytest.raises(ValueError, match=r"nothing to set to zero.*zero_residual\(residual="):
        initlab.plan_model(nn.Linear(2, 2), 0, "zero_residual")


# ---------------------------------------------------------------------------------------------------------------
# Experts in one parameter


class Experts(nn.Module):
    """As transformers has them, in either order."""

    def __init__(self, transposed, marked, width=48, inner=80, **attributes):
        super().__init__()
        self.num_experts = 4
        if marked:
            self.is_transposed = transposed
        else:
            self.hidden_dim = width
        up, down = ((width, 2 * inner), (inner, width)) if transposed else ((2 * inner, width), (width, inner))
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.empty(4, *up)), nn.Parameter(torch.empty(4, *down))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 2 * inner))
        vars(self).update(attributes)

    def _init_weights(self, module):
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)
        nn.init.zeros_(self.gate_up_proj_bias)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_an_expert_has_the_fans_of_a_linear_layer(transposed, marked):
    experts = Experts(transposed, marked)
    for recipe in ("he", "xavier", "lecun", recipes.he("fan_out"), "mitchell"):
        found, up, down = rows(experts, recipe), *(nn.Linear(*s, bias=False) for s in ((48, 80), (80, 48)))
        assert found["gate_up_proj"].std == pytest.approx(rows(up, recipe)["weight"].std)
        assert found["down_proj"].std == pytest.approx(rows(down, recipe)["weight"].std)
        assert not found["down_proj"].guess
    initlab.init_model_(experts, 0, "lecun")
    x = torch.randn(500, 48)
    weight = experts.gate_up_proj[1] if transposed else experts.gate_up_proj[1].T
    assert float((x @ weight.detach()).std()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("recipe", ["he", "xavier", "lecun", "auto", "mitchell", "deepnorm"])
def test_experts_that_say_nothing_are_refused_by_name(recipe):
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"c_proj": nn.Linear(4, 4)}) for _ in range(2))})
    for experts in (Experts(True, marked=False, width=80), Experts(True, marked=False, hidden_dim=7)):
        model["experts"] = experts
        with pytest.raises(ValueError, match=r"experts.down_proj \(in Experts\): the weights of experts in one param"):
            initlab.plan_model(model, 0, recipe)


@pytest.mark.long  # transformers
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("MixtralForCausalLM", {"num_local_experts": 4}),
        ("Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 40, "head_dim": 16}),
        ("GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 16}),
        ("Llama4ForCausalLM", {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 80}),
    ],
)
def test_experts_of_transformers(name, settings):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = kind(kind.config_class(**common, **heads, **settings))
    found = rows(model, "lecun")
    inner = settings.get("moe_intermediate_size", 64)
    up = [row for row in found.values() if row.name.endswith("experts.gate_up_proj")]
    down = [row for row in found.values() if row.name.endswith("experts.down_proj")]
    assert [row.std for row in up] == pytest.approx([32**-0.5] * len(up))
    assert [row.std for row in down] == pytest.approx([inner**-0.5] * len(down))
    assert up
    assert down
