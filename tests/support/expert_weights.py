"""Expert weights that can be told apart: random bytes by layer and expert, the same on every rank."""

from functools import cache

import torch

from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.placement import Placement

SHAPES = ((6, 5), (3,), (7,))
"""Tensors of one expert: sizes that leave padding in the packed form."""

Tensors = list[list[torch.Tensor]]


@cache
def expert(layer: int, expert: int, dtype: torch.dtype, shapes=SHAPES) -> list[torch.Tensor]:
    """The tensors of one logical expert; layers differ in size."""
    generator = torch.Generator().manual_seed(1000 * layer + expert)
    return [torch.randn((layer + 1, *shape), generator=generator).to(dtype) for shape in shapes]


def loaded(
    placement: Placement, rank: int, dtype: torch.dtype, shapes=SHAPES, device="cpu"
) -> Tensors:
    """The tensors of a rank's slots, by layer, as an engine would have loaded them."""
    first = rank * placement.slots_per_rank
    layers = []
    for layer, slots_P in enumerate(placement.slots_LP):
        mine = slots_P[first : first + placement.slots_per_rank].tolist()
        parts = zip(*(expert(layer, e, dtype, shapes) for e in mine), strict=True)
        layers.append([torch.stack(part).to(device) for part in parts])
    return layers


def wrong_slots(
    tensors: Tensors, placement: Placement, rank: int, dtype: torch.dtype, shapes=SHAPES
) -> list[tuple[int, int]]:
    """(layer, slot) of this rank's slots that do not hold the placement's expert bit for bit."""
    return differing_slots(tensors, loaded(placement, rank, dtype, shapes))


def differing_slots(tensors: Tensors, expected: Tensors) -> list[tuple[int, int]]:
    """(layer, slot) wherever any tensor has another value."""
    return [
        (layer, slot)
        for layer, (ours, right) in enumerate(zip(tensors, expected, strict=True))
        for slot in range(len(right[0]))
        if not all(
            torch.equal(a[slot].cpu(), b[slot].cpu()) for a, b in zip(ours, right, strict=True)
        )
    ]


def memory_of(tensors: Tensors) -> ExpertMemory:
    """The balancer's view of the tensors."""
    return ExpertMemory(tensors)
