"""Weights that other parameters make up: weight_norm, spectral_norm and torch.nn.utils.parametrize.

A recipe is asked for the weight itself, "layer.weight", as if it were a parameter. What makes it up then starts with
what the parametrisation's right_inverse makes of that: a weight_norm's v is the weight, and its g the norm of v.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .contents import Contents, Value, computed, whole
from .entries import Found, entries_of
from .naming import TensorRef, class_name, walk
from .observing import Recording
from .programs import Filled, Nested
from .recording import kept_generators, stand_ins
from .specs import FillSpec
from .values import sample_of


@dataclass(eq=False)
class MadeWeight:
    """A weight that is made up of parameters.

    Args:
        ref: the weight, as if it were a parameter of its layer: on the meta device, its key from its own name.
        parts: (owner, attribute) of the parameters, and of buffers, that make it up.
        invert: what the parts are for a weight; raises NotImplementedError where it cannot be said.
        how: what makes it up, for messages.
    """

    ref: TensorRef
    parts: tuple[tuple[nn.Module, str], ...]
    invert: Callable[[Tensor], Sequence[Tensor]]
    how: str

    def specs(self, spec: FillSpec, named: Mapping[tuple[int, str], TensorRef]) -> dict[TensorRef, FillSpec | str]:
        """What its parts start with, or why they cannot, where the weight is to start by a spec.

        Args:
            spec: of the weight.
            named: the parameters and buffers of the model by (id of the owner, attribute).
        """
        refs = [named[id(owner), attribute] for owner, attribute in self.parts if (id(owner), attribute) in named]
        made, contents, why = self._inverted(spec, "meta")
        if why and self.ref.tensor.numel() <= _SMALL:  # it may look at values
            made, contents, again = self._inverted(spec, "cpu")
            why = again and why
        if not why and len(made) != len(self.parts):
            why = "its right_inverse gives another number of tensors"
        if why:
            return dict.fromkeys(refs, f"{self.ref.name} is made of it by {self.how}, and {why}")
        found = {}
        for (owner, attribute), part in zip(self.parts, made, strict=True):
            ref = named.get((id(owner), attribute))
            if ref is not None:
                found[ref] = Found(part, ref.name, contents.read(part), contents.node(part))
        specs: dict[TensorRef, FillSpec | str] = {}
        for ref, entry in entries_of(found).items():
            if entry.spec is None:
                specs[ref] = f"{self.ref.name} is made of it by {self.how}, and {entry.why}"
            elif tuple(entry.shape) != tuple(ref.tensor.shape):
                specs[ref] = f"{self.how} has a right_inverse of shape {entry.shape}"
            else:
                fan = spec.fan if entry.spec.fills else None
                why = f"{spec.why}, {self.how}"
                specs[ref] = replace(entry.spec, fan=fan, why=why, guess=spec.guess, check=spec.check)
        return specs

    def _inverted(self, spec: FillSpec, device: str) -> tuple[Sequence[Tensor], Contents, str]:
        """The parts of a weight, what they hold, and why there are none."""
        recording = Recording(())
        try:
            with warnings.catch_warnings(), kept_generators(), torch.no_grad(), torch.device(device):
                warnings.simplefilter("ignore")
                weight = torch.empty_like(self.ref.tensor, device=device)
                if device != "meta":
                    weight.copy_(sample_of(spec, self.ref.tensor))
                _write(recording.contents, weight, spec)
                with stand_ins(self.ref.module), recording.modes():
                    return list(self.invert(weight)), recording.contents, ""
        except Exception as error:
            return (), recording.contents, f"{error or type(error).__name__}".splitlines()[0]


_SMALL = 1 << 22  # elements of a weight that is drawn to see what a right_inverse does


def _write(contents: Contents, weight: Tensor, spec: FillSpec) -> None:
    """Note what a weight starts with."""
    if spec.program is not None:
        node = Nested(spec.program, tuple(weight.shape), weight.dtype)
        contents.write(weight, computed(spec.why), node)
    for part, distribution in spec.fills:
        place = weight if part is None else weight.narrow(*part)
        draw = contents.new_draw()
        value = Value(distribution, spec.why, spec.fan, draw)
        contents.write(place, whole(value), Filled(tuple(place.shape), place.dtype, distribution, *draw))


@contextmanager
def made_weights(model: nn.Module, rename: Callable[[str], str]) -> Iterator[list[MadeWeight]]:
    """The weights of a model that parameters make up; inside it, each is registered in its layer as a parameter.

    Args:
        model: the model.
        rename: gives the name in the whole model.
    """
    found: list[MadeWeight] = []
    seen: set[int] = set()
    undo: list[Callable[[], object]] = []
    try:
        for module_name, module in walk(model):
            if id(module) in seen:
                continue
            seen.add(id(module))
            for attribute, shape, parts, invert, how in _of_module(module):
                name = rename(f"{module_name}.{attribute}".lstrip("."))
                stand_in = nn.Parameter(torch.empty(shape[0], dtype=shape[1], device="meta"))
                ref = TensorRef(
                    name,
                    (name,),
                    stand_in,
                    module,
                    attribute,
                    name.rpartition(".")[0],
                    ((module, attribute),),
                    True,
                    "plain",
                )
                found.append(MadeWeight(ref, parts, invert, how))
                if attribute in vars(module):  # of a hook: torch's own code writes into a temporary
                    undo.append(functools.partial(vars(module).__setitem__, attribute, vars(module)[attribute]))
                    vars(module)[attribute] = torch.empty(shape[0], dtype=shape[1], device="meta")
                undo.append(functools.partial(module._parameters.pop, attribute, None))
                module._parameters[attribute] = stand_in
        yield found
    finally:
        for step in reversed(undo):
            step()


def _of_module(module: nn.Module) -> Iterator[tuple[str, tuple[Any, torch.dtype], Any, Any, str]]:
    """(attribute, (shape, dtype), parts, what inverts, how) of the weights of a module that parameters make up."""
    parts: tuple[tuple[nn.Module, str], ...]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            held = module._parameters[f"{hook.name}_v"]
            parts = ((module, f"{hook.name}_g"), (module, f"{hook.name}_v"))
            yield (
                hook.name,
                _form(held),
                parts,
                lambda w, d=hook.dim: (torch.norm_except_dim(w, 2, d), w),
                "weight_norm",
            )
        elif isinstance(hook, SpectralNorm):
            held = module._parameters[f"{hook.name}_orig"]
            parts = tuple((module, f"{hook.name}_{part}") for part in ("orig", "u", "v"))
            yield hook.name, _form(held), parts, lambda w, h=hook: _spectral(h, w), "spectral_norm"
    if "parametrizations" in module._modules and parametrize.is_parametrized(module):
        for attribute, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            parts = tuple(
                (chain, name) for name in (*chain._parameters, *chain._buffers) if name.startswith("original")
            )
            parts += tuple((step, name) for step in chain for name in _BUFFERS if name in step._buffers)
            form = _computed_form(module, attribute, chain)
            if form is not None and any(name in chain._parameters for _, name in parts):
                how = " and ".join(class_name(step).lstrip("_") for step in chain)
                yield attribute, form, parts, lambda w, c=chain: _inverted(c, w), how


def norm_of_weight(ref: TensorRef) -> bool | None:
    """Whether a parameter is weight_norm's g, the norms of the weight; False for its v, None for any other."""
    steps = list(ref.module) if isinstance(ref.module, parametrize.ParametrizationList) else []
    if len(steps) == 1 and isinstance(steps[0], parametrizations._WeightNorm):
        return ref.attribute == "original0"
    for hook in ref.module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and ref.attribute in (f"{hook.name}_g", f"{hook.name}_v"):
            return ref.attribute == f"{hook.name}_g"
    return None


def _spectral(hook: Any, weight: Tensor) -> list[Tensor]:
    """The weight and the two vectors that torch's older spectral_norm starts with."""
    matrix = hook.reshape_weight_to_matrix(weight)
    return [weight, *(F.normalize(weight.new_empty(n).normal_(0, 1), dim=0, eps=hook.eps) for n in matrix.shape)]


def _form(tensor: Any) -> tuple[Any, torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _computed_form(module: nn.Module, attribute: str, chain: Any) -> tuple[Any, torch.dtype] | None:
    """Shape and dtype of what a parametrisation makes."""
    if chain.is_tensor:
        original = chain.original
        if all(isinstance(step, _KEEPING_SHAPE) for step in chain):
            return _form(original)
    elif len(chain) == 1 and isinstance(chain[0], parametrizations._WeightNorm):
        return _form(chain.original1)
    with stand_ins(module), torch.no_grad(), torch.device("meta"), kept_generators():
        try:
            return _form(chain())
        except Exception:
            return _form(chain.original) if chain.is_tensor else None


_BUFFERS = ("_u", "_v", "base")  # of torch's own parametrisations, that go with the weight
_KEEPING_SHAPE = (parametrizations._SpectralNorm, parametrizations._Orthogonal)


def _inverted(chain: Any, weight: Tensor) -> list[Tensor]:
    """What a list of parametrisations is made of, for a weight."""
    value: Any = weight
    for step in reversed(chain):
        if not hasattr(step, "right_inverse"):
            raise NotImplementedError(
                f"{class_name(step)} has no right_inverse, which would say what it is for a weight"
            )
        value = step.right_inverse(value)
    found = [value] if isinstance(value, Tensor) else list(value)
    for step in chain:
        if isinstance(step, parametrizations._SpectralNorm) and "_u" in step._buffers:
            fresh = parametrizations._SpectralNorm(weight, step.n_power_iterations, step.dim, step.eps)
            found += [fresh._u, fresh._v]
        elif "base" in step._buffers:
            found.append(step._buffers["base"])
    return found


def refresh_hooks(model: nn.Module) -> None:
    """What hooks keep of a weight, made anew: torch does so in the next forward."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm) and not module._parameters[f"{hook.name}_v"].is_meta:  # type: ignore[union-attr]
                setattr(module, hook.name, hook.compute_weight(module))
            elif isinstance(hook, SpectralNorm) and not module._parameters[f"{hook.name}_orig"].is_meta:  # type: ignore[union-attr]
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
