"""What is printed: the same text in a terminal, a notebook and a file; colour and bars only where a terminal is."""

import io
import sys

import pytest

import initlab
from initlab import _console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_tables_are_aligned_by_what_a_terminal_shows():
    text = _console.table(["name", "n"], [["層", "1"], ["[red]x", "20"]], "lr")
    assert text.splitlines() == ["name     n", "------  --", "層       1", "[red]x  20"]


def test_tables_are_neither_wrapped_nor_cut_nor_coloured(monkeypatch):
    rows = [["x" * 300, "[bold]y[/bold]", ":smile:", "\\[z]"]]
    before = _console.table(["a", "b", "c", "d"], rows)
    assert all(cell in before for cell in rows[0])
    for name, value in {"COLUMNS": "20", "FORCE_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert _console.table(["a", "b", "c", "d"], rows) == before


def test_a_table_of_a_width():
    names = [f"encoder.layers.{number}.self_attention.output_projection.weight" for number in (3, 11)]
    rows = [[name, "float32", "1.5"] for name in names]
    whole = _console.table(["name", "dtype", "std"], rows, "llr")
    assert _console.table(["name", "dtype", "std"], rows, "llr", width=200) == whole
    for width in (60, 40, 32):
        lines = _console.table(["name", "dtype", "std"], rows, "llr", width=width, spare=["dtype"]).splitlines()
        assert max(map(len, lines)) <= width
        assert ("dtype" in lines[0]) == (width > 32)
        assert all(f".{number}." in line for number, line in zip((3, 11), lines[2:], strict=True))
    assert _console.shortened("層" * 30, 11) == "層層…層層"
    assert _console.shortened("a.b.c.d.e.f.g.h", 7) == "a.b…g.h"


def test_a_table_without_rows():
    assert _console.table(["a", "bc"], []) == "a  bc\n-  --"


@pytest.mark.parametrize("count", [0, 1, 20, 21, 40])
def test_listing(count):
    lines = _console.listing([str(place) for place in range(count)]).split("\n  ")[1:]
    assert lines[:20] == [str(place) for place in range(min(count, 20))]
    assert lines[20:] == ([f"... and {count - 20} more"] if count > 20 else [])


@pytest.mark.parametrize(
    ("kind", "show", "shown"), [(Terminal, None, True), (Terminal, False, False), (io.StringIO, None, False)]
)
def test_a_bar_is_for_terminals(kind, show, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", kind())
    monkeypatch.setenv("TERM", "xterm")
    with _console.progress("filling", 3, show) as advance:
        advance(1)
        advance(2)
    assert ("filling" in sys.stderr.getvalue()) == shown
    assert ("100%" in sys.stderr.getvalue()) == shown


def test_a_bar_outlives_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="stop"), _console.progress("filling", 3):
        raise ValueError("stop")
    assert sys.stderr.getvalue().endswith("\x1b[2K")  # the line is erased


def test_colour_is_for_terminals(monkeypatch):
    text = "verdict: [bold]" + "x" * 300
    for stream, coloured in ((Terminal(), True), (io.StringIO(), False)):
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        _console.say(text, "red")
        _console.say(text, "red", stderr=True)
        _console.say(text)
        said = stream.getvalue()
        assert said.count(text) == 3
        assert ("\x1b[" in said) == coloured
        if not coloured:
            assert said == f"{text}\n" * 3


def test_no_stream_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with _console.progress("filling", 3) as advance:
        advance(3)


def test_a_report_reads_the_same_in_a_narrow_terminal(monkeypatch):
    import torch

    report = initlab.plan_model(torch.nn.Linear(4, 2))
    before = str(report)
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert str(report) == before
