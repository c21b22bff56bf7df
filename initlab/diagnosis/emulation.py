"""The run with another form in place of an operation: what the user's own code would do once it is changed.

No pasted code reaches into a forward(), so nothing of this counts as tried.
"""

from __future__ import annotations

import dataclasses

from . import fixes, trials
from .budget import Budget
from .checks import Finding
from .outcomes import Outcome
from .probes import TrainingStep
from .report import Cause
from .safe_forms import SafeForm, Substitution


def run(training_step: TrainingStep, module: str | None, op: str, form: SafeForm, budget: Budget) -> Outcome:
    """Train with a form in place of an operation; `ran` is False where it was never called, or does not fit there.

    Args:
        module: path of the module that calls it, None for the loss function, or `safe_forms.EVERYWHERE`.
        op: short name of the operation.
    """
    training_step.snapshot.restore()
    substitution = Substitution(training_step.model, module, op, form)
    try:
        with substitution:
            outcome = trials.train(training_step, training_step.loss_fn, budget)
    except Exception:  # the form does not fit what the operation gets here
        return Outcome(ran=False)
    finally:
        training_step.snapshot.restore()
    return outcome if substitution.count else Outcome(ran=False)


def emulated(training_step: TrainingStep, found: list[Finding], causes: list[Cause], budget: Budget) -> list[Cause]:
    """The causes; the first with the losses of a run with the safe form of its operation, where these fall."""
    if not causes or causes[0].tried or causes[0].emulated or not budget.allows_a_run():
        return causes
    first = causes[0]
    own = (one for one in found if (one.kind, one.place) == (first.kind, first.place) and one.form is not None)
    finding = next(own, None)
    if finding is None or finding.form is None or finding.form.call is None or first.place.op is None:
        return causes
    module, op = first.place.module, first.place.op
    outcome = run(training_step, finding.within or module, op, finding.form, budget)
    if outcome.effect != "falls":
        return causes
    (advice, *_) = fixes.advice(finding.form, op, module)
    remedy = first.remedy if finding.change and not trials.is_code(first.remedy) else advice
    return [dataclasses.replace(first, remedy=remedy, emulated=outcome.losses), *causes[1:]]
