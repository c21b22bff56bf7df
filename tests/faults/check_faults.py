"""Checks that each planted fault has a symptom and that its twin and the healthy models have none.

python tests/faults/check_faults.py [NAME ...]
"""

import argparse
import math
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

if __package__:
    from . import FAMILIES, FAULTS, HEALTHY, KINDS, Fault
    from .case import Built
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from faults import FAMILIES, FAULTS, HEALTHY, KINDS, Fault
    from faults.case import Built

EXPLODED = 1e4  # times the twin's
VANISHED = 1e-8  # times the twin's
LONG = 60  # steps in which a twin learns and a stuck model does not


def norms(model: nn.Module) -> dict[str, float]:
    return {n: float(p.grad.double().norm()) for n, p in model.named_parameters() if p.grad is not None}


def finite(tensors: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if isinstance(t, torch.Tensor) and not t.is_meta)


def first_step(built: Built) -> tuple[float, dict[str, float], float]:
    """Loss, gradient norms, share of gradient elements that are exactly 0."""
    model, batch, loss_fn, _ = built
    model.zero_grad()
    loss = loss_fn(model, batch)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    zeros = sum(int((g == 0).sum()) for g in gradients) / max(1, sum(g.numel() for g in gradients))
    return loss.item(), norms(model), zeros


def run(built: Built, steps: int) -> tuple[list[float], str]:
    """Losses of plain training, one more than `steps`; and what broke, if anything did."""
    model, batch, loss_fn, optimizer = built
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-3)
    losses: list[float] = []
    for step in range(steps + 1):
        optimizer.zero_grad()
        try:
            loss = loss_fn(model, batch)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return losses, f"loss {losses[-1]} at step {step}"
            loss.backward()
        except (RuntimeError, IndexError, ValueError, NotImplementedError) as error:
            return losses, f"step {step} raises {type(error).__name__}: {str(error).splitlines()[0][:70]}"
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not finite([p.grad])]
        if bad:
            return losses, f"gradient of {', '.join(bad[:2])}{' ...' * (len(bad) > 2)} not finite at step {step}"
        optimizer.step()
        if not finite(model.parameters()):
            return losses, f"parameters not finite after step {step}"
    return losses, ""


def symptom(fault: Fault) -> str:
    """What is wrong, from plain training alone; empty if nothing is."""
    losses, broke = run(fault.build(), fault.steps)
    if broke:
        return broke
    first, last = losses[0], max(losses)
    if last > first + 0.5 * abs(first) + 0.1:
        return f"loss grows from {first:.3g} to {last:.3g} in {fault.steps} steps"
    assert fault.twin is not None, f"{fault.name}: a silent fault needs a twin"
    loss, gradients, zeros = first_step(fault.build())
    twin_loss, twin_gradients, twin_zeros = first_step(fault.twin())
    ratios = {n: g / twin_gradients[n] for n, g in gradients.items() if twin_gradients.get(n, 0) > 0}
    worst, best = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    if loss > EXPLODED * abs(twin_loss):
        return f"first loss {loss:.3g}, twin's {twin_loss:.3g}"
    if ratios[worst] > EXPLODED:
        return f"gradient of {worst} {ratios[worst]:.1e} times the twin's"
    if ratios[best] < VANISHED:
        return f"gradient of {best} {ratios[best]:.1e} times the twin's"
    if fault.kinds[0] == "precision" and zeros > 0.5 and twin_zeros < 0.25:
        return f"{zeros:.0%} of the gradient is 0, the twin's {twin_zeros:.0%}"
    losses, broke = run(fault.build(), LONG)
    twin_losses, _ = run(fault.twin(), LONG)
    text = f"loss {losses[0]:.3g} -> {losses[-1]:.3g} in {LONG} steps"
    text += f", the twin's {twin_losses[0]:.3g} -> {twin_losses[-1]:.3g}"
    if broke or (losses[0] > 0 and losses[-1] > 0.7 * losses[0] and twin_losses[-1] < 0.6 * twin_losses[0]):
        return f"{broke} {text}".strip()
    return ""


def problem(built: Built, steps: int = 20) -> str:
    """What is wrong with a training step that should be fine; empty if nothing is."""
    losses, broke = run(built, steps)
    if broke:
        return broke
    tail = sum(losses[-5:]) / 5
    return "" if tail <= losses[0] + 0.02 * abs(losses[0]) + 1e-6 else f"loss {losses[0]:.3g} -> {tail:.3g}"


def tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, dict):
        batch = tuple(batch.values())
    return [batch] if isinstance(batch, torch.Tensor) else list(batch)


def repeats(build: Any) -> bool:
    """Whether two builds are equal and share nothing that training changes, and leave the random state alone."""
    state = torch.get_rng_state()
    one, two = (build() for _ in range(2))
    same = all(
        a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(
            [*one[0].state_dict().values(), *tensors(one[1])],
            [*two[0].state_dict().values(), *tensors(two[1])],
            strict=True,
        )
    )
    held = [{t.data_ptr() for t in (*m.parameters(), *tensors(b)) if not t.is_meta} for m, b, _, _ in (one, two)]
    return same and not held[0] & held[1] and torch.equal(state, torch.get_rng_state())


def lost(fault: Fault) -> str:
    """A module or parameter that the fault's place names and the model does not have."""
    model = fault.build()[0]
    have = {
        "module": {name for name, _ in model.named_modules()} | {None},
        "parameter": set(model.state_dict()),
    }
    for what, names in have.items():
        wanted = fault.place.get(what, ())
        for name in wanted if isinstance(wanted, tuple) else (wanted,):
            if name not in names:
                return f"no {what} {name}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of names; all if none is given")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch warns of some of the mistakes
    chosen = [f for f in FAULTS if not names or any(n in f.name for n in names)]
    well = [h for h in HEALTHY if not names or any(n in h.name for n in names)]
    wrong = 0
    for fault in chosen:
        assert set(fault.kinds) <= set(KINDS), fault.name
        assert fault.family in FAMILIES, fault.name
        shown, wrong_in_twin = symptom(fault), problem(fault.twin()) if fault.twin else ""
        fresh = repeats(fault.build)
        nowhere = lost(fault)
        bad = not shown or bool(wrong_in_twin) or not fresh or bool(nowhere)
        wrong += bad
        print(f"{'BAD ' if bad else 'ok  '} {fault.name:<44} {fault.kinds[0]:<14} {shown or 'NO SYMPTOM'}", end="")
        print(
            f"; TWIN: {wrong_in_twin}" * bool(wrong_in_twin)
            + "; BUILDS DIFFER" * (not fresh)
            + f"; PLACE: {nowhere}" * bool(nowhere)
        )
    for model in well:
        found, fresh = problem(model.build()), repeats(model.build)
        bad = bool(found) or not fresh
        wrong += bad
        losses, _ = run(model.build(), 20)
        print(f"{'BAD ' if bad else 'ok  '} {model.name:<44} {'healthy':<14} ", end="")
        print(found or f"loss {losses[0]:.4g} -> {losses[-1]:.4g}", "; BUILDS DIFFER" * (not fresh))
    for title, count in (
        ("family", Counter(f.family for f in chosen)),
        ("kind", Counter(f.kinds[0] for f in chosen)),
    ):
        print(f"by {title}: " + ", ".join(f"{key} {n}" for key, n in sorted(count.items())))
    print(
        f"{len(chosen)} faults ({sum(f.several for f in chosen)} with several mistakes, "
        f"{sum(f.fixable for f in chosen)} fixable), {len(well)} healthy models, {wrong} wrong"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
