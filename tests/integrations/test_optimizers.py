"""Steps with NaN under optimizers of other packages: everything that they hold is what it was before the step."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import utils

import initlab

pytestmark = [
    *(pytest.mark.long, pytest.mark.xdist_group("optimizers"), pytest.mark.filterwarnings("ignore")),
    pytest.mark.usefixtures("one_thread"),
]
MAX_NORM = 0.1


def of_package(name, **options):
    def make(parameters):
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(parameters, lr=0.01, **options)

    return make


def around_adamw(name, fused=False, **options):
    def make(parameters):
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(torch.optim.AdamW(parameters, 0.01, fused=fused), **options)

    return make


def sam(parameters):
    import pytorch_optimizer

    return pytorch_optimizer.SAM(parameters, torch.optim.SGD, lr=0.01, momentum=0.9)


def schedule_free(name, **options):
    def make(parameters):
        import schedulefree

        optimizer = getattr(schedulefree, name)(parameters, lr=0.01, **options)
        optimizer.train()
        return optimizer

    return make


OPTIMIZERS = {
    "SOAP": of_package("SOAP", precondition_frequency=2),
    "CAME": of_package("CAME"),
    "Lamb": of_package("Lamb"),
    "AdEMAMix": of_package("AdEMAMix"),
    "Lookahead": around_adamw("Lookahead", k=3),
    "Lookahead, fused": around_adamw("Lookahead", fused=True, k=3),
    "OrthoGrad": around_adamw("OrthoGrad"),
    "PCGrad": around_adamw("PCGrad"),
    "Magma": around_adamw("Magma"),
    "TRAC": around_adamw("TRAC"),
    "SAM": sam,
    "AdamWScheduleFree": schedule_free("AdamWScheduleFree", warmup_steps=5),
    "SGDScheduleFree": schedule_free("SGDScheduleFree", warmup_steps=5),
    "RAdamScheduleFree": schedule_free("RAdamScheduleFree"),
    "LBFGS": lambda ps: torch.optim.LBFGS(ps, 0.1, max_iter=3, history_size=2),
}
WITH_CLOSURE = {"SAM", "LBFGS"}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(step, dtype):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    return x, (x[:, :3] * 4).sin() * (1 + step % 5)


def closure_of(model, optimizer, step, bad=(), clip=False):
    """A closure, for one step. Its calls are counted from 0; those in `bad` put a NaN into a gradient."""
    calls = iter(range(1000))

    def closure():
        optimizer.zero_grad()
        x, y = batch(step, model[0].weight.dtype)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        if next(calls) in bad:
            model[2].weight.grad[1, 3] = torch.nan
        if clip:
            utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        return loss

    return closure


def take_step(name, model, optimizer, closure, seed=0):
    torch.manual_seed(seed)  # Magma draws masks
    if name == "SAM":  # moves weights along the gradients that there are, and steps by those of the closure
        closure()
    if name in WITH_CLOSURE:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def contents(value, seen=None):
    """All that an object holds: numbers, tensors and what is in containers and optimizers, in one comparable tree."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, value.detach().clone().double().nan_to_num(7.25).tolist())
    if isinstance(value, torch.optim.Optimizer):
        if id(value) in seen:
            return "seen"
        seen.add(id(value))
        mine = {k: v for k, v in vars(value).items() if not k.startswith(("_optimizer_", "_initlab", "_zero_grad"))}
        return contents(mine, seen)
    if isinstance(value, dict):
        return {k if isinstance(k, str) else f"key {i}": contents(v, seen) for i, (k, v) in enumerate(value.items())}
    if isinstance(value, (list, tuple)):
        return [contents(v, seen) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_nan_changes_nothing_that_the_optimizer_holds(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    clipper = initlab.GradClipper(optimizer, MAX_NORM, named_parameters=model.named_parameters())
    for step in range(12):
        bad = step in (0, 5, 6)
        closure = closure_of(model, optimizer, step, bad=range(1000) if bad else ())
        before = contents([optimizer, *model.parameters()])
        take_step(name, model, optimizer, closure)
        if bad:
            assert contents([optimizer, *model.parameters()]) == before
    stats = clipper.stats()
    assert stats.first_bad_step == 1
    # SAM moves its weights along the gradients with the NaN, before it calls the closure.
    assert stats.first_bad_parameter == ("0.weight" if name == "SAM" else "2.weight")
    if name != "LBFGS":  # calls its closure up to three times a step
        assert (stats.steps, stats.nonfinite) == (12, 3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_clipping_before_each_step(name):
    """torch's clipping in the closure, where there is one, and without the steps with a NaN."""
    ours, theirs = net(torch.float64), net(torch.float64)  # CAME and SOAP make much of a last bit
    mine, other = (OPTIMIZERS[name](model.parameters()) for model in (ours, theirs))
    initlab.GradClipper(mine, MAX_NORM)
    for step in range(8 if name == "LBFGS" else 40):  # each step of LBFGS makes differences ten times larger
        bad = step in (0, 5, 6, 20)
        take_step(name, ours, mine, closure_of(ours, mine, step, bad=range(1000) if bad else ()), step)
        if not bad:
            take_step(name, theirs, other, closure_of(theirs, other, step, clip=True), step)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours[0].weight, net(torch.float64)[0].weight)


@pytest.mark.parametrize("bad", [0, 1])
def test_nan_in_either_call_of_the_closure_skips_a_step_of_sam(bad):
    model = net()
    optimizer = sam(model.parameters())
    clipper = initlab.GradClipper(optimizer, MAX_NORM)
    for step in range(3):
        take_step("SAM", model, optimizer, closure_of(model, optimizer, step))
    before = copy.deepcopy(model.state_dict())
    take_step("SAM", model, optimizer, closure_of(model, optimizer, 3, bad=(bad,)))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    take_step("SAM", model, optimizer, closure_of(model, optimizer, 4))
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert (clipper.stats().nonfinite, clipper.stats().first_bad_step) == (1, 4)


# They need a model, another optimizer or more ranks; or do not run like the others.
NOT_IN_THE_SWEEP = {"AdaLOMO", "AdamMini", "DeMo", "DistributedMuon", "GSAM", "LOMO", "MuonClip", "NorMuon", "WSAM"}
NOT_IN_THE_SWEEP |= {
    "AliG",
    "Lookahead",
    "Magma",
    "OrthoGrad",
    "PCGrad",
    "SafeFP16Optimizer",
    "ScheduleFreeWrapper",
    "TRAC",
}
MUONS = {"AdaGO", "AdaMuon", "Muon"}
ARGUMENTS = {"BSAM": {"num_data": 10}, "Ranger21": {"num_iterations": 10}}
ARGUMENTS |= {name: {"base_optimizer": torch.optim.SGD, "lr": 0.01} for name in ("FriendlySAM", "LookSAM", "SAM")}


def changed_by_bad_steps(name):
    """What goes wrong with an optimizer of pytorch_optimizer: in steps with NaN everything stays, in others not."""
    import pytorch_optimizer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    parameters = list(model.parameters())
    groups = [{"params": parameters, "use_muon": True}] if name in MUONS else parameters
    optimizer = getattr(pytorch_optimizer, name)(groups, **ARGUMENTS.get(name, {}))
    if hasattr(optimizer, "train"):
        optimizer.train()
    initlab.GradClipper(optimizer, MAX_NORM)
    takes_closure = name in {"BSAM", "FriendlySAM", "LookSAM", "SAM", "LBFGS"}
    for step, x in enumerate((1.0, torch.nan, 1.0, torch.nan, torch.nan, 1.0)):

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(torch.full((2, 4), x)).pow(4).mean()
            loss.backward(create_graph=True)  # some ask for second derivatives
            return loss

        closure()
        before = contents([optimizer, parameters])
        optimizer.step(closure) if takes_closure else optimizer.step()
        if (contents([optimizer, parameters]) == before) != (x != x):
            return f"step {step}"
    return None


def test_every_optimizer_of_pytorch_optimizer():
    import pytorch_optimizer

    classes = (c for c in vars(pytorch_optimizer).values() if isinstance(c, type))
    names = {c.__name__ for c in classes if issubclass(c, torch.optim.Optimizer)} - NOT_IN_THE_SWEEP
    assert len(names) > 100
    assert {name: wrong for name in sorted(names) if (wrong := changed_by_bad_steps(name)) is not None} == {}
