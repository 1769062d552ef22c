"""Layouts: numbers of experts, ranks and slots, and whether where experts sit makes a difference."""

from __future__ import annotations


def nothing_to_gain(experts: int, ranks: int, redundant: int) -> str:
    """Why all placements of a layout are equally even, as a clause; "" if they are not.

    redundant: slots of a layer beyond one for each expert, on all ranks together.
    """
    slots, rest = divmod(experts + redundant, ranks)
    if ranks == 1:
        return "one rank computes everything"
    if rest:  # some ranks have a slot more
        return ""
    if slots == experts:
        return "every rank holds every expert"
    if slots == 1 and not redundant:
        return (
            "each rank holds one expert of a layer and none has a replica, so that the rank with the hottest "
            "expert is the busiest wherever that expert sits"
        )
    return ""
