"""Small stand-ins for CUDA libraries and wheels, in their real formats."""

import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PTX, CUBIN = 1, 2


def code(kind: int, architecture: int, size: int = 64) -> bytes:
    """An entry of a fat binary: code that tells its architecture."""
    header = struct.pack("<HHIQIIHHI", kind, 0x101, 64, size, size, 0, 0, 0, architecture)
    return header.ljust(64, b"\0") + bytes([architecture]) * size


def container(*entries: bytes) -> bytes:
    """A fat binary of several entries."""
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(sections: Mapping[str, bytes]) -> bytes:
    """An ELF64 shared library with these sections and no program."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in [*sections, ".shstrtab"])
    bodies = [*sections.values(), names]
    out = bytearray(64)
    headers = [bytes(64)]
    for name, body in zip([*sections, ".shstrtab"], bodies, strict=True):
        out += bytes(-len(out) % 16)
        place = names.index(b"\0" + name.encode() + b"\0") + 1
        headers.append(struct.pack("<IIQQQQIIQQ", place, 1, 0, 0, len(out), len(body), 0, 0, 1, 0))
        out += body
    out += bytes(-len(out) % 16)
    shape = struct.pack("<HHHHHH", 64, 0, 0, 64, len(headers), len(headers) - 1)
    out[:64] = (
        b"\x7fELF\2\1\1".ljust(16, b"\0")
        + struct.pack("<HHIQQQI", 3, 62, 1, 0, 0, len(out), 0)
        + shape
    )
    return bytes(out + b"".join(headers))


def cuda_library() -> bytes:
    """With code for sm_80, sm_90 and sm_120."""
    fat = container(*(code(CUBIN, architecture) for architecture in (80, 90, 120)))
    return library({".text": b"host code", ".nv_fatbin": fat})


def wheel(
    folder: Path, name: str, version: str, files: Mapping[str, bytes], tag: str = "py3-none-any"
) -> Path:
    """A wheel that pip takes."""
    info = f"{name}-{version}.dist-info"
    described = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    content = {**files, **{path: text.encode() for path, text in described.items()}}
    record = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, data in {**content, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(inside, data)
    return path


def project(folder: Path, sources: Sequence[str]) -> Path:
    """A checkout with the project's sources, each as small as can be."""
    for name in sources:
        path = folder / name
        if path.suffix or name.isupper():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        else:
            path.mkdir(parents=True)
            (path / "__init__.py").write_text("")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\n'
        'build-backend = "setuptools.build_meta"\n'
        '[project]\nname = "ep-rebalance"\nversion = "0.1"\n'
        '[tool.setuptools]\npackages = ["ep_rebalance"]\n'
    )
    return folder
