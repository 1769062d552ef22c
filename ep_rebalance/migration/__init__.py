"""Migration: the moves that turn one placement into another, cut into batches and rounds.

A batch is what the staging memory holds at once; its layers are committed together when its last
round is done. A round is what may be on the links between two engine steps.
"""

from ep_rebalance.migration.batches import Batch, Migration, Move, Moves, Rounds
from ep_rebalance.migration.itinerary import Itinerary, Leg, Legs
from ep_rebalance.migration.schedule import compile_schedule, schedule

__all__ = [
    "Batch",
    "Itinerary",
    "Leg",
    "Legs",
    "Migration",
    "Move",
    "Moves",
    "Rounds",
    "compile_schedule",
    "schedule",
]
