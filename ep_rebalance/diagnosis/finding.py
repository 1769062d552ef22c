"""Finding: the result of a check, and how checks are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "problem", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found.

    check: what was looked at.
    found: what is there.
    remedy: what to do; "" if nothing.
    """

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


Check = Callable[[], Finding | Iterable[Finding]]


def run_checks(
    checks: Iterable[tuple[str, Check]], begin: Callable[[str], None] = lambda _: None
) -> Iterator[Finding]:
    """The findings of all checks. A check that raises becomes a problem with its name.

    checks: (name, check) pairs.
    begin: called with the name of each check before it.
    """
    for name, check in checks:
        begin(name)
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else list(found)
        except Exception as error:
            yield Finding(
                check=name,
                verdict="problem",
                found=f"could not be checked: {type(error).__name__}: {error}",
                remedy="see what the error names; the plugin would meet it too",
            )
