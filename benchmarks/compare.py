"""Tell a regression from noise: `python benchmarks/compare.py BEFORE.json AFTER.json`, two results of `make bench`.

What is compared is our time over the peer's in the same round, so that a slower machine cancels out. A case is slower
if the median of that ratio grew by more than LEAST and the rounds are so well separated that chance does it in less
than one of 1,000 cases, by Mann and Whitney's rank test. Exit status: 0 nothing is slower, 1 something is, 2 no case
could be compared.
"""

import argparse
import json
import statistics
import sys
from functools import cache
from math import comb
from pathlib import Path

LEAST = 0.05  # smaller changes come from where memory lies and how a compiler orders code
CHANCE = 1e-3


@cache
def _ways(first, second, total):
    """In how many orders of first + second rounds `total` pairs have the round of the second group above."""
    if total < 0 or total > first * second:
        return 0
    if not first or not second:
        return 1
    return _ways(first, second - 1, total - first) + _ways(first - 1, second, total)


def chance_of_slower(before, after):
    """The chance that rounds of one and the same speed lie so far up in `after`; ties count as half, rounded down."""
    pairs = int(sum((b > a) + 0.5 * (b == a) for a in before for b in after))
    ways = sum(_ways(len(before), len(after), at) for at in range(pairs, len(before) * len(after) + 1))
    return ways / comb(len(before) + len(after), len(before))


def verdict(before, after, least=LEAST):
    """What became of one case: ("slower", "faster", "same" or "too few rounds", change of the median ratio).

    Args:
        before: our time over the peer's, round by round.
        after: the same, of the later run.
        least: changes up to this are none.
    """
    change = statistics.median(after) / statistics.median(before) - 1.0
    if 1 / comb(len(before) + len(after), len(before)) > CHANCE:
        return "too few rounds", change
    if change > least and chance_of_slower(before, after) <= CHANCE:
        return "slower", change
    if 1.0 / (1.0 + change) - 1.0 > least and chance_of_slower(after, before) <= CHANCE:
        return "faster", change
    return "same", change


def ratios(result):
    """Our time over the peer's in each round, by case."""
    return {
        row["case"]: [ours / peer for ours, peer in zip(row["ours"], row["peer"], strict=True)]
        for row in result["rows"]
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=LEAST, help="changes up to this share are none")
    given = parser.parse_args(arguments)
    before, after = (ratios(json.loads(path.read_text())) for path in (given.before, given.after))
    found = []
    for case in before.keys() & after.keys():
        found.append((case, *verdict(before[case], after[case], given.least)))
    for case, word, change in sorted(found, key=lambda row: -row[2]):
        print(f"{word:15s} {change:+7.1%}  {case}")
    for case in sorted(before.keys() ^ after.keys()):
        print(f"{'only in ' + ('the first' if case in before else 'the second'):15s}  {case}")
    words = [word for _, word, _ in found]
    print(f"{words.count('slower')} of {len(words)} cases are slower")
    if not set(words) - {"too few rounds"}:
        return 2
    return int("slower" in words)


if __name__ == "__main__":
    sys.exit(main())
