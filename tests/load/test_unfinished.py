"""Files that are not finished: what killed writers left is deleted, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disks import running

from ep_rebalance.load.unfinished import sweep, unfinished

WRITER = """
import sys, time
from pathlib import Path
from ep_rebalance.load.unfinished import unfinished
with unfinished(Path(sys.argv[1]), "state.npz") as (file, path):
    file.write(b"PK and more")
    file.flush()
    print("ready", flush=True)
    time.sleep(600)
"""


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_kept_as_long_as_its_writer_lives_and_then_swept(tmp_path: Path):
    with running(WRITER, tmp_path) as process:
        sweep(tmp_path, "state.npz", b"PK")
        (name,) = left(tmp_path)
        assert name.startswith(".state.npz.")
        process.kill()
        process.wait()
        sweep(tmp_path, "state.npz", b"PK")
    assert left(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"P", b"PK", b"PK\3\4 and more"])
def test_what_an_earlier_release_left_is_swept(tmp_path: Path, content):
    """Which did not lock it."""
    path = tmp_path / ".state.npz.abcd_123"
    path.write_bytes(content)
    path.chmod(0o600)
    sweep(tmp_path, "state.npz", b"PK")
    assert left(tmp_path) == []


def entry(path: Path, *, content: bytes = b"PK", mode: int = 0o600) -> None:
    path.write_bytes(content)
    path.chmod(mode)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: entry(p / "state.npz"), id="the file itself"),
        pytest.param(lambda p: entry(p / ".state.npz.backup"), id="another name"),
        pytest.param(lambda p: entry(p / ".state.npz.backup.01"), id="a longer name"),
        pytest.param(lambda p: entry(p / ".other.npz.abcd_123"), id="of another file"),
        pytest.param(lambda p: entry(p / ".state.npz.BACKUP01"), id="other letters"),
        pytest.param(lambda p: entry(p / ".state.npz.backup01", mode=0o644), id="others read it"),
        pytest.param(lambda p: entry(p / ".state.npz.backup01", content=b"{}"), id="other content"),
        pytest.param(lambda p: (p / ".state.npz.backup01").mkdir(), id="a folder"),
        pytest.param(lambda p: (p / ".state.npz.backup01").symlink_to("/dev/null"), id="a link"),
        pytest.param(lambda p: os.mkfifo(p / ".state.npz.backup01"), id="a FIFO"),
    ],
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, make):
    make(tmp_path)
    before = left(tmp_path)
    sweep(tmp_path, "state.npz", b"PK")
    assert left(tmp_path) == before


def test_the_file_of_another_user_is_left_alone(tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    path = tmp_path / ".state.npz.abcd_123"
    entry(path)
    os.chown(path, 65534, 65534)
    sweep(tmp_path, "state.npz", b"PK")
    assert path.exists()


def test_a_folder_that_is_missing_is_no_error(tmp_path: Path):
    sweep(tmp_path / "missing", "state.npz", b"PK")


def test_what_fails_half_way_leaves_nothing(tmp_path: Path):
    with unfinished(tmp_path, "x") as (file, path):
        assert left(tmp_path) == [path.name]
        file.close()
    with pytest.raises(OSError, match="half"), unfinished(tmp_path, "x") as (file, _):
        raise OSError("half-way")
    assert file.closed
    assert left(tmp_path) == []


def test_one_that_is_swept_before_it_is_locked_is_begun_again(tmp_path: Path, monkeypatch):
    """The sweep of another process falls between the two calls that begin a file."""
    import fcntl

    flock, swept = fcntl.flock, []

    def slow(handle: int, how: int) -> None:
        if not swept:
            swept.append(True)
            sweep(tmp_path, "state.npz", b"PK")
            assert left(tmp_path) == []
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with unfinished(tmp_path, "state.npz") as (file, path):
        assert path.exists()
        file.close()
