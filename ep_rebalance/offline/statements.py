"""Statements: what a recording says about moving experts, each with how it was come by.

Every one answers a question that somebody has before switching anything on. What was counted is called
measured, what followed from a replay replayed, and what was computed from figures of hardware modelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.advice import WORTH, Advice
from ep_rebalance.offline.eplb_settings import EplbSettings, steps_before_first
from ep_rebalance.offline.room import Room
from ep_rebalance.offline.run import Replayed

_EVEN = 0.02
"""Less than this between two imbalances is called none."""
_LASTS, _PASSES = 0.6, 0.2
"""A placement that keeps so much of its gain on the next part lasts; one that keeps so little does not."""
_MODELLED = "modelled from the hardware's figures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """An answer.

    question: a word for it.
    text: sentences.
    how: by which measurement, replay or formula.
    values: the numbers in the text.
    """

    question: str
    text: str
    how: str
    values: Mapping[str, float | int | None] = field(default_factory=dict)


def about_imbalance(room: Room) -> Statement:
    """Are ranks uneven, and could a placement make them even?"""
    whose = "" if room.phase is None else f" {room.phase}:"
    text = (
        f"{whose} On {room.ranks} GPUs the busiest has {room.loaded:.3f} times the mean load as the engine "
        f"loads the experts, and {room.placed:.3f} with the best placement that was found."
    ).strip()
    if room.loaded - room.placed < _EVEN:
        text += " Moving experts has nothing to even out"
        uneven = room.hot > 0 and room.loaded < 1.0 + 5 * _EVEN
        text += ": hot experts share their GPUs with cold ones." if uneven else "."
    else:
        text += (
            f" Moving experts can take at most {1.0 - room.placed / room.loaded:.1%} off its work."
        )
    if room.placed > 1.0 + 2 * _EVEN and room.hottest > 1.0:
        text += (
            f" The hottest expert alone has {room.hottest:.2f} times a GPU's mean load (mean of the "
            "layers): beyond that only copies or fewer GPUs help."
        )
    return Statement(
        question="imbalance",
        text=text,
        how="measured: the recorded tokens on each placement, one slot for each expert; the best one was "
        "made for the same tokens, which no server knows before",
        values={"loaded": room.loaded, "placed": room.placed, "hottest_expert": room.hottest},
    )


def about_persistence(room: Room) -> Statement:
    """Does the imbalance last long enough for a placement to help?"""
    how = "measured: each part of the recording on the placement that was made from the part before it"
    values = {
        "parts": room.parts,
        "next_loaded": room.next_loaded,
        "next_placed": room.next_placed,
        "next_bound": room.next_bound,
        "kept": room.kept,
    }
    if room.next_placed is None or room.next_loaded is None or room.next_bound is None:
        text = "Whether it lasts is not known: the recording is a single part. Record longer."
    elif room.kept is None:
        text = f"In none of its {room.parts} parts is there anything to even out."
    else:
        word = "lasts" if room.kept >= _LASTS else "partly lasts"
        if room.kept < _PASSES:
            word = "passes: what is placed for one part does not suit the next"
        text = (
            f"The imbalance {word}. Placed by the part before it, a part of the recording ({room.parts} in "
            f"all) comes to {room.next_placed:.3f}, as loaded to {room.next_loaded:.3f}, and placed for "
            f"itself to {room.next_bound:.3f}: {max(room.kept, 0.0):.0%} of the gain is kept."
        )
    return Statement(question="persistence", text=text, how=how, values=values)


def about_hot_experts(head: TraceHead, room: Room) -> Statement:
    """Which experts stay hot?"""
    of = head.layers * head.experts
    text = f"{room.hot} of {of} experts have at least twice the mean load of their layer"
    text += (
        f", {room.always_hot} of them in each of the {room.parts} parts." if room.parts > 1 else "."
    )
    if room.hottest_experts:
        named = ", ".join(
            f"layer {one.layer} expert {one.expert} ({one.times_mean:.1f} times)"
            for one in room.hottest_experts
        )
        text += f" The hottest of these: {named}."
    return Statement(
        question="hot_experts",
        text=text,
        how="measured: tokens of each expert over the mean of its layer",
        values={"hot": room.hot, "always_hot": room.always_hot},
    )


def about_redundancy(head: TraceHead, options: Sequence[Advice]) -> list[Statement]:
    """What do redundant experts cost and gain, for each phase apart?

    options: expert-parallel ones on the same ranks.
    """
    made = []
    least, *others = sorted(options, key=lambda option: option.redundant)
    for option in others:
        copies = (option.redundant - least.redundant) // option.ranks
        extra = option.extra_bytes - least.extra_bytes
        parts = [
            f"{copies} more {'slot' if copies == 1 else 'slots'} for each layer on each of {option.ranks} "
            f"GPUs: {extra / 1e9:.3g} GB a GPU"
        ]
        values: dict[str, float | int | None] = {
            "ranks": option.ranks,
            "redundant": option.redundant,
            "extra_bytes": extra,
        }
        for phase in option.phases:
            change = "longer" if phase.longer > 0 else "shorter"
            bound = "reads weights" if phase.mostly_reads else "computes"
            parts.append(
                f"{phase.phase} mostly {bound}, and its experts take {abs(phase.longer):.1%} {change}"
            )
            values[f"{phase.phase}_longer"] = phase.longer
        made.append(
            Statement(
                question="redundancy",
                text="; ".join(parts) + ".",
                how=f"memory by formula: copies x {head.layers} layers x "
                f"{sum(head.expert_bytes) // head.layers:,} bytes; times {_MODELLED}: the longer of reading "
                "each expert that gets tokens and of 2 operations a parameter and token, on the measured "
                "token counts",
                values=values,
            )
        )
    return made


def about_cold_start(ours: Replayed) -> Statement:
    """How long until a new server has moved its experts?"""
    how = f"replayed in the plugin's own loop; step times {_MODELLED}, bytes by the links of the scenario"
    begin = int(ours.step_N[0] - ours.steps_N[0])
    if not ours.commits:
        steps = int(ours.steps_N.sum())
        return Statement(
            question="cold_start",
            text=f"No experts were moved in the {steps} steps of the recording: "
            + ("no plan was worth its migration." if ours.plans else "too few for a plan to end."),
            how=how,
            values={"steps": steps},
        )
    first = ours.commits[0]
    until = first.served_at if first.served_at is not None else first.step
    before_N = ours.step_N <= until
    seconds = float(ours.seconds_N[before_N] @ ours.steps_N[before_N])
    sent = int(sum(count for link, count in first.bytes.items() if link != "local"))
    return Statement(
        question="cold_start",
        text=f"A new server plans after {first.step - begin} steps and serves its first placement after "
        f"{until - begin} steps, {seconds:.3g} s: {first.moved} experts change their slot, "
        f"{sent / 1e9:.3g} GB go over links, and serving goes on meanwhile.",
        how=how,
        values={
            "steps": until - begin,
            "seconds": seconds,
            "moved": int(first.moved),
            "bytes": sent,
        },
    )


def about_vllm_eplb(ours: Replayed, none: Replayed, eplb: Replayed | str) -> Statement:
    """What would vLLM's own balancer have done?

    eplb: its replay, or why there is none.
    """
    how = "replayed: the installed vLLM's policy with its default timer, window, even split and transfers"
    if isinstance(eplb, str):
        return Statement(
            question="vllm_eplb", text=f"vLLM's own balancer was not replayed: {eplb}.", how=how
        )
    steps, first = int(eplb.steps_N.sum()), steps_before_first(EplbSettings().step_interval)
    if not eplb.plans:
        return Statement(
            question="vllm_eplb",
            text=f"vLLM's own balancer (--enable-eplb) would have moved nothing yet: it rearranges after "
            f"{first} steps first, and {steps} were recorded.",
            how=how,
            values={"steps": steps},
        )
    base = none.mean_step_seconds
    rows = {"vllm_eplb": eplb, "ours": ours}
    told = [
        f"{name}: imbalance {one.mean_imbalance:.3f}, step {1e3 * one.mean_step_seconds:.3g} ms "
        f"({1.0 - one.mean_step_seconds / base:+.1%} saved), {one.moved_bytes / 1e9:.3g} GB moved, "
        f"the engine stands still for {one.stall_seconds:.2g} s"
        for name, one in (("vLLM's own balancer (--enable-eplb)", eplb), ("this plugin", ours))
    ]
    values = {f"{name}_imbalance": one.mean_imbalance for name, one in rows.items()}
    values |= {f"{name}_saved": 1.0 - one.mean_step_seconds / base for name, one in rows.items()}
    return Statement(question="vllm_eplb", text="; ".join(told) + ".", how=how, values=values)


def about_expert_parallel(best: Sequence[Advice], room: Room, ours: Replayed) -> Statement:
    """Should experts be spread over ranks at all, and should they be moved?

    best: all options, the best first.
    ours: the replay of the best expert-parallel one.
    """
    parallel = next(option for option in best if option.expert_parallel)
    cut = next(option for option in best if not option.expert_parallel)
    texts = [_spread_or_cut(parallel, cut, cut_is_better=best.index(cut) < best.index(parallel))]
    if not ours.plans:
        texts.append(
            "What moving experts saves of the step is not known: the recording is too short for a plan."
        )
    elif parallel.saved >= WORTH:
        texts.append(f"Moving experts saves {parallel.saved:.1%} of the step.")
    else:
        saves = (
            f"Moving experts saves {parallel.saved:.1%} of the step{_why_little(parallel, room)}"
            if parallel.saved >= 0
            else f"Moving experts would make steps {-parallel.saved:.1%} longer"
        )
        texts.append(f"{saves}: serve without the plugin, or with it in mode observe.")
    return Statement(
        question="expert_parallel",
        text=" ".join(texts),
        how=f"{_MODELLED} on the recorded load: the busiest rank's experts, and the all-to-all or "
        "all-reduce; trust the order more than the numbers",
        values={
            "saved": parallel.saved if ours.plans else None,
            "over_cut": parallel.tokens_per_second_and_rank / cut.tokens_per_second_and_rank,
        },
    )


def _spread_or_cut(parallel: Advice, cut: Advice, *, cut_is_better: bool) -> str:
    ratio = parallel.tokens_per_second_and_rank / cut.tokens_per_second_and_rank
    if not parallel.fits and not cut.fits:
        return "The experts fit on none of these GPUs, cut or whole."
    if not cut.fits:
        return f"Use expert parallelism on {parallel.ranks} GPUs: cut, the experts do not fit."
    if not parallel.fits:
        return f"Do not use expert parallelism here: only cut over {cut.ranks} GPUs do the experts fit."
    if not cut_is_better:
        return (
            f"Expert parallelism on {parallel.ranks} GPUs makes {ratio - 1.0:.1%} more tokens a second for "
            f"each GPU than experts cut over {cut.ranks} GPUs."
        )
    return (
        f"Do not use expert parallelism here: with every expert cut over {cut.ranks} GPUs each GPU makes "
        f"{1.0 / ratio - 1.0:.1%} more tokens a second than with the best expert-parallel option "
        f"({parallel.ranks} GPUs)."
    )


def _why_little(parallel: Advice, room: Room) -> str:
    if room.loaded - room.placed < _EVEN:
        return ", since ranks are even already"
    if room.kept is not None and room.kept < _PASSES:
        return ", since the load changes faster than experts can follow"
    if parallel.phases and all(phase.mostly_reads for phase in parallel.phases):
        return ", since it mostly reads weights, which takes as long for few tokens as for many"
    return ""
