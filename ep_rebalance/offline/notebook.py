"""Placements and replays from a notebook: `from ep_rebalance import Placement, plan, replay`.

examples/notebook.ipynb uses all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import RecordedSnapshot, TraceReader, read_records
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.offline.expert_size import completed
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.offline.run import NothingRecorded, Replayed
from ep_rebalance.offline.run import replay as replay_records
from ep_rebalance.offline.scenarios import open_traces, scenario
from ep_rebalance.placement import Placement
from ep_rebalance.planning.incremental.planner import plan_incremental
from ep_rebalance.planning.problem import Budget, Problem
from ep_rebalance.topology import Topology

__all__ = ["Placement", "plan", "recorded_tokens", "replay"]


def plan(
    tokens: ArrayLike,
    *,
    ranks: int | None = None,
    redundant: int = 0,
    ranks_per_node: int = 8,
    current: Placement | None = None,
    max_moved: int | None = None,
) -> Placement:
    """Place experts so that ranks get equally many tokens.

    tokens: [L, E] or [W, L, E]. Tokens of each expert in each layer. With W windows, experts that are
        busy together are placed on different ranks.
    ranks: number of EP ranks; that of `current` if it is given.
    redundant: slots of a layer beyond one for each expert, on all ranks together.
    ranks_per_node: ranks. A move between nodes costs as much more as their link is slower.
    current: the placement to improve by few moves. Without it, all experts are placed from scratch.
    max_moved: slots of a layer that may change, on average; an eighth of them by default. Only with
        `current`.

    Raises ValueError for sizes that do not fit together.

    >>> import numpy as np
    >>> from ep_rebalance import plan
    >>> tokens_LE = np.array([[90, 80, 10, 10]])
    >>> plan(tokens_LE, ranks=2).slots_LP.reshape(2, 2).tolist()
    [[0, 3], [2, 1]]
    """
    load = _load(tokens)
    layers, experts = load.load_LE.shape
    if current is None:
        if ranks is None:
            raise ValueError("say how many EP ranks there are: ranks=8")
        current = Placement.contiguous(
            num_layers=layers, num_experts=experts, num_ranks=ranks, num_redundant=redundant
        )
        return place_anew(load, current, Topology.node_by_node(current.num_ranks, ranks_per_node))
    if (current.num_layers, current.num_experts) != (layers, experts):
        raise ValueError(
            f"tokens are of {layers} layers with {experts} experts, the current placement of "
            f"{current.num_layers} with {current.num_experts}"
        )
    if ranks not in (None, current.num_ranks):
        raise ValueError(f"the current placement is of {current.num_ranks} ranks, not of {ranks}")
    slots = current.slots_LP.shape[1]
    moved = max(2, slots // 8) if max_moved is None else max_moved
    budget = Budget(max_moved_slots=moved * layers, max_arrivals=current.slots_per_rank)
    topology = Topology.node_by_node(current.num_ranks, ranks_per_node)
    return plan_incremental(Problem(load=load, current=current, topology=topology, budget=budget))


def replay(
    traces: str | Path | Sequence[str | Path],
    policy: str = "ours",
    *,
    ranks: int | None = None,
    redundant: int | None = None,
    ranks_per_node: int | None = None,
    eplb: Mapping[str, object] | None = None,
) -> Replayed:
    """Serve recorded load again, with any policy and sizes.

    traces: files of one server (*.eptrace), or folders of them.
    policy: one of those that `ep-rebalance replay --help` lists.
    ranks, redundant, ranks_per_node: as in `plan`; as recorded by default.
    eplb: for policy vllm-eplb, settings of vLLM's balancer, e.g. {"step_interval": 1000}.

    Raises TraceError for a file that is not a trace, ValueError for impossible sizes.
    """
    readers = _open(traces)
    head = completed(readers[0].head)
    copies = head.slots - head.experts if redundant is None else redundant
    settings = load_config(head.config)
    chosen = scenario(
        head, settings, policy, ranks or head.ep_size, copies, ranks_per_node, eplb=eplb
    )
    return replay_records(head, read_records(readers), chosen)


def recorded_tokens(traces: str | Path | Sequence[str | Path]) -> NDArray[np.int64]:
    """int64 [W, L, E]. The tokens of each expert in each recorded snapshot with tokens, as `plan` takes them.

    traces: files of one server (*.eptrace), or folders of them.

    Raises TraceError for a file that is not a trace, ValueError if no snapshot in them has tokens.
    """
    tokens = [
        record.counts_ALE.sum(axis=0, dtype=np.int64)
        for record in read_records(_open(traces))
        if isinstance(record, RecordedSnapshot) and record.counts_ALE.any()
    ]
    if not tokens:
        raise NothingRecorded("the trace holds no snapshot with tokens; record while it serves")
    return np.stack(tokens)


def _open(traces: str | Path | Sequence[str | Path]) -> list[TraceReader]:
    paths = [traces] if isinstance(traces, str | Path) else list(traces)
    return open_traces([Path(path) for path in paths])


def _load(tokens: ArrayLike) -> WindowLoad:
    tokens_WLE = np.asarray(tokens, dtype=np.float64)
    if tokens_WLE.ndim == 2:
        tokens_WLE = tokens_WLE[None]
    if tokens_WLE.ndim != 3 or not tokens_WLE.size:
        shape = list(tokens_WLE.shape)
        raise ValueError(f"tokens must be [layers, experts] or [windows, ...], not {shape}")
    if not np.isfinite(tokens_WLE).all() or tokens_WLE.min() < 0:
        raise ValueError("tokens must be finite and not negative")
    windows = len(tokens_WLE)
    return WindowLoad(tokens_WLE=tokens_WLE, weight_W=np.ones(windows), steps_W=np.ones(windows))
