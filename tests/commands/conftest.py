"""A trace that several tests of commands replay."""

from __future__ import annotations

from pathlib import Path

import pytest
from traces import REPLAYED, write_trace


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 snapshots of `REPLAYED`, which no test changes."""
    folder = tmp_path_factory.mktemp("trace")
    write_trace(folder, REPLAYED, 40)
    return folder
