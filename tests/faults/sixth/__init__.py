"""The sixth set: 25 faults and 20 healthy models by somebody who knew the docs' page and nothing else, and was asked
for what it does not spell out. As they were written; each fault says which kinds of cause are right, and names any of
which a right answer points at."""

from ..described import made
from . import faults, healthy

FAULTS = made(faults, "fault_", "sixth")
HEALTHY = made(healthy, "healthy_", "sixth")
