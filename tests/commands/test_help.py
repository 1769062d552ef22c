"""Every help text reaches the screen whole: what is in brackets is not taken for markup."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from command_line import run

from ep_rebalance.commands.app import COMMANDS, app, load_command


def words(text: str) -> str:
    """Without frames and line ends."""
    return " ".join(text.replace("│", " ").split())


def texts(name: str) -> Iterator[str]:
    """All that is written of a command and of its parameters."""
    command = load_command(name)
    yield command.help or ""
    for parameter in command.params:
        yield getattr(parameter, "help", None) or ""
        if isinstance(told := getattr(parameter, "show_default", None), str):
            yield f"[default: ({told})]"


def shown(*arguments: str) -> str:
    return words(run(*arguments, "--help", COLUMNS="2000").output)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_shows_all_that_is_written(name: str) -> None:
    screen = shown(name)
    for text in texts(name):
        assert words(text) in screen


def test_the_help_of_all_shows_all_that_is_written() -> None:
    screen = shown()
    assert words(str(app.info.help)) in screen
    for name in COMMANDS:
        assert words(next(texts(name)).partition("\n\n")[0]) in screen


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("replay", ["ours, none, hindsight", "as recorded, else 8", "table, json if piped"]),
        ("advise", ["8, 16, 32", "0, 1, 2", "the hardware's"]),
        ("plan", ["as recorded", "as recorded, else 8"]),
        ("convert", ["the file's"]),
    ],
)
def test_defaults_that_are_worked_out_are_told(name: str, defaults: list[str]) -> None:
    screen = shown(name)
    for default in defaults:
        assert f"[default: ({default})]" in screen
