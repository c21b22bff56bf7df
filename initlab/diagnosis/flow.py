"""Which tensors of the batch reach which weights, at what scale, and which are compared with what the model puts out.

Data are judged as they arrive at the first weights, whatever divides them by 255 or looks them up on the way.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from initlab.kernels.torch_internals import physical

from .._tree import tensors_in
from ..models.activations import ACTIVATIONS
from .batch import Features, Leaf, features
from .losses import last_activation
from .slopes import Slopes
from .stats import Stats, measure
from .trace import Call, storage_of

_PRODUCTS = frozenset(
    (
        *("linear", "matmul", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "bilinear"),
        *("conv_transpose3d", "einsum", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "tensordot"),
        *("rnn_tanh_cell", "rnn_relu_cell", "multi_head_attention_forward", "mv", "addmv"),
    )
)
_DRAWS = frozenset(("randn", "randn_like", "normal", "normal_"))
_RESHAPING = frozenset(("view", "reshape", "to", "float", "contiguous", "squeeze", "unsqueeze", "flatten", "detach"))
_LOOKUPS = frozenset(("embedding", "embedding_bag"))
_JOINING = frozenset(("cat", "concat", "concatenate", "stack", "hstack", "vstack", "column_stack", "dstack"))
_DISTANCES = frozenset(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "sub", "rsub", "gaussian_nll_loss"))
_LOSSES = frozenset(
    (
        *("cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"),
        *("poisson_nll_loss", "ctc_loss", "gather", "eq", "mul"),
    )
)

Path = tuple[Any, ...]


class _Entry(NamedTuple):
    """What a tensor was made of.

    Args:
        paths: leaves of the batch.
        weights: whether parameters are among it.
        raw: whether any of it came past all of them.
        drawn: the random draws among it, by number.
        draw: the one that it is, in another shape at most; 0 for none.
        cut: whether it is made of a derivative that autograd.grad() gave without a graph.
    """

    paths: frozenset[Path] = frozenset()
    weights: bool = False
    raw: bool = False
    drawn: frozenset[int] = frozenset()
    draw: int = 0
    cut: bool = False


@dataclass
class Arrival:
    """A signal that meets a first weight.

    Args:
        parameter: name of the weight.
        paths: of the leaves of the batch that it is made of.
        stats: its numbers; None where it is looked up by index.
        features: of its last dimension.
        shape: its shape.
    """

    parameter: str
    paths: frozenset[Path]
    stats: Stats | None
    features: Features | None
    shape: torch.Size


@dataclass
class Comparison:
    """A tensor of the batch, or what was made of it, beside what the model puts out.

    Args:
        op: the function that compares them.
        target: its numbers, as they are compared.
        prediction: likewise, of the other.
        columns: how many numbers a row of the target has.
        activation: what made the prediction, if an activation did.
        outside: share of the targets that it cannot put out.
    """

    op: str
    target: Stats | None
    prediction: Stats | None
    columns: int
    activation: str = ""
    outside: float = 0.0

    @property
    def unit(self) -> float:
        """The loss of knowing no more than the mean of the targets: their variance, or spread."""
        std = self.target.std if self.target is not None else 1.0
        return std if self.op in ("l1_loss", "smooth_l1_loss", "huber_loss") else std**2

    @property
    def distance(self) -> bool:
        """Whether it measures how far the two are apart."""
        return self.op in _DISTANCES


class ParameterCall(Call):
    """A product of a signal with a parameter that a model holds by itself: a layer without a module.

    Attributes:
        fan_in: how many inputs meet in an output; None where that is not known.
    """

    def __init__(self, path: str, module: nn.Module, fan_in: int | None) -> None:
        super().__init__(path, module)
        self.is_layer = True
        self.fan_in = fan_in

    @property
    def kind(self) -> str:
        """No class: it is a parameter."""
        return "Parameter"

    @property
    def wanted(self) -> float | None:
        """The standard deviation that keeps the size of the signal through the weight and the activation after it."""
        if not self.fan_in:
            return None
        start = ACTIVATIONS.get(self.activation)
        return (start.gain if start is not None else 1.0) / math.sqrt(self.fan_in)


class Flow:
    """Follows the tensors of a batch through the functions of torch that a pass calls."""

    def __init__(self, model: nn.Module, leaves: Sequence[Leaf]) -> None:
        self.model = model
        self.slopes: Slopes | None = None
        self.arrivals: list[Arrival] = []
        self.compared: dict[Path, Comparison] = {}
        self.read: set[Path] = set()
        self.noise = ""  # a loss function whose target is a draw that the model does not see
        self.comparing: dict[str, Path] = {}  # functions that compare a leaf with what the model puts out, and the leaf
        self.draws = 0
        self._weights = {storage_of(p): name for name, p in model.named_parameters()}
        self._sizes = {name: p.dim() for name, p in model.named_parameters()}
        self._leaves = {id(leaf.tensor): leaf.path for leaf in leaves}
        storages: dict[int, list[Path]] = {}
        for leaf in leaves:
            storages.setdefault(storage_of(leaf.tensor), []).append(leaf.path)
        self._storages = {key: paths[0] for key, paths in storages.items() if len(paths) == 1}
        self._entries: dict[int, tuple[weakref.ref[Tensor], _Entry]] = {}
        self._seen: set[str] = set()

    @property
    def inputs(self) -> set[Path]:
        """The leaves that reach weights before they meet what others made."""
        return {path for arrival in self.arrivals for path in arrival.paths}

    def arriving(self, leaf: Leaf) -> Arrival | None:
        """A leaf, or what was made of it, as it meets its first weight."""
        found = [one for one in self.arrivals if leaf.path in one.paths and one.features is not None]
        return next((one for one in found if len(one.paths) == 1), found[0] if found else None)

    def called(self, name: str, args: Any, kwargs: Any, out: Any, within_layer: bool) -> ParameterCall | None:
        """A function has returned; a layer, where it was one that no module stands for."""
        made = [out] if isinstance(out, Tensor) else list(tensors_in(out, 2)) if isinstance(out, tuple | list) else []
        if not made or name == "get":
            return None
        tensors = [arg for arg in args if isinstance(arg, Tensor)] if not kwargs else []
        if kwargs or len(tensors) < len(args):
            tensors = list(tensors_in((args, kwargs), 3))
        entries = [self._entry(tensor) for tensor in tensors]
        found = None
        if name in _PRODUCTS:
            found = self._product(name, args, tensors, entries, made[0], within_layer)
        elif name in _LOOKUPS:
            self._lookup(tensors, entries)
        elif name in _DISTANCES or name in _LOSSES:
            compares = self._comparison(name, tensors, entries)
            if compares and name in ("sub", "rsub") and self.slopes is not None:
                self.slopes.compared(name, made[0])
        entry = self._made(name, kwargs, [one for one in entries if one is not None], tensors)
        if entry != _Entry():
            for tensor in made:
                self._entries[id(tensor)] = weakref.ref(tensor), entry
        return found

    def _made(self, name: str, kwargs: Any, known: list[_Entry], tensors: list[Tensor]) -> _Entry:
        """What a function's results are made of."""
        if name in _DRAWS:  # randn_like reads a shape, and no values
            self.draws += 1
            return _Entry(drawn=frozenset((self.draws,)), draw=self.draws)
        paths = frozenset().union(*(entry.paths for entry in known)) if known else frozenset()
        self.read |= paths
        weights = any(entry.weights for entry in known)
        raw = any(entry.raw for entry in known) if name in _JOINING else bool(paths) and not weights
        drawn = frozenset().union(*(entry.drawn for entry in known)) if known else frozenset()
        draw = known[0].draw if len(known) == 1 and name in _RESHAPING else 0
        meets = name in _PRODUCTS and any(storage_of(tensor) in self._weights for tensor in tensors)
        cut = any(entry.cut for entry in known) and not meets  # what the model then gets is data: an attack's steps
        if name == "grad" and not kwargs.get("create_graph"):
            cut = not any(storage_of(tensor) in self._weights for tensor in tensors)
        return _Entry(paths, weights, raw, drawn, draw, cut)

    def uses_constant_derivative(self, loss: Tensor) -> bool:
        """Whether a loss is made of a derivative that is a constant to the optimizer."""
        entry = self._entry(loss)
        return entry is not None and entry.cut

    def _entry(self, tensor: Tensor) -> _Entry | None:
        known = self._entries.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        if id(tensor) in self._leaves:
            return _Entry(frozenset((self._leaves[id(tensor)],)), raw=True)
        storage = storage_of(tensor)
        if storage in self._weights:
            return _Entry(weights=True)
        if storage in self._storages:
            return _Entry(frozenset((self._storages[storage],)), raw=True)
        return None

    def _product(
        self, op: str, args: Any, tensors: list[Tensor], entries: list[Any], out: Tensor, within_layer: bool
    ) -> ParameterCall | None:
        names = [self._weights.get(storage_of(tensor)) for tensor in tensors]
        place = next((n for n, name in enumerate(names) if name is not None and self._sizes[name] > 1), None)
        if place is None:
            return None
        name = names[place]
        assert name is not None
        other = next((n for n, one in enumerate(names) if one is None and tensors[n].is_floating_point()), None)
        if other is None or name in self._seen:
            return None
        self._seen.add(name)
        signal, entry = tensors[other], entries[other]
        if entry is not None and entry.raw:
            self.arrivals.append(Arrival(name, entry.paths, measure(signal), features(signal), signal.shape))
        if within_layer or op in ("lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"):
            return None
        fan_in = _fan_in(op, args, tensors[place], signal, other < place)
        call = ParameterCall(name, self.model.get_submodule(name.rpartition(".")[0]), fan_in)
        call.input, call.output = measure(signal), measure(out)
        call.recorded = out.requires_grad
        return call

    def _lookup(self, tensors: list[Tensor], entries: list[Any]) -> None:
        name = next((name for tensor in tensors if (name := self._weights.get(storage_of(tensor)))), None)
        for tensor, entry in zip(tensors, entries, strict=True):
            if name is not None and entry is not None and entry.raw and not tensor.is_floating_point():
                self.arrivals.append(Arrival(name, entry.paths, None, None, tensor.shape))

    def _comparison(self, op: str, tensors: list[Tensor], entries: list[Any]) -> bool:
        """Whether a tensor of the batch is compared with what the model puts out."""
        sides = [(physical(t), e) for t, e in zip(tensors, entries, strict=True) if e is not None][:2]
        if len(sides) < 2:
            return False
        compares = False
        for (target, entry), (prediction, other) in (sides, sides[::-1]):
            alone = entry.draw and not entry.paths and not entry.weights and other.weights
            if alone and entry.draw not in other.drawn and op in _DISTANCES and target.shape == prediction.shape:
                self.noise = op
            if entry.raw and not entry.weights and other.weights and not other.raw:
                compares = True
                for path in entry.paths:
                    self.comparing.setdefault(op, path)
                    known = self.compared.get(path)
                    if known is None or (known.op not in _DISTANCES and op in _DISTANCES):
                        self.compared[path] = _compare(op, target, prediction)
        return compares


_RANGES = {
    "sigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "softmax": (0.0, 1.0),
    "relu": (0.0, math.inf),
    "softplus": (0.0, math.inf),
    "log_softmax": (-math.inf, 0.0),
}
_MARGIN = 0.05  # of a target's spread, that a range may be missed by


def _compare(op: str, target: Tensor, prediction: Tensor) -> Comparison:
    found = Comparison(op, measure(target), measure(prediction), target.shape[-1] if target.dim() > 1 else 1)
    found.activation = last_activation(prediction)
    if found.activation in _RANGES and found.target is not None:
        low, high = _RANGES[found.activation]
        margin = _MARGIN * max(found.target.std, 1e-12)
        found.outside = float(((target < low - margin) | (target > high + margin)).float().mean())
    return found


def _fan_in(op: str, args: Any, weight: Tensor, signal: Tensor, on_the_right: bool) -> int | None:
    if op.startswith("conv"):
        return weight[0].numel() if "transpose" not in op else weight.shape[0] * weight[0, 0].numel()
    if op == "linear" or (op == "matmul" and on_the_right):
        return signal.shape[-1] if signal.dim() else None
    if op == "matmul":
        return weight.shape[-1]
    if op == "einsum" and args and isinstance(args[0], str) and "->" in args[0] and "." not in args[0]:
        terms, result = args[0].replace(" ", "").split("->")
        letters = next((t for t in terms.split(",") if len(t) == weight.dim()), "")
        sizes = dict(zip(letters, weight.shape, strict=False))
        return math.prod(size for letter, size in sizes.items() if letter not in result) or None
    return None
