"""What a model's own code computes: its functions run on stand-ins without memory, and are recorded as a build is.

`recording` reads distributions off the same code, and knows torch's layers by heart; this serves what it gives up.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..distributed.dtensors import is_dtensor
from ..distributed.shards import local_shards
from .checking import LEVEL, mismatch, two_sample_mismatch
from .contents import computed, plain
from .entries import Entry, Found, entries_of
from .entry_points import PUBLIC, children_first, owners_of_init_weights, public_starts, run_init_weights, unmark
from .layers import reset_function
from .naming import TensorRef, class_name
from .observing import Recording
from .programs import Parameter, Program, call_key
from .recording import kept_generators, owned_by_another, registered, stand_ins
from .specs import FillSpec

Stage: TypeAlias = Literal["resets", "init_weights", "public"]


def computed_starts(
    model: nn.Module, refs: Sequence[TensorRef], stages: Collection[Stage], failed: Collection[tuple[int, str]]
) -> dict[int, FillSpec | str]:
    """What a model's own code writes to its parameters, by the id of a tensor: a spec, or why there is none.

    Args:
        model: the model; nothing of it changes.
        refs: its parameters.
        stages: which code is run, always in this order: "resets", every module's reset_parameters, children first;
            "init_weights", `_init_weights(module)`; "public", `init_weights()` and what else is called so.
        failed: (id of a module, name) of code that must not run: when it was read, it reached for what is no stand-in,
            or did not come to its end.
    """
    tied = owned_by_another(model)
    with stand_ins(model) as recorder:
        unmark(model)
        recording = Recording(recorder.real_storages)
        contents = recording.contents
        for module, where, code in list(_codes(model, stages)):
            may_run = (id(module), where) not in failed
            if not may_run and where.rpartition(".")[2] in PUBLIC:
                continue  # left out altogether, as where it is read
            others = [recorder.standing[key] for key in tied.get(id(module), ()) if key in recorder.standing]
            before = [(t, contents.read(t), contents.node(t)) for t in others]
            places = [
                (tensors, name, tensor)
                for owner in module.modules()
                for tensors in registered(owner)[:2]
                for name, tensor in tensors.items()
                if tensor is not None
            ]
            why = "" if may_run else f"{where} cannot be read"
            try:
                if may_run:
                    with warnings.catch_warnings(), kept_generators(), torch.no_grad(), torch.device("meta"):
                        warnings.simplefilter("ignore")
                        with recording.modes():
                            code()
            except Exception as error:
                why = f"{where} cannot be read: {error or type(error).__name__}".splitlines()[0]
            for tensors, name, tensor in places:
                replaced = tensors.get(name) is not tensor
                tensors[name] = tensor
                if why or replaced:
                    contents.write(tensor, computed(why or f"{where} replaces it instead of filling it"))
            for tensor, fills, node in before:
                if fills:
                    contents.write(tensor, fills, node)
        found = {}
        for ref in refs:
            stand_in = recorder.standing.get(id(ref.tensor))
            if stand_in is not None and contents.is_known(stand_in):
                found[id(ref.tensor)] = Found(stand_in, ref.name, contents.read(stand_in), contents.node(stand_in))
    return {key: _spec_of(entry) or entry.why for key, entry in entries_of(found).items()}


def _spec_of(entry: Entry) -> FillSpec | None:
    if entry.spec is None or not entry.copies:
        return entry.spec
    return replace(entry.spec, copy_of=min(entry.copies))


def _codes(model: nn.Module, stages: Collection[Stage]) -> Iterator[tuple[nn.Module, str, Callable[[], Any]]]:
    """(module, how it is called, code) of what is run."""
    if "resets" in stages:
        for module in children_first(model):
            function = reset_function(module)
            if function is not None:
                yield module, f"{class_name(module)}.{function.__name__}", lambda f=function, m=module: f(m)  # type: ignore[misc]
    if "init_weights" in stages:
        for module, owner in list(owners_of_init_weights(model)):
            yield module, f"{class_name(owner)}._init_weights", lambda o=owner, m=module: run_init_weights(o, m)  # type: ignore[misc]
    if "public" in stages:
        for module, name in list(public_starts(model)):
            yield module, f"{class_name(module)}.{name}", getattr(module, name)


def start_mismatch(ref: TensorRef, spec: FillSpec, refs: Sequence[TensorRef]) -> str | None:
    """Why the values that a parameter has cannot be those of a spec; None where they can, or nothing tells."""
    if spec.program is not None:
        return _computed_mismatch(ref, spec.program, spec.why, refs)
    return None if ref.tensor.is_meta else mismatch(ref, spec, len(refs))


def _computed_mismatch(ref: TensorRef, program: Program, why: str, refs: Sequence[TensorRef]) -> str | None:
    """Why the values that a parameter has cannot be what a program computes; None where they can.

    What takes no random numbers, or takes them from other parameters alone, is compared with the values. Else both are
    taken as samples, and compared by Kolmogorov's and Smirnov's distance.
    """
    tensor = ref.tensor.detach()
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    by_name = {name: other.tensor for other in refs for name in other.names}

    def start_of(other: Parameter) -> Tensor:
        return by_name[other.name].detach().to("cpu", other.dtype)

    if any(is_dtensor(by_name[name]) for name in program.parameters):
        return None  # to gather it is more than a check may cost
    try:
        value = program.run(lambda name, n: call_key(0, name, n), start_of).to(tensor.dtype)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, ArithmeticError):
        return None  # it is reported where the values are needed
    if value.shape != tensor.shape:
        return f"what is computed for it has the shape {tuple(value.shape)} ({why})"
    parts = (
        [(shard, region.of(value)) for shard, region in local_shards(tensor)]
        if is_dtensor(tensor)
        else [(plain(tensor), value)]
    )
    for held, wanted in parts:
        held = held.to("cpu")
        if program.takes_random_numbers:
            if two_sample_mismatch(held, wanted, LEVEL / max(1, len(refs))):
                return f"its values are of another distribution than what is computed for it ({why})"
        elif not torch.allclose(
            held.double(), wanted.double(), rtol=1e-2 if tensor.element_size() < 4 else 1e-4, atol=1e-7
        ):
            return f"its values are not what is computed for it ({why})"
    return None
