"""Frontier: of the replays at all sizes, those to choose from.

A replay is on a frontier if no other one on as many ranks is better in one of its two figures and at least
as good in the other. Balance has two prices: the bytes that are moved, and the memory of redundant experts.
Fewer ranks are more even anyway, so that replays on other numbers of ranks are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Literal

from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.report.sizes import Size
from ep_rebalance.offline.run import Replayed

Price = Literal["moved", "memory"]
PRICE_TITLES: Mapping[Price, str] = MappingProxyType(
    {"moved": "what was moved", "memory": "redundant memory"}
)


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """A replay, and what it is weighed by.

    balance: mean over max rank load; higher is better.
    price: bytes, or experts if the size of an expert is not known. Those that were moved over links, or the
        redundant ones on each rank.
    """

    size: Size
    one: Replayed
    balance: float
    price: float


def points(sizes: Iterable[Size], price: Price) -> list[Point]:
    """The replays that have this price. A policy that knows the future is no choice, and has none."""
    found = []
    for size in sizes:
        for one in size.results:
            paid = _moved(size, one) if price == "moved" else _memory(size)
            if paid is not None and not REPLAY_POLICIES[one.scenario.policy].foresees:
                found.append(Point(size, one, one.mean_balancedness, paid))
    return found


def frontiers(found: Sequence[Point]) -> list[list[Point]]:
    """For each number of ranks those that no other one beats, the cheapest first."""
    ranks = dict.fromkeys(point.size.ranks for point in found)
    return [_frontier([one for one in found if one.size.ranks == number]) for number in ranks]


def _frontier(found: Sequence[Point]) -> list[Point]:
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.price, -point.balance)):
        alike = best and (best[-1].balance, best[-1].price) == (point.balance, point.price)
        if not best or point.balance > best[-1].balance or alike:
            best.append(point)
    return best


def best_for(sizes: Sequence[Size]) -> dict[Replayed, list[Price]]:
    """Of each replay, on which frontiers it is."""
    best: dict[Replayed, list[Price]] = {one: [] for size in sizes for one in size.results}
    for price in PRICE_TITLES:
        for point in chain(*frontiers(points(sizes, price))):
            best[point.one].append(price)
    return best


def _moved(size: Size, one: Replayed) -> float | None:
    """None for policies whose moves are not counted."""
    if one is size.first("none"):
        return 0.0
    if one not in size.planned:
        return None
    return float(one.moved_bytes if size.bytes_known else one.moved)


def _memory(size: Size) -> float:
    known = size.redundant_bytes
    return size.redundant / size.ranks if known is None else float(known)
