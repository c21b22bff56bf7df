"""The versions of docs/support.md: what tools/matrix.py would install and run."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import matrix  # noqa: E402


def test_rows_and_their_tests_exist():
    assert len(matrix.ROWS) == len(set(matrix.ROWS)) <= 12
    for row in matrix.ROWS:
        assert row.torch in {*matrix.TRITON, "newest"}
        assert row.python in matrix.OLDEST_NUMPY
        assert matrix.requirements(row)
    assert all((ROOT / name).is_file() for name in matrix.QUICK)
    had = {(f"torch {row.torch}", f"python {row.python}") for row in matrix.ROWS}
    assert not had & set(matrix.uncovered())


def test_a_cell_says_what_was_skipped_and_why():
    output = "SKIPPED [3] a.py:7: could not import 'numba': no\nSKIPPED [1] b.py:9: no GPU\n"
    output += "1 failed, 7 passed, 4 skipped in 2s"
    assert matrix.summary(output, 1) == "7 passed, 4 skipped (numba 3, no GPU 1), **1 failed**"
    assert matrix.summary("killed", 137) == "did not run (exit code 137)"
