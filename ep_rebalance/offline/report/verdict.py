"""Verdict: what rebalancing gains and what it costs, in a sentence for each size."""

from __future__ import annotations

from collections.abc import Sequence

from rich.filesize import decimal

from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.gain import Gain
from ep_rebalance.offline.layouts import nothing_to_gain
from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.report.sizes import Size, by_size
from ep_rebalance.offline.report.words import counted, duration, percent
from ep_rebalance.offline.run import Replayed


def verdicts(head: TraceHead, replayed: Sequence[Replayed]) -> list[str]:
    """A sentence in plain words for each size."""
    sizes = by_size(head, replayed)
    if len(sizes) == 1:
        return [_verdict(sizes[0])]
    return [f"{size.label}: {_verdict(size)}" for size in sizes]


def _verdict(size: Size) -> str:
    baseline, hindsight = size.first("none"), size.first("hindsight")
    served = size.first(*(name for name, policy in REPLAY_POLICIES.items() if policy.subject))
    fixed = nothing_to_gain(size.experts, size.ranks, size.redundant)
    clauses = []
    if fixed:
        clauses, hindsight = [f"no placement is more even than another here, because {fixed}"], None
    elif served is not None:
        clauses.append(
            f"{REPLAY_POLICIES[served.scenario.policy].subject} would have "
            f"{_effect(size, served)}{_price(size, served)}{_memory(size)}"
        )
    elif baseline is not None:
        clauses.append(f"as loaded, the busiest rank gets {times_mean(baseline)}")
    if hindsight is not None:
        future = "knowing the future would have"
        gain = size.gain(hindsight)
        clauses.append(
            f"{future} kept the busiest rank at {times_mean(hindsight)}"
            if gain is None
            else f"{future} saved {percent(gain.saved)}"
        )
    text = "; ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}."


def _effect(size: Size, one: Replayed) -> str:
    gain = size.gain(one)
    if gain is None:
        return f"kept the busiest rank at {times_mean(one)}"
    if gain.loss:
        return f"added {percent(-gain.saved)} to the step time against the contiguous placement"
    if gain.sure:
        return (
            f"saved {percent(gain.saved)} of the step time against the contiguous placement "
            f"({margin(gain)})"
        )
    return f"gained nothing that stands out from noise ({noise(gain)})"


def noise(gain: Gain) -> str:
    """What was found, as far as it can be told from noise."""
    found = f"{percent(gain.saved)} of the step time"
    if gain.error is None:
        return f"{found}, in too few snapshots to tell"
    return f"{found}, {margin(gain)}"


def margin(gain: Gain) -> str:
    """Two standard errors."""
    assert gain.error is not None
    return f"give or take {percent(2 * gain.error)}"


def _price(size: Size, one: Replayed) -> str:
    if one not in size.planned:
        return ""
    if not one.moved:
        return " and moved no expert"
    moved_bytes = f" ({decimal(one.moved_bytes)})" if size.bytes_known else ""
    stall = f", for which it stood still {duration(one.stall_seconds)}" if size.bytes_known else ""
    return f" and moved {counted(one.moved, 'expert')}{moved_bytes}{stall}"


def _memory(size: Size) -> str:
    taken = size.redundant_bytes
    if not taken:
        return ""
    verb = "takes" if size.redundant == 1 else "take"
    return f"; {counted(size.redundant, 'redundant expert')} {verb} {decimal(taken)} on each rank"


def times_mean(one: Replayed) -> str:
    return f"{one.mean_imbalance:.2f} times the mean load"
