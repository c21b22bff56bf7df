"""What the tests of other people's libraries share."""

import sys

import pytest


@pytest.fixture(autouse=True)
def nothing_left_of_accelerate():
    """All Accelerators of a process share their state, the count of accumulated batches among it."""
    _forget()
    yield
    _forget()


def _forget():
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
