"""A rank that fails at something in a round takes part in every collective of the others, all of them
abandon the migration in the same step, and the next one works.
"""

import pytest
import torch.distributed as dist
from forced_failures import Failing
from migration_rig import Rig
from ranks import Ranks

pytestmark = pytest.mark.usefixtures("compiled_schedule")

SEED = 5
FAILURES = {
    "packing": (lambda rig: rig.memory, "read"),
    "the all-to-all": (lambda rig: dist, "all_to_all_single"),
    "unpacking": (lambda rig: rig.exchange, "_unpack"),
    "checking": (lambda rig: rig.memory, "checksum_packed"),
    "the vote": (lambda rig: dist, "all_reduce"),
}
"""What one rank fails at, once: before anything was sent."""


def failing(patch: pytest.MonkeyPatch, rig: Rig, failure: str, at: int, times: int = 1) -> Failing:
    owner_of, name = FAILURES[failure]
    owner = owner_of(rig)
    fails = Failing(getattr(owner, name), at, times)
    patch.setattr(owner, name, fails)
    return fails


def fail_then_migrate(rank, size, failure, at):
    """(fault, steps, slots right, then the same of a migration without a failure)."""
    rig = Rig(rank, size, seed=SEED, max_bytes=256)
    with pytest.MonkeyPatch.context() as patch:
        if rank == size - 1:
            failing(patch, rig, failure, at)
        votes = rig.migrate()
    failed = votes, rig.steps, rig.wrong_slots(rig.served.placement)
    assert rig.served.placement == rig.source
    rig.steps = 0
    return failed, (rig.migrate(), rig.steps, rig.wrong_slots(rig.target))


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_abandon_in_the_same_step_and_the_next_migration_works(
    ranks_of: dict[int, Ranks], size, failure
):
    answers = ranks_of[size].run(fail_then_migrate, size, failure, 1)
    assert answers[1:] == answers[:-1]
    (votes, failed_steps, kept), (next_votes, steps, moved) = answers[0]
    assert [vote.transport for vote in votes] == [1]
    assert 0 < failed_steps <= steps
    assert not any(next_votes)
    assert (kept, moved) == ([], [])


def fail_in_a_later_round(rank, size):
    """The all-to-all of the second round raises; what its other rounds brought stays unserved."""
    rig = Rig(rank, size, seed=SEED, max_bytes=256)
    with pytest.MonkeyPatch.context() as patch:
        fails = failing(patch, rig, "the all-to-all", 2 if rank == 0 else 0)
        votes = rig.migrate()
    return votes, rig.steps, rig.wrong_slots(rig.source), fails.calls


def test_what_failed_is_issued_once_more_and_no_more(two_ranks: Ranks):
    (votes, steps, wrong, calls), (*others, calls_there) = two_ranks.run(fail_in_a_later_round, 2)
    assert [votes, steps, wrong] == others
    assert calls == calls_there + 1
    assert votes[-1].transport == 1
    assert wrong == []


def fail_twice(rank, size, failure):
    """Rank 0 gives up with the error; then the test itself lets the other rank go on."""
    rig = Rig(rank, size, seed=SEED, max_bytes=256)
    if rank:
        return str(rig.migrate()[0])
    with pytest.MonkeyPatch.context() as patch:
        fails = failing(patch, rig, failure, 1, times=2)
        with pytest.raises(OSError, match="forced failure"):
            rig.migrate()
    batch = rig.migration.batches[0]
    if failure == "the all-to-all":
        for number in range(len(batch.rounds)):
            rig.exchange.exchange(batch, number)
    rig.exchange.vote(batch)
    return fails.calls


@pytest.mark.parametrize("failure", ["the all-to-all", "the vote"])
def test_a_rank_that_cannot_stay_in_step_ends_with_the_error(two_ranks: Ranks, failure):
    calls, told = two_ranks.run(fail_twice, 2, failure)
    assert calls == 2
    assert "1 rank(s) with a transport error" in told


def overflow_then_migrate(rank, size):
    """A migration that was cut for larger buffers is abandoned before its first round."""
    small = Rig(rank, size, seed=SEED, max_bytes=256)
    large = Rig(rank, size, seed=SEED, max_bytes=1 << 20)
    batch = large.migration.batches[0]
    with pytest.raises(Exception, match="does not fit"):
        small.exchange.begin_batch(batch)
    return small.migrate(), small.wrong_slots(small.target)


def test_what_does_not_fit_leaves_all_ranks_in_step(two_ranks: Ranks):
    for votes, wrong in two_ranks.run(overflow_then_migrate, 2):
        assert not any(votes)
        assert wrong == []
