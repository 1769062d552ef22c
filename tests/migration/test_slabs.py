"""Which bytes are an expert's: wherever an engine put them, and nothing but them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_rebalance.migration.slabs import (
    NamedTensor,
    fingerprint,
    slabs_of_layers,
    split_by_expert,
)

EXPERTS = 4


def split(experts=EXPERTS, **tensors):
    return split_by_expert([NamedTensor(*item) for item in tensors.items()], experts)


def sizes(found):
    """Bytes of an expert by the slab's name."""
    return {slab.name: slab.size for slab in found.slabs}


def cut_sizes(*tensors, slots=EXPERTS):
    """Bytes of an expert in each slab of a layer's tensors, in their order."""
    return [slab.size for slab in slabs_of_layers([tensors], slots=slots)[0]]


def common(found):
    return [named.name for named in found.common]


def numbered(*shape, dtype=torch.float32):
    """No two elements are alike."""
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


@st.composite
def layouts(draw):
    """A tensor with the experts in some dimension, permuted, padded, and cut from a larger one."""
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
    inner = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    padding = draw(st.lists(st.integers(0, 2), min_size=len(inner), max_size=len(inner)))
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    whole = [EXPERTS, *(size + more for size, more in zip(inner, padding, strict=True))]
    memory = numbered(before + math.prod(whole) + after, dtype=dtype)
    tensor = memory[before : before + math.prod(whole)].view(whole)
    for axis, size in enumerate(inner, start=1):
        tensor = tensor.narrow(axis, 0, size)
    order = draw(st.permutations(range(tensor.ndim)))
    return tensor.permute(order), order.index(0), memory


@given(layouts(), st.permutations(range(EXPERTS)))
def test_slabs_exchanged_are_experts_exchanged_and_nothing_else(layout, order):
    tensor, axis, memory = layout
    item = tensor.element_size()
    want, before = tensor.index_select(axis, torch.tensor(order)), memory.clone()
    mine = torch.zeros_like(memory, dtype=torch.bool)
    mine.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    (slab,) = split(tensor=tensor).slabs
    slab.bytes_EB.copy_(slab.bytes_EB[list(order)].clone())
    assert torch.equal(tensor, want)
    whole = memory.numel() * item == EXPERTS * slab.bytes_EB.stride(0)
    if not whole:  # else padding belongs to the experts
        row = tensor.select(axis, 0)
        last = row.storage_offset() + sum(
            (n - 1) * s for n, s in zip(row.shape, row.stride(), strict=True)
        )
        assert slab.size == item * (last - tensor.storage_offset() + 1)
        outside = torch.ones_like(mine)
        step = tensor.stride(axis)
        for expert in range(EXPERTS):
            first = tensor.storage_offset() + expert * step
            outside[first : first + slab.size // item] = False
        assert torch.equal(memory[outside], before[outside])


def test_scales_with_columns_first_and_alphas_are_found():
    column_major = numbered(EXPERTS, 3, 5).transpose(1, 2)
    found = split(scales=column_major, alphas=numbered(EXPERTS), factors=numbered(EXPERTS, 1, 1))
    assert sizes(found) == {"alphas": 4, "factors": 4, "scales": 60}
    assert common(found) == []
    assert all(slab.gapless for slab in found.slabs)


def test_scales_padded_for_bulk_loads_end_where_the_last_expert_does():
    rows, columns, aligned = 6, 3, 8
    padded = torch.empty_strided((EXPERTS, rows, columns), (aligned * columns, 1, aligned))
    (slab,) = split(scales=padded).slabs
    assert slab.size == 4 * ((columns - 1) * aligned + rows)
    assert not slab.gapless
    assert padded.untyped_storage().nbytes() == 4 * (EXPERTS - 1) * aligned * columns + slab.size


def test_padding_of_memory_that_is_all_experts_moves_with_them():
    padded = numbered(EXPERTS, 8)[:, :6]
    assert sizes(split(weight=padded)) == {"weight": 32}


def test_tensors_of_one_memory_are_taken_once_under_the_first_name():
    weight = numbered(EXPERTS, 6, 2)
    found = split(
        first=weight,
        again=weight.view(torch.uint8),
        gate=weight[:, :3],
        flat=weight.view(-1, 2),
        one=weight[2],
    )
    assert sizes(found) == {"first": 48}
    assert common(found) == []


def test_parts_of_a_row_are_cut_apart_where_others_may_lie_between_them():
    memory = numbered(1 + EXPERTS * 8)
    rows = memory[1:].view(EXPERTS, 8)
    assert sizes(split(left=rows[:, :2], right=rows[:, 5:7])) == {"left": 8, "right": 8}
    assert sizes(split(left=rows[:, :2], right=rows[:, 2:7])) == {"left": 28}


def test_padding_stays_where_a_tensor_of_another_kind_lies_in_it():
    memory = numbered(EXPERTS * 8)
    found = split(weight=memory.view(EXPERTS, 8)[:, :6], limit=memory[-1:])
    assert sizes(found) == {"weight": 24}
    assert common(found) == ["limit"]
    assert sizes(split(weight=memory.view(EXPERTS, 8)[:, :6], all=memory)) == {"weight": 32}


def test_several_tensors_in_one_memory_are_cut_one_by_one():
    memory = numbered(100)
    found = split(
        up=memory[:40].view(EXPERTS, 10),
        down=memory[40:80].view(EXPERTS, 10),
        limit=memory[80:83],
    )
    assert sizes(found) == {"down": 40, "up": 40}
    assert common(found) == ["limit"]


def test_what_repeats_one_value_is_common():
    assert common(split(scale=torch.ones(1).expand(EXPERTS))) == ["scale"]
    assert common(split(scale=torch.ones(1, 1).expand(EXPERTS, 3))) == ["scale"]


def test_what_mixes_experts_is_common():
    found = split(interleaved=numbered(3, EXPERTS), flat=numbered(EXPERTS * 3), scalar=numbered())
    assert common(found) == ["flat", "interleaved", "scalar"]
    assert found.slabs == ()


def test_empty_tensors_are_nothing():
    found = split(none=torch.empty(EXPERTS, 0))
    assert found.slabs == found.common == ()


def test_views_that_disagree_where_an_expert_begins_are_an_error():
    memory = numbered(EXPERTS * 4 + 4)
    with pytest.raises(ValueError, match="one and other share memory and do not agree"):
        split(one=memory[: EXPERTS * 4].view(EXPERTS, 4), other=memory[4:].view(EXPERTS, 4))


def test_a_tensor_over_a_part_of_the_experts_and_more_is_an_error():
    memory = numbered(EXPERTS * 4 + 3)
    with pytest.raises(ValueError, match="all lies over a part of weight"):
        split(weight=memory[: EXPERTS * 4].view(EXPERTS, 4), all=memory)


def test_a_buffer_of_nothing_but_experts_is_theirs():
    memory = numbered(EXPERTS * 6)
    up, down = memory[: EXPERTS * 4].view(EXPERTS, 4), memory[EXPERTS * 4 :].view(EXPERTS, 2)
    found = split(all=memory, up=up, down=down)
    assert sizes(found) == {"down": 8, "up": 16}
    assert common(found) == []


def test_tensors_of_several_storages_that_share_memory_are_taken_once():
    memory = numbered(EXPERTS * 4)
    other = torch.from_numpy(memory.numpy()).view(EXPERTS, 4)
    assert other.untyped_storage()._cdata != memory.untyped_storage()._cdata
    assert sizes(split(part=memory.view(EXPERTS, 4)[:, :2], all=other)) == {"part": 16}
    outer = torch.from_numpy(memory.numpy()[2:14])
    with pytest.raises(ValueError, match="share"):
        split(inner=memory[:12].view(3, 4)[:, :3], outer=outer.view(3, 4), experts=3)


def test_tensors_without_data_share_nothing():
    one, other = (torch.zeros(EXPERTS, 3, device="meta") for _ in range(2))
    assert sizes(split(one=one, other=other, part=other[:, :1])) == {"one": 12, "other": 12}


def test_a_single_expert_has_all_that_counts_it():
    weight = numbered(1, 6, 2)
    found = split(
        experts=1, weight=weight, part=weight[:, 2:4], alpha=numbered(1), bias=numbered(3)
    )
    assert sizes(found) == {"alpha": 4, "weight": 48}
    assert common(found) == ["bias"]


def test_slabs_that_are_all_alike_are_told():
    equal, unequal = torch.ones(EXPERTS, 2), torch.ones(EXPERTS, 2)
    unequal[3, 1] = 2.0
    found = split(equal=equal, one=torch.ones(EXPERTS), unequal=unequal)
    assert [slab.uniform for slab in found.slabs] == [True, True, False]
    assert not split(experts=1, alpha=torch.ones(1)).slabs[0].uniform


def test_slabs_found_during_inference_can_be_written_later():
    weight = numbered(EXPERTS, 2)
    with torch.inference_mode():
        (slab,) = split(weight=weight).slabs
    slab.bytes_EB.zero_()
    assert not weight.any()


def test_fingerprints_tell_bytes_types_and_shapes_apart():
    column_major = numbered(3, 2).t()
    tensors = [
        numbered(2, 3),
        column_major,
        numbered(2, 3).int(),
        numbered(6),
        numbered(2, 3).to(torch.float8_e4m3fn),
    ]
    assert len({fingerprint(tensor) for tensor in tensors}) == len(tensors)
    assert fingerprint(column_major) == fingerprint(column_major.contiguous())
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))


def test_slabs_of_tensors_keep_their_order_and_names():
    named = {"w2": numbered(EXPERTS, 3), "bias": numbered(EXPERTS), "part": numbered(EXPERTS, 2)}
    unnamed = [numbered(EXPERTS, n) for n in range(1, 13)]
    first, second = slabs_of_layers([named, unnamed])
    assert [slab.name for slab in first] == ["w2", "bias", "part"]
    assert [slab.name for slab in second] == [f"tensor {n}" for n in range(12)]
    assert cut_sizes(numbered(EXPERTS, 2), torch.empty(EXPERTS, 0), numbered(EXPERTS)) == [8, 4]


def test_slabs_that_are_cut_already_stay_as_they_are():
    cut = split(weight=numbered(EXPERTS, 3)).slabs
    layers = slabs_of_layers([cut, {"weight": numbered(EXPERTS, 3)}])
    assert layers[0] == cut
    assert len(layers[1][0].bytes_EB) == EXPERTS


def test_tensors_that_share_bytes_are_moved_once_in_the_place_of_the_first():
    weight = numbered(EXPERTS, 6, 2)
    alias = weight.view(torch.uint8)
    assert cut_sizes(weight, torch.ones(EXPERTS), alias, weight[:, :3]) == [48, 4]
    shared = numbered(1 + EXPERTS * 8)[1:].view(EXPERTS, 8)
    assert cut_sizes(shared[:, 6:], torch.ones(EXPERTS), shared[:, :4], shared[:, 3:5]) == [
        8,
        4,
        20,
    ]


def test_a_dimension_of_their_number_that_others_have_too_is_chosen_by_its_stride():
    square = numbered(EXPERTS, EXPERTS)
    for view in (square, square.t()):
        (slab,) = slabs_of_layers([[view]], slots=EXPERTS)[0]
        assert torch.equal(slab.bytes_EB[2].view(torch.float32), square[2])


def test_local_experts_are_counted_by_the_first_tensor_or_said():
    columns_first = numbered(EXPERTS, 5, 2).permute(2, 1, 0)
    assert cut_sizes(numbered(EXPERTS, 2), columns_first, slots=None) == [8, 40]
    assert cut_sizes(columns_first) == [40]
    with pytest.raises(ValueError, match=r"tensor 0 of layer 0, of shape \(2, 5, 4\)"):
        cut_sizes(columns_first, slots=None)
    for uncounted in ([], [[]], [[numbered()]]):
        with pytest.raises(ValueError, match="pass slots"):
            slabs_of_layers(uncounted)


REFUSED = {
    "other number": (
        numbered(5, 2),
        r"of shape \(5, 2\) and strides \(2, 1\): it does not divide into 4",
    ),
    "no dimension": (numbered(EXPERTS * 2), "does not divide into 4 local experts"),
    "number alone": (numbered(), "does not divide into 4 local experts"),
    "experts inside": (numbered(6, EXPERTS).t(), "in dimension 0, is not the largest"),
    "experts last": (numbered(6, EXPERTS), "in dimension 1, is not the largest"),
    "one for all": (torch.ones(1).expand(EXPERTS), "experts overlap: one is 4 bytes long"),
    "overlapping": (
        numbered(100).as_strided((EXPERTS, 10), (7, 1)),
        "one is 40 bytes long and the next begins 28 bytes on",
    ),
    "sparse": (torch.eye(EXPERTS).to_sparse(), "its layout is torch.sparse_coo, not strided"),
}


@pytest.mark.parametrize(("tensor", "reason"), REFUSED.values(), ids=REFUSED)
def test_tensors_that_cannot_be_cut_are_refused_by_name(tensor, reason):
    good = {"w13": numbered(EXPERTS, 3)}
    with pytest.raises(ValueError, match=f"w2 of layer 1.*{reason}"):
        slabs_of_layers([good, {**good, "w2": tensor}])


def test_tensors_whose_experts_begin_at_different_places_are_refused_with_their_layer():
    memory = numbered(EXPERTS * 4 + 4)
    one, other = memory[: EXPERTS * 4].view(EXPERTS, 4), memory[4:].view(EXPERTS, 4)
    with pytest.raises(ValueError, match=r"experts of layer 0 .*: one and other share memory"):
        slabs_of_layers([{"one": one, "other": other}])
    with pytest.raises(ValueError, match="share memory"):
        cut_sizes(one, memory[: EXPERTS * 3].view(EXPERTS, 3))
