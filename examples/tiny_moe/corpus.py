"""Text of five domains from Debian packages, split into training and held-out documents.

Every package's licence allows a model trained on its text to be given away under Apache-2.0:
Python's library and documentation are under the PSF licence, the Apache HTTP Server's manual is
under Apache-2.0, and the Metamath database set.mm is in the public domain (CC0).
"""

from __future__ import annotations

import json
import re
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

DOMAINS = ("python", "english", "french", "japanese", "mathematics")
PACKAGES = (
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "python3.11-doc",
    "apache2-doc",
    "metamath-databases",
)
DEFAULT_WORK_DIR = Path.home() / ".cache" / "ep-rebalance" / "tiny_moe"

TRAINING_BYTES = 3_000_000  # at most, per domain
HELD_OUT_BYTES = 96_000  # at least, per domain
LARGEST_HELD_OUT_DOCUMENT = 48_000

# Parts of Python's library that carry a licence of their own, and tables that are no program text.
PYTHON_LEFT_OUT = re.compile(
    r"/(logging|multiprocessing|sqlite3|asyncio|encodings|pydoc_data|idlelib|lib2to3/tests)/"
    r"|/(asynchat|asyncore|tarfile|turtle|trace|uu|cProfile|profile|pstats)\.py$"
    r"|/(xmlrpc|http)/|_sysconfigdata"
)
OWN_LICENCE = re.compile(r"permission (to use|is hereby)|redistribution and use", re.IGNORECASE)

BLOCK_TAG = re.compile(r"p|div|section|article|li|ul|ol|dl|dt|dd|td|th|tr|table|h[1-6]|br|body")
SKIPPED_TAG = re.compile(r"script|style|svg|nav|pre|button|head")


class ParagraphReader(HTMLParser):
    """Collects the text of an HTML page, one string per block element, without code listings."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if BLOCK_TAG.fullmatch(tag):
            self.end_paragraph()
        self._skipping += bool(SKIPPED_TAG.fullmatch(tag))

    def handle_endtag(self, tag: str) -> None:
        if BLOCK_TAG.fullmatch(tag):
            self.end_paragraph()
        if SKIPPED_TAG.fullmatch(tag):
            self._skipping = max(0, self._skipping - 1)

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._pieces.append(data)

    def end_paragraph(self) -> None:
        """Close the block being read and keep what it says, white space folded."""
        text = " ".join("".join(self._pieces).replace("¶", " ").split())
        self._pieces.clear()
        if text:
            self.paragraphs.append(text)


def paragraphs_of(page: Path) -> list[str]:
    """The blocks of text on an HTML page, in reading order."""
    reader = ParagraphReader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.end_paragraph()
    return reader.paragraphs


def close_japanese_gaps(text: str) -> str:
    """Drop the spaces that HTML line breaks leave inside Japanese sentences."""
    return re.sub(r"(?<=[^\x00-\x7f]) (?=[^\x00-\x7f])", "", text)


def is_prose(text: str) -> bool:
    """A sentence or more, rather than a menu entry, a heading or a signature."""
    return len(text) >= 60 and " " in text


def is_japanese(text: str) -> bool:
    """At least a third of the characters are not ASCII: the page's untranslated lines are not."""
    return len(text) >= 20 and 3 * sum(character > "\x7f" for character in text) >= len(text)


def read_pages(
    pages: Iterable[Path], keep: Callable[[str], bool], tidy: Callable[[str], str] = str
) -> Iterator[tuple[str, str]]:
    """(name, text) per page; a paragraph already seen on another page is left out."""
    seen: set[str] = set()
    for page in pages:
        fresh = []
        for paragraph in map(tidy, paragraphs_of(page)):
            if keep(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                fresh.append(paragraph)
        if fresh:
            yield str(page), "\n".join(fresh) + "\n"


def read_python(root: Path) -> Iterator[tuple[str, str]]:
    """The standard library's modules, less those that carry licences (or data) of their own."""
    for path in sorted((root / "usr/lib/python3.11").rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) < 500 or PYTHON_LEFT_OUT.search(str(path)) or OWN_LICENCE.search(text):
            continue
        yield str(path), text


def read_english(root: Path) -> Iterator[tuple[str, str]]:
    """The prose of Python's documentation, without indices and code listings."""
    folder = root / "usr/share/doc/python3.11/html"
    pages = (
        page
        for part in ("tutorial", "howto", "library", "reference", "faq", "extending", "using")
        for page in sorted((folder / part).glob("*.html"))
    )
    return read_pages(pages, is_prose)


def translated_pages(root: Path, language: str) -> list[Path]:
    """The manual's pages in a language: an untranslated page is a copy of the English one."""
    folder = root / "usr/share/doc/apache2-doc/manual" / language
    mark = f'<html lang="{language}"'
    pages = sorted(folder.rglob("*.html"))
    return [page for page in pages if mark in page.read_text(encoding="utf-8")[:500]]


def read_french(root: Path) -> Iterator[tuple[str, str]]:
    """The Apache HTTP Server's manual in French."""
    return read_pages(translated_pages(root, "fr"), is_prose)


def read_japanese(root: Path) -> Iterator[tuple[str, str]]:
    """The Apache HTTP Server's manual in Japanese."""
    return read_pages(translated_pages(root, "ja"), is_japanese, close_japanese_gaps)


def read_mathematics(root: Path) -> Iterator[tuple[str, str]]:
    """The statements of set.mm, some 16 kB to a document.

    Comments are English and compressed proofs are close to noise, so both are left out; ``$= ? $.``
    is how Metamath itself writes a proof that is not given.
    """
    text = (root / "usr/share/metamath/databases/set.mm").read_text(encoding="ascii")
    text = re.sub(r"\$\(.*?\$\)", " ", text, flags=re.DOTALL)
    text = re.sub(r"\$=[^$]*\$\.", "$= ? $.", text)
    text = re.sub(r"\$d [^$]*\$\.", "", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    start = 0
    while start < len(text):
        end = text.find("$}\n", start + 16_000)
        end = len(text) if end < 0 else end + 3
        yield f"set.mm/{start}", text[start:end]
        start = end


READERS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "python": read_python,
    "english": read_english,
    "french": read_french,
    "japanese": read_japanese,
    "mathematics": read_mathematics,
}


def unpack_packages(work_dir: Path) -> Path:
    """Download the Debian packages and unpack them under the work folder, installing nothing."""
    root, packages = work_dir / "root", work_dir / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for number, package in enumerate(PACKAGES, 1):
        if (work_dir / f"{package}.unpacked").exists():
            continue
        print(f"[{number}/{len(PACKAGES)}] {package}: downloading and unpacking", flush=True)
        subprocess.run(["apt-get", "-q", "download", package], cwd=packages, check=True)
        archive = max(packages.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
        subprocess.run(["dpkg", "-x", archive, root], check=True)
        (work_dir / f"{package}.unpacked").write_text(archive.name + "\n")
    return root


def split_documents(documents: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(training, held out): whole documents, in an order that depends on their names only."""
    training: list[str] = []
    held_out: list[str] = []
    held_out_bytes = training_bytes = 0
    for _, text in sorted(documents, key=lambda item: zlib.crc32(Path(item[0]).name.encode())):
        size = len(text.encode())
        if held_out_bytes < HELD_OUT_BYTES and 1_000 <= size <= LARGEST_HELD_OUT_DOCUMENT:
            held_out.append(text)
            held_out_bytes += size
        elif training_bytes < TRAINING_BYTES:
            training.append(text)
            training_bytes += size
    return training, held_out


def build_corpus(work_dir: Path) -> None:
    """Write train/<domain>.json and held_out/<domain>.json, each a list of documents."""
    root = unpack_packages(work_dir)
    for domain in DOMAINS:
        for part, documents in zip(
            ("train", "held_out"), split_documents(READERS[domain](root)), strict=True
        ):
            target = work_dir / part / f"{domain}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
            size = sum(len(text.encode()) for text in documents)
            print(f"{domain:12s} {part:9s} {len(documents):5d} documents {size:9,d} bytes")


def load_part(work_dir: Path, part: str) -> dict[str, list[str]]:
    """The documents of every domain; ``part`` is "train" or "held_out"."""
    return {
        domain: json.loads((work_dir / part / f"{domain}.json").read_text(encoding="utf-8"))
        for domain in DOMAINS
    }
