"""Who may import whom, what an `__init__.py` holds, how long a file may be: read from the sources, not run.

The rules, by the names that a violation is reported under:

backend: A backend's file (`_norms_triton.py`, `_norms_numba.py`, `sampling/_triton.py`) imports its compiler, numpy,
    torch, `region`, `tensors`, the stream, its own op and what its kind shares (`_common_triton`). Its own op alone
    imports it, and not before it is needed: `backends.load(device, {"numba": "._norms_numba"})`. `_torch.py` needs no
    compiler, so its op may import it at once.
op: The other files of kernels/ import torch, and from kernels/ what is shared (`backends`, `nonfinite`, `region`,
    `tensors`, `torch_internals`) and their own package. Nothing reaches up, to initlab's other packages.
initlab: initlab/ imports the public names of initlab.kernels, never numba or triton, and asks no tensor where it lies.
internals: Private names of torch's modules are found by `torch_internals`, and imported from there.
spelling: Imports inside kernels/ are relative. Everybody else says `initlab.kernels`, never `kernels`.
init: An `__init__.py` is an API: a docstring, imports and `__all__`.
shadow: No module shares its name with a public function or class of its package, which would hide it.
length: A file of kernels/ or initlab/ has 500 lines at most, or says at its top why it is one file.

What `import initlab` really loads is in test_packaging.py.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "initlab", "tests", "benchmarks", "docs", "examples", "tools", ".ci")

# llvmlite is numba's own lower half: an intrinsic's body is written in it.
COMPILERS = {"triton": {"triton"}, "numba": {"numba", "llvmlite"}, "torch": set()}
SHARED = {"backends", "region", "tensors", "torch_internals"}  # what every op may use
FOR_BACKENDS = {"region", "tensors", "torch_internals", "sampling.stream"}
# Private by name alone: torch documents them. The last one TorchScript has to find by its own name.
DOCUMENTED = (
    "torch.utils._pytree",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch._jit_internal",
)
LINES = 500
REASON = re.compile(r"\bone file\b|\bis (so |this )?long\b")


class Import(NamedTuple):
    line: int
    module: str  # as written, with the leading dots of a relative import
    names: tuple[str, ...]  # of `from module import names`
    lazy: bool  # inside a function, or a name that backends.load() imports later

    @property
    def root(self) -> str:
        return self.module.split(".")[0]

    def targets(self, package: str) -> list[str]:
        """The modules that a relative import reaches from `package` ("" for kernels/), as dotted names.

        A name that starts with ".." is outside of kernels/.
        """
        dots = len(self.module) - len(self.module.lstrip("."))
        parts = package.split(".") if package else []
        if dots - 1 > len(parts):
            return [self.module]
        base = [*parts[: len(parts) - dots + 1], *filter(None, self.module.lstrip(".").split("."))]
        if not self.module.strip("."):
            return [".".join([*base, name]) for name in self.names]
        stream = [name for name in self.names if ".".join([*base, name]) in FOR_BACKENDS]
        return [".".join([*base, name]) for name in stream] if len(stream) == len(self.names) > 0 else [".".join(base)]


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


def loaded(tree: ast.AST) -> Iterator[Import]:
    """What backends.load() is asked for: the values of {"numba": "._norms_numba"}, relative to initlab.kernels."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                backend = isinstance(key, ast.Constant) and key.value in COMPILERS
                if backend and isinstance(value, ast.Constant) and value.value is not None:
                    yield Import(value.lineno, str(value.value), (), True)


def public_names(kernels_init: str) -> set[str]:
    """What `initlab.kernels` exports: the names in the `__all__` of kernels/__init__.py."""
    for node in ast.walk(ast.parse(kernels_init)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("kernels/__init__.py has no __all__")


def violations(path: str, source: str, public: Collection[str] = (), modules: Collection[str] = ()) -> list[str]:
    """What a file has against the rules.

    Args:
        path: relative to the project, with slashes.
        source: the file's text.
        public: what `initlab.kernels` exports.
        modules: the modules and packages beside this file.
    """
    tree = ast.parse(source, path)
    found = list(imports(tree))
    *folders, file = path.split("/")
    top = folders[0] if folders else ""
    broken: list[tuple[int, str]] = []
    if top == "kernels":
        broken += _in_kernels(".".join([*folders[1:], file.removesuffix(".py")]), [*found, *loaded(tree)])
    else:
        broken += [(i.line, f"spelling: imports {i.module}; say initlab.kernels") for i in found if i.root == "kernels"]
    if top == "initlab":
        broken += _in_initlab(found, public)
        broken += [
            (node.lineno, "initlab: .is_cuda; the backend is chosen in kernels/backends.py")
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr == "is_cuda"
        ]
    if top in {"kernels", "initlab"}:
        if file == "__init__.py":
            broken += [
                (node.lineno, f"init: `{ast.unparse(node).splitlines()[0]}` is no docstring, import or __all__")
                for node in _statements(path, tree)
                if not _is_api(node)
            ]
        broken += [
            (line, f"shadow: {name} is also a module of this package")
            for line, name in _public(tree, file)
            if name in modules
        ]
        broken += _too_long(source)
        if path != "kernels/torch_internals.py":
            broken += [
                (line, f"internals: {name} is private; torch_internals finds it, or says what serves in its place")
                for line, name in _private_names(tree)
            ]
    return [f"{path}:{line}: {text}" for line, text in sorted(broken)]


def _private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The private names of torch's modules that a file uses, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("torch.")]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"torch(\.\w+)+", text := ast.unparse(node)):
            names = [text] if node.attr.startswith("_") else []
        else:
            continue
        for name in names:
            if "._" in name.replace(".__", ".") and not name.startswith(DOCUMENTED):
                yield node.lineno, name


def _in_kernels(name: str, found: list[Import]) -> list[tuple[int, str]]:
    package = name.rpartition(".")[0]
    kind = _kind(name)
    broken = []
    for i in found:
        if i.root in {"initlab", "kernels"}:
            broken.append((i.line, f"spelling: imports {i.module}; imports inside kernels/ are relative"))
        elif i.module.startswith("."):
            # backends.load() reads its names from kernels/, wherever the op is.
            targets = i.targets("" if i.lazy and not i.names else package)
            broken += [(i.line, why) for target in targets if (why := _neighbour(name, target, i.lazy))]
        elif i.root not in sys.stdlib_module_names and (i.module != "?" or name not in {"backends", "torch_internals"}):
            allowed = {"torch"} if kind is None else {"numpy", "torch", *COMPILERS[kind]}
            if i.root not in allowed:
                compiler = i.root in {"llvmlite", "numba", "triton"}
                rule = "backend" if kind is not None or compiler else "op"
                broken.append((i.line, f"{rule}: imports {i.module}; allowed: {', '.join(sorted(allowed))}"))
    return broken


def _kind(name: str) -> str | None:
    """The backend that a module of kernels/ is of, by its name; None for all others."""
    stem = name.rpartition(".")[2]
    return next((kind for kind in COMPILERS if stem.startswith("_") and stem.endswith(f"_{kind}")), None)


def _op(backend: str) -> str:
    """The op that a backend belongs to: a module, as `norms` for `_norms_triton`, or a package, as `sampling`."""
    package, _, stem = backend.rpartition(".")
    return package or stem[1:].split("_")[0]


def _neighbour(name: str, target: str, lazy: bool) -> str | None:
    """Why module `name` of kernels/ may not import module `target` of it; None where it may."""
    if target.startswith("."):
        return f"op: {target} reaches out of kernels/"
    package = name.rpartition(".")[0]
    inside_package = package != "" and target.startswith(f"{package}.")
    kind, its_kind = _kind(name), _kind(target)
    if target.startswith("_common_"):
        return None if kind == its_kind else f"backend: imports {target}, which serves backends of its kind"
    if its_kind is not None and kind is not None:
        same = (kind, _op(name)) == (its_kind, _op(target))
        return None if same else f"backend: imports {target}, which belongs to {_op(target)} or is of another kind"
    if its_kind is not None:
        if _op(target) not in {name, package}:
            return f"backend: imports {target}, which belongs to {_op(target)}"
        if not lazy and its_kind != "torch":
            return f"backend: imports {target} at import time; name it to backends.load()"
        return None
    if kind is not None:
        # What a backend needs of its op lies on the op's page, or in the op's package.
        if target == _op(name) or inside_package or target in FOR_BACKENDS:
            return None
        return f"backend: imports {target}; allowed: its own op, {', '.join(sorted(FOR_BACKENDS))}"
    if name == "__init__" or inside_package or target in SHARED:
        return None
    if target == "nonfinite" and name not in SHARED:
        return None
    return f"op: imports {target}; allowed: {', '.join(sorted(SHARED))}, for an op also nonfinite and its own package"


def _in_initlab(found: list[Import], public: Collection[str]) -> list[tuple[int, str]]:
    broken = []
    for i in found:
        if i.root in {"llvmlite", "numba", "triton", "?"}:
            broken.append((i.line, f"initlab: imports {i.module}; only kernels/ knows the backends"))
        elif i.module.startswith(".") and "kernels" in (*i.names, *i.module.split(".")):
            broken.append((i.line, f"spelling: imports {i.module}; say initlab.kernels"))
        elif i.module == "initlab.kernels":
            private = sorted(set(i.names) - set(public))
            if private or not i.names:
                broken.append((i.line, f"initlab: imports {private or i.module}; only public names, by from-import"))
        elif i.module == "initlab.kernels.torch_internals":
            continue
        elif i.module.startswith("initlab.kernels.") or (i.module == "initlab" and "kernels" in i.names):
            broken.append((i.line, f"initlab: imports {i.module}; only public names, from initlab.kernels"))
    return broken


def _statements(path: str, tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of an `__init__.py`, without those that make the two folders importable."""
    for node in tree.body:
        text = ast.unparse(node)
        if path == "kernels/__init__.py" and isinstance(node, ast.If) and text.startswith("if __name__ == 'kernels':"):
            yield from (s for s in node.body if ast.unparse(s) != "_hand_over(globals())")
            yield from node.orelse
        elif path != "initlab/__init__.py" or text != "_checkout.link_kernels()":
            yield node


def _is_api(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) in {"__all__", "__version__"}
    docstring = (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    return docstring or isinstance(node, ast.Import | ast.ImportFrom)


def _public(tree: ast.Module, file: str) -> Iterator[tuple[int, str]]:
    """The functions and classes that a module defines, and for an `__init__.py` those that it re-exports."""
    if file.startswith("_") and file != "__init__.py":
        return  # a private module's functions are reached through it alone
    for node in ast.walk(tree) if file == "__init__.py" else tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif file == "__init__.py" and isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((node.lineno, alias.asname or alias.name) for alias in node.names)


def _too_long(source: str) -> list[tuple[int, str]]:
    lines = source.splitlines()
    if len(lines) <= LINES:
        return []
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT and token.start[0] <= 15]
    top = " ".join([ast.get_docstring(ast.parse(source)) or "", *comments])
    if REASON.search(" ".join(top.split())):
        return []
    why = f"{len(lines)} lines, more than {LINES}; split it, or say at its top why it is one file"
    return [(len(lines), f"length: {why}")]


def project_files() -> list[str]:
    return [
        "setup.py",
        *(p.relative_to(ROOT).as_posix() for folder in FOLDERS for p in sorted(ROOT.glob(f"{folder}/**/*.py"))),
    ]


def modules_beside(path: Path) -> set[str]:
    files = {p.stem for p in path.parent.glob("*.py")}
    packages = {p.parent.name for p in path.parent.glob("*/__init__.py")}
    installed = {"kernels"} if path.parent == ROOT / "initlab" else set()
    return (files | packages | installed) - {"__init__"}


@pytest.mark.parametrize("path", project_files())
def test_rules(path: str) -> None:
    public = public_names((ROOT / "kernels/__init__.py").read_text())
    assert violations(path, (ROOT / path).read_text(), public, modules_beside(ROOT / path)) == []


LOAD = "from . import backends\n_MODULES = {}\ndef f(d):\n    backends.load(d, _MODULES)"


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        # A backend's own imports.
        ("kernels/_op_triton.py", "import numba", "backend"),
        ("kernels/_op_numba.py", "import triton", "backend"),
        ("kernels/_op_numba.py", "from ._op_triton import x", "backend"),
        ("kernels/_op_numba.py", "from ._other_numba import x", "backend"),
        ("kernels/_op_numba.py", "from .sampling._numba import x", "backend"),
        ("kernels/_op_numba.py", "from . import sampling", "backend"),
        ("kernels/_op_numba.py", "from .sampling.fill import fill_", "backend"),
        ("kernels/_op_numba.py", "from .nonfinite import NAN", "backend"),
        ("kernels/_op_numba.py", "from . import backends", "backend"),
        ("kernels/_op_numba.py", "from .other import x", "backend"),
        ("kernels/_op_triton.py", "from ._common_numba import share", "backend"),
        ("kernels/sampling/_triton.py", "from .._common_numba import share", "backend"),
        ("kernels/sampling/_triton.py", "from . import _numba", "backend"),
        ("kernels/sampling/_torch.py", "import numba", "backend"),
        ("kernels/sampling/_numba.py", "from ..norms import Norm", "backend"),
        ("kernels/_common_numba.py", "from .norms import Norm", "backend"),
        # Who imports a backend, and when.
        ("kernels/op.py", "from . import _op_numba", "backend"),
        ("kernels/op.py", "if True:\n    from ._op_triton import fill", "backend"),
        ("kernels/op.py", "class A:\n    from . import _op_numba", "backend"),
        ("kernels/op.py", "def f():\n    from . import _other_numba", "backend"),
        ("kernels/op.py", LOAD.format({"numba": "._other_numba"}), "backend"),
        ("kernels/op.py", LOAD.format({"triton": ".sampling._triton"}), "backend"),
        ("kernels/op.py", "def f(d):\n    backends.load(d, {'numba': '._other_numba'})", "backend"),
        ("kernels/sampling/fill.py", LOAD.format({"numba": "._numba"}).replace(".", "..", 1), "backend"),
        ("kernels/sampling/fill.py", "from . import _triton", "backend"),
        ("kernels/sampling/stream.py", "from . import _numba", "backend"),
        ("kernels/op.py", "def f():\n    from ._common_numba import share", "backend"),
        ("kernels/op.py", "def f():\n    import numba", "backend"),
        ("kernels/op.py", "import triton.language as tl", "backend"),
        ("kernels/__init__.py", "from . import _op_numba", "backend"),
        ("kernels/sampling/__init__.py", "from ._triton import fill", "backend"),
        # An op's own imports.
        ("kernels/op.py", "import numpy as np", "op"),
        ("kernels/op.py", "from .sampling import fill_", "op"),
        ("kernels/op.py", "from .sampling.stream import philox", "op"),
        ("kernels/op.py", "from .. import init", "op"),
        ("kernels/op.py", "def f(name):\n    import_module(name)", "op"),
        ("kernels/sampling/fill.py", "from ..norms import Norm", "op"),
        ("kernels/sampling/fill.py", "from ... import init", "op"),
        ("kernels/sampling/fill.py", "from ...models import naming", "op"),
        ("kernels/backends.py", "from . import nonfinite", "op"),
        ("kernels/region.py", "from .sampling.stream import philox", "op"),
        # initlab/ on initlab.kernels.
        ("initlab/page.py", "def f():\n    import triton", "initlab"),
        ("initlab/page.py", "from numba import njit", "initlab"),
        ("initlab/page.py", "importlib.import_module('numba')", "initlab"),
        ("initlab/page.py", "def f(name):\n    importlib.import_module(name)", "initlab"),
        ("initlab/page.py", "x = tensor.is_cuda", "initlab"),
        ("initlab/page.py", "import initlab.kernels.sampling", "initlab"),
        ("initlab/page.py", "from initlab.kernels.sampling.stream import philox", "initlab"),
        ("initlab/page.py", "from initlab.kernels import fill_, sampling", "initlab"),
        ("initlab/page.py", "from initlab import kernels", "initlab"),
        ("initlab/diagnosis/page.py", "from initlab.kernels import _private", "initlab"),
        # Private names of torch.
        ("initlab/page.py", "from torch._C import x", "internals"),
        ("initlab/page.py", "def f():\n    from torch.utils import _other", "internals"),
        ("initlab/page.py", "import torch._dynamo", "internals"),
        ("kernels/op.py", "x = torch._C._autograd.y(1)", "internals"),
        ("kernels/op.py", "torch._foreach_norm([])", "internals"),
        # One spelling.
        ("kernels/op.py", "from initlab.kernels import stream", "spelling"),
        ("kernels/op.py", "import kernels", "spelling"),
        ("initlab/page.py", "from .kernels import fill_", "spelling"),
        ("initlab/page.py", "from . import kernels", "spelling"),
        ("initlab/diagnosis/page.py", "from ..kernels import fill_", "spelling"),
        ("initlab/page.py", "import kernels", "spelling"),
        ("tests/test_page.py", "from kernels import stream", "spelling"),
        ("setup.py", "import kernels.stream", "spelling"),
        # An __init__.py is an API.
        ("initlab/models/__init__.py", "def f():\n    pass", "init"),
        ("initlab/models/__init__.py", "CHECKS = {}", "init"),
        ("initlab/models/__init__.py", "_checkout.link_kernels()", "init"),
        ("initlab/__init__.py", "for x in ():\n    pass", "init"),
        ("kernels/__init__.py", "if True:\n    __all__ = []", "init"),
        ("kernels/__init__.py", "if __name__ == 'kernels':\n    pass\nelse:\n    x = 1", "init"),
        # Nothing hides a module.
        ("initlab/models/__init__.py", "from .swapping import naming", "shadow"),
        ("initlab/models/__init__.py", "from .swapping import swap as naming", "shadow"),
        ("initlab/models/swapping.py", "def naming():\n    pass", "shadow"),
        ("initlab/models/swapping.py", "class naming:\n    pass", "shadow"),
        # One page is short.
        ("initlab/page.py", "x = 1\n" * 501, "length"),
        ("kernels/sampling/op.py", '"""A page on ones."""\n' + "x = 1\n" * 500, "length"),
        ("kernels/op.py", "x = 1\n" * 500 + "# Why this is one file, at its end.\n", "length"),
    ],
)
def test_a_violation_is_seen(path: str, source: str, rule: str) -> None:
    found = violations(path, source, public={"fill_"}, modules={"naming", "swapping"})
    assert {message.split(": ")[1] for message in found} == {rule}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/_op_triton.py", "import torch, triton\nimport triton.language as tl\nfrom .op import TABLE"),
        ("kernels/_op_numba.py", "import math\nimport numba, numpy as np, torch\nfrom .sampling import stream as s"),
        ("kernels/_op_numba.py", "from .sampling.stream import philox\nfrom .region import Region\nfrom . import op"),
        ("kernels/_op_triton.py", "from ._common_triton import find\nfrom .tensors import all_plain"),
        ("kernels/_op_triton.py", "from ._op_part_triton import part"),
        ("kernels/op.py", LOAD.format({"triton": "._op_part_triton"})),
        ("kernels/sampling/_triton.py", "from ._maps_triton import normal\nfrom ._maps import NormalMap"),
        ("kernels/_common_numba.py", "from llvmlite import ir\nfrom numba import njit"),
        ("kernels/op.py", "import torch\nfrom . import backends, nonfinite\ndef f():\n    from . import _op_triton"),
        ("kernels/op.py", LOAD.format({"numba": "._op_numba", "triton": None})),
        ("kernels/nonfinite.py", LOAD.format({"triton": "._nonfinite_triton"})),
        ("kernels/sampling/fill.py", "from . import _torch, stream\nfrom .distributions import Normal"),
        (
            "kernels/sampling/fill.py",
            "from .. import backends\nfrom ..region import Region\nfrom ..nonfinite import NAN",
        ),
        ("kernels/sampling/fill.py", "_M = {'numba': '.sampling._numba', 'triton': '.sampling._triton'}"),
        ("kernels/sampling/_triton.py", "import triton\nfrom .._common_triton import find\nfrom . import stream"),
        ("kernels/sampling/_triton.py", "from .distributions import Normal\nfrom ..region import Region"),
        ("kernels/backends.py", "import os\nimport torch\nfrom importlib.util import find_spec"),
        ("kernels/backends.py", "def f(name):\n    importlib.import_module(name, __package__)"),
        ("kernels/__init__.py", '"""The API."""\nfrom .sampling import fill_\nfrom .norms import Norm\n__all__ = []'),
        (
            "kernels/__init__.py",
            "if __name__ == 'kernels':\n    from ._hub_shim import hand_over as _hand_over\n"
            "    _hand_over(globals())\nelse:\n    from .norms import Norm\n    __all__ = ['Norm']",
        ),
        ("kernels/sampling/__init__.py", "from .fill import fill_\nfrom .stream import named_key"),
        (
            "initlab/page.py",
            "import torch\nfrom initlab.kernels import fill_\nfrom . import init\nfrom .init import ones_",
        ),
        ("initlab/__init__.py", "from . import _checkout\n_checkout.link_kernels()\n__version__ = '1'"),
        ("initlab/models/__init__.py", "from . import naming\nfrom .naming import names\n__all__ = ['naming']"),
        ("initlab/models/swapping.py", "def swap():\n    pass\nclass Naming:\n    def naming(self):\n        pass"),
        ("kernels/sampling/_numba.py", "def naming():\n    pass"),
        ("initlab/page.py", "from torch.utils._pytree import tree_map\nfrom torch import __version__"),
        ("initlab/page.py", "from initlab.kernels.torch_internals import overlap\nx = torch.__version__"),
        ("kernels/torch_internals.py", "x = torch._C._autograd.y(1)"),
        ("initlab/page.py", "x = 1\n" * 500),
        ("initlab/page.py", '"""A page.\n\nThis file is long: a table.\n"""\n' + "x = 1\n" * 500),
        ("initlab/page.py", "# One op, so one file.\n" + "x = 1\n" * 500),
        ("tests/test_page.py", "import numba\nfrom initlab.kernels.sampling import _numba\n" + "x = 1\n" * 500),
    ],
)
def test_what_the_rules_allow(path: str, source: str) -> None:
    assert violations(path, source, public={"fill_"}, modules={"naming", "swapping"}) == []


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*_triton.py")), ids=lambda path: path.name)
def test_a_launch_says_whether_products_and_sums_are_fused(path):
    """Bits depend on it, and Triton's default changes: a variable of the environment's from 3.9 on, False from 3.10."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and any(map(_is_launch, ast.walk(function))):
            keywords = {k.arg for k in ast.walk(function) if isinstance(k, ast.keyword)}
            keys = {k.value for d in ast.walk(function) if isinstance(d, ast.Dict) for k in d.keys if _is_constant(k)}
            assert "enable_fp_fusion" in keywords | keys, f"{path.name}:{function.lineno}"


def _is_launch(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)


def _is_constant(node):
    return isinstance(node, ast.Constant)
