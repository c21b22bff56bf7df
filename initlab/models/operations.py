"""What an operation of torch makes of what its operands hold: distributions, constants, or values that it computes."""

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from initlab.kernels import Constant, Distribution, Normal, Uniform

from ..distributed.dtensors import is_dtensor
from .arithmetic import affine, clamped, inverse_error
from .contents import Contents, Fills, Value, computed, literal, whole
from .programs import Call, Filled, Node, Picked, Stream, Unknown, draws_of, written_places, written_tensors
from .specs import DimSlice

_NUMBER = int | float
_FACTORIES = {
    "zeros": 0.0,
    "zeros_like": 0.0,
    "new_zeros": 0.0,
    "zero": 0.0,
    "_efficientzerotensor": 0.0,
} | dict.fromkeys(("ones", "ones_like", "new_ones"), 1.0)
_COPIES = frozenset({"clone", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "detach_copy", "alias_copy"})
_EMPTY = frozenset(
    {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "empty_quantized"}
)
# In place, but not on values.
_KEEPING = frozenset(
    {"set", "resize", "resize_as", "as_strided", "squeeze", "unsqueeze", "t", "transpose", "swapaxes", "swapdims"}
    | {"detach", "requires_grad", "retain_grad", "rename"}
)
# What they write does not depend on what was there.
_OVERWRITING = frozenset(
    {"copy", "fill", "zero", "normal", "uniform", "exponential", "cauchy", "geometric", "log_normal", "random"}
    | {"bernoulli"}
)
# Of equal elements they make equal elements.
_REARRANGING = frozenset(
    {"cat", "stack", "repeat", "repeat_interleave", "expand_copy", "index_select", "index", "select_copy", "slice_copy"}
    | {"flip", "roll", "permute_copy", "transpose_copy", "t_copy", "view_copy", "_reshape_copy", "tile", "gather"}
    | {"unfold_copy", "diagonal_copy", "masked_select", "take"}
)


class OutOfReach(Exception):
    """Code that runs on stand-ins reached for what they stand for, or for what others hold."""


class Operations:
    """Follows calls of torch's operators, and enters into the contents what they write.

    Args:
        contents: what is where.
        where: names the code that is running.
        guarded: storages that the code must not reach; with them, it may not write to foreign memory either.
    """

    def __init__(self, contents: Contents, where: Callable[[], str], guarded: Collection[int] | None = None) -> None:
        self.contents = contents
        self.where = where
        self.guarded = guarded
        self.numbers: set[float] = set()  # that the code has read from random values
        self.generators: dict[int, tuple[Any, Tensor, Call]] = {}  # of the code's own: their last state and call

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Make a call and enter what it wrote."""
        schema = func._schema
        name = schema.name.rpartition("::")[2]
        written = list(written_tensors(schema, args, kwargs))
        if self.guarded is not None:
            self._refuse_guarded(args, kwargs, written)
        call = functools.partial(self._made, name, args, kwargs, call)
        if not written:
            drawn = self._own_generator(kwargs)
            result = call()
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            inputs = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            new = [(i, t) for i, t in enumerate(made) if _storage(t) not in inputs]
            noted = _Noted(self, func, args, kwargs, drawn, [])
            for index, tensor in new:
                self._enter(tensor, index, name, func, args, kwargs, len(new) == 1, noted)
            if name == "_local_scalar_dense" and isinstance(result, float) and self._is_random(args[0]):
                self.numbers.add(result)
            return result
        base = name if name.startswith("__") else name.rstrip("_")
        if base in _KEEPING:
            result = call()
            if base == "set" and not self.contents.is_known(args[0]):
                self.contents.make(args[0], data=True)
            return result
        count = self.contents.draws
        fills = [self._after(t, base, func, args, kwargs, len(written) == 1) for t in written]  # operands are read now
        fresh = self.contents.draws > count
        noted = _Noted(self, func, args, kwargs, self._own_generator(kwargs), written)
        nodes = [
            None if found is None else _simple(t, found, fresh) or noted.node(i, t)
            for i, (t, found) in enumerate(zip(written, fills, strict=True))
        ]
        result = call()
        noted.done()
        for tensor, found, node in zip(written, fills, nodes, strict=True):
            if found is not None:
                self.contents.write(tensor, _as_dtype(found, tensor.dtype), node)
        return result

    def _enter(
        self, tensor: Tensor, index: int, name: str, func: Any, args: Any, kwargs: Any, alone: bool, noted: "_Noted"
    ) -> None:
        if name in _EMPTY:
            self.contents.make(tensor)
        elif name in ("lift_fresh", "lift_fresh_copy") and not self.contents.is_known(args[0]):
            self.contents.write(tensor, literal(tensor.detach(), self.where()), self.contents.literal(tensor))
        else:
            count = self.contents.draws
            fills = self._after(tensor, name, func, args, kwargs, alone)
            if fills:
                node = _simple(tensor, fills, self.contents.draws > count) or noted.node(index, tensor)
                self.contents.write(tensor, _as_dtype(fills, tensor.dtype), node)
            else:
                self.contents.make(tensor)
        noted.done()

    def _made(self, name: str, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        """Make a call. Where it fails on the meta device, code may go on without it, as it would not elsewhere."""
        try:
            return call()
        except (NotImplementedError, RuntimeError):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor.is_meta and self.contents.is_known(tensor):
                    why = (
                        f"{self.where()} goes on although {name} fails on the meta device: record the build on the CPU"
                    )
                    self.contents.write(tensor, computed(why), Unknown(why))
            raise

    def _refuse_guarded(self, args: Any, kwargs: Any, written: list[Tensor]) -> None:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and _storage(tensor) in self.guarded:  # type: ignore[operator]
                raise OutOfReach("it uses a parameter or buffer that it keeps elsewhere as well")
        for tensor in written:
            if not tensor.is_meta and not self.contents.is_known(tensor):
                raise OutOfReach(f"it writes to a tensor on {tensor.device} that is no parameter or buffer")

    def _is_random(self, tensor: Tensor) -> bool:
        return bool(draws_of(self.contents.node(tensor), {}))

    def _own_generator(self, kwargs: dict[str, Any]) -> Stream | None:
        """The state of the generator that a call brings, before the call; None for torch's default one."""
        generator = kwargs.get("generator")
        if generator is None or generator is torch.default_generator or generator.device.type != "cpu":
            return None
        state = generator.get_state()
        # On the meta device nothing is drawn, and a generator stays where it is.
        _, before, call = self.generators.get(id(generator), (None, None, None))
        return Stream(state, call if before is not None and torch.equal(before, state) else None)

    def _after(
        self, tensor: Tensor, name: str, func: Any, args: Any, kwargs: dict[str, Any], alone: bool
    ) -> Fills | None:
        """What a tensor holds after a call; None where nothing has been written to what it was copied from."""
        try:
            if self.numbers and self._uses_numbers(args, kwargs):
                return computed(f"{self.where()} uses a number that it read from random values")
            if name == "copy" and self._copies_storage(args):
                return None
            if alone:
                found = self._known(tensor, name, func, args, kwargs)
                if found is not None:
                    return found
                found = self._of_constants(tensor, name, func, args, kwargs)
                if found is not None:
                    return found
            if name in _COPIES and self._read(args[0]) == ():
                return None
        except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
            pass  # what is not understood must not end the build: it is refused later, by name
        return computed(f"{self.where()} computes it, by {name}")

    def _uses_numbers(self, args: Any, kwargs: Any) -> bool:
        return any(isinstance(x, float) and x in self.numbers for x in tree_leaves((args, kwargs)))

    def _copies_storage(self, args: Any) -> bool:
        target, source = args[:2]
        if target.dtype != torch.uint8 or source.dtype != torch.uint8:
            return False
        return self.contents.copy_storage(target, source)

    def _read(self, tensor: Tensor) -> Fills:
        """What an operand holds; of one that nobody here made, its data."""
        found = self.contents.read(tensor)
        return literal(tensor.detach(), self.where()) if found is None else found

    def _number(self, operand: Any) -> float | None:
        """An operand that is one number: as such, or as a tensor of one."""
        if isinstance(operand, _NUMBER):
            return float(operand)
        if isinstance(operand, Tensor):
            value = self._constant(operand)
            if value is not None and not isinstance(value, complex):
                return float(value)
        return None

    def _constant(self, tensor: Tensor) -> Any:
        """The number that a tensor holds all over; None if there is none."""
        fills = self._read(tensor)
        found = fills[0][1].distribution if len(fills) == 1 and fills[0][0] is None else None
        return found.value if isinstance(found, Constant) else None

    def _sampled(self, distribution: Callable[[], Distribution], kwargs: dict[str, Any]) -> Fills:
        generator = kwargs.get("generator")
        if generator is not None and generator is not torch.default_generator:
            return computed(f"{self.where()} draws it from a generator of its own, which fixes the values")
        try:
            return whole(Value(distribution(), self.where(), draws=self.contents.new_draw()))
        except (RuntimeError, ValueError) as error:
            return computed(f"{self.where()}: {error}")

    def _known(self, tensor: Tensor, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Fills | None:
        """Sampling, constants, copies and arithmetic with numbers."""
        if name in ("randn", "randn_like"):
            return self._sampled(lambda: Normal(0.0, 1.0), kwargs)
        if name in ("rand", "rand_like"):
            return self._sampled(lambda: Uniform(0.0, 1.0), kwargs)
        if name == "uniform":
            bounds = [*args[1:], *(0.0, 1.0)[len(args) - 1 :]]
            low, high = bounds[:2]
            low, high = kwargs.get("from", low), kwargs.get("to", high)
            return self._sampled(lambda: Uniform(low, high), kwargs)
        if name == "normal":
            return self._normal(func._schema.name == "aten::normal_", args, kwargs)
        if name in _FACTORIES:
            return whole(Value(Constant(_FACTORIES[name]), self.where()))
        if name in ("full", "full_like", "new_full", "fill", "scalar_tensor"):
            index = {"new_full": 2, "scalar_tensor": 0}.get(name, 1)
            value = args[index] if len(args) > index else kwargs.get("fill_value", kwargs.get("value"))
            constant = self._constant(value) if isinstance(value, Tensor) else value
            return None if constant is None else whole(Value(Constant(constant), self.where()))
        if name in _COPIES or name == "copy":
            return self._copied(tensor, args[1] if name == "copy" else args[0])
        if name == "cat":
            return self._joined(args[0], int(args[1]) if len(args) > 1 else int(kwargs.get("dim", 0)), tensor)
        return self._mapped(tensor, name, args, kwargs)

    def _normal(self, in_place: bool, args: Any, kwargs: dict[str, Any]) -> Fills | None:
        operands = list(args[1:] if in_place else args)
        mean = operands[0] if operands else kwargs.get("mean", 0.0)
        std = operands[1] if len(operands) > 1 else kwargs.get("std", 1.0)
        numbers: list[Any] = [self._number(x) for x in (mean, std)]
        if None in numbers:
            return None
        return self._sampled(lambda: Normal(*numbers), kwargs)

    def _copied(self, tensor: Tensor, source: Tensor) -> Fills | None:
        fills = self._read(source)
        if not fills:
            return None
        if all(isinstance(value.distribution, Constant) for _, value in fills) and len(fills) == 1:
            return self._renamed(fills)
        shapes = [tuple(t.shape) for t in (tensor, source)]
        if tuple(n for n in shapes[0] if n > 1) != tuple(n for n in shapes[1] if n > 1):
            return None
        if shapes[0] != shapes[1] and len(fills) > 1:
            return None
        return self._renamed(fills)

    def _renamed(self, fills: Fills) -> Fills:
        return tuple(
            (part, value if value.distribution is None else replace(value, why=self.where())) for part, value in fills
        )

    def _joined(self, tensors: Any, dim: int, result: Tensor) -> Fills | None:
        """What torch.cat makes: a slice for each of its operands."""
        dim, start, found = dim % max(1, result.dim()), 0, []
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            fills = self._read(tensor)
            if len(fills) != 1 or fills[0][0] is not None or fills[0][1].distribution is None:
                return None
            found.append((DimSlice(dim, start, tensor.shape[dim]), fills[0][1]))
            start += tensor.shape[dim]
        if len({value.distribution for _, value in found}) == 1 and isinstance(found[0][1].distribution, Constant):
            return whole(found[0][1])
        return tuple(found)

    def _mapped(self, tensor: Tensor, name: str, args: Any, kwargs: dict[str, Any]) -> Fills | None:
        """What arithmetic with numbers makes of one operand that is the tensor's shape."""
        operands = [args[0], *args[1:2]] if args else []
        if name == "mul" and len(operands) == 2 and self._number(operands[1]) is None:
            operands.reverse()
        if name == "add" and len(operands) == 2 and self._number(operands[1]) is None and not kwargs:
            operands.reverse()
        first = operands[0] if operands else None
        if not isinstance(first, Tensor) or first.shape != tensor.shape:
            return None
        change = self._change(name, operands[1:], args, kwargs)
        if change is None:
            return None
        did = f"{name} {[self._number(x) for x in args]} {kwargs}"  # copies are equal where the same was done to them
        found: list[tuple[DimSlice | None, Value]] = []
        for part, value in self._read(first):
            if value.distribution is None:
                return None
            after = change(value.distribution)
            if after is None:
                return None
            path = (*value.path, did)
            found.append((part, replace(value, distribution=after, why=self.where(), path=path)))
        return tuple(found) or None

    def _change(
        self, name: str, others: list[Any], args: Any, kwargs: dict[str, Any]
    ) -> Callable[[Distribution], Distribution | None] | None:
        if name == "erfinv":
            return inverse_error
        if name == "neg":
            return lambda distribution: affine(distribution, -1.0, 0.0)
        if name in ("clamp", "clamp_min", "clamp_max"):
            bounds = [*args[1:3], None, None]
            low, high = bounds[0], bounds[1]
            if name == "clamp_max":
                low, high = None, low
            low, high = kwargs.get("min", low), kwargs.get("max", high)
            if not all(x is None or isinstance(x, _NUMBER) for x in (low, high)):
                return None
            return lambda distribution: clamped(
                distribution, -math.inf if low is None else low, math.inf if high is None else high
            )
        number = self._number(others[0]) if others else None
        if number is None:
            return None
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 and name in ("add", "sub", "rsub") else 1)
        if name == "mul":
            return lambda distribution: affine(distribution, number, 0.0)
        if name == "div" and number != 0 and kwargs.get("rounding_mode") is None:
            return lambda distribution: affine(distribution, 1.0 / number, 0.0)
        if name == "add":
            return lambda distribution: affine(distribution, 1.0, number * alpha)
        if name == "sub":
            return lambda distribution: affine(distribution, 1.0, -number * alpha)
        if name == "rsub":
            return lambda distribution: affine(distribution, -float(alpha), number)
        return None

    def _of_constants(self, tensor: Tensor, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Fills | None:
        """What an operation on single elements, or one that moves them about, makes of tensors of equal elements."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None
        kwargs = {key: value for key, value in kwargs.items() if key not in ("out", "device", "memory_format")}
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in _REARRANGING:
            operands = [t for t in operands if t.dtype.is_floating_point or t.dtype.is_complex] or operands
        elif torch.Tag.pointwise not in func.tags:
            return None
        values = {id(t): self._constant(t) for t in operands}
        if not operands or None in values.values():
            return None
        if name in _REARRANGING:
            found = set(values.values())
            return whole(Value(Constant(found.pop()), self.where())) if len(found) == 1 else None

        def element(x: Any) -> Any:
            return torch.full((), values[id(x)], dtype=x.dtype, device="cpu") if isinstance(x, Tensor) else x

        try:
            result = func(*tree_map(element, args), **tree_map(element, kwargs))
            return whole(Value(Constant(result.item()), self.where()))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None


def _as_dtype(fills: Fills, dtype: torch.dtype) -> Fills:
    """The fills as a tensor of this dtype holds them."""
    if dtype.is_floating_point or dtype.is_complex:
        return fills
    found: list[tuple[DimSlice | None, Value]] = []
    for part, value in fills:
        if isinstance(value.distribution, Constant):
            cast = torch.full((), value.distribution.value, device="cpu").to(dtype).item()
            value = replace(value, distribution=Constant(cast))
        elif value.distribution is not None:
            value = Value(None, f"{value.why} makes integers of random numbers")
        found.append((part, value))
    return tuple(found)


def _simple(tensor: Tensor, fills: Fills, fresh: bool) -> Node | None:
    """How a tensor is computed that one distribution or constant fills; None for any other."""
    part, value = fills[0]
    if len(fills) > 1 or part is not None or value.distribution is None or tensor.is_nested:
        return None
    if isinstance(value.distribution, Constant):
        return Filled(tuple(tensor.shape), tensor.dtype, value.distribution)
    return Filled(tuple(tensor.shape), tensor.dtype, value.distribution, value.draws[0]) if fresh else None


class _Noted:
    """One call of an operator, noted when somebody asks for what it makes."""

    def __init__(
        self, of: Operations, func: Any, args: Any, kwargs: dict[str, Any], own: Stream | None, written: list[Tensor]
    ) -> None:
        self.of, self.func, self.args, self.kwargs, self.own, self.written = of, func, args, kwargs, own, written
        self.call: Call | None = None
        self.why = ""

    def node(self, index: int, tensor: Tensor) -> Node:
        """Of the tensor that it writes or returns at an index."""
        if self.call is None and not self.why:
            try:
                self._note(tensor)
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                self.why = f"{self.of.where()} computes it in a way that cannot be followed: {error}".splitlines()[0]
        if self.call is None or tensor.is_nested or is_dtensor(tensor) or tensor.layout != torch.strided:
            return Unknown(self.why or "it is no plain tensor")
        return Picked(self.call, index, tuple(tensor.shape), tensor.dtype)

    def _note(self, tensor: Tensor) -> None:
        of, contents, func, kwargs = self.of, self.of.contents, self.func, dict(self.kwargs)
        if of.numbers and of._uses_numbers(self.args, kwargs):
            self.why = f"{of.where()} uses a number that it read from random values"
            return
        generator = kwargs.pop("generator", None)
        own = self.own
        if own is None and generator is not None and generator is not torch.default_generator:
            self.why = f"{of.where()} draws it from a generator on {generator.device}"
            return
        args = list(self.args)
        name = func._schema.name.rpartition("::")[2]
        new = [
            (c, k)
            for c, k in written_places(func._schema, args, kwargs)
            if name.rstrip("_") in _OVERWRITING or k == "out"
        ]
        for container, place in new:
            container[place] = tree_map(
                lambda x: Filled(tuple(x.shape), x.dtype, None) if isinstance(x, Tensor) else x, container[place]
            )

        def noted(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return contents.node(x) if isinstance(x, Tensor) else x

        operands = tree_map(noted, (tuple(args), kwargs), is_leaf=lambda x: isinstance(x, Filled))
        args, kwargs = operands
        kwargs.pop("pin_memory", None)
        names = {argument.name for argument in func._schema.arguments}
        if {"dtype", "device"} <= names and kwargs.get("dtype") is None and not self.written:
            kwargs["dtype"] = tensor.dtype  # not what the default is by then
        if "device" in names:
            kwargs["device"] = torch.device("cpu")
        random = torch.Tag.nondeterministic_seeded in func.tags and own is None
        self.call = Call(func, args, kwargs, contents.new_draw()[0] if random else 0, own)

    def done(self) -> None:
        """The call has been made."""
        generator = self.kwargs.get("generator")
        if self.own is None or generator is None:
            return
        state = generator.get_state()
        if torch.equal(state, self.own.state) and self.call is not None:
            self.of.generators[id(generator)] = generator, state, self.call
        else:
            self.of.generators.pop(id(generator), None)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return -id(tensor)
