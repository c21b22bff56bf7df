"""The tests of the Triton kernels, run once more on emulated GPUs: same files, same assertions, other processes.

In a process Triton either interprets or compiles, so each run has one of its own. By hand:
``INITLAB_TEST_DEVICE=sm_80 pytest tests/kernels/test_nonfinite.py``
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.7")  # whose driver the emulated one is made after
pytest.importorskip("numba")
TESTS = Path(__file__).resolve().parent.parent

# What of a file runs kernels, by -k.
SUITES = {
    "sampling": ("kernels/test_sampling_triton.py", "not interpreter and not auto and not imported and not rounding"),
    "golden": ("kernels/test_golden.py", "triton"),
    "norms": ("kernels/test_norms.py", "triton or interpreted or table or begin_at or work_items or scratch or launch"),
    "nonfinite": ("kernels/test_nonfinite.py", "GPU"),
    "linear": ("kernels/test_linear.py", "triton or kernels or tile or loads or pass or mask or wait"),
    "compiled": ("ptx/device_checks.py", ""),
    "launches": ("ptx/launch_checks.py", ""),
    "captures": ("ptx/capture_checks.py", ""),
}
EVERYWHERE = ("sampling", "norms", "nonfinite", "compiled")  # also for GPUs whose matrix products are not emulated
RUNS = [(device, suite) for device in ("sm_80", "sm_90") for suite in SUITES]
RUNS += [(device, suite) for device in ("sm_100", "sm_120") for suite in EVERYWHERE]

REPRESENTATIVES = {  # seconds each; the others are long
    "sm_80": "kernels/test_nonfinite.py::test_nans_of_any_bits[GPU backend]",
    "sm_90": "ptx/device_checks.py::test_a_norm_does_not_depend_on_the_order_of_lanes_and_blocks[40]",
}


def passes(device, *arguments):
    """Whether pytest, on an emulated GPU, passes; returns how many tests did."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment |= {"INITLAB_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    command += ["-c", TESTS.parent / "pyproject.toml", "--rootdir", TESTS.parent]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert " passed" in done.stdout
    return done.stdout


@pytest.mark.parametrize("device", REPRESENTATIVES)
def test_representatives(device):
    passes(device, TESTS / REPRESENTATIVES[device])


@pytest.mark.long
@pytest.mark.parametrize(("device", "suite"), RUNS)
def test_the_kernels_tests(device, suite):
    file, expression = SUITES[suite]
    passes(device, "-m", "not large and not exhaustive", *(["-k", expression] if expression else []), TESTS / file)
