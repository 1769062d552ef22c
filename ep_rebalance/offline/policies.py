"""Replay policies: the server's policies, and the peers that they are compared with.

An entry names its peer and does not import it: texts are made of entries where nothing is replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ep_rebalance.policies import POLICIES, Line, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPolicy:
    """What decides where experts sit.

    name: on the command line and in reports.
    summary: a clause without a semicolon.
    line: how reports draw it.
    subject: of the verdict's sentence; "" for what the others are compared with.
    setting: what `planner.policy` calls it, if it plans in the server's loop; else None.
    peer: `module:Class`. A `peers.Peer` that serves, if it does not plan in the loop; else "".
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
    peer: str = ""
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


_PEERS = (
    ReplayPolicy(
        name="vllm-eplb",
        summary="vLLM's balancer (--enable-eplb) with its timer, window, even split and transfers",
        line=Line("light-dark(#7a3a94, #c99bdc)", (14, 3, 6, 3)),
        subject="vLLM's balancer",
        peer="ep_rebalance.offline.vllm_eplb:VllmEplb",
        engine_policy="ep_rebalance.engines.vllm.seams.eplb_policy:rebalance_experts",
        needs="vLLM",
    ),
    ReplayPolicy(
        name="static",
        summary="placed once, by the first window of load",
        line=Line("#cc79a7", (10, 3, 3, 3)),
        subject="placing the experts once",
        plans=True,
        peer="ep_rebalance.offline.peers:PlacedOnce",
    ),
    ReplayPolicy(
        name="none",
        summary="as the engine loads the experts (contiguous), nothing moves",
        line=POLICIES["none"].line,
        peer="ep_rebalance.offline.peers:Contiguous",
        as_loaded=True,
    ),
    ReplayPolicy(
        name="recorded",
        summary="what the recorded server served",
        line=Line("light-dark(#3b9bd6, #56b4e9)", (16, 4)),
        subject="serving as recorded",
        peer="ep_rebalance.offline.peers:AsRecorded",
        as_loaded=True,
    ),
    ReplayPolicy(
        name="hindsight",
        summary="knows the load before it comes: a bound that no server can reach",
        line=Line("#009e73", (6, 2, 2, 2, 2, 2)),
        plans=True,
        foresees=True,
        peer="ep_rebalance.offline.peers:Hindsight",
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
