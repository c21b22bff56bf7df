"""What a planted fault and a healthy model are, and how to register them."""

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

KINDS = (
    *("input", "target", "weights", "operation", "precision", "gradient"),
    *("learning rate", "optimizer", "loss", "uninitialised"),
)
FAMILIES = ("mlp", "cnn", "rnn", "transformer", "gan", "physics")

LossFn = Callable[[Any, Any], torch.Tensor]
Built = tuple[nn.Module, Any, LossFn, torch.optim.Optimizer | None]
Build = Callable[..., Built]

# Names that one and the same operation goes by.
DIV = ("div", "truediv", "true_divide", "divide", "rtruediv", "rdiv", "reciprocal")
MATMUL = ("matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "einsum", "scaled_dot_product_attention")
MEAN = ("mean", "div", "nanmean")
POW = ("pow", "rpow", "float_power", "square")
SOFTMAX = ("softmax", "safe_softmax", "scaled_dot_product_attention", "multi_head_attention_forward")
STD = ("std", "var", "std_mean", "var_mean")
CROSS_ENTROPY = ("cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss_forward")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A user's mistake, and what a good diagnosis says of it.

    `place` names attributes of the top cause's place. A tuple holds answers of which any one will do; a list holds
    features that must all be named and no others; any other answer must be given as it stands (a feature may be one of
    several named). `twin` builds the same training step without the mistake.
    """

    name: str
    build: Build
    kinds: tuple[str, ...]
    place: dict[str, Any]
    fixable: bool = True
    steps: int = 1
    several: bool = False
    twin: Build | None = None

    @property
    def family(self) -> str:
        return self.name.split("_")[0]

    def kind_ok(self, kind: str) -> bool:
        """Whether the kind of a top cause is right."""
        return kind in self.kinds

    def place_ok(self, place: object) -> bool:
        """Whether the place of a top cause is right."""
        said = {what: getattr(place, what) for what in self.place}
        if said.get("op") is not None:
            said["op"] = said["op"].strip("_")  # __rdiv__, relu_, _softmax
        return all(_agrees(wanted, said[what]) for what, wanted in self.place.items())


def _agrees(wanted: Any, said: Any) -> bool:
    if isinstance(wanted, tuple):
        return any(_agrees(one, said) for one in wanted)
    said_all = list(said) if isinstance(said, (list, tuple)) else [said]
    if isinstance(wanted, list):
        return sorted(said_all) == sorted(wanted)
    return wanted in said_all


@dataclasses.dataclass(frozen=True)
class Healthy:
    """A training step with nothing wrong in it; `steps` is how many a diagnosis is to take."""

    name: str
    build: Build
    steps: int = 1


def _seeded(name: str, build: Build) -> Build:
    """`build` from a seed of its own; the caller's random state stays as it was."""

    @functools.wraps(build)
    def built(**options: Any) -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(name.encode()) % 1000)
            return build(**options)

    return built


def planter(into: list[Fault], family: str) -> Callable[..., Callable[[Build], Build]]:
    """A decorator that registers build functions as faults of a family.

    A build function with an argument `planted` also builds the twin, with planted=False.
    """

    def fault(
        *kinds: str,
        place: dict[str, Any] | None = None,
        fixable: bool = True,
        steps: int = 1,
        several: bool = False,
    ) -> Callable[[Build], Build]:
        def register(build: Build) -> Build:
            name = f"{family}_{build.__name__}"
            seeded = _seeded(name, build)
            twin = (
                functools.partial(seeded, planted=False) if "planted" in inspect.signature(build).parameters else None
            )
            into.append(Fault(name, seeded, kinds, place or {}, fixable, steps, several, twin))
            return build

        return register

    return fault


def healthy_keeper(into: list[Healthy]) -> Callable[..., Callable[[Build], Build]]:
    """A decorator that registers build functions as healthy models."""

    def healthy(*, steps: int = 1) -> Callable[[Build], Build]:
        def register(build: Build) -> Build:
            into.append(Healthy(build.__name__, _seeded(build.__name__, build), steps))
            return build

        return register

    return healthy


def supervised(criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> LossFn:
    """The loss function of a criterion and (x, y) batches."""

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        x, y = batch
        return criterion(model(x), y)

    return loss_fn


def train(model: nn.Module, batch: Any, loss_fn: LossFn, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Plain training: faults that show up late start from a model that has been trained."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
