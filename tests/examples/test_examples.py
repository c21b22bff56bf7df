"""The examples run as a reader runs them, in a process of their own, and what they claim is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(folder, name, *arguments):
    """What a command with an example prints; `name` is a file, or the arguments that stand before it."""
    command = [sys.executable, *([EXAMPLES / name] if isinstance(name, str) else name), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def test_every_example_is_listed():
    listed = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}


def test_gpt(tmp_path):
    shown = run(tmp_path, "gpt.py")
    assert "digest e98e1c2472c12507\n" in shown  # on every machine
    losses = numbers(r"loss ([\d.]+),", shown)
    assert losses[0] > 4.7  # log 128: the start knows nothing
    assert losses[-1] < 3.0
    assert "250 steps: 0 bad, 0 skipped" in shown


def test_sharded_training(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    shown = run(tmp_path, torchrun, EXAMPLES / "sharded_training.py")
    sharded, whole = re.search(r"sharded model (\w+), of a whole one (\w+)", shown).groups()
    assert sharded == whole
    assert "nonfinite=1, first_bad_step=4" in shown
    assert "rank 1, step 4, call 4, forward: input 0 of the model holds NaN" in shown


@pytest.mark.xdist_group("lightning")
def test_in_lightning(tmp_path):
    shown = run(tmp_path, "in_lightning.py")
    assert ": 3 bad, 3 skipped, " in shown  # once an epoch
    assert "1. input (broken): feature 20\n" in shown
    assert numbers(r"([\d.]+)% of the training set", shown)[0] > 85


@pytest.mark.xdist_group("transformers")
def test_in_trainer(tmp_path):
    shown = run(tmp_path, "in_trainer.py")
    losses = numbers(r"'loss': '([\d.]+)'", shown)
    assert losses[-1] < losses[0] - 0.7
    assert all(norm > 0 for norm in numbers(r"'grad_norm': '([\d.]+)'", shown))
    assert "50 steps: 0 bad" in shown


@pytest.mark.xdist_group("transformers")
def test_in_accelerate(tmp_path):
    shown = run(tmp_path, "in_accelerate.py")
    losses = numbers(r"loss ([\d.]+),", shown)
    assert losses[2] < losses[0] / 2
    assert losses[3] < losses[2]  # where the other run left off
    steps = numbers(r"ClipStats\(steps=(\d+)", shown)
    assert steps == [45, 45, 60]
    assert "nothing non-finite in 45 steps" in shown


def test_resume(tmp_path):
    whole, resumed, *_ = re.findall(r"break +(.*)", run(tmp_path, "resume.py"))
    assert whole == resumed  # the digest, the counts and the spikes
    assert "spikes=0" not in whole


def test_loss_is_inf(tmp_path):
    """inf in the first step, three faults behind one another, each with the remedy that is pasted; then it learns."""
    shown = run(tmp_path, "loss_is_inf.py")
    assert "as it is: [inf, nan" in shown
    assert re.search(r"^1\. input \(", shown, re.MULTILINE)
    for remedy in ("x = batch[0]", "y = batch[1]", "initlab.init_model_(model, seed=0, recipe="):
        assert remedy in shown
    assert re.findall(r"now: verdict: (\w+)", shown)[-1] == "healthy"
    first, last = numbers(r"([\d.]+)", shown.split("cured: ")[1])[:2]
    assert last < 0.6 * first


def test_doctor_on_the_setup(tmp_path):
    command = [sys.executable, "-m", "initlab", "doctor", EXAMPLES / "loss_is_inf.py"]
    command[-1] = f"{command[-1]}:setup"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr  # broken
    assert "loss inf in step 1" in done.stdout


def test_notebook(tmp_path):
    """Runs in a kernel of its own, and its last loss is small; what is committed is what it printed, without paths."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    path = EXAMPLES / "loss_is_inf.ipynb"
    committed = path.read_text()
    assert not re.search(r"/(tmp|home|root|work|Users)/|\"iopub|20\d\d-\d\d-\d\dT", committed)
    notebook = nbformat.read(path, as_version=4)
    shown = [[str(output) for output in cell.get("outputs", ())] for cell in notebook.cells]
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    again = [[str(output) for output in cell.get("outputs", ())] for cell in notebook.cells]
    assert [len(outputs) for outputs in again] == [len(outputs) for outputs in shown]
    for outputs in (shown, again):
        text = "\n".join(map("\n".join, outputs))
        assert "verdict: broken" in text
        assert "verdict: healthy" in text
        assert "image/png" in text
        assert float(re.search(r"cured: [\d.]+ -> ([\d.]+)", text)[1]) < 0.6
