"""`initlab doctor SCRIPT` on the scripts of field/: as people write them, by somebody who knew none of its checks.

There are two sets, the second written when what the first had shown was mended. answers.json says of each script
whether it is broken, which kinds of cause are right, and in which line its mistake is. No script was changed for the
doctor. A third of them is tested here; all of them, with what they cost, by

    python tests/scripts/test_field.py first|second [--time N] [NAME ...]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

FIELD = Path(__file__).parent / "field"
ROOT = Path(__file__).resolve().parents[2]
SETS = ("first", "second")
ANSWERS = {
    f"{folder}/{name}": answer
    for folder in SETS
    for name, answer in json.loads((FIELD / folder / "answers.json").read_text()).items()
}
QUICK = (
    *("first/review_stars", "first/metric_learning", "first/box_regressor", "first/cosine_head", "first/ring_gan"),
    *("first/warmup_spirals", "first/seq_reverse", "second/ring_gan", "second/resume_training", "second/recall_first"),
    *("second/blobs_accelerate", "second/corridor_reinforce", "second/denoise_ema", "second/logcosh_function"),
    *("second/majority_transformer", "second/pinn_decay"),
)

pytestmark = pytest.mark.long


def run(name, *command):
    """What a script printed, and the seconds of CPU that it took."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command, str(FIELD / name), *ANSWERS[name]["args"]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=(FIELD / name).parent,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def results(text, printed):
    """The lines of a script that say what came of it, of all that was printed: all of them, where none is marked."""
    lines = printed.splitlines()
    wanted = {line for line in lines if line.startswith("RESULT")} or set(lines)
    return [line for line in text.splitlines() if line in wanted]


def judge(name):
    """Whether the doctor is right about a script; and what it said."""
    answer = ANSWERS[name]
    done, _ = run(name, "-m", "initlab", "doctor", "--json")
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return False, f"status {done.returncode}: {done.stderr[-500:]}"
    kinds = [cause["kind"] for cause in (report["diagnosis"] or {"causes": []})["causes"]]
    said = f"{report['verdict']}, line {report['line']}: {report['stopped'] or 'nothing'}; {', '.join(kinds)}"
    if answer["broken"]:
        return bool(kinds) and kinds[0] in answer["kinds"], said
    plain, _ = run(name)
    same = results(done.stderr, plain.stdout) == results(plain.stdout, plain.stdout) != []
    return not kinds and same, f"{said}{'' if same else '; OTHER RESULTS'}"


@pytest.mark.parametrize("name", QUICK)
def test_a_script(name):
    right, said = judge(f"{name}.py")
    assert right, said


def test_there_are_as_many_as_are_claimed():
    for folder in SETS:
        broken = [answer["broken"] for name, answer in ANSWERS.items() if name.startswith(folder)]
        assert (sum(broken), len(broken)) == (20, 25)
    assert {path.relative_to(FIELD).as_posix() for path in FIELD.glob("*/*.py")} == set(ANSWERS)


def share_of_time(name, times):
    """The CPU time under the doctor over that without: the median of pairs that were run in turn."""
    shares = []
    for _ in range(times):
        plain, ours = run(name)[1], run(name, "-m", "initlab", "doctor")[1]
        shares.append(ours / plain)
    return f"{plain:.1f} s without, times {statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of sets or scripts; all by default")
    parser.add_argument("--time", type=int, default=0, metavar="N", help="time the healthy ones N times instead")
    arguments = parser.parse_args()
    names = [
        name
        for name in ANSWERS
        if not arguments.names or {name.removesuffix(".py"), name.split("/")[0]} & {*arguments.names}
    ]
    right = 0
    for name in names:
        if arguments.time:
            if not ANSWERS[name]["broken"]:
                print(name, share_of_time(name, arguments.time), flush=True)
            continue
        begin = time.monotonic()
        good, said = judge(name)
        right += good
        wanted = "/".join(ANSWERS[name]["kinds"]) or "healthy"
        print(
            f"{'ok ' if good else 'BAD'} {name} ({time.monotonic() - begin:.0f} s) wanted {wanted}: {said}", flush=True
        )
    if not arguments.time:
        print(f"{right} of {len(names)}")


if __name__ == "__main__":
    main()
