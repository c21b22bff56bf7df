"""The fifth set: 47 faults and 39 healthy models by somebody who knew the docs' page and nothing else, as they were
written. Each fault says which kinds of cause are right, and names any of which a right answer points at."""

from ..described import made
from . import faults_a, faults_b, healthy

FAULTS = [fault for module in (faults_a, faults_b) for fault in made(module, "fault_", "fifth")]
HEALTHY = made(healthy, "healthy_", "fifth")
