"""Layers small enough to try every change of them, with the objective counted token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from shapes import SEEDS, random_slots

from ep_rebalance.planning.incremental.layer import (
    Change,
    LayerInputs,
    LayerState,
    apply_change,
    describe_experts,
    start_layer,
)

Slots = NDArray[np.int64]

SHAPES = [
    (ranks, experts, (experts + redundant) // ranks)
    for ranks in (2, 3, 4)
    for experts in range(4, 9)
    for redundant in range(4)
    if (experts + redundant) % ranks == 0
]
"""Ranks, experts and slots per rank."""

ROUNDING = 1e-9
"""How far two sums of the same numbers may be apart."""
VISIBLE = 1e-3
"""A gain of which a millionth is not lost in rounding."""


@dataclass(frozen=True, kw_only=True)
class SmallLayer:
    """sample_WE: the load that each expert has in each sample, in units of the mean rank load.

    alone_E: variance of its load that has nothing to do with others.
    origin_P: the slots before any change. internode_price: of a fetch from another node, in those
    within one. token_price: of a token that crosses a node boundary.
    """

    sample_WE: NDArray[np.float64]
    alone_E: NDArray[np.float64]
    part_EC: NDArray[np.float64]
    origin_P: Slots
    node_R: Slots
    internode_price: float
    token_price: float

    @property
    def num_ranks(self) -> int:
        return self.node_R.size

    @property
    def num_experts(self) -> int:
        return self.alone_E.size

    @property
    def slots_per_rank(self) -> int:
        return self.origin_P.size // self.num_ranks

    def inputs(self) -> LayerInputs:
        """What the planner is given, but with nothing shrunk: the mean and the spread of the samples
        are the load vectors."""
        samples = len(self.sample_WE)
        described = describe_experts(
            1e9 * self.sample_WE,
            np.ones(samples),
            self.part_EC,
            self.origin_P.astype(np.int32),
            self.node_R,
            self.internode_price,
            self.token_price,
        )
        mean_E = self.sample_WE.mean(axis=0)
        rest_WE = (self.sample_WE - mean_E) / np.sqrt(samples)
        vectors_VE = np.vstack([mean_E, rest_WE])
        return described._replace(
            vectors_EV=np.ascontiguousarray(vectors_VE.T),
            vectors_VE=vectors_VE,
            own_E=self.alone_E,
            square_E=(vectors_VE**2).sum(axis=0),
            rest_E=np.sqrt((rest_WE**2).sum(axis=0)),
            traffic_E=2.0 * self.token_price / (self.node_R.max() + 1) * mean_E,
        )

    def held(self, slots_P: Slots) -> list[list[int]]:
        return slots_P.reshape(self.num_ranks, -1).tolist()

    def objective(
        self, held: Sequence[Sequence[int]], node_R: Sequence[int] | None = None
    ) -> float:
        """Mean over the samples of the squared rank loads, summed over ranks, less what is saved
        where experts are at hand on a node. held: the experts of each rank."""
        nodes = self.node_R.tolist() if node_R is None else node_R
        held_RE = np.zeros((len(held), self.num_experts))
        for rank, experts in enumerate(held):
            held_RE[rank, experts] = 1.0
        replicas_E = held_RE.sum(axis=0).astype(np.int64)
        on_RE = held_RE * self.part_EC[np.arange(self.num_experts), replicas_E]
        total = float(np.sum((on_RE @ self.sample_WE.T) ** 2)) / len(self.sample_WE)
        total += float(np.sum(on_RE**2 @ self.alone_E))
        at_hand = {
            (node, expert) for node, rank in zip(nodes, held, strict=True) for expert in rank
        }
        mean_E = self.sample_WE.mean(axis=0)
        saved = 2.0 * self.token_price / (self.node_R.max() + 1)
        return total - saved * sum(float(mean_E[expert]) for _, expert in at_hand)

    def square_R(self, slots_P: Slots) -> NDArray[np.float64]:
        """Mean over the samples of each rank's squared load."""
        replicas_E = np.bincount(slots_P, minlength=self.num_experts)
        load_WP = self.sample_WE[:, slots_P] * self.part_EC[slots_P, replicas_E[slots_P]]
        by_rank = load_WP.reshape(len(load_WP), self.num_ranks, -1)
        square_R: NDArray[np.float64] = (by_rank.sum(axis=2) ** 2).mean(axis=0)
        return square_R

    def arrivals(self, slots_P: Slots) -> list[list[int]]:
        """The experts on each rank that were not there in the beginning."""
        pairs = zip(self.held(slots_P), self.held(self.origin_P), strict=True)
        return [sorted(set(now) - set(before)) for now, before in pairs]

    def fetch_cost(self, slots_P: Slots) -> float:
        """Of all arrivals, in units of a fetch within a node."""
        cost = 0.0
        for rank, arrived in enumerate(self.arrivals(slots_P)):
            near = self.near(rank)
            cost += sum(1.0 if expert in near else self.internode_price for expert in arrived)
        return cost

    def near(self, rank: int) -> set[int]:
        """The experts that were on the rank's node in the beginning."""
        nodes = zip(self.node_R, self.held(self.origin_P), strict=True)
        return {expert for node, held in nodes if node == self.node_R[rank] for expert in held}

    def is_placement(self, slots_P: Slots) -> bool:
        """Every expert somewhere, none twice on a rank."""
        twice = any(len(set(held)) < len(held) for held in self.held(slots_P))
        return not twice and len(set(slots_P.tolist())) == self.num_experts

    def scored(
        self, slots_P: Slots, changes: Iterator[tuple[int, int, int]], left: int, max_arrivals: int
    ) -> list[Change]:
        """Those of the changes (slot, other, expert) that lead to a placement within the limits."""
        before, cost = self.objective(self.held(slots_P)), self.fetch_cost(slots_P)
        arrived = sum(map(len, self.arrivals(slots_P)))
        allowed = []
        for slot, other, expert in changes:
            after_P = changed(slots_P, slot, other, expert)
            if not self.is_placement(after_P):
                continue
            arrivals = self.arrivals(after_P)
            moved = sum(map(len, arrivals)) - arrived
            # Ranks that the change does not touch may be past the limit; no change makes it worse.
            touched = {at // self.slots_per_rank for at in (slot, other) if at >= 0}
            most = max(len(arrivals[rank]) for rank in touched)
            if moved <= left and most <= max_arrivals:
                gain = before - self.objective(self.held(after_P))
                per_move = gain / max(self.fetch_cost(after_P) - cost, 1.0)
                allowed.append(Change(per_move, gain, moved, slot, other, expert))
        return allowed

    def swaps(
        self, slots_P: Slots, rank: int, others: Sequence[int]
    ) -> Iterator[tuple[int, int, int]]:
        """Of one slot of `rank` with one of the other ranks."""
        for slot in self.slots_of(rank):
            for there in others:
                for other in self.slots_of(there) if there != rank else ():
                    yield slot, other, int(slots_P[other])

    def copies(self, slots_P: Slots, rank: int) -> Iterator[tuple[int, int, int]]:
        """Experts of `rank`, into slots of other ranks."""
        for slot in range(slots_P.size):
            if slot not in self.slots_of(rank):
                yield from ((slot, -1, int(slots_P[own])) for own in self.slots_of(rank))

    def drops(self, slots_P: Slots, rank: int) -> Iterator[tuple[int, int, int]]:
        """Any experts, into slots of `rank`."""
        for slot in self.slots_of(rank):
            for expert in range(self.num_experts):
                if expert != slots_P[slot]:
                    yield slot, -1, expert

    def slots_of(self, rank: int) -> range:
        return range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)

    def all_changes(self, slots_P: Slots) -> list[tuple[int, int, int]]:
        """That lead from one placement to another."""
        changes: list[tuple[int, int, int]] = []
        for rank in range(self.num_ranks):
            changes += self.swaps(slots_P, rank, range(rank))
            changes += self.drops(slots_P, rank)
        return [change for change in changes if self.is_placement(changed(slots_P, *change))]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A layer after some changes, and what the search is asked for in it."""

    small: SmallLayer
    experts: LayerInputs
    layer: LayerState
    rank: int
    left: int
    max_arrivals: int
    least: float

    def nothing(self) -> Change:
        return Change(self.least, 0.0, 0, -1, -1, -1)

    def check(self, best: Change, certain: list[Change], possible: list[Change]) -> None:
        """That `best` is one of the `possible` changes, above `least`, and none of the `certain` is
        better; if there is none, `certain` has none above `least`."""
        highest = max((change.gain_per_move for change in certain), default=-np.inf)
        if best.slot < 0:
            assert best == self.nothing()
            assert highest <= self.least + ROUNDING
            return
        assert best.gain_per_move > self.least
        assert best.gain_per_move >= highest - ROUNDING
        by_place = {change[3:]: change for change in possible}
        assert best[3:] in by_place
        assert_same_score(best, by_place[best[3:]])


def assert_same_score(told: Change, counted: Change) -> None:
    assert told.moved == counted.moved
    np.testing.assert_allclose(told[:2], counted[:2], rtol=ROUNDING, atol=ROUNDING)


def unscored(slot: int, other: int, expert: int) -> Change:
    return Change(0.0, 0.0, 0, slot, other, expert)


def changed(slots_P: Slots, slot: int, other: int, expert: int) -> Slots:
    after_P = slots_P.copy()
    if other >= 0:
        after_P[other] = slots_P[slot]
    after_P[slot] = expert
    return after_P


@st.composite
def small_layers(draw: st.DrawFn) -> SmallLayer:
    """Loads are any, or a few small numbers so that much is equal; replicas share theirs evenly, or
    each costs something more."""
    ranks, experts, slots_per_rank = draw(st.sampled_from(SHAPES))
    generator = np.random.default_rng(draw(SEEDS))
    samples, equal = draw(st.integers(1, 3)), draw(st.booleans())
    sample_WE = generator.integers(0, 4, (samples, experts)).astype(np.float64)
    if not equal:
        sample_WE = generator.exponential(1.0, (samples, experts))
    sample_WE *= ranks / max(sample_WE.sum(axis=1).mean(), 1.0)
    replicas_C = np.arange(1, 7)
    fixed_E1 = generator.choice([0.0, draw(st.sampled_from([0.0, 0.3]))], (experts, 1))
    part_EC = np.hstack([np.zeros((experts, 1)), fixed_E1 + (1.0 - fixed_E1) / replicas_C])
    nodes = draw(st.sampled_from([1, 2]))
    return SmallLayer(
        sample_WE=sample_WE,
        alone_E=draw(st.sampled_from([0.0, 0.2])) * generator.random(experts),
        part_EC=part_EC,
        origin_P=np.array(random_slots(generator, ranks, slots_per_rank, experts)),
        node_R=generator.permutation(np.arange(ranks) % nodes),
        internode_price=draw(st.sampled_from([1.0, 4.0])),
        token_price=draw(st.sampled_from([0.0, 0.3])),
    )


@st.composite
def walks(draw: st.DrawFn) -> tuple[SmallLayer, LayerInputs, LayerState]:
    """A layer after up to six changes, good or bad."""
    small = draw(small_layers())
    experts = small.inputs()
    layer = start_layer(experts, small.origin_P.astype(np.int32))
    for _ in range(draw(st.integers(0, 6))):
        changes = small.all_changes(layer.slots_P)
        if changes:
            apply_change(experts, layer, unscored(*draw(st.sampled_from(changes))))
    return small, experts, layer


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    small, experts, layer = draw(walks())
    return Scene(
        small=small,
        experts=experts,
        layer=layer,
        rank=draw(st.just(int(layer.square_R.argmax())) | st.integers(0, small.num_ranks - 1)),
        left=draw(st.sampled_from([99, 2, 1, 0])),
        max_arrivals=draw(st.sampled_from([99, 2, 1, 0])),
        least=draw(st.sampled_from([0.0, 0.02, 0.3])),
    )
