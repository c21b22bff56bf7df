"""What the tests of pages share."""

import pytest


@pytest.fixture(autouse=True)
def quiet_machine(one_thread, unhurried):
    """Tensors are small here, and no verdict depends on how fast they are."""
