"""Registers, shared memory and occupancy of every kernel at the tiles that it is launched with.

Compiles for a GPU that need not be there: Triton brings the assembler, which says what it used. A block
occupies a processor until it ends, so fewer registers and less shared memory let more blocks take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from machine import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ep_rebalance.kernels import (
    group_tokens,
    grouped_mlp,
    pack_experts,
    quantize_rows,
    route_and_count,
    route_by_own_counts,
    tiles,
    weighted_sum,
)

ALIGNED = [["tt.divisibility", 16]]
"""What Triton finds of pointers, and of sizes that divide by 16, when it launches a kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What blocks share on one streaming multiprocessor (CUDA C++ Programming Guide, table "Technical
    Specifications per Compute Capability").
    """

    registers: int = 65536
    shared_bytes: int
    threads: int
    blocks: int = 32


PROCESSORS = {
    80: Processor(shared_bytes=164 << 10, threads=2048),
    89: Processor(shared_bytes=100 << 10, threads=1536, blocks=24),
    90: Processor(shared_bytes=228 << 10, threads=2048),
}
GROUPS = ("pair_of_row_ptr", "slot_of_block_ptr", "num_blocks_ptr")
EIGHT_BITS = {
    "GROUP": quantize_rows.GROUP,
    "LARGEST": quantize_rows.LARGEST,
    "SMALLEST_SCALE": quantize_rows.SMALLEST_SCALE,
}
RESERVED_BYTES = 1024
"""Shared memory that CUDA keeps of every block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel as it is launched. arguments: types of those that are no constants; None for a tensor
    that is left out. constants: with the launch's own options. odd: sizes not known to divide by 16.
    """

    name: str
    kernel: Any
    arguments: dict[str, str | None]
    constants: dict[str, Any]
    odd: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the assembler says, of one block, and how many blocks a processor holds."""

    kernel: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    blocks: int
    occupancy: float


def cases() -> Iterator[Case]:
    """All kernels."""
    yield from routing_cases()
    yield from own_counts_cases()
    for pairs in (1024, 65536):
        yield Case(
            name=f"group_tokens, {pairs} pairs",
            kernel=group_tokens._kernel,
            arguments={
                **typed("*i32", "slots_ptr", *GROUPS),
                **typed("i32", "num_pairs", "num_slots", "first_slot"),
            },
            constants={"BINS": 16, "BLOCK_ROWS": 64, **group_tokens.options(pairs)},
            odd=("num_slots", "first_slot"),
        )
    for mean_rows in (16, 32, 64, 512):
        yield from mlp_cases(mean_rows, fp8=False)
    for mean_rows in (16, 32, 512):
        yield from mlp_cases(mean_rows, fp8=True)
    yield Case(
        name="quantize_rows",
        kernel=quantize_rows._kernel,
        arguments={
            "rows_ptr": "*bf16",
            "quantized_ptr": "*fp8e4nv",
            "scales_ptr": "*fp32",
            "num_groups": "i32",
        },
        constants={**EIGHT_BITS, "BLOCK": quantize_rows.BLOCK, "INTERPRETED": False},
    )
    yield Case(
        name="weighted_sum, top 8",
        kernel=weighted_sum._kernel,
        arguments={
            "outputs_ptr": "*bf16",
            "position_ptr": "*i64",
            **typed("*fp32", "weights_ptr", "total_ptr"),
            "hidden": "i32",
        },
        constants={"TOP_K": 8, "BLOCK": weighted_sum.block(7168)},
    )
    yield Case(
        name="pack_experts, copy and sum",
        kernel=pack_experts._kernel,
        arguments={
            **typed("*i64", "blocks_ptr", "checksum_ptr"),
            "packed_ptr": "*i32",
            **typed("i32", "first_block", "slot", "start_unit", "stop_unit"),
        },
        constants={
            "FROM_SLOT": True,
            "COPIES": True,
            "SUMS": True,
            "BLOCK": pack_experts.BLOCK,
            "BLOCK_BYTES": pack_experts.BLOCK_BYTES,
            "num_warps": pack_experts.WARPS,
        },
        odd=("first_block", "slot", "start_unit", "stop_unit", "checksum_ptr"),
    )


def routing_cases() -> Iterator[Case]:
    """Routing and counting, which is one kernel for any number of replicas, and counting alone."""
    tables = ("replica_slots_ptr", "thresholds_ptr")
    for name, routes in (("route_and_count", True), ("count_experts", False)):
        for pairs in (1024, 65536):
            yield Case(
                name=f"{name}, {pairs} pairs",
                kernel=route_and_count._kernel,
                arguments={
                    **typed("*i32", "topk_ids_ptr"),
                    **typed("*i32" if routes else None, *tables, "slots_ptr"),
                    **typed("*i64" if routes else None, "offset_ptr"),
                    **typed("*i64", "counts_ptr"),
                    **typed("*i8", "phase_ptr"),
                    **typed("i32", *route_and_count.SIZES),
                },
                constants={
                    "HASH_STEP": route_and_count.HASH_STEP,
                    "IGNORED": route_and_count.IGNORED,
                    **route_and_count.options(pairs, 256),
                },
                odd=(*route_and_count.POINTERS, *route_and_count.SIZES),
            )


def own_counts_cases() -> Iterator[Case]:
    """Both kernels for 256 experts on 32 ranks; the second with room for 32 replicated ones."""
    yield Case(
        name="route_by_own_counts, count",
        kernel=route_by_own_counts._count_blocks,
        arguments={
            **typed("*i32", "topk_ids_ptr", "tokens_ptr"),
            **typed("*i64", "counts_ptr"),
            **typed("*i8", "phase_ptr"),
            **typed("i32", *route_by_own_counts.COUNTED_SIZES),
        },
        constants={
            "IGNORED": route_by_own_counts.IGNORED,
            "BLOCK": route_by_own_counts.BLOCK,
            "PHASE_BINS": 1024,
            "EXPERTS": 256,
        },
        odd=(*route_by_own_counts.COUNTED_POINTERS, *route_by_own_counts.COUNTED_SIZES),
    )
    pointers = [name for name in route_by_own_counts.POURED_POINTERS if name != "offset_ptr"]
    yield Case(
        name="route_by_own_counts, pour",
        kernel=route_by_own_counts._pour_and_assign,
        arguments={
            **typed("*i32", *pointers),
            **typed("*i64", "offset_ptr"),
            **typed("i32", *route_by_own_counts.POURED_SIZES),
        },
        constants={
            "HASH_STEP": route_by_own_counts.HASH_STEP,
            "UNIT_BITS": route_by_own_counts.UNIT_BITS,
            "MOST_SWEEPS": route_by_own_counts.MOST_SWEEPS,
            "RANKS_PER_PAIR": route_by_own_counts.RANKS_PER_PAIR,
            **route_by_own_counts.POUR_OPTIONS,
            **route_by_own_counts.bins(256, 32, 32, 32),
        },
        odd=(*route_by_own_counts.POURED_POINTERS, *route_by_own_counts.POURED_SIZES),
    )


def typed(kind: str | None, *names: str) -> dict[str, str | None]:
    """Arguments of one type."""
    return dict.fromkeys(names, kind)


def mlp_cases(mean_rows: float, fp8: bool) -> Iterator[Case]:
    """Both halves of the grouped MLP, without biases, for groups of so many rows."""
    chosen = tiles.rule(mean_rows, fp8=fp8)
    kind, element, scale = ("fp8", "*fp8e4nv", "*fp32") if fp8 else ("bf16", "*bf16", None)
    both = {
        **typed(element, "weight_ptr", "between_ptr"),
        **typed(scale, "weight_scales_ptr", "between_scales_ptr"),
        "bias_ptr": None,
        **typed("*i32", *GROUPS),
        **typed("i32", "num_pairs", "hidden", "intermediate"),
    }
    constants = {"FP8": fp8, "HAS_BIAS": False, "GROUP": quantize_rows.GROUP}
    yield Case(
        name=f"gate_up, {kind}, {chosen.gate_up.rows} x {chosen.gate_up.columns}",
        kernel=grouped_mlp._gate_up_kernel,
        arguments={
            **both,
            "rows_ptr": element,
            "row_scales_ptr": scale,
            "pairs_per_row": "i32",
        },
        constants={
            **constants,
            **EIGHT_BITS,
            "NAME": "silu",
            "INTERLEAVED": False,
            "ALPHA": 1.702,
            "LIMIT": 7.0,
            **grouped_mlp.options(chosen.gate_up),
        },
        odd=("pairs_per_row",),
    )
    yield Case(
        name=f"down, {kind}, {chosen.down.rows} x {chosen.down.columns}",
        kernel=grouped_mlp._down_kernel,
        arguments={**both, "out_ptr": "*bf16", "pair_weights_ptr": None},
        constants={**constants, "HAS_WEIGHTS": False, **grouped_mlp.options(chosen.down)},
    )


def compile_case(case: Case, capability: int) -> Resources:
    """Compile one kernel and read what its block needs."""
    names = case.kernel.arg_names
    present = {name: kind for name, kind in case.arguments.items() if kind is not None}
    absent = dict.fromkeys(set(case.arguments) - set(present))
    signature = {name: present.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): ALIGNED for name in present if name not in case.odd}
    constants = {name: value for name, value in case.constants.items() if name in names}
    warps = case.constants.get("num_warps", 4)
    stages = case.constants.get("num_stages", 3)
    compiled = triton.compile(
        ASTSource(case.kernel, signature, {**constants, **absent}, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    log = assemble(compiled.asm["ptx"], capability)
    registers = int(re.search(r"Used (\d+) registers", log)[1])  # type: ignore[index]
    spilled = re.search(r"(\d+) bytes spill stores", log)
    shared = int(compiled.metadata.shared)
    processor = PROCESSORS[capability]
    threads = 32 * warps
    # Registers are given out to a warp in units of 256.
    per_warp = -(-32 * registers // 256) * 256
    blocks = min(
        processor.registers // (per_warp * warps),
        processor.shared_bytes // (shared + RESERVED_BYTES),
        processor.threads // threads,
        processor.blocks,
    )
    return Resources(
        kernel=case.name,
        warps=warps,
        registers=registers,
        spilled_bytes=int(spilled[1]) if spilled else 0,
        shared_bytes=shared,
        blocks=blocks,
        occupancy=blocks * threads / processor.threads,
    )


def assemble(ptx: str, capability: int) -> str:
    """What the assembler says of a kernel."""
    suffix = "a" if capability == 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}{suffix}", source]
        done = subprocess.run(
            [*command, "-o", f"{folder}/kernel.cubin"], capture_output=True, text=True, check=True
        )
    return done.stderr


def main() -> None:
    """Compile all and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    capabilities = ", ".join(f"{c} " + n for c, n in ((80, "A100"), (89, "L40S"), (90, "H100")))
    parser.add_argument(
        "--capability",
        type=int,
        choices=PROCESSORS,
        default=90,
        help=f"of the GPU to compile for: {capabilities} (default 90)",
    )
    parser.add_argument("--json", type=Path, help="write the table there, too")
    options, console = parser.parse_args(), Console(width=max(100, Console().width))
    listed = [
        case
        for case in cases()
        if options.capability >= 89 or not {"*fp8e4nv"} & set(case.arguments.values())
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of Triton's coming defaults
        found = [
            compile_case(case, options.capability)
            for case in track(listed, "compiling", console=console, transient=True)
        ]
    table = Table(title=f"compute capability {options.capability / 10}, one block")
    for heading in (
        "kernel",
        "warps",
        "registers",
        "spilled B",
        "shared KiB",
        "blocks",
        "occupancy",
    ):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for r in found:
        table.add_row(
            r.kernel, str(r.warps), str(r.registers), str(r.spilled_bytes),
            f"{r.shared_bytes / 1024:.1f}", str(r.blocks), f"{r.occupancy:.0%}",
        )  # fmt: skip
    console.print(table)
    console.print(f"triton {triton.__version__}, torch {torch.__version__}", style="dim")
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(r) for r in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
