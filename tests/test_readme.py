"""What README.md and pages of docs/ show runs as it stands, and prints what they say it prints."""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


PAGES = [
    *(("README.md", 3), ("docs/getting-started.md", 3), ("docs/which-init.md", 1), ("docs/my-loss-is-inf.zh-CN.md", 1)),
    *(("docs/sampling.md", 1), ("docs/linear-relu.md", 2), ("docs/guard.md", 4)),
]
SLOW = ("docs/guard.md", "docs/my-loss-is-inf.zh-CN.md")  # diagnoses take seconds


@pytest.mark.parametrize(("page", "blocks"), PAGES)
@pytest.mark.long_if(lambda page, blocks: page in SLOW)
@pytest.mark.filterwarnings("default")  # as for a reader
def test_code_runs_and_prints_what_the_page_shows(page, blocks, tmp_path, monkeypatch):
    """Blocks run as a reader would paste them, alone where they import what they use, else one after the other.

    `...` stands for lines left out.
    """
    monkeypatch.chdir(tmp_path)  # some of the code writes where it runs
    shown = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", (ROOT / page).read_text(), re.DOTALL)
    assert len(shown) == blocks
    torch.manual_seed(0)
    scope = {}
    exec("import torch, initlab", scope)
    for code, wanted in shown:
        if code.startswith("import torch, initlab\n"):
            scope = {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), scope)
        same = doctest.OutputChecker().check_output(wanted, printed.getvalue(), doctest.ELLIPSIS)
        assert same, f"the page shows\n{wanted}\nand its code prints\n{printed.getvalue()}"


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
