"""Check the ranks' protocol in every order of events, for three ranks, within named scopes.

What is checked, and what each scope allows to happen, is in docs/protocol.md. The first wrong state
ends a scope, and the shortest way to it is printed.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from lone_rank import Scope
from protocol_checker import Checker, Violation
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SCOPES = {
    "plans": Scope(plans=2, late=False),
    "late": Scope(),
    "faults": Scope(plans=2, faults=2, late=False),
    "late-faults": Scope(faults=1, layers=1, round_bytes=32),
    "reload": Scope(reloads=1, late=False),
    "reload-and-fault": Scope(reloads=1, faults=1, layers=1, late=False),
    "late-reload": Scope(reloads=1, layers=1, round_bytes=32),
    "two-reloads": Scope(reloads=2, layers=1, late=False),
    "partial-reload": Scope(reloads=1, partial=True, round_bytes=32, late=False),
    "unmovable": Scope(reloads=1, unmovable=True, layers=1, late=False),
    "quotas": Scope(redundant=3, layers=1, late=False),
    "quotas-reload": Scope(redundant=3, reloads=1, layers=1, late=False),
    "copies-two-reloads": Scope(redundant=3, plans=0, reloads=2, layers=1, late=False),
    "copies-partial": Scope(redundant=3, plans=0, reloads=1, partial=True, late=False),
    "copies-unmovable": Scope(redundant=3, reloads=1, unmovable=True, layers=1, late=False),
    "copies-fault": Scope(redundant=3, plans=0, reloads=1, faults=1, layers=1, late=False),
    "requests": Scope(asks=3, late=False),
    "requests-reload": Scope(asks=1, reloads=1, layers=1, late=False),
    "static": Scope(mode="static", reloads=1, faults=1, late=False),
    "static-two-reloads": Scope(mode="static", reloads=2, layers=1, round_bytes=32, late=False),
    "static-unmovable": Scope(mode="static", reloads=2, unmovable=True, layers=1, late=False),
}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    names = options.scope or list(SCOPES)
    wrong = sum([_check(name, options.most_states) for name in names])
    sys.exit(wrong > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scope", action="append", choices=list(SCOPES), help="only this one; may be repeated"
    )
    parser.add_argument(
        "--most-states", type=int, metavar="N", help="stop a scope there (default: all its states)"
    )
    return parser.parse_args()


def _check(name: str, most: int | None) -> bool:
    """Whether a wrong state was found. Nobody knows how many states there are; the bar guesses."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    clock, began = time.perf_counter, time.process_time()
    start = clock()
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(name, total=None)

        def seen(states: int, waiting: int) -> None:
            progress.update(
                task,
                total=states + waiting,
                completed=states,
                description=f"{name}: {states} states, {waiting} waiting",
            )

        checker = Checker(SCOPES[name], most_states=most, seen=seen)
        try:
            found = checker.run()
        except Violation as violation:
            print(f"{name}: WRONG: {violation}", flush=True)
            return True
    whole = "all" if checker.complete else "the first"
    print(
        f"{name}: {whole} {found.states} states, {found.forwards} at a forward pass, by {found.moves} moves "
        f"of the real code, at most {found.deepest} in a row; {clock() - start:.0f} s, "
        f"{time.process_time() - began:.0f} s of CPU",
        flush=True,
    )
    return False


if __name__ == "__main__":
    main()
