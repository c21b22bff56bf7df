"""fuse_linear_relu: what is fused, what is left alone and why, and models that do what they did before."""

import collections
import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import initlab
from initlab import LinearReLU, fuse_linear_relu, unfuse

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """Linear layers up and down; each class below says what lies between."""

    def __init__(self, **modules):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.down(self.middle(self.up(x)))

    def middle(self, h):
        return F.relu(h)


class Held(Block):
    """A function that the module holds, as nn.TransformerEncoderLayer does."""

    def __init__(self):
        super().__init__(act=F.relu)

    def middle(self, h):
        return self.act(h)


class Square(Block):
    def middle(self, h):
        return torch.nn.functional.relu(h).square()


class InPlace(Block):
    def forward(self, x):
        h = self.up(x)
        F.relu(h, inplace=True)
        return self.down(h)


class Method(Block):
    def middle(self, h):
        return h.relu()


class Views(Block):
    def forward(self, x):
        h = self.up(x).unsqueeze(0).transpose(-2, -1)
        return self.down(torch.relu(h).mT.squeeze(0))


class Twice(Block):
    """One activation module after two layers."""

    def __init__(self):
        super().__init__(act=nn.ReLU(), again=nn.Linear(6, 6))

    def forward(self, x):
        return self.act(self.again(self.down(self.act(self.up(x)))))


class Loop(nn.Module):
    """DETR's: all layers of a list but the last."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if i < len(self.layers) - 1 else layer(x)
        return x


class Named(nn.Module):
    """Layers by name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"first": nn.Linear(6, 6), "last": nn.Linear(6, 6)})

    def forward(self, x):
        for layer in self.layers.values():
            x = F.relu(layer(x))
        return x


class Numbered(nn.Module):
    """Layers by computed names."""

    def __init__(self):
        super().__init__()
        self.up0, self.up1 = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, *args):
        x = args[0]
        for i in range(2):
            x = F.relu(getattr(self, f"up{i}")(x))
        return x


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Branches(Block):
    """Conditions that only values decide, and arguments that may be missing."""

    def forward(self, x, mask=None, cache=None, scale=1.0):
        if mask is not None:
            x = x * mask
        h = self.up(x)
        h = F.relu(h)
        if h.dtype == torch.float16 and h.isinf().any():
            h = h.clamp(max=1000)
        if cache is not None:
            cache.append(h)
        return self.down(h) * scale


class Primer(nn.Module):
    def forward(self, x):
        return torch.pow(F.relu(x), 2)


class Squaring(Block):
    def __init__(self):
        super().__init__(act=Primer())

    def middle(self, h):
        return self.act(h)


class Wrapped(Block):
    """A method behind a decorator: what calls ReLU is not the class's attribute."""

    @functools.cache  # noqa: B019
    def name(self):
        return "wrapped"

    def forward(self, x):
        return self.down(apply(x, self.up))


def apply(x, layer):
    return F.relu(layer(x))


def sequential():
    named = nn.Sequential(collections.OrderedDict(first=nn.Linear(6, 6), act=nn.ReLU(), last=nn.Linear(6, 4)))
    return nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(inplace=True), named, nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Dropout()
    )


FUSED = {  # model, names of fused layers, whether ReLU runs once more
    "sequential": (sequential, ("0", "4", "2.first"), False),
    "a function": (Block, ("up",), True),
    "a held function": (Held, ("up",), False),
    "a square": (Square, ("up",), True),
    "a module in place": (lambda: Unhooked(act=nn.ReLU(inplace=True)), ("up",), False),
    "a method": (Method, ("up",), True),
    "views": (Views, ("up",), True),
    "one module twice": (Twice, ("up", "again"), False),
    "a loop": (Loop, ("layers.0", "layers.1"), True),
    "a dict": (Named, ("layers.first", "layers.last"), True),
    "computed names": (Numbered, ("up0", "up1"), True),
    "checkpointing": (Checkpointed, ("up",), True),
    "branches": (Branches, ("up",), True),
    "a helper": (Wrapped, ("up",), True),
    "a squaring module": (Squaring, ("up",), True),
}


@pytest.mark.parametrize("case", FUSED)
def test_what_is_fused_does_what_it_did(case):
    make, names, again = FUSED[case]
    torch.manual_seed(0)
    model = make().eval()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    report = fuse_linear_relu(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(report.fused) == set(names)
    assert bool(report.notes) == again
    linears = {name for name, module in before.named_modules() if isinstance(module, nn.Linear)}
    assert {*report.fused, *report.skipped} == linears  # every one is named
    assert 0 < report.share <= 1
    check_equal(model, before)
    check_equal(copy.deepcopy(model), before)
    check_equal(pickle.loads(pickle.dumps(model)), before)
    generator = torch.get_rng_state()
    unfuse(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert {k for m in model.modules() for k in m.__dict__} == {k for m in before.modules() for k in m.__dict__}
    check_equal(model, before)
    unfuse(model)  # nothing is left to do


def check_equal(model, before):
    """Values, gradients, state, and the same compiled and in inference mode."""
    assert list(model.state_dict()) == list(before.state_dict())
    x = torch.randn(3, 6)
    results = []
    for m in (model, before):
        m.zero_grad()
        one = x.clone().requires_grad_()
        y = m(one)
        y.square().sum().backward()
        results.append([y, one.grad, *(p.grad for p in m.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    with torch.inference_mode():
        assert torch.equal(model(x), before(x))
    assert str(inspect.signature(model.forward)) == str(inspect.signature(before.forward))


@pytest.mark.parametrize("case", ["sequential", "a held function", "a module in place", "a squaring module"])
def test_compiled(case):
    torch._dynamo.reset()
    model = FUSED[case][0]().eval()
    before = copy.deepcopy(model)
    fuse_linear_relu(model)
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), before(x))


def test_a_relu_runs_once():
    """Where the report has no note, no second pass is made."""
    for make, _, again in FUSED.values():
        model = make().eval()
        relus = count_relus(model)
        fuse_linear_relu(model)
        assert (count_relus(model) > relus) == again, make


def count_relus(model):
    x = torch.randn(2, 6)
    with torch.autograd.profiler.profile() as profile:  # with gradients, where each ReLU is an operation of torch
        model(x)
    return sum(event.name in ("aten::relu", "aten::relu_") for event in profile.function_events)


class Residual(Block):
    def forward(self, x):
        h = self.up(x)
        return self.down(F.relu(h) + h)


class Returned(Block):
    def forward(self, x):
        h = self.up(x)
        return self.down(F.relu(h)), h


class Kept(Block):
    def forward(self, x):
        self.seen = self.up(x)
        return self.down(F.relu(self.seen))


class Listed(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        h = self.up(x)
        self.seen.append(h)
        return self.down(F.relu(h))


class OnePath(Block):
    def forward(self, x, raw=False):
        h = self.up(x)
        if raw:
            return h
        return self.down(F.relu(h))


class OneMode(Block):
    def forward(self, x):
        h = self.up(x)
        return self.down(F.relu(h) if self.training else F.gelu(h))


class Missing(Block):
    def forward(self, x, mask=None):
        h = self.up(x)
        if mask is None:
            h = h * 2
        return self.down(F.relu(h))


class ByValue(Block):
    def forward(self, x):
        h = self.up(x)
        if x.sum() > 0:
            h = -h
        return self.down(F.relu(h))


class Between(Block):
    def middle(self, h):
        return F.relu(F.dropout(h, training=self.training))


class Elsewhere(Block):
    """A method that forward does not call, and that applies the layer otherwise."""

    def encode(self, x):
        return torch.tanh(self.up(x))


class Unread(Block):
    """Sizes as numbers: torch.fx cannot follow, an example can."""

    def forward(self, x):
        parts = [F.relu(self.up(x[i])) for i in range(len(x))]
        return self.down(torch.stack(parts))


class Sized(Block):
    def forward(self, x):
        h = self.up(x)
        n = int(h.shape[0])
        return self.down(F.relu(h) * n)


class Outer(nn.Module):
    """The owner fuses, but the module around it calls the same layer."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x) + self.block.down(torch.tanh(self.block.up(x)))


class Masked(Block):
    def middle(self, h):
        return torch.where(h > 0, F.relu(h), h)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


class Both(nn.Sequential):
    def forward(self, x):
        return x + self[0](x) + super().forward(x)


class Unhooked(Block):
    def middle(self, h):
        return self.act(h)


class Both2(Block):
    """Two ReLUs of one output: as one tensor they would change each other."""

    def forward(self, x):
        h = self.up(x)
        a = F.relu(h)
        return self.down(a.mul_(2) + F.relu(h))


class Rarely(Block):
    def forward(self, x):
        if isinstance(x, torch.Tensor) and x.dim() == 3:
            return self.down(torch.stack([self.up(part) for part in x]))
        return self.down(F.relu(self.up(x)))


class Many(Block):
    def forward(self, x, raw=False, a=0, b=0, c=0, d=0, e=0, f=0):
        if raw:
            return self.up(x)
        for flag in (a, b, c, d, e, f):
            if flag:
                x = x + 1
        return self.down(F.relu(self.up(x)))


class ByForward(Block):
    def forward(self, x):
        return self.down(F.relu(self.up(x)) + self.up.forward(x))


class Asks(Block):
    def forward(self, x):
        x = F.relu(self.up(x))
        return self.down(x if isinstance(self.up, nn.Linear) else x * 0)


class Aliased(Block):
    def __init__(self):
        super().__init__()
        self.layers = (self.up, self.down)

    def forward(self, x):
        return self.layers[1](F.relu(self.layers[0](x)))


class WithoutGradients(Block):
    def middle(self, h):
        return F.relu(h) if torch.is_grad_enabled() else h


def hooked(register):
    block = Block()
    getattr(block.up, register)(lambda *_: None)
    return block


def with_forward():
    block = Block()
    block.up.forward = lambda x: x
    return block


def replaced(make=Block, **changes):
    block = make()
    for name, change in changes.items():
        setattr(block, name, change(getattr(block, name)))
    return block


LEFT_ALONE = {
    "two ReLUs": (Both2, "more than one ReLU reads its output"),
    "a line that was not reached": (Rarely, "of Rarely.forward calls it and was on no path"),
    "too many paths": (Many, "more than 64 paths lead through it"),
    "its forward": (ByForward, "ByForward.forward uses its"),
    "its class": (Asks, "forward asks which modules are nn.Linear"),
    "an alias": (Aliased, "layers holds it too"),
    "a mode of gradients": (WithoutGradients, "its output goes to a Linear"),
    "in place": (InPlace, "code applies ReLU to it in place"),
    "a residual": (Residual, "its output goes to add"),
    "returned": (Returned, "Returned.forward returns its output"),
    "kept": (Kept, "Kept.forward keeps its output"),
    "kept in a list": (Listed, "Listed.forward keeps its output"),
    "a flag's path": (OnePath, "OnePath.forward returns its output"),
    "a mode's path": (OneMode, "its output goes to gelu"),
    "an argument's path": (Missing, "its output goes to mul"),
    "a value's path": (ByValue, "its output goes to neg"),
    "a dropout between": (Between, "its output goes to dropout"),
    "a mask": (Masked, "its output goes to gt"),
    "another method": (Elsewhere, "Elsewhere.encode may call it, and cannot be followed: it is not called by forward"),
    "a loop over a tensor": (Unread, "Unread.forward cannot be followed: RuntimeError"),
    "a size": (Sized, "Sized.forward cannot be followed: TypeError"),
    "a subclass": (lambda: replaced(up=lambda _: Scaled(6, 10)), "a Scaled is more than an nn.Linear"),
    "another activation": (
        lambda: replaced(lambda: Unhooked(act=Shifted())),
        "its output goes to a Shifted",
    ),
    "parametrised": (lambda: replaced(up=parametrizations.weight_norm), "a ParametrizedLinear is more than"),
    "pruned": (lambda: replaced(up=lambda m: prune.identity(m, "weight")), "it has hooks (torch.nn.utils.prune."),
    "a forward": (with_forward, "it has attributes of its own that a LinearReLU cannot take over: forward"),
    "lazy": (lambda: replaced(up=lambda _: nn.LazyLinear(10)), "a LazyLinear is more than an nn.Linear"),
    "complex": (
        lambda: replaced(up=lambda _: nn.Linear(6, 10, dtype=torch.complex64)),
        "its weight is torch.complex64",
    ),
    "compiled": (lambda: torch.compile(Block(), backend="eager"), "it is compiled; fuse before torch.compile"),
} | {
    name: (functools.partial(hooked, name), "it has hooks (test_swapping.hooked.")
    for name in (
        *("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"),
        *("register_full_backward_pre_hook", "register_state_dict_post_hook", "register_load_state_dict_pre_hook"),
    )
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_left_alone(case):
    make, why = LEFT_ALONE[case]
    model = make()
    name = "_orig_mod.up" if case == "compiled" else "up"
    modules = list(model.modules())
    dicts = [dict(m.__dict__) for m in modules]
    report = fuse_linear_relu(model)
    assert name not in report.fused
    assert why in report.skipped[name].replace("tests.fusing.", "")
    assert f"  {name}: left alone, {report.skipped[name]}" in str(report).splitlines()
    if not report.fused:
        assert list(model.modules()) == modules
        assert [dict(m.__dict__) for m in modules] == dicts  # reading leaves no trace


def test_a_container_inside():
    class VGG(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x):
            return self.classifier(torch.flatten(x, 1))

    assert fuse_linear_relu(VGG()).fused == ("classifier.0",)


def test_a_caller_around_the_owner():
    report = fuse_linear_relu(Outer())
    assert report.skipped["block.up"] == "its output goes to tanh"


def test_a_container_that_does_more():
    report = fuse_linear_relu(Both(nn.Linear(4, 4), nn.ReLU()))
    assert report.skipped["0"].startswith("its output goes to add")


def test_a_list_of_layers_is_read_where_it_is_called():
    class Body(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.net, self.keep = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), keep

        def forward(self, x):
            seen = []
            for layer in self.net:
                x = layer(x)
                if self.keep:
                    seen.append(x)
            return seen or x

    assert fuse_linear_relu(Body(False)).fused == ("net.0",)
    assert fuse_linear_relu(Body(True)).skipped["net.0"] == "Body.forward returns its output"


@pytest.mark.parametrize("make", [Unread, Sized])
def test_an_example_shows_what_cannot_be_read(make):
    model = make()
    before = copy.deepcopy(model)
    x = torch.randn(3, 6)
    report = fuse_linear_relu(model, x)
    assert report.fused == ("up",)
    assert report.share == pytest.approx(0.5)
    assert torch.equal(model(x), before(x))
    unfuse(model)
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize("make", [Residual, Returned, Kept, OnePath, ByValue])
def test_an_example_does_not_overrule_what_was_read(make):
    model = make()
    assert fuse_linear_relu(model, -torch.ones(3, 6)).fused == ()


class Counting(Unread):
    """Changes itself as it runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.history, self.drop = [], nn.Dropout()

    def forward(self, x):
        self.calls += 1
        self.history.append(x)
        self.last = x
        return self.drop(super().forward(x))


def test_a_run_on_an_example_leaves_no_trace():
    model = Counting()
    state = torch.get_rng_state()
    assert fuse_linear_relu(model, torch.randn(3, 6)).fused == ("up",)
    torch.set_rng_state(state)
    assert int(model.calls) == 0
    assert model.history == []
    assert not hasattr(model, "last")
    for x in ((torch.randn(3, 6),), {"x": torch.randn(3, 6)}):
        model = Counting()
        assert fuse_linear_relu(model, x).fused == ("up",)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fuse_linear_relu(model := Counting(), torch.randn(3, 5))
    assert type(model.up) is nn.Linear


def test_what_runs_otherwise_than_it_was_read_is_still_right():
    """A stand-in that meets something else than a fused layer's output applies the activation."""
    model = sequential().eval()
    fuse_linear_relu(model)
    x = -torch.rand(3, 6)
    assert torch.equal(model[1](x), torch.zeros(3, 6))
    model[0] = nn.Linear(6, 6)
    assert (model[:2](torch.randn(9, 6)) >= 0).all()
    block = Held()
    fuse_linear_relu(block)
    assert torch.equal(block.act(x), torch.zeros(3, 6))
    y = block.up(torch.randn(3, 6))
    assert block.act(y) is y
    y -= 1.0
    assert torch.equal(block.act(y), y.relu())


def test_what_happens_to_an_output_later():
    """Marks hold for one ReLU and one version, in every mode."""

    class Twofold(Block):
        def __init__(self):
            super().__init__(act=nn.ReLU())

        def forward(self, x):
            h = self.act(self.up(x))
            h -= 1
            return self.down(self.act(h))

    model = Twofold()
    before = copy.deepcopy(model)
    assert fuse_linear_relu(model).fused == ("up",)
    x = torch.randn(3, 6)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(model(x), before(x))
    assert torch.equal(torch.func.vmap(model)(x), torch.func.vmap(before)(x))
    model.up.register_full_backward_hook(lambda *_: None)
    model.up.register_forward_hook(lambda module, args, output: output.clone())
    assert torch.equal(model(x), before(x))
    square = Squaring()
    before = copy.deepcopy(square)
    assert fuse_linear_relu(square).fused == ("up",)
    square.up.register_full_backward_hook(lambda *_: None)
    assert torch.equal(square(x), before(x))
    assert torch.equal(square.act(x), before.act(x))


def test_blocks_that_differ_are_read_apart():
    class Optional(Block):
        def __init__(self, **options):
            super().__init__()
            self.options = options

        def middle(self, h):
            return F.relu(h) if self.options["relu"] else h

    assert fuse_linear_relu(nn.Sequential(Optional(relu=True), Optional(relu=False))).fused == ("0.up",)


def test_parameters_are_the_same_objects_and_an_optimizer_goes_on():
    torch.manual_seed(0)
    models = [sequential().eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    parameters = list(models[0].parameters())
    x = torch.randn(3, 6)
    for step in range(4):
        if step == 1:
            fuse_linear_relu(models[0])
        if step == 3:
            unfuse(models[0])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert all(ours is theirs for ours, theirs in zip(models[0].parameters(), parameters, strict=True))
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


def test_unfuse_keeps_what_has_happened_since():
    model = sequential().eval()
    model[0].label = "first"
    fuse_linear_relu(model)
    assert model[0].label == "first"
    model.train().double()
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()}, assign=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    model = torch.load(file, weights_only=False)
    unfuse(model)
    assert type(model[0]) is nn.Linear
    assert model[0].label == "first"
    assert (model[0].weight == 1).all()
    assert model[0].training
    assert model[1].training


def test_unfuse_refuses_before_it_changes_anything():
    model = sequential()
    fuse_linear_relu(model)
    handle = model[4].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"4 has got hooks since it was fused .*; remove them first"):
        unfuse(model)
    handle.remove()
    assert isinstance(model[0], LinearReLU)
    unfuse(model)
    for function in (fuse_linear_relu, unfuse):
        with pytest.raises(TypeError, match="got a Tensor; it needs"):
            function(torch.ones(1))


def test_a_shared_layer_is_fused_in_all_its_places():
    layer, act = nn.Linear(4, 4), nn.ReLU()
    model = nn.Sequential(layer, act, layer, act, nn.Linear(4, 4), nn.Tanh(), act)
    before = copy.deepcopy(model)
    assert fuse_linear_relu(model).fused == ("0",)
    assert model[0] is model[2]
    x = torch.randn(3, 4)
    assert torch.equal(model(x), before(x))
    unfuse(model)
    assert model[0] is model[2]
    assert type(model[1]) is nn.ReLU
    assert model[1] is model[3]
    once = nn.Sequential(layer, act, layer)
    assert fuse_linear_relu(once).skipped["0"] == "Sequential.forward returns its output"


def test_a_relu_with_hooks_stays_and_so_does_its_layer():
    model = sequential()
    model[1].register_forward_pre_hook(lambda module, args: (-args[0],))
    assert fuse_linear_relu(model).skipped["0"].startswith("its ReLU has hooks (")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_transformers(kind, training):
    torch.manual_seed(0)
    layer = (nn.TransformerEncoderLayer if kind == "encoder" else nn.TransformerDecoderLayer)(
        8, 2, 16, 0.0, batch_first=True
    )
    model = (nn.TransformerEncoder if kind == "encoder" else nn.TransformerDecoder)(layer, 2).train(training)
    before = copy.deepcopy(model)
    report = fuse_linear_relu(model)
    assert report.fused == ("layers.0.linear1", "layers.1.linear1")
    x = torch.randn(2, 5, 8)
    arguments = (x,) if kind == "encoder" else (x, torch.randn(2, 3, 8))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(*arguments), before(*arguments))
    unfuse(model)
    assert model.layers[0].activation is F.relu


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", ["sequential", "a function", "a held function", "a loop", "branches"])
def test_watch_names_the_fused_layer(case, bad):
    """Also a -inf that ReLU hides."""
    model = FUSED[case][0]().eval()
    name = fuse_linear_relu(model).fused[0]
    with torch.no_grad():
        model.get_submodule(name).bias[0] = bad
    with initlab.watch(model) as watching:
        model(torch.randn(3, 6))
    fault = watching.report().fault
    assert (fault.module, fault.cause) == (name, "parameter")


class Chosen(nn.Module):
    """A module that begins with ReLU, or does not: that is for an attribute to say."""

    def __init__(self, activate):
        super().__init__()
        self.activate = activate

    def forward(self, x):
        return (torch.relu(x) if self.activate else x) * 2


class ReluThenSquare(nn.Module):
    def forward(self, x):
        return torch.relu(x).square()


def test_a_mark_that_no_forward_reads_is_no_state():
    """transformers sets _is_hf_initialized on every module of a model, activations too."""
    model = nn.Sequential(nn.Linear(8, 16), ReluThenSquare(), nn.Linear(16, 16), Chosen(False))
    for module in model.modules():
        module._is_hf_initialized = True
    x = torch.randn(4, 8)
    expected = model(x)
    report = initlab.fuse_linear_relu(model)
    assert isinstance(model[0], initlab.LinearReLU), report
    assert not isinstance(model[2], initlab.LinearReLU), report
    assert torch.equal(model(x), expected)
