"""docs/flags.md says of vLLM's flags what both releases say of them now."""

import ast
from pathlib import Path

import flag_table
import pytest
from flag_cases import CASES

SERVERS = Path(__file__).parents[1] / "server"


@pytest.fixture(scope="module")
def found():
    return flag_table.seen()


def test_the_tables_are_what_is_seen(found):
    assert flag_table.PART.text() == flag_table.generated(found), (
        "run .venv/bin/python -P tests/support/flag_table.py, and read what changed"
    )


def test_what_was_seen_running_is_accepted(found):
    for number, case in enumerate(flag_table.cases()):
        if case.served:
            verdicts = {cells[number].verdict for cells in found.values()}
            assert verdicts <= {"accepted", "accepted, no change"}, case


def test_what_is_refused_has_a_remedy(found):
    for cells in found.values():
        for cell in cells:
            if cell.verdict == "refused":
                reason, _, remedy = cell.why.partition(" **Remedy:** ")
                assert reason
                assert remedy, cell


def test_the_tests_that_ask_servers_are_there():
    names = {
        node.name
        for path in SERVERS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {case.served for case in flag_table.cases() if case.served} <= names


def test_the_servers_of_those_tests_are_given_the_flag():
    sources = "".join(path.read_text(encoding="utf-8") for path in SERVERS.glob("*.py"))
    for case in flag_table.cases():
        if case.served:
            argument = case.name.removeprefix("--").replace("-", "_")
            assert f'"{case.name}"' in sources or f"{argument}=" in sources, case


def test_there_are_enough_flags_and_none_twice():
    lines = [(case.flag, case.beside) for group in CASES.values() for case in group]
    assert len(lines) == len(set(lines))
    assert len({case.name for case in flag_table.cases()}) >= 60
