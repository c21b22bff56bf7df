"""Faults and healthy models as functions that return a dictionary, as the fourth and the fifth set have them."""

import dataclasses
import re
import warnings
from collections.abc import Callable
from typing import Any

_WHERE = {"input": "batch", "target": "batch", "loss": "loss", "learning rate": "optimizer", "optimizer": "optimizer"}


@dataclasses.dataclass(frozen=True)
class Described:
    """A fault, or a healthy model, as a function that returns a dictionary."""

    name: str
    make: Callable[[], dict[str, Any]]
    steps: int | None = None

    def build(self) -> tuple[Any, ...]:
        made = self.make()
        return tuple(made[part] for part in ("model", "batch", "loss_fn", "optimizer"))

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.make()["kind"]

    @property
    def place(self) -> tuple[str, ...]:
        return self.make()["place"]

    @property
    def fixable(self) -> bool:
        return self.make()["curable"]

    def kind_ok(self, kind: str) -> bool:
        return kind in self.kinds

    def right_place(self, cause: Any) -> bool:
        """Whether a cause points at one of the names: as a part of its place, or as a word of what it says."""
        place = cause.place
        features = place.feature if isinstance(place.feature, list) else [place.feature]
        named = {str(place), place.module, place.parameter, place.op, place.tensor, *(f"feature {f}" for f in features)}
        named |= {(place.parameter or "").rpartition(".")[0], (place.parameter or "").rpartition(".")[2]}
        named |= {_WHERE.get(cause.kind)} if cause.kind in ("learning rate", "optimizer") or not str(place) else set()
        named |= {"loss"} if place.module is None and (cause.kind == "loss" or place.op) else set()
        said = f"{cause.explanation} {cause.evidence.get('line', '')} {place}"
        return any(
            name in named
            or any(one.startswith(f"{name}.") for one in named if one)
            or (len(name) > 3 and re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", said))
            for name in self.place
        )


def made(module: Any, start: str, of: str) -> list[Described]:
    """The faults ("fault_") or healthy models ("healthy_") of a module, named after their set."""
    names = sorted(name for name in vars(module) if name.startswith(start))
    return [Described(f"{of}_{name.removeprefix(start)}", quietly(getattr(module, name))) for name in names]


def quietly(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Without the warnings of libraries that a model is built with."""

    def made() -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return made
