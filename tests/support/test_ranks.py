"""The helper that runs functions on several processes reports failures and never hangs."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, Ranks


def sum_of_ranks(rank: int) -> int:
    total = torch.tensor([rank])
    dist.all_reduce(total)
    return int(total)


def raise_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one is out of order")
    dist.barrier()


def sleep_on_rank_zero(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


def test_results_come_back_by_rank(two_ranks: Ranks):
    assert two_ranks.run(sum_of_ranks) == [1, 1]


def test_a_rank_that_raises_is_reported_and_the_pool_works_again():
    ranks = Ranks(2)
    with pytest.raises(RankFailure, match="rank one is out of order"):
        ranks.run(raise_on_rank_one)
    assert ranks.run(sum_of_ranks) == [1, 1]
    ranks.stop()


def test_a_rank_that_does_not_answer_is_ended():
    ranks = Ranks(2)
    ranks.run(sum_of_ranks)
    with pytest.raises(RankFailure, match=r"rank 0: no answer within 0\.2 s"):
        ranks.run(sleep_on_rank_zero, timeout=0.2)
    ranks.stop()
