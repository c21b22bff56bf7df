"""The checks in the order in which one cause leads to the next, and what remains of their findings.

What is not initialised, bad data, low precision, the loss function, the scale of the data, starting weights, gradients,
operations, the step.
"""

from __future__ import annotations

from ..evidence import Evidence
from .cutoffs import flat, much_noise, not_smooth, wrong_backward
from .data import (
    bad_input,
    bad_target,
    inverted_mask,
    log_of_target,
    same_rows,
    scale,
    target_out_of_range,
    target_scale,
)
from .errors import bad_argument, bad_index, bad_matrix
from .finding import Check, Finding
from .interventions import lost_moments
from .layout import batch_as_time, merged_rows, refused_shape, single_numbers, softmax_over_rows
from .objective import (
    apart,
    broadcast,
    constant_derivative,
    empty_reduction,
    pushes_away,
    unreachable,
    unseen_noise,
    wrong_space,
)
from .operations import raised, unexplained, unsafe
from .precision import overflow, underflow, vanished_eps
from .progress import (
    detached,
    no_gradient,
    no_rate,
    other_parameters,
    own_step,
    rounded_away,
    too_slow,
    turned_round,
    upside_down,
)
from .recurrence import forgotten, growing_state
from .start import never_written, nowhere, spoilt_state
from .step import exploding_gradient, too_fast
from .weights import dead, growing, loud_factors, shrinking, sure_of_nothing, symmetric

CHECKS: tuple[Check, ...] = (
    nowhere,
    never_written,
    spoilt_state,
    bad_input,
    bad_index,
    refused_shape,
    batch_as_time,
    merged_rows,
    same_rows,
    inverted_mask,
    bad_target,
    target_out_of_range,
    vanished_eps,
    overflow,
    log_of_target,
    wrong_space,
    apart,
    unreachable,
    broadcast,
    empty_reduction,
    unseen_noise,
    constant_derivative,
    single_numbers,
    softmax_over_rows,
    wrong_backward,
    pushes_away,
    flat,
    not_smooth,
    much_noise,
    lost_moments,
    scale,
    target_scale,
    symmetric,
    dead,
    growing_state,
    growing,
    loud_factors,
    exploding_gradient,
    unsafe,
    bad_matrix,
    bad_argument,
    raised,
    no_rate,
    own_step,
    turned_round,
    other_parameters,
    upside_down,
    detached,
    forgotten,
    shrinking,
    sure_of_nothing,
    underflow,
    rounded_away,
    too_fast,
    too_slow,
    no_gradient,
    unexplained,
)


def findings(evidence: Evidence) -> list[Finding]:
    """What the checks find: what is broken first, and then causes before what they cause; one of each kind."""
    found: list[Finding] = []
    for check in CHECKS:
        one = check(evidence)
        if check is no_gradient and any(other.kind == "gradient" for other in found):
            continue
        if check in (no_gradient, unexplained) and any(other.severity == "broken" for other in found):
            continue
        if check is sure_of_nothing and any(other.kind in _MAKE_SURE and not other.suspicion for other in found):
            continue
        if one is not None and not any(_explains(other, one) for other in found):
            found.append(one)
    broken = any(one.severity == "broken" for one in found)
    return sorted(found, key=lambda one: broken and one.severity != "broken" and not one.suspicion)


def of_objective(evidence: Evidence) -> list[Finding]:
    """What is wrong with the loss function that one step shows for certain."""
    found = (check(evidence) for check in (target_out_of_range, wrong_space, apart, broadcast))
    return [one for one in found if one is not None and not one.suspicion][:1]


_MAKE_SURE = ("input", "weights", "loss", "operation", "uninitialised")  # what makes a first loss large, beside a head
_NONFINITE = ("uninitialised", "input", "target", "precision", "loss", "operation", "weights", "gradient")


def _explains(first: Finding, later: Finding) -> bool:
    """Whether a finding is only what another one leads to."""
    if later.kind == first.kind:
        return not (first.suspicion and later.suspicion)
    if first.suspicion:
        return False  # the experiment tells them apart
    if first.severity != "broken":
        return False
    if later.kind in ("loss", "operation") and first.kind in _NONFINITE:
        return True  # the one value that is not finite has one origin
    return later.kind in ("gradient", "learning rate") and first.kind != "learning rate"
