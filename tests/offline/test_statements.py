"""What `advise` says of a recording."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from traces import head_of

from ep_rebalance.offline.advice import Advice
from ep_rebalance.offline.phases import PhaseStep
from ep_rebalance.offline.room import HotExpert, Room
from ep_rebalance.offline.statements import (
    about_expert_parallel,
    about_hot_experts,
    about_imbalance,
    about_persistence,
    about_redundancy,
    about_vllm_eplb,
)

ROOM = Room(
    phase=None,
    ranks=8,
    parts=6,
    loaded=1.4,
    placed=1.01,
    hottest=0.8,
    next_loaded=1.4,
    next_placed=1.1,
    next_bound=1.0,
    hot=3,
    always_hot=1,
    hottest_experts=(HotExpert(layer=5, expert=17, times_mean=4.06),),
)
DECODE = PhaseStep(
    phase="decode",
    tokens_per_rank=40.0,
    reading_seconds=2e-3,
    computing_seconds=1e-3,
    expert_seconds=1.1,
    single_seconds=1.0,
)
PARALLEL = Advice(
    expert_parallel=True,
    ranks=8,
    redundant=0,
    imbalance=1.05,
    home_share=0.2,
    node_share=1.0,
    step_seconds=0.01,
    unbalanced_step_seconds=0.0125,
    tokens_per_second=8000.0,
    weight_bytes=10**9,
    extra_bytes=0,
    fits=True,
    moved_bytes_per_hour=0.0,
    phases=(DECODE,),
    reason="",
)
CUT = replace(PARALLEL, expert_parallel=False, tokens_per_second=4000.0, phases=())
PLANNED: Any = SimpleNamespace(plans=("a plan",))


def test_the_bound_of_what_can_be_gained_is_that_of_the_busiest_rank():
    told = about_imbalance(ROOM)
    assert "1.400 times the mean load" in told.text
    assert f"at most {1 - 1.01 / 1.4:.1%} off" in told.text
    assert told.how.startswith("measured")


def test_one_expert_that_is_more_than_a_rank_is_named_as_what_no_placement_helps():
    told = about_imbalance(replace(ROOM, placed=1.3, hottest=1.25))
    assert "The hottest expert alone has 1.25 times" in told.text
    assert "only copies or fewer GPUs help" in told.text


def test_uneven_experts_on_even_ranks_are_nothing_to_gain():
    told = about_imbalance(replace(ROOM, loaded=1.01, placed=1.0))
    assert told.text.endswith("hot experts share their GPUs with cold ones.")


@pytest.mark.parametrize(
    ("next_placed", "words"),
    [(1.0, "imbalance lasts"), (1.2, "partly lasts"), (1.39, "passes"), (1.6, "passes")],
)
def test_what_a_placement_keeps_of_its_gain_says_whether_it_lasts(next_placed: float, words: str):
    told = about_persistence(replace(ROOM, next_placed=next_placed))
    assert words in told.text
    assert told.values["kept"] == pytest.approx((1.4 - next_placed) / 0.4)


def test_hot_experts_are_named_by_layer():
    told = about_hot_experts(head_of(layers=2, experts=8), ROOM)
    assert told.text == (
        "3 of 16 experts have at least twice the mean load of their layer, 1 of them in each of the 6 parts. "
        "The hottest of these: layer 5 expert 17 (4.1 times)."
    )


def test_redundant_experts_have_a_price_in_memory_and_in_each_phase():
    more = replace(PARALLEL, redundant=8, extra_bytes=2_000_000_000)
    (told,) = about_redundancy(head_of(), [more, PARALLEL])
    assert told.text == (
        "1 more slot for each layer on each of 8 GPUs: 2 GB a GPU; decode mostly reads weights, and its "
        "experts take 10.0% longer."
    )
    assert about_redundancy(head_of(), [PARALLEL]) == []


@pytest.mark.parametrize(
    ("best", "words"),
    [
        ([PARALLEL, CUT], "makes 100.0% more tokens a second for each GPU than experts cut"),
        (
            [replace(CUT, tokens_per_second=10_000.0), PARALLEL],
            "Do not use expert parallelism here: with every expert cut over 8 GPUs each GPU makes 25.0% more",
        ),
        ([CUT, replace(PARALLEL, fits=False)], "only cut over 8 GPUs do the experts fit"),
        ([PARALLEL, replace(CUT, fits=False)], "cut, the experts do not fit"),
        ([replace(PARALLEL, fits=False), replace(CUT, fits=False)], "fit on none of these GPUs"),
    ],
)
def test_experts_are_spread_only_where_that_is_better(best: list[Advice], words: str):
    told = about_expert_parallel(best, ROOM, PLANNED)
    assert words in told.text
    assert "Moving experts saves 20.0% of the step." in told.text


@pytest.mark.parametrize(
    ("room", "phases", "words"),
    [
        (replace(ROOM, loaded=1.01, placed=1.0), (DECODE,), "ranks are even already"),
        (replace(ROOM, next_placed=1.39), (DECODE,), "changes faster than experts can follow"),
        (ROOM, (DECODE,), "mostly reads weights"),
        (ROOM, (replace(DECODE, computing_seconds=1.0),), "0.0% of the step: serve without"),
    ],
)
def test_where_moving_experts_gains_little_the_reason_is_said(room: Room, phases, words: str):
    little = replace(PARALLEL, unbalanced_step_seconds=0.01, phases=phases)
    told = about_expert_parallel([little, CUT], room, PLANNED)
    assert words in told.text
    assert "without the plugin, or with it in mode observe" in told.text


def test_without_a_plan_nothing_is_said_of_what_moving_saves():
    nothing: Any = SimpleNamespace(plans=())
    told = about_expert_parallel([PARALLEL, CUT], ROOM, nothing)
    assert "too short for a plan" in told.text
    assert told.values["saved"] is None


def test_why_vllms_balancer_was_not_replayed_is_said():
    told = about_vllm_eplb(PLANNED, PLANNED, "policy vllm-eplb needs vLLM")
    assert told.text == "vLLM's own balancer was not replayed: policy vllm-eplb needs vLLM."
