"""Numbers that every form of routing shares, so that all give the same bits. Knows no torch, no Triton."""

from __future__ import annotations

from typing import NamedTuple

PREFILL, DECODE, IGNORED = 0, 1, 2
"""Rows of the count tensor. Tokens that are not to be counted land in IGNORED, without a branch."""

HASH_STEP = 40503
"""An odd number near 2**16 / golden ratio, so that consecutive tokens spread evenly over the 16-bit
hash range (Knuth).
"""
UNIT_BITS = 4
"""Tokens are poured in sixteenths."""
MOST_SWEEPS = 8
"""How often every expert is poured, unless a sweep before has shifted less than a token to any replica. Two
sweeps do for most steps; where ranks are linked in long chains, they may leave 4 % more on the busiest
rank than the best split does, and eight half a percent.
"""
RANKS_PER_PAIR = 2
"""A step of a source that has fewer (token, expert) pairs than one for so many ranks goes by the quotas: it
says less of what its ranks get than the window does (benchmarks/own_counts.py).
"""
MOST_REPLICAS = 16
"""An expert with more of them keeps the split of its quotas."""


class Ranks(NamedTuple):
    """total: EP ranks. slots: of each; 0 where nothing is poured. source: number of that which brings these
    tokens.
    """

    total: int
    slots: int
    source: int
