"""compare.py on constructed rounds: a planted regression is found, noise and a slower machine are not."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

_PATH = Path(__file__).parents[2] / "benchmarks" / "compare.py"
_SPEC = importlib.util.spec_from_file_location("initlab_benchmarks_compare", _PATH)
compare = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(compare)


def result(seed, factor=1.0, machine=1.0, rounds=11, cases=40):
    """Rounds with 2 % of noise in each time, on a machine whose load drifts by up to a half."""
    rng = random.Random(seed)
    rows = []
    for case in range(cases):
        load = [machine * rng.uniform(1.0, 1.5) for _ in range(rounds)]
        ours = [factor * one * rng.lognormvariate(0.0, 0.02) for one in load]
        rows.append(
            {"case": f"case {case}", "ours": ours, "peer": [2 * one * rng.lognormvariate(0.0, 0.02) for one in load]}
        )
    return {"rows": rows}


def status(tmp_path, before, after):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, content in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(content))
    return compare.main([str(path) for path in paths])


def test_a_planted_regression_is_found(tmp_path, capsys):
    before, after = result(0), result(1)
    after["rows"][7] = result(2, factor=1.1)["rows"][7]
    assert status(tmp_path, before, after) == 1
    slower = [line for line in capsys.readouterr().out.splitlines() if line.startswith("slower")]
    assert len(slower) == 1
    assert slower[0].endswith("case 7")


def test_noise_and_a_slower_machine_are_no_regression(tmp_path):
    for seed in range(20):
        assert status(tmp_path, result(seed), result(1000 + seed, machine=1.7)) == 0


def test_an_improvement_is_no_regression(tmp_path, capsys):
    assert status(tmp_path, result(0), result(1, factor=0.9)) == 0
    assert capsys.readouterr().out.count("faster") >= 38


def test_too_few_rounds_and_other_cases_prove_nothing(tmp_path, capsys):
    assert status(tmp_path, result(0, rounds=3), result(1, factor=2.0, rounds=3)) == 2
    assert "too few rounds" in capsys.readouterr().out
    assert status(tmp_path, {"rows": []}, result(1)) == 2


@pytest.mark.parametrize("sizes", [(3, 4), (7, 7), (11, 5)])
def test_the_chance_is_scipys(sizes):
    rng = random.Random(str(sizes))
    before, after = ([rng.gauss(shift, 1.0) for _ in range(n)] for shift, n in zip((0.0, 0.7), sizes, strict=True))
    expected = stats.mannwhitneyu(after, before, alternative="greater", method="exact").pvalue
    assert compare.chance_of_slower(before, after) == pytest.approx(expected, rel=1e-12)


@pytest.mark.long  # pytest-benchmark is among the requirements of the long tests
def test_a_run_of_the_suites_writes_what_it_reads(tmp_path, capsys):
    path = tmp_path / "bench.json"
    # A worker of pytest-xdist disables benchmarks in what it starts, too.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "INITLAB_BENCH_RESULTS": str(path), "INITLAB_BENCH_ELEMENTS": "65536"}
    suite = f"{_PATH.parent / 'bench_sampling.py'}::test_sampling"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-only",
        suite,
        "-k",
        "uniform_",
    ]
    done = subprocess.run(command, env=environment, cwd=_PATH.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert len({row["case"] for row in rows}) == len(rows) == 4
    assert {len(row[name]) for row in rows for name in ("ours", "peer", "floor")} == {7}
    assert compare.main([str(path), str(path)]) == 0
    assert capsys.readouterr().out.count("same ") == 4
