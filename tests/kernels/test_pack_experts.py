"""Packing, unpacking and summing by the kernel is what the reference does, byte for byte."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_rebalance.kernels import pack_experts
from ep_rebalance.kernels.language import INTERPRETED, triton
from ep_rebalance.kernels.pack_experts import (
    ALIGNMENT,
    BLOCK,
    BLOCK_BYTES,
    Slabs,
    add_checksum,
    add_checksum_torch,
    pack_expert,
    pack_expert_torch,
    packed_checksum,
    packed_checksum_torch,
    unpack_expert,
    unpack_expert_torch,
    warm_up,
)

SLOTS = 3
SIZES = [
    pytest.param([16], id="one short slab"),
    pytest.param([4 * BLOCK + 16, 48], id="more than a program"),
    pytest.param([64, 16, 160, 32], id="several slabs"),
    pytest.param([7, 32, 3], id="odd slabs"),
    pytest.param([4], id="a scale alone"),
    pytest.param([512, 256, 12, 4, 4, 4], id="weights, block scales and small scales"),
    pytest.param([4 * BLOCK + 13, 2 * BLOCK_BYTES + 1], id="more than a program, with a tail"),
]


def slabs_of(sizes, device, seed=0) -> Slabs:
    generator = torch.Generator().manual_seed(seed)
    return Slabs.of(
        [
            torch.randint(0, 256, (SLOTS, n), generator=generator, dtype=torch.uint8).to(device)
            for n in sizes
        ]
    )


def slabs_in_one_buffer(layout, device, seed=0) -> tuple[Slabs, torch.Tensor]:
    """Slabs behind each other, and the buffer around them. layout: of each tensor the bytes that are
    left out before it, its slab's bytes, and those left out between two slabs.
    """
    length = sum(before + SLOTS * (size + gap) for before, size, gap in layout)
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8).to(device)
    tensors, position = [], 0
    for before, size, gap in layout:
        position += before
        tensors.append(buffer.as_strided((SLOTS, size), (size + gap, 1), position))
        position += SLOTS * (size + gap)
    return Slabs.of(tensors), buffer


SLAB = st.tuples(
    st.one_of(st.sampled_from([0, 16]), st.integers(0, 40)),
    st.one_of(st.integers(1, 70), st.integers(1, 5000), st.sampled_from([16, 256, 4096])),
    st.one_of(st.just(0), st.integers(0, 40)),
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


@given(layout=st.lists(SLAB, min_size=1, max_size=5), cut=st.integers(0, 1000))
@settings(max_examples=25)
def test_slabs_of_any_size_at_any_address_are_copied_as_by_the_reference(device, layout, cut):
    slabs, buffer = slabs_in_one_buffer(layout, device)
    packed, expected = (poisoned(slabs.packed_bytes, device) for _ in range(2))
    checksums = torch.full((3,), -1, dtype=torch.int64, device=device)
    middle = cut * ALIGNMENT % slabs.packed_bytes
    pack_expert(slabs, 1, 0, packed[:middle])
    pack_expert(slabs, 1, middle, packed[middle:], checksums[:1])
    pack_expert_torch(slabs, 1, 0, expected, checksums[1:2])
    packed_checksum(slabs, packed, checksums[2:])
    assert torch.equal(packed, expected)
    assert len(set(checksums.tolist())) == 1
    before = buffer.clone()
    unpack_expert(slabs, 2, packed)
    after = buffer.clone()
    buffer.copy_(before)
    unpack_expert_torch(slabs, 2, expected)
    assert torch.equal(after, buffer)


@pytest.mark.parametrize("gap", [0, 1, 16])
def test_a_slab_is_read_in_words_only_where_every_slot_is_aligned(device, gap):
    slabs, _ = slabs_in_one_buffer([(0, 48, gap), (0, 48, 0)], device)
    in_words = slabs.blocks_B5[:, 3] > 0
    aligned = SLOTS * (48 + gap) % ALIGNMENT == 0
    assert in_words.tolist() == [gap % ALIGNMENT == 0, aligned]


@pytest.mark.parametrize("layout", [[(0, 64, 0), (0, 16, 0)], [(0, 37, 0), (1, 3, 2), (0, 1, 0)]])
@pytest.mark.parametrize("flip", [1, 0x80])
def test_any_byte_that_changes_changes_the_checksum(layout, flip, device):
    slabs, _ = slabs_in_one_buffer(layout, device)
    packed = torch.zeros(slabs.packed_bytes, dtype=torch.uint8, device=device)
    pack_expert(slabs, 0, 0, packed)
    intact = int(checksum_of(slabs, packed))
    for (_, size, _), first in zip(layout, slabs.firsts, strict=True):
        for byte in range(first, first + size):
            packed[byte] ^= flip
            assert int(checksum_of(slabs, packed)) != intact
            packed[byte] ^= flip
    assert int(checksum_of(slabs, packed)) == intact


def test_padding_is_not_in_the_checksum(device):
    slabs = slabs_of([7, 32, 3], device)
    packed, other = poisoned(slabs.packed_bytes, device), torch.zeros_like(poisoned(64, device))
    pack_expert(slabs, 1, 0, packed)
    pack_expert(slabs, 1, 0, other)
    assert not torch.equal(packed, other)
    assert torch.equal(checksum_of(slabs, packed), checksum_of(slabs, other))


def test_the_checksum_is_the_weighted_sum_of_the_words_padded_with_zeros():
    """As the module says it, in Python's integers, with words of either sign."""
    slabs = slabs_of([4 * 3000 + 7, 4, 1, 16], "cpu")
    packed = torch.zeros(slabs.packed_bytes, dtype=torch.uint8)
    pack_expert(slabs, 2, 0, packed)
    words = packed.view(torch.int32).tolist()
    total = sum(word * (2 * n + 1) for n, word in enumerate(words))
    checksum = torch.zeros(1, dtype=torch.int64)
    packed_checksum_torch(slabs, packed, checksum)
    assert (int(checksum) - total) % 2**64 == 0


@pytest.mark.parametrize("sizes", SIZES)
def test_warming_up_leaves_every_slot_as_it_is(sizes, device):
    slabs = slabs_of(sizes, device)
    before = [tensor.clone() for tensor in slabs.tensors]
    packed = poisoned(slabs.packed_bytes + 32, device)
    warm_up(slabs, packed)
    assert all(map(torch.equal, slabs.tensors, before))
    assert not packed.any()


class Launches:
    """Stands for the kernel: nothing runs, `compiled` are the kernels that Triton would compile for an
    H100.
    """

    def __init__(self) -> None:
        from triton.backends.nvidia.compiler import CUDABackend, GPUTarget
        from triton.runtime.jit import create_function_from_signature

        kernel = pack_experts._kernel
        backend = CUDABackend(GPUTarget("cuda", 90, 32))
        self._bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.compiled = set()

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **constants) -> None:
        _, specialization, options = self._bind(*args, **constants)
        self.compiled.add(str((specialization, options)))


def test_nothing_is_compiled_after_warming_up(monkeypatch):
    """Whatever slots, ranges and places of checksums a migration has."""
    if triton is None or INTERPRETED:
        pytest.skip("nothing is compiled")
    launches = Launches()
    monkeypatch.setattr(pack_experts, "_kernel", launches)
    monkeypatch.setattr(pack_experts, "runs_triton", lambda tensor: True)
    slabs = slabs_of([64, 16, 4096, 37, 4, 4], "cpu")
    packed = torch.zeros(slabs.packed_bytes, dtype=torch.uint8)
    checksums = torch.zeros(8, dtype=torch.int64)
    warm_up(slabs, packed)
    warmed = set(launches.compiled)
    for slot, start in itertools.product(range(SLOTS), range(0, slabs.packed_bytes, 5 * ALIGNMENT)):
        for checksum in (None, checksums[:1], checksums[slot : slot + 1]):
            for stop in range(start + ALIGNMENT, slabs.packed_bytes + 1, 7 * ALIGNMENT):
                pack_expert(slabs, slot, start, packed[start:stop], checksum)
            pack_expert(slabs, slot, 0, packed, checksum)
        packed_checksum(slabs, packed, checksums[slot : slot + 1])
        unpack_expert(slabs, slot, packed)
        add_checksum(slabs, slot, start, slabs.packed_bytes, checksums[slot : slot + 1])
        add_checksum(slabs, slot, 0, start, checksums[slot : slot + 1])
    assert launches.compiled == warmed
    assert len(warmed) == 5


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("add", [add_checksum, add_checksum_torch])
def test_checksums_of_parts_add_up_to_that_of_the_expert(device, sizes, add):
    slabs = slabs_of(sizes, device)
    whole = torch.zeros(1, dtype=torch.int64, device=device)
    packed = torch.zeros(slabs.packed_bytes, dtype=torch.uint8, device=device)
    cuts = [0, *range(ALIGNMENT, slabs.packed_bytes, 3 * ALIGNMENT + 4 * BLOCK)]
    for slot in range(SLOTS):
        pack_expert_torch(slabs, slot, 0, packed, whole)
        total = torch.zeros_like(whole)
        for start, stop in itertools.pairwise([*cuts, slabs.packed_bytes]):
            add(slabs, slot, start, stop, total)
        assert total.item() == whole.item()
