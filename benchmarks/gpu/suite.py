"""The part of the test suite that runs on a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

from .config import DRY, ROOT
from .report import Findings

NAME = "tests/kernels/test_sampling_triton.py"


def check_tests(findings: Findings) -> None:
    """The suite's GPU part, where pytest is at hand."""
    if DRY:
        findings.notes.append(f"{NAME} is left out of a dry run: the test command runs it")
        return
    try:
        importlib.import_module("pytest")
    except ImportError:
        findings.notes.append(f"pytest is not installed: {NAME} did not run")
        return
    # Options of pyproject.toml that an older pytest does not know are left out.
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", str(ROOT / NAME)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    print(done.stdout[-2000:], flush=True)
    findings.check(f"tests: {(done.stdout.strip().splitlines() or ['nothing'])[-1]}", done.returncode == 0)
