"""The catalogue of Chinese messages: every message of the source has an entry, every entry a message of the source."""

import ast
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import initlab
from initlab.languages import LANGUAGES, translator

sys.path.insert(0, str(Path(__file__).resolve().parent))
from faults import FAULTS

PACKAGE = Path(initlab.__file__).parent
ENTRIES = json.loads((PACKAGE / "languages" / "zh.json").read_text(encoding="utf-8"))
# Where messages are written. Errors, which are raised, are English: they are looked up on the web.
PLACES = (
    *("diagnosis", "scripts", "data", "checkpoints", "models/report.py", "plots", "pages", "guarding", "watching"),
    *("fitting/advice.py", "fitting/advising.py", "fitting/objectives.py"),
)
PROSE = re.compile(r"[a-zA-Z]{2,}[,;:.]? [a-zA-Z]{2,}|[a-z]{2,} \{\}|\{\} [a-z]{2,}")
MARKUP = re.compile(r"<[a-z!]+\b[^>]*>")
FIELD = re.compile(r"\{(\d+)(?::t)?\}")

# Prose by its looks that nobody reads: parts of torch's own errors, code that does not parse by itself, identifiers.
NO_MESSAGES = {
    "scalar type",
    "should be the same",
    "not implemented for",
    "Using a target size",
    "invalid values",
    "inf or",
    "out of bounds",
    "out of range",
    "must be smaller",
    "var has negative entr",
    "probability tensor contains",
    "more than 1 value per channel",
    "does not require grad",
    "shapes cannot be multiplied",
    "expected input",
    "target tensor",
    "class probabilities",
    "backward through the graph a second time",
    "modified by an inplace operation",
    "is output \\d+ of (\\w+),",
    "GLOBAL (\\S+)|it calls (\\S+)",
    "no pickle that torch.load(weights_only=True) reads",
    # values of `problem`, and keys made of them
    "one unit",
    "row sums",
    "largest log-probability",
    "several classes",
    "no distribution",
    "most in a row",
    "one class",
    *("cross_entropy, " + problem for problem in ("no distribution", "one class", "one unit", "several classes")),
    "binary_cross_entropy, one unit",
    "nll_loss, one unit",
    # with one of two endings, each of which is an entry
    "the learning rate was 0 in all {} steps: no parameter has changed.{}",
    "the optimizer maximises{}",
    "{} in {} passes none on{}",
    "{}: {} steps{}, nothing to report",
    "also rank{} {}",
    "and {} more: rank{} {}",
    "{}: {} holds {}",
    # of warnings, which are English as errors are
    *(", micro-batch {}", "step {}{}: {}", "the step was skipped", "the step was taken as it was"),
    "shape {}",  # of an error
    # names of progress bars
    "initlab doctor",
    # the demo is English
    "initlab demo",
    "{}: {} first, {} last",
    "initlab scan",
    "initlab scan_data",
    # of pages and plots: versions, and what matplotlib is told
    "initlab {}, torch {}, Python {}",
    "DejaVu Sans",
    *("Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei"),
    "'DejaVu Sans'(, [^;\\\"]*)?",
    "Glyph \\d+ .* missing from",
    "lower left",
    "offset points",
    "outside lower center",
    # what an error says, which is raised elsewhere
    "a tensor of shape {}",
    "{} items",
    "a {}",
}


# What has no words in Chinese either.
SAME = {"dtype", "fan", "rank {}", "key", "digest", "{} -> {}", ", ", ": ", "; ", "{} of {}"} | {
    "recipe {}, seed {}, stream {}",
    "recipe {}, seed {}, stream {}, digest {}",
}


def is_code(text):
    try:
        ast.parse(text.strip().replace("{}", "x"))
    except SyntaxError:
        try:
            ast.parse(text.strip().replace("{}", "x") + "\n    pass")  # the head of a block
        except SyntaxError:
            return False
    return True


def strings(path):
    """The strings of a file, with {} for the fields of f-strings; no docstrings, and nothing that is raised."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        elif isinstance(node, ast.Raise):
            skipped.update(ast.walk(node))
        elif isinstance(node, ast.JoinedStr):
            skipped.update(part for part in node.values if isinstance(part, ast.Constant))
            for part in node.values:
                if isinstance(part, ast.FormattedValue) and part.format_spec is not None:
                    skipped.update(ast.walk(part.format_spec))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{[a-z]+\}", "{}", node.value)  # for str.format


def messages_in(text):
    """What of a string is read by people: a comment, or all of what is no code."""
    if MARKUP.search(text):  # of a page; what is read in it comes from elsewhere
        return
    for line in text.split("\n"):
        comment = line.partition("# ")[2]
        if comment:
            yield comment
        elif line and not is_code(line):
            yield line


def written(*others):
    files = [
        path
        for place in (*PLACES, *others)
        for path in ([PACKAGE / place] if place.endswith(".py") else (PACKAGE / place).rglob("*.py"))
    ]
    return {text for path in files for text in strings(path)}


def known(message):
    """Whether the catalogue has a message: alone, made of others, or as a part of one that is put together."""
    filled = message.replace("{}", "x1")
    return any(message in key for key in ENTRIES) or translator("zh")(filled) != filled


def test_every_message_has_a_translation():
    messages = {m for text in written() for m in messages_in(text) if PROSE.search(m)} - NO_MESSAGES
    missing = sorted(message for message in messages if not known(message))
    assert not missing, "write these into initlab/languages/zh.json, or say in NO_MESSAGES why not"


def test_no_translation_is_left_over():
    text = "\n".join(written("cli.py"))
    words = re.compile(r"[A-Za-z][A-Za-z'_-]*")
    left = [key for key in ENTRIES if not all(word in text for word in words.findall(key.replace("{}", " ")))]
    assert not left


def test_a_translation_has_the_fields_of_its_message():
    for key, text in ENTRIES.items():
        fields, used = set(range(key.count("{}"))), {int(number) for number in FIELD.findall(text)}
        assert used == fields or (used < fields and re.search(r"[a-z]\{\}", key)), (
            f"{key!r}: a plural's s may be dropped"
        )
        assert re.search(r"[\u4e00-\u9fff]", text) or key in SAME, key


def test_names_and_code_are_untouched():
    say = translator("zh")
    assert say(
        "all rows of loss.weight are zero and get the same gradient: its units never become different."
    ).startswith("loss.weight ")
    code = 'x = batch["a # b"]  # for the whole data set: sklearn.preprocessing.StandardScaler\ny = x'
    first, second = say.code(code).splitlines()
    assert first.startswith('x = batch["a # b"]  # 对')
    assert second == "y = x"
    assert translator("en").code(code) == code
    assert say("something nobody wrote") == "something nobody wrote"


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_what_the_doctor_says_of_planted_faults(part, unhurried, one_thread):
    """No English is left in what it explains, but what torch's own errors say."""
    say, left = translator("zh"), []
    for fault in FAULTS[part * 5 :: 29]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of some of the mistakes
            found = initlab.diagnose(*fault.build(), steps=fault.steps)
        assert "\u7ed3\u8bba" in found.text(lang="zh")
        for cause in found.causes:
            comments = [line.partition("# ")[2] for line in say.code(cause.remedy).splitlines()]
            texts = [say(cause.explanation), say(cause.change), *comments, *map(say, found.notes)]
            error = cause.evidence.get("error", "")
            left += [text for text in texts if re.search("[a-z]{2,} [a-z]{2,} [a-z]{2,}", text.replace(error, ""))]
    assert not left


def test_unknown_languages_are_refused():
    assert LANGUAGES == ("en", "zh")
    with pytest.raises(ValueError, match="lang is 'de'; it must be one of 'en', 'zh'"):
        translator("de")


def test_what_a_guard_prints(tmp_path, one_thread):
    """Its reports, what it saves, and what a watch saw in the place of a diagnosis, leave no English prose."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bad = torch.full((8, 4), torch.nan), torch.randn(8, 1)
    loss_fn = initlab.supervised(torch.nn.functional.mse_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initlab.guard(model, optimizer, loss_fn=loss_fn, folder=tmp_path, lang="zh", budget=2) as guard:
            guard.step(bad)
    found = guard.report()
    with initlab.watch(model, backward=True) as watch:
        loss_fn(model, (torch.randn(8, 4), bad[1])).backward()
        healthy = watch.report()
        model[2].weight.data.fill_(torch.inf)
        loss_fn(model, (torch.randn(8, 4), bad[1])).backward()
    page = (tmp_path / "step-1.html").read_text(encoding="utf-8")
    assert '<html lang="zh' in page
    saved = (tmp_path / "step-1.txt").read_text(encoding="utf-8")
    assert saved.startswith("\u7b2c 1 \u6b65\uff1a\u635f\u5931\u4e3a nan")
    for text in (found.text("zh"), saved, watch.report().text("zh"), healthy.text("zh")):
        prose = [line for line in text.splitlines() if not re.match(r"\s*[a-z_.]+ ?[=(\[]", line)]  # no code
        assert not re.search("[a-z]{2,} [a-z]{2,}", re.sub(str(tmp_path), "", "\n".join(prose))), text
    assert str(found) == found.text()
    with pytest.raises(ValueError, match="lang is 'de'"):
        initlab.guard(model, optimizer, loss_fn=loss_fn, lang="de")
    assert not optimizer._optimizer_step_pre_hooks
