"""benchmarks/gpu, where there is no GPU: a dry run reaches its end."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu does the real thing")
def test_a_dry_run_of_the_gpu_script(tmp_path):
    """The script reaches its end, says that its figures mean nothing, and saves what it found."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
    command = [sys.executable, script, "--dry", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert all(found["checks"].values())
    assert {row["contestant"] for row in found["timings"]} >= {"initlab", "torch.nn.init", "fill_", "init_model_"}
    assert [verdict.endswith("a dry run") for verdict in found["verdicts"]] == [True] * 10
    assert "A dry run: no GPU" in (tmp_path / "out" / "gpu.md").read_text()


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu SANITIZE=1 does the real thing")
@pytest.mark.parametrize(
    ("sanitizer", "status", "said"),
    [('exec "$@"', 0, "memcheck: every kernel"), ("exit 9", 1, "FAILED"), (None, 1, "compute-sanitizer is installed")],
)
def test_every_kernel_under_a_sanitizer(tmp_path, monkeypatch, sanitizer, status, said):
    """A stand-in runs what it is given, or finds a fault; without one nothing is said to have been checked."""
    if sanitizer:
        stand_in = tmp_path / "compute-sanitizer"
        stand_in.write_text(f"#!/bin/sh\nshift 4\n{sanitizer}\n")
        stand_in.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    elif shutil.which("compute-sanitizer", path="/usr/local/cuda/bin"):
        pytest.skip("this machine has one")
    else:
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
    command = [sys.executable, script, "--dry", "--sanitize", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stdout
    assert not json.loads((tmp_path / "out" / "sanitizer.json").read_text())["timings"]


def test_claims_are_in_the_docs(monkeypatch):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    from gpu.claims import CLAIMS

    for claim in CLAIMS:
        (row,) = (line for line in (root / claim.page).read_text().splitlines() if line.startswith(claim.row))
        assert re.search(rf"(?<![\d,]){claim.figure}(?![\d,])", row), claim


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_without_a_gpu():
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 64
    assert "--dry runs this script without one" in done.stderr
