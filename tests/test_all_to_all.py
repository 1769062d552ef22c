"""Dispatch and combine on 1, 2 and 4 ranks against a plain torch reference."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from ep_rebalance.all_to_all import AllToAll, weighted_sum

EXPERTS, HIDDEN = 8, 24
SIZES = [1, 2, 4]


@dataclass(frozen=True)
class Step:
    """One forward step of one rank: tokens, their experts and weights, and the slots that were
    chosen.
    """

    hidden_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    slots_TK: torch.Tensor


def compute_expert(expert: int, row_H: torch.Tensor) -> torch.Tensor:
    """Some function of a row that differs between experts and does not depend on the rows beside
    it.
    """
    scale = torch.linspace(0.3, 1.7, HIDDEN).roll(expert)
    return torch.tanh(row_H.float() * scale + expert).to(row_H.dtype)


def reference(step: Step) -> torch.Tensor:
    """The layer's output without any distribution."""
    out_TH = torch.zeros(step.hidden_TH.shape)
    for token, ids in enumerate(step.ids_TK.tolist()):
        outputs = [compute_expert(expert, step.hidden_TH[token]) for expert in ids]
        out_TH[token] = weighted_sum(
            torch.stack(outputs).unsqueeze(0), step.weights_TK[token : token + 1]
        )[0]
    return out_TH.to(step.hidden_TH.dtype)


def spread(slots: list[list[int]]) -> list[list[int]]:
    """The slots of each expert, from the experts of each rank."""
    flat = [expert for rank in slots for expert in rank]
    return [[slot for slot, e in enumerate(flat) if e == expert] for expert in range(EXPERTS)]


def placements(size: int) -> list[list[list[int]]]:
    """Experts of each rank: in order, reversed, mixed, and with as many replicas as ranks."""
    mixed = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(size)).tolist()
    per_rank = EXPERTS // size
    once = [list(range(EXPERTS)), list(range(EXPERTS))[::-1], mixed]
    cut = [[order[r * per_rank : (r + 1) * per_rank] for r in range(size)] for order in once]
    return [*cut, [list(range(EXPERTS)) for _ in range(size)]]


def make_step(rank, tokens, top_k, dtype, experts_of_rank, busy_experts, seed) -> Step:
    """Slots are drawn from the replicas of each expert; tokens and ids do not depend on the
    placement.
    """
    data = torch.Generator().manual_seed(100 * seed + rank)
    choice = torch.Generator().manual_seed(7 + rank)
    hidden = torch.randn(tokens, HIDDEN, generator=data).to(dtype)
    rows = [torch.randperm(busy_experts, generator=data)[:top_k].tolist() for _ in range(tokens)]
    weights = torch.rand(tokens, top_k, generator=data)
    slots_of = spread(experts_of_rank)

    def pick(expert: int) -> int:
        replicas = slots_of[expert]
        return replicas[int(torch.randint(len(replicas), (), generator=choice))]

    slots = [[pick(expert) for expert in row] for row in rows]
    shape = (tokens, top_k)
    return Step(
        hidden_TH=hidden,
        ids_TK=torch.tensor(rows, dtype=torch.int64).reshape(shape),
        weights_TK=weights,
        slots_TK=torch.tensor(slots, dtype=torch.int32).reshape(shape),
    )


def forward(rank, combine, tokens_R, top_k, dtype, experts_of_rank, busy_experts=EXPERTS, seed=0):
    """(output, reference, rows sent to each rank, rows computed) of one rank."""
    step = make_step(rank, tokens_R[rank], top_k, dtype, experts_of_rank, busy_experts, seed)
    local = experts_of_rank[rank]
    all_to_all = AllToAll(group=dist.group.WORLD, slots_per_rank=len(local), combine=combine)
    sent = all_to_all.dispatch(step.hidden_TH, step.slots_TK, step.weights_TK)
    outputs = torch.empty_like(sent.rows_NH)
    for n, slot in enumerate(sent.local_slots_N.tolist()):
        outputs[n] = compute_expert(local[slot], sent.rows_NH[n])
    out_TH = torch.full_like(step.hidden_TH, torch.nan)
    all_to_all.combine(sent, outputs, out_TH)
    expected_rows = [
        len({token for token, row in enumerate(step.slots_TK.tolist()) for slot in row
             if slot // len(local) == peer})
        for peer in range(len(experts_of_rank))
    ]  # fmt: skip
    assert sent.sent_rows_R == expected_rows
    return out_TH, reference(step), sent.sent_rows_R, len(outputs)


def forward_on_all_placements(rank, size, combine, tokens_R, top_k, dtype):
    return [
        forward(rank, combine, tokens_R, top_k, dtype, placement)[:2]
        for placement in placements(size)
    ]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_exact_gives_the_same_bits_on_every_placement(
    ranks_of: dict[int, Ranks], size, dtype, top_k
):
    tokens_R = [9, 5, 0, 17][:size]
    answers = ranks_of[size].run(forward_on_all_placements, size, "exact", tokens_R, top_k, dtype)
    for placed in answers:
        for out_TH, expected in placed:
            assert torch.equal(out_TH, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("size", SIZES)
def test_fast_is_close_on_every_placement(ranks_of: dict[int, Ranks], size, dtype, tolerance):
    tokens_R = [9, 5, 0, 17][:size]
    answers = ranks_of[size].run(forward_on_all_placements, size, "fast", tokens_R, 4, dtype)
    for placed in answers:
        for out_TH, expected in placed:
            torch.testing.assert_close(out_TH, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("combine", ["exact", "fast"])
@pytest.mark.parametrize(
    ("tokens_R", "busy_experts"),
    [
        pytest.param([3, 0], EXPERTS, id="a rank without tokens"),
        pytest.param([0, 0], EXPERTS, id="no tokens at all"),
        pytest.param([4, 6], 2, id="a rank that receives nothing"),
        pytest.param([0, 6], 2, id="one rank sends all to the other"),
    ],
)
def test_empty_ranks_take_part(two_ranks: Ranks, combine, tokens_R, busy_experts):
    in_order = placements(2)[0]
    answers = two_ranks.run(forward, combine, tokens_R, 2, torch.float32, in_order, busy_experts)
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
    answers = ranks_of[size].run(forward, "exact", tokens_R, top_k, torch.float32, in_order, top_k)
    assert [rows for _, _, rows, _ in answers] == [[6] + [0] * (size - 1)] * size
    assert [computed for *_, computed in answers] == [6 * size * top_k] + [0] * (size - 1)


def test_weighted_sum_adds_in_top_k_order_in_float32():
    outputs = torch.tensor([[[1e8], [1.0], [-1e8], [1.0]]])
    assert weighted_sum(outputs, torch.ones(1, 4)).tolist() == [[1.0]]
