"""All ranks hear what trials of moves found on each of them, and refuse together or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch.distributed as dist

from ep_rebalance.config import ConfigurationError
from ep_rebalance.migration.proof import Proof, Verdict
from ep_rebalance.migration.slabs import SlabTensor
from ep_rebalance.migration.trial_move import RingProof

MOST_TOLD = 3
"""Trials that an error names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rank found in a trial of a layer.

    layer: its name. slabs: names of what moved. came_from: the rank whose expert it was; None if experts
        of this rank changed places. failure: as of `Proof`. hint: a clause on what the cause may be.
    """

    layer: str
    verdict: Verdict
    slabs: tuple[str, ...] = ()
    came_from: int | None = None
    failure: str = ""
    hint: str = ""

    @classmethod
    def alone(cls, layer: str, slabs: Sequence[SlabTensor], proof: Proof) -> Finding:
        """Of `prove_moves`."""
        names = tuple(slab.name for slab in slabs)
        hint = ""
        if proof.unread and proof.verdict is Verdict.MISPLACED:
            hint = f"the kernel does not seem to read {', '.join(proof.unread)}"
        return cls(layer, proof.verdict, names, failure=proof.failure, hint=hint)

    @classmethod
    def from_ring(
        cls, layer: str, slabs: Sequence[SlabTensor], proof: RingProof, rank: int
    ) -> Finding:
        """Of `prove_move`. rank: this one."""
        names = tuple(slab.name for slab in slabs)
        before = (rank - 1) % len(proof.arrivals_R)
        pairs = " or ".join(" and ".join(pair) for pair in proof.swapped)
        hint = f"nothing differs with {pairs} exchanged" if pairs else ""
        return cls(layer, proof.arrivals_R[rank].verdict, names, before, proof.failure, hint)

    def __str__(self) -> str:
        experts = (
            "its own experts" if self.came_from is None else f"one of EP rank {self.came_from}"
        )
        moved = f" ({', '.join(self.slabs)})" if self.slabs else ""
        why = f": {self.failure}" if self.failure else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"a trial with {experts}{moved} found {self.verdict.value}{why}{hint}"


def refuse_unproven(
    findings: Sequence[Finding], *, group: dist.ProcessGroup, remedy: str, remedy_if_open: str
) -> None:
    """Raises ConfigurationError if a trial on any rank allows no moves, the same on all ranks. Collective.

    It names the first layer with such a trial and the first ranks, of which the cause of the others' may be
    one: a rank that failed keeps others waiting in vain.

    findings: of this rank, layer by layer; ranks that failed may have fewer.
    group: carries what lies on the host. A rank that is still in a trial is waited for until its timeout.
    remedy_if_open: where no trial speaks against moves.
    """
    findings_R: list[Sequence[Finding]] = [()] * dist.get_world_size(group)
    dist.all_gather_object(findings_R, tuple(findings), group=group)
    refusals = [
        (number, rank, finding)
        for rank, of_rank in enumerate(findings_R)
        for number, finding in enumerate(of_rank)
        if not finding.verdict.allows_moves
    ]
    with_reason = [refusal for refusal in refusals if refusal[2].verdict is not Verdict.UNTRIED]
    refusals = sorted(with_reason or refusals, key=itemgetter(0, 1))
    if not refusals:
        return
    layer = refusals[0][2].layer
    told = [
        f"on EP rank {rank} {finding}" for _, rank, finding in refusals if finding.layer == layer
    ][:MOST_TOLD]
    others = len(refusals) - len(told)
    more = f"; further trials that allow no moves: {others}" if others else ""
    is_open = all(finding.verdict.is_open for _, _, finding in refusals)
    raise ConfigurationError(
        f"the experts of layer {layer!r} cannot move: {'; '.join(told)}{more}.",
        remedy_if_open if is_open else remedy,
    )
