"""A command says what it takes without importing what only its work needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ep_rebalance.commands.app import COMMANDS

LARGE = ("numba", "numpy", "torch", "vllm")
MODELS = ("ep_rebalance.config", "msgspec")
"""Pydantic's models of the settings, as typer imports pydantic itself; and what traces are made of."""
PRINT_ONLY = ("config", "dashboards", "hardware", "kernels", "metrics", "status", "version")
"""Commands that show settings, metrics or a status, which are such models."""

IN_A_PROCESS = """
import sys
from ep_rebalance.commands.app import app

app([sys.argv[1], "--help"], standalone_mode=False)
print(*(name for name in sys.argv[2:] if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_imports_nothing_that_only_its_work_needs(name: str) -> None:
    unneeded = LARGE if name in PRINT_ONLY else LARGE + MODELS
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, name, *unneeded], capture_output=True, text=True
    )
    assert f" {name} [OPTIONS]" in done.stdout
    assert done.stderr.split() == []
