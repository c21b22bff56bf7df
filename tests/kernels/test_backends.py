"""Which backend serves a tensor, and that the CPU backend's values know nothing of threads, forks, caches or CPUs."""

import hashlib
import multiprocessing
import os
import shutil
import sys
import textwrap
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from initlab.kernels import Constant, Draw, Normal, Region, TruncatedNormal, Uniform, backend_of, backends, fill_
from initlab.kernels.sampling import _torch
from torch.utils.data import DataLoader, Dataset

import initlab

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITH_NUMBA = {"numba": ".sampling._numba"}
OFFERED = WITH_NUMBA | {"triton": ".sampling._triton"}
KEY = 0x9E3779B97F4A7C15
DISTRIBUTIONS = [Uniform(-1.0, 1.0), Normal(0.5, 2.0), TruncatedNormal(), TruncatedNormal(0.0, 1.0, -2.0, 5.0)]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
may_fork_with_threads = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def numba(serving):
    with serving("numba"):
        yield


@pytest.fixture
def backend(forget, monkeypatch):
    """Starts afresh with this INITLAB_BACKEND."""

    def backend(value):
        monkeypatch.setenv("INITLAB_BACKEND", value)
        forget()

    return backend


@pytest.fixture
def without_numba(backend, monkeypatch):
    backend("auto")
    monkeypatch.setitem(sys.modules, "numba", None)  # what an import system that finds nothing looks like


def filled(distribution, n, key=KEY, dtype=torch.float32, region=None):
    x = torch.empty((n,) if region is None else region.sizes, dtype=dtype)
    x.numpy().fill(np.nan)  # not by torch, whose own threads hang in a forked child
    fill_([Draw(x, distribution, key, region)])
    return x


def digest(x):
    return hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize("value", ["auto", "torch", "numba", "triton"])
def test_backend_is_read_once(backend, monkeypatch, value):
    backend(value)
    assert backends.requested() == value
    monkeypatch.setenv("INITLAB_BACKEND", "auto" if value == "torch" else "torch")
    assert backends.requested() == value


def test_backend_unset_is_auto(backend, monkeypatch, forget):
    backend("torch")
    monkeypatch.delenv("INITLAB_BACKEND")
    forget()
    assert backends.requested() == "auto"


@pytest.mark.parametrize("value", ["cuda", "Numba", "torch,numba", " auto"])
def test_an_unknown_backend(backend, value):
    backend(value)
    message = rf"INITLAB_BACKEND is '{value}'; it must be one of auto, torch, numba, triton"
    for _ in range(2):  # the second time too
        with pytest.raises(ValueError, match=message):
            fill_([Draw(torch.zeros(3), Normal(), KEY)])


@pytest.mark.parametrize(
    ("value", "device", "offered", "chosen"),
    [
        ("auto", CPU, WITH_NUMBA, "numba"),
        ("auto", CPU, {}, "torch"),
        ("auto", CUDA, WITH_NUMBA, "torch"),
        ("auto", torch.device("meta"), WITH_NUMBA, "torch"),
        ("torch", CPU, WITH_NUMBA, "torch"),
        ("torch", CUDA, OFFERED, "torch"),
        ("numba", CPU, WITH_NUMBA, "numba"),
    ],
)
def test_choice(backend, monkeypatch, value, device, offered, chosen):
    pytest.importorskip("numba")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend(value)
    assert backends.load(device, offered).name == chosen
    if offered == WITH_NUMBA:
        assert backend_of(device) == chosen


@pytest.mark.parametrize(
    ("value", "device", "offered", "message"),
    [
        ("triton", CPU, WITH_NUMBA, "INITLAB_BACKEND=triton, but this op has no triton backend; unset"),
        ("numba", CPU, {}, "INITLAB_BACKEND=numba, but this op has no numba backend; unset"),
        ("numba", CUDA, WITH_NUMBA, "INITLAB_BACKEND=numba serves CPU tensors only, and this one is on cuda; unset"),
    ],
)
def test_a_request_that_cannot_be_honoured(backend, value, device, offered, message):
    backend(value)
    with pytest.raises(RuntimeError, match=message):
        backends.load(device, offered)


def test_a_request_that_cannot_be_honoured_writes_nothing(backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend("triton")
    tensors = [torch.full((3,), torch.nan) for _ in range(2)]
    with pytest.raises(RuntimeError, match="INITLAB_BACKEND=triton"):
        fill_([Draw(tensors[0], Constant(1.0)), Draw(tensors[1], Normal(), KEY)])
    assert all(x.isnan().all() for x in tensors)


def test_each_backend_is_the_one_that_runs(serving, monkeypatch):
    monkeypatch.setattr(_torch, "fill", lambda tensor, *_: tensor.zero_())
    with serving("torch"):
        assert torch.all(filled(Normal(), 9) == 0)
    with serving("numba"):
        assert torch.all(filled(Normal(), 9) != 0)


# ---------------------------------------------------------------------------------------------------------------
# Without numba


def test_numba_asked_for_but_absent(without_numba, backend):
    backend("numba")
    with pytest.raises(RuntimeError, match="INITLAB_BACKEND=numba, but numba is not installed; install it, or unset"):
        filled(Normal(), 3)


def test_torch_serves_where_numba_is_absent(without_numba, serving):
    assert backends.load(CPU, WITH_NUMBA) == ("torch", None)
    x = filled(Normal(), 1001)
    with serving("torch"):
        assert torch.equal(x, filled(Normal(), 1001))


def test_one_warning_above_2_to_24_elements(without_numba, monkeypatch):
    monkeypatch.setattr(_torch, "fill", lambda *_: None)  # its values are not the point, and take seconds
    limit = torch.empty(2**24, dtype=torch.float16)
    above = torch.empty(2**24 + 1, dtype=torch.float16)
    fill_([Draw(limit, Normal(), KEY)])
    with pytest.warns(UserWarning, match="plain torch backend.*pip install numba") as caught:
        fill_([Draw(above, Normal(), KEY), Draw(above, Uniform(), KEY)])
    assert len(caught) == 1


def test_no_warning_where_torch_was_asked_for(without_numba, backend, monkeypatch):
    backend("torch")
    monkeypatch.setattr(_torch, "fill", lambda *_: None)
    fill_([Draw(torch.empty(2**24 + 1, dtype=torch.float16), Normal(), KEY)])


def test_numba_that_cannot_be_imported(backend, monkeypatch, serving):
    """Installed, but it fails to import, as with a numpy that is too new for it."""
    monkeypatch.setitem(sys.modules, "initlab.kernels.sampling._numba", None)
    monkeypatch.delattr(initlab.kernels.sampling, "_numba", raising=False)
    backend("auto")
    with pytest.warns(UserWarning, match="numba cannot be imported, so plain torch takes its place"):
        x = filled(Normal(), 1001)
    with serving("torch"):
        assert torch.equal(x, filled(Normal(), 1001))
    backend("numba")
    with pytest.raises(RuntimeError, match="INITLAB_BACKEND=numba, but numba cannot be imported"):
        filled(Normal(), 3)


def test_a_stand_in_without_a_spec_counts_as_installed(backend, monkeypatch):
    """As a documentation builder mocks modules; find_spec raises ValueError for one."""
    monkeypatch.setitem(sys.modules, "numba", types.ModuleType("numba"))
    monkeypatch.setitem(sys.modules, "initlab.kernels.sampling._numba", None)
    backend("auto")
    with pytest.warns(UserWarning, match="numba cannot be imported"):
        assert backends.load(CPU, WITH_NUMBA).name == "torch"


# Every op, in a process whose `{package}` raises at import. A CPU's tensors stand for a GPU's where there is none.
EVERY_OP = textwrap.dedent("""
    import os, warnings
    import torch
    from initlab.kernels import Draw, Normal, Uniform, add_flag_, backends, clip_, fill_, grad_norm, linear_relu

    backends._BEST["cpu"] = "{package}"
    device = torch.device("cuda" if torch.cuda.is_available() and "{package}" == "triton" else "cpu")
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).to(device) for s in ((5, 7), (3, 7), (3,)))
    x[0, 0] = float("inf")

    def fill():
        tensors = [torch.empty(101, device=device), torch.empty(9, 8, device=device).t()]
        fill_([Draw(t, d, 3) for t, d in zip(tensors, (Normal(), Uniform()))])
        return tensors

    def norm():
        return [grad_norm([weight, bias]).norm64]

    def clip():
        gradients = [weight.clone(), bias.clone()]
        clip_(gradients, grad_norm(gradients).norm64, 0.5)
        return gradients

    def flag():
        return [add_flag_(torch.zeros(1, dtype=torch.int32, device=device), x)]

    def linear():
        operands = [t.clone().requires_grad_() for t in (x, weight, bias)]
        flags = torch.zeros(1, dtype=torch.int32, device=device)
        y = linear_relu(*operands, flags=flags)
        y.sum().backward()
        return [y.detach(), flags, *(t.grad for t in operands)]

    OPS = [fill, norm, clip, flag, linear]
    requested, backends.requested = backends.requested, lambda: "torch"
    expected = [op() for op in OPS]
    backends.requested = requested
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op, results in zip(OPS * 2, expected * 2):
            for got, result in zip(op(), results, strict=True):
                assert torch.equal(got.nan_to_num(7.0), result.nan_to_num(7.0)), op
    assert len(caught) == 1, [str(w.message) for w in caught]
    print(caught[0].message)

    os.environ["INITLAB_BACKEND"] = "{package}"
    requested.cache_clear()
    backends._imported.cache_clear()
    for op in OPS:
        try:
            op()
        except RuntimeError as error:
            print(op.__name__, error)
""")


@pytest.mark.parametrize(
    ("package", "raising"),
    [(package, ["fill", "norm", "clip", "flag", "linear"]) for package in ("triton", "numba")],
)
@pytest.mark.parametrize("error", [RuntimeError("0 active drivers"), ModuleNotFoundError("No module named 'x'")])
@pytest.mark.long_if.with_args(lambda error, package, **_: isinstance(error, ModuleNotFoundError) or package == "numba")
def test_every_op_works_beside_a_package_that_cannot_be_imported(python, tmp_path, package, raising, error):
    pytest.importorskip(package)
    broken = tmp_path / "broken" / package
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(f"raise {error!r}")
    path = os.pathsep.join([str(broken.parent), str(Path(initlab.__file__).parent.parent)])
    warning, *errors = python(EVERY_OP.format(package=package), PYTHONPATH=path, TRITON_INTERPRET=1).splitlines()
    why = f"{type(error).__name__}: {error}"
    assert warning == f"{package} cannot be imported, so plain torch takes its place, slower: {why}"
    message = f"INITLAB_BACKEND={package}, but {package} cannot be imported: {why}; repair it, or unset INITLAB_BACKEND"
    assert [line.split()[0] for line in errors if message in line] == raising
    assert len(errors) == len(raising)


# ---------------------------------------------------------------------------------------------------------------
# Threads and processes. 2^16 elements are a piece, which a thread claims; these tensors have forty and a rest.

N = 5 * 2**19 + 4321
BLOCK = Region((2000, 1700), (7, 3), (1613, 1693))


def test_number_of_threads_does_not_matter(numba, threads):
    for distribution in DISTRIBUTIONS:
        for region in (None, BLOCK, Region((2**40,), (2**34 - 77,), (N,))):
            threads(1)
            expected = filled(distribution, N, region=region)
            assert expected.isfinite().all()
            for number in (2, 3, 7):
                threads(number)
                assert torch.equal(filled(distribution, N, region=region), expected)


def threads_asked_for(*draws):
    """How many threads each call of the backend asks for, of three."""
    from initlab.kernels.sampling import _numba

    torch.set_num_threads(3)
    asked, run_on_pool = [], _numba.run_on_pool

    def watched(job, data, threads):
        asked.append(threads)
        run_on_pool(job, data, threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_numba, "run_on_pool", watched)
        fill_(draws)
    return asked


def test_more_threads_than_one_where_it_is_worth_it(numba, threads):
    small, large = torch.empty(2000), torch.empty(N)
    normal = [Draw(x, Normal(), KEY) for x in (small, large)]
    assert threads_asked_for(normal[0]) == [1]
    assert threads_asked_for(normal[1]) == [3]
    assert threads_asked_for(*normal[:1] * 60) == [1]  # one call for all of them, in turn: they are one memory
    assert threads_asked_for(*normal[:1] * 140) == [1] * 140  # too many elements for that
    assert threads_asked_for(*(Draw(x, Normal(), KEY) for x in large.split(1000))) == [3]  # one call, no memory shared


def test_draws_that_meet_in_memory_keep_their_order(backend, threads):
    """Small together or large, on any number of threads: the last draw of an element counts."""
    for rows in (64, 4096):
        weight, expected = torch.empty(rows, 100), filled(Normal(), 0, region=Region.whole((rows, 100)))
        expected[3], expected[5], expected[:2] = 0.0, filled(Uniform(), 100), 2.0
        draws = [Draw(weight, Uniform(), 5), Draw(weight, Normal(), KEY), Draw(weight[3], Constant(0.0))]
        draws += [Draw(weight[5], Uniform(), KEY), Draw(weight.t()[:, :2], Constant(2.0))]
        for number in (1, 3):
            threads(number)
            weight.fill_(torch.nan)
            fill_(draws)
            assert torch.equal(weight, expected)
    weight = torch.empty(6, 4, dtype=torch.complex128)
    fill_([Draw(weight, Normal(), KEY), Draw(weight[3], Constant(0.0))])
    assert torch.all((weight == 0).sum(1) == torch.tensor([0, 0, 0, 4, 0, 0]))


def test_tasks_are_shared_by_threads_and_their_errors_raised(numba):
    from initlab.kernels import _common_numba

    def tasks():  # a generator that another thread enters meanwhile raises
        for task in range(20):
            time.sleep(0.01)
            yield task

    done = []
    _common_numba.share(tasks(), done.append, 3)
    assert sorted(done) == [*range(20)]

    def broken(task):
        if threading.current_thread().name.startswith("initlab"):
            met.set()
            raise MemoryError("in a helper")
        met.wait(timeout=30)

    met = threading.Event()
    with pytest.raises(MemoryError, match="in a helper"):
        _common_numba.share(range(20), broken, 3)


def test_concurrent_python_threads(numba, threads):
    threads(2)
    jobs = [(distribution, n, key) for distribution in DISTRIBUTIONS for n in (1001, N // 2) for key in (1, 2)]
    expected = [digest(filled(*job)) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert [digest(x) for x in pool.map(lambda job: filled(*job), jobs)] == expected


def contiguous():
    return [digest(filled(distribution, N)) for distribution in DISTRIBUTIONS]


def transposed():
    x = torch.empty_strided((1000, 1001), (1, 1000))
    fill_([Draw(x, Normal(), KEY)])
    return digest(x.t())


def forked(function, n=1):
    """What a function returns in `n` children, forked one after the other."""
    context = multiprocessing.get_context("fork")
    for _ in range(n):
        ours, theirs = context.Pipe()
        child = context.Process(target=lambda to=theirs: to.send(function()))
        child.start()
        theirs.close()
        try:
            assert ours.poll(20), "a forked child hangs"
            yield ours.recv()
        finally:
            child.kill()
            child.join()


@needs_fork
@may_fork_with_threads
@pytest.mark.parametrize("function", [contiguous, transposed])
def test_after_a_fork_with_the_pools_alive(numba, threads, function):
    """Ours and torch's own, whose operations hang in a forked child where they are large enough to need it."""
    threads(3)
    torch.ones(2**20).exp()
    expected = function()
    assert [*forked(function)] == [expected]
    assert function() == expected  # the parent's pool still works


@needs_fork
@may_fork_with_threads
def test_the_torch_backend_after_a_fork(serving, threads):
    with serving("torch"):
        threads(3)
        torch.ones(2**20).exp()
        assert [*forked(transposed)] == [transposed()]


@needs_fork
@may_fork_with_threads
def test_after_a_fork_in_the_middle_of_a_fill(numba, threads):
    threads(3)
    expected = contiguous()
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            filled(Normal(), N)

    worker = threading.Thread(target=busy)
    worker.start()
    try:
        assert [*forked(contiguous, 3)] == [expected] * 3
    finally:
        stop.set()
        worker.join()


@needs_fork
@may_fork_with_threads
def test_a_fork_waits_for_a_thread_that_compiles(numba):
    filled(Normal(), 8)  # imports the backend, which watches forks
    lock = pytest.importorskip("numba.core.compiler_lock").global_compiler_lock
    holds, done = threading.Event(), threading.Event()

    def compile_something():
        with lock:
            holds.set()
            done.wait(0.5)

    worker = threading.Thread(target=compile_something)
    worker.start()
    holds.wait()
    assert [*forked(lambda: lock._lock.acquire(timeout=5))] == [True]  # held for good by nobody in the child
    worker.join()


def test_a_compiled_caller_gets_the_same_bits(backend):
    compiled = []

    def backend(graph, inputs):
        compiled.extend(node for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    @torch.compile(backend=backend)
    def fill_and_add(x):
        fill_([Draw(x, Normal(0.5, 2.0), KEY)])
        return x + 1

    assert torch.equal(fill_and_add(torch.zeros(1000)), filled(Normal(0.5, 2.0), 1000) + 1)
    assert len(compiled) == 1  # the addition: a compiler that saw the stream's arithmetic could fuse it


class Filled(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return filled(DISTRIBUTIONS[i], 2**19 + 12_345)


@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_fork)])
@may_fork_with_threads
def test_in_data_loader_workers(numba, threads, method):
    threads(2)
    expected = [*Filled()]
    loader = DataLoader(Filled(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60)
    for x, y in zip(loader, expected, strict=True):
        assert torch.equal(x, y)


# ---------------------------------------------------------------------------------------------------------------
# Caches and CPUs, each in a process of its own

SCRIPT = textwrap.dedent("""
    import hashlib
    import torch
    from initlab.kernels import Draw, Normal, TruncatedNormal, Uniform, fill_
    from initlab.kernels.sampling import stream

    torch.set_num_threads(1)
    {before}
    for distribution in {distributions}:
        x = torch.empty(1001)
        fill_([Draw(x, distribution, {key})])
        print(hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest())
    {after}
""")
CACHE = textwrap.dedent("""
    from initlab.kernels.sampling import _numba
    from initlab.kernels.sampling.stream import NormalMap
    kernel = _numba._kernel(NormalMap, torch.float32)
    print(type(kernel._cache).__name__, kernel.cache_hits)
""")


@pytest.fixture
def check(python, serving):
    """Runs the script, compares each distribution's digest to this process's, and returns what else it prints."""

    def check(distributions=DISTRIBUTIONS[1:2], before="", after="", **options):
        with serving("torch"):
            expected = [digest(filled(distribution, 1001)) for distribution in distributions]
        lines = python(
            SCRIPT.format(distributions=distributions, key=KEY, before=before, after=after), **options
        ).splitlines()
        assert lines[: len(distributions)] == expected
        return lines[len(distributions) :]

    return check


def copy_of_the_package(folder):
    package = Path(initlab.__file__).parent
    kernels = Path(backends.__file__).parent
    shutil.copytree(package, folder / "initlab", ignore=shutil.ignore_patterns("__pycache__", "kernels"))
    shutil.copytree(kernels, folder / "initlab" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "initlab" / "kernels"


@pytest.mark.long
def test_a_second_process_uses_the_cache_on_disk(check, tmp_path):
    pytest.importorskip("numba")
    for hits, change in ((0, ""), (1, ""), (0, "stream.NOTE = 1")):
        # The third has another constant: other code, which must not come from the cache.
        assert check(before=change, after=CACHE, NUMBA_CACHE_DIR=tmp_path) == [f"FunctionCache {hits}"]
    assert [*tmp_path.rglob("*.nbi")]


@pytest.mark.long
def test_where_no_cache_can_be_written(check, tmp_path):
    """No cache folder of ours, none of the user's, none that the environment names: compiled, and not kept."""
    pytest.importorskip("numba")
    kernels = copy_of_the_package(tmp_path)
    (kernels / "sampling" / "__pycache__").write_text(
        "a file, where the folder should be; root may write into any folder"
    )
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), "/dev/null/nowhere")
    assert check(after=CACHE, root=tmp_path, PYTHONDONTWRITEBYTECODE=1, **nowhere) == ["NullCache 0"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["torch", "numba"])
def test_another_cpu_gives_the_same_bits(check, tmp_path, name):
    """Code for the plainest CPU of this architecture, without its vector and fused instructions."""
    if name == "numba":
        pytest.importorskip("numba")
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": tmp_path}
    assert check(DISTRIBUTIONS, INITLAB_BACKEND=name, ATEN_CPU_CAPABILITY="default", **plain) == []


@pytest.mark.long
def test_a_fill_while_the_interpreter_shuts_down(check):
    """Then no thread can be started: the calling one does all of it."""
    pytest.importorskip("numba")
    late = (
        "import atexit; torch.set_num_threads(3); late = torch.full((2**20 + 7,), torch.nan); "
        "atexit.register(lambda: print(bool(late.isnan().any()))); "
        "atexit.register(lambda: fill_([Draw(late, Normal(), 1)]))"
    )
    assert check(before=late) == ["False"]
