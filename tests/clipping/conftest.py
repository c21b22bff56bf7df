"""What the tests of clipping share."""

import pytest


@pytest.fixture(autouse=True)
def quiet_machine(one_thread):
    """Tensors are small here."""
