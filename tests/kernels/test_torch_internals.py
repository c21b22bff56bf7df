"""Each private name of torch is hidden in turn: what serves then does what torch's does, or errs on the safe side."""

import contextlib
import importlib.util
import operator
from pathlib import Path

import pytest
import torch
from initlab.kernels import torch_internals as internals
from torch import nn
from torch.func import functionalize, grad, vmap


@pytest.fixture
def without(monkeypatch):
    """`without(path)` is torch_internals as it is where torch lacks that name; afterwards torch has it again."""

    def without(path):
        owner, _, name = path.rpartition(".")
        spec = importlib.util.spec_from_file_location("hidden_internals", Path(internals.__file__))
        module = importlib.util.module_from_spec(spec)
        with monkeypatch.context() as patch:
            patch.delattr(operator.attrgetter(owner)(torch) if owner else torch, name)
            spec.loader.exec_module(module)
        assert getattr(module, module.NAMES[path]) is not getattr(internals, internals.NAMES[path])
        return module

    return without


def path_of(name):
    return next(path for path, other in internals.NAMES.items() if other == name)


def under_transforms(question):
    """What a question about a tensor is answered outside of transforms, and in each of them."""
    answers, x = [], torch.ones(2, 3)

    def ask(t):
        answers.append(question(t))
        return t.sum()

    ask(x)
    for transformed in (vmap(ask), grad(ask), vmap(grad(ask)), functionalize(ask)):
        transformed(x)
    return answers


def test_every_name_is_there_today():
    for path, name in internals.NAMES.items():
        assert getattr(internals, name) is operator.attrgetter(path)(torch)


@pytest.mark.parametrize("path", internals.NAMES)
def test_the_module_loads_without_any_of_them(path, without):
    without(path)


def test_transforms(without):
    hidden = without(path_of("is_transforming"))
    assert under_transforms(lambda t: hidden.is_transforming()) == [False, True, True, True, True]
    for name in ("is_transformed", "is_functional"):
        ask = getattr(without(path_of(name)), name)
        assert under_transforms(ask) == under_transforms(internals.is_transformed)
        for t in (torch.empty(0), torch.ones(2, device="meta"), torch.ones(2).to_sparse(), nn.Parameter(torch.ones(1))):
            assert not ask(t)


def test_values_of_a_transformed_tensor_are_left_alone(without):
    for name in ("_is_batched", "_batch_dim", "_unwrapped"):
        hidden = without(path_of(name))
        shapes = under_transforms(lambda t, hidden=hidden: tuple(hidden.physical(t).shape))
        assert shapes[0] == (2, 3)
    assert under_transforms(lambda t: tuple(internals.physical(t).shape))[1] == (2, 3)


def test_modes(without):
    fake = internals.FakeTensorMode()
    for name in ("_mode_of", "_FAKE"):
        hidden = without(path_of(name))
        assert not hidden.fake_mode_is_active()
        with fake:
            assert hidden.fake_mode_is_active()
    assert without(path_of("count_dispatch_modes")).count_dispatch_modes() > 0  # there may be one
    assert without(path_of("count_function_modes")).count_function_modes() == 0  # none is taken off the stack
    assert without(path_of("pop_function_mode")).pop_function_mode() is None
    without(path_of("push_function_mode")).push_function_mode(None)
    for name in ("without_dispatch_modes", "without_functions"):
        with getattr(without(path_of(name)), name)():
            assert torch.ones(1).item() == 1.0


def test_fake_tensors(without):
    hidden = without(path_of("FakeTensor"))
    assert not isinstance(torch.ones(1), hidden.FakeTensor)
    with without(path_of("FakeTensorMode")).FakeTensorMode():
        assert torch.empty(2**50).numel() == 2**50  # without memory


def test_wrappers(without):
    from torch.testing._internal.two_tensor import TwoTensor

    ask = without(path_of("is_wrapper")).is_wrapper
    for x in (torch.ones(1), nn.Parameter(torch.ones(1)), None, TwoTensor(torch.ones(1), torch.ones(1))):
        assert ask(x) == internals.is_wrapper(x)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tracing(without):
    ask = without(path_of("tracing_state")).tracing_state
    assert ask() is None

    def traced(x):
        assert ask() is not None
        return x + 1

    torch.jit.trace(traced, torch.ones(1), check_trace=False)


def test_autograd(without):
    hidden = without(path_of("backward_id"))
    x, seen = torch.ones(1, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda g: seen.append(hidden.backward_id()))
    y.backward()
    assert seen[0] != -1 == hidden.backward_id()
    assert without(path_of("current_node")).current_node() is None
    x = torch.ones(1, requires_grad=True)
    leaf = torch.ones(1)
    y = (x * leaf).sum()
    leaf.add_(0)
    without(path_of("set_versions")).set_versions((leaf,), (0,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # loud, not silent
        y.backward()


TENSORS = (
    *(torch.ones(3), torch.ones(1).expand(3), torch.ones(3, 4).T, torch.ones(0, 3), torch.ones(())),
    *(torch.ones(9)[::2], torch.ones(4, 1).expand(4, 1), torch.ones(6).as_strided((2, 3), (3, 1))),
    torch.ones(6).as_strided((2, 3), (1, 1)),
)


@pytest.mark.parametrize("tensor", TENSORS)
def test_overlap(tensor, without):
    for_certain = without(path_of("overlap")).overlap(tensor) == 1
    assert for_certain == (torch._debug_has_internal_overlap(tensor) == 1)


def test_data(without):
    ask = without(path_of("can_take_data")).can_take_data
    cpu, meta = nn.Parameter(torch.ones(1)), torch.ones(1, device="meta")
    for old, new in ((cpu, torch.ones(2)), (cpu, meta), (cpu, torch.ones(1).to_sparse())):
        assert not ask(old, new) or internals.can_take_data(old, new)


def test_many_tensors(without):
    tensors = [torch.randn(3), torch.randn(2, 2)]
    norms = without(path_of("foreach_norm")).foreach_norm(tensors)
    torch.testing.assert_close(norms, list(internals.foreach_norm(tensors)))
    differences = without(path_of("foreach_sub")).foreach_sub(tensors, tensors)
    assert not any(d.any() for d in differences)
    for device in ("cpu", "cuda", "meta"):
        ask = without(path_of("has_foreach")).has_foreach
        assert ask(torch.device(device)) <= internals.has_foreach(torch.device(device)) or device == "cpu"


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3, 3), (0, 4), (7,), ()])
def test_fans(shape, without):
    def answer(function, *arguments):
        with contextlib.suppress(ValueError):
            return function(torch.empty(shape), *arguments)

    hidden = without(path_of("fan_in_and_out"))
    assert answer(hidden.fan_in_and_out) == answer(internals.fan_in_and_out)
    hidden = without(path_of("fan_by_mode"))
    for mode in ("fan_in", "FAN_OUT", "other"):
        assert answer(hidden.fan_by_mode, mode) == answer(internals.fan_by_mode, mode)


def test_convolutions(without):
    modules = (nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.LazyConv3d(1, 1), nn.Linear(1, 1))
    for name in ("Convolution", "TransposedConvolution"):
        hidden = getattr(without(path_of(name)), name)
        for module in modules:
            assert isinstance(module, hidden) == isinstance(module, getattr(internals, name))
