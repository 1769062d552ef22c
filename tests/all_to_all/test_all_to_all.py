"""Dispatch and combine on 1 to 4 ranks against a plain torch reference, by every exchange."""

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from routed_steps import EXPERTS, HIDDEN, WAYS, make, make_step, placements, through_experts

from ep_rebalance.all_to_all import FixedCapacity, NodeGroups
from ep_rebalance.exchanges import EXCHANGES

SIZES = [1, 2, 3, 4]
EIGHT_BITS = [way for way, plane in WAYS.items() if EXCHANGES[plane["buffers"]].eight_bits]


def forward(
    rank, way, combine, tokens_R, top_k, dtype, experts_of_rank, busy_experts=EXPERTS, seed=0
):
    """(output, reference, rows sent to each rank, rows computed) of one rank."""
    step = make_step(rank, tokens_R[rank], top_k, dtype, experts_of_rank, busy_experts, seed)
    return through_experts(rank, way, combine, step, experts_of_rank)


def forward_on_all_placements(rank, size, way, combine, tokens_R, top_k, dtype):
    return [
        forward(rank, way, combine, tokens_R, top_k, dtype, placement)[:2]
        for placement in placements(size)
    ]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_exact_gives_the_same_bits_on_every_placement(
    ranks_of: dict[int, Ranks], way, size, dtype, top_k
):
    tokens_R = [9, 5, 0, 17][:size]
    answers = ranks_of[size].run(
        forward_on_all_placements, size, way, "exact", tokens_R, top_k, dtype
    )
    for placed in answers:
        for out_TH, expected in placed:
            assert torch.equal(out_TH, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_fast_is_close_on_every_placement(ranks_of: dict[int, Ranks], way, size, dtype, tolerance):
    tokens_R = [9, 5, 0, 17][:size]
    answers = ranks_of[size].run(forward_on_all_placements, size, way, "fast", tokens_R, 4, dtype)
    for placed in answers:
        for out_TH, expected in placed:
            torch.testing.assert_close(out_TH, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("combine", ["exact", "fast"])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_by_way_of_nodes(four_ranks: Ranks, ranks_per_node, combine):
    way, tokens_R = f"nodes of {ranks_per_node}", [9, 5, 0, 17]
    answers = four_ranks.run(forward_on_all_placements, 4, way, combine, tokens_R, 4, torch.float32)
    for placed in answers:
        for out_TH, expected in placed:
            if combine == "exact":
                assert torch.equal(out_TH, expected)
            else:
                torch.testing.assert_close(out_TH, expected, rtol=1e-5, atol=1e-5)


def rows_across_nodes(rank):
    """Rows that left this rank for the other node: all experts of each token are there, on two ranks."""
    all_to_all = make("nodes of 2", "exact", 3)
    other_node = 6 * (1 - rank // 2)
    slots_TK = torch.tensor([[other_node, other_node + 5]] * 7, dtype=torch.int32)
    sent = all_to_all.dispatch(torch.randn(7, HIDDEN), slots_TK, torch.rand(7, 2))
    return sent.handle[0].sent_R[1 - rank // 2]


def test_a_token_crosses_between_nodes_once(four_ranks: Ranks):
    assert four_ranks.run(rows_across_nodes) == [7] * 4


def refuse_nodes(rank):
    with pytest.raises(ValueError, match="4 ranks do not divide into nodes of 3"):
        NodeGroups.create(dist.group.WORLD, 3)
    return True


def test_ranks_that_do_not_divide_into_nodes_are_refused(four_ranks: Ranks):
    assert four_ranks.run(refuse_nodes) == [True] * 4


def forward_in_eight_bits(rank, way):
    """Hidden states of 128 columns, sent through experts that give them back."""
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(6, 128, generator=generator)
    slots_TK = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(6)]).int()
    weights = torch.full((6, 2), 0.5)
    all_to_all = make(way, "exact", 4, payload="fp8")
    sent = all_to_all.dispatch(hidden, slots_TK, weights)
    out = torch.empty_like(hidden)
    all_to_all.combine(sent, sent.rows_MH.repeat_interleave(sent.pairs_per_row, 0), out)
    return out, hidden


@pytest.mark.parametrize("way", EIGHT_BITS)
def test_eight_bits_on_the_wire_round_and_do_no_more(two_ranks: Ranks, way):
    for out, hidden in two_ranks.run(forward_in_eight_bits, way):
        assert not torch.equal(out, hidden)
        torch.testing.assert_close(out, hidden, rtol=2**-4, atol=0.02)


def rounds_of(rank, factor):
    """How many rounds it takes if all tokens of rank 0 go to rank 1."""
    all_to_all = FixedCapacity(
        group=dist.group.WORLD, slots_per_rank=2, combine="exact", capacity_factor=factor
    )
    tokens = 10 if rank == 0 else 0
    slots_TK = torch.full((tokens, 1), 2, dtype=torch.int32)
    sent = all_to_all.dispatch(torch.ones(tokens, 4), slots_TK, torch.ones(tokens, 1))
    return sent.handle.plan.rounds, sent.handle.plan.capacity, int((sent.local_slots_N >= 0).sum())


@pytest.mark.parametrize(
    ("factor", "rounds", "capacity"), [(2.0, 1, 10), (1.0, 2, 5), (0.6, 4, 3), (0.01, 10, 1)]
)
def test_what_does_not_fit_goes_in_a_further_round(two_ranks: Ranks, factor, rounds, capacity):
    answers = two_ranks.run(rounds_of, factor)
    assert answers == [(rounds, capacity, 0), (rounds, capacity, 10)]


@pytest.mark.parametrize("combine", ["exact", "fast"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("tokens_R", "busy_experts"),
    [
        pytest.param([3, 0], EXPERTS, id="a rank without tokens"),
        pytest.param([0, 0], EXPERTS, id="no tokens at all"),
        pytest.param([4, 6], 2, id="a rank that receives nothing"),
        pytest.param([0, 6], 2, id="one rank sends all to the other"),
    ],
)
def test_empty_ranks_take_part(two_ranks: Ranks, way, combine, tokens_R, busy_experts):
    in_order = placements(2)[0]
    answers = two_ranks.run(
        forward, way, combine, tokens_R, 2, torch.float32, in_order, busy_experts
    )
    for (out_TH, expected, _, _), tokens in zip(answers, tokens_R, strict=True):
        assert out_TH.shape == (tokens, HIDDEN)
        torch.testing.assert_close(out_TH, expected, rtol=1e-5, atol=1e-5)
    if busy_experts == 2:
        assert answers[1][3] == 0


@pytest.mark.parametrize("size", [2, 4])
def test_a_token_is_sent_once_to_each_rank_of_its_experts(ranks_of: dict[int, Ranks], size):
    """With all its experts on one rank, a token is one row on the wire, and top_k rows for the
    experts.
    """
    top_k = EXPERTS // size
    in_order, tokens_R = placements(size)[0], [6] * size
    answers = ranks_of[size].run(
        forward, "exact splits", "exact", tokens_R, top_k, torch.float32, in_order, top_k
    )
    assert [rows for _, _, rows, _ in answers] == [[6] + [0] * (size - 1)] * size
    assert [computed for *_, computed in answers] == [6 * size * top_k] + [0] * (size - 1)
