"""The kernels as operations of `torch.library`, so that torch.compile passes through them.

Imported with the package; the public functions call these while they are compiled, and else their
kernels directly. `torch.ops.ep_rebalance.*`.
"""

from __future__ import annotations

import torch

from ep_rebalance.kernels import group_tokens as grouping
from ep_rebalance.kernels import grouped_mlp as mlp
from ep_rebalance.kernels import quantize_rows as quantizing
from ep_rebalance.kernels import route_and_count as routing
from ep_rebalance.kernels import weighted_sum as summing
from ep_rebalance.kernels.tiles import MlpTiles


@torch.library.custom_op("ep_rebalance::route_and_count", mutates_args=("counts_AE",))
def route_and_count(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    counts_AE: torch.Tensor,
    replica_slots_EC: torch.Tensor,
    thresholds_EC: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    """As `route_and_count.route_and_count`, with the tables one by one."""
    tables = routing.LayerTables(
        counts_AE=counts_AE, replica_slots_EC=replica_slots_EC, thresholds_EC=thresholds_EC
    )
    return routing.route_and_count(topk_ids_TK, phase_T, tables, offset)


@route_and_count.register_fake
def _(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    counts_AE: torch.Tensor,
    replica_slots_EC: torch.Tensor,
    thresholds_EC: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    return torch.empty_like(topk_ids_TK, memory_format=torch.contiguous_format)


@torch.library.custom_op("ep_rebalance::group_tokens", mutates_args=())
def group_tokens(
    slots_N: torch.Tensor, num_slots: int, block_rows: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `group_tokens.group_tokens`: pair_of_row, slot_of_block, num_blocks."""
    groups = grouping.group_tokens(
        slots_N, num_slots=num_slots, block_rows=block_rows, first_slot=first_slot
    )
    return groups.pair_of_row, groups.slot_of_block, groups.num_blocks


@group_tokens.register_fake
def _(
    slots_N: torch.Tensor, num_slots: int, block_rows: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = grouping.max_blocks(slots_N.numel(), num_slots, block_rows)
    sizes = (blocks * block_rows, blocks, 1)
    pair_of_row, slot_of_block, num_blocks = (
        slots_N.new_empty(size, dtype=torch.int32) for size in sizes
    )
    return pair_of_row, slot_of_block, num_blocks


@torch.library.custom_op("ep_rebalance::quantize_rows", mutates_args=())
def quantize_rows(rows_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_rows.quantize_rows`."""
    return quantizing.quantize_rows(rows_MH)


@quantize_rows.register_fake
def _(rows_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = rows_MH.shape
    return (
        rows_MH.new_empty(rows_MH.shape, dtype=torch.float8_e4m3fn),
        rows_MH.new_empty(rows, columns // quantizing.GROUP, dtype=torch.float32),
    )


@torch.library.custom_op("ep_rebalance::weighted_sum", mutates_args=())
def weighted_sum(
    outputs_NH: torch.Tensor, position_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """As `weighted_sum.weighted_sum`."""
    return summing.weighted_sum(outputs_NH, position_TK, weights_TK)


@weighted_sum.register_fake
def _(
    outputs_NH: torch.Tensor, position_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    return outputs_NH.new_empty(len(position_TK), outputs_NH.shape[1], dtype=torch.float32)


@torch.library.custom_op("ep_rebalance::grouped_mlp", mutates_args=("out_NH",))
def grouped_mlp(
    rows_MH: torch.Tensor,
    row_scales: torch.Tensor | None,
    pair_of_row: torch.Tensor,
    slot_of_block: torch.Tensor,
    num_blocks: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_up_scales: torch.Tensor | None,
    down_scales: torch.Tensor | None,
    pair_weights_N: torch.Tensor | None,
    out_NH: torch.Tensor,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    pairs_per_row: int,
    tiles: list[int],
) -> None:
    """As `grouped_mlp.grouped_mlp`, with everything one by one; tiles: as of `MlpTiles.numbers`."""
    chosen = MlpTiles.of_numbers(tiles)
    mlp.grouped_mlp(
        rows_MH,
        grouping.groups_of(
            pair_of_row,
            slot_of_block,
            num_blocks,
            block_rows=chosen.rows,
            num_pairs=len(out_NH),
        ),
        mlp.ExpertWeights(
            gate_up=gate_up,
            down=down,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            gate_up_scales=gate_up_scales,
            down_scales=down_scales,
        ),
        mlp.Activation(
            name=mlp.activation_name(activation), interleaved=interleaved, alpha=alpha, limit=limit
        ),
        out_NH,
        tiles=chosen,
        pairs_per_row=pairs_per_row,
        row_scales=row_scales,
        pair_weights_N=pair_weights_N,
    )


@grouped_mlp.register_fake
def _(*_: object) -> None:
    return None
