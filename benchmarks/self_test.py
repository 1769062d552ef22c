"""What the self-test at start costs at DeepSeek-V3's size: time in parts, and memory.

Found, compared, tried on each rank, and one move between ranks (docs/quantisation.md). No machine of ours
has 32 GPUs, so that the time is put together from parts:

  host      measured here, in Python, with vLLM's own layers of the true size, and without the kernel
  gathers   measured here between two processes over gloo, times the number of other ranks
  memory    bytes that all operations and kernels read and write, counted here in real calls at the true
            size, over the memory bandwidth of `--hardware`
  launches  operations counted in the same calls, LAUNCH_SECONDS each, and KERNEL_OPERATIONS a kernel call
  link      bytes that a rank sends, counted, over a link between nodes, and EXCHANGE_SECONDS a collective

Left out is what a start needs in any case, sooner or later: what a kernel compiles at its first call,
connections between ranks, and the schedule's compiled code.

Memory is measured: the most that torch allocates at once beside the weights during the trials of one
layer on one rank, what is left afterwards, and by how much the process grew. Not in it are a kernel's own
workspace, and what torch takes on a GPU alone: to compare two slabs in discovery, as much as one of them.

    python benchmarks/self_test.py
    python benchmarks/self_test.py --start 6     # starts of real servers, with the self-test and without
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

import psutil
from machine import machine
from rich.console import Console
from rich.table import Table
from self_test_layers import HostTimes, host_times
from self_test_start import print_starts
from self_test_trial import SMALL, Size, Trial, Trials, run_trials

from ep_rebalance.offline.hardware_table import hardware_names
from ep_rebalance.offline.step_time import Hardware, load_hardware

SIZES = (
    Size(name="EP32", ranks=32, slots=9),
    Size(name="EP8", ranks=8, slots=32),
)
UNQUANTISED = Size(name="EP32, bfloat16", ranks=32, slots=9, scaled=False)
"""Only its memory: vLLM's CPU lays unquantised weights out anew, which writes all of them."""

MOST_SECONDS, MOST_BYTES = 2.0, 200e6
LAUNCH_SECONDS = 1e-5
"""Assumed for an operation of torch on a GPU, the Python around it included."""
EXCHANGE_SECONDS = 1e-4
"""Assumed for a collective of the device without its bytes."""
KERNEL_EXCHANGES = 2
"""Of a call of the kernel: tokens go to their experts and come back."""
KERNEL_OPERATIONS = 20
"""Assumed for a call of the kernel: sorting, quantisation, two multiplications, a sum, what is between."""
COMPARISONS = 3
"""Operations of a comparison of two slabs: compare, reduce, read."""
VERDICTS = 3
"""Times that ranks tell each other whether they go on (`engines/vllm/movable_experts.py`)."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", help="of the trials; two ranks need two GPUs (default cpu)")
    add(
        "--hardware",
        default="h100-sxm",
        help=f"{', '.join(hardware_names())}, or a file of that form (default h100-sxm)",
    )
    add(
        "--start",
        type=int,
        metavar="N",
        help="time N starts of a real server of either kind instead",
    )
    add("--port", type=int, default=8300, help="of those servers (default 8300)")
    add("--rehearse", action="store_true", help="run it all with small layers")
    return parser.parse_args()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Seconds of a part of the self-test; the module says where each column comes from."""

    name: str
    counted: str
    host: float = 0.0
    gathers: float = 0.0
    memory: float = 0.0
    launches: float = 0.0
    link: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.columns)

    @property
    def columns(self) -> tuple[float, ...]:
        return self.host, self.gathers, self.memory, self.launches, self.link


COLUMNS = tuple(field.name for field in fields(Part))[2:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Puts the parts together."""

    size: Size
    host: HostTimes
    trials: Trials
    hardware: Hardware

    def parts(self) -> list[Part]:
        """In the order of a start."""
        layers, slabs = self.size.layers, self.host.slabs
        expert = self.trials.expert_bytes
        between = self.trials.between
        others = self.size.ranks - 1
        listed = [
            Part(name="methods looked up", counted=f"{layers} layers", host=self.host.listed),
            Part(
                name="first runs",
                counted=f"{layers} calls",
                host=self.host.first_runs,
                memory=self._memory(layers * self.size.slots * expert),
                launches=layers * KERNEL_OPERATIONS * LAUNCH_SECONDS,
                link=layers * KERNEL_EXCHANGES * EXCHANGE_SECONDS,
            ),
            Part(
                name="discovery",
                counted=f"{layers} layers, {layers * slabs} comparisons",
                host=self.host.walk,
                memory=self._memory(2 * layers * expert),
                launches=COMPARISONS * layers * slabs * LAUNCH_SECONDS,
            ),
            Part(
                name="comparison of ranks",
                counted=f"1 gather, {self.size.ranks} ranks",
                host=self.host.compare,
                gathers=others * self.trials.summaries,
            ),
            Part(
                name="memory and moves described",
                counted=f"{layers} layers",
                host=self.host.memory + self.host.rounds,
            ),
            self._trial("trial on each rank", self.trials.alone),
        ]
        if between is not None:
            listed.append(self._trial("move between ranks", between))
        told = VERDICTS * others * self.trials.verdict
        return [*listed, Part(name="verdicts", counted=f"{VERDICTS} gathers", gathers=told)]

    def _trial(self, name: str, trial: Trial) -> Part:
        kinds = self.host.kinds
        collectives = trial.exchanges + KERNEL_EXCHANGES * trial.calls
        operations = trial.operations + KERNEL_OPERATIONS * trial.calls
        return Part(
            name=name,
            counted=f"{trial.calls} calls, {trial.operations:,} operations, "
            f"{trial.moved / 1e9:.1f} + {trial.read / 1e9:.1f} GB, "
            f"{trial.exchanges + trial.tells} collectives",
            host=kinds * trial.calls * self.host.first_runs / self.size.layers,
            gathers=kinds * trial.tells * (self.size.ranks - 1) * self.trials.tell,
            memory=kinds * self._memory(trial.moved + trial.read),
            launches=kinds * operations * LAUNCH_SECONDS,
            link=kinds * (trial.sent / self.hardware.internode + collectives * EXCHANGE_SECONDS),
        )

    def _memory(self, moved: float) -> float:
        return moved / self.hardware.memory_bytes_per_second


def print_time(size: Size, parts: Sequence[Part], console: Console) -> None:
    """All parts and their sum."""
    table = Table(
        title=f"{size.name}: {size.slots} experts a rank, {size.layers} layers; milliseconds"
    )
    for heading in ("part", "counted", *COLUMNS, "sum"):
        table.add_column(heading, justify="left" if heading in ("part", "counted") else "right")
    for part in parts:
        table.add_row(part.name, part.counted, *map(_milliseconds, (*part.columns, part.seconds)))
    sums = [sum(column) for column in zip(*(part.columns for part in parts), strict=True)]
    table.add_section()
    table.add_row("together", "", *map(_milliseconds, (*sums, sum(sums))))
    console.print(table)
    console.print(
        f"{size.name}: {sum(sums):.2f} s of the {MOST_SECONDS:g} s allowed", highlight=False
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds else ""


def print_memory(measured: dict[Size, Trials], console: Console) -> None:
    """Of either trial."""
    table = Table(title="MB beside the weights, measured at the true size")
    headings = (
        "case",
        "expert",
        "trial",
        "at most",
        "process grew",
        "afterwards",
        "verdict",
        "seconds here",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("case", "trial") else "right")
    for size, trials in measured.items():
        for name, trial in (("on each rank", trials.alone), ("between ranks", trials.between)):
            if trial is not None:
                table.add_row(
                    size.name,
                    f"{trials.expert_bytes / 1e6:.1f}",
                    name,
                    f"{trial.peak / 1e6:.1f}",
                    f"{trial.resident / 1e6:.1f}" if trial.resident else "",
                    f"{trial.left / 1e6:.1f}",
                    trial.verdict,
                    f"{trial.seconds:.1f}",
                )
    console.print(table)
    most = max(
        trial.peak
        for size, trials in measured.items()
        if size.scaled
        for trial in (trials.alone, trials.between)
        if trial is not None
    )
    console.print(
        f"FP8: {most / 1e6:.1f} MB of the {MOST_BYTES / 1e6:.0f} MB allowed", highlight=False
    )


def print_parts(options: argparse.Namespace, console: Console) -> None:
    """Measure and print."""
    name, hardware = load_hardware(options.hardware)
    measured: dict[Size, Trials] = {}
    for size in (SMALL,) if options.rehearse else SIZES:
        host = host_times(size)
        measured[size] = run_trials(size, host.summaries, options.device)
        estimate = Estimate(size=size, host=host, trials=measured[size], hardware=hardware)
        print_time(size, estimate.parts(), console)
    if not options.rehearse:
        measured[UNQUANTISED] = run_trials(UNQUANTISED, [], options.device)
    print_memory(measured, console)
    console.print(
        f"computed with {name}: {hardware.memory_bytes_per_second / 1e12:.2f} TB/s of memory, "
        f"{hardware.internode / 1e9:.0f} GB/s between nodes (assumed: offline/hardware.yaml), "
        f"{1e6 * LAUNCH_SECONDS:.0f} us a launch, {1e6 * EXCHANGE_SECONDS:.0f} us a collective, "
        f"{KERNEL_OPERATIONS} operations a kernel call (assumed)",
        highlight=False,
    )


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console(width=150)
    load = psutil.getloadavg()[0]
    if options.start:
        print_starts(options.start, options.port, console)
    else:
        print_parts(options, console)
    described = ", ".join(f"{name} {value}" for name, value in machine().items())
    console.print(f"{described}; load when it began {load:.1f}", highlight=False)


if __name__ == "__main__":
    main()
