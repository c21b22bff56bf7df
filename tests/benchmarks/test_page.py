"""The page of `make bench`, of constructed rounds and of a run that a wrong result ends."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[2] / "benchmarks"
_SPEC = importlib.util.spec_from_file_location("initlab_benchmarks_page", _FOLDER / "page.py")
page = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(page)


def row(case, ours, peer, others=None, sweep=None, elements=1000):
    rounds = {"ours": [ours] * 7, "peer": [peer * f for f in (0.8, 0.9, 1.0, 1.0, 1.0, 1.1, 1.2)], "floor": [1e-7] * 7}
    others = {name: [seconds] * 7 for name, seconds in (others or {}).items()}
    return {"case": case, **rounds, "others": others, "elements": elements, "element_size": 4, "sweep": sweep}


@pytest.fixture
def result():
    sampling = [row(f"benchmarks/bench_sampling.py::test_sampling[{n}-float32]", 1e-6, 3e-6) for n in ("a_", "b_")]
    swept = [
        row(
            f"bench_scaling.py::test_elements[{n}]",
            n * 1e-9,
            n * 2e-9,
            {"numpy": n * 4e-9},
            ["normal_", "elements", n],
            n,
        )
        for n in (1024, 4096, 1 << 24)
    ]
    made = {
        "machine": "a <machine>",
        "date": "2026-01-01",
        "command": "make bench",
        "commit": "abc",
        "versions": {"torch": "2"},
    }
    left = {"bench_scaling.py::test_libraries[timm]": "timm is not installed"}
    return {"made": made | {"copy_bytes_per_second": 1e10}, "rows": sampling + swept, "left_out": left}


def test_every_contestant_has_a_mark_and_every_case_its_spread(result):
    text = page.page(result)
    assert text.count("<svg") == 2
    for name in (
        "a_, float32",
        "b_, float32",
        "initlab",
        "torch",
        "numpy",
        "timm is not installed",
        "a &lt;machine&gt;",
    ):
        assert f">{name}<" in text or name in text
    assert text.count("<td>3 [2.85, 3.15]</td>") == 2  # the middle half of 2.4, 2.7, 3, 3, 3, 3.3, 3.6
    assert len(re.findall(r"<td>4 \[4, 4\]</td>", text)) == 3  # numpy's
    assert "<td>1</td>" in text  # ns per element


def test_two_cases_of_one_name_are_no_bar(result):
    result["rows"][1]["case"] = result["rows"][0]["case"]
    with pytest.raises(AssertionError, match="one name"):
        page.page(result)


@pytest.mark.long  # pytest-benchmark is among the requirements of the long tests
def test_a_run_makes_a_page_and_a_wrong_result_ends_it(tmp_path):
    """The suites with all their peers, small; then with a fill_ that leaves the last element out."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "INITLAB_BENCH_RESULTS": str(tmp_path / "bench.json"), "INITLAB_BENCH_ELEMENTS": "4096"}
    suite = f"{_FOLDER / 'bench_scaling.py'}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "--exitfirst"]

    def run(*more):
        done = subprocess.run(
            [*command, *more, suite, "-k", "elements or tensors"],
            env=environment,
            cwd=_FOLDER.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    status, printed = run()
    assert status == 0, printed
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(found["rows"]) == 2 * 2 + 5
    assert page.page(found).count("<svg") == 3

    (tmp_path / "spoiled.py").write_text(
        "from initlab.kernels import sampling\n"
        "import initlab.kernels as kernels\n"
        "right = kernels.fill_\n"
        "def wrong(draws, *rest, **named):\n"
        "    right(draws, *rest, **named)\n"
        "    draws[0].tensor.view(-1)[-1] = 7.0\n"
        "kernels.fill_ = wrong\n"
    )
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    (tmp_path / "bench.json").unlink()
    status, printed = run("-p", "spoiled")
    assert not (tmp_path / "bench.json").exists()
    assert status == 1
    assert "1 failed" in printed
    assert "passed" not in printed
