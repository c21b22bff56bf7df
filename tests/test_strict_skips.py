""".ci/strict_skips.py: a skip for want of a package fails, at collection and in a run; other skips stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parent.parent / ".ci"
TESTS = {
    "test_module.py": """
        import pytest
        pytest.importorskip("no_such_package")
        def test_never_reached():
            pass
    """,
    "test_functions.py": """
        import pytest
        def test_imports():
            pytest.importorskip("no_such_package")
        @pytest.fixture
        def package():
            return pytest.importorskip("no_such_package")
        def test_has_a_fixture(package):
            pass
        @pytest.mark.skipif(True, reason="no_such_package is not installed")
        def test_says_so():
            pass
        def test_needs_a_gpu():
            pytest.skip("there is no GPU")
        def test_passes():
            pass
        @pytest.mark.xfail(reason="no module named so")
        def test_is_known_to_fail():
            assert False
    """,
}


def run(folder: Path, *options: str) -> str:
    for name, text in TESTS.items():
        lines = text.strip("\n").splitlines()
        (folder / name).write_text("\n".join(line[8:] for line in lines))
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *options]
    env = os.environ | {"PYTHONPATH": str(PLUGIN), "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "1")], ids=["one process", "xdist"])
def test_a_missing_package_fails(workers: tuple[str, ...], tmp_path: Path) -> None:
    if workers:
        pytest.importorskip("xdist")
    output = run(tmp_path, *workers, "--continue-on-collection-errors", "-p", "strict_skips")
    assert "1 passed, 1 skipped, 1 xfailed" in output
    assert "FAILED test_functions.py::test_imports" in output
    for place in ("test_functions.py::test_has_a_fixture", "test_functions.py::test_says_so", "test_module.py"):
        assert f"ERROR {place}" in output
    assert "install it, or mark the test as `long`" in output


def test_without_the_plugin_it_is_a_skip(tmp_path: Path) -> None:
    output = run(tmp_path)
    assert "FAILED" not in output
    assert "ERROR" not in output
    assert "skipped" in output
