"""torch.compile passes through the kernels, and their fake forms say what the real ones give."""

import torch
from test_grouped_mlp import random_rows, random_weights, small_tiles
from test_route_and_count import random_step

from ep_rebalance.kernels.activation import Activation
from ep_rebalance.kernels.group_tokens import group_tokens
from ep_rebalance.kernels.grouped_mlp import grouped_mlp
from ep_rebalance.kernels.quantize_rows import quantize_rows
from ep_rebalance.kernels.route_and_count import LayerTables, route_and_count
from ep_rebalance.kernels.weighted_sum import weighted_sum

OPS = torch.ops.ep_rebalance
CHECKS = ("test_schema", "test_faketensor")


def test_fake_and_real_forms_agree(device):
    ids, phase_T, tables, offset = random_step(17, 3, 9, 3, 4, torch.int32, device=device)
    parts = (tables.counts_AE, tables.replica_slots_EC, tables.thresholds_EC)
    torch.library.opcheck(
        OPS.route_and_count.default, (ids, phase_T, *parts, offset), test_utils=CHECKS
    )
    torch.library.opcheck(OPS.group_tokens.default, (ids, 12, 16, 0), test_utils=CHECKS)
    rows = random_rows(9, 256, torch.bfloat16, device)
    torch.library.opcheck(OPS.quantize_rows.default, (rows,), test_utils=CHECKS)
    torch.library.opcheck(
        OPS.weighted_sum.default,
        (rows, torch.arange(8, device=device).view(4, 2), torch.ones(4, 2, device=device)),
        test_utils=CHECKS,
    )


def layer(hidden, ids, phase_T, tables, offset, weights, gates):
    """All of a layer's operations, one after another."""
    slots = route_and_count(ids, phase_T, tables, offset)
    groups = group_tokens(slots, num_slots=len(weights.gate_up), block_rows=16)
    out = torch.zeros(ids.numel(), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    top_k = ids.shape[1]
    grouped_mlp(
        hidden, groups, weights, Activation(), out, tiles=small_tiles(), pairs_per_row=top_k
    )
    position = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    return weighted_sum(out, position, gates), quantize_rows(hidden)


def test_a_compiled_layer_gives_the_same_without_a_break(device):
    ids, phase_T, tables, offset = random_step(11, 2, 6, 0, 2, torch.int32, device=device)
    weights = random_weights(6, 128, 16, torch.float32, device)
    hidden = random_rows(11, 128, torch.float32, device)
    gates = torch.rand(11, 2, device=device)
    counted = LayerTables(
        counts_AE=torch.zeros_like(tables.counts_AE),
        replica_slots_EC=tables.replica_slots_EC,
        thresholds_EC=tables.thresholds_EC,
    )
    expected, (quantized, scales) = layer(hidden, ids, phase_T, tables, offset, weights, gates)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    total, (compiled_quantized, compiled_scales) = compiled(
        hidden, ids, phase_T, counted, offset, weights, gates
    )
    assert torch.equal(total, expected)
    assert torch.equal(compiled_quantized.float(), quantized.float())
    assert torch.equal(compiled_scales, scales)
    assert torch.equal(counted.counts_AE, tables.counts_AE)
    assert int(counted.counts_AE.sum()) == ids.numel()
