"""Which operation breaks a training step, where, why, and what to write instead: the cases of broken_operations.py."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from initlab import diagnose, supervised
from initlab.diagnosis import fixes, names, safe_forms
from initlab.diagnosis.reasons import Operation, reason
from initlab.diagnosis.safe_forms import Substitution

sys.path.insert(0, str(Path(__file__).resolve().parent))
from broken_operations import CASES, is_right

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")  # one case is made with the old one

ONE_OF_EACH = (
    *("G softmax, where", "G log, where", "H Root", "I sum + eps", "I overflow of a product", "I eps of Adam"),
    *("J pos_weight", "J cosine", "K log of a negative number", "K sqrt at 0", "K ctc", "K cholesky", "K temperature"),
    *("K an index beyond the embedding", "K labels of 255", "K eps=0 of Adam", "K weight_norm of zeros"),
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ONE_OF_EACH else pytest.mark.long) for n in CASES])
def test_the_operation_is_named_with_its_reason(name):
    one = CASES[name]
    (cause, *_) = diagnose(*one.make(), **one.options).causes
    assert is_right(one, cause) == ""
    assert cause.severity == "broken" or name == "K kl_div without logarithms"  # whose loss stays finite, and falls
    assert not cause.tried or not cause.remedy.startswith("#")


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("F ")])
@pytest.mark.long
def test_no_clipping_where_the_forward_pass_overflows(name):
    one = CASES[name]
    causes = diagnose(*one.make(), **one.options).causes
    assert not any("GradClipper" in cause.remedy for cause in causes)


FINITE = [name for name in CASES if name[0] in "GJK" and CASES[name].make is not None]


@pytest.mark.long
@pytest.mark.parametrize("name", FINITE)
def test_what_is_printed_fits_what_was_seen(name):
    one = CASES[name]
    (cause, *_) = diagnose(*one.make(), **one.options).causes
    if "of finite ones" in cause.explanation:
        ranges = [value for key, value in cause.evidence.items() if key.startswith("input ")]
        assert not any(word in value for value in ranges for word in ("nan", "inf"))


# Safe forms, in place of the operation

SUBSTITUTED = {
    "G log, where": "log",
    "G sqrt, where": "sqrt",
    "G power, where": "pow",
    "G asin, nan_to_num": "asin",
    "G softmax, where": "softmax",
    "K log of 0": "log",
    "K sqrt at 0": "sqrt",
    "K power at 0": "pow",
    "K acos at 1": "acos",
    "K logit at 0": "logit",
    "K exp": "exp",
    "K cosh": "cosh",
    "K norm of a row of zeros": "div",
    "J masked sum": "div",
    "J spread of rewards": "div",
    "J cosine": "div",
    "K svd of equal values": "linalg_svd",
    "K ctc": "ctc_loss",
    "K layer_norm, eps=0": "layer_norm",
}


@pytest.mark.parametrize("name", SUBSTITUTED)
def test_a_safe_form_makes_loss_and_gradients_finite(name):
    one = CASES[name]
    found = []
    original = fixes.advice

    def listen(form, op, module):
        found.append((form, op, module))
        return original(form, op, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixes, "advice", listen)
        diagnose(*one.make(), **one.options)
    form, op, module = found[0]
    assert op == SUBSTITUTED[name]
    model, batch, loss_fn, _ = one.make()
    with Substitution(model, module, op, form) as substitution:
        loss = loss_fn(model, batch)
    loss.backward()
    assert substitution.count == 1
    assert math.isfinite(float(loss))
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


EMULATED = ("G softmax, where", "G log, where", "G power, where", "K sqrt at 0", "K log of 0")


@pytest.mark.parametrize("name", EMULATED)
def test_what_a_safe_form_would_do_is_emulated_and_never_called_tried(name):
    one = CASES[name]
    model, batch, loss_fn, optimizer = one.make()
    before = [p.detach().clone() for p in model.parameters()]
    (cause, *_) = found = diagnose(model, batch, loss_fn, optimizer, **one.options).causes
    assert not cause.tried
    assert cause.remedy.startswith("#")
    assert len(cause.emulated) > 2
    assert all(map(math.isfinite, cause.emulated))
    assert cause.emulated[-1] < cause.emulated[0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert found[0].to_dict()["emulated"]


def test_nothing_is_emulated_where_no_form_is_safe():
    (cause, *_) = diagnose(*CASES["K log of a negative number"].make()).causes
    assert cause.emulated == ()
    assert not cause.tried


def test_a_safe_form_leaves_other_modules_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Softmax(1), nn.Softmax(1))
    form = safe_forms.masked_softmax("softmax", 1)
    with Substitution(model, "1", "softmax", form) as substitution:
        out = model(torch.ones(2, 2))
    assert substitution.count == 1
    assert torch.equal(out, model(torch.ones(2, 2)))


# Reasons are right where they are given, and given where they are right


class Recorded(TorchDispatchMode):
    """What torch's dispatcher runs."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = names.plain(func.overloadpacket.__name__)
        self.operations.append(Operation(name, args, kwargs or {}, overload=func._overloadname))
        return func(*args, **(kwargs or {}))


ELEMENTWISE = (
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "acos",
    "asin",
    "atanh",
    "acosh",
    "logit",
)


@pytest.mark.parametrize("op", [*ELEMENTWISE, "exp", "exp2", "cosh", "sinh", "lgamma"])
def test_a_reason_is_given_where_a_value_is_not_finite_and_nowhere_else(op):
    values = [-200.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 60.0, 200.0]
    for value in values:
        x = torch.tensor([value, 0.75 if op != "acosh" else 2.0])
        with Recorded() as recorded:
            out = getattr(torch, op)(x)
        (operation,) = [one for one in recorded.operations if one.name == op]
        assert (reason(operation) is None) == bool(out.isfinite().all()), value


@pytest.mark.parametrize("op", ["log", "sqrt", "acos", "asin", "atanh"])
def test_a_reason_is_given_where_a_slope_is_not_finite(op):
    for value in (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0):
        x = torch.tensor([value], requires_grad=True)
        with Recorded() as recorded:
            out = getattr(torch, op)(x)
        out.backward(torch.ones(1))
        (operation,) = [one for one in recorded.operations if one.name == op]
        bad = not bool(out.isfinite().all() and x.grad.isfinite().all())
        assert (reason(operation, backward=True) is not None) == bad, value


def test_the_line_of_the_users_code_is_named():
    one = CASES["K log of a negative number"]
    (cause, *_) = diagnose(*one.make()).causes
    assert cause.evidence["line"].startswith("broken_operations.py:")
    assert "x.log()" in cause.evidence["line"]


def test_constants_that_float32_holds_are_no_overflow():
    one = CASES["I log + eps"]
    (cause, *_) = diagnose(*one.make()).causes
    assert "overflow" not in cause.explanation
    one = CASES["I overflow of a product"]
    (cause, *_) = diagnose(*one.make()).causes
    assert cause.evidence["in float32"] == 90000


# Q. Samples


def test_a_sample_falls_on_no_column():
    from initlab.diagnosis.stats import sample

    image = torch.zeros(64, 16, 32, 32)
    image[..., 2:] = 1
    assert float(sample(image).mean()) == pytest.approx(30 / 32, abs=0.02)
    steps = torch.zeros(1 << 10, 50, 4)
    steps[:, ::2] = 1
    assert float(sample(steps).mean()) == pytest.approx(0.5, abs=0.02)


def test_one_quiet_column_does_not_hide_a_loud_batch():
    torch.manual_seed(0)
    pixels = torch.rand(64, 20) * 255
    pixels[:, 0] = torch.rand(64)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    found = diagnose(model, (pixels, torch.randint(0, 3, (64,))), supervised(nn.CrossEntropyLoss()))
    assert found.causes[0].kind == "input"


class Writes(nn.Module):
    """Changes in place what an operation before it keeps, in one of several ways; or where nothing is kept."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.how = nn.Linear(8, 16), nn.Linear(16, 1), how
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.how == "harmless":
            return self.b((h + 1).mul_(2).add_(1))
        if self.how == "act":
            self.act(h)
        elif self.how == "__setitem__":
            h[:, 0] = 0
        elif self.how == "mul_":
            h *= 2
        else:
            getattr(h, self.how)(0.5)
        return self.b(h)


@pytest.mark.parametrize("how", ["mul_", "add_", "__setitem__", "fill_", "act", "harmless"])
def test_a_tensor_written_over_that_a_gradient_needs(how):
    model, x = Writes(how), torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    found = diagnose(model, (x, x[:, :1]), supervised(nn.MSELoss()), torch.optim.Adam(model.parameters(), 1e-2))
    if how == "harmless":
        assert found.verdict == "healthy", found
        return
    cause = found.causes[0]
    assert (cause.kind, cause.place.op) == ("operation", "relu" if how == "act" else how), found
    assert cause.place.module == ("act" if how == "act" else "")
    assert "changes a tensor in place" in cause.explanation
    assert cause.tried is (how == "act"), found
    if how != "act":
        assert cause.evidence["line"].startswith("test_operations.py:")
        assert cause.remedy.startswith("# make a new tensor")


def test_the_logarithm_of_a_factorial():
    """lgamma(y) for lgamma(y + 1): the counts are right, so that none of them is changed."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = torch.poisson(torch.exp(0.5 * x[:, 0]))
    model = nn.Linear(4, 1)

    def loss_fn(model, batch):
        rate = model(batch[0])[:, 0]
        return (rate.exp() - batch[1] * rate + torch.lgamma(batch[1])).mean()

    cause = diagnose(model, (x, y), loss_fn, torch.optim.Adam(model.parameters(), 1e-2)).causes[0]
    assert (cause.kind, cause.place.op, cause.tried) == ("operation", "lgamma", False)
    assert cause.emulated[-1] < cause.emulated[0]
    assert cause.remedy == "# in the loss function: torch.lgamma(y + 1)"
