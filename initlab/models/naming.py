"""The canonical names of a model's parameters and buffers: no wrappers, one name for what is tied."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..distributed.dtensors import local

Names: TypeAlias = Callable[[str], str] | str

# Modules that only wrap another one: (module that defines the class, its name, the attribute that holds the wrapped).
# Looked up among the modules already imported, since a model cannot hold an instance of a class nobody has imported.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
)


@dataclass(eq=False, slots=True)  # not frozen, which would make it four times as slow to build
class TensorRef:
    """One parameter or buffer of a model, and every place it has there.

    Args:
        name: the byte-wise smallest of its canonical names; its key comes from it.
        names: all of them, in the order in which the model registers them; more than one for a tied weight.
        tensor: the parameter or buffer.
        module: its first owner.
        leaf: the attribute of `module` that holds it, "weight" for instance.
        path: the canonical name of `module`; empty for the model itself.
        places: (owner, attribute) for each of `names`.
        is_parameter: False for a buffer.
    """

    name: str
    names: tuple[str, ...]
    tensor: Tensor
    module: nn.Module
    leaf: str
    path: str
    places: tuple[tuple[nn.Module, str], ...]
    is_parameter: bool

    @property
    def owner(self) -> str:
        """The class of the first owner, for messages."""
        return class_name(self.module)


def class_name(module: nn.Module) -> str:
    """The name of a module's class; of a class that fully_shard has derived, of the one it was derived from.

    Example:
        >>> import torch
        >>> from initlab.models.naming import class_name
        >>> class_name(torch.nn.ReLU())
        'ReLU'
    """
    kind = type(module)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and issubclass(kind, fsdp.FSDPModule) and fsdp.FSDPModule in kind.__bases__:
        kind = kind.__bases__[1]  # fully_shard puts its own first
    return kind.__name__


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(canonical name, module) of a model and everything below it, parents first, wrappers left out.

    A module that is registered twice is given twice, as named_modules(remove_duplicate=False) does.

    Example:
        >>> import torch
        >>> from initlab.models.naming import walk
        >>> model = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.ReLU()))
        >>> [name for name, _ in walk(model)]
        ['', '0']
    """
    wrappers = _wrappers()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        module = _innermost(module, wrappers)
        yield path, module
        dot = f"{path}." if path else ""
        stack += [(dot + name, child) for name, child in reversed(module._modules.items()) if child is not None]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a model's wrappers (DDP, FSDP, torch.compile, activation checkpointing).

    Example:
        >>> import torch
        >>> from initlab.models.naming import unwrapped
        >>> unwrapped(torch.nn.DataParallel(torch.nn.ReLU()))
        ReLU()
    """
    return _innermost(model, _wrappers())


def _innermost(module: nn.Module, wrappers: dict[type, str]) -> nn.Module:
    while (inner := _wrapped(module, wrappers)) is not None:
        module = inner
    return module


def _wrappers() -> dict[type, str]:
    known = ((sys.modules.get(where), name, attribute) for where, name, attribute in _WRAPPERS)
    return {getattr(found, name): attribute for found, name, attribute in known if found is not None}


def _wrapped(module: nn.Module, wrappers: dict[type, str]) -> nn.Module | None:
    for kind in type(module).__mro__:
        if kind in wrappers:
            return module._modules.get(wrappers[kind])
    return None


def tensor_refs(model: nn.Module, names: Names | None = None) -> tuple[list[TensorRef], list[TensorRef]]:
    """The parameters of a model and its buffers, each tensor once, in the order in which the model registers them.

    Args:
        model: any module, wrapped (DDP, FSDP, torch.compile, activation checkpointing) or not.
        names: maps a canonical name within `model`, a pipeline stage say, to its name in the whole model: a callable,
            or a prefix, after which a dot is added where it lacks one.

    Returns:
        (parameters, buffers).

    Raises:
        ValueError: if two tensors have one name.
        TypeError: if `names` does not map a name to a string.

    Example:
        >>> import torch
        >>> from initlab.models.naming import tensor_refs
        >>> parameters, buffers = tensor_refs(torch.nn.BatchNorm1d(3), names="stem.norm")
        >>> [ref.name for ref in parameters], len(buffers)
        (['stem.norm.weight', 'stem.norm.bias'], 3)
    """
    rename = _renaming(names)
    seen: dict[int, list[tuple[str, str, nn.Module, str, Tensor, bool]]] = {}
    owners: dict[str, int] = {}
    for path, module in walk(model):
        dot = f"{path}." if path else ""
        held = ((module._parameters, True), (module._buffers, False))
        for tensors, is_parameter in held:
            for leaf, tensor in tensors.items():
                if tensor is None:
                    continue
                name = rename(dot + leaf)
                if owners.setdefault(name, id(tensor)) != id(tensor):
                    _, other_path, _, other_leaf, *_ = seen[owners[name]][0]
                    raise ValueError(
                        f"two different tensors have one canonical name, {name!r}: "
                        f"{f'{other_path}.{other_leaf}'.lstrip('.')} and {dot}{leaf}; a name fixes a key, so rename "
                        "one of the modules, or map the two apart with names="
                    )
                seen.setdefault(id(tensor), []).append((name, path, module, leaf, tensor, is_parameter))
    found: tuple[list[TensorRef], list[TensorRef]] = ([], [])
    for places in seen.values():
        every = tuple(dict.fromkeys(name for name, *_ in places))
        _, path, module, leaf, tensor, is_parameter = places[0]
        # Compared as strings: Python orders them by code point, which is the order of their UTF-8 bytes.
        where = tuple((owner, attribute) for _, _, owner, attribute, *_ in places)
        found[0 if is_parameter else 1].append(
            TensorRef(min(every), every, tensor, module, leaf, path, where, is_parameter)
        )
    return found


def _renaming(names: Names | None) -> Callable[[str], str]:
    if names is None:
        return lambda name: name
    if isinstance(names, str):
        prefix = names if names.endswith(".") or not names else f"{names}."
        return lambda name: prefix + name
    if not callable(names):
        raise TypeError(f"names is a {type(names).__name__}; it must be a prefix or a function from name to name")

    def rename(name: str) -> str:
        new = names(name)
        if not isinstance(new, str) or not new:
            raise TypeError(f"names({name!r}) returned {new!r}; it must return the name in the whole model, a string")
        return new

    return rename


def matches(name: str, pattern: str) -> bool:
    """Whether a name pattern selects a name: a glob, or the name of a module, which selects everything within it.

    Example:
        >>> from initlab.models.naming import matches
        >>> [matches("h.0.attn.weight", p) for p in ("h.*.weight", "h.0", "h.1", "weight")]
        [True, True, False, False]
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def shared_memory(parameters: list[TensorRef]) -> list[tuple[str, str]]:
    """Pairs of different parameters that share elements: a fill would write them twice, from two keys.

    Views of one storage that do not meet, such as the weights of an RNN on a GPU, are fine.
    """
    storages: dict[int, list[TensorRef]] = {}
    for ref in parameters:
        if ref.tensor.layout == torch.strided and ref.tensor.numel() > 0:
            try:
                storages.setdefault(local(ref.tensor).untyped_storage()._cdata, []).append(ref)
            except NotImplementedError:  # a wrapper subclass: it has no storage of its own
                continue
    found = []
    for group in storages.values():
        if len(group) == 1:
            continue
        parts = sorted(((ref, local(ref.tensor)) for ref in group), key=lambda pair: pair[1].storage_offset())
        reach, last = -1, None
        for ref, tensor in parts:
            start, end = tensor.storage_offset() * tensor.element_size(), _end(tensor)
            if last is not None and start < reach and _meet(last[1], tensor):
                found.append((last[0].name, ref.name))
            if end > reach:
                reach, last = end, (ref, tensor)
    return found


def _end(tensor: Tensor) -> int:
    """The byte after the last one of a tensor, from the beginning of its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((tensor.storage_offset() + last + 1) * tensor.element_size())


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage, whose spans overlap, share an element."""
    if a.dtype != b.dtype or (a.is_contiguous() and b.is_contiguous()):
        return True
    size = max(_end(a), _end(b)) // a.element_size()
    count = torch.zeros(size, dtype=torch.int8, device="cpu")
    for tensor in (a, b):
        count.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).add_(1)
    return bool((count > 1).any())
