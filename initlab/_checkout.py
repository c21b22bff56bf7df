"""Lets a bare checkout be imported: there `kernels/` lies beside `initlab/`, an install has it inside."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_NAME = "initlab.kernels"
_FOLDER = Path(__file__).resolve().parent.parent / "kernels"


class _SiblingFinder(MetaPathFinder):
    # A finder for this one name, not an entry in initlab.__path__: that would offer tests/, benchmarks/ and
    # setup.py as initlab.tests, initlab.benchmarks and initlab.setup.
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME:
            return None
        return spec_from_file_location(fullname, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)])


def link_kernels() -> None:
    """Make `initlab.kernels` importable; does nothing where it already is (a wheel, an editable install)."""
    # _hub_shim.py tells our folder from Hugging Face's `kernels`, which lies beside an installed initlab.
    if find_spec(_NAME) is None and (_FOLDER / "_hub_shim.py").is_file():
        sys.meta_path.append(_SiblingFinder())
