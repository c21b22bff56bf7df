"""The command: its exit status, what `env` says, and the demo's parts on small settings.

The demo is evidence only if it can fail, so most tests here make a claim fail that holds in the full run.
"""

import importlib.metadata
import json
import math
import platform
import runpy
import sys

import pytest
import torch
from initlab.kernels import Draw, Normal, TruncatedNormal, Uniform, fill_, named_key

import initlab
from initlab import cli, demo

SHAPES = {"wide": (5, 1025), "tall": (63, 37)}
DISTRIBUTIONS = [Normal(0.0, 0.02), Uniform(-0.02, 0.02), TruncatedNormal(0.0, 0.02, -0.04, 0.04)]
DEEP = demo.Settings(epochs=1, bad_epochs=1)


@pytest.fixture
def torch_backend(serving):
    """These tests are about the demo; the backend that needs no compiler serves them."""
    with serving("torch"):
        yield


def held_by(evidence):
    """Of each claim, whether it held."""
    return [held for _, held in evidence.claims]


@pytest.fixture(scope="module")
def few():
    """An eighth of the digits to train on."""
    data = demo.load_digits()
    return data._replace(train=data.train[:180], train_labels=data.train_labels[:180])


# ---------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("argv", "about"),
    [
        ([], "command"),
        (["nonsense"], "nonsense"),
        (["env", "--nonsense"], "--nonsense"),
        (["demo", "--seed", "x"], "'x' is not an integer"),
        (["demo", "--seed", str(2**64)], "does not fit into 64 bits"),
        (["plan"], "PATH:FUNCTION"),
        (["plan", "model.py:build", "--seed", "x"], "'x' is not an integer"),
    ],
)
def test_wrong_usage_is_64(argv, about, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    said = capsys.readouterr()
    assert exit.value.code == 64
    assert said.err.startswith("usage: initlab")
    assert about in said.err
    assert not said.out


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    assert {"demo", "plan", "env"} <= set(capsys.readouterr().out.split())


def test_python_m_initlab(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["initlab", "env"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("initlab", run_name="__main__")
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("initlab ")


def test_the_command_loads_only_what_it_needs(python):
    loaded = python("import sys, initlab.cli; print(*sys.modules)").split()
    assert not {"numba", "triton", "sklearn", "initlab.demo"} & set(loaded)


@pytest.mark.parametrize(("held", "status"), [(True, 0), (False, 1)])
def test_demo_status(held, status, monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run", lambda settings, backend, page: seen.append(settings) or held)
    assert cli.main(["demo", "--seed", "7"]) == status
    assert seen == [demo.Settings(seed=7)]


def test_the_demo_leaves_a_page(few, monkeypatch, tmp_path, capsys):
    """Its claims and pictures, of the parts that need no timing; what fails is said there too."""
    monkeypatch.setattr(demo, "load_digits", lambda: few)
    for part in ("show_gpt2", "show_models"):
        monkeypatch.setattr(demo, part, lambda *arguments: None)
    page = tmp_path / "demo.html"
    assert not demo.run(demo.Settings(depth=5, epochs=1, bad_epochs=1), "torch", page)
    assert capsys.readouterr().out.splitlines()[-1] == f"Its pictures are in {page}"
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "claims FAILED." in text
    assert text.count("<li>FAILED: ") == 4
    assert "holds: one stream" in text


def test_demo_without_scikit_learn(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo"]) == 1
    said = capsys.readouterr()
    assert "pip install 'initlab[demo]'" in said.err
    assert not said.out


def test_backend_that_cannot_be_had(monkeypatch, forget, capsys):
    monkeypatch.setenv("INITLAB_BACKEND", "abacus")
    forget()
    assert cli.main(["demo"]) == 64
    said = capsys.readouterr()
    assert "INITLAB_BACKEND is 'abacus'" in said.err
    assert not said.out

    assert cli.main(["env"]) == 0
    facts = _facts(capsys)
    assert facts["INITLAB_BACKEND"] == "abacus"
    assert facts["cpu backend"].startswith("none: INITLAB_BACKEND is 'abacus'")


def _facts(capsys):
    """What `env` printed, by name; a name and its fact are two columns."""
    lines = capsys.readouterr().out.splitlines()
    return {line[:17].strip(): line[17:] for line in lines}


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_env(backend, monkeypatch, forget, capsys):
    if backend == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("INITLAB_BACKEND", backend)
    forget()
    assert cli.main(["env"]) == 0
    facts = _facts(capsys)
    assert facts["initlab"] == f"{initlab.__version__}, stream 1"
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["numpy"] == importlib.metadata.version("numpy")
    assert facts["cpu"].endswith(f"{torch.get_num_threads()} threads")
    assert facts["INITLAB_BACKEND"] == facts["cpu backend"] == backend
    assert {"numba", "triton"} <= set(facts)


def test_env_on_another_machine(monkeypatch, capsys):
    """No numba, two GPUs, no /proc."""

    def version(package):
        if package == "numba":
            raise importlib.metadata.PackageNotFoundError
        return "1.2"

    monkeypatch.setattr(cli, "version", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")
    monkeypatch.setattr(cli.Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    monkeypatch.setattr(platform, "processor", lambda: "a processor")
    assert cli.main(["env"]) == 0
    facts = _facts(capsys)
    assert facts["numba"] == "not installed"
    assert facts["cpu"].startswith("a processor, ")
    assert facts["cuda:0"] == "GPU number 0"
    assert facts["cuda:1"] == "GPU number 1"
    assert facts["cuda:1 backend"] == "torch"
    assert "cuda" not in facts


# ---------------------------------------------------------------------------------------------------------------
# plan

SOURCE = """
import torch
import neighbour

def build():
    return torch.nn.Sequential(torch.nn.Linear(3, neighbour.WIDTH), torch.nn.ReLU(), torch.nn.Linear(4, 2))

def with_batch():
    return build(), torch.ones(1, 3)

def on_meta():
    assert torch.empty(0).is_meta
    return build()

def odd():
    model = build()
    model.scale = torch.nn.Parameter(torch.ones(2, 2, 2))
    return model

NUMBER = 3
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with SOURCE as models.py, the current one; imports leave no trace."""
    (tmp_path / "models.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("WIDTH = 4")
    (tmp_path / "broken.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("models", "neighbour", "broken"):
            del sys.modules[name]


@pytest.mark.parametrize("place", ["models.py:build", "models:build", "models:with_batch", "{0}/models.py:build"])
def test_plan(place, sources, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["plan", place.format(sources), "--recipe", "auto", "--seed", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "shape", "dtype", "distribution", "fan", "std", "key", "why"]
    assert lines[2].split()[:2] == ["0.weight", "4"]
    assert f"{named_key(7, '0.weight'):016x}" in lines[2]
    assert lines[2].endswith("He, before ReLU")
    assert lines[-1] == "4 tensors, 26 elements: recipe auto, seed 7, stream 1"


def test_plan_as_json(sources, capsys):
    assert cli.main(["plan", "models:on_meta", "--meta", "--json", "--only", "2", "--only", "0.bias"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in plan["rows"]] == ["0.bias", "2.weight", "2.bias"]
    assert plan["rows"][1]["distribution"] == {
        "kind": "Uniform",
        "low": pytest.approx(-0.5),
        "high": pytest.approx(0.5),
    }


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["models"], 64, "'models' is not of the form PATH:FUNCTION"),
        (["models:a b"], 64, "not of the form"),
        (["models.py:nothing"], 64, "models.py has no function nothing"),
        (["models:NUMBER"], 64, "models has no function NUMBER"),
        (["absent.py:build"], 64, "there is no file absent.py"),
        (["absent.deeper:build"], 64, "there is no module absent.deeper; a file's name ends in .py"),
        (["models:build", "--recipe", "kaiming"], 64, "recipe is 'kaiming'"),
        (["models:build", "--only", "3"], 1, "nothing in the model is called '3'"),
        (["models:odd"], 1, "scale (in Sequential)"),
        (["os:getcwd"], 1, "model is a str"),
    ],
)
def test_plan_refuses(arguments, status, said, sources, capsys):
    assert cli.main(["plan", *arguments]) == status
    told = capsys.readouterr()
    assert told.err.startswith("initlab plan: error: ")
    assert said in told.err
    assert not told.out


def test_what_a_model_file_fails_to_import_is_its_own_error(sources, capsys):
    assert cli.main(["plan", "broken:build"]) == 64
    assert "no_such_package" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# The demo's parts


def test_verdict(capsys):
    evidence = demo.Evidence()
    assert not evidence.holds  # no claims are no evidence
    evidence.claim("one", True)
    assert evidence.holds
    assert evidence.verdict == "Verdict: all 1 claims hold."
    evidence.claim("two", False)
    assert not evidence.holds
    assert evidence.verdict == "Verdict: 1 of 2 claims FAILED."
    assert capsys.readouterr().out.splitlines() == ["  [ok] one", "  [FAILED] two"]


def test_digits():
    data = demo.load_digits()
    assert data.train.shape == (1437, 64)
    assert data.test.shape == (360, 64)
    assert torch.allclose(data.train.mean(), torch.tensor(0.0), atol=1e-6)
    assert torch.allclose(data.train.std(), torch.tensor(1.0))
    assert data.test_labels.bincount().min() > 30  # each digit is tested
    assert not {tuple(row) for row in data.train.tolist()} & {tuple(row) for row in data.test.tolist()}


@pytest.mark.usefixtures("torch_backend")
def test_starts_of_the_full_network(few, capsys):
    evidence = demo.Evidence()
    demo.show_starts(few, DEEP, evidence)
    assert held_by(evidence) == [True] * 4, capsys.readouterr().out


@pytest.mark.usefixtures("torch_backend")
def test_a_shallow_network_survives_any_start(few, capsys):
    evidence = demo.Evidence()
    demo.show_starts(few, demo.Settings(depth=5), evidence)
    assert held_by(evidence) == [True, False, False, True], capsys.readouterr().out


@pytest.mark.usefixtures("torch_backend")
def test_the_starts_are_compared_bit_by_bit(few, monkeypatch):
    def other_draws(weight, generator):
        torch.nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)

    monkeypatch.setitem(demo.STARTS, "He", other_draws)
    evidence = demo.Evidence()
    demo.show_starts(few, DEEP, evidence)
    assert held_by(evidence) == [False, True, True, True]


def test_signal_names_the_layer_that_overflows():
    layers = [torch.nn.Linear(1, 1, bias=False) for _ in range(4)]
    for layer in layers:
        torch.nn.init.constant_(layer.weight, 1e13)
    model = torch.nn.Sequential(*(module for layer in layers[:3] for module in (layer, torch.nn.ReLU())), layers[3])
    images = torch.tensor([[1.0], [2.0]])
    stds, overflow, loss = demo.signal(model, images, torch.zeros(2, dtype=torch.int64))
    assert stds[:2] == pytest.approx([math.sqrt(0.5) * 1e13, math.sqrt(0.5) * 1e26])
    assert overflow == 3
    assert math.isnan(stds[2])
    assert math.isnan(loss)


@pytest.mark.usefixtures("torch_backend")
def test_training_claims(few, capsys):
    """The bad starts fail at once; He's needs longer than an epoch on an eighth of the images."""
    evidence = demo.Evidence()
    with demo._threads(1):
        demo.show_training(few, DEEP, evidence)
    assert held_by(evidence) == [True, True, False], capsys.readouterr().out


@pytest.mark.usefixtures("torch_backend")
def test_training_a_shallow_network(capsys):
    """It learns from every start: only the claims of failure fail."""
    settings = demo.Settings(depth=2, width=64, epochs=25, bad_epochs=25)
    evidence = demo.Evidence()
    with demo._threads(1):
        demo.show_training(demo.load_digits(), settings, evidence)
    assert held_by(evidence) == [False, False, True], capsys.readouterr().out


@pytest.mark.usefixtures("torch_backend")
def test_training_repeats_itself(few):
    settings = demo.Settings(depth=2, width=16)
    with demo._threads(1):
        once, again = (list(demo.train(demo.build("He", settings), few, settings, epochs=2)) for _ in range(2))
    assert once == again
    assert [epoch.number for epoch in once] == [1, 2]
    other = demo.Settings(seed=1, depth=2, width=16)
    assert list(demo.train(demo.build("He", other), few, other, epochs=2)) != once


def test_gpt2():
    shapes = demo.gpt2_shapes()
    assert len(shapes) == 148
    assert sum(math.prod(shape) for shape in shapes.values()) == 124_439_808


@pytest.mark.long
def test_gpt2_is_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=63, n_positions=10)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert demo.gpt2_shapes(layers=2, width=8, vocabulary=63, positions=10) == expected


def test_race_takes_turns(monkeypatch):
    clock = iter([0, 1, 10, 30, 100, 105, 200, 206, 300, 302, 400, 499])  # torch: 1, 5, 2; initlab: 20, 6, 99
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    order = []
    tensors = [torch.empty(1), torch.empty(2)]
    medians = demo.race(lambda module, tensor: order.append((module, len(tensor))), tensors, rounds=3)
    assert medians == (2, 20)
    assert order == [(module, size) for _ in range(4) for module in (torch.nn.init, initlab.init) for size in (1, 2)]


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_same_bits(distribution):
    same = demo.same_bits(SHAPES, distribution, seed=0)
    assert len(same) == 6
    assert all(same.values())


def _ignoring_regions(draw):
    fill_([Draw(draw.tensor, draw.distribution, draw.key)])


def _ignoring_keys(draw):
    fill_([Draw(draw.tensor, draw.distribution, 0, draw.region)])


def _by_threads(draw):
    fill_([Draw(draw.tensor, draw.distribution, draw.key ^ (torch.get_num_threads() == 1), draw.region)])


def _doing_nothing(draw):
    pass


def _missing_the_last(draw):
    last = draw.tensor.view(-1)[-1]
    before = last.clone()
    fill_([draw])
    last.copy_(before)


def _cutting_bfloat16(draw):
    if draw.tensor.dtype == torch.bfloat16:
        whole = torch.empty(draw.tensor.shape)
        fill_([Draw(whole, draw.distribution, draw.key, draw.region)])
        draw.tensor.copy_((whole.view(torch.int32) & -65536).view(torch.float32))
    else:
        fill_([draw])


class _InOrder:
    """A generator's way: what a parameter gets depends on how many came before it."""

    def __init__(self):
        self.calls = 0

    def __call__(self, draw):
        self.calls += 1
        fill_([Draw(draw.tensor, draw.distribution, draw.key ^ self.calls, draw.region)])


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize(
    ("broken", "fails"),
    [
        (_ignoring_regions, "rows columns"),
        (_ignoring_keys, "seed"),
        (_by_threads, "thread"),
        (_doing_nothing, "thread order rows columns bfloat16"),
        (_missing_the_last, "thread order rows columns bfloat16"),
        (_cutting_bfloat16, "bfloat16"),
        (_InOrder(), "thread order rows columns bfloat16"),
    ],
)
def test_same_bits_sees_what_is_broken(broken, fails, monkeypatch):
    monkeypatch.setattr(demo, "fill_", lambda draws: [broken(draw) for draw in draws])
    same = demo.same_bits(SHAPES, Normal(), seed=0)
    failed = [way for way, held in same.items() if not held]
    assert len(failed) == len(fails.split()), same
    assert all(any(word in way for way in failed) for word in fails.split()), same


@pytest.mark.usefixtures("torch_backend")
def test_bits_tell_the_zeros_apart():
    zero = torch.tensor([0.0])
    assert demo._equal_bits(zero, zero.clone())
    assert not demo._equal_bits(zero, -zero)
    assert not demo._equal_bits(zero.bfloat16(), -zero.bfloat16())


@pytest.mark.usefixtures("torch_backend")
def test_a_bfloat16_uniform_keeps_below_its_bound():
    """Plain rounding would not do as what to expect of it: of this many draws, some round up to the bound."""
    distribution = Uniform(-0.02, 0.02)
    key = named_key(0, "weight")
    whole, half = torch.empty(100_000), torch.empty(100_000, dtype=torch.bfloat16)
    fill_([Draw(whole, distribution, key), Draw(half, distribution, key)])
    assert torch.equal(half, demo._as_bfloat16(whole, distribution))
    assert not torch.equal(half, whole.bfloat16())


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize(
    ("backend", "seconds", "held"),
    [("numba", (2.0, 1.0), [True] * 3), ("numba", (1.0, 2.0), [False, True, True]), ("torch", (1.0, 2.0), [True] * 2)],
)
def test_gpt2_claims(backend, seconds, held, monkeypatch, capsys):
    monkeypatch.setattr(demo, "race", lambda fill, tensors, rounds: seconds)
    evidence = demo.Evidence()
    shapes = demo.gpt2_shapes(layers=1, width=8, vocabulary=63, positions=10)
    demo.show_gpt2(shapes, demo.Settings(), backend, evidence)
    assert held_by(evidence) == held
    assert "15 of 15" in capsys.readouterr().out


@pytest.mark.usefixtures("torch_backend")
def test_gpt2_claims_fail_on_unequal_bits(monkeypatch, capsys):
    monkeypatch.setattr(demo, "fill_", lambda draws: [_ignoring_regions(draw) for draw in draws])
    evidence = demo.Evidence()
    shapes = demo.gpt2_shapes(layers=1, width=8, vocabulary=63, positions=10)
    demo.show_gpt2(shapes, demo.Settings(rounds=1), "torch", evidence)
    assert held_by(evidence) == [False, True]
    out = capsys.readouterr().out
    assert "9 of 15" in out
    assert out.count("NO") == 6


def small_gpt2():
    return demo.gpt2_model(n_layer=2, n_embd=64, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)


@pytest.mark.long  # transformers
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_whole_models(backend, capsys):
    evidence = demo.Evidence()
    demo.show_models(small_gpt2, demo.Settings(rounds=1), backend, evidence)
    claims = [line.split("]", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  [")]
    assert len(claims) == (4 if backend == "numba" else 3)
    assert held_by(evidence)[-3:] == [True] * 3  # whether so small a model is faster says nothing


@pytest.mark.long  # transformers
def test_whole_models_sees_what_is_broken(monkeypatch, capsys):
    """Other distributions under swap(), and a fill that takes its seed from the order of the parameters."""

    def by_order(model, seed, recipe, **arguments):
        first = next(iter(dict(model.named_parameters())))
        return initlab.init_model_(model, seed + len(first), recipe, **arguments)

    class Build:
        made = 0

        def __call__(self):
            Build.made += 1
            model = small_gpt2()
            if Build.made == 2:  # the one under swap()
                torch.nn.init.normal_(model.transformer.wpe.weight, std=0.03)
            return model

    monkeypatch.setattr(demo, "init_model_", by_order)
    evidence = demo.Evidence()
    demo.show_models(Build(), demo.Settings(rounds=1), "torch", evidence)
    assert held_by(evidence) == [False, False, True]


def test_deviations_are_in_standard_errors():
    a, b = torch.nn.Linear(100, 100), torch.nn.Linear(100, 100)
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            q.copy_(p)
    assert demo.largest_deviation(a, b) == 0
    with torch.no_grad():
        b.weight *= 1.05
    assert demo.largest_deviation(a, b) == pytest.approx((1 - 1 / 1.05) * 100, rel=1e-3)


@pytest.mark.long  # transformers
def test_backwards_is_the_same_model():
    model = demo.register_backwards(small_gpt2())
    names, plain = ([name for name, _ in m.named_parameters(remove_duplicate=False)] for m in (model, small_gpt2()))
    assert names[0] == "lm_head.weight"
    assert names == plain[::-1]


def test_whole_models_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    evidence = demo.Evidence()
    demo.show_models(demo.gpt2_model, demo.Settings(), "numba", evidence)
    assert held_by(evidence) == []
    assert "Left out: transformers is not installed; pip install 'initlab[demo]'" in capsys.readouterr().out


@pytest.mark.exhaustive  # it times initlab beside torch, so nothing may run beside it
def test_the_whole_demo(capsys):
    threads = torch.get_num_threads()
    assert cli.main(["demo"]) == 0
    assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Verdict: all 14 claims hold."
    assert max(map(len, lines)) <= 88


ADVISED = """
import initlab, torch
from torch import nn
def setup():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    return model, (255 * torch.rand(32, 8), torch.randint(5, (32,))), initlab.supervised(nn.CrossEntropyLoss())
def alone():
    return nn.Linear(8, 8)
"""


def test_plan_with_a_batch(tmp_path, capsys):
    path = tmp_path / "advised.py"
    path.write_text(ADVISED)
    assert cli.main(["plan", f"{path}:setup", "--batch"]) == 0
    assert "He, before ReLU" in capsys.readouterr().out
    assert cli.main(["plan", f"{path}:setup", "--batch", "--json", "--seed", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seed"] == 3
    assert abs(found["predicted"] - found["expected"]) < 0.1 * found["expected"]
    assert cli.main(["plan", f"{path}:alone", "--batch"]) == 64
    assert "returned a Linear; --batch asks for (model, batch[, loss_fn])" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["plan", f"{path}:setup", "--batch", "--meta"]) == 64
