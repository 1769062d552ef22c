"""Experts as bytes: what is read is what is written, and a checksum that no small damage passes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_rebalance.kernels.pack_experts import ALIGNMENT
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.slabs import (
    NamedTensor,
    SlabTensor,
    slabs_of_layers,
    split_by_expert,
)

SLOTS = 3
SHAPES = [
    pytest.param([(4, 8)], torch.float32, id="one tensor"),
    pytest.param([(5,)], torch.bfloat16, id="odd number of bfloat16"),
    pytest.param([(3, 7), (7,), (1,)], torch.bfloat16, id="several odd tensors"),
    pytest.param([(13,), (16,), (1,)], torch.uint8, id="odd bytes"),
    pytest.param([(64, 40), (40, 32)], torch.float32, id="larger than the checksum's grid"),
    pytest.param([(2051,), (1030,)], torch.bfloat16, id="odd and larger than the grid"),
]


def random_tensors(shapes, dtype, seed=0, slots=SLOTS):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 255, (slots, *shape), generator=generator, dtype=torch.uint8)
        .repeat_interleave(dtype.itemsize, -1)
        .contiguous()
        .view(dtype)
        for shape in shapes
    ]


def numbered(*shape) -> torch.Tensor:
    """float32; no two elements are alike."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def pack(memory: ExpertMemory, slot: int, layer: int = 0) -> torch.Tensor:
    packed = torch.zeros(memory.expert_bytes_L[layer], dtype=torch.uint8)
    memory.read(layer, slot, 0, packed)
    return packed


def slot_checksum(memory: ExpertMemory, slot: int) -> torch.Tensor:
    checksum = torch.full((1,), -1)
    memory.read(0, slot, 0, torch.empty(ALIGNMENT, dtype=torch.uint8), checksum)
    return checksum


def packed_checksum(memory: ExpertMemory, packed: torch.Tensor) -> torch.Tensor:
    checksum = torch.full((1,), -1)
    memory.checksum_packed(0, packed, checksum)
    return checksum


def bytes_of(tensors, slot):
    return [tensor[slot].reshape(-1).view(torch.uint8) for tensor in tensors]


@pytest.mark.parametrize(("shapes", "dtype"), SHAPES)
def test_packed_expert_is_its_tensors_each_padded(shapes, dtype):
    tensors = random_tensors(shapes, dtype)
    memory = ExpertMemory([tensors])
    packed, position = pack(memory, 1), 0
    for part in bytes_of(tensors, 1):
        assert torch.equal(packed[position : position + len(part)], part)
        padded = -(-len(part) // ALIGNMENT) * ALIGNMENT
        assert not packed[position + len(part) : position + padded].any()
        position += padded
    assert position == len(packed)


@pytest.mark.parametrize(("shapes", "dtype"), SHAPES)
def test_writing_a_packed_expert_changes_its_slot_alone(shapes, dtype):
    tensors = random_tensors(shapes, dtype)
    memory = ExpertMemory([tensors])
    before = [pack(memory, slot) for slot in range(SLOTS)]
    memory.write(0, 2, before[0])
    assert torch.equal(pack(memory, 2), before[0])
    assert torch.equal(pack(memory, 0), before[0])
    assert torch.equal(pack(memory, 1), before[1])


@given(data=st.data())
@settings(max_examples=60)
def test_any_cut_into_byte_ranges_gives_the_whole(data):
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    memory = ExpertMemory([random_tensors([(size,) for size in sizes], torch.uint8)])
    total = memory.expert_bytes_L[0]
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    bounds = [0, *cuts, total]
    out = torch.zeros(total, dtype=torch.uint8)
    for start, stop in itertools.pairwise(bounds):
        memory.read(0, 1, start, out[start:stop])
    assert torch.equal(out, pack(memory, 1))


def test_layers_have_sizes_of_their_own():
    memory = ExpertMemory(
        [random_tensors([(3,)], torch.float32), random_tensors([(4, 8)], torch.float32)]
    )
    assert memory.expert_bytes_L == (16, 128)


def test_a_scale_that_each_expert_has_once_moves_with_it():
    layer = {"weight": random_tensors([(4, 8)], torch.uint8)[0], "alpha": torch.rand(SLOTS)}
    expected = layer["weight"][0].clone(), layer["alpha"][0].clone()
    memory = ExpertMemory([layer])
    memory.write(0, 2, pack(memory, 0))
    assert torch.equal(layer["weight"][2], expected[0])
    assert torch.equal(layer["alpha"][2], expected[1])


def test_slabs_are_taken_as_they_are_cut():
    weight, alphas = numbered(SLOTS, 5, 2), numbered(SLOTS)
    named = [NamedTensor("weight", weight.transpose(1, 2)), NamedTensor("alphas", alphas)]
    memory = ExpertMemory([split_by_expert(named, SLOTS).slabs])
    assert (memory.slots, memory.expert_bytes_L) == (SLOTS, (64,))
    assert [slab.name for slab in memory.slabs_L[0]] == ["alphas", "weight"]
    expected = weight[0].clone()
    memory.write(0, 2, pack(memory, 0))
    assert torch.equal(weight[2], expected)
    assert alphas.tolist() == [0.0, 1.0, 0.0]


def test_local_experts_may_be_the_last_dimension():
    columns_first = torch.zeros(SLOTS, 5, 2).permute(2, 1, 0)
    assert ExpertMemory([[columns_first]], slots=SLOTS).expert_bytes_L == (48,)


def test_a_layer_without_experts_is_refused():
    for empty in ([], [torch.empty(SLOTS, 0)], {}):
        with pytest.raises(ValueError, match="layer 1 has no tensor"):
            ExpertMemory([[numbered(SLOTS)], empty])


def test_layers_with_other_numbers_of_experts_are_refused():
    cut = [slabs_of_layers([[numbered(slots, 2)]])[0] for slots in (3, 2)]
    with pytest.raises(ValueError, match=r"tensor 0 of layer 1 is torch.uint8 \(2, 8\)"):
        ExpertMemory(cut)


def test_experts_on_several_devices_are_refused():
    layers = [[numbered(SLOTS)], [torch.zeros(SLOTS, device="meta")]]
    with pytest.raises(ValueError, match="tensor 0 of layer 1 is on meta and tensor 0 of layer 0"):
        ExpertMemory(layers)


def test_two_layers_in_one_memory_are_refused():
    weight = numbered(SLOTS, 4)
    with pytest.raises(ValueError, match="w of layer 0 and w of layer 1 share memory"):
        ExpertMemory([{"w": weight}, {"w": weight}])
    with pytest.raises(ValueError, match="w of layer 0 and w of layer 2 share memory"):
        ExpertMemory([{"w": weight}, {"w": numbered(SLOTS, 4)}, {"w": weight[:, 2:]}])


def test_slabs_may_share_memory_expert_by_expert_alone():
    rows = numbered(1 + SLOTS * 4)[1:].view(torch.uint8).view(SLOTS, 16)
    left, right, shifted = (
        SlabTensor("left", rows[:, :10]),
        SlabTensor("right", rows[:, 6:]),
        SlabTensor("later", rows.flatten()[8:40].view(2, 16)),
    )
    assert ExpertMemory([[left, right, left]]).expert_bytes_L == (48,)
    two = [SlabTensor("left", rows[:2, :10]), shifted]
    with pytest.raises(ValueError, match="later of layer 0 and left of layer 0 share memory"):
        ExpertMemory([two])
    with pytest.raises(ValueError, match="same of layer 0 and same of layer 0 share memory"):
        ExpertMemory([[SlabTensor("same", rows[:1].expand(SLOTS, 16))]])


def test_rows_between_each_other_share_nothing():
    rows = numbered(SLOTS, 2, 4)
    layers = [[rows[:, 0, :3]], [rows[:, 1, :3]]]
    with pytest.raises(ValueError, match="share memory"):
        ExpertMemory(layers)  # padding of a memory that seems to hold nothing else moves along
    memory = torch.cat((rows.flatten(), torch.zeros(1)))
    first, second = memory[:-1].view(SLOTS, 2, 4).unbind(1)
    assert ExpertMemory([[first[:, :3]], [second[:, :3]]]).expert_bytes_L == (16, 16)


@pytest.mark.parametrize(("shapes", "dtype"), SHAPES)
def test_checksum_of_a_slot_equals_that_of_the_packed_expert(shapes, dtype):
    memory = ExpertMemory([random_tensors(shapes, dtype)])
    for slot in range(SLOTS):
        staged = torch.zeros(2, memory.expert_bytes_L[0] + ALIGNMENT, dtype=torch.uint8)
        memory.read(0, slot, 0, staged[1, : memory.expert_bytes_L[0]])
        assert torch.equal(slot_checksum(memory, slot), packed_checksum(memory, staged[1]))


def test_checksum_does_not_depend_on_where_the_weights_lie():
    """A view into a larger buffer begins at any multiple of its element size."""
    values = random_tensors([(8,)], torch.bfloat16)[0]
    buffer = torch.zeros(1 + values.numel(), dtype=torch.bfloat16)
    shifted = buffer[1:].view(values.shape)
    shifted.copy_(values)
    memory = ExpertMemory([[shifted]])
    assert torch.equal(slot_checksum(memory, 1), packed_checksum(memory, pack(memory, 1)))


def data_bytes(memory: ExpertMemory, shapes, dtype) -> list[int]:
    """Positions in a packed expert that hold data, not padding."""
    positions, start = [], 0
    for shape in shapes:
        size = torch.Size(shape).numel() * dtype.itemsize
        positions += range(start, start + size)
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return positions


@pytest.mark.parametrize(("shapes", "dtype"), SHAPES)
@given(data=st.data())
@settings(max_examples=40)
def test_checksum_sees_every_change_of_one_byte(shapes, dtype, data):
    memory = ExpertMemory([random_tensors(shapes, dtype)])
    packed = pack(memory, 0)
    expected = packed_checksum(memory, packed)
    packed[data.draw(st.sampled_from(data_bytes(memory, shapes, dtype)))] ^= data.draw(
        st.integers(1, 255)
    )
    assert not torch.equal(packed_checksum(memory, packed), expected)


def test_checksum_sees_each_single_bit_of_a_large_expert():
    """Every sign bit, where a sum with an even factor would lose it."""
    memory = ExpertMemory([random_tensors([(96, 128)], torch.float32)])
    packed = pack(memory, 0)
    expected = packed_checksum(memory, packed)
    for position in range(3, len(packed), 4):
        packed[position] ^= 0x80
        assert not torch.equal(packed_checksum(memory, packed), expected), position
        packed[position] ^= 0x80


@given(data=st.data())
@settings(max_examples=100)
def test_checksum_sees_two_blocks_in_each_others_place(data):
    memory = ExpertMemory([random_tensors([(64, 128)], torch.float32)])
    packed = pack(memory, 0)
    expected = packed_checksum(memory, packed)
    size = 4 * data.draw(st.integers(1, 64))
    blocks = len(packed) // size
    first = data.draw(st.integers(0, blocks - 2)) * size
    second = data.draw(st.integers(first // size + 1, blocks - 1)) * size
    ours, theirs = packed[first : first + size].clone(), packed[second : second + size].clone()
    packed[first : first + size], packed[second : second + size] = theirs, ours
    assert torch.equal(packed_checksum(memory, packed), expected) == torch.equal(ours, theirs)


def test_checksum_sees_two_words_that_differ_in_their_sign_in_each_others_place():
    values = torch.zeros(1, 4096)
    values[0, 7], values[0, 2055] = 1.5, -1.5
    memory = ExpertMemory([[values]])
    expected = slot_checksum(memory, 0).clone()
    values[0, 7], values[0, 2055] = -1.5, 1.5
    assert not torch.equal(slot_checksum(memory, 0), expected)


def test_checksum_sees_equal_tensors_in_each_others_place():
    first, second = random_tensors([(16, 128), (16, 128)], torch.float32)
    ours, swapped = ExpertMemory([[first, second]]), ExpertMemory([[second, first]])
    assert not torch.equal(slot_checksum(ours, 0), slot_checksum(swapped, 0))


def test_checksums_of_different_experts_differ():
    memory = ExpertMemory([random_tensors([(32, 32)], torch.bfloat16, slots=16)])
    assert len({int(slot_checksum(memory, slot)) for slot in range(16)}) == 16
