"""Change one token of the code that judges, and see whether its own tests notice: `make mutants`.

python -m tests.mutants --count 300 --seed 1             a sample of all mutants
python -m tests.mutants --count 60 --only fxqfix/routes  of the modules of a folder, or one

A mutant is noticed when a test of its folder fails (`GROUPS`), or a doctest of its module. Those
that nobody can notice are listed in `equivalent.py`, with the reason, and never sampled.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.equivalent import EQUIVALENT
from tests.mutants.run import ROOT, Profile, noticed_by, profiled, warm_up
from tests.mutants.sites import Mutant, mutants

# Modules, and the tests that have to notice.
GROUPS = {
    "fxqfix/pairing.py": ("tests/test_pairing.py", "tests/test_pairing_by_hand.py"),
    "fxqfix/checks": ("tests/checks",),
    "fxqfix/report": ("tests/report", "tests/test_report_kernels.py"),
    "fxqfix/causes": ("tests/causes",),
    "fxqfix/evidence": ("tests/evidence", "tests/causes"),
    "fxqfix/routes": ("tests/routes",),
}
LIMIT = 60.0  # CPU seconds of tests for one mutant


def files(place: str) -> list[str]:
    """The modules at a place."""
    if place.endswith(".py"):
        return [place]
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / place).glob("*.py"))


def sampled(modules: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Random tokens, and a random mutant of each.

    Raises:
        RuntimeError: A line of `EQUIVALENT` is no mutant of its module.
    """
    unused = {key for key in EQUIVALENT if key[0] in modules}
    known = {key[:2] for key in unused}
    tokens: list[list[Mutant]] = []
    for module in modules:
        lines = [s.strip() for s in (ROOT / module).read_text(encoding="utf-8").splitlines()]
        for token in mutants(module, ROOT):
            left = token
            if (module, lines[token[0].line - 1]) in known:
                keys = [(m, (module, *m.change(ROOT))) for m in token]
                left = [m for m, key in keys if key not in EQUIVALENT]
                unused -= {key for _, key in keys}
            tokens += [left] * bool(left)
    if unused:
        raise RuntimeError(f"no mutants of today's code in EQUIVALENT: {sorted(unused)}")
    drawn = random.Random(seed)
    chosen = drawn.sample(tokens, min(count, len(tokens)))
    return [drawn.choice(token) for token in chosen]


def profile_of(place: str, cache: Path | None) -> Profile:
    """The profile of a group; a cached one is for who changes neither code nor tests."""
    if cache is not None:
        file = cache / f"{place.replace('/', '.')}.json"
        if file.exists():
            return Profile(*json.loads(file.read_text(encoding="utf-8")))
    found = profiled(files(place), GROUPS[place])
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([found.seconds, found.tests, found.failed]), encoding="utf-8")
    return found


def judged(place: str, chosen: Sequence[Mutant], profile: Profile, limit: float) -> list[str]:
    """Run the mutants of a group, and describe those that no test noticed."""
    survivors = []
    for mutant in chosen:
        start = time.monotonic()
        tests = profile.order(mutant.path, mutant.line, limit)
        seconds = sum(profile.seconds[t] for t in tests)
        by = noticed_by(mutant.path, mutant.source(ROOT), tests, seconds)
        before, after = mutant.change(ROOT)
        text = f"{mutant.path}:{mutant.line}\n    {before}\n    {after}"
        took = f"{time.monotonic() - start:.1f} s"
        if by is None:
            survivors.append(text)
            print(f"NOT NOTICED by {len(tests)} tests, {took}: {text}", flush=True)
        else:
            print(f"noticed, {took}: {mutant.path}:{mutant.line} by {by}", flush=True)
    return survivors


def main() -> int:
    """Status 0 where at least nine of ten mutants are noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="mutants (300)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (1)")
    parser.add_argument("--only", action="append", help="a folder or module; may be repeated")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of tests for a mutant")
    parser.add_argument("--list", action="store_true", help="list the mutants, run no test")
    parser.add_argument("--profiles", type=Path, help="folder of profiles, to be used again")
    options = parser.parse_args()
    modules = [m for g in GROUPS for m in files(g)]
    if options.only:
        modules = [m for m in modules if any(m.startswith(o) for o in options.only)]
    chosen = sampled(modules, options.count, options.seed)
    if options.list:
        for mutant in chosen:
            print(f"{mutant.path}:{mutant.line}", *mutant.change(ROOT), sep="\n    ")
        return 0
    warm_up()
    all_of, lost = Counter[str](), Counter[str]()
    survivors: list[str] = []
    for place in GROUPS:
        group = {*files(place)}
        mine = sorted((m for m in chosen if m.path in group), key=lambda m: (m.path, m.token))
        if not mine:
            continue
        start = time.monotonic()
        profile = profile_of(place, options.profiles)
        print(
            f"{place}: {len(mine)} mutants, {len(profile.seconds)} tests "
            f"({sum(profile.seconds.values()):.0f} CPU s, profiled in "
            f"{time.monotonic() - start:.0f} s); failing: {list(profile.failed)}",
            flush=True,
        )
        found = judged(place, mine, profile, options.limit)
        survivors += found
        all_of[place], lost[place] = len(mine), len(found)
    print("\nNot noticed:", *survivors, sep="\n")
    print(f"\nseed {options.seed}")
    for place, count in all_of.items():
        print(f"{place:20} {count - lost[place]:4} of {count:4} noticed")
    total, noticed = all_of.total(), all_of.total() - lost.total()
    print(f"{'all':20} {noticed:4} of {total:4} noticed: {noticed / total:.1%}")
    return int(noticed < 0.9 * total)


if __name__ == "__main__":
    sys.exit(main())
