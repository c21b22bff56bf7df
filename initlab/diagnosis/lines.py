"""Where the user's code stands."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType

import torch

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)
_CORE = ("functional.py", "_tensor.py", "_tensor_docs.py", "overrides.py")


def line_of_user() -> str:
    """The line of the user's code that is running, with its file and number; "" where it is another library's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN):
            if file.endswith(("probes.py", "workflow.py", "trials.py")):
                return ""
        elif not (file.startswith(_TORCH) and (file.endswith(_CORE) or "/utils/_" in file)):
            if file.startswith(_TORCH):
                return ""
            text = linecache.getline(file, frame.f_lineno).strip()
            return f"{Path(file).name}:{frame.f_lineno}" + (f": {text[:80]}" if text else "")
        frame = frame.f_back
    return ""
