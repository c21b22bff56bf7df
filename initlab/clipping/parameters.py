"""The parameters of one or several optimizers, each once, and what to call them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .functional import LabelledTensors


class OptimizerParameters:
    """Follows the parameter groups of optimizers, which may change at any time.

    Args:
        optimizers: whose groups they are.
        named_parameters: (name, parameter) pairs, or None: then the optimizers' own names count, or else places.

    Raises:
        TypeError: for something else than pairs.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], named_parameters: Any) -> None:
        self._optimizers = optimizers
        self._names = {id(p): name for name, p in _pairs(named_parameters)}
        self._known = LabelledTensors([], [], [], [])

    def labelled(self) -> LabelledTensors:
        """All of them, in order. Made anew only where they have changed.

        Raises:
            ValueError: for one that is in two optimizers.
        """
        groups = [group for one in self._optimizers for group in one.param_groups]
        parameters: list[Tensor] = list({id(p): p for group in groups for p in group["params"]}.values())
        known = self._known.passed
        if len(parameters) == len(known) and all(map(operator.is_, parameters, known)):
            return self._known
        names: dict[int, str] = {}
        owners: dict[int, int] = {}
        for k, one in enumerate(self._optimizers):
            of_optimizer = f" of optimizer {k}" if len(self._optimizers) > 1 else ""
            for number, group in enumerate(one.param_groups):
                own = group.get("param_names")
                for i, p in enumerate(group["params"]):
                    shape = "" if is_lazy(p) else f", of shape {tuple(p.shape)}"
                    place = f"parameter {i} of group {number}{of_optimizer}{shape}"
                    if owners.setdefault(id(p), k) != k:
                        raise ValueError(f"{place} is in optimizer {owners[id(p)]} too, and would be clipped twice")
                    names.setdefault(id(p), self._names.get(id(p), place if own is None else own[i]))
        self._known = LabelledTensors(parameters, range(len(parameters)), parameters, list(names.values()))
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        """With the parameters themselves in the place of their ids, which copies do not share."""
        known = self.labelled()
        return {"optimizers": self._optimizers, "names": list(zip(known.names or (), known.passed, strict=True))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        OptimizerParameters.__init__(self, state["optimizers"], state["names"])


def _pairs(named_parameters: Any) -> list[tuple[str, Tensor]]:
    """(name, parameter) pairs, checked."""
    named = [] if named_parameters is None else named_parameters
    pairs = list(named) if isinstance(named, Iterable) else [named]
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            found = f"{type(pair).__name__} in place of pairs"
            if isinstance(pair, Tensor):
                found = "parameters without names"
            raise TypeError(
                f"named_parameters has {found}; it must be (name, parameter) pairs, as model.named_parameters() gives "
                "them"
            )
    return pairs
