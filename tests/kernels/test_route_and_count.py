"""Counting and routing against plain Python, and the kernel against its reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_rebalance.kernels.language import INTERPRETED, triton
from ep_rebalance.kernels.route_and_count import (
    LayerTables,
    _kernel,
    count_experts,
    count_torch,
    options,
    route_and_count,
    route_torch,
)
from ep_rebalance.kernels.shared_arithmetic import HASH_STEP, IGNORED
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.routing.thresholds import dispatch_thresholds
from ep_rebalance.topology import Topology

# (tokens, top_k, experts, redundant, ranks)
SHAPES = [
    (0, 2, 4, 0, 2),
    (1, 1, 4, 0, 2),
    (5, 2, 4, 2, 2),
    (17, 3, 9, 3, 4),
    (64, 8, 32, 8, 4),
    (300, 4, 16, 32, 16),
    (257, 1, 7, 7, 2),
    (1000, 6, 64, 0, 8),
]
DTYPES = [torch.int32, torch.int64]


def random_step(tokens, top_k, experts, redundant, ranks, dtype, seed=0, device="cpu"):
    """Top-k ids, phases, tables with random quotas, and an offset."""
    rng = np.random.default_rng(seed)
    placement = Placement.contiguous(
        num_layers=1, num_experts=experts, num_ranks=ranks, num_redundant=redundant
    )
    quotas_LP = split_quotas(placement, rng.exponential(size=(1, experts)) ** 3)
    slots, thresholds = dispatch_thresholds(
        placement,
        [0],
        quotas_LP,
        topology=Topology.single_node(ranks),
        rank=int(rng.integers(ranks)),
    )
    ids = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)]).reshape(tokens, top_k)
    tables = LayerTables(
        counts_AE=torch.zeros(3, experts, dtype=torch.int64, device=device),
        replica_slots_EC=torch.from_numpy(slots[0]).to(device),
        thresholds_EC=torch.from_numpy(thresholds[0]).to(device),
    )
    topk_ids_TK = torch.from_numpy(ids).to(device, dtype)
    phase_T = torch.from_numpy(rng.integers(0, 3, tokens)).to(device, torch.int8)
    offset = torch.tensor([int(rng.integers(1 << 40))], device=device)
    return topk_ids_TK, phase_T, tables, offset


def counts_by_hand(topk_ids_TK, phase_T, experts):
    counts = [[0] * experts for _ in range(3)]
    for ids, phase in zip(topk_ids_TK.tolist(), phase_T.tolist(), strict=True):
        for expert in ids:
            if 0 <= expert < experts:
                counts[phase][expert] += 1
    return counts


def slots_by_hand(topk_ids_TK, tables, offset):
    slots, thresholds = tables.replica_slots_EC.tolist(), tables.thresholds_EC.tolist()
    rows = []
    for token, ids in enumerate(topk_ids_TK.tolist()):
        hashed = (token * HASH_STEP + int(offset)) % 65536
        row = []
        for e in ids:
            if 0 <= e < len(slots):
                row.append(
                    next(s for s, t in zip(slots[e], thresholds[e], strict=True) if hashed < t)
                )
            else:
                row.append(min(e, -1))
        rows.append(row)
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_equal_counting_by_hand(shape, dtype):
    ids, phase_T, tables, _ = random_step(*shape, dtype)
    count_experts(ids, phase_T, tables.counts_AE)
    assert tables.counts_AE.tolist() == counts_by_hand(ids, phase_T, shape[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_slots_equal_reading_the_tables_by_hand(shape, dtype):
    ids, _, tables, offset = random_step(*shape, dtype)
    slots = route_torch(ids, tables, offset)
    assert slots.dtype == dtype
    assert slots.tolist() == slots_by_hand(ids, tables, offset)


def test_every_slot_holds_the_expert_that_was_asked_for():
    ids, _, tables, offset = random_step(300, 4, 16, 32, 16, torch.int64)
    slots_P = Placement.contiguous(
        num_layers=1, num_experts=16, num_ranks=16, num_redundant=32
    ).slots_LP[0]
    assert (slots_P[route_torch(ids, tables, offset).numpy()] == ids.numpy()).all()


def test_counts_are_added_to_those_before():
    ids, phase_T, tables, _ = random_step(5, 2, 4, 2, 2, torch.int64)
    count_experts(ids, phase_T, tables.counts_AE)
    once = tables.counts_AE.clone()
    count_experts(ids, phase_T, tables.counts_AE)
    assert torch.equal(tables.counts_AE, 2 * once)


def test_ignored_tokens_are_routed_but_not_counted():
    ids, _, tables, offset = random_step(17, 3, 9, 3, 4, torch.int64)
    slots = route_and_count(ids, torch.full((17,), IGNORED, dtype=torch.int8), tables, offset)
    assert not tables.counts_AE[:2].any()
    assert slots.tolist() == slots_by_hand(ids, tables, offset)


def one_expert_tables(thresholds: list[int]) -> LayerTables:
    return LayerTables(
        counts_AE=torch.zeros(3, 1, dtype=torch.int64),
        replica_slots_EC=torch.arange(len(thresholds), dtype=torch.int32).unsqueeze(0),
        thresholds_EC=torch.tensor([thresholds], dtype=torch.int32),
    )


@pytest.mark.parametrize(
    "thresholds", [[65536], [20000, 65536], [0, 65536], [1, 30000, 65536, 65536]]
)
def test_replicas_receive_just_their_quotas_of_every_hash(thresholds):
    tables = one_expert_tables(thresholds)
    ids = torch.zeros(65536, 1, dtype=torch.int64)
    received = torch.bincount(route_torch(ids, tables, torch.tensor([7])).flatten())
    quotas = np.diff([0, *thresholds])
    assert received.tolist() == quotas[: len(received)].tolist()
    assert not quotas[len(received) :].any()


@pytest.mark.parametrize("batch", [1, 8, 100])
def test_replicas_receive_about_their_quotas_in_a_few_steps_of_short_batches(batch):
    tables = one_expert_tables([16384, 40960, 65536])
    ids, received = torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    steps = 4000 // batch
    for step in range(steps):
        slots = route_torch(ids, tables, torch.tensor([20_011 * step]))
        received += torch.bincount(slots.flatten(), minlength=3)
    fractions = received / (batch * steps)
    assert torch.allclose(fractions, torch.tensor([0.25, 0.375, 0.375]), atol=0.01)


LARGE = (1100, 8, 60, 4, 4)
"""More pairs for each expert than HISTOGRAM_TOKENS."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
def test_kernel_and_reference_give_equal_bits(shape, dtype, device):
    check_same_bits(*random_step(*shape, dtype, seed=sum(shape), device=device))


@pytest.mark.parametrize("layout", ["by columns", "part of a wider tensor"])
def test_ids_that_are_not_contiguous(layout, device):
    ids, phase_T, tables, offset = random_step(64, 8, 32, 8, 4, torch.int32, device=device)
    wider = torch.cat([ids, ids], dim=1)
    ids = wider[:, :8] if layout == "part of a wider tensor" else ids.t().contiguous().t()
    assert not ids.is_contiguous()
    check_same_bits(ids, phase_T, tables, offset)


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 70),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 8),
    redundant=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_shape(tokens, experts, top_k, redundant, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (tokens, min(top_k, experts), experts, redundant, experts + redundant)
    check_same_bits(*random_step(*shape, torch.int32, seed, device))


def check_same_bits(ids, phase_T, tables, offset) -> None:
    expected_counts = tables.counts_AE.clone()
    count_torch(ids, phase_T, expected_counts)
    only_counted = tables.counts_AE.clone()
    count_experts(ids, phase_T, only_counted)
    slots = route_and_count(ids, phase_T, tables, offset)
    assert slots.dtype == ids.dtype
    assert torch.equal(slots, route_torch(ids, tables, offset))
    assert torch.equal(tables.counts_AE, expected_counts)
    assert torch.equal(only_counted, expected_counts)


def with_strays(ids):
    """Some rows as padding, and single ids that no router gives."""
    rng = np.random.default_rng(0)
    strays = ids.cpu().numpy().copy()
    strays[rng.random(len(strays)) < 0.3] = -1
    others = rng.random(strays.shape) < 0.1
    strays[others] = rng.choice([-7, -(2**31), 2**31 - 1, 1000, 60], others.sum())
    return torch.from_numpy(strays).to(ids.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
def test_padding_and_ids_out_of_range_are_neither_counted_nor_computed(shape, dtype, device):
    ids, phase_T, tables, offset = random_step(*shape, dtype, device=device)
    ids, tables = with_strays(ids), guarded(tables)
    slots = route_and_count(ids, phase_T, tables, offset)
    assert slots.tolist() == slots_by_hand(ids, tables, offset)
    assert tables.counts_AE.tolist() == counts_by_hand(ids, phase_T, shape[2])
    check_same_bits(ids, phase_T, tables, offset)


def guarded(tables: LayerTables) -> LayerTables:
    """The same tables between others, as layers lie in memory."""
    slots, thresholds = (
        torch.cat([torch.full_like(table, 12345), table, torch.full_like(table, 12345)])
        for table in (tables.replica_slots_EC, tables.thresholds_EC)
    )
    experts = len(tables.replica_slots_EC)
    inner = slice(experts, 2 * experts)
    return LayerTables(
        counts_AE=tables.counts_AE, replica_slots_EC=slots[inner], thresholds_EC=thresholds[inner]
    )


@pytest.mark.parametrize("shape", [(64, 8, 32, 8, 4), LARGE])
def test_tokens_without_a_phase_are_ignored(shape, device):
    ids, phase_T, tables, offset = random_step(*shape, torch.int32, device=device)
    slots = route_and_count(ids, phase_T[:40], tables, offset)
    phase_T[40:] = IGNORED
    assert tables.counts_AE.tolist() == counts_by_hand(ids, phase_T, shape[2])
    assert slots.tolist() == slots_by_hand(ids, tables, offset)
    check_same_bits(ids, phase_T[:40], tables, offset)


@pytest.mark.parametrize("replicas", [*range(1, 10), 31, 32, 33, 64])
def test_any_number_of_replicas(replicas, device):
    """Thresholds anywhere, some equal: every hash finds the first replica whose threshold is above."""
    rng = np.random.default_rng(replicas)
    thresholds = np.sort(rng.integers(0, 65537, (5, replicas)), axis=1)
    thresholds[0] = 65536
    thresholds[1, : replicas // 2] = 0
    thresholds[:, -1] = 65536
    slots = rng.permutation(5 * replicas).reshape(5, replicas)
    tables = LayerTables(
        counts_AE=torch.zeros(3, 5, dtype=torch.int64, device=device),
        replica_slots_EC=torch.from_numpy(slots).to(device, torch.int32),
        thresholds_EC=torch.from_numpy(thresholds).to(device, torch.int32),
    )
    ids = torch.from_numpy(rng.integers(0, 5, (700, 2))).to(device, torch.int32)
    phase_T = torch.zeros(700, dtype=torch.int8, device=device)
    offset = torch.tensor([3], device=device)
    slots = route_and_count(ids, phase_T, tables, offset)
    assert slots.tolist() == slots_by_hand(ids, tables, offset)
    check_same_bits(ids, phase_T, tables, offset)


def test_no_size_and_no_alignment_has_a_kernel_of_its_own():
    """One that is compiled in a live step makes all ranks wait."""
    if triton is None or INTERPRETED:
        pytest.skip("nothing is compiled")
    variable = [parameter for parameter in _kernel.params if not parameter.is_constexpr]
    sizes = {each.name for each in variable if each.do_not_specialize}
    pointers = {each.name for each in variable if each.do_not_specialize_on_alignment}
    assert sizes | pointers == {each.name for each in variable}
    assert pointers == {name for name in _kernel.arg_names if name.endswith("_ptr")}
    assert len({tuple(options(pairs, 256).items()) for pairs in range(1, 70000, 13)}) == 2


@pytest.mark.gpu
def test_triton_kernel_runs_in_a_cuda_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ids, phase_T, tables, offset = random_step(64, 8, 32, 8, 4, torch.int32, device="cuda")
    route_and_count(ids, phase_T, tables, offset)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = route_and_count(ids, phase_T, tables, offset)
    tables.counts_AE.zero_()
    offset += 20_011
    graph.replay()
    assert torch.equal(slots, route_torch(ids, tables, offset))
    assert int(tables.counts_AE.sum()) == ids.numel()
