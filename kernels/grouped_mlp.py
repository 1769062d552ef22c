"""The experts of one rank: gate and up, activation, down, over groups of very different sizes.

    between = act(x gate^T + bias) * (x up^T + bias)
    result = (between down^T + bias) * weight of the pair

Each line is one persistent launch. Tiles are numbered over the blocks of all groups together, and
program `i` of `n` takes tiles i, i + n, i + 2 n ..., so that an expert with half of the tokens is spread
over the GPU like any other load. The result of a row does not depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_rebalance.kernels.activation import (
    Activation,
    activate,
    activate_tile,
    activation_name,
)
from ep_rebalance.kernels.group_tokens import Groups, groups_of
from ep_rebalance.kernels.language import (
    INTERPRETED,
    as_stored,
    jit,
    multiply,
    processors,
    runs_triton,
    tl,
    triton,
)
from ep_rebalance.kernels.quantize_rows import (
    GROUP,
    LARGEST,
    SMALLEST_SCALE,
    dequantize_rows,
    quantize_group,
    quantize_rows_torch,
)
from ep_rebalance.kernels.tiles import MlpTiles, Tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The weights of all slots of a rank, as vLLM lays them out.

    gate_up: [S, 2 I, H].
    down: [S, H, I].
    gate_up_bias: [S, 2 I].
    down_bias: [S, H].
    gate_up_scales: float32 [S, 2 I / 128, H / 128]. If the weights are 8-bit floats.
    down_scales: float32 [S, H / 128, I / 128]. If the weights are 8-bit floats.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None

    @property
    def intermediate(self) -> int:
        """I, the rows of gate and of up."""
        return int(self.down.shape[2])

    @property
    def fp8(self) -> bool:
        """Whether the weights are 8-bit floats with scales."""
        return self.gate_up_scales is not None


def grouped_mlp(
    rows_MH: torch.Tensor,
    groups: Groups,
    weights: ExpertWeights,
    activation: Activation,
    out_NH: torch.Tensor,
    *,
    tiles: MlpTiles,
    pairs_per_row: int = 1,
    row_scales: torch.Tensor | None = None,
    pair_weights_N: torch.Tensor | None = None,
) -> None:
    """Write the result of each grouped pair to its row of `out_NH`; other rows stay as they are.

    rows_MH: [M, H]. Pair `n` computes row `n // pairs_per_row`.
    out_NH: [N, H], contiguous.
    row_scales: float32 [M, H / 128]. The scales of 8-bit rows, see `quantize_rows`.
    pair_weights_N: float32 [N]. Factors of the results.

    Sums are float32. The values between the halves have the dtype of `rows_MH`.

    Raises ValueError if groups and tiles, or the shapes of tensors, do not match.
    """
    _check(rows_MH, groups, weights, out_NH, tiles, pairs_per_row, row_scales)
    if torch.compiler.is_compiling():
        _operation(
            rows_MH,
            row_scales,
            groups.pair_of_row,
            groups.slot_of_block,
            groups.num_blocks,
            weights.gate_up,
            weights.down,
            weights.gate_up_bias,
            weights.down_bias,
            weights.gate_up_scales,
            weights.down_scales,
            pair_weights_N,
            out_NH,
            activation.name,
            activation.interleaved,
            activation.alpha,
            activation.limit,
            pairs_per_row,
            tiles.numbers,
        )
        return
    run = _launch if runs_triton(rows_MH) else grouped_mlp_torch
    run(
        rows_MH,
        groups,
        weights,
        activation,
        out_NH,
        tiles=tiles,
        pairs_per_row=pairs_per_row,
        row_scales=row_scales,
        pair_weights_N=pair_weights_N,
    )


def _check(
    rows_MH: torch.Tensor,
    groups: Groups,
    weights: ExpertWeights,
    out_NH: torch.Tensor,
    tiles: MlpTiles,
    pairs_per_row: int,
    row_scales: torch.Tensor | None,
) -> None:
    slots, hidden, intermediate = weights.down.shape
    if weights.gate_up.shape != (slots, 2 * intermediate, hidden):
        raise ValueError(
            f"gate_up {tuple(weights.gate_up.shape)} does not fit down {tuple(weights.down.shape)}"
        )
    if groups.num_pairs != len(rows_MH) * pairs_per_row or rows_MH.shape[1] != hidden:
        raise ValueError(
            f"rows {tuple(rows_MH.shape)} of {pairs_per_row} pairs are not {groups.num_pairs} pairs of "
            f"{hidden} columns"
        )
    if out_NH.shape != (groups.num_pairs, hidden) or not out_NH.is_contiguous():
        raise ValueError(f"the output is {tuple(out_NH.shape)}, or is not contiguous")
    if {tiles.gate_up.rows, tiles.down.rows} != {groups.block_rows}:
        raise ValueError(
            f"blocks of {groups.block_rows} rows, but tiles of {tiles.gate_up.rows} and {tiles.down.rows}"
        )
    if weights.fp8 and (hidden % GROUP or intermediate % GROUP or row_scales is None):
        raise ValueError(
            f"8-bit weights need scaled rows and sizes that divide by {GROUP}, not {hidden} and "
            f"{intermediate}"
        )
    depths = (tiles.gate_up.depth, tiles.down.depth)
    if weights.fp8 and (tiles.gate_up.columns != GROUP or any(GROUP % depth for depth in depths)):
        raise ValueError(
            f"8-bit weights need tiles of {GROUP} columns in the first half, and depths that divide "
            f"{GROUP}: a scale is of so many; not {tiles.gate_up.columns}, {depths[0]} and {depths[1]}"
        )


def grouped_mlp_torch(
    rows_MH: torch.Tensor,
    groups: Groups,
    weights: ExpertWeights,
    activation: Activation,
    out_NH: torch.Tensor,
    *,
    tiles: MlpTiles,
    pairs_per_row: int = 1,
    row_scales: torch.Tensor | None = None,
    pair_weights_N: torch.Tensor | None = None,
) -> None:
    """The reference for `grouped_mlp`."""
    if row_scales is not None:
        rows_MH = dequantize_rows(rows_MH, row_scales, torch.float32)
    blocks = int(groups.num_blocks)
    pairs_BR = groups.pair_of_row.view(-1, groups.block_rows)[:blocks].long()
    slots_B = groups.slot_of_block[:blocks]
    for slot in slots_B.unique().tolist():
        pairs = pairs_BR[slots_B == slot].flatten()
        pairs = pairs[pairs < groups.num_pairs]
        result = _expert(rows_MH[pairs // pairs_per_row], weights, slot, activation)
        if pair_weights_N is not None:
            result = result * pair_weights_N[pairs].unsqueeze(1)
        out_NH[pairs] = result.to(out_NH.dtype)


def _expert(
    rows: torch.Tensor, weights: ExpertWeights, slot: int, activation: Activation
) -> torch.Tensor:
    first = rows.float() @ _weight(weights.gate_up, weights.gate_up_scales, slot).t()
    if weights.gate_up_bias is not None:
        first = first + weights.gate_up_bias[slot].float()
    between = activate(first, activation)
    if weights.fp8:
        between = dequantize_rows(*quantize_rows_torch(between), torch.float32)
    else:
        between = between.to(rows.dtype).float()
    second = between @ _weight(weights.down, weights.down_scales, slot).t()
    return second if weights.down_bias is None else second + weights.down_bias[slot].float()


def _weight(weight: torch.Tensor, scales: torch.Tensor | None, slot: int) -> torch.Tensor:
    if scales is None:
        return weight[slot].float()
    spread = scales[slot].repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    return weight[slot].float() * spread


@torch.library.custom_op("ep_rebalance::grouped_mlp", mutates_args=("out_NH",))
def _operation(
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
    """`grouped_mlp` for torch.compile, with all fields one by one; tiles: see `MlpTiles.numbers`."""
    chosen = MlpTiles.of_numbers(tiles)
    grouped_mlp(
        rows_MH,
        groups_of(
            pair_of_row,
            slot_of_block,
            num_blocks,
            block_rows=chosen.rows,
            num_pairs=len(out_NH),
        ),
        ExpertWeights(
            gate_up=gate_up,
            down=down,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            gate_up_scales=gate_up_scales,
            down_scales=down_scales,
        ),
        Activation(
            name=activation_name(activation), interleaved=interleaved, alpha=alpha, limit=limit
        ),
        out_NH,
        tiles=chosen,
        pairs_per_row=pairs_per_row,
        row_scales=row_scales,
        pair_weights_N=pair_weights_N,
    )


@_operation.register_fake
def _(*_: object) -> None:
    return None


@jit
def _place(tile, num_blocks, column_tiles, TOGETHER: tl.constexpr):
    """(block, column tile) of a tile.

    Tiles go through TOGETHER column tiles of the first block, then of the next one, and after the last
    block start over with the next column tiles. The last of these groups may have fewer columns.
    """
    per_group = num_blocks * TOGETHER
    group = tile // per_group
    width = tl.minimum(TOGETHER, column_tiles - group * TOGETHER)
    within = tile - group * per_group
    return within // width, group * TOGETHER + within % width


@jit
def _gate_up_kernel(
    rows_ptr,
    row_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    between_ptr,
    between_scales_ptr,
    pair_of_row_ptr,
    slot_of_block_ptr,
    num_blocks_ptr,
    num_pairs,
    pairs_per_row,
    hidden,
    intermediate,
    NAME: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    num_blocks = tl.load(num_blocks_ptr)
    column_tiles = tl.cdiv(intermediate, COLUMNS)
    for tile in tl.range(tl.program_id(0), num_blocks * column_tiles, tl.num_programs(0)):
        block, column_tile = _place(tile, num_blocks, column_tiles, TOGETHER)
        pair = tl.load(pair_of_row_ptr + block * ROWS + tl.arange(0, ROWS))
        slot = tl.load(slot_of_block_ptr + block).to(tl.int64)
        used = pair < num_pairs
        row = (pair // pairs_per_row).to(tl.int64)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < intermediate
        if INTERLEAVED:
            gate_row, up_row = 2 * column, 2 * column + 1
        else:
            gate_row, up_row = column, column + intermediate

        depth = tl.arange(0, DEPTH)
        row_ptrs = rows_ptr + row[:, None] * hidden + depth[None, :]
        weight_ptrs = weight_ptr + slot * 2 * intermediate * hidden + depth[:, None]
        gate_ptrs = weight_ptrs + gate_row[None, :] * hidden
        up_ptrs = weight_ptrs + up_row[None, :] * hidden
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        # gate = sum_k x[:, k] gate[:, k]^T, and up alike. In 8-bit floats each product over the DEPTH
        # elements of a scale is multiplied by the scales of both sides.
        for k in range(0, hidden, DEPTH):
            in_k = k + depth < hidden
            x = tl.load(row_ptrs + k, mask=used[:, None] & in_k[None, :], other=0.0)
            w_gate = tl.load(gate_ptrs + k, mask=in_k[:, None] & inside[None, :], other=0.0)
            w_up = tl.load(up_ptrs + k, mask=in_k[:, None] & inside[None, :], other=0.0)
            if FP8:
                groups = hidden // GROUP
                scales_ptr = weight_scales_ptr + slot * (2 * intermediate // GROUP) * groups
                x_scale = tl.load(row_scales_ptr + row * groups + k // GROUP, mask=used, other=0.0)
                gate_scale = tl.load(
                    scales_ptr + gate_row // GROUP * groups + k // GROUP, mask=inside, other=0.0
                )
                up_scale = tl.load(
                    scales_ptr + up_row // GROUP * groups + k // GROUP, mask=inside, other=0.0
                )
                gate += tl.dot(x, w_gate) * (x_scale[:, None] * gate_scale[None, :])
                up += tl.dot(x, w_up) * (x_scale[:, None] * up_scale[None, :])
            else:
                gate = multiply(x, w_gate, gate, INTERPRETED)
                up = multiply(x, w_up, up, INTERPRETED)
        if HAS_BIAS:
            bias_row = bias_ptr + slot * 2 * intermediate
            gate += tl.load(bias_row + gate_row, mask=inside, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_row + up_row, mask=inside, other=0.0).to(tl.float32)[None, :]

        between = activate_tile(gate, up, ALPHA, LIMIT, NAME)
        place = pair.to(tl.int64)[:, None] * intermediate + column[None, :]
        keep = used[:, None] & inside[None, :]
        if FP8:
            # COLUMNS is GROUP here, so that the tile has one scale in each row.
            quantized, scale = quantize_group(between, LARGEST, SMALLEST_SCALE, INTERPRETED)
            tl.store(between_ptr + place, quantized, mask=keep)
            scale_place = pair.to(tl.int64) * (intermediate // GROUP) + column_tile
            tl.store(between_scales_ptr + scale_place, scale, mask=used)
        else:
            stored = as_stored(between, between_ptr, INTERPRETED)
            tl.store(between_ptr + place, stored, mask=keep)


@jit
def _down_kernel(
    between_ptr,
    between_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    pair_weights_ptr,
    out_ptr,
    pair_of_row_ptr,
    slot_of_block_ptr,
    num_blocks_ptr,
    num_pairs,
    hidden,
    intermediate,
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    num_blocks = tl.load(num_blocks_ptr)
    column_tiles = tl.cdiv(hidden, COLUMNS)
    for tile in tl.range(tl.program_id(0), num_blocks * column_tiles, tl.num_programs(0)):
        block, column_tile = _place(tile, num_blocks, column_tiles, TOGETHER)
        pair = tl.load(pair_of_row_ptr + block * ROWS + tl.arange(0, ROWS))
        slot = tl.load(slot_of_block_ptr + block).to(tl.int64)
        used = pair < num_pairs
        row = pair.to(tl.int64)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < hidden

        depth = tl.arange(0, DEPTH)
        row_ptrs = between_ptr + row[:, None] * intermediate + depth[None, :]
        weight_ptrs = weight_ptr + slot * hidden * intermediate + depth[:, None]
        weight_ptrs += column[None, :] * intermediate
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        # total = sum_k between[:, k] down[:, k]^T, with scales as in `_gate_up_kernel`
        for k in range(0, intermediate, DEPTH):
            in_k = k + depth < intermediate
            x = tl.load(row_ptrs + k, mask=used[:, None] & in_k[None, :], other=0.0)
            w = tl.load(weight_ptrs + k, mask=in_k[:, None] & inside[None, :], other=0.0)
            if FP8:
                groups = intermediate // GROUP
                scales_ptr = weight_scales_ptr + slot * (hidden // GROUP) * groups
                x_scale = tl.load(
                    between_scales_ptr + row * groups + k // GROUP, mask=used, other=0.0
                )
                w_scale = tl.load(
                    scales_ptr + column // GROUP * groups + k // GROUP, mask=inside, other=0.0
                )
                total += tl.dot(x, w) * (x_scale[:, None] * w_scale[None, :])
            else:
                total = multiply(x, w, total, INTERPRETED)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + slot * hidden + column, mask=inside, other=0.0)
            total += bias.to(tl.float32)[None, :]
        if HAS_WEIGHTS:
            total *= tl.load(pair_weights_ptr + pair, mask=used, other=0.0)[:, None]
        place = row[:, None] * hidden + column[None, :]
        stored = as_stored(total, out_ptr, INTERPRETED)
        tl.store(out_ptr + place, stored, mask=used[:, None] & inside[None, :])


def _launch(
    rows_MH: torch.Tensor,
    groups: Groups,
    weights: ExpertWeights,
    activation: Activation,
    out_NH: torch.Tensor,
    *,
    tiles: MlpTiles,
    pairs_per_row: int = 1,
    row_scales: torch.Tensor | None = None,
    pair_weights_N: torch.Tensor | None = None,
) -> None:
    if not groups.num_pairs:
        return
    hidden, intermediate = rows_MH.shape[1], weights.intermediate
    between = rows_MH.new_empty(groups.num_pairs, intermediate)
    between_scales = None
    if weights.fp8:
        shape = (groups.num_pairs, intermediate // GROUP)
        between_scales = rows_MH.new_empty(shape, dtype=torch.float32)
    routing = (groups.pair_of_row, groups.slot_of_block, groups.num_blocks, groups.num_pairs)
    _gate_up_kernel[_grid(rows_MH, tiles.gate_up, groups, intermediate)](
        rows_MH.contiguous(),
        row_scales,
        weights.gate_up,
        weights.gate_up_scales,
        weights.gate_up_bias,
        between,
        between_scales,
        *routing,
        pairs_per_row,
        hidden,
        intermediate,
        NAME=activation.name,
        INTERLEAVED=activation.interleaved,
        ALPHA=activation.alpha,
        LIMIT=activation.limit,
        FP8=weights.fp8,
        HAS_BIAS=weights.gate_up_bias is not None,
        GROUP=GROUP,
        LARGEST=LARGEST,
        SMALLEST_SCALE=SMALLEST_SCALE,
        **options(tiles.gate_up),
    )
    _down_kernel[_grid(rows_MH, tiles.down, groups, hidden)](
        between,
        between_scales,
        weights.down,
        weights.down_scales,
        weights.down_bias,
        pair_weights_N,
        out_NH,
        *routing,
        hidden,
        intermediate,
        FP8=weights.fp8,
        HAS_BIAS=weights.down_bias is not None,
        HAS_WEIGHTS=pair_weights_N is not None,
        GROUP=GROUP,
        **options(tiles.down),
    )


def options(tiles: Tiles) -> dict[str, int]:
    """The options of a launch under Triton's names."""
    return {
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "TOGETHER": tiles.columns_together,
        "INTERPRETED": INTERPRETED,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _grid(rows_MH: torch.Tensor, tiles: Tiles, groups: Groups, columns: int) -> tuple[int]:
    """As many programs as run at the same time, or as there are tiles if these are fewer."""
    most = len(groups.slot_of_block) * triton.cdiv(columns, tiles.columns)
    return (max(1, min(most, tiles.programs * processors(rows_MH.device))),)
