"""Tensors in any layout as rows of bytes: a row is an expert and nothing of another, or it is refused."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.expert_rows import rows_of_layers

SLOTS = 4


def rows_of(*tensors, slots=SLOTS):
    return rows_of_layers([tensors], slots)[0]


def sizes_of(*tensors, slots=SLOTS):
    return [rows.shape[1] for rows in rows_of(*tensors, slots=slots)]


def filled(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


@st.composite
def layouts(draw):
    """(tensor, the dimension of its experts, the memory around it)."""
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
    inner = draw(st.lists(st.integers(1, 5), max_size=3))
    padded = [size + draw(st.integers(0, 2)) for size in inner]
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    length = SLOTS * torch.Size(padded).numel()
    memory = torch.randint(0, 100, (before + length + after,)).to(dtype)
    tensor = memory[before : before + length].view(SLOTS, *padded)
    for axis, size in enumerate(inner, start=1):
        tensor = tensor.narrow(axis, 0, size)
    # Experts come first where another dimension has their number.
    free = SLOTS not in inner
    order = draw(st.permutations(range(tensor.ndim))) if free else range(tensor.ndim)
    return tensor.permute(*order), list(order).index(0), memory


@given(layouts(), st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1))
def test_an_expert_of_any_layout_is_copied_and_no_other_changes(layout, src, dst):
    tensor, axis, memory = layout
    want = tensor.clone()
    want.select(axis, dst).copy_(want.select(axis, src))
    untouched = memory.clone()
    experts = ExpertMemory([[tensor]], slots=SLOTS)
    packed = torch.zeros(experts.expert_bytes_L[0], dtype=torch.uint8)
    experts.read(0, src, 0, packed)
    experts.write(0, dst, packed)
    assert torch.equal(tensor, want)
    (rows,) = rows_of(tensor)
    first = rows.storage_offset() + dst * rows.stride(0)
    changed = memory.view(torch.uint8) != untouched.view(torch.uint8)
    changed[first : first + rows.shape[1]] = False
    assert not changed.any()


def test_column_major_scales_are_rows():
    scales = filled(SLOTS, 3, 5).transpose(1, 2)
    assert scales.stride(1) == 1
    (rows,) = rows_of(scales)
    assert torch.equal(rows[2].view(torch.float32).view(3, 5).t(), scales[2])


def test_padding_of_memory_that_holds_only_experts_moves_along():
    assert sizes_of(filled(SLOTS, 8)[:, :6]) == [32]
    assert sizes_of(filled(SLOTS, 3, 8)[:, :, :6]) == [96]


def test_a_row_ends_with_its_expert_where_others_may_follow():
    assert sizes_of(filled(1 + SLOTS * 8)[1:].view(SLOTS, 8)[:, :6]) == [24]
    aligned = torch.empty_strided((SLOTS, 6, 3), (24, 1, 8))
    assert sizes_of(aligned) == [4 * (2 * 8 + 6)]


def test_tensors_that_share_bytes_are_moved_once():
    weight = filled(SLOTS, 6, 2)
    alias = weight.view(torch.uint8)
    assert sizes_of(weight, torch.ones(SLOTS), alias, weight[:, :3]) == [48, 4]
    shared = filled(1 + SLOTS * 8)[1:].view(SLOTS, 8)
    left, middle, right = shared[:, :4], shared[:, 3:5], shared[:, 5:]
    assert sizes_of(right, left, middle) == [12, 20]
    assert sizes_of(left[:, :2], shared[:, 6:], shared) == [32]


def test_tensors_that_lie_between_each_other_are_moved_apart():
    shared = filled(1 + SLOTS * 8)[1:].view(SLOTS, 8)
    left, right = rows_of(shared[:, :3], shared[:, 3:])
    right[0].copy_(right[1])
    assert torch.equal(left[0].view(torch.float32), torch.tensor([1.0, 2.0, 3.0]))


def test_tensors_in_parts_of_one_storage_are_moved_apart():
    memory = filled(100)
    assert sizes_of(memory[:40].view(SLOTS, 10), memory[40:80].view(SLOTS, 10)) == [40, 40]


def test_empty_tensors_hold_nothing():
    assert sizes_of(torch.empty(SLOTS, 0), torch.ones(SLOTS)) == [4]


def test_a_single_expert_is_all_of_its_tensors():
    assert sizes_of(filled(1, 6, 2), filled(3, 1, 2).permute(2, 0, 1), slots=1) == [48, 24]


REFUSED = {
    "other number": (
        {"w2": filled(5, 2)},
        r"\(5, 2\) and strides \(2, 1\): it does not divide into 4",
    ),
    "no dimension": ({"w2": filled(SLOTS * 2)}, "does not divide into 4 local experts"),
    "number alone": ({"w2": filled()}, "does not divide into 4 local experts"),
    "experts inside": ({"w2": filled(6, SLOTS).t()}, "in dimension 0, is not the largest"),
    "experts last": ({"w2": filled(6, SLOTS)}, "in dimension 1, is not the largest"),
    "square": ({"w2": filled(SLOTS, SLOTS).t()}, "in dimension 0, is not the largest"),
    "one for all": ({"w2": torch.ones(1).expand(SLOTS)}, "experts overlap: one is 4 bytes long"),
    "overlapping": (
        {"w2": filled(100).as_strided((SLOTS, 10), (7, 1))},
        "one is 40 bytes long and the next begins 28 bytes on",
    ),
    "sparse": ({"w2": torch.eye(SLOTS).to_sparse()}, "its layout is torch.sparse_coo, not strided"),
}


@pytest.mark.parametrize(("layer", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_block_of_bytes_for_each_expert_is_refused_by_name(layer, reason):
    with pytest.raises(ValueError, match=f"w2 of layer 1.*{reason}"):
        rows_of_layers([{"w13": filled(SLOTS, 3)}, {"w13": filled(SLOTS, 3), **layer}], SLOTS)


def test_a_layer_without_experts_is_refused():
    with pytest.raises(ValueError, match="layer 1 has no tensor"):
        rows_of_layers([[filled(SLOTS)], [torch.empty(SLOTS, 0)]], SLOTS)


def test_experts_that_begin_at_different_places_of_one_memory_are_refused():
    memory = filled(SLOTS * 4 + 4)
    one, other = memory[: SLOTS * 4].view(SLOTS, 4), memory[4:].view(SLOTS, 4)
    with pytest.raises(ValueError, match="one of layer 0 and other of layer 0 share memory"):
        rows_of_layers([{"one": one, "other": other}], SLOTS)
    with pytest.raises(ValueError, match="share memory"):
        rows_of(one, memory[: SLOTS * 3].view(SLOTS, 3))


def test_two_layers_in_one_memory_are_refused():
    weight = filled(SLOTS, 4)
    with pytest.raises(ValueError, match=re.escape("w of layer 0 and w of layer 1 share memory")):
        rows_of_layers([{"w": weight}, {"w": weight}], SLOTS)
