"""docs/modes.md says what tests saw, and what docs/flags.md says of each mode's flag."""

import re

import mode_table
import pytest
from mode_table import MODES, ROOT

SERVERS = ROOT / "tests" / "server"


def test_the_table_is_what_the_code_generates():
    assert mode_table.PART.text() == mode_table.table(), (
        "run .venv/bin/python tests/support/mode_table.py, and read what changed"
    )


def test_what_was_seen_running_has_a_test_that_asks_a_server():
    named = {name for mode in MODES for name in mode.servers}
    assert named <= mode_table.tests_in(iter([SERVERS]))


def test_what_is_held_has_a_test_without_a_server():
    named = {name for mode in MODES for name in mode.contracts}
    folders = (path for path in (ROOT / "tests").iterdir() if path.is_dir() and path != SERVERS)
    assert named <= mode_table.tests_in(folders)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_no_mode_says_more_than_was_seen(mode):
    """What no test holds says so, and what is refused was not seen running."""
    said = mode_table.said_of(mode.flag) if mode.flag else ()
    refused = bool(said) and all(word == "refused" for word in said)
    assert not (refused and mode.servers)
    if not (mode.servers or mode.contracts or refused):
        assert re.search("not run|no server", mode.limits), mode
