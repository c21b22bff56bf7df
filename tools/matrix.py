"""Runs the quick tests and the golden values in the versions that users have, and writes docs/support.md's table.

`python tools/matrix.py WORK` makes a venv for each row in the folder WORK, one after the other: it installs this tree's
wheel with the row's versions, runs QUICK there, removes the venv, and puts the row into docs/support.md.
`--rows 1 5` takes some of them. uv installs where it is on PATH, else pip. An interpreter is looked for on PATH as
`python3.N`, and where `--python 3.N=PATH` says. A row downloads up to 3 GB, which a cache keeps, needs 6 GB of disk,
and takes some five minutes on two idle cores.

Twelve rows cannot hold every pair of versions: `--uncovered` lists the pairs that no row has.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
MINUTES = 25  # for the tests of a row, on a busy machine

TRITON = {
    "2.11.0": "3.6.0",
    "2.12.1": "3.7.1",
    "2.13.0": "3.7.1",
    "2.14.1": "3.8.0",
    "2.15.0": "3.9.0",
}  # what torch pins
OLDEST_NUMPY = {"3.10": "1.26.0", "3.11": "1.26.0", "3.12": "1.26.0", "3.13": "2.1.0", "3.14": "2.3.2"}  # with wheels
OLDEST_NUMBA = {"3.14": "0.63.0"}  # with wheels; elsewhere pyproject's
BOUND_NUMBA = "0.61.0"


@dataclass(frozen=True)
class Row:
    """Versions that are installed together. torch: a version, or "newest". The others: "oldest", "newest" or "none"."""

    torch: str
    python: str
    numpy: str
    numba: str
    triton: str  # "pinned" by torch, or "none"


ROWS = (
    Row("2.11.0", "3.10", "oldest", "oldest", "pinned"),
    Row("2.11.0", "3.12", "newest", "newest", "pinned"),
    Row("2.11.0", "3.14", "newest", "none", "none"),
    Row("2.12.1", "3.11", "oldest", "newest", "none"),
    Row("2.12.1", "3.13", "newest", "none", "pinned"),
    Row("2.13.0", "3.11", "newest", "newest", "pinned"),
    Row("2.13.0", "3.12", "oldest", "none", "none"),
    Row("2.14.1", "3.10", "newest", "newest", "none"),
    Row("2.14.1", "3.13", "oldest", "oldest", "pinned"),
    Row("2.15.0", "3.11", "newest", "none", "pinned"),
    Row("2.15.0", "3.14", "oldest", "oldest", "pinned"),
    Row("newest", "3.12", "newest", "newest", "pinned"),
)

# A minute or two: the stream's values, what each backend computes, and what torch has changed before.
QUICK = (
    "tests/kernels/test_golden.py",
    "tests/kernels/test_stream.py",
    "tests/kernels/test_nonfinite.py",
    "tests/kernels/test_torch_internals.py",
    "tests/clipping/test_clipper.py",
    "tests/distributed/test_shards.py",
    "tests/models/test_values.py",
    "tests/test_tree.py",
    "tests/ptx/test_devices.py",
)
TEST_PACKAGES = ("pytest==9.1.1", "hypothesis", "scipy", "safetensors", "packaging")


def requirements(row: Row) -> list[str]:
    """What pip is asked for beside this tree's wheel."""
    found = []
    if row.torch != "newest":
        found += [f"torch=={row.torch}"]
        if row.triton == "pinned":
            found += [f"triton=={TRITON[row.torch]}"]
    if row.numpy == "oldest":
        found += [f"numpy=={OLDEST_NUMPY[row.python]}"]
    if row.numba == "oldest":
        found += [f"numba=={OLDEST_NUMBA.get(row.python, BOUND_NUMBA)}"]
    return [*found, *TEST_PACKAGES]


def uncovered(rows: Sequence[Row] = ROWS) -> list[tuple[str, str]]:
    """The pairs of two columns' values that no row has."""
    values = {name: list(dict.fromkeys(asdict(row)[name] for row in rows)) for name in asdict(rows[0])}
    missing = []
    for a, b in itertools.combinations(values, 2):
        had = {(asdict(row)[a], asdict(row)[b]) for row in rows}
        missing += [(f"{a} {x}", f"{b} {y}") for x, y in itertools.product(values[a], values[b]) if (x, y) not in had]
    return missing


def versions(python: Path) -> dict[str, str]:
    """What was installed, by name; "none" for what was not."""
    code = """
import importlib.metadata as m, platform
print("python", platform.python_version())
for name in ("torch", "triton", "numba", "numpy"):
    try: print(name, m.version(name))
    except m.PackageNotFoundError: print(name, "none")
"""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


def summary(output: str, rc: int) -> str:
    """A cell: how many tests passed, were skipped and why, and failed."""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped|failed|error)", output.splitlines()[-1])}
    if not counts:
        return f"did not run (exit code {rc})"
    reasons: Counter[str] = Counter()
    for number, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", output, re.MULTILINE):
        missing = re.search(r"could not import '(\w+)|No module named '(\w+)|without (\w+)", reason)
        name = next(filter(None, missing.groups())) if missing else reason
        reasons[name if len(name) < 60 else name[:57] + "..."] += int(number)
    why = ", ".join(f"{name} {n}" for name, n in reasons.most_common())
    cell = f"{counts.get('passed', 0)} passed"
    if "skipped" in counts:
        cell += f", {counts['skipped']} skipped ({why})"
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return cell + (f", **{failed} failed**" if failed else "")


UV = shutil.which("uv")  # installs in a fraction of pip's time, by links into its cache


def venv_command(interpreter: str, venv: Path) -> list[str | Path]:
    """The command that makes a venv."""
    return [UV, "venv", "--quiet", "--python", interpreter, venv] if UV else [interpreter, "-m", "venv", venv]


def pip(python: Path, action: str, *options: str | Path) -> list[str | Path]:
    """The command that installs packages into a venv, or removes them from it."""
    if UV:
        return [UV, "pip", action, "--quiet", "--python", python, *options]
    extra = {"install": ["--no-compile"], "uninstall": ["--yes"]}[action]
    return [python, "-m", "pip", action, "--quiet", *extra, *options]


def run(command: Sequence[str | Path], log: Path, minutes: float, **environment: str) -> tuple[int, str]:
    """The exit code and the output of a command, which is appended to the log."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_"))} | environment
    try:
        done = subprocess.run(
            list(map(str, command)),
            cwd=log.parent,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * minutes,
            check=False,
        )
        rc, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        kept = error.stdout or b""
        rc, output = 124, (kept.decode() if isinstance(kept, bytes) else kept) + f"\nstopped after {minutes} minutes"
    with log.open("a") as file:
        print("$", *command, file=file)
        print(output, file=file)
    return rc, output


def try_row(row: Row, interpreter: str, tree: Path, wheel: Path, work: Path, keep: bool) -> tuple[dict[str, str], str]:
    """The versions installed, and the cell."""
    number = ROWS.index(row) + 1
    venv, log = work / f"row{number}", work / f"row{number}.log"
    log.unlink(missing_ok=True)
    python = venv / "bin" / "python"
    try:
        if not (keep and python.exists()):
            shutil.rmtree(venv, ignore_errors=True)
            for command in (venv_command(interpreter, venv), pip(python, "install", wheel, *requirements(row))):
                rc, output = run(command, log, 30)
                if rc:
                    reason = " ".join(output.split())[-200:]
                    return asdict(row), f"not installable: {reason}"
        else:
            run(pip(python, "install", "--no-deps", "--reinstall" if UV else "--force-reinstall", wheel), log, 5)
        absent = [name for name in ("numba", "triton") if asdict(row)[name] == "none"]
        if absent:
            run(pip(python, "uninstall", *absent), log, 5)
        command = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-c", tree / "pyproject.toml"]
        command += ["--rootdir", tree, "--durations=15", *(tree / name for name in QUICK)]
        rc, output = run(command, log, MINUTES, OMP_NUM_THREADS="1")
        return versions(python), summary(output.rstrip() or "nothing", rc)
    finally:
        if not keep:
            shutil.rmtree(venv, ignore_errors=True)


HEADER = ("#", "Python", "torch", "Triton", "numba", "numpy", "quick tests", "date")
BEGIN, END = "<!-- matrix.py writes from here -->", "<!-- to here -->"


def write(number: int, installed: dict[str, str], cell: str) -> None:
    """Put a row into the page's table, in place of the one that it had."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    table, _, tail = rest.partition(END)
    rows = dict(_numbered(table))
    names = ("python", "torch", "triton", "numba", "numpy")
    cells = [str(number), *(installed[name] for name in names), cell, datetime.date.today().isoformat()]
    rows[number] = f"| {' | '.join(cells)} |"
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", *(rows[n] for n in sorted(rows))]
    PAGE.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n" + END + tail)


def _numbered(table: str) -> Iterator[tuple[int, str]]:
    for line in table.splitlines():
        if found := re.match(r"\| (\d+) \|", line):
            yield int(found[1]), line


def main() -> int:
    """Run the rows; 0 if no test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, nargs="?", help="a folder for venvs and logs")
    parser.add_argument("--uncovered", action="store_true", help="only list the pairs that no row has")
    parser.add_argument("--rows", type=int, nargs="*", default=[*range(1, len(ROWS) + 1)], help="numbers from 1")
    parser.add_argument("--python", action="append", default=[], metavar="3.N=PATH", help="an interpreter")
    parser.add_argument("--keep", action="store_true", help="keep the venvs, and use those that were kept")
    arguments = parser.parse_args()
    if arguments.uncovered or arguments.work is None:
        print(*map(" with ".join, uncovered()), sep="\n")
        return 0
    interpreters = dict(pair.split("=", 1) for pair in arguments.python)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    tree = work / "tree"  # a copy: building writes beside setup.py, and this tree may be edited meanwhile
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "build", "dist")
    )
    rc, output = run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", work, tree], work / "build.log", 10
    )
    if rc:
        raise SystemExit(output)
    (wheel,) = work.glob("initlab-*.whl")
    good = True
    for number in arguments.rows:
        row = ROWS[number - 1]
        interpreter = interpreters.get(row.python) or shutil.which(f"python{row.python}")
        if interpreter is None:
            installed, cell = asdict(row), f"not run: no Python {row.python} at hand"
        else:
            installed, cell = try_row(row, interpreter, tree, wheel, work, arguments.keep)
        print(number, *installed.values(), cell, flush=True)
        write(number, installed, cell)
        good &= "passed" in cell and "failed" not in cell
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
