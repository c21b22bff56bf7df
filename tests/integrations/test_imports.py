"""What importing initlab.integrations loads, and what it does where nothing of it is installed."""

import pytest

PACKAGES = ["lightning", "pytorch_lightning", "transformers", "accelerate"]


def test_nothing_is_imported_before_it_is_used(python):
    script = f"import sys, initlab.integrations\nprint([name for name in {PACKAGES} if name in sys.modules])"
    assert python(script) == "[]\n"


@pytest.mark.long
def test_modules_can_be_imported_where_their_packages_are_missing(python):
    """Tools that list or document a package import all of it."""
    script = f"""
import sys
sys.modules.update(dict.fromkeys({[*PACKAGES, "lightning.pytorch"]}))
from initlab.integrations.lightning import GradClipperCallback
from initlab.integrations.transformers import GradClipperMixin
print(GradClipperCallback(1.0).clippers)
"""
    assert python(script) == "[]\n"
