"""Contents of a file: its bytes within bounds, unpacked if it is gzipped, and what kind of file it is.

Nothing in a file is executed.
"""

from __future__ import annotations

import codecs
import gzip
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

from ep_rebalance.load.trace.head import MAGIC
from ep_rebalance.regular_files import open_regular

MAX_TEXT_BYTES = 256 << 20
MAX_ARRAY_BYTES = 4 << 30
_PART_BYTES = 1 << 20
_MOST_GROWTH = 100
"""How many times as large as its file something may be that is unpacked. Recordings of ids shrink to a tenth,
those with many zeros to a fiftieth.
"""
_MAY_GROW_BYTES = 64 << 20
"""Up to this size whatever it was."""
_GZIP = b"\x1f\x8b"

_OTHER_TEXT = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""By the mark that such text begins with; the longer marks first."""

_UNPACK = "unpack it first; only gzip is unpacked here"
_UNREAD = (
    (MAGIC, "a trace of this plugin", "replay, plan, advise and inspect read it as it is"),
    (b"PAR1", "a Parquet file", "write it as CSV with the columns layer, expert, count"),
    (b"\x89HDF", "an HDF5 file", "write its array with numpy.save"),
    (b"SQLite format 3", "an SQLite database", "write it as CSV with layer, expert, count"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", _UNPACK),
    (b"\xfd7zXZ", "packed by xz", _UNPACK),
    (b"BZh", "packed by bzip2", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"%PDF", "a PDF", "write its table as CSV with the columns layer, expert, count"),
    (b"\x80", "a pickle, which could run code", "write its arrays with numpy.savez or torch.save"),
)
"""(first bytes, what such a file is, what to do instead)."""


class FormatError(ValueError):
    """A file is not what it should be. The text names the file, the place and the reason."""

    def __init__(self, path: Path, place: str, reason: str) -> None:
        super().__init__(f"{path}: {place + ' ' if place else ''}{reason}")


def suffix_of(path: Path) -> str:
    """What the name of a file ends in, in small letters: `.json` for load.json and for load.JSON.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_contents(path: Path, max_bytes: int) -> IO[bytes]:
    """A file for reading, unpacked into an unnamed file if it is gzipped.

    Raises FormatError for more than `max_bytes`, packed or unpacked, and for damaged gzip; OSError for what
    is not a regular file.
    """
    if (size := path.stat().st_size) > max_bytes:
        raise FormatError(path, "", f"has {size} bytes, more than the {max_bytes} that are read")
    file = open_regular(path)
    try:
        packed = file.read(2) == _GZIP
        file.seek(0)
        if not packed:
            return file
        with file:
            return _unpacked(path, file, max_bytes)
    except BaseException:
        file.close()
        raise


def _unpacked(path: Path, file: IO[bytes], max_bytes: int) -> IO[bytes]:
    room, whole = max_bytes, tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
    try:
        with gzip.GzipFile(fileobj=file) as unpacking:
            while part := unpacking.read(_PART_BYTES):
                room -= len(part)
                if room < 0:
                    raise FormatError(path, "", f"unpacks to more than {max_bytes} bytes")
                check_growth(path, "", max_bytes - room)
                whole.write(part)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        whole.close()
        raise FormatError(path, "", f"is damaged gzip ({error}); copy it again") from None
    except BaseException:
        whole.close()
        raise
    whole.seek(0)
    return whole


def beginning(path: Path, length: int) -> bytes:
    """The first bytes of a file, unpacked, at most `length`; b"" for a folder."""
    if path.is_dir():
        return b""
    with open_regular(path) as file:
        first = file.read(length)
        if not first.startswith(_GZIP):
            return first
        file.seek(0)
        try:
            with gzip.GzipFile(fileobj=file) as unpacking:
                return unpacking.read(length)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return b""


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A file's text, without a byte order mark.

    Raises FormatError if it is too large or not UTF-8, OSError if it cannot be read.
    """
    with open_contents(path, max_bytes) as file:
        data = file.read()
    for mark, name in _OTHER_TEXT.items():
        if data.startswith(mark):
            raise FormatError(path, "", f"is {name} text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(path, f"byte {error.start}", "is not UTF-8; save it as UTF-8") from None


def check_unpacked_size(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises FormatError for an archive of arrays too large for memory; no more than it declares is
    unpacked.
    """
    size = sum(part.file_size for part in archive.infolist())
    if size > MAX_ARRAY_BYTES:
        raise FormatError(path, "", f"unpacks to {size} bytes, more than {MAX_ARRAY_BYTES}")
    check_growth(path, "", size)


def check_growth(path: Path, place: str, size: int) -> None:
    """Raises FormatError if something in a file is so much larger than it that reading it would take hours.

    size: in bytes.
    """
    if size > max(_MAY_GROW_BYTES, _MOST_GROWTH * path.stat().st_size):
        reason = f"unpacks to {size} bytes or more, over {_MOST_GROWTH} times its size"
        raise FormatError(path, place, f"{reason}; if it is right, save it unpacked")


def unread_kind(path: Path) -> str:
    """What a file is that no format reads, and what to do; "" if that is not known."""
    first = beginning(path, 16)
    if not first:
        return f"is {'a folder' if path.is_dir() else 'empty'}; name a file that holds something"
    for magic, kind, remedy in _UNREAD:
        if first.startswith(magic):
            return f"is {kind}: {remedy}"
    return ""
