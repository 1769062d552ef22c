"""Damage to files, for tests that nothing but an error comes of it."""

from __future__ import annotations

import random

MUTATIONS = 10_000


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, taken out, put in or cut off; never the same as before."""
    at, size = draw.randrange(len(data)), draw.randrange(1, 9)
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.randbytes(size) + data[at:]
    if kind == 2:
        return data[:at] + data[at + size :]
    changed = bytearray(data)
    for _ in range(size if kind == 3 else 1):
        place = draw.randrange(len(data))
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed) if bytes(changed) != data else data[:-1]
