"""The weights of this rank's slots as bytes.

One expert of one layer is *packed* as its slabs' bytes one after another (`kernels/pack_experts.py`).
Nothing but `slabs.py` knows how an engine lays an expert out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ep_rebalance.kernels.pack_experts import (
    Slabs,
    add_checksum,
    pack_expert,
    packed_checksum,
    unpack_expert,
    warm_up,
)
from ep_rebalance.migration.slabs import ExpertsOfLayer, SlabTensor, slabs_of_layers


class ExpertMemory:
    """Read and write packed experts in the engine's own parameter storage.

    layers: of each MoE layer the slabs of all local experts, or tensors that `slabs_of_layers` cuts. Their
        order and sizes must be the same on all ranks; layers may differ.
    slots: local ones; left out, as many as the first slab or tensor counts.

    Raises ValueError for tensors that cannot be cut, a layer without slabs, slabs on several devices, and
    slabs that share memory otherwise than expert by expert within a layer.
    """

    def __init__(self, layers: Sequence[ExpertsOfLayer], *, slots: int | None = None) -> None:
        self.slabs_L = tuple(slabs_of_layers(layers, slots=slots))
        _refuse_missing(self.slabs_L)
        first = self.slabs_L[0][0].bytes_EB
        self.slots = len(first) if slots is None else slots
        self.device = first.device
        everything = [
            (f"{slab.name} of layer {layer}", layer, slab.bytes_EB)
            for layer, slabs in enumerate(self.slabs_L)
            for slab in slabs
        ]
        _refuse_other_forms(everything, self.slots)
        _refuse_overlaps(everything)
        self._layers = [Slabs.of([slab.bytes_EB for slab in slabs]) for slabs in self.slabs_L]
        self.expert_bytes_L = tuple(slabs.packed_bytes for slabs in self._layers)

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

    def add_checksum(
        self, layer: int, slot: int, start: int, stop: int, checksum: torch.Tensor
    ) -> None:
        """Add to `checksum` (int64 [1]) what packed bytes `start..stop` of a local slot have in that of
        `read`; both are multiples of ALIGNMENT.
        """
        add_checksum(self._layers[layer], slot, start, stop, checksum)

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


_Rows = tuple[str, int, torch.Tensor]
"""What a slab is called, its layer, and uint8 [S, bytes]."""


def _refuse_missing(slabs_L: Sequence[Sequence[SlabTensor]]) -> None:
    for layer, slabs in enumerate(slabs_L):
        if not slabs:
            raise ValueError(
                f"experts cannot be moved: layer {layer} has no tensor that holds them; leave it out"
            )


def _refuse_other_forms(everything: Sequence[_Rows], slots: int) -> None:
    """What is not as many rows of bytes on the same device."""
    first_name, _, first = everything[0]
    for name, _, rows in everything:
        if rows.device != first.device:
            raise ValueError(
                f"experts cannot be moved: {name} is on {rows.device} and {first_name} on {first.device}; "
                "put them on one device"
            )
        if len(rows) != slots or rows.dtype != torch.uint8 or rows.stride(1) != 1:
            raise ValueError(
                f"experts cannot be moved: {name} is {rows.dtype} {tuple(rows.shape)} of strides "
                f"{rows.stride()}, and not a run of bytes for each of {slots} local experts"
            )


def _refuse_overlaps(everything: Sequence[_Rows]) -> None:
    """Rows that share bytes with another expert's, or with another layer's."""
    everything = [rows for rows in everything if rows[2].untyped_storage().data_ptr()]  # not meta
    if not everything:
        return
    slots = len(everything[0][2])
    slot_S = np.arange(slots)
    start_N = np.concatenate(
        [rows.data_ptr() + rows.stride(0) * slot_S for _, _, rows in everything]
    )
    stop_N = start_N + np.repeat([rows.shape[1] for _, _, rows in everything], slots)
    owner_N = np.concatenate([layer * slots + slot_S for _, layer, _ in everything])
    order_N = np.argsort(start_N, kind="stable")
    start_N, stop_N, owner_N = start_N[order_N], stop_N[order_N], owner_N[order_N]
    # Rows that hang together are one expert's exactly if each is its predecessor's.
    meets_N = start_N[1:] < np.maximum.accumulate(stop_N)[:-1]
    wrong = np.flatnonzero(meets_N & (owner_N[1:] != owner_N[:-1]))
    if len(wrong):
        later = int(wrong[0]) + 1
        earlier = int(stop_N[:later].argmax())
        one, other = (everything[order_N[n] // slots][0] for n in (earlier, later))
        raise ValueError(
            f"experts cannot be moved: {one} and {other} share memory, but not expert by expert of one "
            "layer, so that a move of the one would change the other; give each memory of its own"
        )
