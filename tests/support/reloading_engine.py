"""A made-up engine whose weights are replaced while it serves."""

import torch
from balanced_engine import DTYPE, LAYERS, SHAPES, Engine
from expert_weights import loaded, memory_of

from ep_rebalance.placement import Placement


class ReloadingEngine(Engine):
    """Each layer's weights have a version, the first 0; a reload writes the next in loaded order."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.version_L = [0] * LAYERS
        self.told: list[tuple[int, ...]] = []

    def reload(self, layers=tuple(range(LAYERS))) -> None:
        for layer in layers:
            self.version_L[layer] += 1
        self.told.append(layers)
        new = self._weights(self.placement)
        for layer in layers:
            for tensor, values in zip(self.tensors[layer], new[layer], strict=True):
                tensor.copy_(values)
        self.rebalancer.weights_replaced(layers)
        self.rebalancer.migrator.replace_memory(memory_of(self.tensors))
        self.check_slots()

    def placement_here(self) -> Placement:
        unknown = self.told[self.rebalancer.migrator.agreed_reloads :]
        layers = sorted({layer for told in unknown for layer in told})
        return super().placement_here().replaced(layers, self.placement)

    def check_slots(self) -> None:
        for ours, right in zip(self.tensors, self._weights(self.placement_here()), strict=True):
            for tensor, values in zip(ours, right, strict=True):
                assert torch.equal(tensor, values)

    def _weights(self, placement: Placement):
        layers = loaded(placement, self.rank, DTYPE, SHAPES)
        return [
            [tensor + version for tensor in layer]
            for layer, version in zip(layers, self.version_L, strict=True)
        ]
