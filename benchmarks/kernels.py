"""The kernels on a GPU: against what the hardware allows, against vLLM's own, and against torch.

What the hardware allows is measured in the same run: a large copy for bytes per second, a large matrix
product for operations per second. All candidates of a case take turns, with the cache emptied before
each, and the ratios are of turns next to each other. `--rehearse` runs every case once on CPU, in
Triton's interpreter, to see that all of it works; its times say nothing.

    python benchmarks/kernels.py --json kernels.json             # on a GPU
    python benchmarks/kernels.py --vllm DIR                      # vLLM unpacked there, not installed
    python benchmarks/kernels.py --tune                          # write kernels/tuned/GPU.json
    python benchmarks/kernels.py --moves                         # quantised experts; on CPU, too

`--moves` times all that a move does with an expert's bytes but their way between ranks: packed with its
checksum, copied into staging memory, summed again, unpacked. An expert of 8 bits, with block scales that
are column-major and four scales of 4 bytes, takes turns with one of bfloat16, of which a move is larger
and so has less of what each tensor costs. On CPU this is the kernels' torch form in one thread, and its
own CPU time is taken, which leaves out what other processes took from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from machine import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ep_rebalance.kernels import tiles as tile_tables
from ep_rebalance.kernels.activation import Activation
from ep_rebalance.kernels.group_tokens import group_tokens
from ep_rebalance.kernels.grouped_mlp import ExpertWeights, grouped_mlp
from ep_rebalance.kernels.pack_experts import Slabs, pack_expert
from ep_rebalance.kernels.quantize_rows import GROUP, quantize_rows
from ep_rebalance.kernels.route_and_count import (
    LayerTables,
    route_and_count,
    route_and_count_torch,
)
from ep_rebalance.kernels.route_by_own_counts import PourTables, route_by_own_counts
from ep_rebalance.kernels.shared_arithmetic import Ranks

TURNS = 40
WARM_UP = 5
CACHE_BYTES = 256 << 20
NEVER_CAPTURED = ("torch",)
"""References in PyTorch, which read back from the device: their time holds their launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One rank's part of a model's MoE layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    ranks: int
    fp8: bool = False

    @property
    def slots(self) -> int:
        """Of a rank, without redundant ones."""
        return self.experts // self.ranks

    @property
    def replicas(self) -> int:
        """Redundant slots of a rank, where there are some: one for eight experts, as DeepSeek has it."""
        return max(1, self.slots // 8)

    @property
    def slots_with_replicas(self) -> int:
        """Of a rank."""
        return self.slots + self.replicas


SHAPES = [
    Shape(name="DeepSeek-V3 EP32", experts=256, top_k=8, hidden=7168, intermediate=2048, ranks=32),
    Shape(
        name="DeepSeek-V3 EP32 fp8",
        experts=256,
        top_k=8,
        hidden=7168,
        intermediate=2048,
        ranks=32,
        fp8=True,
    ),
    Shape(name="Qwen3-235B EP8", experts=128, top_k=8, hidden=4096, intermediate=1536, ranks=8),
    Shape(name="Qwen3-30B EP4", experts=128, top_k=8, hidden=2048, intermediate=768, ranks=4),
    Shape(name="Mixtral EP4", experts=8, top_k=2, hidden=4096, intermediate=14336, ranks=4),
    Shape(name="gpt-oss-120b EP8", experts=128, top_k=4, hidden=2880, intermediate=2880, ranks=8),
]
REHEARSED = [
    Shape(name="tiny", experts=8, top_k=2, hidden=128, intermediate=128, ranks=2),
    Shape(name="tiny fp8", experts=8, top_k=2, hidden=128, intermediate=128, ranks=2, fp8=True),
]
TOKENS = [1, 8, 64, 256, 1024, 4096, 8192]
LOADS = ["even", "zipf 0.8", "one expert"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is timed: candidates by name, ours first; the bytes and operations that any must move and do."""

    kernel: str
    shape: str
    tokens: int
    load: str
    candidates: dict[str, Callable[[], object]]
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Median seconds of each candidate, on the device and of the host that launches it outside CUDA graphs;
    ratios are theirs over ours, (10 %, median, 90 %) of turns.
    """

    kernel: str
    shape: str
    tokens: int
    load: str
    seconds: dict[str, float]
    host_seconds: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]
    of_floor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What the device does: bytes copied (read and written) and operations, per second."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, case: Case) -> float:
        """The least that a case can take."""
        return max(case.bytes / self.bytes_per_second, case.flops / self.flops_per_second)


class Timer:
    """Times a call on the device, with the cache emptied before, unless it is only rehearsed.

    On a GPU calls are captured as CUDA graphs, as a decode step runs them, so that their times are the
    device's. What a launch outside graphs costs the host is timed by itself.
    """

    def __init__(self, device: torch.device, *, rehearsed: bool = False) -> None:
        self.device = device
        size = 1 if rehearsed else CACHE_BYTES
        self._cache = torch.empty(size, dtype=torch.uint8, device=device)

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """As a CUDA graph, where there are any. The call must have run before."""
        if self.device.type != "cuda":
            return call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def host_seconds(self, call: Callable[[], object], turns: int) -> float:
        """Median of what the host is busy for, with the device never far behind."""
        seconds = []
        for _ in range(turns):
            self._wait()
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        self._wait()
        return float(np.median(seconds))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        self._cache.zero_()
        if self.device.type != "cuda":
            began = time.thread_time()
            call()
            return time.thread_time() - began
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def turns(self, candidates: dict[str, Callable[[], object]], turns: int) -> np.ndarray:
        """[turns, candidates]."""
        return np.array(
            [[self.seconds(call) for call in candidates.values()] for _ in range(turns)]
        )


def measure(case: Case, timer: Timer, floor: Floor, turns: int) -> Result:
    """All candidates by turns."""
    timer.turns(case.candidates, WARM_UP if turns > 1 else 1)
    host = {name: timer.host_seconds(call, turns) for name, call in case.candidates.items()}
    ready = {
        name: call if name in NEVER_CAPTURED else timer.captured(call)
        for name, call in case.candidates.items()
    }
    seconds = timer.turns(ready, turns)
    names = list(ready)
    median = dict(zip(names, np.median(seconds, axis=0).tolist(), strict=True))
    ratios = {
        name: tuple(np.percentile(seconds[:, i] / seconds[:, 0], [10, 50, 90]).tolist())
        for i, name in enumerate(names)
        if i
    }
    return Result(
        kernel=case.kernel,
        shape=case.shape,
        tokens=case.tokens,
        load=case.load,
        seconds=median,
        host_seconds=host,
        ratios=ratios,
        of_floor=floor.seconds(case) / median[names[0]],
    )


def measure_floor(timer: Timer) -> Floor:
    """A copy of a GiB and a product of 8192 x 8192 in bfloat16."""
    on_gpu = timer.device.type == "cuda"
    size, side = (1 << 30, 8192) if on_gpu else (1 << 20, 64)
    source = torch.zeros(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    # Random, since a GPU multiplies equal values with less power, and so faster.
    matrix = torch.randn(side, side, dtype=torch.bfloat16, device=timer.device)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}
    timer.turns(calls, WARM_UP)
    copy, product = np.median(timer.turns(calls, TURNS if on_gpu else 1), axis=0).tolist()
    return Floor(bytes_per_second=2 * size / copy, flops_per_second=2 * side**3 / product)


# --- loads


def expert_shares(load: str, experts: int) -> np.ndarray:
    """Of a rank's or a model's experts."""
    if load == "even":
        return np.full(experts, 1 / experts)
    if load == "one expert":
        return np.eye(experts)[0]
    weights = np.arange(1, experts + 1) ** -0.8
    return weights / weights.sum()


def draw_ids(shape: Shape, tokens: int, load: str, device: torch.device) -> torch.Tensor:
    """int32 [T, K] logical ids of one rank's tokens; with one expert all choose the first K."""
    rng = np.random.default_rng(tokens)
    shares = expert_shares(load, shape.experts)
    if load == "one expert":
        ids = np.tile(np.arange(shape.top_k), (tokens, 1))
    else:
        keys = np.log(rng.random((tokens, shape.experts))) / shares  # without replacement
        ids = np.argsort(-keys, axis=1)[:, : shape.top_k]
    return torch.from_numpy(ids.astype(np.int32)).to(device)


def draw_local_slots(shape: Shape, tokens: int, load: str, device: torch.device) -> torch.Tensor:
    """int32 [N], slots of the pairs that a rank gets if all ranks hold so many tokens each."""
    pairs = max(1, tokens * shape.top_k)
    rng = np.random.default_rng(tokens)
    slots = rng.choice(shape.slots, size=pairs, p=expert_shares(load, shape.slots))
    return torch.from_numpy(slots.astype(np.int32)).to(device)


# --- cases


def routing_cases(shape: Shape, tokens: int, load: str, device: torch.device) -> Iterator[Case]:
    """Both ways to route, and the one by quotas with group_tokens, where some experts have two replicas."""
    ids = draw_ids(shape, tokens, load, device)
    phases = torch.zeros(tokens, dtype=torch.int8, device=device)
    tables = replica_tables(shape, device)
    pours = pour_tables(shape, tables)
    ranks = Ranks(total=shape.ranks, slots=shape.slots_with_replicas, source=0)
    offset = torch.zeros(1, dtype=torch.int64, device=device)
    slots = shape.slots_with_replicas
    block_rows = tile_tables.rule(ids.numel() / slots, fp8=False).rows

    def grouped() -> object:
        routed = route_and_count(ids, phases, tables, offset)
        return group_tokens(routed, num_slots=slots, block_rows=block_rows)

    peers = vllm_routing(shape, ids, tables, block_rows)
    moved = ids.numel() * 8 + tokens
    made = functools.partial(Case, shape=shape.name, tokens=tokens, load=load)
    yield made(
        kernel="route_and_count",
        candidates={
            "ours": lambda: route_and_count(ids, phases, tables, offset),
            **({"vLLM": peers[0]} if peers else {}),
            "torch": lambda: route_and_count_torch(ids, phases, tables, offset),
        },
        bytes=moved,
    )
    yield made(
        kernel="route_by_own_counts",
        candidates={
            "ours": lambda: route_by_own_counts(ids, phases, tables, pours, offset, ranks),
            "by quotas": lambda: route_and_count(ids, phases, tables, offset),
            **({"vLLM": peers[0]} if peers else {}),
        },
        bytes=moved,
    )
    yield made(
        kernel="route and group",
        candidates={"ours": grouped, **({"vLLM": peers[1]} if peers else {})},
        bytes=moved + ids.numel() * 8,
    )


def replica_tables(shape: Shape, device: torch.device) -> LayerTables:
    """Experts at equal distances have a second replica, on the rank after their first one's."""
    experts = torch.arange(shape.experts)
    replica_slots = torch.full((shape.experts, 2), -1, dtype=torch.int32)
    home_ranks = experts // shape.slots
    replica_slots[:, 0] = home_ranks * shape.slots_with_replicas + experts % shape.slots
    thresholds = torch.full((shape.experts, 2), 65536, dtype=torch.int32)
    every = shape.slots // shape.replicas
    twice = experts[experts % every == 0]
    next_ranks = (home_ranks[twice] + 1) % shape.ranks
    place = shape.slots + twice % shape.slots // every
    replica_slots[twice, 1] = (next_ranks * shape.slots_with_replicas + place).int()
    thresholds[twice, 0] = 32768
    return LayerTables(
        counts_AE=torch.zeros(3, shape.experts, dtype=torch.int64, device=device),
        replica_slots_EC=replica_slots.to(device),
        thresholds_EC=thresholds.to(device),
    )


def pour_tables(shape: Shape, tables: LayerTables) -> PourTables:
    """The order in which the experts with two replicas are poured, on level ground."""
    from ep_rebalance.routing.pours import pour_order  # not above, as in Moves

    slots = tables.replica_slots_EC
    order = pour_order(
        slots.cpu().numpy()[None],
        rows=shape.replicas * shape.ranks,
        slots_per_rank=shape.slots_with_replicas,
        num_ranks=shape.ranks,
    )
    poured_X, colour_X, row_E = (torch.from_numpy(part[0]).to(slots.device) for part in order)
    ground_R = torch.zeros(shape.ranks, dtype=torch.int32, device=slots.device)
    return PourTables(poured_X=poured_X, colour_X=colour_X, row_E=row_E, ground_R=ground_R)


def mlp_case(shape: Shape, tokens: int, load: str, device: torch.device) -> Case:
    """grouped_mlp on the pairs that a rank gets."""
    slots = draw_local_slots(shape, tokens, load, device)
    pairs = len(slots)
    rows, scales = random_rows(pairs, shape, device)
    weights = layer_weights(shape, device)
    out = torch.empty(pairs, shape.hidden, dtype=torch.bfloat16, device=device)
    chosen = tile_tables.mlp_tiles(
        num_pairs=pairs,
        num_slots=shape.slots,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        fp8=shape.fp8,
        device=device,
    )
    groups = group_tokens(slots, num_slots=shape.slots, block_rows=chosen.rows)

    def ours() -> None:
        grouped_mlp(rows, groups, weights, Activation(), out, tiles=chosen, row_scales=scales)

    active = len(slots.unique())
    element = rows.element_size()
    per_expert = 3 * shape.hidden * shape.intermediate * element
    traffic = pairs * (shape.hidden * (element + 2) + 2 * shape.intermediate * element)
    peer = vllm_mlp(shape, rows, scales, weights, slots)
    return Case(
        kernel="grouped_mlp",
        shape=shape.name,
        tokens=tokens,
        load=load,
        candidates={"ours": ours, **({"vLLM": peer} if peer else {})},
        bytes=active * per_expert + traffic,
        flops=6.0 * pairs * shape.hidden * shape.intermediate * (0.5 if shape.fp8 else 1.0),
    )


def random_rows(
    pairs: int, shape: Shape, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """bfloat16 rows, or 8-bit ones with their scales."""
    rows = torch.randn(pairs, shape.hidden, device=device, dtype=torch.bfloat16)
    return quantize_rows(rows) if shape.fp8 else (rows, None)


def layer_weights(shape: Shape, device: torch.device) -> ExpertWeights:
    """Random weights of all slots of a rank."""
    sizes = {
        "gate_up": (shape.slots, 2 * shape.intermediate, shape.hidden),
        "down": (shape.slots, shape.hidden, shape.intermediate),
    }
    found: dict[str, torch.Tensor] = {}
    for name, (slots, rows, columns) in sizes.items():
        weight = torch.empty(slots, rows, columns, device=device, dtype=torch.bfloat16)
        weight.normal_(std=1 / math.sqrt(columns))
        found[name] = weight.to(torch.float8_e4m3fn) if shape.fp8 else weight
        if shape.fp8:
            scales = (slots, rows // GROUP, columns // GROUP)
            found[f"{name}_scales"] = torch.ones(scales, device=device)
    return ExpertWeights(**found)


def pack_case(shape: Shape, device: torch.device) -> Case:
    """One expert into staging, with its checksum."""
    weights = layer_weights(dataclasses.replace(shape, experts=2 * shape.ranks), device)
    tensors = [weights.gate_up, weights.down, weights.gate_up_scales, weights.down_scales]
    slabs = Slabs.of([t.reshape(len(t), -1).view(torch.uint8) for t in tensors if t is not None])
    staging = torch.empty(slabs.packed_bytes, dtype=torch.uint8, device=device)
    source = torch.zeros_like(staging)
    checksum = torch.empty(1, dtype=torch.int64, device=device)
    return Case(
        kernel="pack_experts",
        shape=shape.name,
        tokens=0,
        load="",
        candidates={
            "ours": lambda: pack_expert(slabs, 1, 0, staging, checksum),
            "torch copy": lambda: staging.copy_(source),
        },
        bytes=2.0 * slabs.packed_bytes,
    )


# --- moves of quantised experts

SMALL_SCALES = 4
"""Of 4 bytes each: those of both inputs, and both products with the weights' scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveResult:
    """An expert of 8 bits beside one of bfloat16.

    seconds: medians of one move. ratio: of the times per byte, (10 %, median, 90 %) of turns.
    """

    shape: str
    bytes: dict[str, int]
    seconds: dict[str, float]
    ratio: tuple[float, float, float]


class Moves:
    """One layer with two slots, whose first expert moves into the second slot."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        # Imported here: transformers takes this file for the package `kernels` where benchmarks are on its
        # path, and vLLM 0.32 fails if numba is loaded before its kernels.
        from ep_rebalance.migration.expert_memory import ExpertMemory

        self._memory = ExpertMemory([tensors])
        self.bytes = self._memory.expert_bytes_L[0]
        device = self._memory.device
        self._wire = torch.zeros(self.bytes, dtype=torch.uint8, device=device)
        self._staging = torch.zeros_like(self._wire)
        self._checksums = torch.zeros(2, dtype=torch.int64, device=device)

    def move(self) -> None:
        self._memory.read(0, 0, 0, self._wire, self._checksums[:1])
        self._staging.copy_(self._wire)
        self._memory.checksum_packed(0, self._staging, self._checksums[1:])
        self._memory.write(0, 1, self._staging)

    @property
    def arrived(self) -> bool:
        """Whether sender and receiver came to one checksum."""
        return bool(self._checksums[0] == self._checksums[1])


def expert_of_8_bits(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Of two slots: weights, block scales with their columns first, and small scales."""
    tensors = []
    hidden, intermediate = shape.hidden, shape.intermediate
    for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate)):
        blocks = (2, math.ceil(columns / GROUP), math.ceil(rows / GROUP))
        tensors.append(torch.randint(0, 256, (2, rows, columns), dtype=torch.uint8, device=device))
        tensors.append(torch.rand(blocks, device=device).transpose(1, 2))
    return tensors + [torch.rand(2, device=device) for _ in range(SMALL_SCALES)]


def expert_of_bfloat16(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Of two slots."""
    shapes = ((2, 2 * shape.intermediate, shape.hidden), (2, shape.hidden, shape.intermediate))
    return [torch.randn(sizes, device=device, dtype=torch.bfloat16) for sizes in shapes]


def measure_moves(shape: Shape, timer: Timer, turns: int) -> MoveResult:
    """Both experts by turns, a turn in either order, so that neither is always the one that follows."""
    moves = {
        "8 bits": Moves(expert_of_8_bits(shape, timer.device)),
        "bfloat16": Moves(expert_of_bfloat16(shape, timer.device)),
    }
    there: dict[str, Callable[[], object]] = {name: m.move for name, m in moves.items()}
    back = dict(reversed(there.items()))
    timer.turns(there, min(turns, WARM_UP))
    seconds = np.concatenate(
        [(timer.turns(there, 1) + timer.turns(back, 1)[:, ::-1]) / 2 for _ in range(turns)]
    )
    assert all(m.arrived for m in moves.values())
    per_byte = seconds / np.array([m.bytes for m in moves.values()])
    low, middle, high = np.percentile(per_byte[:, 0] / per_byte[:, 1], [10, 50, 90]).tolist()
    return MoveResult(
        shape=shape.name,
        bytes={name: m.bytes for name, m in moves.items()},
        seconds=dict(zip(moves, np.median(seconds, axis=0).tolist(), strict=True)),
        ratio=(low, middle, high),
    )


def moves_table(results: list[MoveResult]) -> Table:
    """One row per shape."""
    table = Table(title="one expert: packed, summed, staged, summed, unpacked")
    for heading in ("shape", "8 bits", "bfloat16", "time per byte, 8 bits over bfloat16"):
        table.add_column(heading)
    for r in results:
        low, middle, high = r.ratio
        cells = [
            f"{r.bytes[name] / 1e6:.1f} MB in {1e3 * r.seconds[name]:.2f} ms, "
            f"{r.bytes[name] / r.seconds[name] / 1e9:.2f} GB/s"
            for name in r.bytes
        ]
        table.add_row(r.shape, *cells, f"{middle:.2f} ({low:.2f}-{high:.2f})")
    return table


# --- vLLM's kernels, where they can be had


def vllm_routing(
    shape: Shape, ids: torch.Tensor, tables: LayerTables, block_rows: int
) -> tuple[Callable[[], object], Callable[[], object]] | None:
    """(its map-and-record kernel, the same with `moe_align_block_size`), if it is installed on a GPU."""
    if not ids.is_cuda:
        return None
    try:
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
        from vllm.model_executor.layers.fused_moe.router.base_router import (
            eplb_map_to_physical_and_record,
        )
    except ImportError:
        return None
    slots = shape.slots_with_replicas
    physical = slots * shape.ranks
    load_view = torch.zeros(physical, dtype=torch.int32, device=ids.device)
    wide = torch.full((shape.experts, 1024), -1, dtype=torch.int64, device=ids.device)
    wide[:, :2] = tables.replica_slots_EC
    replicas = (tables.replica_slots_EC >= 0).sum(1).long()
    enabled = torch.ones((), dtype=torch.bool, device=ids.device)
    expert_map = torch.full((physical,), -1, dtype=torch.int32, device=ids.device)
    expert_map[:slots] = torch.arange(slots, device=ids.device)

    def mapped() -> torch.Tensor:
        found: torch.Tensor = eplb_map_to_physical_and_record(
            ids, load_view, wide, replicas, enabled
        )
        return found

    def grouped() -> object:
        return moe_align_block_size(mapped(), block_rows, physical, expert_map)

    return mapped, grouped


def vllm_mlp(
    shape: Shape,
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    weights: ExpertWeights,
    slots: torch.Tensor,
) -> Callable[[], object] | None:
    """Its tuned Triton experts on bfloat16, one expert per row, if it is installed on a GPU."""
    if not rows.is_cuda or shape.fp8:
        return None
    try:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    except ImportError:
        return None
    ids = slots.unsqueeze(1)
    ones = torch.ones(len(slots), 1, device=rows.device)
    return lambda: fused_experts(rows, weights.gate_up, weights.down, ones, ids)


# --- tiles


def tuned(shapes: list[Shape], timer: Timer, console: Console) -> None:
    """Try tiles for every shape and number of rows, and write the fastest."""
    found: dict[str, dict[float, tile_tables.MlpTiles]] = {}
    work = list(itertools.product(shapes, (4, 16, 64, 256, 1024)))
    for shape, mean_rows in track(work, "tuning", console=console):
        best = fastest_tiles(shape, mean_rows, timer)
        found.setdefault(shape_key(shape), {})[float(mean_rows)] = best
    name = torch.cuda.get_device_name(timer.device)
    console.print(f"wrote {tile_tables.write_table(name, found)}")


def fastest_tiles(shape: Shape, mean_rows: int, timer: Timer) -> tile_tables.MlpTiles:
    """Of the rule's tiles and those around them, on Zipf load."""
    tokens = max(1, mean_rows * shape.slots // shape.top_k)
    slots = draw_local_slots(shape, tokens, "zipf 0.8", timer.device)
    rows, scales = random_rows(len(slots), shape, timer.device)
    weights = layer_weights(shape, timer.device)
    out = torch.empty(len(slots), shape.hidden, dtype=torch.bfloat16, device=timer.device)
    best, best_seconds = tile_tables.rule(mean_rows, fp8=shape.fp8), math.inf
    for tiles in tiles_to_try(shape.fp8):
        groups = group_tokens(slots, num_slots=shape.slots, block_rows=tiles.rows)

        def run(groups: object = groups, tiles: tile_tables.MlpTiles = tiles) -> None:
            grouped_mlp(rows, groups, weights, Activation(), out, tiles=tiles, row_scales=scales)

        try:
            timer.turns({"run": run}, WARM_UP)
            seconds = float(np.median(timer.turns({"run": run}, 10)))
        except RuntimeError:  # more shared memory or registers than a block may have
            continue
        if seconds < best_seconds:
            best, best_seconds = tiles, seconds
    return best


def tiles_to_try(fp8: bool) -> Iterator[tile_tables.MlpTiles]:
    """Variations of the rule's tiles."""
    for rows, warps, stages, together in itertools.product(
        (16, 32, 64, 128), (4, 8), (2, 3, 4), (2, 8)
    ):
        base = tile_tables.rule(rows, fp8=fp8)
        change = {"rows": rows, "warps": warps, "stages": stages, "columns_together": together}
        yield tile_tables.MlpTiles(
            gate_up=dataclasses.replace(base.gate_up, **change),
            down=dataclasses.replace(base.down, **change),
        )


def shape_key(shape: Shape) -> str:
    """As the tables name it."""
    return tile_tables.shape_key(
        num_slots=shape.slots,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        fp8=shape.fp8,
    )


# --- the command


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", action="append", help="only shapes whose name holds this; may be repeated")
    add("--tokens", type=int, nargs="+", help=f"per rank (default {TOKENS})")
    add("--turns", type=int, default=TURNS, help=f"of each case (default {TURNS})")
    add("--seconds", type=float, default=math.inf, help="begin no case after so long")
    add("--vllm", type=Path, help="folder with an unpacked vLLM wheel, to compare with")
    add("--json", type=Path, help="write all results there, too")
    add("--tune", action="store_true", help="find tiles for this GPU and write them, and end")
    add("--moves", action="store_true", help="only moves: a quantised expert beside bfloat16")
    add("--rehearse", action="store_true", help="run everything once on CPU, tiny and interpreted")
    options = parser.parse_args()
    if not (options.rehearse or options.moves or torch.cuda.is_available()):
        parser.error(
            "there is no CUDA device here; --rehearse runs everything once on CPU, and --moves runs there"
        )
    if options.vllm is not None:
        if not (options.vllm / "vllm").is_dir():
            parser.error(f"--vllm {options.vllm} holds no folder vllm; unpack the wheel there")
        sys.path.insert(0, str(options.vllm))
    return options


def all_cases(shapes: list[Shape], tokens: list[int], device: torch.device) -> Iterator[Case]:
    """One after the other, since each holds its tensors."""
    for shape in shapes:
        for count, load in itertools.product(tokens, LOADS):
            yield from routing_cases(shape, count, load, device)
            yield mlp_case(shape, count, load, device)
        yield pack_case(shape, device)


def as_table(results: list[Result], floor: Floor) -> Table:
    """One row per case."""
    table = Table(
        title=f"floor: {floor.bytes_per_second / 1e12:.2f} TB/s copied, "
        f"{floor.flops_per_second / 1e12:.0f} TFLOP/s in bfloat16"
    )
    for heading in (
        "kernel",
        "shape",
        "tokens",
        "load",
        "ours",
        "host",
        "of the floor",
        "others over ours",
    ):
        table.add_column(heading)
    for r in results:
        others = ", ".join(
            f"{name} {middle:.2f} ({low:.2f}-{high:.2f})"
            for name, (low, middle, high) in r.ratios.items()
        )
        table.add_row(
            r.kernel, r.shape, str(r.tokens or ""), r.load,
            f"{1e6 * r.seconds['ours']:.1f} us", f"{1e6 * r.host_seconds['ours']:.0f} us",
            f"{r.of_floor:.0%}", others,
        )  # fmt: skip
    return table


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console(width=max(120, Console().width))
    on_gpu = torch.cuda.is_available() and not options.rehearse
    timer = Timer(torch.device("cuda" if on_gpu else "cpu"), rehearsed=options.rehearse)
    on = torch.cuda.get_device_name(timer.device) if on_gpu else "CPU"
    shapes = [
        shape
        for shape in (REHEARSED if options.rehearse else SHAPES)
        if not options.shape or any(part in shape.name for part in options.shape)
    ]
    if options.tune:
        tuned(shapes, timer, console)
        return
    if options.moves:
        torch.set_num_threads(1)
        moves = [measure_moves(shape, timer, options.turns) for shape in shapes if not shape.fp8]
        report(console, moves_table(moves), on, options, {"moves": moves})
        return
    floor = measure_floor(timer)
    tokens = options.tokens or ([1, 20] if options.rehearse else TOKENS)
    kinds = 4 * len(tokens) * len(LOADS) + 1
    ends = time.monotonic() + options.seconds
    cases = itertools.takewhile(
        lambda _: time.monotonic() < ends, all_cases(shapes, tokens, timer.device)
    )
    results = [
        measure(case, timer, floor, 1 if options.rehearse else options.turns)
        for case in track(cases, "measuring", total=kinds * len(shapes), console=console)
    ]
    found = {"floor": floor, "results": results}
    report(console, as_table(results, floor), on, options, found)


def report(
    console: Console,
    table: Table,
    on: str,
    options: argparse.Namespace,
    found: dict[str, object],
) -> None:
    """The table, the machine, and all of it as JSON. found: of dataclasses."""
    on = f"rehearsed on {on}" if options.rehearse else on
    console.print(table)
    console.print(f"{on}; ratios are medians (10 % to 90 %) of {options.turns} turns", style="dim")
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")
    if options.json:
        described = {"machine": machine(), "device": on, **found}
        options.json.write_text(json.dumps(described, indent=1, default=dataclasses.asdict) + "\n")


if __name__ == "__main__":
    main()
