"""Loads are packed and unpacked: CUDA code cut, wheels found or fetched, sizes held to the limit."""

import lzma
import shutil
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_kit.archive import pack, unpack
from gpu_kit.fatbin import NotCuttable, cut
from gpu_kit.loads import VLLM_LIBRARIES, Recipe
from gpu_kit.prepare import PrepareError, parse_arguments, prepare
from gpu_kit.wheels import PROJECT_SOURCES, FetchError, Target, fetch
from made_up_files import CUBIN, PTX, code, container, cuda_library, library, project, wheel

TARGET = Target("3.12", "2.35")

# --- cutting


def test_other_architectures_are_zeroed_and_nothing_moves():
    before = cuda_library()
    result = cut(before, 90)
    assert len(result.library) == len(before)
    assert result.library.count(bytes([90]) * 64) == 1
    assert result.library.count(bytes([80]) * 64) == result.library.count(bytes([120]) * 64) == 0
    assert (result.containers, result.left_empty) == (1, 0)
    assert (result.kept_bytes, result.zeroed_bytes) == (64, 128)
    changed = [i for i, (a, b) in enumerate(zip(before, result.library, strict=True)) if a != b]
    assert {before[i] for i in changed} == {80, 120}


def test_without_machine_code_the_newest_ptx_that_the_gpu_takes_is_kept():
    entries = [code(PTX, architecture) for architecture in (70, 80, 100)]
    result = cut(library({".nv_fatbin": container(*entries)}), 90)
    assert bytes([80]) * 64 in result.library
    assert result.zeroed_bytes == 128


def test_every_container_of_every_section_is_cut():
    cubins = container(code(CUBIN, 90), code(CUBIN, 100, size=128))
    other = container(code(CUBIN, 100, size=24))
    sections = {".nv_fatbin": cubins + bytes(8) + other, "__nv_relfatbin": cubins, ".data": other}
    result = cut(library(sections), 90)
    assert (result.containers, result.left_empty) == (3, 1)
    assert (result.kept_bytes, result.zeroed_bytes) == (128, 280)
    assert bytes([100]) * 24 in result.library  # .data is no CUDA code


def too_long(fat: bytes) -> bytes:
    """A container or an entry: the size stands at the same place in both."""
    return fat[:8] + struct.pack("<Q", 1 << 20) + fat[16:]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        pytest.param(b"", "no 64-bit little-endian ELF", id="empty"),
        pytest.param(b"MZ" + bytes(200), "no 64-bit little-endian ELF", id="another format"),
        pytest.param(b"\x7fELF\1\1" + bytes(200), "no 64-bit little-endian ELF", id="32 bits"),
        pytest.param(cuda_library()[:200], "section table is cut off", id="cut off"),
        pytest.param(library({".text": b"x"}), "no section .nv_fatbin", id="no CUDA code"),
        pytest.param(
            library({".nv_fatbin": container(code(CUBIN, 100))}), "sm_90 could run", id="others"
        ),
        pytest.param(
            library({".nv_fatbin": too_long(container(code(CUBIN, 90)))}),
            "runs over its section",
            id="container too long",
        ),
        pytest.param(
            library({".nv_fatbin": container(too_long(code(CUBIN, 90)))}),
            "runs over its container",
            id="entry too long",
        ),
        pytest.param(
            library({".nv_fatbin": container(code(CUBIN, 90), b"rest")}),
            "is cut off",
            id="entry cut off",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(file, reason):
    with pytest.raises(NotCuttable, match=reason):
        cut(file, 90)


# --- archives


def test_an_archive_gives_back_what_went_in(tmp_path: Path):
    files = [("a/b.py", b"text"), ("a/lib.so.2", bytes(1 << 16))]
    for name in ("first", "second"):
        pack(tmp_path / name, files)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    unpack(tmp_path / "first", tmp_path / "out")
    assert {path: (tmp_path / "out" / path).read_bytes() for path, _ in files} == dict(files)


@pytest.mark.parametrize(
    "entry",
    [tarfile.TarInfo("../beside"), tarfile.TarInfo("/tmp/beside"), tarfile.TarInfo("link")],
    ids=["above", "elsewhere", "link"],
)
def test_nothing_is_unpacked_outside_of_its_folder(tmp_path: Path, entry: tarfile.TarInfo):
    if entry.name == "link":
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc"
    with (
        lzma.open(tmp_path / "bad.tar.xz", "wb") as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        tar.addfile(entry)
    with pytest.raises(ValueError, match=r"bad\.tar\.xz holds"):
        unpack(tmp_path / "bad.tar.xz", tmp_path / "out")
    assert not (tmp_path / "beside").exists()
    assert not list((tmp_path / "out").iterdir())


# --- wheels


@pytest.mark.parametrize(
    ("tags", "taken"),
    [
        (("py3", "none", "any"), True),
        (("py2.py3", "none", "any"), True),
        (("py37", "none", "any"), True),
        (("py2", "none", "any"), False),
        (("cp312", "cp312", "manylinux_2_17_x86_64.manylinux2014_x86_64"), True),
        (("cp38", "abi3", "manylinux_2_28_x86_64"), True),
        (("cp313", "abi3", "manylinux_2_28_x86_64"), False),
        (("cp311", "cp311", "manylinux_2_17_x86_64"), False),
        (("cp312", "cp312", "manylinux_2_39_x86_64"), False),
        (("cp312", "cp312", "musllinux_1_2_x86_64"), False),
        (("cp312", "cp312", "manylinux_2_17_aarch64"), False),
    ],
)
def test_wheels_that_run_on_the_target_are_told_from_others(tags, taken):
    assert TARGET.takes(*tags) == taken


def test_a_wheel_that_lies_there_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    there = wheel(tmp_path / "there", "Some_Thing", "1.0", {})
    wheel(tmp_path / "there", "Some_Thing", "2.0", {})
    assert fetch(["some-thing==1.0"], tmp_path / "cache", TARGET, [there.parent]) == [there]


def test_wheels_are_fetched_once_from_where_pip_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    published = wheel(tmp_path / "index", "thing", "1.0", {})
    cache = tmp_path / "cache"
    assert fetch(["thing==1.0"], cache, TARGET, []) == [cache / published.name]
    published.unlink()
    assert fetch(["thing==1.0"], cache, TARGET, []) == [cache / published.name]
    with pytest.raises(FetchError, match=r"thing==2\.0"):
        fetch(["thing==2.0"], cache, TARGET, [])


# --- loads


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """All wheels lie there; nothing is fetched."""
    wheels = tmp_path / "wheels"
    libraries = dict.fromkeys(VLLM_LIBRARIES, cuda_library())
    python = {"vllm/__init__.py": b"", "vllm/flash.abi3.so": b"heavy", "vllm/include/x.json": b""}
    wheel(wheels, "vllm", "0.33.0", libraries | python, "cp38-abi3-manylinux_2_28_x86_64")
    wheel(wheels, "nccl", "2.30.7", {"nvidia/nccl/lib/libnccl.so.2": cuda_library()})
    wheel(wheels, "needed", "1.0", {"needed.py": b"answer = 42"})
    (tmp_path / "dependencies.txt").write_text("needed==1.0\n")
    return Recipe(
        root=project(tmp_path / "checkout", PROJECT_SOURCES),
        cache=tmp_path / "cache",
        target=TARGET,
        architecture=90,
        dependencies=tmp_path / "dependencies.txt",
        nccl="nccl==2.30.7",
        wheels=(wheels,),
    )


def test_a_load_is_packed_again_only_if_its_inputs_changed(recipe, tmp_path, capsys):
    def packed() -> list[str]:
        prepare(recipe, tmp_path / "out", ["a", "b", "c"], limit_mb=60)
        lines = capsys.readouterr().out.splitlines()
        return [line.split()[2] for line in lines if line.startswith("packing")]

    assert packed() == ["a", "b", "c"]
    assert packed() == []
    (recipe.root / "kernels" / "new.py").write_text("x = 1\n")
    assert packed() == ["b"]
    shutil.rmtree(tmp_path / "out" / "c")
    assert packed() == ["c"]


def test_vllm_goes_without_its_other_libraries(recipe, tmp_path):
    prepare(recipe, tmp_path / "out", ["a"], limit_mb=60)
    unpack(tmp_path / "out" / "a" / "vllm.tar.xz", tmp_path / "site")
    files = {str(p.relative_to(tmp_path / "site")) for p in tmp_path.glob("site/**/*.*")}
    assert "vllm/__init__.py" in files
    assert set(VLLM_LIBRARIES) <= files
    assert not files & {"vllm/flash.abi3.so", "vllm/include/x.json"}
    assert bytes([120]) * 64 not in (tmp_path / "site" / VLLM_LIBRARIES[0]).read_bytes()


def test_a_load_that_is_too_large_is_named_with_its_largest_parts(recipe, tmp_path, capsys):
    with pytest.raises(PrepareError, match=r"load c: .* mostly nccl\.tar\.xz") as raised:
        prepare(recipe, tmp_path / "out", ["c"], limit_mb=1e-6)
    assert "dependencies.txt" in str(raised.value)
    assert "load c: 0.0 MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "load", "words"),
    [
        ({"vllm": "vllm==9.9"}, "a", ["the wheels of load a could not be had", "--wheels"]),
        ({"architecture": 75}, "c", ["sm_75", "libnccl.so.2", "--architecture"]),
    ],
)
def test_what_cannot_be_packed_is_refused_with_a_remedy(
    recipe, tmp_path, monkeypatch, change, load, words
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PrepareError) as raised:
        prepare(replace(recipe, **change), tmp_path / "out", [load], limit_mb=60)
    for word in words:
        assert word in str(raised.value)
    assert not (tmp_path / "out" / load / "load.json").exists()


def test_options_name_the_target(capsys):
    options = parse_arguments(["b", "--python", "3.11", "--more", "x==1", "y==2"])
    assert (options.loads, options.python, options.more) == (["b"], "3.11", ["x==1", "y==2"])
    with pytest.raises(SystemExit):
        parse_arguments(["d"])
    assert "there is no load d" in capsys.readouterr().err
