"""Breaks the kernels' PTX in many places and looks whether a check notices: what the emulated tests are worth.

``make mutants``, or ``python tests/ptx/mutants.py [--seed 0] [--count 240] [--minutes 45] [--write FILE]``

The places are chosen by the seed among the instructions that the check executes: a third are what keeps threads in step
(barriers, fences, waits), the others any. A mutant is caught where the check's result is wrong, or the emulator raises.
EQUIVALENT lists those that change nothing a user could see, each with the reason.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # before triton is imported
    os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from initlab.kernels import backends

import initlab  # noqa: F401 - in a checkout it makes initlab.kernels importable
from ptx import device, launch, machine
from ptx.memory import Fault
from ptx.mutant_checks import CHECKS
from ptx.mutants_equivalent import EQUIVALENT

IN_STEP = re.compile(
    r"bar\.sync|fence\.|mbarrier\.(init|arrive|try_wait)|cp\.async\.(wait|commit)|cp\.async\.bulk\.wait|wgmma\.(fence|wait)"
)
SWAPPED = {
    "add": "sub", "sub": "add", "and": "or", "or": "and", "xor": "or", "min": "max", "max": "min",
    "lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq", "ltu": "geu", "nan": "num",
    "shl.b32": "shr.u32", "shl.b64": "shr.u64", "shr.u32": "shr.s32", "shr.s32": "shr.u32",
    "hi": "lo", "NaN": "", "neg": "abs", "trans": "", "div": "mul",
}  # fmt: skip


def removed(line: str, text: str) -> str:
    """Without its instruction."""
    return line.replace(text + ";", "")


def mutations(line: str, text: str) -> list[str]:
    """What a line could be instead."""
    found = []
    operation = re.sub(r"^@\S+\s+", "", text).split()[0]
    for old, new in SWAPPED.items():
        if re.search(rf"(^|\.){re.escape(old)}(\.|$)", operation):
            swapped = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", operation, count=1).replace("..", ".")
            found.append(line.replace(operation, swapped, 1))
    for number in re.finditer(r"(?<=, )-?\d+(?=[,;]|$)", text):  # operands; the first could be a register's name
        for delta in (-1, 1):
            changed = text[: number.start()] + str(int(number[0]) + delta) + text[number.end() :]
            found.append(line.replace(text, changed))
    for offset in re.finditer(r"\+ ?(\d+) ?\]", text):
        found.append(line.replace(text, text[: offset.start(1)] + str(int(offset[1]) + 4) + text[offset.end(1) :]))
    if text.startswith("@"):
        found.append(line.replace("@%", "@!%", 1) if "@%" in text else line.replace("@!%", "@%", 1))
        found.append(re.sub(r"@!?\S+\s+", "", line, count=1))
    registers = re.findall(r"%[a-z]+\d+", text.partition(",")[2])
    if len(registers) == 2 and registers[0] != registers[1]:
        a, b = registers
        swap = re.sub(r"%[a-z]+\d+", lambda m: {a: b, b: a}[m[0]], text.partition(",")[2])
        if operation.startswith(("sub", "selp", "div", "setp.l", "setp.g", "cvt.rn.bf16x2", "shl", "shr")):
            found.append(line.replace(text.partition(",")[2], swap))
    if operation.startswith(("st.", "cp.async", "wgmma.mma", "atom")):
        found.append(removed(line, text))
    return [new for new in dict.fromkeys(found) if new != line]


def places(program, chance: random.Random):
    """(line number, new line) for instructions that ran, in random order: any, and those that keep threads in step."""
    lines = program.ptx.splitlines()
    ran = [block for block, n in zip(program.blocks, program.runs, strict=True) if n]
    instructions = {i.line: i for block in ran for i in (*block.body, block.last)}
    in_step, others = [], []
    for number, i in instructions.items():
        line = lines[number - 1]
        if i.text not in line:
            continue
        if IN_STEP.search(i.operation):
            in_step.append((number, removed(line, i.text)))
            if "wait_group" in i.operation:
                in_step.append((number, line.replace(i.text, re.sub(r"\d+$", lambda m: str(int(m[0]) + 1), i.text))))
        elif changed := mutations(line, i.text):
            others.append((number, chance.choice(changed)))
    chance.shuffle(in_step)
    chance.shuffle(others)
    return in_step, others


def outcome(check) -> str:
    try:
        return "survives" if check() else "wrong result"
    except (Fault, OverflowError) as error:
        return f"fault: {error}"
    except (NotImplementedError, KeyError, AttributeError, ValueError, TypeError) as error:
        return f"invalid: {type(error).__name__}"  # no PTX, or none that is emulated: not counted


def describe(kernel: str, number: int, old: str, new: str) -> str:
    """A mutant's name."""
    old, new = (" ".join(x.split()) for x in (old, new))
    return f"{kernel}, line {number}: {old} -> {new or '(nothing)'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=240, help="mutants in all")
    parser.add_argument("--minutes", type=float, default=45.0, help="no further mutant is begun after these")
    parser.add_argument("--jobs", type=int, default=2, help="kernels that are broken at the same time")
    parser.add_argument("--write", type=Path, help="where the list goes")
    arguments = parser.parse_args()
    kernels = arguments.kernels or list(CHECKS)
    share = -(-arguments.count // len(kernels))
    work = [(kernel, arguments.seed, share, time.time() + 60 * arguments.minutes) for kernel in kernels]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        results = [result for some in pool.imap(mutants_of, work) for result in some]
    text = report(results, kernels, arguments.seed)
    print(text)
    if arguments.write:
        arguments.write.write_text(text)
    return 0 if good_enough(results) else 1


def mutants_of(work):
    """(kernel, mutant, outcome) of a kernel, in a process of its own."""
    kernel, seed, wanted, end = work
    capability, make = CHECKS[kernel]
    torch.set_num_threads(1)
    machine._MOST_STEPS = 5_000  # many mutants do not end
    device.install(capability)
    backends.requested = lambda: "triton"
    check = make()
    if (found := outcome(check)) != "survives":
        raise SystemExit(f"{kernel} fails before anything is broken: {found}")
    chance = random.Random(f"{seed} {kernel}")
    variants = [p for p in launch.programs() if p.name == kernel and sum(p.runs)]
    candidates = [[(p, *at) for p in variants for at in places(p, chance)[which]] for which in (0, 1)]
    for some in candidates:
        chance.shuffle(some)
    results = try_mutants(kernel, check, candidates, wanted, end)
    print(kernel, dict(Counter(found.partition(":")[0] for _, _, found in results)), flush=True)
    return results


def try_mutants(kernel, check, candidates, wanted: int, end: float):
    """A third of `wanted` from the first list, the rest from the second; those that are no PTX are not counted."""
    in_step, others = candidates
    queue = in_step[: wanted // 3] + others
    results, seen = [], set()
    for program, number, new in queue:
        if len(results) == wanted or time.time() > end:
            break
        lines = program.ptx.splitlines()
        name = describe(kernel, number, lines[number - 1], new)
        if name in seen:
            continue
        lines[number - 1] = new
        broken = "\n".join(lines)
        launch.edit = lambda _, ptx, program=program, broken=broken: broken if ptx == program.ptx else ptx
        found = outcome(check)
        launch.edit = None
        launch._programs.pop(broken, None)
        if not found.startswith("invalid"):
            seen.add(name)
            results.append((kernel, name, found))
            if found == "survives":
                print("survives:", name, flush=True)
    return results


def counts(results):
    survivors = [name for _, name, found in results if found == "survives"]
    equivalent = [name for name in survivors if name in EQUIVALENT]
    return len(results), survivors, equivalent


def good_enough(results) -> bool:
    total, survivors, equivalent = counts(results)
    return len(equivalent) <= total / 10 and len(survivors) - len(equivalent) <= (total - len(equivalent)) / 10


def report(results, kernels, seed: int) -> str:
    total, survivors, equivalent = counts(results)
    others = total - len(equivalent)
    missed = len(survivors) - len(equivalent)
    lines = [
        f"# Mutants of the compiled kernels: seed {seed}, Triton {triton.__version__}",
        "",
        f"{total} mutants. {len(equivalent)} change nothing that a user could see. Of the other {others}, "
        f"{others - missed} are caught ({100 * (others - missed) / max(others, 1):.1f} %).",
        "",
        "| kernel | mutants | wrong result | fault | equivalent | missed |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in kernels:  # zeros where the time was over
        own = [(name, found.partition(":")[0]) for k, name, found in results if k == kernel]
        kinds = Counter("equivalent" if f == "survives" and n in EQUIVALENT else f for n, f in own)
        cells = [len(own), *(kinds[k] for k in ("wrong result", "fault", "equivalent", "survives"))]
        lines.append(f"| {kernel} | {' | '.join(map(str, cells))} |")
    lines += ["", "## Missed", ""] + [f"- `{name}`" for name in survivors if name not in EQUIVALENT]
    lines += ["", "## Equivalent", ""] + [f"- `{name}`: {EQUIVALENT[name]}" for name in equivalent]
    lines += ["", "## Caught", ""] + [
        f"- `{n}`: {f.partition(', line')[0][:110]}" for _, n, f in results if f != "survives"
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
