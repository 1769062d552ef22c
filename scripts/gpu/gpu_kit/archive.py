"""Archives of a load: tar packed with xz, the same bytes for the same content."""

import io
import lzma
import tarfile
from collections.abc import Iterable
from pathlib import Path

SUFFIX = ".tar.xz"


def pack(archive: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write (path in the archive, content) pairs in the order given."""
    with (
        lzma.open(archive, "wb", preset=6) as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755 if ".so" in name else 0o644
            tar.addfile(entry, io.BytesIO(content))


def unpack(archive: Path, folder: Path) -> None:
    """Links and paths that lead out of `folder` are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    with lzma.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(folder, filter="data")
