"""What is shipped, and that every way of getting at it works: wheel, sdist, editable install, bare checkout.

Each case runs in a process of its own. Hugging Face's `kernels`, whose name our source folder shares, is stood in
for by a package of that name with its metadata and its setuptools hook.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import initlab

pytestmark = pytest.mark.xdist_group("packaging")  # they share two builds
ROOT = Path(__file__).resolve().parent.parent
IMPORTED_FROM = Path(initlab.__file__).parent.parent

USE = """
    import importlib.util, pickle
    import torch, initlab
    import initlab.kernels.sampling.stream
    from initlab.kernels import Normal, fill_

    x = initlab.init.normal_(torch.empty(7))
    assert x.isfinite().all() and x.std() > 0
    assert importlib.import_module("initlab.kernels.sampling").fill_ is fill_
    assert pickle.loads(pickle.dumps(Normal)) is Normal
    assert Normal.__module__.startswith("initlab.kernels.sampling.")
    for package in ("models", "clipping", "watching", "diagnosis", "distributed"):
        importlib.import_module("initlab." + package)
    from initlab.pages import diagnosis_page
    assert "<style>" in diagnosis_page(initlab.Diagnosis(())) and "clipboard" in diagnosis_page(initlab.Diagnosis(()))
    for stranger in ("tests", "benchmarks", "docs", "examples", "tools", "setup", "initlab"):
        assert importlib.util.find_spec("initlab." + stranger) is None, stranger
    print(initlab.__file__, initlab.kernels.__file__, sep="\\n")
"""


def run(command: Sequence[str | Path], cwd: Path, path: Sequence[Path] = ()) -> str:
    """The standard output of a command, run in `cwd` with `path` as its PYTHONPATH."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, cwd: Path, path: Sequence[Path] = (), options: Sequence[str] = ()) -> str:
    return run([sys.executable, *options, "-c", textwrap.dedent(code)], cwd, path)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project: building writes beside setup.py, and takes in what an earlier build left there."""
    copy = tmp_path_factory.mktemp("project") / "initlab"
    leftovers = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=leftovers)
    return copy


@pytest.fixture(scope="module")
def dist(project: Path) -> Path:
    """A folder with the sdist, and the wheel built from that sdist."""
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", project / "dist"], cwd=project)
    return project / "dist"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A venv with everything installed here except initlab."""
    venv.create(tmp_path / "venv", with_pip=False)
    here = Path(sysconfig.get_path("purelib"))
    (there,) = tmp_path.glob("venv/lib/python*/site-packages")
    for entry in here.iterdir():
        if "initlab" not in entry.name:
            (there / entry.name).symlink_to(entry)
    return tmp_path / "venv"


@pytest.fixture
def hf_kernels(tmp_path: Path) -> Path:
    """A folder with a stand-in for Hugging Face's `kernels`, of a version that transformers accepts."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    folder = tmp_path / "hf"
    files = {
        "kernels/__init__.py": f"""
            __version__ = "{KERNELS_MIN_VERSION}"

            def __getattr__(name):  # any of the decorator factories transformers asks for
                if name.startswith("__"):
                    raise AttributeError(name)
                return lambda *args, **kwargs: lambda target: target
            """,
        "kernels/locking.py": """
            import os, sys

            def write_egg_lockfile(command, basename, filename):
                assert os.getcwd() not in map(os.path.abspath, sys.path), sys.path
                print("the hook ran")
            """,
        "kernels.dist-info/METADATA": f"""
            Metadata-Version: 2.1
            Name: kernels
            Version: {KERNELS_MIN_VERSION}
            """,
        "kernels.dist-info/entry_points.txt": """
            [egg_info.writers]
            kernels.lock = kernels.locking:write_egg_lockfile
            """,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text).lstrip())
    return folder


def test_these_tests_run_on_the_installed_wheel() -> None:
    installed = Path(sysconfig.get_path("purelib")) / "initlab"
    if not installed.exists():
        pytest.skip("no wheel of initlab is installed: the tests run on a checkout")
    assert Path(initlab.__file__).parent == installed, "a checkout hides the installed wheel; use `make test`"


@pytest.mark.long
def test_wheel(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in shipped} == {"initlab", f"initlab-{initlab.__version__}.dist-info"}

    modules = {f"initlab/{p.relative_to(ROOT / 'initlab').as_posix()}" for p in ROOT.glob("initlab/**/*.py")}
    modules |= {f"initlab/kernels/{p.relative_to(ROOT / 'kernels').as_posix()}" for p in ROOT.glob("kernels/**/*.py")}
    others = {"initlab/py.typed", "initlab/languages/zh.json", "initlab/pages/page.css", "initlab/pages/page.js"}
    assert {name for name in shipped if name.startswith("initlab/")} == {*modules, *others}


@pytest.mark.long
def test_sdist_is_the_whole_project(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("kernels", "initlab", "tests", "benchmarks", "docs", "examples", "tools", ".ci")
    files = {p.relative_to(ROOT).as_posix() for name in folders for p in ROOT.glob(f"{name}/**/*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {*files, "Makefile", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= shipped


@pytest.mark.long
def test_installed_wheel(dist: Path, elsewhere: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    run([elsewhere / "bin/python", "-m", "pip", "install", "--no-index", "--no-deps", wheel], cwd=tmp_path)
    init, kernels = run([elsewhere / "bin/python", "-c", textwrap.dedent(USE)], cwd=tmp_path).split()
    assert Path(init).is_relative_to(elsewhere)
    assert Path(kernels) == Path(init).parent / "kernels/__init__.py"
    assert run([elsewhere / "bin/initlab", "--help"], cwd=tmp_path)

    about = "from importlib.metadata import version; import sys, initlab; print(version('initlab'), len(sys.meta_path))"
    version, finders = run([elsewhere / "bin/python", "-c", about], cwd=tmp_path).split()
    assert version == initlab.__version__
    without = "import sys, torch; print(len(sys.meta_path))"
    assert run([elsewhere / "bin/python", "-c", without], cwd=tmp_path).split() == [finders], "a finder was added"


@pytest.mark.long
def test_editable_install(project: Path, elsewhere: Path, tmp_path: Path) -> None:
    pip = [elsewhere / "bin/python", "-m", "pip"]
    run([*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", project], cwd=tmp_path)
    init, kernels = run([elsewhere / "bin/python", "-c", textwrap.dedent(USE)], cwd=tmp_path).split()
    assert Path(init) == project / "initlab/__init__.py"
    assert Path(kernels) == project / "kernels/__init__.py"


@pytest.mark.parametrize("through", ["cwd", "PYTHONPATH"])
@pytest.mark.long
def test_bare_checkout_without_numba_and_triton(through: str, tmp_path: Path) -> None:
    cwd, path = (ROOT, []) if through == "cwd" else (tmp_path, [ROOT])
    not_installed = 'import sys; sys.modules["numba"] = sys.modules["triton"] = None\n'
    init, kernels = python(not_installed + textwrap.dedent(USE), cwd, path).split()
    assert Path(init) == ROOT / "initlab/__init__.py"
    assert Path(kernels) == ROOT / "kernels/__init__.py"


@pytest.mark.long
def test_a_process_that_never_imported_initlab_can_unpickle_from_a_checkout() -> None:
    pickled = "import pickle; from initlab.kernels import named_key; print(pickle.dumps(named_key).hex())"
    data = python(pickled, cwd=ROOT).strip()
    name = python(f"import pickle; print(pickle.loads(bytes.fromhex('{data}')).__module__)", cwd=ROOT)
    assert name.strip() == initlab.kernels.named_key.__module__
    assert name.startswith("initlab.kernels.sampling.")


def test_import_is_light(tmp_path: Path) -> None:
    """Beside torch, `import initlab` loads nothing that has to be installed."""
    code = """
        import sys, torch
        before = set(sys.modules)
        import initlab
        loaded = {name.split(".")[0] for name in set(sys.modules) - before}
        print(*sorted(loaded - sys.stdlib_module_names - {"torch"}))
        assert not {"numba", "triton"} & set(sys.modules)
    """
    assert python(code, tmp_path, [IMPORTED_FROM]).split() == ["initlab"]


def test_our_folder_under_the_name_kernels_looks_old_and_empty() -> None:
    code = """
        import importlib.util
        import kernels
        print(kernels.__file__, kernels.__version__, *[name for name in dir(kernels) if not name.startswith("_")])
        assert importlib.util.find_spec("kernels.stream") is None
    """
    # -S: without site-packages, where Hugging Face's distribution may be.
    assert python(code, ROOT, options=["-S"]).split() == [str(ROOT / "kernels/__init__.py"), "0.0.0"]


@pytest.mark.parametrize("beside_hf", [False, True])
@pytest.mark.long
def test_transformers_in_a_checkout(beside_hf: bool, hf_kernels: Path) -> None:
    if not beside_hf and importlib.metadata.packages_distributions().get("kernels"):
        pytest.skip("Hugging Face's kernels is installed here")
    code = """
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils.import_utils import is_kernels_available

        tiny = dict(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=16, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(GPT2Config(**tiny))
        assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 16)
        import initlab.kernels, kernels
        print(is_kernels_available(), kernels.__file__, initlab.kernels.__file__)
    """
    available, theirs, ours = python(code, ROOT, [hf_kernels] if beside_hf else []).split()
    assert available == str(beside_hf)
    assert Path(theirs) == (hf_kernels if beside_hf else ROOT) / "kernels/__init__.py"
    assert Path(ours) == ROOT / "kernels/__init__.py"


@pytest.mark.long
def test_build_beside_hf(project: Path, hf_kernels: Path, tmp_path: Path) -> None:
    """Its setuptools hook gets its own `kernels`, though our folder comes first on the path."""
    egg_info = [sys.executable, "setup.py", "egg_info", "--egg-base", tmp_path]
    assert "the hook ran" in run(egg_info, cwd=project, path=[project, hf_kernels])
