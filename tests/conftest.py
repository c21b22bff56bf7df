"""What several test files share."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Triton's kernels run on a GPU where there is one, else on the CPU: in Triton's interpreter, or compiled for the GPU
# that INITLAB_TEST_DEVICE names (sm_80, sm_90, sm_100, sm_120), and emulated.
if "INITLAB_TEST_DEVICE" in os.environ:
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from initlab.kernels import backends
from initlab.kernels.sampling import fill

import initlab
from initlab.diagnosis.budget import Budget
from initlab.diagnosis.limits import LIMITS

if "INITLAB_TEST_DEVICE" in os.environ:
    sys.path.insert(0, str(Path(__file__).parent))
    from ptx import device

    device.install(int(os.environ["INITLAB_TEST_DEVICE"].removeprefix("sm_")))


@pytest.hookimpl(tryfirst=True)  # before pytest reads -m
def pytest_collection_modifyitems(items):
    """Mark as `long` the parameters that a test's `long_if` names."""
    for item in items:
        for mark in item.iter_markers("long_if"):
            if mark.args[0](**item.callspec.params):
                item.add_marker("long")


@pytest.fixture
def one_thread():
    """For small tensors: on a busy machine torch's threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unhurried():
    """Gives a diagnosis without a budget of its own ten minutes: what it says must not depend on a busy machine."""
    usual = Budget.__init__

    def patient(self, seconds, show=None):
        usual(self, 600.0 if seconds == LIMITS.budget else seconds, show)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "__init__", patient)
        yield


@pytest.fixture(scope="session")
def serving():
    """`with serving("torch"):` lets one backend serve every fill inside it, whatever the environment says."""

    @contextlib.contextmanager
    def serving(name):
        if name != "torch":
            pytest.importorskip(name)
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "requested", lambda: name)
            if name == "torch":
                torch.set_num_threads(1)  # on a busy machine its threads spin: 10 microseconds an element
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    return serving


@pytest.fixture(params=["torch", "numba"])
def backend(request, serving):
    """Runs the test once for each backend of the CPU; `indirect` parametrisation adds triton, in its interpreter."""
    with serving(request.param):
        yield request.param


@pytest.fixture(scope="session")
def bits():
    """A tensor's elements as bytes, one row each: equal only where the bit patterns are, NaNs and zeros included."""

    def bits(tensor):
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
        flat.view(tensor.shape).copy_(tensor.detach())
        if flat.is_complex():
            flat = torch.view_as_real(flat).view(-1)
        return flat.view(torch.uint8).view(tensor.numel(), tensor.element_size())

    return bits


@pytest.fixture
def forget():
    """Backend choices are made once in a process: forgets them before and after the test."""
    caches = (
        *(backends.requested, backends._installed, backends.interpreted, backends._too_old),
        *(backends._imported, fill._backend, fill._say_that_it_is_slow),
    )

    def forget():
        for cache in caches:
            cache.cache_clear()
        backends._warned.clear()

    forget()
    yield forget
    forget()


@pytest.fixture
def python(tmp_path):
    """Runs a script in a process of its own, on the initlab that this one imported; returns what it prints."""

    def python(script, *, root=Path(initlab.__file__).parent.parent, timeout=120, **environment):
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("INITLAB_", "NUMBA_"))}
        path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environ |= {"PYTHONPATH": os.pathsep.join(path)} | {k: str(v) for k, v in environment.items()}
        command = [sys.executable, "-W", "error", "-c", script]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return python
