"""Faults that the checker must find: each takes one promise out of the code, for as long as a test lasts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from lone_rank import Scope

from ep_rebalance.balancer.jobs import RankJobs
from ep_rebalance.balancer.migrator import Migrator
from ep_rebalance.balancer.rebalancer import Rebalancer
from ep_rebalance.migration.round_exchange import Faults, RoundExchange


@dataclass(frozen=True)
class PlantedFault:
    """owner, name, planted: what is replaced, and by what, given the original. scope: where it shows.
    found_as: words of the violation.
    """

    owner: type
    name: str
    planted: Callable[[Any], Any]
    scope: Scope
    found_as: str

    def patch(self) -> Any:
        original = getattr(self.owner, self.name)
        return mock.patch.object(self.owner, self.name, self.planted(original))


def _votes_alone(original: Any) -> Any:
    """No all-reduce: each rank goes by its own faults."""

    def add_up(self: RoundExchange, replaced: bool) -> None:
        self._faults[:1].fill_(int(self._transport_failed))
        self._faults[1:2].copy_(self._damaged)
        self._faults[2:].fill_(int(replaced))

    return add_up


def _looks_at_itself(original: Any) -> Any:
    """A rank goes on once it has its own rounds, whatever the others have."""

    def agreed(self: Rebalancer, flags: Any) -> Any:
        job = self._jobs._scheduling
        return replace(original(self, flags), scheduled=job is not None and job.done())

    return agreed


def _reloads_alone(original: Any) -> Any:
    """A rank takes its own reloads for those of all."""

    def agreed(self: Rebalancer, flags: Any) -> Any:
        own, ranks = self.migrator.reloads, self._ranks
        return original(self, replace(flags, reloads=ranks * own, reloads_squared=ranks * own**2))

    return agreed


def _passes_over(original: Any) -> Any:
    """A collective that fails twice is left out."""

    def take_part(self: RoundExchange, collective: Any, *arguments: Any) -> None:
        try:
            original(self, collective, *arguments)
        except RuntimeError:
            self._transport_failed = True

    return take_part


def _keeps_to_itself(original: Any) -> Any:
    """A rank without rounds does not say so."""
    return lambda self: replace(original(self), failed=0)


def _does_not_vote(original: Any) -> Any:
    """A rank whose weights were replaced votes as if they were not."""
    return lambda self, batch, *, replaced=False, known=None: original(self, batch, known=known)


def _serves_copies(original: Any) -> Any:
    """A rank whose weights were replaced takes copies for written."""

    def weights_replaced(self: Migrator, layers: Any) -> None:
        self._loaded_once = self._loaded
        original(self, layers)

    return weights_replaced


QUICK = Scope(late=False)

PLANTED = {
    "a vote that nobody heeds": PlantedFault(
        RoundExchange,
        "faults_of",
        lambda original: staticmethod(lambda vote: Faults(0, 0)),
        replace(QUICK, faults=1),
        "holds",
    ),
    "each rank goes by its own vote": PlantedFault(
        RoundExchange,
        "_add_up_faults",
        _votes_alone,
        replace(QUICK, faults=1, layers=1),
        "disagree on the placement",
    ),
    "each rank begins when it is ready": PlantedFault(
        Rebalancer, "_agreed", _looks_at_itself, Scope(), "different collectives"
    ),
    "each rank goes by its own reloads": PlantedFault(
        Rebalancer, "_agreed", _reloads_alone, replace(QUICK, reloads=1), "disagree"
    ),
    "a reload is not voted": PlantedFault(
        RoundExchange, "vote", _does_not_vote, replace(QUICK, reloads=1), "holds"
    ),
    "a failed collective is passed over": PlantedFault(
        RoundExchange, "_take_part", _passes_over, QUICK, "passes over"
    ),
    "a rank without rounds says nothing": PlantedFault(
        RankJobs, "announced", _keeps_to_itself, replace(QUICK, faults=1), "never come to watch"
    ),
    "copies are served before they are written": PlantedFault(
        Migrator,
        "weights_replaced",
        _serves_copies,
        replace(QUICK, reloads=1, layers=1, redundant=3),
        "holds",
    ),
    "a return heeds no refusal": PlantedFault(
        RoundExchange,
        "vote",
        _does_not_vote,
        Scope(mode="static", layers=1, round_bytes=32, reloads=1, unmovable=True),
        "may not move",
    ),
}
