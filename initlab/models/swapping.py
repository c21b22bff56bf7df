"""swap(): inside it, torch's own init calls take their values from initlab's stream."""

import inspect
from collections.abc import Callable
from contextlib import ContextDecorator, ExitStack
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from .. import init
from .._init_draws import record_draws
from ..distributed.agreement import check_agreement, differing, refuse_differing
from ..distributed.groups import groups_of, mesh_dims_of
from .redirection import Redirect

_F = TypeVar("_F", bound=Callable[..., Any])


class _Swap(ContextDecorator):
    def __init__(self, check_ranks: Any) -> None:
        self.check_ranks = check_ranks
        self.entered: list[tuple[ExitStack, list[Any]]] = []

    def __enter__(self) -> None:
        if not isinstance(self.check_ranks, bool):
            groups_of(self.check_ranks, "check_ranks")  # for its errors, before anything is drawn
        with ExitStack() as stack:
            drawn = stack.enter_context(record_draws()) if self.check_ranks else []
            stack.enter_context(Redirect(init))
            self.entered.append((stack.pop_all(), drawn))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, drawn = self.entered.pop()
        stack.__exit__(kind, error, trace)
        if self.check_ranks and kind is None:
            _compare(drawn, self.check_ranks)

    def __call__(self, func: _F) -> _F:
        for kind in (
            inspect.isclass,
            inspect.isgeneratorfunction,
            inspect.iscoroutinefunction,
            inspect.isasyncgenfunction,
        ):
            if kind(func):
                raise TypeError(
                    f"swap() decorates plain functions, and {func!r} would run, or go on running, outside it; "
                    "write `with initlab.swap():` inside it"
                )
        return super().__call__(func)

    def _recreate_cm(self) -> "_Swap":
        return _Swap(
            self.check_ranks
        )  # one for each call of the decorated function: it may be running in several threads


def _compare(drawn: list[tuple[Tensor, Any, int]], where: Any) -> None:
    """Raise where ranks drew other keys, naming the generators."""
    labels: dict[int, str] = {}
    messages = []
    for tensor, generator, key in drawn:
        label = "torch's default CPU generator"
        if generator is not None:
            shape = tuple(tensor.shape)
            label = labels.setdefault(
                id(generator), f"generator {len(labels) + 1} ({generator.device}), first used for shape {shape}"
            )
        messages.append((tensor, label, f"{key:x} "))
    what, advice = "keys", "Give these generators one seed on every rank, torch.manual_seed for the default one"
    if where is True:
        check_agreement(messages, what, advice)
        return
    by_label: dict[str, str] = {}
    for _, label, message in messages:
        by_label[label] = by_label.get(label, "") + message
    refuse_differing(differing(by_label, mesh_dims_of(where, "check_ranks")), what, advice)


def swap(*, check_ranks: Any = False) -> _Swap:
    """Inside it, torch's init functions and in-place sampling of floating tensors take their values from the stream.

    A context manager, `with initlab.swap():`, and a decorator of plain functions, `@initlab.swap()`. It redirects, in
    the thread that entered it,

    - every function of torch.nn.init, also where a library has imported it by name. Of `orthogonal_` and `sparse_`
      imported by name, or called by their deprecated names, the random numbers come from the stream and the rest is
      torch's; so are `eye_` and `dirac_`, which must not be given DTensors then;
    - `Tensor.normal_` and `Tensor.uniform_` of floating and complex tensors, also on `.data`;
    - the zeros of an embedding's padding row, where its weight is a DTensor: torch writes them into a copy.

    What makes new tensors, such as `torch.randn`, `torch.normal` or `nn.Parameter(torch.rand(n))`, is not swapped.
    Each call takes one key from its generator, as in initlab.init, so the values depend on the order of the calls;
    `initlab.init_model_` goes by names. Nothing stays changed afterwards, also where an exception ends it.

    Args:
        check_ranks: True compares, at the end, the keys that ranks have drawn for DTensors: one small all-reduce for
            each dimension of their meshes, in which every rank takes part. A process group or a DeviceMesh compares
            the keys of all draws, of plain tensors too, over its ranks. False does nothing.

    Raises:
        RuntimeError: on entry, if this torch.nn.init lacks a function that has to be replaced, or check_ranks asks
            others where torch.distributed is not initialised. At the end, on every rank, if check_ranks finds that
            keys differ; it names the generators and the ranks.
        TypeError: on entry, for another check_ranks; as a decorator, for classes, generators and coroutines, whose code
            would run outside it.

    Example:
        >>> import torch, initlab
        >>> with initlab.swap():
        ...     seed = torch.manual_seed(0)
        ...     layer = torch.nn.Linear(3, 5)
        >>> seed = torch.manual_seed(0)
        >>> same = initlab.init.kaiming_uniform_(torch.empty(5, 3), a=5**0.5)
        >>> torch.equal(layer.weight, same)
        True
    """
    return _Swap(check_ranks)
