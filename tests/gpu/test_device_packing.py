"""Experts whose tensors have odd sizes and layouts are packed on the device, in stream order."""

import torch
from devices import Graph, keep_busy, waits_refused
from mixed_layers import KINDS, Drawn

from ep_rebalance.kernels.pack_experts import pack_expert_torch
from ep_rebalance.migration.expert_memory import ExpertMemory

SLOTS = 4


def memory_on(device: torch.device) -> ExpertMemory:
    """A layer of each kind; all slots differ."""
    experts = list(range(SLOTS))
    layers = [kind(Drawn(layer, experts, device)) for layer, kind in enumerate(KINDS)]
    memory = ExpertMemory(layers)
    memory.warm_up(torch.empty(max(memory.expert_bytes_L), dtype=torch.uint8, device=device))
    return memory


def packed_by_reference(memory: ExpertMemory, layer: int, slot: int):
    packed = torch.zeros(memory.expert_bytes_L[layer], dtype=torch.uint8, device=memory.device)
    checksum = torch.zeros(1, dtype=torch.int64, device=memory.device)
    pack_expert_torch(memory._layers[layer], slot, 0, packed, checksum)
    return packed, checksum


def test_crooked_slabs_are_moved_without_a_wait(device):
    memory = memory_on(device)
    for layer, size in enumerate(memory.expert_bytes_L):
        packed = torch.zeros(size, dtype=torch.uint8, device=device)
        sent, arrived = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        expected, right = packed_by_reference(memory, layer, 1)
        keep_busy(device)
        with waits_refused(device):
            memory.read(layer, 1, 0, packed[:16])
            memory.read(layer, 1, 16, packed[16:], sent)
            memory.checksum_packed(layer, packed, arrived)
            memory.write(layer, 3, packed)
        assert torch.equal(packed, expected)
        assert torch.equal(sent, right)
        assert torch.equal(arrived, right)
        assert torch.equal(packed_by_reference(memory, layer, 3)[0], expected)


def test_a_graph_packs_what_a_slot_holds_when_it_is_replayed(device):
    memory = memory_on(device)
    for layer, size in enumerate(memory.expert_bytes_L):
        packed = torch.zeros(size, dtype=torch.uint8, device=device)
        checksum = torch.zeros(1, dtype=torch.int64, device=device)

        def pack(layer=layer, packed=packed, checksum=checksum) -> torch.Tensor:
            memory.read(layer, 0, 0, packed, checksum)
            return packed

        graph = Graph(pack, device)
        replacing, right = packed_by_reference(memory, layer, 2)
        memory.write(layer, 0, replacing)
        assert torch.equal(graph.replay(), replacing)
        assert torch.equal(checksum, right)
