"""Who may import whom: parses every module's imports and holds them to the five rules of the house.

Rule 5's other half, what `import initlab` really loads, is in test_packaging.py.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# llvmlite is numba's own lower half: an intrinsic's body is written in it.
BACKENDS = {"_triton": {"triton", "numpy", "torch"}, "_numba": {"numba", "llvmlite", "numpy", "torch"}}
SHARED = {"backends", "region", "stream", "tensors"}  # the rooms of kernels/ that every op may use; nonfinite joins them for ops
COMMON = {"_common_triton", "_common_numba"}  # what the backends of one kind share


class Import(NamedTuple):
    line: int
    module: str  # as written, with the leading dots of a relative import
    names: tuple[str, ...]  # of `from module import names`
    lazy: bool  # inside a function: runs when called, not at import

    @property
    def root(self) -> str:
        return self.module.split(".")[0]

    @property
    def siblings(self) -> tuple[str, ...]:
        """The modules of its own package that a one-dot import reaches, whichever way it is written."""
        return self.names if self.module == "." else (self.module[1:].split(".")[0],)


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, (), lazy)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(node.lineno, "." * node.level + (node.module or ""), names, lazy)
        elif isinstance(node, ast.Call) and _callee(node) in {"import_module", "__import__"}:
            # A name this test can't read is reported as "?", which no rule allows.
            name = node.args[0] if node.args else None
            literal = isinstance(name, ast.Constant) and isinstance(name.value, str)
            yield Import(node.lineno, name.value if literal else "?", (), lazy)
        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, lazy or inside_function)


def _callee(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def public_names(kernels_init: str) -> set[str]:
    """What `initlab.kernels` exports: the names in the `__all__` of kernels/__init__.py."""
    for node in ast.walk(ast.parse(kernels_init)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("kernels/__init__.py has no __all__")


def violations(path: str, source: str, public: set[str]) -> list[str]:
    """What `path` (relative to the project, with slashes) imports against the rules."""
    tree = ast.parse(source, path)
    found = list(imports(tree))
    room, _, name = path.rpartition("/")
    name = name.removesuffix(".py")
    if room == "kernels":
        broken = _in_kernels(name, found)
    elif room.split("/")[0] == "initlab":
        broken = _in_initlab(found, public)
        broken += [
            (node.lineno, "3: .is_cuda; the backend is chosen in kernels/backends.py")
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr == "is_cuda"
        ]
    else:
        broken = []
    if room != "kernels":
        broken += [(i.line, f"4: imports {i.module}; say initlab.kernels") for i in found if i.root == "kernels"]
    return [f"{path}:{line}: rule {text}" for line, text in sorted(broken)]


def _in_kernels(name: str, found: list[Import]) -> list[tuple[int, str]]:
    backend_kind = next((kind for kind in BACKENDS if name.startswith("_") and name.endswith(kind)), None)
    broken = []
    for i in found:
        if i.root in {"initlab", "kernels"}:
            broken.append((i.line, f"4: imports {i.module}; imports inside kernels/ are relative"))
        elif i.module.startswith(".."):
            broken.append((i.line, f"2: {i.module} reaches out of kernels/"))
        elif i.module.startswith("."):
            broken += [
                (i.line, why) for sibling in i.siblings if (why := _sibling(name, backend_kind, sibling, i.lazy))
            ]
        elif i.root not in sys.stdlib_module_names:
            allowed = BACKENDS[backend_kind] if backend_kind else {"torch"}
            if i.root not in allowed:
                rule = 1 if backend_kind or i.root in {"llvmlite", "numba", "triton"} else 2
                broken.append((i.line, f"{rule}: imports {i.module}; allowed: {', '.join(sorted(allowed))}"))
    return broken


def _sibling(name: str, backend_kind: str | None, sibling: str, lazy: bool) -> str | None:
    """Why module `name` of kernels/ may not import its neighbour `sibling`; None where it may."""
    if sibling in COMMON:
        fits = backend_kind is not None and sibling.endswith(backend_kind)
        return None if fits else f"1: imports {sibling}, which serves backends of its kind"
    owner = next((sibling.removesuffix(kind)[1:] for kind in BACKENDS if sibling.endswith(kind)), None)
    if owner is not None:
        if owner != name:
            return f"1: imports {sibling}, which belongs to {owner}.py"
        return None if lazy else f"1: imports {sibling} at import time; do it inside a function"
    if name == "__init__" or sibling in SHARED:
        return None
    if name not in SHARED and backend_kind is None and sibling == "nonfinite":
        return None
    return f"2: imports {sibling}; allowed: {', '.join(sorted(SHARED))}, for an op also nonfinite and its own backends"


def _in_initlab(found: list[Import], public: set[str]) -> list[tuple[int, str]]:
    broken = []
    for i in found:
        if i.root in {"llvmlite", "numba", "triton", "?"}:
            broken.append((i.line, f"3: imports {i.module}; only kernels/ knows the backends"))
        elif i.module.startswith(".") and "kernels" in (*i.siblings, *i.module.split(".")):
            broken.append((i.line, f"4: imports {i.module}; say initlab.kernels"))
        elif i.module == "initlab.kernels":
            private = sorted(set(i.names) - public)
            if private or not i.names:
                broken.append((i.line, f"3: imports {private or i.module}; only the public names, by from-import"))
        elif i.module.startswith("initlab.kernels.") or (i.module == "initlab" and "kernels" in i.names):
            broken.append((i.line, f"3: imports {i.module}; only the public names, from initlab.kernels"))
    return broken


def project_files() -> list[str]:
    rooms = ("kernels", "initlab", "tests", "benchmarks", "docs", ".ci")
    return [
        "setup.py",
        *(p.relative_to(ROOT).as_posix() for room in rooms for p in sorted(ROOT.glob(f"{room}/**/*.py"))),
    ]


@pytest.mark.parametrize("path", project_files())
def test_imports(path: str) -> None:
    public = public_names((ROOT / "kernels/__init__.py").read_text())
    assert violations(path, (ROOT / path).read_text(), public) == []


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("kernels/_op_triton.py", "import numba", 1),
        ("kernels/_op_numba.py", "import triton", 1),
        ("kernels/_op_numba.py", "from ._op_triton import x", 1),
        ("kernels/_op_numba.py", "from . import sampling", 2),
        ("kernels/op.py", "from . import _op_numba", 1),
        ("kernels/op.py", "def f():\n    from ._common_numba import share", 1),
        ("kernels/_op_triton.py", "from ._common_numba import share", 1),
        ("kernels/op.py", "if True:\n    from ._op_triton import fill", 1),
        ("kernels/op.py", "class A:\n    from . import _op_numba", 1),
        ("kernels/op.py", "def f():\n    from . import _other_numba", 1),
        ("kernels/op.py", "def f():\n    import numba", 1),
        ("kernels/op.py", "import triton.language as tl", 1),
        ("kernels/op.py", "import numpy as np", 2),
        ("kernels/op.py", "from .sampling import fill_", 2),
        ("kernels/op.py", "from .. import init", 2),
        ("kernels/op.py", "def f(name):\n    import_module(name)", 2),
        ("kernels/backends.py", "from . import nonfinite", 2),
        ("kernels/sampling/stream.py", "from .sampling import Distribution", 2),
        ("kernels/sampling/stream.py", "def f():\n    from . import _numba", 1),
        ("kernels/__init__.py", "from . import _op_numba", 1),
        ("kernels/op.py", "from initlab.kernels import stream", 4),
        ("kernels/op.py", "import kernels", 4),
        ("initlab/room.py", "def f():\n    import triton", 3),
        ("initlab/room.py", "from numba import njit", 3),
        ("initlab/room.py", "importlib.import_module('numba')", 3),
        ("initlab/room.py", "x = tensor.is_cuda", 3),
        ("initlab/room.py", "import initlab.kernels.sampling", 3),
        ("initlab/room.py", "from initlab.kernels.sampling.stream import philox", 3),
        ("initlab/room.py", "from initlab.kernels import fill_, sampling", 3),
        ("initlab/room.py", "from initlab import kernels", 3),
        ("initlab/diagnose/room.py", "from initlab.kernels import _private", 3),
        ("initlab/room.py", "from .kernels import fill_", 4),
        ("initlab/diagnose/room.py", "from ..kernels import fill_", 4),
        ("initlab/room.py", "import kernels", 4),
        ("tests/test_room.py", "from kernels import stream", 4),
        ("setup.py", "import kernels.stream", 4),
    ],
)
def test_a_broken_rule_is_seen(path: str, source: str, rule: int) -> None:
    (found,) = violations(path, source, public={"fill_"})
    assert f": rule {rule}:" in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/_op_triton.py", "import torch, triton\nimport triton.language as tl\nfrom .stream import TABLE"),
        ("kernels/_op_numba.py", "import math\nimport numba, numpy as np, torch\nfrom . import stream"),
        ("kernels/_op_triton.py", "from ._common_triton import find"),
        ("kernels/op.py", "import torch\nfrom . import backends, nonfinite\ndef f():\n    from . import _op_triton"),
        (
            "kernels/nonfinite.py",
            "from .backends import choose\ndef f():\n    from ._nonfinite_triton import raise_flag",
        ),
        ("kernels/backends.py", "import os\nimport torch\nfrom importlib.util import find_spec"),
        ("kernels/__init__.py", "from .sampling import fill_\nfrom .stream import named_key"),
        (
            "initlab/room.py",
            "import torch\nfrom initlab.kernels import fill_\nfrom . import init\nfrom .init import ones_",
        ),
        ("tests/test_room.py", "import numba\nfrom initlab.kernels.sampling import _numba"),
    ],
)
def test_what_the_rules_allow(path: str, source: str) -> None:
    assert violations(path, source, public={"fill_"}) == []
