"""Packing, unpacking and summing by the kernel is what the reference does, byte for byte."""

import itertools

import pytest
import torch

from ep_rebalance.kernels.pack_experts import (
    Slabs,
    pack_expert,
    pack_expert_torch,
    packed_checksum,
    unpack_expert,
)

SLOTS = 3
SIZES = [
    pytest.param([16], id="one short slab"),
    pytest.param([4096 * 4 + 16, 48], id="more than a program"),
    pytest.param([64, 16, 160, 32], id="several slabs"),
    pytest.param([7, 32, 3], id="slabs that only the reference reads"),
]


def slabs_of(sizes, device, seed=0) -> Slabs:
    generator = torch.Generator().manual_seed(seed)
    return Slabs.of(
        [
            torch.randint(0, 256, (SLOTS, n), generator=generator, dtype=torch.uint8).to(device)
            for n in sizes
        ]
    )


def checksum_of(slabs: Slabs, packed: torch.Tensor) -> torch.Tensor:
    checksum = torch.full((1,), -1, dtype=torch.int64, device=packed.device)
    packed_checksum(slabs, packed, checksum)
    return checksum


def poisoned(size: int, device: str) -> torch.Tensor:
    return torch.full((size,), 0xA5, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_whole_expert_with_its_checksum(sizes, device):
    slabs = slabs_of(sizes, device)
    for slot in range(SLOTS):
        packed, expected = (poisoned(slabs.packed_bytes, device) for _ in range(2))
        checksum, by_reference = (
            torch.full((1,), -1, dtype=torch.int64, device=device) for _ in range(2)
        )
        pack_expert(slabs, slot, 0, packed, checksum)
        pack_expert_torch(slabs, slot, 0, expected, by_reference)
        assert torch.equal(packed, expected)
        assert torch.equal(checksum, by_reference)
        assert torch.equal(checksum_of(slabs, packed), by_reference)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("cuts", [[], [16], [4, 8, 32], [1, 17], [0, 0]])
def test_ranges_make_the_whole_and_write_nothing_else(sizes, cuts, device):
    slabs = slabs_of(sizes, device)
    whole, expected = (torch.zeros_like(poisoned(slabs.packed_bytes, device)) for _ in range(2))
    pack_expert_torch(slabs, 1, 0, expected)
    bounds = sorted({0, *(min(cut, slabs.packed_bytes) for cut in cuts), slabs.packed_bytes})
    checksum = torch.zeros(1, dtype=torch.int64, device=device)
    for start, stop in itertools.pairwise(bounds):
        pack_expert(slabs, 1, start, whole[start:stop], checksum)
        assert not whole[stop:].any()
    assert torch.equal(whole, expected)
    assert torch.equal(checksum, checksum_of(slabs, whole))


@pytest.mark.parametrize("sizes", SIZES)
def test_unpacking_changes_one_slot(sizes, device):
    source, target = slabs_of(sizes, device, seed=1), slabs_of(sizes, device, seed=2)
    before = [tensor.clone() for tensor in target.tensors]
    packed = torch.zeros(
        slabs_of(sizes, device).packed_bytes + 32, dtype=torch.uint8, device=device
    )
    pack_expert(source, 2, 0, packed[: source.packed_bytes])
    unpack_expert(target, 1, packed)
    for tensor, old, new in zip(target.tensors, before, source.tensors, strict=True):
        assert torch.equal(tensor[1], new[2])
        assert torch.equal(tensor[0], old[0])
        assert torch.equal(tensor[2], old[2])


def test_damage_changes_the_checksum(device):
    slabs = slabs_of([64, 16, 160, 32], device)
    packed = torch.zeros(slabs.packed_bytes, dtype=torch.uint8, device=device)
    pack_expert(slabs, 0, 0, packed)
    intact = int(checksum_of(slabs, packed))
    for byte in range(len(packed)):
        packed[byte] ^= 1
        assert int(checksum_of(slabs, packed)) != intact
        packed[byte] ^= 1
    assert int(checksum_of(slabs, packed)) == intact
