"""The steps, in the order in which they are taken."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Device = Literal["cuda", "cpu"]

MODULES = "gpu_kit.steps"
ALWAYS = "machine"
SECONDS_TO_TELL = 10.0
"""That a step has left when it ends what it started."""

NCCL = {
    "LD_PRELOAD": "{site}/libnccl.so.2",
    "VLLM_NCCL_SO_PATH": "{site}/libnccl.so.2",
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_MAX_CTAS": "4",
}
"""Load c's library in place of PyTorch's, and two ranks on one GPU."""

STEP_PATH = (
    "tests/gpu/test_device_routing.py",
    "tests/gpu/test_device_host_memory.py",
    "tests/gpu/test_device_packing.py",
    "tests/gpu/test_device_audit.py",
)
LOOP = "tests/gpu/test_device_migration.py"
REPLICAS = ("--redundant", "4")
TRIAL = "tests/gpu/test_device_quantised.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One program with a time limit.

    group: the name by which several are chosen. command: a module and its arguments.
    loads: what must be unpacked. environment: added to the driver's; values may name {site}, {out},
    {root} and {device}, as arguments may; these also {seconds}, a little less than the limit.
    """

    name: str
    group: str
    command: tuple[str, ...]
    seconds: float
    loads: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_gpu: bool = False

    def argv(self, values: Mapping[str, str]) -> list[str]:
        """Without the current folder on the path: its `ep_rebalance` is not the one installed."""
        seconds = str(self.seconds - SECONDS_TO_TELL)
        values = {**values, "seconds": seconds}
        module, *arguments = (word.format_map(values) for word in self.command)
        return [sys.executable, "-P", "-m", module, *arguments]


def _unpack(load: str) -> Step:
    return Step(
        name=f"unpack-{load}",
        group=load,
        command=(f"{MODULES}.unpack", load, "--loads", "{loads}", "--site", "{site}"),
        seconds=90,
    )


def _tests(
    name: str,
    group: str,
    seconds: float,
    *arguments: str,
    nccl: bool = False,
    loads: tuple[str, ...] = ("b",),
) -> Step:
    return Step(
        name=name,
        group=group,
        command=(f"{MODULES}.tests", *arguments),
        seconds=seconds,
        loads=(*loads, "c") if nccl else loads,
        environment=NCCL if nccl else {},
        needs_gpu=nccl,
    )


def _engine(
    name: str, seconds: float, *arguments: str, nccl: bool = False, **environment: str
) -> Step:
    return Step(
        name=name,
        group="c" if nccl else "a",
        command=(
            *(f"{MODULES}.engine", "--device", "{device}", "--backend", "nccl" if nccl else "gloo"),
            *("--seconds", "{seconds}", *arguments),
        ),
        seconds=seconds,
        loads=("a", "b", "c") if nccl else ("a", "b"),
        environment=(NCCL if nccl else {}) | environment,
        needs_gpu=nccl,
    )


def _quantised(name: str, expert_format: str, *, untried: bool = False) -> Step:
    """On CPU the reference is on no list, and needs the trial."""
    more = ("--untried",) if untried else ()
    step = _engine(name, 150, "--format", expert_format, *more)
    return replace(step, group="quantised", needs_gpu=untried)


STEPS = (
    Step(
        name="machine",
        group=ALWAYS,
        command=(f"{MODULES}.machine", "--device", "{device}"),
        seconds=60,
    ),
    _unpack("b"),
    Step(
        name="ranks-gloo",
        group="b",
        command=(
            f"{MODULES}.ranks",
            "--device",
            "{device}",
            "--backend",
            "gloo",
            "--seconds",
            "{seconds}",
        ),
        seconds=60,
        loads=("b",),
    ),
    _tests("kernels", "b", 240, "tests/kernels"),
    _tests("step-path", "b", 60, *STEP_PATH, "-k", "{device}"),
    _tests("loop-gloo", "b", 150, LOOP, "-k", "{device} and gloo"),
    Step(
        name="memcheck",
        group="b",
        command=(f"{MODULES}.sanitizer", "memcheck"),
        seconds=120,
        loads=("b",),
        needs_gpu=True,
    ),
    _unpack("a"),
    Step(
        name="hello",
        group="a",
        command=(f"{MODULES}.hello", "--device", "{device}"),
        seconds=90,
        loads=("a", "b"),
    ),
    _engine("engine-v2", 180, "--runner", "v2"),
    _engine("engine-v1", 150, "--runner", "v1"),
    _tests("trial", "quantised", 210, TRIAL, "-k", "{device}", loads=("a", "b")),
    _quantised("quantised-block", "fp8_block"),
    _quantised("quantised-tensor", "fp8_tensor"),
    _quantised("untried-block", "fp8_block", untried=True),
    _quantised("untried-tensor", "fp8_tensor", untried=True),
    _unpack("c"),
    Step(
        name="ranks-nccl",
        group="c",
        command=(
            f"{MODULES}.ranks",
            "--device",
            "{device}",
            "--backend",
            "nccl",
            "--seconds",
            "{seconds}",
        ),
        seconds=60,
        loads=("b", "c"),
        environment=NCCL,
        needs_gpu=True,
    ),
    _tests("loop-nccl", "c", 120, LOOP, "-k", "{device} and nccl", nccl=True),
    _engine("engine-nccl", 150, nccl=True),
    _engine("engine-nccl-v1", 150, "--runner", "v1", nccl=True),
    _engine("engine-replicas", 150, *REPLICAS, nccl=True),
    _engine("engine-own-counts", 150, *REPLICAS, "--split", "own_counts", nccl=True),
    _engine("engine-drafts", 180, "--drafts", "--runner", "v1", nccl=True),
    _engine("engine-sync-nccl", 150, nccl=True, VLLM_GPU_SYNC_CHECK="error"),
    _engine("engine-graphs", 180, "--graphs", nccl=True),
    _engine("engine-graphs-v1", 180, "--graphs", "--runner", "v1", nccl=True),
    _engine("engine-graphs-replicas", 180, "--graphs", *REPLICAS, nccl=True),
    Step(
        name="benchmarks",
        group="bench",
        command=(
            *(f"{MODULES}.benchmarks", "--device", "{device}", "--seconds", "{seconds}"),
            *("--json", "{out}/kernels.json"),
        ),
        seconds=240,
        loads=("b",),
    ),
    Step(
        name="hardware",
        group="bench",
        command=(f"{MODULES}.hardware",),
        seconds=60,
        loads=("b",),
    ),
    Step(
        name="racecheck",
        group="bench",
        command=(f"{MODULES}.sanitizer", "racecheck"),
        seconds=120,
        loads=("b",),
        needs_gpu=True,
    ),
)


class UnknownStep(ValueError):
    """Neither a step nor a group is called so."""


def chosen(names: Iterable[str], steps: Iterable[Step] = STEPS) -> list[Step]:
    """Steps by their names or groups, in the order of `steps`; all if there is no name.

    What the machine is stands first in any case. Raises UnknownStep.
    """
    steps, wanted = list(steps), set(names)
    unknown = wanted - {s.name for s in steps} - {s.group for s in steps}
    if unknown:
        raise UnknownStep(f"there is no step or group {', '.join(sorted(unknown))}")
    return [s for s in steps if not wanted or s.group == ALWAYS or {s.name, s.group} & wanted]
