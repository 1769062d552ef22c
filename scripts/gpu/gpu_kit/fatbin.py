"""Cut a CUDA library down to one GPU architecture.

Code for every other architecture is overwritten with zeros, which pack to next to nothing. The file
keeps its size and all its offsets, so nothing has to be linked anew.

Sources: elf(5) for ELF64. NVIDIA published the container header (`fatBinaryHeader` in fatbinary.h, CUDA
10) but never the entries; their layout is known from cuobjdump and from Niklas Eiling's
cuda-fatbin-decompression (fatbin-decompress.h). Checked against the libraries of CUDA 13.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

ELF_MAGIC = b"\x7fELF"
ELFCLASS64, ELFDATA2LSB = 2, 1
SECTION_TABLE_OFFSET = struct.Struct("<40xQ")  # e_shoff
SECTION_TABLE_SHAPE = struct.Struct("<58xHHH")  # e_shentsize, e_shnum, e_shstrndx
SECTION_HEADER = struct.Struct("<I4xQQQQ")  # sh_name, sh_flags, sh_addr, sh_offset, sh_size
SECTIONS = (".nv_fatbin", "__nv_relfatbin")

FATBIN_MAGIC = 0xBA55ED50
CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
CONTAINER_ALIGNMENT = 8
ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, bytes of this header, of the code, architecture
PTX, CUBIN = 1, 2


class NotCuttable(ValueError):
    """A file is not a 64-bit ELF library with CUDA code for the architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What became of a library. kept_bytes, zeroed_bytes: of CUDA code as stored in the file.

    left_empty: containers that hold nothing that the architecture could run.
    """

    library: bytes
    containers: int
    left_empty: int
    kept_bytes: int
    zeroed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Code of one architecture (90 for sm_90 and sm_90a): bytes `start..stop` of the file."""

    kind: int
    architecture: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def cut(library: bytes, architecture: int) -> Cut:
    """Keep what a GPU of `architecture` runs: its own machine code, else the newest PTX it can compile.

    Raises NotCuttable if the file is something else, or holds nothing for that GPU.
    """
    out = bytearray(library)
    containers = left_empty = kept_bytes = zeroed_bytes = 0
    for entries in _containers(library):
        kept = _runnable(entries, architecture)
        containers += 1
        left_empty += not kept
        for entry in entries:
            if entry in kept:
                kept_bytes += entry.size
            else:
                zeroed_bytes += entry.size
                out[entry.start : entry.stop] = bytes(entry.size)
    if not kept_bytes:
        raise NotCuttable(f"it has no CUDA code that sm_{architecture} could run")
    return Cut(
        library=bytes(out),
        containers=containers,
        left_empty=left_empty,
        kept_bytes=kept_bytes,
        zeroed_bytes=zeroed_bytes,
    )


def _runnable(entries: list[Entry], architecture: int) -> list[Entry]:
    native = [e for e in entries if e.kind == CUBIN and e.architecture == architecture]
    if native:
        return native
    ptx = [e for e in entries if e.kind == PTX and e.architecture <= architecture]
    newest = max((e.architecture for e in ptx), default=None)
    return [e for e in ptx if e.architecture == newest]


def _containers(library: bytes) -> Iterator[list[Entry]]:
    """The entries of every container, container by container."""
    sections = list(_fatbin_sections(library))
    if not sections:
        raise NotCuttable(f"it has no section {' or '.join(SECTIONS)}: no CUDA code")
    magic = struct.pack("<I", FATBIN_MAGIC)
    for position, end in sections:
        while (position := library.find(magic, position, end)) >= 0:
            if position % CONTAINER_ALIGNMENT:
                position += 1
                continue
            _, _, header, size = CONTAINER.unpack_from(library, position)
            stop = position + header + size
            if stop > end:
                raise NotCuttable(f"the container at byte {position} runs over its section")
            yield list(_entries(library, position + header, stop))
            position = stop


def _entries(library: bytes, position: int, end: int) -> Iterator[Entry]:
    while position < end:
        if position + ENTRY.size > end:
            raise NotCuttable(f"the entry at byte {position} is cut off")
        kind, _, header, size, architecture = ENTRY.unpack_from(library, position)
        stop = position + header + size
        if header < ENTRY.size or stop > end:
            raise NotCuttable(f"the entry at byte {position} runs over its container")
        yield Entry(kind=kind, architecture=architecture, start=position + header, stop=stop)
        position = stop


def _fatbin_sections(library: bytes) -> Iterator[tuple[int, int]]:
    """First byte and end of each section with CUDA code."""
    if library[:4] != ELF_MAGIC or tuple(library[4:6]) != (ELFCLASS64, ELFDATA2LSB):
        raise NotCuttable("it is no 64-bit little-endian ELF file")
    try:
        headers = _section_headers(library)
    except struct.error:
        raise NotCuttable("its section table is cut off") from None
    for name, start, stop in headers:
        if name.startswith(SECTIONS):
            if stop > len(library):
                raise NotCuttable(f"its section {name} is cut off")
            yield start, stop


def _section_headers(library: bytes) -> list[tuple[str, int, int]]:
    """Name, first byte and end of each section."""
    (table,) = SECTION_TABLE_OFFSET.unpack_from(library)
    entry_bytes, count, names_index = SECTION_TABLE_SHAPE.unpack_from(library)
    rows = [SECTION_HEADER.unpack_from(library, table + i * entry_bytes) for i in range(count)]
    if names_index >= len(rows):
        return []
    names = rows[names_index][3]
    return [(_text(library, names + name), start, start + size) for name, _, _, start, size in rows]


def _text(library: bytes, position: int) -> str:
    return library[position : library.find(b"\0", position)].decode(errors="replace")
