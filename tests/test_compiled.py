"""Machine code on disk: when it is out of date."""

import os
from pathlib import Path

import pytest

from ep_rebalance.compiled import _drop_stale_code


@pytest.mark.parametrize(
    ("changed", "kept"), [("plain.py", True), ("caller.py", False), ("constants.py", False)]
)
def test_cached_code_is_as_new_as_all_that_is_compiled_into_it(
    changed: str, kept: bool, tmp_path: Path
) -> None:
    package, index = tmp_path / "package", tmp_path / "package" / "__pycache__" / "caller.nbi"
    index.parent.mkdir(parents=True)
    texts = {"package/plain.py": "", "package/caller.py": "@compiled\n", "constants.py": "N = 1\n"}
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(text)
        os.utime(path, (3, 3) if path.name == changed else (1, 1))
    index.touch()
    os.utime(index, (2, 2))
    _drop_stale_code(package, tmp_path / "constants.py")
    assert index.exists() == kept
