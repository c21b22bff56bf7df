"""The run with a safe form in place of an operation: what the user's own code would do once it is changed.

No pasted code reaches into a forward(), so nothing of this counts as tried.
"""

from __future__ import annotations

import dataclasses

from . import fixes, trials
from .budget import Budget
from .checks import Finding
from .probes import TrainingStep
from .report import Cause
from .safe_forms import Substitution


def emulated(training_step: TrainingStep, found: list[Finding], causes: list[Cause], budget: Budget) -> list[Cause]:
    """The causes; the first with the losses of a run with the safe form of its operation, where these fall."""
    if not causes or causes[0].tried or not budget.allows_a_run():
        return causes
    first = causes[0]
    own = (one for one in found if (one.kind, one.place) == (first.kind, first.place) and one.form is not None)
    finding = next(own, None)
    if finding is None or finding.form is None or finding.form.call is None or first.place.op is None:
        return causes
    module, op = first.place.module, first.place.op
    training_step.snapshot.restore()
    substitution = Substitution(training_step.model, module, op, finding.form)
    try:
        with substitution:
            outcome = trials.train(training_step, training_step.loss_fn, budget)
    except Exception:  # the safe form does not fit what the operation gets here
        return causes
    finally:
        training_step.snapshot.restore()
    if outcome.effect != "falls" or not substitution.count:
        return causes
    (remedy, *_) = fixes.advice(finding.form, op, module)
    return [dataclasses.replace(first, remedy=remedy, emulated=outcome.losses), *causes[1:]]
