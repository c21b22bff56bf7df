"""`initlab doctor`: exit status, output, progress, usage."""

import json
import textwrap

import pytest
import torch

from initlab import cli

SCRIPT = """
    import torch, initlab

    def build(value=1.0, lr=0.01):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        x, y = torch.randn(32, 4), torch.randint(2, (32,))
        x[0, 1] *= value
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        return model, (x, y), initlab.supervised(torch.nn.CrossEntropyLoss()), optimizer

    def healthy():
        return build()[:3]

    def broken():
        return build(float("nan"))

    def warning():
        model, batch, loss_fn, optimizer = build()
        return torch.nn.Sequential(*model, torch.nn.Softmax(1)), batch, loss_fn, optimizer

    def lost():
        return build()[0]

    def unreduced():
        return *build()[:2], lambda model, batch: model(batch[0])
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "training.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


@pytest.mark.parametrize(("function", "status"), [("healthy", 0), ("build", 0), ("warning", 1), ("broken", 2)])
def test_status(script, function, status, capsys):
    assert cli.main(["doctor", f"{script}:{function}"]) == status
    said = capsys.readouterr()
    assert said.out.startswith(f"verdict: {('healthy', 'warning', 'broken')[status]}")
    assert "initlab doctor: running the model under observation" in said.err


def test_json(script, capsys):
    assert cli.main(["doctor", f"{script}:broken", "--json", "--steps", "2"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["causes"][0]["place"]["feature"] == 1
    assert found["broke_at"] == 1


@pytest.mark.parametrize(
    ("function", "words"),
    [("lost", "it must return (model, batch"), ("unreduced", "one element"), ("nobody", "nobody")],
)
def test_what_cannot_be_diagnosed(script, function, words, capsys):
    assert cli.main(["doctor", f"{script}:{function}"]) == 64
    said = capsys.readouterr()
    assert words in said.err
    assert not said.out


@pytest.mark.parametrize("steps", ["0", "-1", "x"])
def test_steps_are_positive(script, steps, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["doctor", f"{script}:healthy", "--steps", steps])
    assert exit.value.code == 64
    assert "positive" in capsys.readouterr().err


def test_nothing_is_trained(script):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    cli.main(["doctor", f"{script}:healthy"])
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
