"""Stands in for Triton's driver: a launch is described, its arguments converted as the real launcher does, and run.

The target is a compute capability of ours. Triton compiles as far as PTX; the assembler is left out.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import expand_signature, make_tensordesc_arg
from triton.compiler import compiler as triton_compiler
from triton.runtime import driver as triton_driver

from .hopper import TensorMap
from .memory import Fault

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes that a block may have, by capability
GRID_LIMIT = (2**31 - 1, 65535, 65535)

# Triton 3.9's functions serve AMD too: one asks what a descriptor is called, the other for what NVIDIA's does not use.
_DESCRIPTOR_TYPE = ("nvTmaDesc",)[: len(signature(expand_signature).parameters) - 2]
_UNUSED = (None,)[: len(signature(make_tensordesc_arg).parameters) - 2]


class Argument(NamedTuple):
    kind: str  # i32, u64, fp32, nvTmaDesc, ...
    value: Any
    tensor: torch.Tensor | None


class Launch(NamedTuple):
    """What cuLaunchKernel would be given."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: list[Argument]
    signature: dict[str, str]  # of the kernel's arguments, as Triton typed them


class _Utils:
    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self._capability], "multiprocessor_count": 4}

    def fill_tma_descriptor_tiled(self, *args: Any) -> TensorMap:
        return TensorMap(*args)


class EmulatedDriver:
    """The part of Triton's driver that a launch needs."""

    def __init__(self, capability: int) -> None:
        self.capability, self.utils = capability, _Utils(capability)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # so that each capability has kernels of its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu


def install(capability: int, execute) -> None:
    """Let `execute` run every launch, compiled for a compute capability (80, 90, ...)."""
    triton_driver.set_active(EmulatedDriver(capability))
    triton_compiler.CompiledKernel._init_handles = _prepared_by(execute)
    if "_emulated" not in CUDABackend.__dict__:
        CUDABackend._emulated = True
        add_stages, make_hash = CUDABackend.add_stages, CUDABackend.hash

        def without_assembler(self, stages, options, language):
            add_stages(self, stages, options, language)
            stages["cubin"] = lambda source, metadata: b""

        CUDABackend.add_stages = without_assembler
        CUDABackend.hash = lambda self: f"{make_hash(self)}-emulated"  # Triton's cache must not mix them up


def _prepared_by(execute):
    def init_handles(kernel) -> None:
        if kernel.module is not None:
            return
        metadata, capability = kernel.metadata, triton_driver.active.capability
        if metadata.shared > SHARED_LIMIT[capability]:
            raise RuntimeError(f"{metadata.name} needs {metadata.shared} bytes of shared memory")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError(f"{metadata.name} needs scratch memory")
        kernel.module, kernel.function = "emulated", id(kernel)
        kernel._run = _launcher(kernel, execute)

    return init_handles


def _launcher(kernel, execute):
    kinds = list(kernel.src.signature.values())
    layouts = getattr(kernel.metadata, "tensordesc_meta", None)
    expanded = expand_signature(kinds, layouts, *_DESCRIPTOR_TYPE)

    def run(grid_x, grid_y, grid_z, stream, function, packed, launch_metadata, enter, leave, *values):
        if len(values) != len(kinds):
            raise TypeError(f"{kernel.metadata.name} takes {len(kinds)} arguments, and was given {len(values)}")
        remaining = iter(layouts or ())
        flat: list[Any] = []
        for kind, value in zip(kinds, values, strict=True):
            is_descriptor = isinstance(kind, str) and kind.startswith("tensordesc")
            flat += make_tensordesc_arg(value, next(remaining, None), *_UNUSED) if is_descriptor else [value]
        arguments = [_converted(k, v) for k, v in zip(expanded, flat, strict=True) if k != "constexpr"]
        scratch = [Argument("u64", 0, None)] * 2
        grid = (grid_x, grid_y, grid_z)
        if not all(0 <= size <= limit for size, limit in zip(grid, GRID_LIMIT, strict=True)):
            raise RuntimeError(f"{kernel.metadata.name}: invalid argument: a grid of {grid}")
        if 0 in grid:  # Triton's launcher leaves it out
            return
        metadata = kernel.metadata
        execute(
            Launch(
                metadata.name, kernel.asm["ptx"], grid, 32 * metadata.num_warps, metadata.shared,
                arguments + scratch, kernel.src.signature,
            )
        )  # fmt: skip

    return run


def _converted(kind: str, value: Any) -> Argument:
    """As Triton's launcher, in C, does, which checks integers. It would cut reals to float32; here that raises."""
    if kind == "nvTmaDesc":
        return Argument(kind, value, None)
    if kind[0] == "*":
        return Argument("u64", value.data_ptr(), value)
    if kind in ("fp32", "fp64"):
        if kind == "fp32" and float(np.float32(value)) != value:
            raise Fault(f"an argument is cut from {value} to float32")
        return Argument(kind, float(value), None)
    if kind[0] not in "iu":
        raise NotImplementedError(f"an argument of type {kind}")
    width = 8 if kind == "i1" else int(kind[1:])
    low, high = (-(1 << width - 1), 1 << width - 1) if kind[0] == "i" else (0, 1 << width)
    if not low <= int(value) < high:
        raise OverflowError(f"{value} as {kind}")
    return Argument(f"i{width}", int(value), None)
