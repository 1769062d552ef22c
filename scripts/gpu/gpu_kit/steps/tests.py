"""Tests of this project, with pytest: `tests tests/kernels -k route`.

Warnings are no errors here: they come from other versions of PyTorch than the one developed with.
"""

import sys
from collections.abc import Sequence

import pytest

from gpu_kit.figures import note, tell

OPTIONS = (
    "-q",
    "-rs",
    "-p",
    "no:cacheprovider",
    "-W",
    "default",
    "-m",
    "not server and not multi_gpu",
)
FAILURES_NAMED = 5


class Outcomes:
    """A plugin of pytest that counts."""

    def __init__(self) -> None:
        self.passed = self.skipped = 0
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1
        note(passed=self.passed, skipped=self.skipped, failed=len(self.failed))


def main(arguments: Sequence[str]) -> int:
    outcomes = Outcomes()
    status = pytest.main([*OPTIONS, *arguments], plugins=[outcomes])
    if outcomes.failed:
        named = ", ".join(outcomes.failed[:FAILURES_NAMED])
        tell(reason=named + (" ..." if len(outcomes.failed) > FAILURES_NAMED else ""))
    elif not outcomes.passed:
        tell(reason="no test ran")
        return 1
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
