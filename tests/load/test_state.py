"""The state file: what is written is read, and nothing else is taken for it."""

import io
import json
import math
import pickle
import random
import signal
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from disks import room_for, run
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
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
    sweep_unfinished,
)
from ep_rebalance.placement import Placement


def arrays_of(header: Header | np.ndarray | None = HEADER, **changes) -> dict:
    """The arrays of a whole file, with some of them changed or, if None, left out."""
    if isinstance(header, Header):
        header = np.frombuffer(msgspec.json.encode(header), dtype=np.uint8)
    arrays = {
        "header": header,
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
    """It would be within bounds, and yet take minutes to be looked through."""
    path = tmp_path / "state.npz"
    monkeypatch.setattr(np, "savez", np.savez_compressed)
    path.write_bytes(state._sealed(arrays_of(HEADER) | {"more": np.zeros(1 << 20, np.uint8)}))
    size = path.stat().st_size
    assert size < 1 << 19
    assert_refused(path, f"it is packed: it unpacks to more than its {size} bytes")


@pytest.mark.filterwarnings("error")
def test_a_load_of_shorter_numbers_is_read(tmp_path: Path):
    path = sealed_with(tmp_path, arrays_of(load_LE=STATE.load_LE.astype(np.float16)))
    assert np.array_equal(read_state(path).load_LE, STATE.load_LE)


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


HUGE = 2**70
BAD_NUMBERS = [math.nan, math.inf, -math.inf, -1e-3, -8.6e9]
BAD_FIELDS = {
    "generation": st.sampled_from([-5, -1, HUGE, 2**53 + 1, 1.5, "7", None, True, [7]]),
    "saved_at": st.sampled_from([-1.0, 1e300, "now", None, HUGE]),
    "plugin_version": st.sampled_from([1, None, []]),
    "format": st.sampled_from(["", "other", 1, None]),
    "version": st.sampled_from([0, 1, 3, -2, "2", None, HUGE]),
}
BAD_IDENTITY = {
    "model": st.sampled_from([None, 3, ["m"]]),
    "config_hash": st.sampled_from([None, 3, {}]),
    "experts": st.sampled_from([0, -4, 3, 5, HUGE, 4.5, "4", None]),
    "ep_size": st.sampled_from([0, -2, 4, 5, HUGE, 2.5, "2", None]),
    "redundant_experts": st.sampled_from([-1, 0, 3, HUGE, 2.5, "2", None]),
    "moe_layers": st.sampled_from(
        [[1, 2], [3, 2, 1], [1, 1, 2], [-1, 0, 1], [1, 2, 3, 4], "123", 3]
    ),
}
DTYPES = ["U8", "S8", "?", "c16", "i8", "V8", "M8[s]", "m8[s]", [("a", "f8")]]


@st.composite
def bad_floats(draw, whole: np.ndarray, *, above: float | None = None) -> np.ndarray:
    """An array of floating-point numbers that cannot be in the place of `whole`."""
    kind = draw(st.sampled_from(["number", "dtype", "shape", "zeros"]))
    if kind == "dtype":
        return np.zeros(whole.shape, draw(st.sampled_from(DTYPES)))
    if kind == "shape":
        shapes = st.sampled_from([(), (0,), (3,), (2, 6), (3, 5), (6, 3), (3, 6, 1), (0, 6)])
        shape = draw(shapes.filter(lambda shape: shape != whole.shape))
        return np.ones(shape)
    if kind == "zeros" and above is not None:
        return np.zeros_like(whole)
    changed = whole.copy()
    place = tuple(draw(st.integers(0, size - 1)) for size in whole.shape)
    more = [] if above is None else [above, 1.5, 1e300]
    changed[place] = draw(st.sampled_from(BAD_NUMBERS + more))
    return changed


@st.composite
def bad_slots(draw) -> np.ndarray:
    slots = PLACEMENT.slots_LP
    kind = draw(st.sampled_from(["float", "dtype", "number", "shape", "wrapped"]))
    if kind == "float":
        return slots + draw(st.sampled_from([0.0, 0.5, math.nan]))
    if kind == "dtype":
        return np.zeros(slots.shape, draw(st.sampled_from([d for d in DTYPES if d != "i8"])))
    if kind == "shape":
        return draw(st.sampled_from([slots[0], slots[:, :4], slots[:0], slots[..., None], slots.T]))
    if kind == "wrapped":  # the same numbers, if they were cut down to 32 bits
        return slots.astype(np.int64) + draw(st.sampled_from([1, -1, 3])) * 2**32
    changed = slots.astype(np.int64)
    place = tuple(draw(st.integers(0, size - 1)) for size in slots.shape)
    changed[place] = draw(st.sampled_from([-1, 4, 2**31 - 1, -(2**31)]))
    return changed


def sealed_with(folder: Path, arrays: dict) -> Path:
    """A file of these arrays with the right digest, as only somebody who means it would make."""
    path = folder / "state.npz"
    path.write_bytes(state._sealed(arrays))
    return path


def header_with(**changes) -> np.ndarray:
    """The header's JSON with fields changed, whatever their types."""
    fields = msgspec.to_builtins(HEADER)
    fields["identity"] |= {k: v for k, v in changes.items() if k in fields["identity"]}
    fields |= {k: v for k, v in changes.items() if k in fields}
    return np.frombuffer(json.dumps(fields).encode(), dtype=np.uint8)


def test_what_these_tests_change_is_whole_before(tmp_path: Path):
    path = sealed_with(tmp_path, arrays_of(header=header_with()))
    assert load_state(path, IDENTITY) is not None
    assert {*BAD_FIELDS, "identity"} == {*Header.__struct_fields__}
    assert {*BAD_IDENTITY} == {*ModelIdentity.__struct_fields__}


@pytest.mark.parametrize("field", [*BAD_FIELDS, *BAD_IDENTITY])
@seed(0)
@given(data=st.data())
def test_a_header_that_cannot_be_is_refused(tmp_path_factory, field, data):
    value = data.draw((BAD_FIELDS | BAD_IDENTITY)[field])
    path = sealed_with(
        tmp_path_factory.mktemp("s"), arrays_of(header=header_with(**{field: value}))
    )
    with pytest.raises(ConfigurationError):
        read_state(path)


def test_a_state_on_more_ranks_than_any_group_has_is_refused(tmp_path):
    """Arrays of ranks would not fit into memory."""
    placement = Placement.contiguous(num_layers=3, num_experts=4, num_ranks=1)
    header = header_with(redundant_experts=0, ep_size=10**9)
    quotas_LP = placement.even_quotas_LP()
    path = sealed_with(
        tmp_path, arrays_of(header=header, slots_LP=placement.slots_LP, quotas_LP=quotas_LP)
    )
    with pytest.raises(ConfigurationError, match=r"3 layers of 4 slots on 1000000000 ranks cannot"):
        read_state(path)


@seed(0)
@settings(max_examples=200)
@given(
    changed=bad_slots().map(lambda a: {"slots_LP": a})
    | bad_floats(STATE.quotas_LP, above=1.1).map(lambda a: {"quotas_LP": a})
    | bad_floats(STATE.load_LE).map(lambda a: {"load_LE": a})
)
def test_an_array_that_cannot_be_is_refused(tmp_path_factory, changed):
    path = sealed_with(tmp_path_factory.mktemp("s"), arrays_of(**changed))
    assert_refused(path)


@seed(0)
@settings(max_examples=200)
@given(
    quotas=arrays(np.float64, (3, 6), elements=st.floats() | st.sampled_from([0.0, 0.5, 1.0])),
    load=arrays(np.float64, (3, 4), elements=st.floats() | st.floats(0, 1e9)),
    whole=st.booleans(),
)
def test_whatever_is_read_can_be_served(tmp_path_factory, quotas, load, whole):
    """Quotas that are parts of each expert's tokens, and a load that can be added up; else it is refused."""
    if whole:
        quotas = STATE.quotas_LP
    path = sealed_with(tmp_path_factory.mktemp("s"), arrays_of(quotas_LP=quotas, load_LE=load))
    try:
        read = read_state(path)
    except ConfigurationError:
        assert not (whole and (load >= 0).all() and (load <= 1e18).all())
        return
    assert np.isfinite(read.load_LE.sum())
    assert (read.load_LE >= 0).all()
    for slots_P, quotas_P in zip(PLACEMENT.slots_LP, read.quotas_LP, strict=True):
        assert ((quotas_P >= 0) & (quotas_P <= 1.001)).all()
        for expert in range(4):
            assert quotas_P[slots_P == expert].sum() == pytest.approx(1.0)


def test_quotas_that_leave_a_replica_without_tokens_are_right(tmp_path: Path):
    """With `planner.objective: time` a step that reads sends all tokens of an expert to one slot."""
    quotas_LP = np.ones((3, 6))
    quotas_LP[:, 4:] = 0.0
    assert read_state(sealed_with(tmp_path, arrays_of(quotas_LP=quotas_LP))).quotas_LP[0, 4] == 0.0


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


def test_of_a_link_the_target_is_written(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    for place, target in (("one", "disk/state.npz"), ("two", "one"), ("far", tmp_path / "disk/s")):
        (tmp_path / place).symlink_to(target)
        check_writable(tmp_path / place)
        save_state(tmp_path / place, STATE)
        assert (tmp_path / place).is_symlink()
        assert load_state(tmp_path / place, IDENTITY) is not None
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["s", "state.npz"]
    assert not (tmp_path / "disk" / "state.npz").is_symlink()


def test_a_link_into_a_missing_folder_is_refused(tmp_path: Path):
    (tmp_path / "state.npz").symlink_to("missing/state.npz")
    with pytest.raises(ConfigurationError, match="cannot be written in folder"):
        check_writable(tmp_path / "state.npz")


KILLED_HALF_WAY = """
import os, signal, sys
from pathlib import Path
from saved_states import STATE
from ep_rebalance.load import state
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
state.save_state(Path(sys.argv[1]), STATE)
"""


def test_saves_that_are_killed_leave_the_old_file_and_are_swept_at_start(tmp_path: Path):
    path = whole_file(tmp_path)
    before = path.read_bytes()
    (tmp_path / "link.npz").symlink_to(path)
    for named in (path, tmp_path / "link.npz"):
        assert run(KILLED_HALF_WAY, named).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".state.npz.*"))) == 2
    assert path.read_bytes() == before
    sweep_unfinished(tmp_path / "link.npz")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.npz", "state.npz"]


def test_a_disk_that_takes_only_a_part_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path):
    path = whole_file(tmp_path)
    before = path.read_bytes()
    (tmp_path / "empty").write_bytes(b"")
    with room_for(tmp_path / "empty", 100), pytest.raises(OSError, match="too large"):
        save_state(path, STATE)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "state.npz"]


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
