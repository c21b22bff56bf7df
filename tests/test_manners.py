"""The manners of every command: lines of 80 columns, colour in a terminal only, the same flags, one stream for each."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import save_file

from initlab import cli

SOURCE = """
import torch
from torch import nn
import initlab

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention_output_projection = nn.Linear(8, 8)
        self.feed_forward_intermediate_activation = nn.Tanh()

    def forward(self, x):
        return self.feed_forward_intermediate_activation(self.self_attention_output_projection(x))

def build():
    print("the user's own")
    model = nn.Sequential()
    for number in range(3):
        model.add_module(f"transformer_encoder_stack_{number}", Block())
    return model

def setup():
    return build(), (torch.full((16, 8), float("nan")), torch.zeros(16, 8)), initlab.supervised(nn.MSELoss())
"""
SCRIPT = (
    SOURCE
    + """
model, (x, y), loss_fn = setup()
loss_fn(model, (x, y)).backward()
"""
)


@pytest.fixture
def commands(tmp_path):
    """Each command that reports, with its exit status."""
    (tmp_path / "model.py").write_text(SOURCE)
    (tmp_path / "train.py").write_text(SCRIPT)
    name = "encoder.layers.11.self_attention.output_projection.with_a_long_name.weight"
    save_file({name: torch.full((2, 2), float("nan")), f"{name}2": torch.ones(2)}, tmp_path / "a.safetensors")
    model, train = str(tmp_path / "model.py"), str(tmp_path / "train.py")
    return {
        "doctor": (["doctor", f"{model}:setup"], 2),
        "script": (["doctor", train], 2),
        "plan": (["plan", f"{model}:build"], 0),
        "scan": (["scan", str(tmp_path / "a.safetensors")], 2),
        "env": (["env"], 0),
    }


NOTES = ("note: ", "\u6ce8", "10 tensors", "6 tensors", "6 \u4e2a")  # what may follow a table
NAMES = ["doctor", "script", "plan", "scan", "env"]


def with_flags(arguments, *flags):
    return [arguments[0], *flags, *arguments[1:]]


def table_lines(text):
    """The lines of the tables: a rule, the line before it, and those after it up to an empty one."""
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if re.fullmatch(r"-+(  -+)+", line):
            end = next((i for i in range(at, len(lines)) if not lines[i] or lines[i].startswith(NOTES)), len(lines))
            yield from lines[at - 1 : end]


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("name", NAMES)
def test_tables_fit(commands, name, lang, capsys, monkeypatch, one_thread):
    arguments, status = commands[name]
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(with_flags(arguments, "--lang", lang)) == status
    out, err = capsys.readouterr()
    lines = list(table_lines(out))
    assert lines or name == "env"
    assert [line for line in (out.splitlines() if name == "env" else lines) if cell_len(line) > 80] == []
    assert "\x1b" not in out
    assert ("the user's own" in err) == (name in ("doctor", "plan"))
    shown = [line.split()[0] for line in lines[2:]]
    assert len(set(shown)) == len(shown), "two names must not become one"
    if lang == "zh" and name not in ("env", "plan"):
        assert "结论：故障" in out  # noqa: RUF001
        assert "verdict" not in out


@pytest.mark.parametrize("name", NAMES)
def test_json_is_alone_on_stdout(commands, name, capsys, one_thread):
    arguments, status = commands[name]
    assert cli.main(with_flags(arguments, "--json", "--lang", "zh")) == status
    found = json.loads(capsys.readouterr().out)
    assert found.get("verdict", "broken") == "broken"


@pytest.mark.parametrize("name", ["doctor", "plan", "scan", "env"])
def test_an_unknown_language_is_64(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--lang", "xx", "a.py:b"] if name != "env" else [name, "--lang", "xx"])
    assert exit.value.code == 64
    assert "--lang" in capsys.readouterr().err


def in_terminal(arguments, **environment):
    """What a command writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", **environment}
    with subprocess.Popen(
        [sys.executable, "-m", "initlab", *arguments], stdout=theirs, stderr=theirs, stdin=theirs, env=env
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the terminal is closed at the other end
                break
            if not part:
                break
            written += part
    os.close(ours)
    return written.decode(), process.returncode


@pytest.mark.long
def test_in_a_terminal(commands):
    arguments, status = commands["scan"]
    text, code = in_terminal(arguments)
    assert (code, "\x1b[" in text) == (status, True)
    plain, code = in_terminal(arguments, NO_COLOR="1")
    assert code == status
    assert not re.search("\x1b.[0-9;]*3[0-9]", plain), "no colour where NO_COLOR is set"
    piped = subprocess.run([sys.executable, "-m", "initlab", *arguments], capture_output=True, text=True, check=False)
    assert "\x1b" not in piped.stdout + piped.stderr
    assert piped.returncode == status


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_real_pipe(commands, name):
    arguments, status = commands[name]
    quoted = " ".join(f"'{argument}'" for argument in arguments)
    command = f"{sys.executable} -m initlab {quoted} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (status, 141)
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_completion_without_shtab_is_64(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 64
    assert "pip install shtab" in capsys.readouterr().err
