"""Remedies: code to paste, with model, batch, loss_fn, optimizer, torch and initlab in scope.

Where several may fit, the best is first; `diagnose` tries them on the user's own batch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.activations import ACTIVATIONS
from ..models.initialization import plan_model
from .batch import Leaf
from .cuts import COMPARED, Cut
from .evidence import Evidence, ParameterStats, half
from .flow import ParameterCall
from .narrow import LostConstant
from .safe_forms import DEFAULT, SafeForm, small
from .trace import Call


def _rows(leaf: Leaf) -> str:
    """The dimensions that a feature's statistics run over, as code: all but the last, or all of an image's."""
    dims = leaf.tensor.dim()
    return "()" if dims > 3 else "0" if dims <= 2 else str(tuple(range(dims - 1)))


def standardise(leaf: Leaf, batch: Any) -> str:
    """Mean 0 and standard deviation 1 for each feature."""
    rows = _rows(leaf)
    return "\n".join(
        [
            f"x = {leaf.value}  # for the whole data set: sklearn.preprocessing.StandardScaler",
            f"spread = x.std({rows}, correction=0, keepdim=True)",
            leaf.rebind(batch, f"(x - x.mean({rows}, keepdim=True)) / torch.where(spread > 0, spread, 1.0)"),
        ]
    )


def standardise_targets(leaf: Leaf, batch: Any) -> str:
    """Mean 0 and standard deviation 1 for each column of a target."""
    rows = "0" if leaf.tensor.dim() == 2 else "()"
    return "\n".join(
        [
            f"y = {leaf.code}  # keep mean and spread of the whole training set: prediction * spread + mean",
            f"spread = y.std({rows}, correction=0, keepdim=True)",
            leaf.rebind(batch, f"(y - y.mean({rows}, keepdim=True)) / torch.where(spread > 0, spread, 1.0)"),
        ]
    )


def fresh_matrices(parameters: Sequence[ParameterStats], among_others: bool) -> list[str]:
    """Xavier's distribution for matrices that are zero: for every other of them, where they are factors of updates."""
    every = "\n".join(
        [
            "for p in model.parameters():",
            "    if p.requires_grad and p.dim() > 1 and not p.any():",
            "        initlab.init.xavier_normal_(p)",
        ]
    )
    if not among_others:
        return [every]
    first = "\n".join(f"initlab.init.xavier_normal_(model.get_parameter({one.name!r}))" for one in parameters[::2])
    return [first, every]


def impute(leaf: Leaf, batch: Any) -> str:
    """The mean of what is known for what is not, then mean 0 and standard deviation 1."""
    rows = _rows(leaf)
    return "\n".join(
        [
            f"x = {leaf.value}  # for the whole data set: sklearn.impute.SimpleImputer, StandardScaler; or drop rows",
            "known = x.isfinite()",
            f"count = known.sum({rows}, keepdim=True).clamp_min(1)",
            f"mean = torch.where(known, x, 0.0).sum({rows}, keepdim=True) / count",
            "x = torch.where(known, x, mean)",
            f"spread = x.std({rows}, correction=0, keepdim=True)",
            leaf.rebind(batch, "(x - mean) / torch.where(spread > 0, spread, 1.0)"),
        ]
    )


def drop_rows(leaf: Leaf, batch: Any) -> str:
    """The batch without the rows whose target is not finite."""
    keep = f"keep = {leaf.value}.isfinite().reshape(len({leaf.code}), -1).all(1)  # rows with a target"
    rows = len(leaf.tensor)
    if isinstance(batch, dict):
        fits = "v[keep] if isinstance(v, torch.Tensor) and len(v) == len(keep) else v"
        return f"{keep}\nbatch = {{k: {fits} for k, v in batch.items()}}"
    if type(batch) in (tuple, list) and all(hasattr(t, "shape") and len(t) == rows for t in batch):
        return f"{keep}\nbatch = tuple(t[keep] for t in batch)"
    return ""


def shift_classes(leaf: Leaf, batch: Any, facts: dict[str, Any]) -> str:
    """Classes from 0, or the loss function's own mark on those that are to be ignored."""
    smallest, largest, classes = facts["smallest"], facts["largest"], facts["classes"]
    mark = facts["outside"][0] if len(facts["outside"]) == 1 else 0
    if mark > max(99, classes) or (mark < 0 and largest - smallest >= classes):
        ignored = f"{leaf.value}.masked_fill({leaf.value} == {mark}, -100)"
        return leaf.rebind(batch, ignored) + f"  # or give the loss ignore_index={mark}"
    if largest - smallest >= classes:
        return f"# {leaf.code} has classes up to {largest}; the model needs {largest + 1} outputs, not {classes}"
    return leaf.rebind(batch, f"{leaf.value} - {smallest}")


def into_unit_range(leaf: Leaf, batch: Any, low: float, high: float) -> str:
    """Targets between 0 and 1."""
    return leaf.rebind(batch, f"(({leaf.value} - {low:g}) / {high - low:g}).clamp(0, 1)")  # {:g} rounds


def reshape(leaf: Leaf | None, batch: Any, shape: tuple[int, ...]) -> list[str]:
    """A target of the prediction's shape."""
    sizes = ", ".join(map(str, (-1, *shape[1:])))
    advice = "# in the loss function: target.reshape(prediction.shape)"
    return [*([leaf.rebind(batch, f"{leaf.value}.reshape({sizes})")] if leaf is not None else []), advice]


def without_rows(leaves: Sequence[Leaf], batch: Any, rows: Sequence[int]) -> list[str]:
    """The batch without some rows; nothing where its tensors are not of equally many."""
    held = [leaf for leaf in leaves if leaf.tensor.dim()]
    counts = {len(leaf.tensor) for leaf in held}
    if len(counts) != 1 or len(rows) >= (count := counts.pop()) or max(rows) >= count:
        return []
    bad = ", ".join(map(str, rows)) + ("," if len(rows) == 1 else "")
    keep = f"rows = [row for row in range({count}) if row not in ({bad})]"
    return ["\n".join([keep, *(leaf.rebind(batch, f"{leaf.value}[rows]") for leaf in held)])]


def positive_outputs() -> str:
    """A model whose outputs are above 0; its parameters are the same ones."""
    return "model = torch.nn.Sequential(model, torch.nn.Softplus())"


def short_embeddings() -> str:
    """Embeddings of length 1, whose products are below 1."""
    return (
        "for module in model.modules():\n"
        "    if isinstance(module, torch.nn.Embedding):\n"
        "        torch.nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)"
    )


def positive(leaf: Leaf, batch: Any) -> str:
    """Targets whose logarithm exists."""
    return leaf.rebind(batch, f"{leaf.value}.clamp_min(1e-6)") + "  # or predict log1p of the target"


def restart(evidence: Evidence) -> list[str]:
    """Fresh weights by the distribution that each layer's activation wants."""
    own = [call for call in evidence.layers if isinstance(call, ParameterCall)]
    if own:
        return [_anew(evidence, own), *([all_modules] if (all_modules := _modules_anew(evidence)) else [])]
    distributions = {call.path: _distribution(call) for call in evidence.layers}
    whole = [f"initlab.init_model_(model, seed=0, recipe={_mapping(distributions)})"] if distributions else []
    whole += [f'initlab.init_model_(model, seed=0, recipe="{name}")' for name in ("auto", "torch", "own")]
    usable = [code for code in whole if _plans(evidence.model, code)]
    return usable or [fresh(evidence, [h for h in evidence.parameters if h.ref.tensor.dim() > 1])]


def _anew(evidence: Evidence, calls: Sequence[ParameterCall]) -> str:
    """Fresh values for parameters that a model multiplies with by itself, and for the modules beside them."""
    groups: dict[str, list[str]] = {}
    for call in calls:
        groups.setdefault(_filler(call, evidence.model.get_parameter(call.path)), []).append(call.path)
    lines = [code] if (code := _modules_anew(evidence)) else []
    for filler, names in groups.items():
        if len(names) > 1:
            lines += [f"for name in {_names(names)}:", f"    {filler.format('model.get_parameter(name)')}"]
        else:
            lines.append(filler.format(f"model.get_parameter({names[0]!r})"))
    return "\n".join(lines)


def _filler(call: ParameterCall, weight: Tensor) -> str:
    """The call that fills a weight by the distribution that its activation wants."""
    if weight.dim() == 2 and call.fan_in in weight.shape and _distribution(call) == "he":
        mode = "" if weight.shape[1] == call.fan_in else ', mode="fan_out"'  # (in, out), the other way round
        return f'initlab.init.kaiming_normal_({{}}{mode}, nonlinearity="relu")'
    if weight.dim() == 2 and not call.activation:
        return "initlab.init.xavier_normal_({})"
    wanted = call.wanted
    return f"initlab.init.normal_({{}}, std={wanted:.2g})" if wanted else "initlab.init.xavier_normal_({})"


def _names(names: Sequence[str]) -> str:
    """A list of names, as code: short where they are numbered."""
    stem, _, first = names[0].rpartition(".")
    if first.isdigit() and list(names) == [f"{stem}.{int(first) + i}" for i in range(len(names))]:
        start = f"{first}, " if first != "0" else ""
        return f'[f"{stem}.{{i}}" for i in range({start}{int(first) + len(names)})]'
    return repr(list(names))


def _modules_anew(evidence: Evidence) -> str:
    """Fresh weights for the layers that are modules; "" where there are none."""
    paths = {call.path for call in evidence.layers if not isinstance(call, ParameterCall)}
    names = [one.name for one in evidence.parameters if one.ref.module_name in paths and one.ref.tensor.dim() > 1]
    code = f'initlab.init_model_(model, seed=0, recipe="auto", only={names!r})'
    return code if names and _plans(evidence.model, code) else ""


def _distribution(call: Call) -> str:
    return ACTIVATIONS[call.activation].recipe if call.activation else "xavier"


def _mapping(distributions: dict[str, str]) -> str:
    kinds = list(dict.fromkeys(distributions.values()))  # a set's order, and so the printed code, would vary
    if len(kinds) == 1:
        return repr(kinds[0])
    common = max(kinds, key=list(distributions.values()).count)
    special = {path: distribution for path, distribution in distributions.items() if distribution != common}
    return repr({**special, "*": common})


def _plans(model: nn.Module, code: str) -> bool:
    """Whether init_model_ has a distribution for every parameter that a call of it would fill."""
    try:
        eval(code.replace("initlab.init_model_(", "plan("), {"plan": plan_model, "model": model})
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _has_distribution(model: nn.Module, parameter: ParameterStats) -> bool:
    """Whether init_model_ fills a parameter or buffer: buffers without a distribution are left as they are."""
    try:
        plan = plan_model(model, recipe="torch", only=lambda name, tensor: tensor is parameter.ref.tensor)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return bool(plan.rows)


def fresh(evidence: Evidence, parameters: Sequence[ParameterStats], buffer: str = "zero_()") -> str:
    """New values for some parameters and buffers only: by their layers' distributions, where there are any."""
    model = evidence.model
    lines, redrawn = [], []
    for one in parameters:
        if _has_distribution(model, one):
            redrawn.append(one.name)
            continue
        getter = f"model.get_{'parameter' if one.ref.is_parameter else 'buffer'}({one.name!r})"
        if one.ref.is_parameter and one.ref.tensor.dim() > 1:
            lines.append(f"initlab.init.xavier_uniform_({getter})")
        elif one.ref.is_parameter:
            lines.append(f"initlab.init.zeros_({getter})")
        else:
            lines.append(f"{getter}.{buffer}")
    if redrawn:
        only = redrawn if redrawn[1:] else redrawn[0]
        lines.insert(0, f'initlab.init_model_(model, seed=0, recipe="torch", only={only!r})')
    return "\n".join(lines)


def quieter_head(evidence: Evidence, head: ParameterStats) -> list[str]:
    """Small weights for a head: GPT-2's for an embedding that is one too, else its layer's own distribution."""
    tied = isinstance(head.ref.module, nn.Embedding)
    small = f'initlab.init_model_(model, seed=0, recipe="gpt2", only={head.name!r})'
    std = f"initlab.init.normal_(model.get_parameter({head.name!r}), std={head.ref.tensor.shape[-1] ** -0.5:.2g})"
    return [small if tied and _has_distribution(evidence.model, head) else fresh(evidence, [head]), std]


def drop_state(parameters: Sequence[ParameterStats]) -> str:
    """The optimizer without the state that is not right."""
    return "\n".join(f"optimizer.state.pop(model.get_parameter({one.name!r}))" for one in parameters)


def advice(form: SafeForm | None, op: str, module: str | None) -> list[str]:
    """The safe form of an operation, as a comment for the user's own code."""
    code = form.code if form is not None else DEFAULT.get(op, "")
    return [f"# in {code_of(module)}: {code}"] if code else []


def larger_constant(lost: LostConstant, module: str | None) -> str:
    """A constant that a 16-bit dtype can hold, in place of one that is 0 there."""
    return (
        f"# in {code_of(module)}: {small(lost.dtype):g} in place of {lost.value:g}, or that part in float32: x.float()"
    )


def passing_on(cut: Cut) -> str:
    """What passes a gradient on, in place of a function that does not."""
    instead = "take out torch.no_grad()" if cut.no_grad else f"take out {cut.op}"
    if cut.op in COMPARED:
        instead = "the number itself, or sigmoid((x - threshold) / width), in place of a comparison, which is 0 or 1"
    return f"# in {code_of(cut.module)}: {_INSTEAD.get(cut.op, instead)}"


_INSTEAD = {
    "sample": "rsample() in place of sample(), which no gradient passes",
    "argmax": "softmax, or torch.nn.functional.gumbel_softmax(x, hard=True), in place of argmax",
    "item": "the tensor itself in place of .item()",
    "tolist": "the tensor itself in place of .tolist()",
    "numpy": "the tensor itself in place of .numpy()",
    "tensor": "the tensor itself: torch.tensor(x) makes a copy without a gradient",
    "multinomial": "torch.nn.functional.gumbel_softmax(x, hard=True), or the log-probability of what is drawn",
    "bernoulli": "x + (torch.bernoulli(x) - x).detach(), or the log-probability of what is drawn",
}


def code_of(module: str | None) -> str:
    """The user's own code that runs in a module, or outside the model."""
    return "the loss function" if module is None else f"forward() of {module!r}" if module else "the model's forward()"


def casts(evidence: Evidence, error: str) -> tuple[Leaf | None, list[str]]:
    """Other dtypes for the batch, where an error complains of them: the tensor to blame, and code."""
    if not any(words in error for words in ("dtype", "scalar type", "should be the same", "not implemented for")):
        return None, []

    def cast(leaves: list[Leaf], method: str) -> str:
        return "\n".join(leaf.rebind(evidence.batch, f"{leaf.value}.{method}()") for leaf in leaves)

    inputs = [leaf for leaf in evidence.leaves if not leaf.is_target]
    wide = [leaf for leaf in evidence.leaves if leaf.tensor.dtype == torch.float64]
    whole = [leaf for leaf in inputs if not leaf.tensor.is_floating_point() and not leaf.tensor.is_complex()]
    real = [leaf for leaf in evidence.leaves if leaf.is_target and leaf.tensor.is_floating_point()]
    if "Long" in error and "target" in error:
        return (real[0], [cast(real, "long")]) if real else (None, [])
    for found in (wide, whole):
        if found:
            return found[0], [cast(found, "float")]
    return None, []


def width(model: nn.Module, path: str, error: str) -> str:
    """The width that a layer needs, as a comment, from torch's error."""
    layer = model.get_submodule(path)
    got = re.search(r"\(\d+x(\d+) and ", error)
    if not isinstance(layer, nn.Linear) or got is None:
        return "# make the layer's width that of its input"
    right = f"torch.nn.Linear({got[1]}, {layer.out_features})"
    return f"# {path!r} gets {got[1]} features and takes {layer.in_features}: {right}"


def drop_batch_statistics(path: str) -> str:
    """Batch normalisation by its running statistics, where a batch has none."""
    return f"model.get_submodule({path!r}).eval()  # or batches of more than one: DataLoader(..., drop_last=True)"


def smaller_rate(factor: float, optimizer: Any) -> str:
    """A learning rate by a factor smaller."""
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    assign = f'group["lr"] = {max(rates) * factor:.1g}' if len(rates) == 1 else f'group["lr"] *= {factor:.1g}'
    return f"for group in optimizer.param_groups:\n    {assign}"


def usual_rates(optimizer: Any) -> list[str]:
    """Rates to begin with: what an optimizer was made with by default, and less."""
    adaptive = any("betas" in group or "eps" in group for group in optimizer.param_groups)
    rates: tuple[float, ...] = (1e-3, 1e-4) if adaptive else (1e-2, 1e-3)
    own = inspect.signature(type(optimizer)).parameters.get("lr")
    if own is not None and isinstance(own.default, float) and own.default > 10 * rates[0]:
        rates = (own.default, *rates)  # Adadelta's is 1
    return [f'for group in optimizer.param_groups:\n    group["lr"] = {x}' for x in rates]


def planned_rate() -> str:
    """The rate that an optimizer had before a schedule changed it."""
    return 'for group in optimizer.param_groups:\n    group["lr"] = group["initial_lr"]'


def minimise() -> str:
    """An optimizer that goes down."""
    return set_in_groups("maximize", False)


def set_in_groups(name: str, value: Any) -> str:
    """Another value of an optimizer's setting."""
    return f'for group in optimizer.param_groups:\n    group["{name}"] = {value}'


def add_parameters() -> str:
    """The model's parameters, for an optimizer that does not have them."""
    return "\n".join(
        [
            'known = {id(p) for group in optimizer.param_groups for p in group["params"]}',
            "new = [p for p in model.parameters() if p.requires_grad and id(p) not in known]",
            'optimizer.add_param_group({"params": new})  # or make the optimizer after the model is complete',
        ]
    )


def clip(optimizer: Any) -> str:
    """Gradients of norm 1 at most."""
    if optimizer is None:
        return "initlab.clip_grad_norm_(model.parameters(), max_norm=1.0)  # after each backward()"
    return "clipper = initlab.GradClipper(optimizer, max_norm=1.0)"


_OR_BFLOAT16 = "or model.bfloat16(): the range of float32 in 16 bits"


def in_float32(evidence: Evidence) -> list[str]:
    """Weights of 32 bits, which small updates change."""
    return wider(evidence, "16 bits in the passes alone: torch.autocast(..., dtype=torch.bfloat16)")[:-1]


def wider(evidence: Evidence, otherwise: str = _OR_BFLOAT16) -> list[str]:
    """Float32, or bfloat16's range."""
    found = []
    if any(half(one.ref.tensor.dtype) for one in evidence.parameters_and_buffers):
        lines = [f"model.float()  # {otherwise}"]
        for leaf in evidence.leaves:
            if half(leaf.tensor.dtype):
                lines.append(leaf.rebind(evidence.batch, f"{leaf.value}.float()"))
        found.append("\n".join(lines))
    return [*found, "# torch.autocast(..., dtype=torch.bfloat16): the range of float32 in 16 bits, and no loss scale"]


def scaled(evidence: Evidence, power: int) -> list[str]:
    """A scaled loss, and gradients that are scaled back before the step: what torch.amp.GradScaler does."""
    lines = [
        f"scale = 2.0**{power}  # what torch.amp.GradScaler does",
        "unscaled = loss_fn",
        "loss_fn = lambda model, batch: unscaled(model, batch) * scale",
        "def unscale(optimizer, args, kwargs):",
        '    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]',
        "    torch._foreach_div_(grads, scale)",
        "optimizer.register_step_pre_hook(unscale)",
    ]
    return [*wider(evidence)[:-1], *(["\n".join(lines)] if evidence.optimizer is not None else [])]
