"""The fourth set: 53 faults and 38 healthy models by somebody who knew the docs' page and nothing else, as they were
written. Each fault says which kinds of cause are right, and names any of which a right answer points at."""

from ..described import made
from . import faults_a, faults_b, faults_c, healthy

FAULTS = [fault for module in (faults_a, faults_b, faults_c) for fault in made(module, "fault_", "fourth")]
HEALTHY = made(healthy, "healthy_", "fourth")
