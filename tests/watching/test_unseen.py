"""What a watch cannot see, it says; steps are the optimizer's; copies of a model are not watched."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.optim.swa_utils import AveragedModel

import initlab

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch.compile's own
    pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated"),
]


class Divide(nn.Module):
    def forward(self, x):
        return x / (x - x)


class Gaussian(nn.Module):
    """Puts out a distribution, whose scale may be NaN."""

    def __init__(self, scale):
        super().__init__()
        self.mean, self.scale = nn.Linear(4, 2), scale

    def forward(self, x):
        return Normal(self.mean(x), torch.full((2,), self.scale), validate_args=False)


class Opaque(nn.Module):
    """Puts out something that hides its tensor."""

    class Box:
        __slots__ = ("read",)

    def forward(self, x):
        box = self.Box()
        box.read = lambda: x / 0.0 * 0.0
        return box


class Reads(nn.Module):
    """Encodes, and takes a number from what comes out."""

    def __init__(self, encoder, read):
        super().__init__()
        self.encoder, self.read, self.head = encoder, read, nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.read(self.encoder(x)))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def bytes_of(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer


# Copies


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(io.BytesIO(bytes_of(model).getvalue()), weights_only=False),
        lambda model: AveragedModel(model).module,
        copy.copy,
    ],
    ids=["deepcopy", "pickle", "torch.save", "AveragedModel", "copy"],
)
def test_a_copy_is_not_watched(copied):
    model = net()
    x = torch.randn(3, 4)
    with initlab.watch(model) as watch:
        twin = copied(model)
        if twin[0] is not model[0]:  # copy.copy shares the parts
            nn.init.constant_(twin[0].weight, float("nan"))
            twin(x)
        else:
            twin.forward = lambda x: x / 0.0 * 0.0
            twin(x)
        model(x)
    report = watch.report()
    assert report.fault is None
    assert (report.model_calls, report.calls) == (1, 4)
    assert torch.equal(copied(model)(x), model(x))


def test_a_saved_model_needs_no_initlab(tmp_path):
    model = net()
    with initlab.watch(model, backward=True):
        model(torch.randn(3, 4)).sum().backward()
        torch.save(model, tmp_path / "model.pt")
    load = f"import sys, torch; m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); m(torch.ones(1, 4))"
    code = f"{load}; assert not any(name.startswith('initlab') for name in sys.modules)"
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)


# Steps


@pytest.mark.parametrize("accumulated", [1, 4])
def test_steps_are_the_optimizers(accumulated):
    model = net()
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, net()))
    with initlab.watch(model) as watch:
        for _ in range(3):
            for _ in range(accumulated):
                model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
            other.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model(torch.randn(3, 4))
    report = watch.report()
    assert (report.steps, report.model_calls) == (3, 3 * accumulated + 3)
    assert str(report).startswith(f"nothing non-finite in 3 steps, {3 * accumulated + 3} calls of the model, ")


def test_the_step_of_a_fault():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.watch(model) as watch:
        for step in range(3):
            for part in range(2):
                x = torch.full((3, 4), float("inf") if (step, part) == (2, 1) else 0.5)
                model(x).sum().backward()
            optimizer.step()
    fault = watch.report().fault
    assert (fault.step, fault.model_call) == (3, 6)
    assert str(fault).startswith("step 3, call 6, forward: input 0")


def test_steps_are_no_longer_counted_afterwards():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.watch(model) as watch:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    optimizer.step()
    assert watch.report().steps == 1


# What is not seen


def test_transforms_of_torch_func():
    model = nn.Sequential(nn.Linear(4, 8), Divide())
    with initlab.watch(model) as watch:
        torch.func.vmap(model)(torch.randn(3, 4))
    report = watch.report()
    assert report.fault is None
    assert report.inspected == 0
    lines = str(report).splitlines()
    assert lines[0].startswith("nothing was inspected in 1 calls of the model")
    assert "  not inspected: what the model computes under torch.func's transforms" in lines


def test_a_distribution_is_looked_into():
    model = Reads(Gaussian(float("nan")), lambda out: out.mean + out.stddev)
    with initlab.watch(model) as watch:
        model(torch.randn(3, 4))
    fault = watch.report().fault
    assert (fault.module, fault.tensor, fault.cause) == ("encoder", "output.scale", "produced")
    with initlab.watch(healthy := Reads(Gaussian(1.0), lambda out: out.mean + out.stddev)) as watch:
        healthy(torch.randn(3, 4))
    assert (watch.report().fault, watch.report().unseen) == (None, ())


def test_an_output_that_hides_its_tensors_is_named():
    model = Reads(Opaque(), lambda out: out.read()[:, :2])
    with initlab.watch(model) as watch:
        model(torch.randn(3, 4))
    report = watch.report()
    assert report.fault.module == ""
    assert report.fault.notes == ("the output of module 'encoder' (Box) cannot be inspected, and may have held it",)
    assert report.unseen == ("the output of module 'encoder', a Box",)


def test_a_model_that_is_not_called():
    with initlab.watch(net()) as watch:
        pass
    assert str(watch.report()).splitlines() == [
        "nothing was inspected in 0 calls of the model, 0 of its modules",
        "  not inspected: the model was not called. If torch.compile(model) is what runs, watch that; if a copy of it "
        "does, watch the copy",
    ]


def test_what_a_compiled_twin_runs():
    torch.compiler.reset()
    model = net()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(2, 4))
    with initlab.watch(model) as watch:
        compiled(torch.ones(2, 4))
    report = watch.report()
    assert report.inspected == 0 or report.model_calls == 1  # torch.compile may take the hooks in
    if not report.model_calls:
        assert "watch that" in report.unseen[0]
    torch.compiler.reset()


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    "compiled", [lambda module: torch.compile(module, backend="eager"), compiled_in_place], ids=["wrapped", "in place"]
)
def test_compiled_parts_are_watched_at_their_borders(compiled):
    torch.compiler.reset()
    part = compiled(nn.Sequential(nn.Linear(8, 8), Divide()))
    model = nn.Sequential(nn.Linear(4, 8), part, nn.Linear(8, 1))
    x = torch.randn(3, 4)
    model(x)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with initlab.watch(model) as watch:
        model(x)
    report = watch.report()
    assert (report.fault.module, report.fault.cause, report.fault.passed_on) == ("1", "produced", ("2",))
    assert report.unseen == ("what runs inside module '1', which is compiled",)
    model(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames  # nothing was compiled anew
    torch.compiler.reset()


def test_a_model_that_is_compiled_in_place():
    torch.compiler.reset()
    model = compiled_in_place(nn.Sequential(nn.Linear(4, 8), Divide()))
    call = model._compiled_call_impl
    with initlab.watch(model) as watch, contextlib.suppress(RuntimeError):
        model(torch.randn(3, 4))
        model(torch.randn(3, 4, 5))  # raises: the call ends all the same
    report = watch.report()
    assert (report.fault.module, report.model_calls) == ("", 1)
    assert model._compiled_call_impl is call
    torch.compiler.reset()


def test_torchscript_is_named():
    model = nn.Sequential(nn.Linear(4, 8), torch.jit.trace(nn.Linear(8, 8), torch.ones(1, 8), check_trace=False))
    with initlab.watch(model) as watch:
        model(torch.ones(2, 4))
    assert watch.report().unseen == ("what runs inside module '1', which is TorchScript",)
