"""record_build(): inside it, what a model's code writes while the model is built is recorded."""

from contextlib import ExitStack
from types import TracebackType

from .builds import BuildRecord
from .observing import Recording


class _RecordBuild:
    def __init__(self) -> None:
        self.entered: list[tuple[ExitStack, Recording, BuildRecord]] = []

    def __enter__(self) -> BuildRecord:
        recording, record = Recording(), BuildRecord()
        with ExitStack() as stack:
            stack.enter_context(recording.modes())
            self.entered.append((stack.pop_all(), recording, record))
        return record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, recording, record = self.entered.pop()
        stack.__exit__(kind, error, trace)
        if kind is not None:
            record.fail(kind.__name__)
            return
        modules = [module for reference in recording.modules.values() if (module := reference()) is not None]
        record.close(modules, recording.contents)


def record_build() -> _RecordBuild:
    """Inside it, what a model's own code writes to its tensors while it is built is recorded, for init_model_.

    `with initlab.record_build() as build: model = make()`, on the meta device or on any other; then
    `initlab.init_model_(model, seed, recipe=build)` gives every parameter what the code gave it: distributions and
    constants, wherever they were written (constructors, reset_parameters, init_weights, ...), in place or by functions
    that make tensors. What is computed, by `torch.linspace` or `orthogonal_` for example, is computed again by the same
    operators, with random numbers keyed by the seed and the parameter's name.

    The model gets the same values as without it, from the same random numbers. It goes by the thread that entered it,
    nests, and leaves nothing behind, also where an exception ends it. Code that starts the weights after the
    constructor, such as timm's `model.init_weights()`, belongs inside the block.

    The record holds names, and no tensors but data that the code used: it serves the model after `to_empty`, `.to`,
    sharding and wrapping, and deep copies of it. A parameter that starts as a copy of another, as in
    `copy.deepcopy(layer)`, gets the other's values.

    Returns:
        A context manager; `as` gives the record, a recipe once the block has ended.

    Example:
        >>> import torch, initlab
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.randn(8) * 0.02)
        >>> with initlab.record_build() as build, torch.device("meta"):
        ...     model = Scale()
        >>> print(initlab.init_model_(model, seed=0, recipe=build, device="cpu").rows[0].distribution)
        normal(0, 0.02)
    """
    return _RecordBuild()
