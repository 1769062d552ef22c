"""The experts' results against float64, for every activation, type, size and way of grouping."""

import math

import pytest
import torch

from ep_rebalance.kernels.activation import Activation
from ep_rebalance.kernels.group_tokens import group_tokens
from ep_rebalance.kernels.grouped_mlp import ExpertWeights, grouped_mlp
from ep_rebalance.kernels.quantize_rows import (
    GROUP,
    dequantize_rows,
    quantize_rows,
    quantize_rows_torch,
)
from ep_rebalance.kernels.tiles import MlpTiles, Tiles, rule

POISON = 3e4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
OAI = Activation(name="swiglu_oai", interleaved=True)


def small_tiles(rows=16, columns=16, depth=16) -> MlpTiles:
    """Several tiles of each dimension, even of matrices that are quick to interpret."""
    tiles = Tiles(
        rows=rows, columns=columns, depth=depth, columns_together=2, programs=1, warps=4, stages=2
    )
    return MlpTiles(gate_up=tiles, down=tiles)


def random_weights(slots, hidden, intermediate, dtype, device, *, bias=False) -> ExpertWeights:
    generator = torch.Generator().manual_seed(slots * hidden + intermediate)

    def draw(*shape, scale):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return ExpertWeights(
        gate_up=draw(slots, 2 * intermediate, hidden, scale=2 / math.sqrt(hidden)),
        down=draw(slots, hidden, intermediate, scale=1 / math.sqrt(intermediate)),
        gate_up_bias=draw(slots, 2 * intermediate, scale=0.5) if bias else None,
        down_bias=draw(slots, hidden, scale=0.5) if bias else None,
    )


def act(gate, up, activation):
    if activation.name == "silu":
        return gate * torch.sigmoid(gate) * up
    if activation.name == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    approximate = "tanh" if activation.name == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def by_hand(rows, slots_N, weights, activation, pairs_per_row, pair_weights, eight_bit):
    """float64 [N, H], twice: the values, NaN where a pair is of no slot here; and what they may be off
    by because a value between the layers, in eight bits, was rounded to the other neighbour.
    """
    slots = len(weights.gate_up)
    result = torch.full((len(slots_N), rows.shape[1]), torch.nan, dtype=torch.float64)
    off_by = torch.zeros_like(result)
    for pair, slot in enumerate(slots_N.tolist()):
        if not 0 <= slot < slots:
            continue
        first = weights.gate_up[slot].double() @ rows[pair // pairs_per_row].double()
        if weights.gate_up_bias is not None:
            first += weights.gate_up_bias[slot].double()
        gate, up = (first[::2], first[1::2]) if activation.interleaved else first.chunk(2)
        between = act(gate, up, activation)
        if eight_bit:
            rounded = quantize_rows_torch(between.float().unsqueeze(0))
            between = dequantize_rows(*rounded, torch.float64)[0]
            # Neighbours of float8_e4m3fn are at most 2^-3 of a value apart.
            off_by[pair] = (weights.down[slot].double() * between).abs().amax(1) / 8
        second = weights.down[slot].double() @ between
        if weights.down_bias is not None:
            second += weights.down_bias[slot].double()
        result[pair] = second if pair_weights is None else second * pair_weights[pair].double()
    return result, off_by


def check(rows, slots_N, weights, activation, tiles, *, tolerance, **options) -> None:
    """Every pair of a slot here is right, and nothing else is written."""
    groups = group_tokens(slots_N, num_slots=len(weights.gate_up), block_rows=tiles.rows)
    out = torch.full((len(slots_N), rows.shape[1]), POISON, device=rows.device).to(
        torch.bfloat16 if weights.fp8 else rows.dtype
    )
    grouped_mlp(rows, groups, weights, activation, out, tiles=tiles, **options)
    pairs_per_row, pair_weights = options.get("pairs_per_row", 1), options.get("pair_weights_N")
    exact, exact_rows = weights, rows
    if weights.fp8:
        exact_rows = dequantize_rows(rows, options["row_scales"], torch.float64)
        exact = ExpertWeights(
            gate_up=full_weight(weights.gate_up, weights.gate_up_scales),
            down=full_weight(weights.down, weights.down_scales),
        )
    expected, off_by = by_hand(
        exact_rows.cpu(), slots_N.cpu(), on_cpu(exact), activation, pairs_per_row,
        None if pair_weights is None else pair_weights.cpu(), weights.fp8,
    )  # fmt: skip
    here = ~expected.isnan().any(1)
    assert (out.cpu()[~here].float() == torch.tensor(POISON).to(out.dtype).float()).all()
    if here.any():
        error = (out.cpu()[here].double() - expected[here]).abs()
        allowed = tolerance * expected[here].abs().clamp(min=1.0) + off_by[here]
        assert (error <= allowed).all(), error.max()


def full_weight(weight, scales):
    return weight.double() * scales.double().repeat_interleave(GROUP, 1).repeat_interleave(GROUP, 2)


def on_cpu(weights: ExpertWeights) -> ExpertWeights:
    parts = ("gate_up", "down", "gate_up_bias", "down_bias")
    found = {name: getattr(weights, name) for name in parts}
    return ExpertWeights(**{name: None if t is None else t.cpu() for name, t in found.items()})


def random_rows(count, hidden, dtype, device):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, hidden, generator=generator).to(device, dtype)


def slots_on(device, slots) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("activation", "bias"),
    [
        (Activation(), False),
        (Activation(), True),
        (Activation(name="gelu"), False),
        (Activation(name="gelu_tanh"), False),
        (OAI, True),
        (Activation(name="swiglu_oai"), False),
    ],
)
def test_every_activation_and_type(activation, bias, dtype, device):
    weights = random_weights(3, 48, 32, dtype, device, bias=bias)
    rows = random_rows(21, 48, dtype, device)
    slots = slots_on(device, [0] * 17 + [2, 2, 1, 2])
    check(rows, slots, weights, activation, small_tiles(), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize(
    "slots",
    [
        pytest.param([], id="no rows"),
        pytest.param([3], id="one row"),
        pytest.param([1] * 40, id="all on one expert"),
        pytest.param([-1, 4, 9], id="none of them here"),
        pytest.param([0, -1, 3, 4, 0, 3], id="some of them here"),
        pytest.param([0] * 16 + [3] * 16, id="whole blocks and empty experts"),
    ],
)
@pytest.mark.parametrize(("hidden", "intermediate"), [(16, 16), (40, 24), (33, 17)])
def test_groups_and_odd_sizes(slots, hidden, intermediate, device):
    weights = random_weights(4, hidden, intermediate, torch.float32, device)
    rows = random_rows(len(slots), hidden, torch.float32, device)
    check(rows, slots_on(device, slots), weights, Activation(), small_tiles(), tolerance=1e-5)


def test_several_pairs_of_a_row_and_their_weights(device):
    weights = random_weights(4, 32, 16, torch.float32, device)
    rows = random_rows(7, 32, torch.float32, device)
    slots = slots_on(device, [(5 * n) % 4 - (n % 5 == 0) for n in range(21)])
    pair_weights = torch.linspace(0.1, 2, 21, device=device)
    check(
        rows, slots, weights, Activation(), small_tiles(),
        tolerance=1e-5, pairs_per_row=3, pair_weights_N=pair_weights,
    )  # fmt: skip


def test_rows_and_slots_that_are_not_contiguous(device):
    weights = random_weights(4, 32, 16, torch.float32, device)
    rows = random_rows(8, 80, torch.float32, device)[:, 7:39]
    slots = slots_on(device, [[0, 9], [3, 9], [1, 9], [-1, 9], [3, 9], [0, 9], [2, 9], [3, 9]])[
        :, 0
    ]
    assert not rows.is_contiguous()
    assert not slots.is_contiguous()
    check(rows, slots, weights, Activation(), small_tiles(), tolerance=1e-5)


@pytest.mark.parametrize("real", [0, 5], ids=["all rows are padding", "the last rows are padding"])
def test_padded_rows_are_not_computed_whatever_they_hold(real, device):
    weights = random_weights(4, 32, 16, torch.float32, device)
    rows = random_rows(40, 32, torch.float32, device)
    rows[real:] = torch.nan
    slots = slots_on(device, [n % 4 for n in range(2 * real)] + [-1] * (80 - 2 * real))
    pair_weights = torch.full((80,), 0.5, device=device).masked_fill(slots < 0, torch.nan)
    check(
        rows, slots, weights, Activation(), small_tiles(),
        tolerance=1e-5, pairs_per_row=2, pair_weights_N=pair_weights,
    )  # fmt: skip


def test_rows_do_not_depend_on_the_rows_beside_them(device):
    weights = random_weights(2, 32, 16, torch.bfloat16, device)
    rows = random_rows(30, 32, torch.bfloat16, device)
    alone, together = (torch.empty(30, 32, dtype=torch.bfloat16, device=device) for _ in range(2))

    def run(rows, slots, out):
        groups = group_tokens(slots, num_slots=2, block_rows=16)
        grouped_mlp(rows, groups, weights, Activation(), out, tiles=small_tiles())

    slots = slots_on(device, [n % 3 == 0 for n in range(30)])
    run(rows, slots, together)
    for n in range(30):
        run(rows[n : n + 1], slots[n : n + 1], alone[n : n + 1])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("rows_per_slot", [4, 30, 100, 1000])
def test_the_rule_for_unknown_gpus_gives_tiles_that_work(rows_per_slot, device):
    weights = random_weights(2, 136, 72, torch.bfloat16, device)
    rows = random_rows(19, 136, torch.bfloat16, device)
    slots = slots_on(device, [n % 2 for n in range(19)])
    check(
        rows, slots, weights, Activation(), rule(rows_per_slot, fp8=False),
        tolerance=TOLERANCE[torch.bfloat16],
    )  # fmt: skip


@pytest.mark.parametrize("rows_per_slot", [4, 1000])
@pytest.mark.parametrize("activation", [Activation(), OAI])
def test_eight_bit_weights_with_block_scales(rows_per_slot, activation, device):
    full = random_weights(3, 256, 128, torch.float32, device)
    weights = ExpertWeights(**quantized("gate_up", full.gate_up), **quantized("down", full.down))
    rows, row_scales = quantize_rows(random_rows(9, 256, torch.bfloat16, device))
    slots = slots_on(device, [0, 2, 2, 0, 1, 2, -1, 0, 0])
    check(
        rows, slots, weights, activation, rule(rows_per_slot, fp8=True),
        tolerance=2e-2, row_scales=row_scales,
    )  # fmt: skip


def quantized(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """In blocks of 128 x 128, as DeepSeek-V3's checkpoints."""
    blocks = weight.unflatten(1, (-1, GROUP)).unflatten(3, (-1, GROUP))
    scales = blocks.abs().amax((2, 4)) / 448
    scaled = blocks / scales[:, :, None, :, None]
    eight_bit = scaled.flatten(3, 4).flatten(1, 2).to(torch.float8_e4m3fn)
    return {name: eight_bit, f"{name}_scales": scales}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 15}, "are not 16 pairs"),
        ({"block_rows": 32}, "blocks of 32 rows, but tiles of 16"),
        ({"out": (16, 31)}, "the output is"),
        ({"down": (2, 32, 8)}, "does not fit down"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, device):
    weights = random_weights(2, 32, 16, torch.float32, device)
    if "down" in change:
        weights = ExpertWeights(gate_up=weights.gate_up, down=torch.zeros(change["down"]))
    groups = group_tokens(
        slots_on(device, [0] * 16), num_slots=2, block_rows=change.get("block_rows", 16)
    )
    rows = torch.zeros(change.get("rows", 16), 32, device=device)
    out = torch.zeros(change.get("out", (16, 32)), device=device)
    with pytest.raises(ValueError, match=message):
        grouped_mlp(rows, groups, weights, Activation(), out, tiles=small_tiles())


@pytest.mark.parametrize("tiles", [small_tiles(columns=64, depth=64), small_tiles(16, 128, 96)])
def test_tiles_that_scales_do_not_fit_are_refused(tiles, device):
    """They would be wrong numbers, not an error: a table of measurements may hold anything."""
    drawn = random_weights(2, GROUP, GROUP, torch.float32, device)
    weights = ExpertWeights(**quantized("gate_up", drawn.gate_up), **quantized("down", drawn.down))
    groups = group_tokens(slots_on(device, [0] * 16), num_slots=2, block_rows=16)
    rows, scales = quantize_rows(torch.ones(16, GROUP, device=device))
    out = torch.zeros(16, GROUP, device=device)
    with pytest.raises(ValueError, match="tiles of 128 columns"):
        grouped_mlp(rows, groups, weights, Activation(), out, tiles=tiles, row_scales=scales)
