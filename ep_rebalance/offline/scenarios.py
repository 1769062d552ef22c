"""Scenarios from traces, settings and the arguments of a command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

from ep_rebalance.config import LinksConfig, RebalanceConfig
from ep_rebalance.load.trace import SUFFIX, TraceHead, TraceReader
from ep_rebalance.offline.eplb_settings import Eplb, eplb_settings
from ep_rebalance.offline.expert_size import shape_of
from ep_rebalance.offline.policies import REPLAY_POLICIES, SERVER_POLICIES, ReplayPolicy
from ep_rebalance.offline.run import Scenario, contiguous_placement, with_planner
from ep_rebalance.offline.step_time import (
    Hardware,
    MeasuredSteps,
    ModelledSteps,
    StepTime,
    load_hardware,
)
from ep_rebalance.planning.expert_time import ExpertTime, unlearned
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.planning.problem import Planner
from ep_rebalance.policies import POLICIES
from ep_rebalance.topology import Topology


def open_traces(paths: Sequence[Path]) -> list[TraceReader]:
    """Readers of all files, also those in folders. Raises ValueError if there is none."""
    files = [
        file
        for path in paths
        for file in (sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path])
    ]
    if not files:
        missing = f"no *{SUFFIX} in {', '.join(map(str, paths))}" if paths else "no trace is named"
        raise ValueError(
            f"{missing}; name one, or the folder of a server's trace.path, or make one with `ep-rebalance "
            "convert` or `ep-rebalance record`"
        )
    return [TraceReader(file) for file in files]


def scenario(
    head: TraceHead,
    settings: RebalanceConfig,
    policy: str,
    ranks: int,
    redundant: int,
    ranks_per_node: int | None = None,
    hardware: str | Hardware | None = None,
    expert_time: ExpertTime | None = None,
    eplb: Mapping[str, object] | None = None,
    bytes_per_parameter: float | None = None,
) -> Scenario:
    """One way to serve the recorded load. Raises ValueError if it is impossible.

    settings: of the server that is replayed.
    policy: of REPLAY_POLICIES.
    ranks: EP ranks.
    redundant: slots of a layer beyond one for each expert, on all ranks together.
    ranks_per_node: as recorded by default, or 8.
    hardware: a row of the table that ships, a file, or its figures; None scales the recorded step times.
    expert_time: what of a step waits for experts; by default, `decision.expert_time_fraction`, and what is
        assumed if that is to be learned.
    eplb: settings of vLLM's balancer, see `EplbSettings`, for policy vllm-eplb.
    bytes_per_parameter: size of an expert's weights; by default, that of a known model, else the setting's.
    """
    if policy not in REPLAY_POLICIES:
        raise ValueError(f"there is no policy {policy!r}; choose from {', '.join(REPLAY_POLICIES)}")
    planner: Planner | None = None
    if policy in SERVER_POLICIES:
        planner = _planner(SERVER_POLICIES[policy])
    if redundant != settings.planner.redundant_experts:
        settings = with_planner(settings, redundant_experts=redundant)
    topology = _topology(head, settings.links, ranks, ranks_per_node)
    made = Scenario(
        policy=policy,
        planner=planner,
        config=settings,
        topology=topology,
        step_time=_step_time(head, settings, topology, hardware, expert_time, bytes_per_parameter),
        eplb=_eplb(head, REPLAY_POLICIES[policy], eplb or {}),
    )
    if policy != "recorded":
        contiguous_placement(head, made)
    elif ranks != head.ep_size or redundant != head.slots - head.experts:
        raise ValueError(
            "policy recorded needs the recorded numbers of ranks and redundant experts"
        )
    return made


def _planner(policy: str) -> Planner:
    """A planner by its name in the settings. Raises ValueError if a package that it needs is missing."""
    with _needing(policy, POLICIES[policy].needs):
        return planner_of(policy)


def _eplb(head: TraceHead, policy: ReplayPolicy, given: Mapping[str, object]) -> Eplb | None:
    shape = shape_of(head)
    groups = shape.expert_groups if shape else 1
    settings = eplb_settings(given, experts=head.experts, groups=groups)
    if not policy.engine_policy:
        return None
    with _needing(policy.name, policy.needs):
        return Eplb(policy=resolve_name(policy.engine_policy), settings=settings)


@contextmanager
def _needing(policy: str, package: str) -> Iterator[None]:
    """Raises ValueError if an import fails for want of a package; "" if none is needed."""
    try:
        yield
    except ImportError as error:
        if not package:
            raise
        others = ", ".join(name for name, one in REPLAY_POLICIES.items() if not one.needs)
        raise ValueError(
            f"policy {policy} needs {package} in this environment ({error}); without it there are {others}"
        ) from None


def _topology(
    head: TraceHead, links: LinksConfig, ranks: int, ranks_per_node: int | None
) -> Topology:
    """Links as configured, else as the recorded server measured them."""
    topology = Topology.node_by_node(ranks, 8 if ranks_per_node is None else ranks_per_node)
    if ranks_per_node is None and ranks == head.ep_size:
        topology = Topology(node_of_rank=tuple(head.node_of_rank))
    if head.bytes_per_second:
        local, intranode, internode = head.bytes_per_second
        topology = replace(
            topology,
            bytes_per_second=(local, intranode, internode),
            round_seconds=head.round_seconds,
        )
    return topology.with_links(
        intranode=links.intranode_bytes_per_second,
        internode=links.internode_bytes_per_second,
        round_seconds=links.round_seconds,
    )


def _step_time(
    head: TraceHead,
    settings: RebalanceConfig,
    topology: Topology,
    hardware: str | Hardware | None,
    expert_time: ExpertTime | None,
    bytes_per_parameter: float | None,
) -> StepTime:
    waiting = expert_time or unlearned(settings.decision.expert_time_fraction)
    if hardware is None:
        return MeasuredSteps.of(waiting)
    if not all(head.expert_bytes) or not head.hidden_size:
        raise ValueError(
            "the trace does not say how large an expert is (it was converted), and no known model has its "
            "numbers of layers and experts, so --hardware has nothing to compute with: add --model CONFIG (a "
            "folder or config.json), or --expert-bytes and --hidden-size"
        )
    known = shape_of(head) or settings.hardware
    return ModelledSteps(
        hardware=load_hardware(hardware)[1] if isinstance(hardware, str) else hardware,
        topology=topology,
        expert_bytes_L=tuple(head.expert_bytes),
        bytes_per_parameter=bytes_per_parameter or known.bytes_per_parameter,
        hidden_size=head.hidden_size,
        top_k=head.top_k,
        fraction=waiting.fraction,
    )
