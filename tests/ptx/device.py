"""Lets the package's Triton kernels serve CPU tensors on an emulated GPU.

To be installed before triton is imported, and without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools

from initlab.kernels import _linear_triton, _nonfinite_triton, _norms_table_triton, backends
from initlab.kernels._common_triton import INTERPRETED
from initlab.kernels.norms import DTYPES
from initlab.kernels.sampling import _triton as sampling

from . import driver, launch

NUM_SMS = 3  # few, so that programs take several tiles and blocks each


def install(capability: int) -> None:
    """Emulate a GPU of compute capability 80, 90, 100 or 120."""
    if INTERPRETED:
        raise RuntimeError("Triton's kernels are interpreted in this process: unset TRITON_INTERPRET")
    driver.install(capability, launch.execute)
    major = {80: 8, 90: 9, 100: 10, 120: 8}[capability]
    backends.interpreted = functools.cache(lambda: True)  # Triton may serve CPU tensors
    _linear_triton._device = lambda index: (major, NUM_SMS)
    _nonfinite_triton._max_programs = lambda device: NUM_SMS
    _tell_pointees()


def _tell_pointees() -> None:
    """Tables hold addresses: their tensors get an attribute that says what these point to."""
    launch_fill, make_plan = sampling._launch, _norms_table_triton.make_plan

    def launch_with_pointees(fill, table, *arguments):
        size = fill.group.dtype.itemsize
        table.pointees = [(ptr, run.numel * size) for ptr, run in zip(fill.ptrs, fill.runs, strict=True)]
        launch_fill(fill, table, *arguments)

    def plan_with_pointees(rows, *arguments):
        plan = make_plan(rows, *arguments)
        address, length, code, _ = rows.tolist()
        plan.table.pointees = [
            (start, count * DTYPES[c].itemsize) for start, count, c in zip(address, length, code, strict=True)
        ]
        return plan

    sampling._launch, _norms_table_triton.make_plan = launch_with_pointees, plan_with_pointees
