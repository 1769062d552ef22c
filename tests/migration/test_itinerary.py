"""Itineraries: what all ranks send by theirs is what all ranks receive by theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from numpy.typing import NDArray
from schedules import Weights, scheduled, settings_of_a_schedule, weights_of

from ep_rebalance.migration import Itinerary
from ep_rebalance.migration.itinerary import CHECKSUM_BYTES


def exchanged(
    itineraries: list[Itinerary], number: int, weights: Weights
) -> list[NDArray[np.uint8]]:
    """What each rank receives in a round, if all send what their itineraries say. A checksum is the
    number of the slot that was read.
    """
    by_peer = []
    for way in itineraries:
        splits = way.sends.splits(number)
        wire = np.full(sum(splits), 0xA5, dtype=np.uint8)
        for leg in way.sends.of_round(number):
            slot = way.rank * len(weights[leg.layer]) // len(itineraries) + leg.place
            wire[leg.offset :][: leg.stop - leg.start] = weights[leg.layer][
                slot, leg.start : leg.stop
            ]
            if leg.checksum >= 0:
                wire[leg.checksum :][:CHECKSUM_BYTES] = slot
        by_peer.append(np.split(wire, np.cumsum(splits)[:-1]))
    return [np.concatenate(parts) for parts in zip(*by_peer, strict=True)]


@given(settings_of_a_schedule())
@settings(max_examples=80)
def test_itineraries_bring_every_byte_and_its_checksum(arguments: dict[str, Any]) -> None:
    ranks = arguments["source"].num_ranks
    weights = weights_of(arguments["source"], arguments["expert_bytes_L"])
    staged, slots = {}, {}
    for of_batch in zip(
        *(scheduled(arguments, rank).batches for rank in range(ranks)), strict=True
    ):
        itineraries = [batch.itinerary for batch in of_batch]
        busiest = 0
        for number in range(len(of_batch[0].rounds)):
            received = exchanged(itineraries, number, weights)
            busiest = max(busiest, *(sum(way.sends.splits(number)) for way in itineraries))
            for way, wire in zip(itineraries, received, strict=True):
                assert sum(way.receives.splits(number)) == len(wire) <= way.busiest_bytes
                busiest = max(busiest, len(wire))
                for leg in way.receives.of_round(number):
                    expert = staged.setdefault((way.rank, leg.place), bytearray())
                    assert len(expert) == leg.start
                    expert += wire[leg.offset :][: leg.stop - leg.start].tobytes()
                    if leg.checksum >= 0:
                        slots[way.rank, leg.place] = wire[leg.checksum]
        assert {way.busiest_bytes for way in itineraries} == {busiest}
        for move in of_batch[0].moves:
            place = move.dst_rank, move.staging
            assert staged.pop(place) == weights[move.layer][move.src_slot].tobytes()
            assert slots.pop(place) == move.src_slot
    assert not staged
