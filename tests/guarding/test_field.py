"""Guards in the runs of field/: written from docs/guard.md alone, before any had run under a guard.

answers.json says of each which kinds of cause are right, and which words one has to say. A quarter of them is tested
here; all of them by

    python tests/guarding/test_field.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FIELD = Path(__file__).parent / "field"
ROOT = Path(__file__).resolve().parents[2]
ANSWERS = json.loads((FIELD / "answers.json").read_text())
QUICK = ("run01_mlp_poisson_units", "run03_gru_accumulation_padding", "run08_mlp_schedule_jump")


def says(text, words):
    """Whether a text has one of some words; a star stands for any ending."""
    ends = ((re.escape(word.rstrip("*")), "" if word.endswith("*") else r"(?![A-Za-z0-9])") for word in words)
    return any(re.search(rf"(?<![A-Za-z0-9]){core}{end}", text, re.IGNORECASE) for core, end in ends)


def judge(name):
    """Whether a guard was right about a run, by the stricter reading too, and whether the run went on; what it said."""
    done = subprocess.run(
        [sys.executable, str(FIELD / f"{name}.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"name"')]
    if not lines:
        return False, False, False, done.stderr[-500:]
    got, answer = json.loads(lines[-1]), ANSWERS[name]
    text = got["cause_text"]
    right = got["cause_kind"] in answer["kinds"] and says(text, answer["words"])
    right = right and ("also" not in answer or says(text, answer["also"]))
    strict = right and says(text, answer["strict_words"])
    return right, strict, got["went_on"], f"{got['cause_kind']}: {text[:100]}"


@pytest.mark.long
@pytest.mark.parametrize("name", QUICK)
def test_a_run(name):
    right, _, went_on, said = judge(name)
    assert right, said
    assert went_on, said


def main(names):
    results = []
    for name in names or ANSWERS:
        *result, said = judge(name)
        results.append(result)
        print(name, *result, said, flush=True)
    right, strict, went_on = (sum(column) for column in zip(*results, strict=True))
    print(f"of {len(results)}: {right} right, {strict} by the stricter reading, {went_on} went on")


if __name__ == "__main__":
    main(sys.argv[1:])
