"""The canonical names of a model's parameters and buffers: no wrappers, one name for what is tied."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from initlab.kernels import PLAIN

from ..distributed.dtensors import is_dtensor

Names: TypeAlias = Callable[[str], str] | str
Kind: TypeAlias = Literal["plain", "dtensor", "lazy", "other"]

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
        attribute: the attribute of `module` that it is, "weight" for instance.
        module_name: the canonical name of `module`; empty for the model itself.
        places: (owner, attribute) for each of `names`.
        is_parameter: False for a buffer.
        kind: what kind of tensor it is, see `kind_of`.
    """

    name: str
    names: tuple[str, ...]
    tensor: Tensor
    module: nn.Module
    attribute: str
    module_name: str
    places: tuple[tuple[nn.Module, str], ...]
    is_parameter: bool
    kind: Kind

    @property
    def owner(self) -> str:
        """The class of the first owner, for messages."""
        return class_name(self.module)


def kind_of(tensor: Tensor) -> Kind:
    """What kind of tensor it is, for those who treat kinds differently: asked once, when a TensorRef is made.

    Returns:
        "plain" for torch's own Tensor and Parameter, "dtensor", "lazy" for a parameter without a shape, or "other" for
        any other subclass.

    Example:
        >>> import torch
        >>> from initlab.models.naming import kind_of
        >>> kind_of(torch.nn.Parameter(torch.ones(2))), kind_of(torch.nn.UninitializedParameter())
        ('plain', 'lazy')
    """
    if type(tensor) in PLAIN:
        return "plain"
    if is_lazy(tensor):
        return "lazy"
    return "dtensor" if is_dtensor(tensor) else "other"


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
        name, module = stack.pop()
        module = _innermost(module, wrappers)
        yield name, module
        prefix = f"{name}." if name else ""
        stack += [
            (prefix + child_name, child) for child_name, child in reversed(module._modules.items()) if child is not None
        ]


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
    rename = renaming(names)
    seen: dict[int, list[tuple[str, str, nn.Module, str, Tensor, bool]]] = {}
    ids: dict[str, int] = {}  # by canonical name
    for module_name, module in walk(model):
        prefix = f"{module_name}." if module_name else ""
        for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for attribute, tensor in tensors.items():
                if tensor is None:
                    continue
                name = rename(prefix + attribute)
                if ids.setdefault(name, id(tensor)) != id(tensor):
                    _, other_module, _, other_attribute, *_ = seen[ids[name]][0]
                    raise ValueError(
                        f"two different tensors have one canonical name, {name!r}: "
                        f"{f'{other_module}.{other_attribute}'.lstrip('.')} and {prefix}{attribute}; a name fixes a "
                        "key, so rename one of the modules, or map the two apart with names="
                    )
                seen.setdefault(id(tensor), []).append((name, module_name, module, attribute, tensor, is_parameter))
    found: tuple[list[TensorRef], list[TensorRef]] = ([], [])
    for entries in seen.values():
        name, module_name, module, attribute, tensor, is_parameter = entries[0]
        every: tuple[str, ...] = (name,)
        places: tuple[tuple[nn.Module, str], ...] = ((module, attribute),)
        if len(entries) > 1:
            every = tuple(dict.fromkeys(name for name, *_ in entries))
            places = tuple((owner, of_owner) for _, _, owner, of_owner, *_ in entries)
            # Compared as strings: Python orders them by code point, which is the order of their UTF-8 bytes.
            name = min(every)
        ref = TensorRef(name, every, tensor, module, attribute, module_name, places, is_parameter, kind_of(tensor))
        found[0 if is_parameter else 1].append(ref)
    return found


def renaming(names: Names | None) -> Callable[[str], str]:
    """What maps a name within a model to the one in the whole model."""
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
