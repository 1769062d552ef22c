"""Small traces for tests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import (
    Record,
    RecordedPlacement,
    RecordedSnapshot,
    TraceHead,
    TraceReader,
    TraceWriter,
)
from ep_rebalance.offline.generated_load import Timing, generate_steps, synthetic_domains
from ep_rebalance.placement import Placement


def head_of(
    *, layers: int = 2, experts: int = 8, ranks: int = 2, redundant: int = 0, **changes: object
) -> TraceHead:
    fields: dict[str, object] = {
        "model": "tiny",
        "layers": layers,
        "experts": experts,
        "top_k": 2,
        "ep_size": ranks,
        "slots": experts + redundant,
        "node_of_rank": [0] * ranks,
        "expert_bytes": [1000] * layers,
        "hidden_size": 64,
        "engine": "vllm 0.32.0",
        "plugin_version": "0.1.0",
        "started": 1.0,
        "config": load_config({"planner": {"redundant_experts": redundant}}).as_dict(),
    }
    return TraceHead(**fields | changes)  # type: ignore[arg-type]


REPLAYED = head_of(layers=3, experts=32, ranks=4, redundant=4, origin="generated")
"""Of a trace in which experts are worth moving."""


def contiguous(head: TraceHead, generation: int = 0, step: int = 0) -> RecordedPlacement:
    placement = Placement.contiguous(
        num_layers=head.layers,
        num_experts=head.experts,
        num_ranks=head.ep_size,
        num_redundant=head.slots - head.experts,
    )
    return RecordedPlacement(
        placement=placement,
        quotas_LP=placement.even_quotas_LP(),
        generation=generation,
        step=step,
        time=1.0 + step,
    )


def snapshots(head: TraceHead, count: int, *, seed: int = 0, pairs: int = 40_000) -> Iterator:
    """Skewed load that drifts slowly; each of 16 steps."""
    domains = synthetic_domains(domains=3, layers=head.layers, experts=head.experts, seed=seed)
    drawn = generate_steps(domains, Timing(drift=1.0), pairs_per_step=pairs, seed=seed)
    for number, counts_LE in enumerate(islice(drawn, count)):
        yield RecordedSnapshot(
            counts_ALE=np.stack([counts_LE // 3, counts_LE - counts_LE // 3]).astype(np.uint32),
            step=16 * (number + 1),
            steps=16,
            step_seconds=0.05,
            time=1.0 + 0.8 * number,
            generation=0,
        )


def write_trace(folder: Path, head: TraceHead, count: int, *, seed: int = 0) -> Path:
    """A trace that begins with the contiguous placement."""
    writer = TraceWriter(folder, "load", head)
    for record in (contiguous(head), *snapshots(head, count, seed=seed)):
        writer.write(record)
    writer.close()
    return writer.files()[-1]


def same(one: Record, other: Record) -> bool:
    """Whether two records hold the same."""
    if isinstance(one, RecordedSnapshot) and isinstance(other, RecordedSnapshot):
        names = ("step", "steps", "step_seconds", "time", "generation", "agreed", "ended")
        alike = all(getattr(one, name) == getattr(other, name) for name in names)
        return alike and np.array_equal(one.counts_ALE, other.counts_ALE)
    if isinstance(one, RecordedPlacement) and isinstance(other, RecordedPlacement):
        names = ("generation", "step", "time", "placement")
        alike = all(getattr(one, name) == getattr(other, name) for name in names)
        return alike and np.array_equal(one.quotas_LP, other.quotas_LP)
    return False


def records_of(path: Path) -> list[Record]:
    return list(TraceReader(path))
