"""Placement: which logical expert sits in each slot. The only owner of the placement invariants.

Slots lie on the ranks in their order, as in vLLM's linear expert placement (`determine_expert_map` in
vllm/model_executor/layers/fused_moe/expert_map_manager.py). All ranks have the same number: slot `p` is on
rank `p // S`. Only a placement without redundant slots may leave some over, and nothing of it ever moves:
`first_slots_R1` says what each rank then has.

Capitals at the end of an array's name are its axes, in order: `load_LE` is [L, E].

    A  phases, in the order of `load.window.PHASES`; the counters on the device have one row more
    L  MoE layers
    E  logical experts
    P  slots, counted over all ranks
    R  expert-parallel ranks
    S  slots of one rank, where all have as many: S = P / R
    C  replicas of one expert, or how many it has
    W  samples of the load window, oldest first
    T  tokens of this rank
    K  experts of one token (top-k)
    H  columns of a hidden state
    M  rows that arrived, in `all_to_all/` and `kernels/`; moves, in `migration/`
    N  any number of things of one kind; the docstring says which
    X  any number of entries that belong to the things of another axis

A digit is an axis of that length: `changes_N4` is [N, 4]. Only `first_N1` is [N + 1]: thing `n` has
the entries `first_N1[n]` to `first_N1[n + 1]`. A module that needs another letter, or one of these
for something else, says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICA_BOUND = 64
"""An expert has no more replicas than this, unless all have half as many on average. On 1,024 ranks it is the
sixteenth part of all tokens, or half of those that choose eight experts each. Tables whose width is the most
that there can be would else grow with the redundant slots, a thousand columns on 1,024 ranks.
"""
MAX_LAYERS = 4096
"""Of a model: more than any has. SGLang's files have a row for each."""
_MAX_RANKS = 1 << 13
"""More than any group of ranks has. Arrays of layers or ranks by ranks then fit into memory."""
_MAX_SLOTS_BY_RANKS = 1 << 25
_QUOTA_ERROR = 1e-6
"""How far quotas of an expert may be from 1 in sum: they are rounded on their way."""


class PlacementError(ValueError):
    """The slots do not form a placement. The message names the layer and what is wrong with it."""


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Which logical expert sits in each slot of each layer.

    slots_LP: int32 [L, P]. Read-only.

    In every layer each expert has at least one slot and at most `max_replicas`, and no rank holds an expert
    twice; the ranks can share the slots, see `can_be_shared`. Raises PlacementError otherwise.
    """

    slots_LP: NDArray[np.int32]
    num_experts: int
    num_ranks: int

    def __post_init__(self) -> None:
        slots_LP = np.asarray(self.slots_LP)
        if slots_LP.dtype.kind not in "iu":
            raise PlacementError(f"slots must be whole numbers, got {slots_LP.dtype}")
        if slots_LP.ndim != 2 or 0 in slots_LP.shape:
            raise PlacementError(f"slots must be [layers, slots], got shape {slots_LP.shape}")
        if not can_be_shared(slots_LP.shape[1], self.num_experts, self.num_ranks):
            raise PlacementError(
                f"{slots_LP.shape[1]} slots cannot be shared evenly by {self.num_ranks} ranks"
            )
        self._check_experts(slots_LP)
        # A copy, and only now: a larger number would wrap around.
        slots_LP = slots_LP.astype(np.int32)
        slots_LP.flags.writeable = False
        object.__setattr__(self, "slots_LP", slots_LP)

    def _check_experts(self, slots_LP: NDArray[np.integer]) -> None:
        if slots_LP.min() < 0 or slots_LP.max() >= self.num_experts:
            raise PlacementError(
                f"expert ids must be in 0..{self.num_experts - 1}, "
                f"got {slots_LP.min()}..{slots_LP.max()}"
            )
        if self.num_experts > slots_LP.shape[1]:
            # Not by counting: a file may name any number of experts, and each would have a counter.
            missing = np.setdiff1d(np.arange(slots_LP.shape[1] + 1), slots_LP[0])[0]
            raise PlacementError(f"layer 0: no slot holds expert {missing}")
        counts_LE = _replica_counts_LE(slots_LP, self.num_experts)
        missing_N2 = np.argwhere(counts_LE == 0)
        if missing_N2.size:
            layer, expert = missing_N2[0]
            raise PlacementError(f"layer {layer}: no slot holds expert {expert}")
        self._check_replicas(slots_LP, counts_LE)

    def _check_replicas(self, slots_LP: NDArray[np.integer], counts_LE: NDArray[np.int32]) -> None:
        if slots_LP.shape[1] == self.num_experts:
            return  # each has its one slot, and ranks may have unequally many
        sorted_LRS = np.sort(slots_LP.reshape(len(slots_LP), self.num_ranks, -1), axis=2)
        twice_N3 = np.argwhere(sorted_LRS[:, :, 1:] == sorted_LRS[:, :, :-1])
        if twice_N3.size:
            layer, rank, place = twice_N3[0]
            expert = sorted_LRS[layer, rank, place]
            raise PlacementError(f"layer {layer}: rank {rank} holds expert {expert} twice")
        most = _max_replicas(slots_LP.shape[1], self.num_experts, self.num_ranks)
        if counts_LE.max() > most:
            layer, expert = np.unravel_index(counts_LE.argmax(), counts_LE.shape)
            raise PlacementError(
                f"layer {layer}: {counts_LE.max()} slots hold expert {expert}, and {most} may"
            )

    @classmethod
    def contiguous(
        cls, *, num_layers: int, num_experts: int, num_ranks: int, num_redundant: int = 0
    ) -> Placement:
        """The placement that vLLM loads: all experts in order, then the first `num_redundant` again.

        The same as `EplbState.build_initial_global_physical_to_logical_map` in every layer.
        """
        slots_P = np.arange(num_experts + num_redundant, dtype=np.int32) % num_experts
        return cls(np.tile(slots_P, (num_layers, 1)), num_experts, num_ranks)

    @classmethod
    def round_robin(cls, *, num_layers: int, num_experts: int, num_ranks: int) -> Placement:
        """Expert `e` on rank `e % R`, as loaded with vLLM's
        `--expert-placement-strategy round_robin`.
        """
        slots_P = np.argsort(np.arange(num_experts) % num_ranks, kind="stable").astype(np.int32)
        return cls(np.tile(slots_P, (num_layers, 1)), num_experts, num_ranks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self.num_experts == other.num_experts
            and self.num_ranks == other.num_ranks
            and np.array_equal(self.slots_LP, other.slots_LP)
        )

    @property
    def num_layers(self) -> int:
        return int(self.slots_LP.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.slots_LP.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Raises PlacementError if ranks have unequally many. Whatever moves experts asks for it."""
        if self.num_slots % self.num_ranks:
            raise PlacementError(
                f"{self.num_slots} slots cannot be shared evenly by {self.num_ranks} ranks, so no expert can "
                "be moved; redundant experts make them even"
            )
        return self.num_slots // self.num_ranks

    @property
    def first_slots_R1(self) -> NDArray[np.int64]:
        """int64 [R + 1], see `first_slots_R1`."""
        return first_slots_R1(self.num_slots, self.num_ranks)

    def rank_of(self, slots: int | NDArray[np.integer]) -> NDArray[np.int64]:
        """int64, the rank of each slot."""
        ranks: NDArray[np.int64] = np.searchsorted(self.first_slots_R1[1:], slots, side="right")
        return ranks

    def rank_sums_LR(self, values_LP: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64 [..., L, R], sums over the slots of each rank.

        values_LP: float64 [..., L, P].
        """
        leading, fuller = values_LP.shape[:-1], self.num_slots % self.num_ranks
        split = int(self.first_slots_R1[fuller])
        parts = (values_LP[..., :split], fuller), (values_LP[..., split:], self.num_ranks - fuller)
        # The ranks of a part have equally many slots, perhaps none.
        sums = [
            part.reshape(*leading, ranks, part.shape[-1] // ranks).sum(axis=-1)
            for part, ranks in parts
            if ranks
        ]
        return np.concatenate(sums, axis=-1)

    @property
    def num_redundant(self) -> int:
        return self.num_slots - self.num_experts

    @property
    def max_replicas(self) -> int:
        """The most replicas that any placement of these sizes gives to one expert; see `REPLICA_BOUND`."""
        return _max_replicas(self.num_slots, self.num_experts, self.num_ranks)

    def replica_counts_LE(self) -> NDArray[np.int32]:
        """int32 [L, E], how many slots hold each expert."""
        return _replica_counts_LE(self.slots_LP, self.num_experts)

    def replica_slots(self, layer: int) -> NDArray[np.int32]:
        """int32 [E, max_replicas], the slots of each expert in ascending order, filled up with -1."""
        slots_P = self.slots_LP[layer]
        # Sorted by expert, the slots of one expert are neighbours: each one's column is its distance
        # from the first of them.
        by_expert_P = np.argsort(slots_P, kind="stable")
        experts_P = slots_P[by_expert_P]
        first_P = np.searchsorted(experts_P, experts_P)
        slots = np.full((self.num_experts, self.max_replicas), -1, dtype=np.int32)
        slots[experts_P, np.arange(len(slots_P)) - first_P] = by_expert_P
        return slots

    def replaced(self, layers: Iterable[int], source: Placement) -> Placement:
        """This placement with `layers` taken from `source`."""
        slots_LP = self.slots_LP.copy()
        chosen = list(layers)
        slots_LP[chosen] = source.slots_LP[chosen]
        return Placement(slots_LP, self.num_experts, self.num_ranks)

    def changed_slots(self, other: Placement) -> int:
        """Number of slots whose expert differs."""
        return int(np.count_nonzero(self.slots_LP != other.slots_LP))

    def even_quotas_LP(self) -> NDArray[np.float64]:
        """float64 [L, P], the same quota for all replicas of an expert."""
        counts_LE = self.replica_counts_LE()
        return 1.0 / np.take_along_axis(counts_LE, self.slots_LP.astype(np.int64), axis=1)

    def check_quotas(self, quotas_LP: NDArray[np.float64]) -> None:
        """Raises PlacementError unless every slot has a share, 0 to 1, of its expert's tokens, and the slots
        of each expert have all of them. What is not finite is refused too.
        """
        if quotas_LP.shape != self.slots_LP.shape:
            raise PlacementError(f"quotas of {quotas_LP.shape} for slots of {self.slots_LP.shape}")
        wrong_N2 = np.argwhere(~((quotas_LP >= 0.0) & (quotas_LP <= 1.0 + _QUOTA_ERROR)))
        if wrong_N2.size:
            layer, slot = wrong_N2[0]
            raise PlacementError(
                f"layer {layer}: slot {slot} cannot get {quotas_LP[layer, slot]} of its expert's tokens"
            )
        cells_LP = self.slots_LP + self.num_experts * np.arange(self.num_layers)[:, None]
        sums = np.bincount(
            cells_LP.ravel(), quotas_LP.ravel(), minlength=self.num_layers * self.num_experts
        )
        worst = int(np.abs(sums - 1.0).argmax())
        if abs(sums[worst] - 1.0) > _QUOTA_ERROR:
            layer, expert = divmod(worst, self.num_experts)
            raise PlacementError(
                f"layer {layer}: the slots of expert {expert} get {sums[worst]:g} of its tokens"
            )

    def slot_load_LP(
        self,
        load_LE: NDArray[np.floating | np.integer],
        quotas_LP: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """float64 [..., L, P], tokens that each slot computes.

        load_LE: [..., L, E], tokens of each logical expert.
        quotas_LP: float64 [L, P]. The share of its expert's tokens that a slot receives; even if None.
        """
        quotas = self.even_quotas_LP() if quotas_LP is None else quotas_LP
        experts = np.broadcast_to(self.slots_LP, (*load_LE.shape[:-2], *self.slots_LP.shape))
        load: NDArray[np.float64] = np.take_along_axis(load_LE, experts, axis=-1) * quotas
        return load

    def rank_load_LR(
        self,
        load_LE: NDArray[np.floating | np.integer],
        quotas_LP: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """float64 [..., L, R], tokens that each rank computes; arguments as in `slot_load_LP`."""
        return self.rank_sums_LR(self.slot_load_LP(load_LE, quotas_LP))


@dataclass(frozen=True, slots=True, eq=False)
class RepeatingPlacement(Placement):
    """A placement whose ranks may hold an expert twice, as other balancers' may. Only its load can be
    worked out: what plans or migrates takes a `Placement` without repeats.
    """

    def _check_replicas(self, slots_LP: NDArray[np.integer], counts_LE: NDArray[np.int32]) -> None:
        """Repeats are allowed, and any number."""


def can_be_shared(num_slots: int, num_experts: int, num_ranks: int) -> bool:
    """Whether ranks can hold so many slots: equally many each, or one for each expert and no other."""
    return num_ranks > 0 and (num_slots == num_experts or num_slots % num_ranks == 0)


def fits_memory(num_layers: int, num_slots: int, num_ranks: int) -> bool:
    """Whether arrays of these sizes, as a file names them, can be held: no model and no group is larger."""
    within = num_layers <= MAX_LAYERS and num_ranks <= _MAX_RANKS
    return within and num_slots * num_ranks <= _MAX_SLOTS_BY_RANKS


def first_slots_R1(num_slots: int, num_ranks: int) -> NDArray[np.int64]:
    """int64 [R + 1], the first slot of each rank, and where those of the last one end.

    Slots that are left over go to the first ranks, one to each.
    """
    each, left_over = divmod(num_slots, num_ranks)
    rank_R1 = np.arange(num_ranks + 1)
    first_R1: NDArray[np.int64] = rank_R1 * each + np.minimum(rank_R1, left_over)
    return first_R1


def _max_replicas(num_slots: int, num_experts: int, num_ranks: int) -> int:
    bound = max(REPLICA_BOUND, 2 * -(-num_slots // num_experts))
    return min(num_slots - num_experts + 1, num_ranks, bound)


def _replica_counts_LE(slots_LP: NDArray[np.integer], num_experts: int) -> NDArray[np.int32]:
    layers = len(slots_LP)
    # One bincount for all layers: expert e of layer l is counted in cell l * E + e.
    cells_LP = slots_LP.astype(np.int64) + num_experts * np.arange(layers)[:, None]
    counts = np.bincount(cells_LP.ravel(), minlength=layers * num_experts)
    return counts.reshape(layers, num_experts).astype(np.int32)


def imbalance_L(rank_load_LR: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [..., L], the busiest rank's load over the mean; 1 where a layer saw no tokens.

    rank_load_LR: float64 [..., L, R], in any unit.
    """
    mean_L = rank_load_LR.mean(axis=-1)
    busiest_L = rank_load_LR.max(axis=-1)
    return np.where(mean_L > 0, busiest_L / np.where(mean_L > 0, mean_L, 1.0), 1.0)
