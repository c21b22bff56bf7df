"""The committed pictures are what `python tools/pictures.py` draws from the committed results."""

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("initlab_tools_pictures", _ROOT / "tools" / "pictures.py")
pictures = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pictures)
_SVG = "{http://www.w3.org/2000/svg}"


def test_the_committed_pictures_are_those_of_the_committed_results():
    pytest.importorskip("matplotlib")
    drawn = dict(pictures.pictures())
    committed = {path.name: path.read_text(encoding="utf-8") for path in pictures.PICTURES.glob("*.svg")}
    assert drawn.keys() == committed.keys()
    for name, text in drawn.items():
        assert text == committed[name], name


@pytest.mark.parametrize("path", sorted(pictures.PICTURES.glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_stands_by_itself(path):
    """Well-formed, with words for who does not see it, text as text, and no colour left to a page."""
    text = path.read_text(encoding="utf-8")
    root = ET.fromstring(text)
    assert root.findtext(f"{_SVG}title")
    assert root.findtext(f"{_SVG}desc")
    assert root.findall(f".//{_SVG}text")
    assert "var(--" not in text
    ids = [one.get("id") for one in root.iter() if one.get("id")]
    assert len(ids) == len(set(ids))
