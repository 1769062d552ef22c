"""Steps whose tokens go to experts, and what must come back."""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ep_rebalance.all_to_all import AllToAll, NodeGroups, make_all_to_all
from ep_rebalance.config_sources import load_config
from ep_rebalance.exchanges import EXCHANGES
from ep_rebalance.kernels.weighted_sum import weighted_sum_torch

EXPERTS, HIDDEN = 12, 24


CAPACITIES = {
    "room for all": 100.0,
    "room for most": 0.8,
    "room for few": 0.3,
    "room for one": 0.01,
}

WAYS = {
    "exact splits": {"buffers": "exact"},
    **{way: {"buffers": "fixed", "capacity_factor": factor} for way, factor in CAPACITIES.items()},
    **{name: {"buffers": name} for name in EXCHANGES if name not in ("exact", "fixed")},
}
"""To send tokens, by name, with the settings of `data_plane`: those of every entry."""


@dataclass(frozen=True)
class Step:
    """One forward step of one rank: tokens, their experts and weights, and the slots that were
    chosen, -1 for pairs that are padding.
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
        real = [k for k, slot in enumerate(step.slots_TK[token].tolist()) if slot >= 0]
        if real:
            out_TH[token] = weighted_sum_torch(
                torch.stack([compute_expert(ids[k], step.hidden_TH[token]) for k in real]),
                torch.arange(len(real)).unsqueeze(0),
                step.weights_TK[token : token + 1, real],
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


@functools.cache
def node_groups(ranks_per_node: int) -> NodeGroups:
    return NodeGroups.create(dist.group.WORLD, ranks_per_node)


def make(way: str, combine: str, slots_per_rank: int, payload: str = "full") -> AllToAll:
    """way: of WAYS, or `nodes of N`."""
    nodes = None if way in WAYS else node_groups(int(way.split()[-1]))
    plane = WAYS.get(way, {"buffers": "exact", "group_by_node": True})
    config = load_config(
        {"data_plane": {**plane, "payload": payload}, "dispatch": {"combine": combine}}
    )
    return make_all_to_all(
        config, group=dist.group.WORLD, slots_per_rank=slots_per_rank, nodes=nodes
    )


def through_experts(rank, way, combine, step: Step, experts_of_rank):
    """See `forward`. Outputs of pairs that are none are poisoned."""
    local = experts_of_rank[rank]
    all_to_all = make(way, combine, len(local))
    sent = all_to_all.dispatch(step.hidden_TH, step.slots_TK, step.weights_TK)
    shape = (len(sent.local_slots_N), HIDDEN)
    outputs = torch.full(shape, torch.nan, dtype=step.hidden_TH.dtype)
    for n, slot in enumerate(sent.local_slots_N.tolist()):
        if slot >= 0:
            outputs[n] = compute_expert(local[slot], sent.rows_MH[n // sent.pairs_per_row])
    out_TH = torch.full_like(step.hidden_TH, torch.nan)
    all_to_all.combine(sent, outputs, out_TH)
    expected_rows = [
        len({token for token, row in enumerate(step.slots_TK.tolist()) for slot in row
             if slot // len(local) == peer})
        for peer in range(len(experts_of_rank))
    ]  # fmt: skip
    if way == "exact splits":
        assert sent.handle[0].sent_R == expected_rows
    return out_TH, reference(step), expected_rows, int((sent.local_slots_N >= 0).sum())
