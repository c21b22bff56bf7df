"""init_model_: the same bits however a model came about, or a clear error and nothing written."""

import copy
import functools
import gc
import re
import threading

import numpy as np
import pytest
import torch
from initlab.kernels import Constant, Draw, Normal, TruncatedNormal, Uniform, fill_, named_key
from initlab.kernels.sampling._maps import map_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import initlab
from initlab.models import initialization


class Block(nn.Module):
    def __init__(self, order=("attn", "norm", "mlp")):
        super().__init__()
        make = {
            "attn": lambda: nn.MultiheadAttention(8, 2),
            "norm": lambda: nn.LayerNorm(8),
            "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        }
        for name in order:
            setattr(self, name, make[name]())


def net(blocks=2, order=("attn", "norm", "mlp")):
    """Embedding, blocks, a tied head, a convolution, a recurrent layer and running statistics."""
    model = nn.ModuleDict(
        {
            "emb": nn.Embedding(11, 8, padding_idx=3),
            "blocks": nn.ModuleList(Block(order) for _ in range(blocks)),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "norm": nn.BatchNorm2d(6),
            "lstm": nn.LSTM(8, 5, num_layers=2),
            "head": nn.Linear(8, 11, bias=False),
        }
    )
    model["head"].weight = model["emb"].weight
    return model


def on_meta(build=net, **arguments):
    with torch.device("meta"):
        return build(**arguments)


def state(model):
    """Every parameter and buffer, copied: what must not change where a call fails."""
    return {
        name: (tensor, tensor.is_meta or tensor.detach().clone(), tensor._version)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def unchanged(model, before):
    now = model.state_dict(keep_vars=True)
    assert now.keys() == before.keys()
    for name, (tensor, values, version) in before.items():
        assert now[name] is tensor, name
        assert tensor._version == version, name
        assert tensor.is_meta or torch.equal(tensor.nan_to_num(), values.nan_to_num()), name


@pytest.fixture
def refused():
    """`refused(error, match, model, ...)`: init_model_ raises, and has not touched the model or a generator."""

    def refused(error, match, model, *arguments, **named):
        before, generator = state(model), torch.get_rng_state()
        with pytest.raises(error, match=match) as caught:
            initlab.init_model_(model, *(arguments or (0,)), **named)
        unchanged(model, before)
        assert torch.equal(torch.get_rng_state(), generator)
        return str(caught.value)

    return refused


def digest_of(model, seed=7, recipe="torch", **arguments):
    initlab.init_model_(model, seed, recipe, **arguments)
    return initlab.model_digest(model)


# ---------------------------------------------------------------------------------------------------------------
# Equal bits


def test_values_are_those_of_the_names():
    model = net()
    report = initlab.init_model_(model, seed=7, recipe={"*.mlp": Normal(0.0, 0.02), "*": "torch"})
    distributions = {"blocks.1.mlp.0.weight": Normal(0.0, 0.02), "conv.weight": Uniform(-1 / 18**0.5, 1 / 18**0.5)}
    for name, distribution in distributions.items():
        parameter = model.get_parameter(name)
        expected = torch.empty(parameter.shape)
        fill_([Draw(expected, distribution, named_key(7, name))])
        assert torch.equal(parameter, expected)
    assert {row.name: row.key for row in report.rows}["conv.weight"] == named_key(7, "conv.weight")


@pytest.mark.parametrize("recipe", ["torch", "own", "he", "xavier", "lecun", "gpt2", "trunc_normal", "auto"])
def test_how_a_model_came_about_does_not_show(recipe):
    recipe = initlab.recipes.own(check=False) if recipe == "own" else recipe  # one of them is filled before
    whole = digest_of(net(), recipe=recipe)
    reverse = net(order=("mlp", "norm", "attn"))
    reverse = nn.ModuleDict({"emb": reverse["emb"], **dict(reversed(list(reverse.items())))})  # the first owner stays
    ways = {
        "order of construction": digest_of(reverse, recipe=recipe),
        "meta": digest_of(on_meta(), recipe=recipe, device="cpu"),
        "device given": digest_of(net(), recipe=recipe, device="cpu"),
        "filled before": digest_of((lambda m: initlab.init_model_(m, 1, "he") and m)(net()), recipe=recipe),
        "copied": digest_of(copy.deepcopy(net()), recipe=recipe),
    }
    assert {way: names for way, digest in ways.items() if (names := whole.differing(digest))} == {}
    assert digest_of(net(), seed=8, recipe=recipe).total != whole.total


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_show(threads):
    before = torch.get_num_threads()
    big = nn.Sequential(nn.Linear(1030, 1040), nn.Embedding(1500, 400))
    whole = digest_of(big)
    torch.set_num_threads(threads)
    try:
        assert digest_of(big, seed=8).total != whole.total
        assert digest_of(big) == whole
    finally:
        torch.set_num_threads(before)


def test_both_backends(backend):
    """A golden value: names, keys, distributions and stream at once."""
    assert digest_of(net(), recipe="gpt2").total == "038b7f6428a37ae5"


def test_a_part_alone_under_its_whole_name():
    whole = net()
    initlab.init_model_(whole, 7)
    stage = net()["blocks"][1]
    initlab.init_model_(stage, 7, names="blocks.1")
    assert torch.equal(stage.mlp[0].weight, whole["blocks"][1].mlp[0].weight)
    assert (
        initlab.model_digest(stage, names="blocks.1").parameters.items()
        <= initlab.model_digest(whole).parameters.items()
    )


def test_only_part_by_part_gives_the_whole():
    whole, parts = net(), net()
    expected = digest_of(whole)
    order = ["head", ["conv", "norm"], lambda name, p: name.startswith("lstm"), "blocks.1", "blocks.0.*"]
    for only in order:
        initlab.init_model_(parts, 7, only=only)
    assert initlab.model_digest(parts) == expected


def test_only_leaves_the_rest_alone():
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    statistics = model["norm"].running_mean.fill_(5.0)._version
    report = initlab.init_model_(model, 7, only=["conv.weight", "blocks.0.mlp"])
    filled = {row.name for row in report.rows}
    assert filled == {"conv.weight", *(f"blocks.0.mlp.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias"))}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in filled), name
    assert model["norm"].running_mean._version == statistics


def test_a_tied_weight_is_selected_by_any_of_its_names():
    report = initlab.init_model_(net(), 7, only="head")
    assert [(row.name, row.aliases) for row in report.rows] == [("emb.weight", ("head.weight",))]


def test_a_tied_weight_has_the_distribution_of_its_first_owner():
    for order in (("emb", "head"), ("head", "emb")):
        model = nn.ModuleDict({"emb": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
        model["head"].weight = model["emb"].weight
        for recipe in ("torch", "own"):
            report = initlab.init_model_(nn.ModuleDict({name: model[name] for name in order}), 0, recipe)
            (row,) = report.rows
            assert isinstance(row.distribution, Normal if order[0] == "emb" else Uniform)
            assert row.name == "emb.weight"
            assert row.key == named_key(0, "emb.weight")


def test_only_what_transformers_has_not_loaded():
    model = net()
    for name, p in model.named_parameters():
        p._is_hf_initialized = name != "conv.weight"
    report = initlab.init_model_(model, 7, only=lambda name, p: "norm" not in name and initlab.not_loaded(name, p))
    assert [row.name for row in report.rows] == ["conv.weight"]


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, functools.partial(torch.compile, backend="eager"), checkpoint_wrapper],
    ids=["parallel", "compile", "checkpoint"],
)
def test_wrappers_do_not_show(wrap):
    plain, wrapped = net(), net()
    wrapped["blocks"][0].mlp = wrap(wrapped["blocks"][0].mlp)
    assert digest_of(wrap(wrapped)) == digest_of(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_holds_the_rounding_of_the_same_draw(dtype):
    single, half = net(), net().to(dtype)
    for model in (single, half):
        initlab.init_model_(model, 7, "trunc_normal")
    for a, b in zip(single.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.to(dtype), b)


def test_memory_format_does_not_show():
    strided = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    with torch.device("meta"):
        meta = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    assert digest_of(strided) == digest_of(nn.Conv2d(4, 6, 3)) == digest_of(meta, device="cpu")
    assert meta.weight.is_contiguous(memory_format=torch.channels_last)


def test_generators_stay_where_they_are_and_threads_do_not_mix():
    expected = [digest_of(net(), seed).total for seed in range(6)]
    generator = torch.get_rng_state()
    found = [None] * 6

    def work(seed):
        found[seed] = digest_of(on_meta() if seed % 2 else net(), seed, device="cpu").total

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == expected
    # Building a model draws, filling does not: the copies of net() above were built in other threads.
    model = net()
    generator = torch.get_rng_state()
    initlab.init_model_(model, 7)
    assert torch.equal(torch.get_rng_state(), generator)


def test_padding_rows_and_running_statistics():
    model = net()
    model["norm"].running_var.fill_(9.0)
    model["norm"].num_batches_tracked.fill_(4)
    initlab.init_model_(model, 7, Normal(0.0, 1.0), only=["emb", "norm"])
    assert not model["emb"].weight[3].any()
    assert model["emb"].weight[[0, 1, 2, 4]].all()
    assert (model["norm"].running_var == 1).all()
    assert model["norm"].num_batches_tracked == 0


def test_seeds_are_integers_of_64_bits(refused):
    model = nn.Linear(2, 2)
    assert digest_of(model, -1) == digest_of(model, 2**64 - 1)
    refused(ValueError, "seed is", model, 2**64)
    for seed in (0.5, None, "0", b"0", [0], torch.tensor(0.5), torch.tensor([1, 2]), torch.tensor(3, device="meta")):
        refused(TypeError, r"(?s)^seed is .* it must be an integer, .*init_model_\(model, seed=0\)", model, seed)
        with pytest.raises(TypeError, match="seed is"):
            initlab.plan_model(model, seed)
    assert digest_of(model, np.int64(3)) == digest_of(model, np.uint8(3)) == digest_of(model, 3)
    assert digest_of(model, torch.tensor(3)) == digest_of(model, 3)


# ---------------------------------------------------------------------------------------------------------------
# Materialising


def test_from_meta_straight_onto_the_device():
    model = on_meta()
    model["conv"].weight.tensor_parallel = "column"
    model["conv"].bias.requires_grad_(False)
    report = initlab.init_model_(model, 7, device="cpu")
    assert all(p.device.type == "cpu" and type(p) is nn.Parameter for p in model.parameters())
    assert model["conv"].weight.tensor_parallel == "column"
    assert not model["conv"].bias.requires_grad
    assert model["conv"].weight.requires_grad
    assert model["head"].weight is model["emb"].weight
    assert {row.name for row in report.rows} >= {name for name, _ in model.named_parameters()}
    # A recurrent layer keeps a list of its parameters beside their names.
    out, _ = model["lstm"](torch.ones(3, 1, 8))
    reference = net()
    initlab.init_model_(reference, 7)
    assert torch.equal(out, reference["lstm"](torch.ones(3, 1, 8))[0])
    out.sum().backward()
    assert model["lstm"].weight_hh_l1.grad is not None


def test_a_parameter_class_of_the_users():
    class Marked(nn.Parameter):
        pass

    model = on_meta(lambda: nn.Linear(2, 2))
    model.weight = Marked(model.weight.data)
    initlab.init_model_(model, 7, device="cpu")
    assert type(model.weight) is Marked
    assert model.weight.requires_grad


def test_real_parameters_keep_their_identity():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = dict(model.named_parameters())
    initlab.init_model_(model, 7, device="cpu")
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in model.named_parameters())
    assert optimizer.param_groups[0]["params"][0] is model["emb"].weight


def test_moving_to_another_device(monkeypatch):
    """cpu:0 stands for it: to torch another device than cpu, with the same memory."""
    monkeypatch.setattr(initialization, "resolved_device", torch.device)
    model = net()
    model["norm"].running_mean.fill_(3.0)
    model["conv"].weight.grad = torch.ones_like(model["conv"].weight)
    parameters, conv = dict(model.named_parameters()), model["conv"].weight.detach().clone()
    address = model["blocks"][0].mlp[0].weight.data_ptr()
    initlab.init_model_(model, 7, only="blocks", device="cpu:0")
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model["conv"].weight, conv)
    assert (model["norm"].running_mean == 3).all()
    assert model["blocks"][0].mlp[0].weight.data_ptr() != address  # new memory, filled there
    reference = net()
    initlab.init_model_(reference, 7)
    assert torch.equal(model["blocks"][0].mlp[0].weight, reference["blocks"][0].mlp[0].weight)


def test_part_of_a_meta_model_leaves_the_rest_on_meta():
    model = on_meta()
    initlab.init_model_(model, 7, only="blocks", device="cpu")
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.is_meta} == {"blocks"}
    initlab.init_model_(model, 7, device="cpu")
    assert initlab.model_digest(model) == digest_of(net())


def test_inference_mode_makes_no_inference_tensors():
    model = on_meta()
    with torch.inference_mode():
        initlab.init_model_(model, 7, device="cpu")
    assert not any(t.is_inference() for t in model.state_dict(keep_vars=True).values())
    assert initlab.model_digest(model) == digest_of(net())


@pytest.mark.parametrize("device", ["cuda", "xpu", "nonsense", "meta"])
def test_a_device_that_is_not_there(device, refused):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    refused((RuntimeError, ValueError, AssertionError), None, on_meta(), device=device)


def test_under_torch_compile_it_is_a_graph_break():
    model = nn.Linear(2, 3)

    @torch.compile(backend="eager")
    def start(x):
        initlab.init_model_(model, 7)
        return model(x) + 1

    out = start(torch.ones(1, 2))
    initlab.init_model_(model, 7)
    assert torch.equal(out, model(torch.ones(1, 2)) + 1)


# ---------------------------------------------------------------------------------------------------------------
# Refusals: nothing is written


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 4, 5))
        self.linear = nn.Linear(2, 2)


def test_an_uncovered_parameter_is_named_and_nothing_written(refused):
    said = refused(ValueError, "recipe 'own' cannot fill 1 of 3", Odd())
    assert "table (in Odd)" in said
    assert 'recipe={"table": ' in said
    assert "only=" in said
    refused(ValueError, "table", on_meta(Odd), device="cpu")
    initlab.init_model_(Odd(), 0, recipe={"table": Normal(0.0, 0.02)})  # the ways out work
    initlab.init_model_(Odd(), 0, only="linear")


def test_long_lists_are_cut(refused):
    said = refused(ValueError, "40 of 120", nn.Sequential(*(Odd() for _ in range(40))))
    assert "... and 20 more" in said


def test_a_double_written_weight(refused):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    refused(ValueError, r"(?s)share memory.*0\.weight and 1\.weight.*one Parameter", model)
    initlab.init_model_(model, 0, only="0")


def test_a_name_collision(refused):
    refused(ValueError, "one canonical name, 'x'", nn.Linear(2, 2), names=lambda name: "x")


def test_meta_without_a_device(refused):
    refused(ValueError, r"emb\.weight and \d+ more are on the meta device.*device=", on_meta())


def test_lazy_modules(refused):
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet.*run a batch"):
        initlab.init_model_(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), 0)
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(1, 5))
    assert digest_of(model) == digest_of(nn.Sequential(nn.Linear(5, 3)))


def test_dtensors():
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()], run_check=False))
        with pytest.raises(NotImplementedError, match=r"weight: .*no rank holds the values.*Redistribute"):
            initlab.init_model_(model, 0)
        initlab.init_model_(model, 0, only="bias")
        whole = nn.Linear(2, 2)
        model.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Replicate()], run_check=False))
        assert str(initlab.init_model_(model, 0, "torch")) == str(initlab.init_model_(whole, 0, "torch"))
        assert torch.equal(model.weight.to_local(), whole.weight)
    finally:
        torch.distributed.destroy_process_group()


def test_dtypes_without_a_distribution(refused):
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    refused(ValueError, r"codes \(in Linear\): a normal is not defined for torch.int8", model, 0, Normal(0.0, 1.0))
    initlab.init_model_(model, 0, {"codes": Constant(3)})
    assert (model.codes == 3).all()


def test_what_only_the_tensor_shows_names_the_parameter(refused):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.empty(1, 2).expand(2, 2))
    refused(RuntimeError, r"1\.weight: .*overlaps itself", model, 0, "torch")
    half = nn.Linear(2, 2).half()
    refused(ValueError, r"weight \(in Linear\): .*out of bounds for torch.float16", half, 0, Uniform(0.0, 1e5))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"only": "haed"}, ValueError, "only: nothing in the model is called 'haed'"),
        ({"only": ["head", "blocks.7"]}, ValueError, "'blocks.7'; did you mean"),
        ({"only": [3]}, TypeError, r"only holds 3 \(int\); it must be a name pattern .* or a function"),
        ({"only": ["head", None]}, TypeError, r"only holds None \(NoneType\)"),
        ({"only": 0}, TypeError, r"only is 0 \(int\); it must be a name pattern .*None selects everything"),
        ({"only": b"head"}, TypeError, r"only is b'head' \(bytes\)"),
        ({"only": nn.Linear(2, 2)}, TypeError, "only is .*Linear"),
        ({"only": torch.ones(2)}, TypeError, "only is .*Tensor"),
        ({"buffers": 3}, TypeError, r"buffers is 3 \(int\); it must be a function of name and tensor"),
        ({"recipe": None}, TypeError, r"recipe is None \(NoneType\); it must be a name such as"),
        ({"recipe": nn.Linear(2, 2)}, TypeError, "recipe is .*Linear"),
        ({"recipe": {"*": None}}, TypeError, r"recipe\['\*'\] is None"),
        ({"recipe": {"*": {"head": 3}}}, TypeError, r"recipe\['\*'\]\['head'\] is 3"),
        ({"recipe": {0: "he"}}, TypeError, r"recipe has the key 0 \(int\); keys are name patterns"),
        ({"recipe": "kaiming"}, ValueError, "recipe is 'kaiming'; it must be one of torch, own, he"),
        ({"recipe": 3}, TypeError, r"recipe is 3 \(int\)"),
        ({"recipe": {"haed": "he"}}, ValueError, "no parameter is called 'haed'"),
        ({"names": 3}, TypeError, "names is a int"),
    ],
)
def test_bad_arguments(arguments, error, match, refused):
    refused(error, match, net(), 0, **arguments)


@pytest.mark.parametrize(
    ("recipe", "instead"),
    [
        (nn.init.kaiming_normal_, 'recipe="he"'),
        (nn.init.kaiming_uniform_, r'recipes\.he\(distribution="uniform"\)'),
        (nn.init.xavier_normal_, r'recipes\.xavier\(distribution="normal"\)'),
        (nn.init.zeros_, r"Constant\(0\.0\)"),
        (nn.init.orthogonal_, "No distribution does the same.*only="),
        (initlab.init.normal_, r"Normal\(mean, std\)"),
        (functools.partial(nn.init.normal_, std=0.02), r"Normal\(mean, std\)"),
        ({"*.weight": nn.init.trunc_normal_}, r"recipe\['\*\.weight'\] is torch.*TruncatedNormal"),
    ],
)
def test_a_function_that_fills_is_no_recipe(recipe, instead, refused):
    said = refused(TypeError, instead, net(), 0, recipe)
    assert re.search(r"nn\.init\.|initlab\.init\.", said)
    rule = re.search(r"recipe=(\{.*\})", said)[1]
    initlab.init_model_(net(), 0, eval(rule, {"Normal": Normal}))  # the way out that is shown


@pytest.mark.parametrize(
    ("recipe", "error", "match"),
    [
        ("kaiming_normal_", ValueError, 'it must be one of torch, .*recipe="he" does the same'),
        (initlab.recipes.he, TypeError, r"call it, recipe=initlab\.recipes\.he\(\)"),
        (Normal, TypeError, r"is the class Normal; it must be one distribution, Normal\(\)"),
        (lambda: Normal(), TypeError, r"<lambda>\(\); it must take one argument, a TensorRef"),
        (lambda ref, std: Normal(0.0, std), TypeError, r"<lambda>\(ref, std\); it must take one argument"),
        (lambda ref: "he", TypeError, r"recipe <lambda> returned 'he' \(str\) for emb.weight; it must return a dist"),
        (lambda ref: torch.ones(20, 20), TypeError, r"returned a Tensor for emb.weight"),
    ],
)
def test_what_is_often_taken_for_a_recipe(recipe, error, match, refused):
    refused(error, match, net(), 0, recipe)


def test_an_exact_name_comes_before_a_glob():
    def build():
        return nn.ParameterDict({name: nn.Parameter(torch.zeros(2, 2)) for name in ("w[0]", "w0")})

    model = build()
    initlab.init_model_(model, 0, Constant(1.0), only="w[0]")
    assert (model["w[0]"] == 1).all()
    assert not model["w0"].any()
    model = build()
    initlab.init_model_(model, 0, {"w[0]": Constant(1.0), "*": Constant(2.0)})
    assert (model["w[0]"] == 1).all()
    assert (model["w0"] == 2).all()
    nested = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("h[1]", "h1")})
    for only in ("h[1]", "h[1].*", ["h[1].weight", "h[1].bias"]):
        report = initlab.init_model_(nested, 0, only=only)
        assert [row.name for row in report.rows] == ["h[1].weight", "h[1].bias"]


def test_no_module():
    with pytest.raises(TypeError, match=r"model is {} \(dict\); it must be a torch\.nn\.Module"):
        initlab.init_model_({}, 0)


# ---------------------------------------------------------------------------------------------------------------
# Buffers on the meta device


class Rotary(nn.Module):
    """Computes a buffer in its constructor; how it can do so again is up to the subclass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", self.compute(), persistent=False)
        self.weight = nn.Parameter(torch.ones(4))

    def compute(self):
        return 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)


class ByReset(Rotary):
    def reset_parameters(self):
        nn.init.normal_(self.weight)
        self.inv_freq.copy_(self.compute())


class ByInitBuffers(Rotary):
    def _init_buffers(self):
        self.inv_freq = self.compute()

    def reset_parameters(self):
        nn.init.ones_(self.weight)


class ByParent(nn.Module):
    def __init__(self, child=Rotary):
        super().__init__()
        self.rotary = child()

    def _init_weights(self, module):
        if isinstance(module, Rotary):
            module.inv_freq.data.copy_(module.compute())
            nn.init.ones_(module.weight)


class Silent(Rotary):
    def reset_parameters(self):
        nn.init.ones_(self.weight)


class Broken(Rotary):
    def reset_parameters(self):
        nn.init.ones_(self.weight)
        if not self.inv_freq.is_meta:
            raise OSError("no disk")


EXPECTED = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)


@pytest.mark.parametrize("build", [ByReset, ByInitBuffers, ByParent])
def test_the_owners_code_sets_a_buffer(build):
    model = on_meta(build)
    generator = torch.get_rng_state()
    report = initlab.init_model_(model, 0, device="cpu")
    (buffer,) = model.buffers()
    assert torch.equal(buffer, EXPECTED)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model.state_dict().keys() & {"inv_freq", "rotary.inv_freq"}  # still not persistent
    assert report.rows[-1].distribution is None


def test_the_owners_code_cannot_reach_parameters():
    model = nn.Sequential(ByReset(), nn.Linear(4, 4))
    model[0].weight.data.fill_(5.0)
    model[0].inv_freq = model[0].inv_freq.to("meta")
    initlab.init_model_(model, 0, only=["0.inv_freq"], device="cpu")
    assert torch.equal(model[0].inv_freq, EXPECTED)
    assert (model[0].weight == 5).all()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Rotary, "inv_freq (in Rotary): its owner has no code to set it"),
        (Silent, "Silent.reset_parameters does not set it"),
        (Broken, "Broken.reset_parameters raised OSError: no disk"),
    ],
)
def test_a_buffer_that_nobody_sets(build, reason, refused):
    recipe = {"weight": Constant(1.0)}
    said = refused(
        ValueError, "1 buffers on the meta device are set by nobody", on_meta(build), 0, recipe, device="cpu"
    )
    assert reason in said
    assert "buffers=" in said


def test_buffers_by_the_caller():
    model = on_meta(lambda: nn.Sequential(Rotary(), nn.BatchNorm1d(3), ByReset()))
    seen = {}

    def values(name, buffer):
        seen[name] = buffer.shape
        assert torch.empty(0).device.type == "cpu"  # the context is that of the device
        return {"0.inv_freq": EXPECTED.double(), "1.running_mean": 2.5}.get(name)

    initlab.init_model_(model, 0, {"0.weight": Constant(1.0)}, device="cpu", buffers=values)
    assert seen.keys() == {name for name, _ in model.named_buffers()}
    assert torch.equal(model[0].inv_freq, EXPECTED)
    assert model[0].inv_freq.dtype == torch.float32
    assert (model[1].running_mean == 2.5).all()  # the caller's word goes before the layer's own distribution
    assert (model[1].running_var == 1).all()
    assert torch.equal(model[2].inv_freq, EXPECTED)


def test_a_buffer_of_another_shape(refused):
    refused(
        ValueError,
        r"buffers: inv_freq has shape \(4,\), and the value given has \(3,\)",
        on_meta(ByReset),
        device="cpu",
        buffers=lambda name, buffer: torch.ones(3),
    )


def test_random_buffers_go_by_seed_and_name():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("directions", torch.empty(6, 3))
            self.register_buffer("phases", torch.empty(6))
            self.reset_parameters()

        def reset_parameters(self):
            self.directions.copy_(torch.randn(6, 3))
            self.phases.uniform_(0, 6)

    def filled(seed, order=(0, 1)):
        model = on_meta(lambda: nn.ModuleDict({f"{i}": Features() for i in order}))
        initlab.init_model_(model, seed, device="cpu")
        return [model[f"{i}"].get_buffer(name) for i in (0, 1) for name in ("directions", "phases")]

    first, again, reverse, other = filled(1), filled(1), filled(1, (1, 0)), filled(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, reverse, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[2])


def test_real_buffers_without_a_distribution_are_left_alone():
    model = ByReset()
    model.inv_freq.fill_(3.0)
    initlab.init_model_(model, 0, "torch")
    assert (model.inv_freq == 3).all()


# ---------------------------------------------------------------------------------------------------------------
# Progress, and plans


def test_progress_counts_every_element(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **named):
            self.done, self.closed = 0, False
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed = True

        def add_task(self, description, total):
            self.total = total

        def advance(self, task, elements):
            self.done += elements

    monkeypatch.setattr("rich.progress.Progress", Bar)
    model = net()
    initlab.init_model_(model, 0, progress=True)
    (bar,) = bars
    assert bar.closed
    assert bar.total == sum(t.numel() for t in model.state_dict().values()) - model["emb"].weight.numel()
    assert bar.done == bar.total + 8  # the padding row is written a second time
    initlab.init_model_(model, 0)  # neither long nor in a terminal
    initlab.init_model_(model, 0, progress=False)
    assert len(bars) == 1
    monkeypatch.setattr(initialization, "_LONG", 1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    initlab.init_model_(model, 0)
    assert len(bars) == 2


def test_a_plan_touches_nothing_and_says_what_would_be():
    for model in (net(), on_meta(), nn.Sequential(on_meta(ByReset))):
        before, generator = state(model), torch.get_rng_state()
        plan = initlab.plan_model(model, 5, "auto")
        unchanged(model, before)
        assert torch.equal(torch.get_rng_state(), generator)
        done = initlab.init_model_(model, 5, "auto", device="cpu")
        assert plan == done
        assert str(plan) == str(done)


def test_plans_refuse_what_fills_refuse():
    with pytest.raises(ValueError, match=r"table \(in Odd\)"):
        initlab.plan_model(Odd())


def test_a_report_does_not_keep_its_model_alive():
    model = net()
    report = initlab.init_model_(model, 0)
    assert report.digest() == initlab.model_digest(model)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        report.digest()


def test_version_counters_move_and_autograd_sees_nothing():
    model = nn.Linear(2, 2)
    x = torch.ones(1, 2, requires_grad=True)
    loss = (model(x) ** 2).sum()
    initlab.init_model_(model, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert model.weight.grad_fn is None


def test_distributions_that_a_dtype_turns_into_constants():
    model = nn.Linear(4, 4)
    initlab.init_model_(model, 0, {"weight": TruncatedNormal(0.0, 1.0, 0.5, 0.5), "bias": Uniform(2.0, 2.0)})
    assert (model.weight == 0.5).all()
    assert (model.bias == 2).all()
    assert map_of(Uniform(2.0, 2.0), torch.float32) == Constant(2.0)


def test_parameters_of_zero_3_are_refused():
    model = nn.Linear(3, 2)
    model.weight.data = torch.empty(0)
    model.weight.ds_id = 0
    before = model.bias.detach().clone()
    with pytest.raises(NotImplementedError, match=r"weight is partitioned by DeepSpeed's ZeRO-3.*GatheredParameters"):
        initlab.init_model_(model, seed=0)
    assert torch.equal(model.bias, before)
