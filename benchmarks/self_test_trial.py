"""The trials of moves on one layer of a true size, without an engine: what they do, what memory they take.

Two ranks, a process each. The kernel is a stand-in that looks at a few bytes of each slab: how often it is
called is counted, and what a call costs is worked out elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ep_rebalance.migration import compile_schedule
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.proof import Verdict, prove_moves, ring_ids
from ep_rebalance.migration.slabs import NamedTensor, SlabTensor, split_by_expert
from ep_rebalance.migration.trial_move import prove_move
from ep_rebalance.migration.verdicts import Finding

RANKS = 2
BLOCK = 128
"""Rows and columns that share a scale."""
LOOKED_AT = 64
"""Bytes of a slab that the stand-in reads."""
GATHERS = 50
FINDING = (Finding("model.layers.0.mlp.experts", Verdict.EXACT, ("w13_weight", "w2_weight")),)
"""What a rank tells the others of a trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model on some ranks.

    slots: of a rank in each layer. scaled: FP8 with a scale per block, else bfloat16.
    """

    name: str
    ranks: int
    slots: int
    layers: int = 58
    hidden: int = 7168
    intermediate: int = 2048
    top_k: int = 8
    scaled: bool = True

    def tensors(self, seed: int, device: torch.device) -> list[NamedTensor]:
        """Of one layer on one rank, random bytes."""
        generator = torch.Generator(device).manual_seed(seed)
        weight = torch.float8_e4m3fn if self.scaled else torch.bfloat16
        shapes = {
            "w13": (2 * self.intermediate, self.hidden),
            "w2": (self.hidden, self.intermediate),
        }
        found = []
        for name, (rows, columns) in shapes.items():
            kinds = {f"{name}_weight": (weight, rows, columns)}
            if self.scaled:
                scales = torch.float32, rows // BLOCK, columns // BLOCK
                kinds[f"{name}_weight_scale_inv"] = scales
            for kind, (dtype, *sizes) in kinds.items():
                shape = self.slots, *sizes
                tensor = _random_bytes(shape, dtype, generator)
                found.append(NamedTensor(kind, tensor))
        return found


SMALL = Size(name="small", ranks=RANKS, slots=3, layers=2, hidden=1024, intermediate=512, top_k=2)
"""Whatever is made once is made for it."""


def _random_bytes(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    made = torch.empty(*shape, dtype=dtype, device=generator.device)
    made.view(-1).view(torch.int64).random_(generator=generator)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one rank did in one trial.

    verdict: what came of it. seconds: here, copies and all. resident: by how many bytes the process grew at
    most; 0 if that cannot be told. peak, left: most bytes that were allocated at once beside the weights,
    and those afterwards, of a second trial. operations, moved: of torch and of packing, and the bytes that
    they read and wrote. tells, exchanges: collectives on the host and on the device. sent: bytes to the
    other rank. calls, read: of the kernel, and the bytes of the experts that it was asked for.
    """

    verdict: str
    seconds: float
    resident: int
    peak: int
    left: int
    operations: int
    moved: int
    tells: int
    exchanges: int
    sent: int
    calls: int
    read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """expert_bytes: packed. summaries, verdict, tell: seconds of a collective between two processes: of
    what layers consist of, of a finding, and of a few numbers. between: None if there is no second GPU.
    """

    expert_bytes: int
    summaries: float
    verdict: float
    tell: float
    alone: Trial
    between: Trial | None


class Meter(TorchDispatchMode):
    """Counts what is asked of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.moved = self.tells = self.exchanges = self.sent = 0
        self._paused = False

    def add(self, operations: int, moved: int) -> None:
        """Of a kernel."""
        self.operations += operations
        self.moved += moved

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self._count(func, [*_tensors(args), *_tensors(kwargs)], _tensors(result))
        return result

    def _count(self, func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        if func.namespace == "c10d" and "allgather" in str(func):
            self.tells += 1
        elif func.namespace == "c10d":
            self.exchanges += 1
            self.sent += given[-1].nbytes
        elif not func.is_view and not str(func).startswith("aten.empty"):
            known = {tensor.data_ptr() for tensor in given}
            others = [tensor for tensor in made if tensor.data_ptr() not in known]
            self.add(1, sum(tensor.nbytes for tensor in [*given, *others]))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class CountedMemory(ExpertMemory):
    """Counts as a GPU would do it, where each call is a pass over the bytes or two."""

    def __init__(self, layers: Sequence[Sequence[SlabTensor]], meter: Meter) -> None:
        super().__init__(layers)
        self._meter = meter

    def read(
        self,
        layer: int,
        slot: int,
        start: int,
        out: torch.Tensor,
        checksum: torch.Tensor | None = None,
    ) -> None:
        size = self.expert_bytes_L[layer]
        summed = 0 if checksum is None or len(out) == size else size
        self._meter.add(2 if summed else 1, 2 * len(out) + summed)
        with self._meter.paused():
            super().read(layer, slot, start, out, checksum)

    def write(self, layer: int, slot: int, packed: torch.Tensor) -> None:
        self._meter.add(1, 2 * self.expert_bytes_L[layer])
        with self._meter.paused():
            super().write(layer, slot, packed)

    def checksum_packed(self, layer: int, packed: torch.Tensor, checksum: torch.Tensor) -> None:
        self._meter.add(1, self.expert_bytes_L[layer])
        with self._meter.paused():
            super().checksum_packed(layer, packed, checksum)


class Kernel:
    """Stands in for an engine's."""

    def __init__(self, slabs: Sequence[SlabTensor], meter: Meter) -> None:
        self._seen = [slab.bytes_EB[:, :LOOKED_AT] for slab in slabs]
        self._expert_bytes = sum(slab.size for slab in slabs)
        self._meter = meter
        self.calls = self.read = 0

    def compute(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Exact, since whole numbers are added."""
        with self._meter.paused():
            self.calls += 1
            self.read += len(ids_TK.unique()) * self._expert_bytes
            parts = [seen[ids_TK.long()].float().sum(1) for seen in self._seen]
            return torch.cat(parts, 1)


def allocated(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes of torch: the most at once meanwhile, and those afterwards, above those before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        most = torch.cuda.max_memory_allocated(device) - before
        return most, torch.cuda.memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    most = now = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most, now


def grown(work: Callable[[], object]) -> int:
    """Bytes of the process at most meanwhile, above those before; 0 if the kernel does not say."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)
    forgotten = _forget_resident_peak()
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before if forgotten else 0


def _forget_resident_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def measured(
    prove: Callable[[CountedMemory, Kernel], Any],
    slabs: Sequence[SlabTensor],
    device: torch.device,
) -> Trial:
    """Twice the same trial: what watches allocations grows, too."""
    meter = Meter()
    memory, kernel = CountedMemory([slabs], meter), Kernel(slabs, meter)
    verdicts = []

    def counted() -> None:
        with meter:
            verdicts.append(prove(memory, kernel).verdict.name.lower())
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    began = time.perf_counter()
    resident = grown(counted)
    seconds = time.perf_counter() - began
    other = Meter()
    again = CountedMemory([slabs], other), Kernel(slabs, other)
    peak, left = allocated(lambda: prove(*again), device)
    return Trial(
        verdict=verdicts[0],
        seconds=seconds,
        resident=resident,
        peak=peak,
        left=left,
        operations=meter.operations,
        moved=meter.moved,
        tells=meter.tells,
        exchanges=meter.exchanges,
        sent=meter.sent,
        calls=kernel.calls,
        read=kernel.read,
    )


def run_rank(
    rank: int, ranks: int, size: Size, summaries: Any, device: str, store: str, answers: Any
) -> None:
    """Rank 0's answer counts."""
    torch.set_num_threads(1)
    on = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    dist.init_process_group(
        "nccl" if on.type == "cuda" and ranks > 1 else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
    )
    host_group = dist.new_group(backend="gloo")
    compile_schedule()
    _run_both(SMALL, on, host_group)
    slabs, alone, between = _run_both(size, on, host_group)
    numbers = torch.zeros(5, dtype=torch.float64)
    gathered = [torch.empty_like(numbers) for _ in range(ranks)]
    objects = [None] * ranks
    trials = Trials(
        expert_bytes=sum(slab.size for slab in slabs),
        summaries=_median(lambda: dist.all_gather_object(objects, summaries, group=host_group)),
        verdict=_median(lambda: dist.all_gather_object(objects, FINDING, group=host_group)),
        tell=_median(lambda: dist.all_gather(gathered, numbers, group=host_group)),
        alone=alone,
        between=between if ranks > 1 else None,
    )
    if rank == 0:
        answers.append(trials)
    dist.barrier(group=host_group)
    dist.destroy_process_group()


def _run_both(
    size: Size, device: torch.device, host_group: dist.ProcessGroup
) -> tuple[Sequence[SlabTensor], Trial, Trial]:
    """Slabs of the layer, and its trials."""
    slabs = split_by_expert(size.tensors(dist.get_rank(), device), size.slots).slabs
    ids_TK = ring_ids(size.slots, size.top_k).to(device)

    def alone(_: CountedMemory, kernel: Kernel) -> Any:
        return prove_moves(kernel.compute, slabs, ids_TK)

    def between(memory: CountedMemory, kernel: Kernel) -> Any:
        group = dist.group.WORLD
        return prove_move(memory, 0, kernel.compute, ids_TK, group=group, host_group=host_group)

    return slabs, measured(alone, slabs, device), measured(between, slabs, device)


def _median(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(GATHERS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[GATHERS // 2]


def run_trials(size: Size, summaries: Any, device: str) -> Trials:
    """Both trials on two ranks, or the first alone where there is one GPU."""
    ranks = min(RANKS, torch.cuda.device_count()) if device == "cuda" else RANKS
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as shared:
        answers = shared.list()
        arguments = ranks, size, summaries, device, f"{folder}/store", answers
        mp.spawn(run_rank, arguments, nprocs=ranks)
        (trials,) = answers
    return trials
