"""Experts of a model whose layers are quantised in different ways, laid out as kernels want them."""

import torch
from expert_weights import Tensors

from ep_rebalance.placement import Placement


def loaded_mixed(placement: Placement, rank: int, device="cpu") -> Tensors:
    """The tensors of a rank's slots, by layer: bfloat16, 8 bits with block scales, 4 bits with zero
    points, in turn. Random by layer and expert, the same on every rank.
    """
    first = rank * placement.slots_per_rank
    return [
        KINDS[layer % len(KINDS)](
            Drawn(layer, slots[first : first + placement.slots_per_rank], device)
        )
        for layer, slots in enumerate(placement.slots_LP.tolist())
    ]


class Drawn:
    """Draws tensors of several experts of a layer, each expert's from a generator of its own."""

    def __init__(self, layer: int, experts: list[int], device) -> None:
        self._generators = [torch.Generator().manual_seed(1000 * layer + e) for e in experts]
        self._device = device
        self.slots = len(experts)

    def floats(self, *shape, dtype=torch.float32) -> torch.Tensor:
        parts = [torch.randn(shape, generator=generator) for generator in self._generators]
        return torch.stack(parts).to(self._device, dtype)

    def bytes(self, *shape) -> torch.Tensor:
        parts = [
            torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            for generator in self._generators
        ]
        return torch.stack(parts).to(self._device)

    def memory(self, *shape, strides, before=0, dtype=torch.float32) -> torch.Tensor:
        """Room for the experts behind `before` elements. strides: of experts and `shape`."""
        length = before + self.slots * strides[0]
        whole = torch.zeros(length, dtype=dtype, device=self._device)
        return whole.as_strided((self.slots, *shape), strides, before)


def bfloat16(drawn: Drawn) -> list[torch.Tensor]:
    return [drawn.floats(6, 5, dtype=torch.bfloat16), drawn.floats(5, 3, dtype=torch.bfloat16)]


def blocks_of_8_bits(drawn: Drawn) -> list[torch.Tensor]:
    """Both weights in one memory, one block scale with its columns first, the other padded, too."""
    weights = drawn.bytes(45)
    columns_first = drawn.floats(3, 2).transpose(1, 2)
    padded = drawn.memory(5, 2, strides=(16, 1, 8)).copy_(drawn.floats(5, 2))
    return [
        weights[:, :30].view(-1, 6, 5),
        weights[:, 30:].view(-1, 5, 3),
        columns_first,
        padded,
        drawn.floats(),
        drawn.floats(1),
    ]


def packed_4_bits(drawn: Drawn) -> list[torch.Tensor]:
    """Weights at an odd address, zero points of 3 bytes, scales with an empty column."""
    weights = drawn.memory(5, 3, strides=(15, 3, 1), before=1, dtype=torch.uint8)
    scales = drawn.memory(3, 3, strides=(12, 4, 1), dtype=torch.bfloat16)
    return [
        weights.copy_(drawn.bytes(5, 3)),
        scales.copy_(drawn.floats(3, 3)),
        drawn.bytes(3),
    ]


KINDS = (bfloat16, blocks_of_8_bits, packed_4_bits)
