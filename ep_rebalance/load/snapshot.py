"""Snapshot: the load of all ranks over some steps, and what all ranks know from then on."""

from __future__ import annotations

from dataclasses import dataclass

from ep_rebalance.load.window import LoadSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What every rank learns with one snapshot, and so may act on in the same step.

    planned: rank 0's plan is done.
    proposed: the plan is to be carried out.
    scheduled: every rank has worked out the rounds of the migration.
    unscheduled_ranks: how many could not work them out; 0 until every rank has tried.
    fitted: every rank has quotas that follow the load.
    paused: an operator holds plans back.
    plan_asked: an operator asked for a plan.
    replaced: the engine has replaced weights on some rank since the ranks agreed on what is served, or copies
        of experts are still to be written since.
    reloaded: the layers that it replaced, once it has done so on every rank; () before.
    """

    planned: bool = False
    proposed: bool = False
    scheduled: bool = False
    unscheduled_ranks: int = 0
    fitted: bool = False
    paused: bool = False
    plan_asked: bool = False
    replaced: bool = False
    reloaded: tuple[int, ...] = ()


NOTHING_AGREED = Agreed()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What all ranks have in common after one all-reduce. Equal on every rank."""

    sample: LoadSample
    agreed: Agreed
