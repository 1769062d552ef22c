"""Every pair of this rank's slots sits once in a block of its slot, in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_rebalance.kernels.group_tokens import group_tokens, group_tokens_torch, max_blocks


def rows_by_hand(slots: list[int], first: int, count: int, block_rows: int):
    """(pair of each row, slot of each block)."""
    rows, blocks = [], []
    for slot in range(first, first + count):
        pairs = [pair for pair, of in enumerate(slots) if of == slot]
        used = -(-len(pairs) // block_rows)
        rows += pairs + [len(slots)] * (used * block_rows - len(pairs))
        blocks += [slot - first] * used
    return rows, blocks


def check(slots_N: torch.Tensor, num_slots: int, block_rows: int, first_slot: int = 0) -> None:
    rows, blocks = rows_by_hand(slots_N.flatten().tolist(), first_slot, num_slots, block_rows)
    for function in (group_tokens, group_tokens_torch):
        groups = function(
            slots_N, num_slots=num_slots, block_rows=block_rows, first_slot=first_slot
        )
        used = int(groups.num_blocks)
        assert used == len(blocks) <= max_blocks(slots_N.numel(), num_slots, block_rows)
        assert groups.pair_of_row[: used * block_rows].tolist() == rows
        assert groups.slot_of_block[:used].tolist() == blocks


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("slots", "num_slots"),
    [
        pytest.param([], 4, id="no pairs"),
        pytest.param([3], 4, id="one pair"),
        pytest.param([0] * 100, 4, id="all on the first slot"),
        pytest.param([3] * 33, 4, id="all on the last slot"),
        pytest.param([-1, 7, 4, 5], 4, id="none of them here"),
        pytest.param([-1] * 40, 4, id="all of them padding"),
        pytest.param([0, -1, 3, 9, 3], 4, id="some of them here"),
        pytest.param([0] * 16, 1, id="one slot, a full block"),
        pytest.param([0, 1, 2, 3, 4] * 7, 5, id="an odd number of slots"),
    ],
)
@pytest.mark.parametrize("block_rows", [16, 64])
def test_groups_of_known_pairs(slots, num_slots, block_rows, dtype, device):
    check(torch.tensor(slots, dtype=dtype, device=device), num_slots, block_rows)


def test_pairs_of_many_chunks(device):
    generator = torch.Generator().manual_seed(0)
    slots = (9 * torch.rand(9000, generator=generator) ** 3).int()
    check(slots.view(-1, 4).to(device), 7, 32, first_slot=1)


@settings(max_examples=60)
@given(data=st.data())
def test_any_pairs(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_slots = data.draw(st.integers(1, 9))
    first = data.draw(st.integers(0, 5))
    slots = data.draw(st.lists(st.integers(-1, 15), max_size=200))
    block_rows = data.draw(st.sampled_from([16, 32]))
    check(torch.tensor(slots, dtype=torch.int32, device=device), num_slots, block_rows, first)
