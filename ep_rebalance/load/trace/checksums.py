"""Checksums of heads and records: CRC-32 since version 2.

Version 1 added up 64-bit words, each times an odd number: two flips of the highest bit cancel there.
"""

from __future__ import annotations

import functools
import zlib

import numpy as np
from numpy.typing import NDArray

_KIND, _FRAME = 8, 16
"""Bytes of a record's kind, and of its kind and checksum together."""


def checksum_of_head(text: bytes) -> int:
    """CRC-32 of a head's padded JSON."""
    return zlib.crc32(text)


def checksum_of_record(record: bytes, version: int = 2) -> int:
    """Checksum of a whole record, except the checksum in it."""
    if version == 1:
        words = np.frombuffer(record, "<u8")
        return int(np.dot(words, _record_factors(len(words))))
    return zlib.crc32(memoryview(record)[_FRAME:], zlib.crc32(record[:_KIND]))


def version_1_checksum_of_head(text: bytes) -> int:
    words = np.frombuffer(text, "<u8")
    return int(np.dot(words, _factors(len(words))))


@functools.cache
def _factors(length: int) -> NDArray[np.uint64]:
    return 2 * np.arange(length, dtype=np.uint64) + np.uint64(1)


@functools.cache
def _record_factors(length: int) -> NDArray[np.uint64]:
    """The same factors, with 0 for the word that holds the checksum."""
    factors = _factors(length).copy()
    factors[1] = 0
    return factors
