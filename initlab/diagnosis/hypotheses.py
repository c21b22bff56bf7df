"""Hypotheses are judged by experiment: the run as it is, against the same run with one change.

Each finding of the checks is a hypothesis: a cause, a place, and changes that would undo it. Facts stand by themselves;
suspicions only where their change turns a run that fails into one that falls, or makes it fall much further. All runs
begin from the same start and random state, take as many steps, and are measured by the user's own objective.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import emulation, trials
from .budget import Budget
from .checks import Finding, guesses, of_little, of_rise, of_standstill, of_values
from .evidence import Evidence
from .fixes import smaller_rate
from .limits import LIMITS
from .outcomes import Outcome, falls, much_better, settled
from .probes import TrainingStep
from .report import Cause, Kind

Observe = Callable[[TrainingStep, int], list[Cause]]


_NOTHING = Outcome(ran=False)


@dataclass
class Tried:
    """A finding, the change that was tried for it, and how the run went with it."""

    finding: Finding
    remedy: str = ""
    outcome: Outcome = _NOTHING
    rewritten: bool = False
    emulated: bool = False

    @property
    def cures(self) -> bool:
        """Whether the loss falls with it, to where it may begin to learn."""
        return self.outcome.effect == "falls" and not self.outcome.fails

    @property
    def helps(self) -> bool:
        """Whether there is a finite loss with it, at least at the start."""
        return len(self.outcome.losses) > 0 and math.isfinite(self.outcome.losses[0])


def judge(
    training_step: TrainingStep,
    evidence: Evidence,
    found: list[Finding],
    budget: Budget,
    observe: Observe,
    depth: int,
) -> list[Cause]:
    """The causes, with the change that undoes the first.

    Args:
        found: in the order in which one cause leads to the next.
        observe: gives the causes that show themselves in another training step, for what lies behind a first cause.
        depth: how many more times it may be called.
    """
    untreated = evidence.untreated
    if untreated is None:
        if not found:
            return []
        untreated = evidence.untreated = _untreated(training_step, evidence, found, budget)
    if _is_to_rise(evidence, untreated):
        return [_cause(Tried(one), untreated) for one in found if not one.suspicion]
    if not settled(untreated.losses) and not any(one.suspicion for one in found):
        untreated = evidence.untreated = untreated._replace(constant=False)  # it may just have begun
    baseline = evidence.baseline
    if all(one.suspicion for one in found) and _near_the_floor(untreated, baseline):
        return []
    results = _with_both_scaled(training_step, _try_all(training_step, found, untreated, budget), untreated, budget)
    kept = results
    cured = any(_supported(one, untreated, baseline) for one in results if one.finding.suspicion)
    still = _stands_still(untreated, baseline)
    if untreated.effect in ("breaks", "rises", "plateau") and not still and _may_be_settings(found, evidence):
        training_step.snapshot.restore()
        setting = _first_clear(training_step, of_rise(evidence, untreated), untreated, budget)
        kept = results = [*setting, *(one for one in results if not setting or one.finding.kind not in _HIDES)]
    elif (still or _learns_little(untreated)) and not cured and not any(not one.suspicion for one in found):
        training_step.snapshot.restore()
        changes = of_standstill if still else of_little
        moving = _first_clear(training_step, changes(evidence, untreated), untreated, budget)
        if moving:
            return [_cause(moving[0], untreated)]
    if not untreated.fails:
        kept = [one for one in results if not one.finding.suspicion or _supported(one, untreated, baseline)]
    elif not any(_supported(one, untreated, baseline) or not one.finding.suspicion for one in results):
        others = [one for one in guesses(evidence) if one.kind not in {f.kind for f in found}]
        tried = _try_all(training_step, others, untreated, budget)
        kept = results + [one for one in tried if _supported(one, untreated, baseline)]
    ranked = _one_of_each_kind(_ranked(kept, untreated, baseline))
    if not ranked:
        return []
    first, behind = _completed(training_step, ranked[0], untreated, budget, observe, depth)
    only_said = bool(first.remedy) and not trials.is_code(first.remedy)
    only_said = only_said and not ranked[0].finding.values_are_right
    if only_said and untreated.effect == "breaks" and not behind and evidence.trace.slopes.wrong is None:
        first = _with_other_values(training_step, evidence, first, untreated, budget)
    # Beside a first cause whose remedy is enough, suspicions are what it leads to.
    rest = [_cause(one, untreated) for one in ranked[1:] if not (first.tried and one.finding.suspicion)]
    return [first, *rest, *(one for one in behind if one.kind not in {c.kind for c in (first, *rest)})]


def _is_to_rise(evidence: Evidence, untreated: Outcome) -> bool:
    """Whether an optimizer maximises what is no loss function, and it rises: a reward, a likelihood."""
    groups = evidence.optimizer.param_groups if evidence.optimizer is not None else []
    if not groups or not all(group.get("maximize") for group in groups):
        return False
    first, last = untreated.losses[0], untreated.losses[-1]
    turned = evidence.negated and last > max(0.0, first)
    blows_up = min(untreated.losses) >= 0 and last > LIMITS.blow_up * first
    if evidence.trace.slopes.wrong is None and (turned or blows_up or evidence.trace.losses):
        return False
    return untreated.effect == "rises" and falls([-x for x in untreated.losses])


_HIDES = ("learning rate", "gradient")  # what a smaller step makes up for, beside a setting that drives a run off


def _may_be_settings(found: list[Finding], evidence: Evidence) -> bool:
    """Whether nothing but the step is suspected in a run that rises or breaks after it began."""
    only_steps = all(one.kind in _HIDES or (one.kind == "weights" and one.suspicion) for one in found)
    return evidence.broke_at != 1 and evidence.error is None and only_steps


def _near_the_floor(untreated: Outcome, baseline: float | None) -> bool:
    """Whether a run has little left to lose all along, against knowing nothing."""
    return bool(baseline) and untreated.effect != "breaks" and max(untreated.losses) < LIMITS.floor * (baseline or 0.0)


def _stands_still(untreated: Outcome, baseline: float | None) -> bool:
    """Whether a run that has something left to fall hardly moves."""
    if untreated.steps < 2 or untreated.effect == "breaks":
        return False
    first = untreated.losses[0]
    if abs(first) < (LIMITS.floor * baseline if baseline else LIMITS.nothing_left):
        return False
    rise = max(untreated.losses) - first
    return untreated.fallen < LIMITS.stands_still and rise < LIMITS.stands_still * abs(first)


def _learns_little(untreated: Outcome) -> bool:
    """Whether a run falls so little that what holds it back may show."""
    return untreated.steps >= LIMITS.trial_steps and abs(untreated.fallen) < LIMITS.learns


def _first_clear(
    training_step: TrainingStep, found: Iterable[Finding], untreated: Outcome, budget: Budget
) -> list[Tried]:
    """The first change, of those that there is time for, with which a loss falls clearly; none where there is none."""
    for one in found:
        if not budget.allows_a_run():
            break
        tried = _try(training_step, one, untreated, budget)
        if tried.cures and _sets_going(tried.outcome, untreated):
            return [tried]
    return []


def _sets_going(treated: Outcome, untreated: Outcome) -> bool:
    """Whether a run falls several times as far as without a change, and below where that one began."""
    if untreated.effect == "plateau":
        return treated.losses[-1] < untreated.losses[-1]
    if treated.fallen < max(LIMITS.sets_going, LIMITS.faster * max(0.0, untreated.fallen)):
        return False
    return untreated.fails or treated.losses[-1] < untreated.losses[0] * (1 - LIMITS.stands_still)


def _one_of_each_kind(ranked: list[Tried]) -> list[Tried]:
    """One of each kind, the best of them."""
    first: dict[str, Tried] = {}
    for one in ranked:
        known = first.setdefault(one.finding.kind, one)
        both = one.cures and known.cures and one.finding.suspicion and one.finding.kind == "weights"
        if both and one.outcome.losses[-1] < known.outcome.losses[-1] / LIMITS.much_better:
            first[one.finding.kind] = one
    return list(first.values())


def _untreated(training_step: TrainingStep, evidence: Evidence, found: list[Finding], budget: Budget) -> Outcome:
    """The run as it is, in as many steps as the others get."""
    if evidence.broke_at is None and any(one.suspicion or one.remedies for one in found):
        return trials.run_untreated(training_step, budget)
    losses = [float("nan") if x is None else x for x in evidence.losses]
    return Outcome((*losses, *losses[-1:], float("nan"))[: max(2, len(losses))])


def _try_all(training_step: TrainingStep, found: list[Finding], untreated: Outcome, budget: Budget) -> list[Tried]:
    """Every finding with the remedy that does most for it; once a fact is cured, the rest is left as it is."""
    results = []
    enough = False
    for number, one in enumerate(found):
        needed = one.suspicion or number == 0
        if enough or not needed or number >= LIMITS.suspects or not budget.allows_a_run():
            results.append(Tried(one))
            continue
        results.append(_try(training_step, one, untreated, budget))
        enough = results[-1].cures and not one.suspicion and untreated.fails
    return results


def _with_both_scaled(
    training_step: TrainingStep, results: list[Tried], untreated: Outcome, budget: Budget
) -> list[Tried]:
    """Inputs and targets standardised together, where both are suspected and neither is enough by itself."""
    pair = {one.finding.kind: one for one in reversed(results) if one.finding.suspicion and one.finding.kind in _SCALED}
    enough = any(one.cures for one in pair.values()) or not untreated.fails
    if len(pair) < len(_SCALED) or enough or not budget.allows_a_run():
        return results
    first, second = (pair[kind].finding for kind in _SCALED)
    if not trials.is_code(first.remedies[0]) or not trials.is_code(second.remedies[0]):
        return results
    both = dataclasses.replace(
        first,
        severity="broken" if untreated.effect in ("breaks", "rises") else first.severity,
        explanation=f"{first.explanation} {second.explanation}",
        evidence={**first.evidence, **second.evidence},
        remedies=[f"{first.remedies[0]}\n{second.remedies[0]}"],
        change=f"{first.change} and {second.change}",
        rescales=second.rescales,
    )
    tried = _try(training_step, both, untreated, budget)
    if not tried.cures:
        return results
    return [tried, *(one for one in results if one not in pair.values())]


_SCALED: tuple[Kind, ...] = ("input", "target")


def _try(training_step: TrainingStep, found: Finding, untreated: Outcome, budget: Budget) -> Tried:
    same = [code for rewrite in found.rewrites if (code := trials.same_objective(training_step, rewrite))]
    best = Tried(found)
    codes = [code for code in (*same, *found.remedies) if trials.is_code(code)]
    if not codes and found.suspicion and found.form is not None and found.place.op is not None:
        module = found.within or found.place.module
        outcome = emulation.run(training_step, module, found.place.op, found.form, budget)
        return Tried(found, "", outcome, emulated=True)
    for code in codes[: max(found.tries, LIMITS.tried)]:
        if not budget.allows_a_run():
            break
        outcome = trials.run(training_step, code, budget, rewritten=code in same)
        outcome = outcome._replace(constant=outcome.constant and (untreated.constant or settled(outcome.losses)))
        tried = Tried(found, code, outcome, code in same)
        if tried.cures:
            return tried
        if not best.helps and tried.helps:
            best = tried
    return best


def _supported(one: Tried, untreated: Outcome, baseline: float | None) -> bool:
    """Whether the experiment speaks for a finding."""
    if not one.cures:
        return False
    if one.finding.structural and untreated.losses:
        return untreated.effect == "breaks" or one.outcome.losses[-1] < untreated.losses[-1]
    if untreated.effect == "stays":
        return one.outcome.fallen > LIMITS.slow_fall
    if untreated.fails or _starts_better(one.outcome, untreated, baseline):
        return True
    usual = one.finding.rescales or baseline or one.outcome.losses[0]
    return not _learns(untreated, usual) and much_better(one.outcome, untreated, one.finding.rescales)


def _learns(untreated: Outcome, usual: float) -> bool:
    """Whether a run falls well, and well below what a model has that knows nothing."""
    start = min(untreated.losses[0], usual) if usual > 0 else untreated.losses[0]
    return untreated.fallen > LIMITS.learns and untreated.losses[-1] < start - LIMITS.learns * abs(start)


def _starts_better(treated: Outcome, untreated: Outcome, baseline: float | None) -> bool:
    """Whether a first loss that is far above knowing nothing is no longer."""
    if not baseline or not untreated.losses or untreated.losses[0] < LIMITS.sure_loss * baseline:
        return False
    return treated.losses[0] < untreated.losses[0] / 2 and treated.losses[-1] < LIMITS.above * baseline


def _ranked(kept: list[Tried], untreated: Outcome, baseline: float | None) -> list[Tried]:
    """What cures, or cannot be tried, before what does not; what merely shifts the loss after what lets it fall."""
    broken = any(one.finding.severity == "broken" for one in kept)
    tried = [one for one in kept if one.outcome.steps > 0 and one.outcome.effect != "breaks"]
    runs = [one.outcome.losses for one in tried if not one.finding.rescales]
    lowest = min((losses[-1] for losses in runs), default=0.0)
    usual = min((losses[0] for losses in runs), default=0.0)  # the first loss of a run that begins well

    def order(one: Tried) -> tuple[bool, int]:
        found = one.finding
        if found.kind == "input" and not found.suspicion:
            return False, -1  # no weights expect such numbers, whatever else helps a little
        if not found.suspicion and not any(trials.is_code(code) for code in found.remedies):
            return broken and found.severity != "broken", 0
        shifts = one in tried and found.suspicion and not found.rescales
        shifts = shifts and _shifts(one.outcome.losses[-1], lowest, usual)
        grade = 2 if shifts or one not in tried else 0 if _supported(one, untreated, baseline) else 1
        return broken and found.severity != "broken" and not found.suspicion, grade if any(
            other.cures for other in kept
        ) else 0

    return sorted(kept, key=order)


def _shifts(end: float, lowest: float, usual: float) -> bool:
    """Whether a loss ends far above where it could, and where another run begins."""
    return lowest >= 0 and end > max(LIMITS.shifts * lowest, usual)


def _completed(
    training_step: TrainingStep, one: Tried, untreated: Outcome, budget: Budget, observe: Observe, depth: int
) -> tuple[Cause, list[Cause]]:
    """The first cause; where its remedy is not enough, with the remedy of what shows itself behind it."""
    found = one.finding
    if one.cures:
        if found.kind == "weights" and "gain" in found.evidence:
            found.evidence["gain after the remedy"] = trials.growth_after(training_step, one.remedy)
        return _cause(one, untreated), []
    if not one.helps or depth <= 1 or not budget.allows_a_run():
        return _cause(one, untreated), []
    with trials.after_remedy(training_step, one.remedy) as changed:
        second = TrainingStep(changed.model, changed.batch, changed.loss_fn, changed.optimizer)
        try:
            behind = observe(second, depth - 1)
        finally:
            second.snapshot.restore()
    if not behind and training_step.optimizer is not None and "lr" in training_step.optimizer.param_groups[0]:
        # Nothing else is wrong, and the loss does not fall evenly: the rest is the rate's.
        second_kind, code, change = "learning rate", smaller_rate(0.1, training_step.optimizer), "a tenth of the rate"
    elif behind and behind[0].remedy and behind[0].remedy not in one.remedy:
        second_kind, code, change = behind[0].kind, behind[0].remedy, behind[0].change
    else:
        return _cause(one, untreated), behind
    # A second remedy of the same kind is the first with another number in it.
    both = code if second_kind == found.kind else f"{one.remedy}\n{code}"
    outcome = trials.run(training_step, both, budget, rewritten=one.rewritten)
    if outcome.effect == "falls":
        change = " and ".join(text for text in (found.change, change) if text)
        return _cause(Tried(found, both, outcome), untreated, change), behind
    worth = outcome.losses and behind and second_kind != found.kind
    return _cause(Tried(found, both if worth else one.remedy), untreated), behind


def _with_other_values(
    training_step: TrainingStep, evidence: Evidence, first: Cause, untreated: Outcome, budget: Budget
) -> Cause:
    """A cause whose advice only its author can follow, with what keeps its operation from the values it fails on."""
    for code, change in of_values(evidence)[: LIMITS.suspects]:
        if not budget.allows_a_run():
            break
        outcome = trials.run(training_step, code, budget)
        learns = outcome.effect == "falls" and not outcome.fails
        if learns and outcome.losses[-1] > -LIMITS.absurd and outcome.losses[-1] != 0:  # 0: nothing is left of it
            return dataclasses.replace(
                first,
                remedy=f"{code}\n{first.remedy}",
                tried=True,
                trial=outcome.losses,
                untreated=untreated.losses,
                change=change,
            )
    return first


def untried(found: Finding) -> Cause:
    """What is printed of a finding for which no experiment was made."""
    return _cause(Tried(found), _NOTHING)


def _cause(one: Tried, untreated: Outcome, change: str | None = None) -> Cause:
    """What is printed of a finding; a remedy that was seen not to help gives way to an advice."""
    found = one.finding
    remedy = one.remedy or next((code for code in found.remedies if not trials.is_code(code)), "")
    remedy = remedy or (found.remedies or [""])[0]
    return Cause(
        found.kind,
        found.severity,
        found.place,
        found.explanation,
        found.evidence,
        remedy,
        one.cures and not one.emulated,
        one.outcome.losses if one.cures and not one.emulated else (),
        untreated.losses if one.cures else (),
        found.change if change is None else change,
        one.outcome.losses if one.cures and one.emulated else (),
    )
