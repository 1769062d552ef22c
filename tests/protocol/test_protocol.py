"""Three ranks in every order of events, run by the real code; and faults that the checker has to find."""

import pytest
import torch.distributed as dist
from lone_rank import Scope, play, play_over, ranks_apart
from planted_faults import PLANTED
from protocol_checker import Checker, Violation
from ranks import Ranks

SCOPES = {
    "plans": Scope(late=False, plans=2),
    "late jobs": Scope(layers=1, round_bytes=32),
    "faults": Scope(late=False, faults=1, layers=1),
    "reloads": Scope(late=False, reloads=1, layers=1),
    "copies": Scope(late=False, reloads=1, layers=1, redundant=3),
    "mode static": Scope(mode="static", reloads=1, layers=1, round_bytes=32),
    "requests": Scope(late=False, asks=2, layers=1),
}
"""Small ones; `scripts/check_protocol` goes further."""


@pytest.mark.parametrize("name", SCOPES)
def test_no_order_of_events_leads_to_a_wrong_state(compiled_schedule: None, name: str):
    checker = Checker(SCOPES[name])
    found = checker.run()
    assert checker.complete
    assert found.forwards > 10


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(compiled_schedule: None, name: str):
    fault = PLANTED[name]
    with fault.patch(), pytest.raises(Violation, match=fault.found_as):
        Checker(fault.scope, most_states=20_000).run()


def test_ranks_with_one_fingerprint_go_on_alike(compiled_schedule: None):
    """What fingerprints leave out makes no difference to what a rank asks next."""
    checker = Checker(SCOPES["faults"])
    checker.run()
    pairs = checker.ranks.ways_to_one_forward(30)
    assert len(pairs) > 10
    with ranks_apart():
        for rank, one, other in pairs:
            asked = [play(SCOPES["faults"], rank, log, _once()).asked for log in (one, other)]
            assert asked[0] == asked[1]


def over_gloo(rank: int, scope: Scope, logs: list[list[object]]) -> int:
    return play_over(dist.group.WORLD, scope, rank, logs[rank])


def test_the_ranks_go_the_same_ways_over_gloo(compiled_schedule: None, ranks_of: dict[int, Ranks]):
    checker = Checker(SCOPES["faults"])
    checker.run()
    for logs in checker.ways(40):
        counts = ranks_of[3].run(over_gloo, SCOPES["faults"], logs)
        assert min(counts) == max(counts) > 0


def _once():
    """`known` that lets a rank pass its first forward pass, and no other."""
    seen = []

    def known(fingerprint: bytes) -> bool:
        seen.append(fingerprint)
        return len(seen) > 1

    return known
