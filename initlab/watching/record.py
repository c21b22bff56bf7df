"""What the hooks record of a call of the model: calls of modules, inspected tensors, flags that were found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr

from initlab.kernels import NEGATIVE_INF, FlagBuffer

from .._tree import Path


def module_label(name: str) -> str:
    """How a report calls a module by its name in the model, which is "" for the model itself."""
    return f"module {name!r}" if name else "the model"


class ModuleInfo(NamedTuple):
    """A watched module, without a reference to the module.

    Args:
        name: in the model; "" for the model itself.
        kind: its class.
        may_put_out_negative_inf: whether the caller of `watch` allows it.
        writes_flag: whether it has a method `write_flag_to`.
    """

    name: str
    kind: str
    may_put_out_negative_inf: bool
    writes_flag: bool

    @property
    def label(self) -> str:
        """How a report calls it."""
        return module_label(self.name)


class ModuleCall:
    """One call of a module.

    Attributes:
        parent: the call of the module that it was called from; None for the outermost.
        called_children: whether it called another module.
        inputs: observations of its arguments.
        state: observations of its parameters and buffers.
        outputs: observations of its outputs; kept where gradients are watched.
        own_flag: the observation of its output and the flag, where the module itself writes its flag.
        unseen: what its output is, where that holds no tensor that can be inspected; else empty.
    """

    __slots__ = ("called_children", "inputs", "module", "outputs", "own_flag", "parent", "state", "unseen")

    def __init__(self, module: ModuleInfo, parent: ModuleCall | None) -> None:
        self.module = module
        self.parent = parent
        self.called_children = False
        self.inputs: list[Observation] = []
        self.state: list[Observation] = []
        self.outputs: list[Observation] = []
        self.own_flag: tuple[Observation, Tensor] | None = None
        self.unseen = ""


class Observation:
    """One inspection of one tensor.

    Attributes:
        call: whose output, input or parameter it was when it was first seen.
        role: "data" (the first tensor of the model's input), "input", "parameter", "buffer", "shard" (what this rank
            itself has of a gathered parameter), "output" or "gradient".
        name: of a parameter or a keyword argument, or the place of an argument; "output".
        path: to the tensor within that argument or output.
        flag: NaN = 1, +inf = 2, -inf = 4, or-ed; 0 until the host knows.
        shard: of a gathered parameter, the observation of this rank's own shard.
        users: calls that read it; kept where gradients are watched.
    """

    __slots__ = ("call", "dtype", "flag", "name", "path", "role", "shard", "users")

    def __init__(self, call: ModuleCall, role: str, name: int | str, path: Path, dtype: torch.dtype) -> None:
        self.call = call
        self.role = role
        self.name = name
        self.path = path
        self.dtype = dtype
        self.flag = 0
        self.shard: Observation | None = None
        self.users: list[ModuleCall] = []

    @property
    def label(self) -> str:
        """The tensor's name within its module: "output[1]", "input 0", "weight"."""
        return f"{'input ' if self.role in ('data', 'input') else ''}{self.name}{keystr(self.path)}"

    @property
    def full_label(self) -> str:
        """The tensor's name within the model."""
        return f"{self.label} of {self.call.module.label}"

    def may_be_fault(self) -> bool:
        """Whether its flag, not 0, may be a fault by itself."""
        if self.role == "output":
            return self.flag != NEGATIVE_INF or not self.call.module.may_put_out_negative_inf
        return self.role == "gradient"


class PassRecord:
    """A call of the model and the backward pass that follows.

    Attributes:
        number: of the call, from 1.
        step: how many steps an optimizer of the model's parameters had taken before it, and 1.
        calls: of modules, in the order in which they began.
        observations: in the order of execution; without shards and gradients.
        gradients: (observation of a gradient, observation of its tensor), in the order of execution.
        buffers: by device, the flags on it and whose they are.
        suspect: whether the host knows of a flag that may be a fault.
    """

    def __init__(self, number: int, step: int) -> None:
        self.number = number
        self.step = step
        self.calls: list[ModuleCall] = []
        self.observations: list[Observation] = []
        self.gradients: list[tuple[Observation, Observation]] = []
        self.buffers: dict[torch.device, tuple[FlagBuffer, list[Observation]]] = {}
        self.suspect = False

    def new_flag(self, device: torch.device, observation: Observation) -> Tensor:
        """A flag on a device for an observation, int32, shape (1,)."""
        if device not in self.buffers:
            self.buffers[device] = FlagBuffer(device), []
        buffer, observations = self.buffers[device]
        observations.append(observation)
        return buffer.new_flag()

    def set_flag(self, observation: Observation, flag: int) -> None:
        """Note a flag that the host has read."""
        if flag:
            observation.flag = flag
            self.suspect |= observation.may_be_fault()

    def send(self) -> None:
        """Start the copy of all flags to the host."""
        for buffer, _ in self.buffers.values():
            buffer.send()

    def landed(self) -> bool:
        """Whether that copy has arrived."""
        return all(buffer.landed() for buffer, _ in self.buffers.values())

    def read_flags(self) -> None:
        """Note the flags as they were when they were sent; waits for the copy."""
        for buffer, observations in self.buffers.values():
            for observation, flag in zip(observations, buffer.flags(), strict=False):  # more may have come since
                self.set_flag(observation, flag)
