"""Pages in Chromium, reports and the site: several widths, light and dark; no request, no error, no serious fault."""

import functools
import http.server
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch

import initlab

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cases import CASES, made

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("browser")]  # one browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZES = (390, 1024, 1600)
EXAMINED = ("digits", "hostile", "script", "plan")  # at every width
# The shapes that have an area or a length on the screen, of each plot.
MARKS = """() => [...document.querySelectorAll("svg.plot")].map(plot => {
    const own = plot.querySelectorAll("path, use, rect, circle, polygon");
    const seen = [...own].filter(mark => {
        const box = mark.getBoundingClientRect(), style = getComputedStyle(mark);
        const drawn = style.fill !== "none" || style.stroke !== "none";
        return !mark.closest("defs, clipPath") && drawn && box.width + box.height > 1;
    });
    const data = seen.filter(mark => mark.closest('[id*="line2d_"], [id*="patch_"], [id*="PolyCollection"]'));
    return [plot.closest("figure").id, data.length, plot.getBoundingClientRect().width];
})"""


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("this machine has no Chromium, and .ci/install_chromium could not get it: apt-get install chromium")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium does not run as root with one
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=options)
        yield opened
        opened.close()


def plan():
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    return initlab.plan_model(model, seed=0, recipe="he")


def script(tmp_path):
    from initlab.scripts import run_script

    path = tmp_path / "train.py"
    path.write_text(
        "import torch\nmodel = torch.nn.Linear(4, 1)\noptimizer = torch.optim.SGD(model.parameters(), lr=1e6)\n"
        "x, y = torch.randn(16, 4), torch.randn(16, 1)\nfor step in range(200):\n    optimizer.zero_grad()\n"
        "    loss = ((model(x) - y) ** 2).mean()\n    loss.backward()\n    optimizer.step()\n"
    )
    return run_script(str(path), [])


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports by name, each made once."""
    known = {}

    def report(name):
        if name not in known:
            special = {"plan": plan, "script": lambda: script(tmp_path_factory.mktemp("script"))}
            known[name] = special[name]() if name in special else made(name)
        return known[name]

    return report


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "lang"), [*((name, "en") for name in (*CASES, "plan", "script")), ("float16", "zh"), ("plan", "zh")]
)
def test_a_page_in_a_browser(name, lang, scheme, browser, reports, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    path = reports(name).save(tmp_path / "report.html", lang=lang)
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    page.on("request", lambda request: asked.append(request.url))
    colours = set()
    for width in SIZES:
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(path.as_uri())
        assert page.title() != "ran"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        plots = page.evaluate(MARKS)
        assert plots, "no plot"
        for key, marks, shown in plots:
            assert marks >= 2, key  # what is measured, and something to compare it with
            assert 200 < shown <= width, key
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        if name in EXAMINED or width == 390:  # the same elements at each width; it takes seconds
            found = axe.run(page).response["violations"]
            assert [one for one in found if one["impact"] in ("serious", "critical")] == []
    assert colours == {"rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 20, 25)"}
    assert set(asked) == {path.as_uri()}
    assert said == []
    context.close()


def test_the_button_copies_the_remedy(browser, reports, tmp_path):
    report = reports("digits")
    context = browser.new_context()
    page = context.new_page()
    page.goto(report.save(tmp_path / "report.html").as_uri())
    page.click("button.copy")
    assert page.text_content("button.copy") == "Copied"
    page.set_content("<textarea></textarea>")
    page.click("textarea")
    page.keyboard.press("Control+V")
    assert page.input_value("textarea").strip() == report.causes[0].remedy.strip()
    context.close()


def test_a_script_that_is_not_ours_does_not_run(browser, reports, tmp_path):
    """The policy holds also where the escaping would not."""
    path = reports("single").save(tmp_path / "report.html")
    text = path.read_text().replace("<footer>", "<script>document.title = 'ran'</script><img src='http://a.invalid/b'>")
    path.write_text(text)
    context = browser.new_context()
    page = context.new_page()
    refused = []
    page.on("requestfailed", lambda request: refused.append((request.url, request.failure)))
    page.goto(path.as_uri())
    assert page.title() != "ran"
    assert refused == [("http://a.invalid/b", "csp")]
    context.close()


SITE = Path(__file__).resolve().parents[2] / "build" / "site"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/favicon.ico":  # browsers ask for one by themselves
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    """The address of the site that `make docs` has built, served from here."""
    if not (SITE / "index.html").exists():
        pytest.skip("there is no build/site: make docs builds it, and make test-all does so first")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", "getting-started", "my-loss-is-inf.zh-CN", "models", "api"])
def test_a_page_of_the_site(name, scheme, browser, site):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(f"{site}/{name}.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    if name != "api":  # axe takes minutes for its 10,000 elements; it has none of a kind that the others lack
        found = axe.run(page).response["violations"]
        assert [one for one in found if one["impact"] in ("serious", "critical")] == []
    assert all(url.startswith((site, "data:")) for url in asked), asked
    assert said == []
    context.close()
