"""The weights of this rank's slots as bytes.

One expert of one layer is *packed* as its tensors' bytes one after another (`kernels/pack_experts.py`).
Nothing else knows how an engine lays an expert out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ep_rebalance.kernels.pack_experts import (
    Slabs,
    pack_expert,
    packed_checksum,
    unpack_expert,
    warm_up,
)


class ExpertMemory:
    """Read and write packed experts in the engine's own parameter storage.

    tensors_per_layer: for each MoE layer the tensors of all local experts; each is contiguous with
    the local slot as its first dimension. Raises ValueError for a tensor that is not.
    """

    def __init__(self, tensors_per_layer: Sequence[Sequence[torch.Tensor]]) -> None:
        self.slots = tensors_per_layer[0][0].shape[0]
        self._layers = [
            Slabs.of([_slot_bytes(tensor, self.slots) for tensor in layer])
            for layer in tensors_per_layer
        ]
        self.expert_bytes_L = tuple(slabs.packed_bytes for slabs in self._layers)
        self.device = tensors_per_layer[0][0].device

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


def _slot_bytes(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    if tensor.shape[0] != slots or not tensor.is_contiguous():
        raise ValueError(
            f"an expert tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} is not "
            f"contiguous with {slots} local experts in its first dimension"
        )
    return tensor.detach().reshape(slots, -1).view(torch.uint8)
