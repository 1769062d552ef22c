"""Counting and routing on the device, as the engine drives them: padding, graphs, tables that change."""

import numpy as np
import pytest
import torch
from devices import Graph, keep_busy, waits_refused

from ep_rebalance.kernels.shared_arithmetic import DECODE, PREFILL
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

LAYERS, EXPERTS, REDUNDANT, RANKS, RANK = 2, 16, 8, 4, 1
TOKENS, TOP_K, PADDED = 40, 4, 7
SOURCE = Placement.contiguous(
    num_layers=LAYERS, num_experts=EXPERTS, num_ranks=RANKS, num_redundant=REDUNDANT
)
TARGET = Placement(SOURCE.slots_LP[:, ::-1].copy(), EXPERTS, RANKS)
PHASES_T = np.arange(TOKENS) % 3 // 2


def counts_on(device: torch.device, placement: Placement = SOURCE) -> RoutingTables:
    counts = RoutingTables(
        placement=placement,
        max_tokens=TOKENS + PADDED,
        device=device,
        topology=Topology.single_node(RANKS),
        rank=RANK,
    )
    counts.set_dispatch(range(LAYERS), placement, placement.even_quotas_LP())
    return counts


def topk_ids(seed: int = 0) -> torch.Tensor:
    """int32 [TOKENS + PADDED, K]; the last rows are padding."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]
    ids = torch.full((TOKENS + PADDED, TOP_K), -1, dtype=torch.int32)
    ids[:TOKENS] = torch.from_numpy(np.array(rows))
    return ids


def counted_by_hand(ids: torch.Tensor, phase: int) -> list[int]:
    tokens = [row for row, of in zip(ids.tolist(), PHASES_T, strict=False) if of == phase]
    return [sum(row.count(expert) for row in tokens) for expert in range(EXPERTS)]


def assert_routed(slots: torch.Tensor, ids: torch.Tensor, placement: Placement) -> None:
    """Padding is handed on, every other id leads to a slot that holds its expert."""
    slots = slots.cpu()
    assert (slots[TOKENS:] == -1).all()
    served = placement.slots_LP[0][slots[:TOKENS].numpy()]
    assert (served == ids[:TOKENS].numpy()).all()


def test_padded_rows_are_handed_on_and_not_counted(device):
    counts, ids = counts_on(device), topk_ids()
    counts.mark_tokens(PHASES_T)
    slots = counts.route(0, ids.to(device), 0)
    assert_routed(slots, ids, SOURCE)
    for phase in (PREFILL, DECODE):
        assert counts.counts_LAE[0, phase].tolist() == counted_by_hand(ids, phase)
    assert not counts.counts_LAE[1].any()


def test_a_step_of_padding_alone_counts_nothing(device):
    counts = counts_on(device)
    idle = torch.full((PADDED, TOP_K), -1, dtype=torch.int32, device=device)
    slots = counts.route(0, idle, 0)
    assert (slots == -1).all()
    assert not counts.counts_LAE[:, :2].any()


def test_a_graph_routes_by_the_tables_of_the_moment(device):
    """Ids, phases and tables change in place between replays, as engine and balancer change them."""
    counts, ids = counts_on(device), topk_ids()
    ids_on_device = ids.to(device)
    graph = Graph(lambda: counts.route(0, ids_on_device, 0), device)
    for seed, placement in enumerate((SOURCE, TARGET, SOURCE, TARGET)):
        counts.counts_LAE.zero_()
        ids = topk_ids(seed)
        ids_on_device.copy_(ids)
        counts.set_dispatch([0], placement, placement.even_quotas_LP())
        counts.mark_tokens(PHASES_T)
        assert_routed(graph.replay(), ids, placement)
        counts.end_step()
        for phase in (PREFILL, DECODE):
            assert counts.counts_LAE[0, phase].tolist() == counted_by_hand(ids, phase)


@pytest.mark.parametrize("hot", [0, 5])
def test_a_graph_splits_by_the_quotas_of_the_moment(device, hot):
    counts, ids = counts_on(device), topk_ids().to(device)
    graph = Graph(lambda: counts.route(0, ids, 0), device)
    load_LE = np.ones((LAYERS, EXPERTS))
    load_LE[:, hot] = 50.0
    quotas_LP = split_quotas(SOURCE, load_LE)
    counts.split(counts.dispatch_tables(SOURCE, quotas_LP))
    fresh = counts_on(device)
    fresh.set_dispatch(range(LAYERS), SOURCE, quotas_LP)
    assert torch.equal(graph.replay(), fresh.route(0, ids, 0))


def test_steps_that_run_ahead_of_the_device_count_their_own_tokens(device):
    """The host prepares many steps while the device is busy: no phase of a later step reaches an
    earlier one, no commit either.
    """
    steps, expected = 12, np.zeros((2, EXPERTS), dtype=np.int64)
    counts, batches = counts_on(device), [topk_ids(seed) for seed in range(12)]
    on_device = [ids.to(device) for ids in batches]
    routed = torch.zeros(steps, *batches[0].shape, dtype=torch.int32, device=device)
    placements = [SOURCE, TARGET] * (steps // 2)
    tables = [counts.dispatch_tables(p, p.even_quotas_LP()) for p in placements]
    counts.mark_tokens(PHASES_T)
    counts.route(0, on_device[0], 0)
    counts.counts_LAE.zero_()
    keep_busy(device)
    with waits_refused(device):
        for step in range(steps):
            marked = TOKENS - 3 * step
            counts.serve([0], tables[step])
            counts.mark_tokens(PHASES_T[:marked])
            routed[step].copy_(counts.route(0, on_device[step], 0))
            counts.end_step()
    for step, ids in enumerate(batches):
        assert_routed(routed[step], ids, placements[step])
        marked = ids[: TOKENS - 3 * step]
        expected += [counted_by_hand(marked, phase) for phase in (PREFILL, DECODE)]
    assert (counts.counts_LAE[0, :2].cpu().numpy() == expected).all()
