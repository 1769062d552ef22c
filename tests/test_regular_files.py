"""Paths that settings name: nothing but a regular file is read, and nothing waits."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from saved_states import IDENTITY

from ep_rebalance.api.auth import own_key
from ep_rebalance.config import ConfigurationError
from ep_rebalance.config_sources import parse_config_argument, read_config_file
from ep_rebalance.formats.contents import beginning, read_text
from ep_rebalance.load.state import check_writable, load_state, read_state
from ep_rebalance.load.trace import TraceReader, check_folder
from ep_rebalance.regular_files import REGULAR, kind_of, read_regular

SETTINGS: dict[str, Callable[[str], object]] = {
    "state.path, to be read": lambda path: load_state(Path(path), IDENTITY),
    "state.path, to be written": lambda path: check_writable(Path(path)),
    "trace.path": check_folder,
    "the configuration file": read_config_file,
    "--ep-rebalance-config": parse_config_argument,
    "control.api_key_file": own_key,
}
ARGUMENTS: dict[str, Callable[[str], object]] = {
    "a state file": lambda path: read_state(Path(path)),
    "a trace": lambda path: TraceReader(Path(path)),
    "a file of another engine": lambda path: read_text(Path(path)),
    "a file of any kind": lambda path: beginning(Path(path), 2),
}
SECONDS = 60.0


def made(kind: str, folder: Path) -> str:
    """A path to something that is neither a regular file nor, as such, an end of anything."""
    path = folder / "named"
    match kind:
        case "a FIFO":
            os.mkfifo(path)
        case "a link to a FIFO":
            os.mkfifo(folder / "target")
            path.symlink_to(folder / "target")
        case "a device":
            return "/dev/zero"
        case "a socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))
        case "a link to itself":
            path.symlink_to(path)
        case "no path":
            return f"{path}\0"
    return str(path)


def in_time(read: Callable[[str], object], path: str) -> BaseException | None:
    """What is raised; fails if nothing comes of it."""
    seen: list[BaseException | None] = []

    def attempt() -> None:
        try:
            read(path)
            seen.append(None)
        except Exception as error:
            seen.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert seen, "it hangs"
    return seen[0]


KINDS = [
    *("a FIFO", "a link to a FIFO", "a device"),
    *("a socket", "a link to itself", "no path"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_names_no_regular_file_is_refused_at_once(tmp_path: Path, setting, kind):
    path = made(kind, tmp_path)
    error = in_time(SETTINGS[setting], path)
    assert isinstance(error, ConfigurationError)
    assert repr(path) in error.reason
    if kind in ("a FIFO", "a device", "a socket"):
        assert kind in error.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_argument_that_names_no_regular_file_is_an_error_at_once(tmp_path, argument, kind):
    error = in_time(ARGUMENTS[argument], made(kind, tmp_path))
    assert isinstance(error, OSError | ValueError)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "trace.path"])
def test_a_folder_is_no_file(tmp_path: Path, setting):
    error = in_time(SETTINGS[setting], str(tmp_path))
    assert isinstance(error, ConfigurationError)
    assert "is a folder" in error.reason


def test_a_file_is_no_folder(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("")
    path.chmod(0o777)
    with pytest.raises(ConfigurationError, match="is a regular file, and must be a folder"):
        check_folder(str(path))
    with pytest.raises(ConfigurationError, match="does not exist"):
        check_folder(str(tmp_path / "missing"))
    (tmp_path / "link").symlink_to(tmp_path)
    check_folder(str(tmp_path / "link"))


def test_a_link_to_a_regular_file_is_one(tmp_path: Path):
    """As Kubernetes mounts secrets and settings."""
    (tmp_path / "target").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("target")
    assert kind_of(tmp_path / "link") == REGULAR
    assert read_regular(tmp_path / "link", 3) == b"abc"


def test_a_file_larger_than_it_may_be_is_not_read(tmp_path: Path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    for large, most in ((path, 1 << 30), (Path("/proc/self/smaps"), 100)):
        with pytest.raises(OSError, match="larger than") as error:
            read_regular(large, most)
        assert error.value.errno == errno.EFBIG
    assert len(read_regular(Path("/proc/self/stat"), 1 << 20)) > 10
