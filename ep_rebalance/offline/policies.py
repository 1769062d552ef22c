"""Replay policies: the server's policies, and the peers that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.offline.eplb_settings import Eplb
from ep_rebalance.offline.peers import AsRecorded, Contiguous, Hindsight, PlacedOnce, Serving
from ep_rebalance.offline.vllm_eplb import VllmEplb
from ep_rebalance.placement import Placement
from ep_rebalance.planning.expert_time import unlearned
from ep_rebalance.policies import POLICIES, Line, Policy
from ep_rebalance.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What a peer starts with.

    recorded: the placement at the beginning of the trace.
    contiguous: what the engine would load.
    expert_bytes_L: L sizes, bytes. One expert of each layer.
    eplb: of the scenario, see there.
    """

    recorded: Placement
    contiguous: Placement
    config: RebalanceConfig
    topology: Topology
    expert_bytes_L: Sequence[int]
    eplb: Eplb | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPolicy:
    """What decides where experts sit.

    name: on the command line and in reports.
    summary: a clause without a semicolon.
    line: how reports draw it.
    subject: of the verdict's sentence; "" for what the others are compared with.
    setting: what `planner.policy` calls it, if it plans in the server's loop; else None.
    peer: makes what serves, if it does not plan in the loop; else None.
    plans: whether a planner of ours, or vLLM's in our loop, finds its placements.
    foresees: whether it knows the load before it comes, so that no server can do it.
    as_loaded: whether experts stay where an engine put them, so that ranks may have unequally many slots.
    engine_policy: `module:function` of an engine's own policy (`EnginePolicy`) that the peer runs, or "".
    needs: a package that it needs and ep_rebalance does not, or "".
    """

    name: str
    summary: str
    line: Line
    subject: str = ""
    setting: str | None = None
    peer: Callable[[Beginning], Serving] | None = None
    plans: bool = False
    foresees: bool = False
    as_loaded: bool = False
    engine_policy: str = ""
    needs: str = ""

    @property
    def moves(self) -> bool:
        """Whether experts move while it serves, so that moves are counted."""
        return bool(self.setting or self.engine_policy)

    @property
    def splits_as_configured(self) -> bool:
        """Whether tokens are split as the plugin's settings say, and not as the engine splits them."""
        return not self.engine_policy


_OURS = ReplayPolicy(
    name="ours",
    summary="the plugin: few moves, made only if they save more than they cost",
    line=POLICIES["incremental"].line,
    subject="rebalancing",
    setting="incremental",
    plans=True,
)


def _eplb(begin: Beginning) -> VllmEplb:
    assert begin.eplb is not None
    return VllmEplb(
        begin.eplb,
        loaded=begin.contiguous,
        topology=begin.topology,
        expert_bytes_L=begin.expert_bytes_L,
        expert_time=unlearned(begin.config.decision.expert_time_fraction),
    )


_PEERS = (
    ReplayPolicy(
        name="vllm-eplb",
        summary="vLLM's balancer (--enable-eplb) with its timer, window, even split and transfers",
        line=Line("light-dark(#7a3a94, #c99bdc)", (14, 3, 6, 3)),
        subject="vLLM's balancer",
        peer=_eplb,
        engine_policy="ep_rebalance.engines.vllm.seams.eplb_policy:rebalance_experts",
        needs="vLLM",
    ),
    ReplayPolicy(
        name="static",
        summary="placed once, by the first window of load",
        line=Line("#cc79a7", (10, 3, 3, 3)),
        subject="placing the experts once",
        plans=True,
        peer=lambda begin: PlacedOnce(begin.contiguous, begin.config, begin.topology),
    ),
    ReplayPolicy(
        name="none",
        summary="as the engine loads the experts (contiguous), nothing moves",
        line=POLICIES["none"].line,
        peer=lambda begin: Contiguous(begin.contiguous),
        as_loaded=True,
    ),
    ReplayPolicy(
        name="recorded",
        summary="what the recorded server served",
        line=Line("light-dark(#3b9bd6, #56b4e9)", (16, 4)),
        subject="serving as recorded",
        peer=lambda begin: AsRecorded(begin.recorded, begin.config),
        as_loaded=True,
    ),
    ReplayPolicy(
        name="hindsight",
        summary="knows the load before it comes: a bound that no server can reach",
        line=Line("#009e73", (6, 2, 2, 2, 2, 2)),
        plans=True,
        foresees=True,
        peer=lambda begin: Hindsight(begin.contiguous, begin.config.planner, begin.topology),
    ),
)


def _in_the_loop(policy: Policy) -> ReplayPolicy:
    return ReplayPolicy(
        name=policy.name,
        summary=f"{policy.summary}, in the plugin's loop",
        line=policy.line,
        subject=f"policy {policy.name}",
        setting=policy.name,
        plans=True,
        needs=policy.needs,
    )


def _entries() -> list[ReplayPolicy]:
    """All policies. Where a server's policy and a peer share a name (`none`), the peer stands for both."""
    told = {_OURS.setting, *(peer.name for peer in _PEERS)}
    others = [_in_the_loop(policy) for policy in POLICIES.values() if policy.name not in told]
    return [_OURS, *others, *_PEERS]


REPLAY_POLICIES: Mapping[str, ReplayPolicy] = MappingProxyType(
    {policy.name: policy for policy in _entries()}
)

SERVER_POLICIES: Mapping[str, str] = MappingProxyType(
    {name: entry.setting for name, entry in REPLAY_POLICIES.items() if entry.setting}
)
"""The policies that plan in the server's loop, and what `planner.policy` calls each."""
