"""The state file: what is written is read, and nothing else is taken for it."""

import io
import pickle
import random
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from mutations import MUTATIONS, mutated
from saved_states import HEADER, IDENTITY, PLACEMENT, STATE

from ep_rebalance.config import ConfigurationError
from ep_rebalance.load import state
from ep_rebalance.load.state import (
    Header,
    ModelIdentity,
    check_writable,
    load_state,
    read_state,
    save_state,
)


def arrays_of(header: Header = HEADER, **changes) -> dict:
    """The arrays of a whole file, with some of them changed or, if None, left out."""
    arrays = {
        "header": np.frombuffer(msgspec.json.encode(header), dtype=np.uint8),
        "slots_LP": PLACEMENT.slots_LP,
        "quotas_LP": STATE.quotas_LP,
        "load_LE": STATE.load_LE,
        **changes,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def whole_file(tmp_path: Path) -> Path:
    path = tmp_path / "state.npz"
    save_state(path, STATE)
    return path


def assert_refused(path: Path, *words: str, identity: ModelIdentity = IDENTITY) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigurationError) as raised:
        load_state(path, identity)
    assert str(path) in raised.value.reason
    for word in words:
        assert word in raised.value.reason
    assert "state.path" in raised.value.remedy
    assert path.read_bytes() == before


def test_what_was_saved_is_loaded(tmp_path: Path):
    path = whole_file(tmp_path)
    for read in (load_state(path, IDENTITY), read_state(path)):
        assert read is not None
        assert read.header == HEADER
        assert read.placement == PLACEMENT
        assert (read.quotas_LP == STATE.quotas_LP).all()
        assert (read.load_LE == STATE.load_LE).all()


def test_no_file_is_no_state(tmp_path: Path):
    assert load_state(tmp_path / "none.npz", IDENTITY) is None


def test_a_model_that_was_moved_is_the_same_model(tmp_path: Path):
    moved = msgspec.structs.replace(IDENTITY, model="/elsewhere/model")
    assert load_state(whole_file(tmp_path), moved) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config_hash": "other", "model": "org/other"}, ["'org/model'", "'org/other'"]),
        ({"experts": 8}, ["experts=4, not 8"]),
        ({"ep_size": 4}, ["ep_size=2, not 4"]),
        ({"redundant_experts": 0}, ["redundant_experts=2, not 0"]),
    ],
)
def test_the_file_of_another_model_or_layout_is_refused(tmp_path: Path, change, words):
    other = msgspec.structs.replace(IDENTITY, **change)
    assert_refused(whole_file(tmp_path), *words, identity=other)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, part):
    path = whole_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert_refused(path)


def test_whatever_is_changed_is_refused(tmp_path: Path):
    path = whole_file(tmp_path)
    content, draw = path.read_bytes(), random.Random(0)
    tracemalloc.start()
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(content, draw))
        with pytest.raises(ConfigurationError):
            load_state(path, IDENTITY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("place", [0, 0.25, 0.5, 0.75, 1])
def test_each_bit_counts(tmp_path: Path, place):
    path = whole_file(tmp_path)
    content = path.read_bytes()
    at = min(int(place * len(content)), len(content) - 1)
    for bit in range(8):
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        path.write_bytes(bytes(changed))
        assert_refused(path, "is no readable state file")


def test_a_file_of_format_1_is_refused_and_named_as_such(tmp_path: Path):
    path = tmp_path / "state.npz"
    np.savez(path, **arrays_of(msgspec.structs.replace(HEADER, version=1)))
    assert_refused(path, "does not end with a digest", "saved in format 1")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    path = whole_file(tmp_path)
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    with pytest.raises(ConfigurationError, match="larger than"):
        load_state(path, IDENTITY)


def test_a_file_that_unpacks_to_more_is_not_unpacked(tmp_path: Path, monkeypatch):
    path = tmp_path / "state.npz"
    monkeypatch.setattr(np, "savez", np.savez_compressed)
    path.write_bytes(state._sealed(arrays_of(HEADER) | {"more": np.zeros(1 << 20, np.uint8)}))
    monkeypatch.setattr(state, "_MAX_BYTES", 1 << 19)
    assert path.stat().st_size < 1 << 19
    assert_refused(path, "unpacks to more than 524288 bytes")


def zip_with(**entries: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return content.getvalue()


def one_array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.arange(3))
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"mode: rebalance\n", id="text"),
        pytest.param(bytes(range(256)) * 8, id="bytes"),
        pytest.param(pickle.dumps({"slots_LP": [1, 2]}), id="pickle"),
        pytest.param(one_array(), id="one array"),
        pytest.param(zip_with(readme=b"hello"), id="a zip of something else"),
        pytest.param(zip_with(header=b"hello", slots_LP=b"x"), id="a zip of the same names"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content):
    path = tmp_path / "state.npz"
    path.write_bytes(content)
    assert_refused(path, "is no readable state file")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        pytest.param(
            arrays_of(HEADER.__class__(**{**msgspec.structs.asdict(HEADER), "version": 99})),
            ["version 99"],
            id="later version",
        ),
        pytest.param(
            arrays_of(msgspec.structs.replace(HEADER, format="other")), ["'other'"], id="format"
        ),
        pytest.param(arrays_of(header=None), ["no readable state file"], id="no header"),
        pytest.param(arrays_of(slots_LP=None), ["lacks slots_LP"], id="no slots"),
        pytest.param(
            arrays_of(quotas_LP=None, load_LE=None), ["lacks load_LE, quotas_LP"], id="no quotas"
        ),
        pytest.param(arrays_of(quotas_LP=np.ones((3, 5))), ["different shapes"], id="shapes"),
        pytest.param(
            arrays_of(slots_LP=np.zeros((3, 6), dtype=int)), ["is damaged"], id="no placement"
        ),
        pytest.param(
            arrays_of(slots_LP=np.ones(4), quotas_LP=np.ones(4)), ["is damaged"], id="dimensions"
        ),
    ],
)  # fmt: skip
def test_a_file_with_other_contents_is_refused(tmp_path: Path, arrays, words):
    path = tmp_path / "state.npz"
    path.write_bytes(state._sealed(arrays))
    assert_refused(path, *words)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("went-off"),)


@pytest.mark.parametrize("name", ["header", "slots_LP", "quotas_LP", "load_LE", "more"])
def test_a_pickle_in_the_file_is_refused_and_not_run(tmp_path: Path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state.npz"
    np.savez(path, **{**arrays_of(), name: np.array([Bomb()], dtype=object)})
    assert_refused(path, "is no readable state file")
    assert not Path("went-off").exists()


def test_saving_replaces_the_file_at_once_and_leaves_nothing_beside_it(tmp_path: Path):
    path = whole_file(tmp_path)
    later = replace(STATE, header=msgspec.structs.replace(HEADER, generation=8))
    with path.open("rb") as reading:
        save_state(path, later)
        assert reading.read() != path.read_bytes()  # a reader keeps the file that it opened
    state = load_state(path, IDENTITY)
    assert state is not None
    assert state.header.generation == 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.npz"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = whole_file(tmp_path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        save_state(path, STATE)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.npz"]


def test_a_missing_folder_is_an_os_error(tmp_path: Path):
    with pytest.raises(OSError, match="missing"):
        save_state(tmp_path / "missing" / "state.npz", STATE)


def test_a_path_that_can_be_written_later_passes(tmp_path: Path):
    check_writable(tmp_path / "state.npz")
    check_writable(whole_file(tmp_path))


@pytest.mark.parametrize(
    ("path", "words"), [("missing/state.npz", "cannot be written"), (".", "is a folder")]
)
def test_a_path_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path, path, words):
    with pytest.raises(ConfigurationError, match=words) as raised:
        check_writable(tmp_path / path)
    assert "existing folder" in raised.value.remedy
