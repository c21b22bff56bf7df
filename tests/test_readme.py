"""What README.md and pages of docs/ show runs as it stands, and prints what they say it prints."""

import contextlib
import doctest
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


SHOWN = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "examples/README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
BLOCKS = [
    pytest.param(page, number, id=f"{page}-{number}")
    for page in sorted(PAGES)
    if page != "docs/stack.md"  # tests/integrations/test_stack.py
    for number in range(len(SHOWN.findall((ROOT / page).read_text())))
]
# Diagnoses take seconds, as does the import of a library.
SLOW = (
    "docs/guard.md",
    "docs/models.md",
    "docs/my-loss-is-inf.md",
    "docs/my-loss-is-inf.zh-CN.md",
    "docs/distributed.md",
)


@pytest.mark.parametrize(("page", "number"), BLOCKS)
@pytest.mark.long_if(lambda page, number: page in SLOW)
@pytest.mark.filterwarnings("default")  # as for a reader
def test_code_runs_alone_and_prints_what_the_page_shows(page, number, tmp_path, monkeypatch):
    """A block runs as a reader would paste it, under torchrun where it says so. `...` stands for lines left out."""
    monkeypatch.chdir(tmp_path)  # some of the code writes where it runs
    code, wanted = SHOWN.findall((ROOT / page).read_text())[number]
    if command := re.match(r"# (\w+\.py).*: torchrun (.*)\n", code):
        printed = under_torchrun(command[1], command[2].split(), code)
    else:
        torch.manual_seed(0)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, page, "exec"), {})
        printed = out.getvalue()
    same = doctest.OutputChecker().check_output(wanted, printed, doctest.ELLIPSIS)
    unshown = not wanted and "print(" in code  # what it prints is left to the reader
    assert same or unshown, f"the page shows\n{wanted}\nand its code prints\n{printed}"


def test_the_pages_have_their_blocks():
    """A block that is not found would not be run."""
    counted = {page: len(SHOWN.findall((ROOT / page).read_text())) for page in PAGES}
    known = {"README.md": 3, "docs/getting-started.md": 3, "docs/guard.md": 3, "docs/linear-relu.md": 2}
    known |= {"docs/clip.md": 3, "docs/distributed.md": 3, "docs/models.md": 9, "docs/my-loss-is-inf.zh-CN.md": 1}
    assert {page: counted[page] for page in known} == known
    fences = {page: (ROOT / page).read_text().count("```python\n") for page in PAGES}
    assert counted == fences


def under_torchrun(name, arguments, code):
    """What a script prints that is saved here under its name."""
    Path(name).write_text(code)
    run = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_chinese_readme_shows_the_same():
    """The same code, the same output, and the same figures."""
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    for pattern in (r"```.*?```", r"^ {4}\S.*$", r"^\|.*?\| (.*)$"):
        shown = [
            re.findall(pattern, page, re.DOTALL if "```" in pattern else re.MULTILINE) for page in (english, chinese)
        ]
        shown = [[row for row in rows if "ratio" not in row and "\u500d" not in row] for rows in shown]
        assert shown[0] == shown[1] != []


@pytest.mark.parametrize(
    "page", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", *map(str, sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(page):
    """Links to files of the project and to headings in them."""
    path = ROOT / page
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        other = path.parent / target if target else path
        assert other.exists(), f"{page} links to {target}"
        if heading and other.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
            assert heading in anchors, f"{page} links to {target}#{heading}"
