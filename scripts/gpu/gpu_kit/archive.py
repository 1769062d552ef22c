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
    """Raises ValueError for what is no file, such as a link, and for paths that lead out of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # `extractall` refuses these from Python 3.11.4 on only.
    with lzma.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for entry in tar:
            target = (folder / entry.name).resolve()
            content = tar.extractfile(entry) if entry.isfile() else None
            if content is None or not target.is_relative_to(folder.resolve()):
                raise ValueError(
                    f"{archive.name} holds {entry.name}, which is no file of its folder"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())
            target.chmod(entry.mode & 0o755)
