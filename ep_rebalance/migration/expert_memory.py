"""The weights of this rank's slots as bytes.

One expert of one layer is *packed* as its tensors' bytes one after another (`kernels/pack_experts.py`).
Nothing but `expert_rows.py` knows how an engine lays an expert out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ep_rebalance.kernels.pack_experts import (
    Slabs,
    pack_expert,
    packed_checksum,
    unpack_expert,
    warm_up,
)
from ep_rebalance.migration.expert_rows import LayerTensors, rows_of_layers


class ExpertMemory:
    """Read and write packed experts in the engine's own parameter storage.

    tensors_per_layer: for each MoE layer the tensors of all local experts, with names if errors are to
        give them. Their order, sizes and types must be the same on all ranks; layers may differ. Local
        experts are the outermost dimension in memory, wherever a permuted view has them.
    slots: local ones; left out, the first dimension of the first tensor.

    Raises ValueError for a tensor of which an expert is no block of bytes.
    """

    def __init__(
        self, tensors_per_layer: Sequence[LayerTensors], *, slots: int | None = None
    ) -> None:
        self.slots = _slots_of(tensors_per_layer) if slots is None else slots
        rows_of_L = rows_of_layers(tensors_per_layer, self.slots)
        self._layers = [Slabs.of(rows) for rows in rows_of_L]
        self.expert_bytes_L = tuple(slabs.packed_bytes for slabs in self._layers)
        self.device = rows_of_L[0][0].device

    def read(
        self,
        layer: int,
        slot: int,
        start: int,
        out: torch.Tensor,
        checksum: torch.Tensor | None = None,
    ) -> None:
        """Copy packed bytes `start..start+len(out)` of a local slot into `out` (uint8), and the whole
        expert's checksum into `checksum` (int64 [1]).
        """
        pack_expert(self._layers[layer], slot, start, out, checksum)

    def write(self, layer: int, slot: int, packed: torch.Tensor) -> None:
        """Copy a whole packed expert (uint8) into a local slot, in stream order."""
        unpack_expert(self._layers[layer], slot, packed)

    def checksum_packed(self, layer: int, packed: torch.Tensor, checksum: torch.Tensor) -> None:
        """Set `checksum` (int64 [1]) to that of a packed expert; equal if and only if (except by 64-bit
        chance) the bytes are.
        """
        packed_checksum(self._layers[layer], packed, checksum)

    def warm_up(self, packed: torch.Tensor) -> None:
        """Compile and load what the methods above launch, once for each kind of layer; slots keep
        their bytes. packed: uint8, room for a packed expert; zeros afterwards.
        """
        kinds = {slabs.sizes: slabs for slabs in self._layers}
        for slabs in kinds.values():
            warm_up(slabs, packed)


def _slots_of(tensors_per_layer: Sequence[LayerTensors]) -> int:
    layer = tensors_per_layer[0]
    first = next(iter(layer.values() if isinstance(layer, Mapping) else layer), None)
    if first is None or not first.ndim:
        raise ValueError(
            "experts cannot be moved: the first tensor does not count them; pass slots"
        )
    return int(first.shape[0])
