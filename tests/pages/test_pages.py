"""Pages as text: one file that needs no other, names that stay names, writing that leaves nothing half-written."""

import io
import json
import os
import pickle
import stat
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch import nn

import initlab
from initlab import cli
from initlab.pages import write_page

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cases import HOSTILE, made

pytest.importorskip("matplotlib")
VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use"}


class Page(HTMLParser):
    """Tags, attributes, text; and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.texts = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def found():
    return made("hostile")


@pytest.fixture(scope="module")
def text(found, tmp_path_factory):
    return found.save(tmp_path_factory.mktemp("page") / "report.html").read_text(encoding="utf-8")


def test_a_page_is_one_file(text):
    page = Page(text)
    assert page.open == []
    assert len(text.encode()) < 1.5e6
    assert [attributes for attributes in page.all("script") if attributes] == []
    assert len(page.all("script")) == 1
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in text
    assert {part[:1] for part in text.split("url(")[1:]} <= {"#"}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    held = {attributes["xlink:href"][1:] for attributes in page.all("use")}
    assert held <= set(ids)


def test_names_stay_names(text, found):
    page = Page(text)
    assert repr(HOSTILE) in page.text  # as a key, in code
    assert HOSTILE.replace(".", "") in page.text
    assert page.all("code")[0]["id"] == "remedy-1"
    assert found.causes[0].remedy in page.text


def test_plots_are_labelled_and_their_text_is_text(text):
    page = Page(text)
    plots = [attributes for attributes in page.all("svg") if attributes.get("class") == "plot"]
    assert len(plots) == len(page.all("figure")) >= 6
    for plot in plots:
        assert plot["role"] == "img"
        assert len(plot["aria-label"]) > 20
    assert "healthy range" in page.text
    # Every colour is one of the page's, so that it has another one in the dark.
    drawn = text[text.index("<svg") : text.rindex("</svg>")]
    assert "#ffffff" not in drawn
    assert not [
        word for word in drawn.replace(";", " ").replace('"', " ").split() if word.startswith("#") and len(word) == 7
    ]


def test_the_same_diagnosis_gives_the_same_bytes(text, found, tmp_path):
    again = pickle.loads(pickle.dumps(found)).save(tmp_path / "other.html")
    assert again.read_text(encoding="utf-8") == text


class _NoMatplotlib:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_without_matplotlib_tables_stand_in_place_of_plots(lang, found, text, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoMatplotlib(), *sys.meta_path])
    page = Page(found.save(tmp_path / "report.html", lang=lang).read_text(encoding="utf-8"))
    assert not page.all("svg")
    said = {"en": "matplotlib is not installed, so tables stand", "zh": "\u672a\u5b89\u88c5 matplotlib\uff0c"}
    assert said[lang] in page.text
    assert len(page.all("table")) == len(Page(text).all("table"))
    assert all("open" in attributes for attributes in page.all("details"))
    with pytest.raises(ImportError, match=r'pip install "initlab\[plots\]"'):
        found.plot()


@pytest.mark.long
def test_a_plot_that_cannot_be_drawn_is_a_table(found, tmp_path, monkeypatch):
    monkeypatch.setattr("initlab.plots.losses._draw", lambda *_: 1 / 0)
    page = Page(found.save(tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "this plot cannot be drawn: ZeroDivisionError: division by zero" in page.text
    assert [attributes for attributes in page.all("details") if "open" in attributes] == [{"open": None}]


def test_chinese(found, tmp_path):
    page = Page(found.save(tmp_path / "report.html", lang="zh").read_text(encoding="utf-8"))
    assert page.all("html") == [{"lang": "zh-CN"}]
    assert "\u7ed3\u8bba" in page.text
    with pytest.raises(ValueError, match="lang is 'de'"):
        found.save(tmp_path / "german.html", lang="de")
    assert sorted(os.listdir(tmp_path)) == ["report.html"]


def test_what_cannot_be_written_leaves_nothing(found, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"report.pdf'; a page is written as HTML, so its name must end in .html"):
        found.save(tmp_path / "report.pdf")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*nowhere': create it first"):
        found.save(tmp_path / "nowhere" / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(IsADirectoryError, match="which is a folder"):
        found.save(tmp_path / "folder.html")
    assert os.listdir(tmp_path) == ["folder.html"]
    (tmp_path / "old.html").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_page(tmp_path / "old.html", lambda: "new")
    assert (tmp_path / "old.html").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["folder.html", "old.html"]


def test_a_page_is_a_file_like_others(tmp_path):
    path = tmp_path / "report.HTML"
    assert write_page(str(path), lambda: "one \ud800") == path
    assert path.read_text() == "one &#55296;"  # a half of a pair, as a name may hold
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    (tmp_path / "link.html").symlink_to(path)
    write_page(tmp_path / "link.html", lambda: "two")
    assert (tmp_path / "link.html").is_symlink()
    assert path.read_text() == "two"


def test_a_diagnosis_without_measurements_has_a_page(tmp_path):
    bare = initlab.Diagnosis((), losses=(None, float("inf")))
    page = Page(bare.save(tmp_path / "bare.html").read_text(encoding="utf-8"))
    assert "verdict: healthy" in page.text
    assert not page.all("svg")
    assert bare.plot().get_axes() == []


@pytest.mark.long
def test_plan_and_doctor_write_pages(tmp_path, capsys):
    source = tmp_path / "training.py"
    source.write_text(
        "import torch, initlab\ndef build():\n    x = torch.full((4, 2), float('nan'))\n"
        "    return torch.nn.Linear(2, 1), (x, torch.zeros(4, 1)), initlab.supervised(torch.nn.MSELoss())\n"
        "if __name__ == '__main__':\n    model, batch, loss_fn = build()\n    loss_fn(model, batch).backward()\n"
    )
    for command, target, status in (("plan", ":build", 0), ("doctor", ":build", 2), ("doctor", "", 2)):
        path = tmp_path / "report.html"
        assert cli.main([command, "--html", str(path), f"{source}{target}"]) == status
        assert "wrote" in capsys.readouterr().err
        assert "<h1>" in path.read_text()
        path.unlink()
    with pytest.raises(SystemExit, match="64"):
        cli.main(["plan", "--html", str(tmp_path / "report.txt"), f"{source}:build"])
    assert "must end in .html" in capsys.readouterr().err


def test_init_reports_are_plotted(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    report = initlab.init_model_(model, seed=0, recipe="he")
    axes = report.plot().get_axes()[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert list(drawn["by the recipe"]) == pytest.approx([(2 / 8) ** 0.5, (2 / 16) ** 0.5])
    assert list(drawn["now"]) == pytest.approx(
        [float(model[at].weight.detach().std(correction=0)) for at in (0, 2)], rel=1e-5
    )
    page = Page(report.save(tmp_path / "plan.html").read_text(encoding="utf-8"))
    assert "2.weight" in page.text
    del model
    assert "now" not in {line.get_label() for line in report.plot().get_axes()[0].get_lines()}


def test_a_layer_of_zeros_and_one_that_is_not_finite_have_marks():
    rows = tuple(
        initlab.LayerRow(name, "Linear", "float32", std, None, std, 1.0, gradient)
        for name, std, gradient in (("a", 1.0, 0.0), ("b", 0.0, 1.0), ("c", float("nan"), float("inf")))
    )
    figure = initlab.Diagnosis((), layers=rows).plot()
    for axes, at_0, bad in zip(figure.get_axes(), (2, 1), (3, 3), strict=True):
        marks = {line.get_marker(): list(line.get_xdata()) for line in axes.get_lines()}
        assert (marks["v"], marks["X"]) == ([at_0], [bad])


def test_the_last_line_of_a_cell_shows_the_plots():
    """As IPython asks for a picture; a copy of the figure has one too."""
    rows = (initlab.LayerRow("a", "Linear", "float32", 1.0, None, 1.0, 1.0, 0.0),)
    figure = initlab.Diagnosis((), layers=rows).plot()
    image = pytest.importorskip("matplotlib.image")
    for one in (figure, pickle.loads(pickle.dumps(figure))):
        height, width, _ = image.imread(io.BytesIO(one._repr_png_()), format="png").shape
        assert min(height, width) > 100


def test_measurements_are_plain_data(found):
    plain = found.to_dict()["measurements"]
    assert plain == json.loads(json.dumps(plain, allow_nan=False))
    assert [row["std"] > 10 for row in plain["weights"]] == [True] * 3


def test_deep_models_stay_small(tmp_path):
    rows = tuple(
        initlab.LayerRow(f"encoder.layers.{at}.linear", "Linear", "float32", 1.0, 1.0, 3.0, 1e30, 1e-3)
        for at in range(3000)
    )
    assert initlab.Diagnosis((), layers=rows).save(tmp_path / "deep.html").stat().st_size < 1.5e6


@pytest.mark.long
def test_importing_initlab_does_not_import_matplotlib(python):
    script = "import sys, torch, initlab; found = initlab.diagnose(torch.nn.Linear(1, 1), torch.ones(2, 1), "
    script += "lambda m, x: m(x).mean()); print('matplotlib' in sys.modules)"
    assert python(script).strip() == "False"
