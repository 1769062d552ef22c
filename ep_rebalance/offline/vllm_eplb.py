"""vLLM's balancer (`--enable-eplb`), as version 0.33 works, over a trace: `replay --policy vllm-eplb`.

The policy is the installed vLLM's own code. What is modelled here is `EplbState` around it
(vllm/distributed/eplb/eplb_state.py): a timer; a ring of the newest steps' counts per *slot*, all decoded
with the newest map, so that what was counted under an older one is credited to the wrong experts; tokens
split evenly over replicas; and transfers, layer by layer beside the steps or all at once between two.

A trace holds counts per expert and snapshot. Counts per slot and step are worked out from them: each step
of a snapshot has the same part of its tokens, of both phases, and an expert's slots in the map of that
step share them evenly. So nothing is known about single steps, or about steps in which one rank alone had
no tokens and kept its ring as it was. The timer begins with the trace. Plans take no time, as favours this
balancer. What it does on ROCm, and migration batching, are not modelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.offline.balancing import PlanMade
from ep_rebalance.offline.eplb_settings import Eplb, steps_before_first
from ep_rebalance.offline.eplb_transfers import LayerTransfers, layer_transfers
from ep_rebalance.offline.peers import Beginning
from ep_rebalance.offline.step_time import NOMINAL_STEP_SECONDS
from ep_rebalance.placement import Placement, RepeatingPlacement, imbalance_L
from ep_rebalance.planning.expert_time import ExpertTime, unlearned
from ep_rebalance.topology import Link, Topology


class CountRing:
    """Counts per slot of the newest steps. Steps with equal counts are kept as one.

    size: steps.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._runs: deque[tuple[int, NDArray[np.float64]]] = deque()

    def append(self, steps: int, load_LP: NDArray[np.float64]) -> None:
        """Add steps, in place of as many of the oldest.

        load_LP: float64 [L, P], tokens of each slot in each of these steps.
        """
        if not steps:
            return
        self._runs.append((steps, load_LP))
        over = sum(run for run, _ in self._runs) - self._size
        while over > 0:
            oldest, counted_LP = self._runs.popleft()
            if oldest > over:
                self._runs.appendleft((oldest - over, counted_LP))
            over -= oldest

    def decoded_LE(self, slots_LP: NDArray[np.int32], experts: int) -> NDArray[np.int64]:
        """int64 [L, E], the sum over all steps, taking `slots_LP` for the map of each of them."""
        layers = len(slots_LP)
        total_LP = sum((run * load_LP for run, load_LP in self._runs), np.zeros(slots_LP.shape))
        # One bincount for all layers: expert e of layer l is counted in cell l * E + e.
        cells_LP = slots_LP + experts * np.arange(layers)[:, None]
        summed = np.bincount(cells_LP.ravel(), total_LP.ravel(), minlength=layers * experts)
        return np.rint(summed).astype(np.int64).reshape(layers, experts)


@dataclass(slots=True, kw_only=True)
class _Arriving:
    """A new map of which some layers are still to come.

    layer: the one that is on its way.
    ready_at: the clock's time at which it is there.
    """

    target: Placement
    transfers: list[LayerTransfers]
    layer: int
    ready_at: float


class VllmEplb:
    """A server with vLLM's balancer.

    expert_bytes_L: L sizes, bytes. One expert of each layer.
    expert_time: what of a step waits for experts, for the gains that plans predict.

    placement, quotas_LP: what the last snapshot was served with, from its first step to its last: a map that
        changes in between is served from the next snapshot on, so that it is scored on load it had not seen.
    plans: all rearrangements. One whose layers are still arriving has those that are there.
    """

    def __init__(
        self,
        eplb: Eplb,
        *,
        loaded: Placement,
        topology: Topology,
        expert_bytes_L: Sequence[int],
        expert_time: ExpertTime,
    ) -> None:
        self.plans: list[PlanMade] = []
        self._policy, self._settings = eplb.policy, eplb.settings
        self._topology, self._expert_bytes_L = topology, expert_bytes_L
        self._groups = eplb.settings.expert_groups
        # Where ranks do not divide by nodes, vLLM takes them for one node.
        self._nodes = 1 if topology.num_ranks % topology.num_nodes else topology.num_nodes
        self._expert_time = expert_time
        interval = eplb.settings.step_interval
        self._timer = interval - steps_before_first(interval)
        self._ring = CountRing(eplb.settings.window_size)
        self._step: int | None = None
        self._clock = 0.0
        self._load_LE: NDArray[np.float64] | None = None
        self._counted = 0  # steps of that load that are not in the ring yet
        self._layers_count = True
        self._kept_LP: NDArray[np.float64] | None = None
        self._arriving: _Arriving | None = None
        self._map: Placement = loaded
        self._even_LP = loaded.even_quotas_LP()
        self.placement, self.quotas_LP = self._map, self._even_LP

    @classmethod
    def of(cls, begin: Beginning) -> Self:
        """See `Peer`."""
        assert begin.eplb is not None
        return cls(
            begin.eplb,
            loaded=begin.contiguous,
            topology=begin.topology,
            expert_bytes_L=begin.expert_bytes_L,
            expert_time=unlearned(begin.config.decision.expert_time_fraction),
        )

    def snapshot(self, snapshot: RecordedSnapshot) -> None:
        """Serve one more recorded snapshot."""
        seconds = snapshot.step_seconds or NOMINAL_STEP_SECONDS
        first = snapshot.step - snapshot.steps
        if self._step is not None and first > self._step:
            self._run(first - self._step, None, seconds)  # steps that were not recorded
        self._step = first
        self.placement, self.quotas_LP = self._map, self._even_LP
        load_LE = snapshot.counts_ALE.sum(axis=0, dtype=np.float64) / max(snapshot.steps, 1)
        self._run(snapshot.steps, load_LE if load_LE.any() else None, seconds)

    def _run(self, steps: int, load_LE: NDArray[np.float64] | None, seconds: float) -> None:
        """Steps that have the same load; None without tokens, or if it is not known. Those pass for the timer
        and leave the ring as it is.
        """
        self._load_LE = load_LE
        for _ in range(steps):
            self._end_step(seconds)
        self._flush()

    def _end_step(self, seconds: float) -> None:
        """What `EplbState.step` does, in its order."""
        assert self._step is not None
        self._step += 1
        self._clock += seconds
        self._count()
        self._timer += 1
        self._take_arrived()
        if self._timer >= self._settings.step_interval and self._arriving is None:
            self._timer = 0
            self._rearrange()
        self._layers_count = self._records

    @property
    def _records(self) -> bool:
        """Whether a step's counts go into the ring: those that a rearrangement would not see do not."""
        return self._settings.step_interval - self._timer <= self._settings.window_size

    def _count(self) -> None:
        if self._load_LE is None:
            self._kept_LP = None
        elif self._records:
            self._counted += 1
        elif self._layers_count:
            # Before the first step layers are told to count. What they counted in it stays in their counters,
            # and adds to the first step that goes into the ring.
            self._kept_LP = self._slot_load_LP()

    def _flush(self) -> None:
        """Put the steps that were counted with the present map into the ring."""
        if not self._counted:
            return
        load_LP = self._slot_load_LP()
        if self._kept_LP is not None:
            self._ring.append(1, load_LP + self._kept_LP)
            self._kept_LP = None
            self._counted -= 1
        self._ring.append(self._counted, load_LP)
        self._counted = 0

    def _slot_load_LP(self) -> NDArray[np.float64]:
        assert self._load_LE is not None
        return self._map.slot_load_LP(self._load_LE, self._even_LP)

    def _serve(self, slots_LP: NDArray[np.int32]) -> None:
        self._map = RepeatingPlacement(slots_LP, self._map.num_experts, self._map.num_ranks)
        self._even_LP = self._map.even_quotas_LP()

    def _rearrange(self) -> None:
        self._flush()
        slots_LP, ranks = self._map.slots_LP, self._map.num_ranks
        load_LE = self._ring.decoded_LE(slots_LP, self._map.num_experts)
        found_LP = self._policy(
            load_LE, slots_LP, groups=self._groups, nodes=self._nodes, ranks=ranks
        )
        target = RepeatingPlacement(found_LP.astype(np.int32), self._map.num_experts, ranks)
        transfers = [
            layer_transfers(old_P, new_P, topology=self._topology, expert_bytes=expert_bytes)
            for old_P, new_P, expert_bytes in zip(
                slots_LP, target.slots_LP, self._expert_bytes_L, strict=True
            )
        ]
        self.plans.append(self._begun(load_LE, target))
        self._arriving = _Arriving(
            target=target,
            transfers=transfers,
            layer=0,
            ready_at=self._clock + transfers[0].seconds,
        )
        if not self._settings.use_async:
            while self._arriving is not None:
                self._commit(stalled=True)

    def _begun(self, load_LE: NDArray[np.int64], target: Placement) -> PlanMade:
        assert self._step is not None
        before, after = (
            float(imbalance_L(placement.rank_load_LR(load_LE)).sum())
            for placement in (self._map, target)
        )
        return PlanMade(
            step=self._step,
            outcome="committed",
            reason=f"{self._settings.step_interval} steps have passed.",
            predicted_gain=self._expert_time.fraction * (1.0 - after / before),
            expert_time=self._expert_time,
            generation=len(self.plans) + 1,
            served_at=self._step,
            bytes={},
            placement=target,
        )

    def _take_arrived(self) -> None:
        """At most one layer in a step, since the next one's transfers begin when this one is in service."""
        if self._arriving is not None and self._clock >= self._arriving.ready_at:
            self._commit(stalled=False)

    def _commit(self, *, stalled: bool) -> None:
        """Serve the layer that has arrived, and have the next one sent."""
        self._flush()
        arriving = self._arriving
        assert arriving is not None
        layer, made = arriving.layer, arriving.transfers[arriving.layer]
        slots_LP = self._map.slots_LP.copy()
        slots_LP[layer] = arriving.target.slots_LP[layer]
        self._serve(slots_LP)
        self.plans[-1] = self._with_layer(self.plans[-1], layer, made, stalled)
        arriving.layer += 1
        if arriving.layer == len(arriving.transfers):
            self._arriving = None
        else:
            arriving.ready_at = self._clock + arriving.transfers[arriving.layer].seconds

    def _with_layer(
        self, plan: PlanMade, layer: int, made: LayerTransfers, stalled: bool
    ) -> PlanMade:
        sizes: dict[Link, int] = {
            link: plan.bytes.get(link, 0) + size for link, size in made.bytes.items()
        }
        return replace(
            plan,
            served_at=self._step,
            moved=plan.moved + made.moved,
            bytes=plan.bytes | sizes,
            layers=(*plan.layers, layer) if made.moved else plan.layers,
            serial_transfers=(plan.serial_transfers or 0) + made.serial,
            stall_seconds=plan.stall_seconds + (made.seconds if stalled else 0.0),
        )
