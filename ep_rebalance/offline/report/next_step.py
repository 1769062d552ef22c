"""Next step: what to do after a replay: options for `vllm serve`, or why the plugin is better left off."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.gain import Gain
from ep_rebalance.offline.layouts import nothing_to_gain
from ep_rebalance.offline.policies import SERVER_POLICIES
from ep_rebalance.offline.report.sizes import Size, by_size
from ep_rebalance.offline.report.verdict import margin, noise, times_mean
from ep_rebalance.offline.report.words import counted, percent
from ep_rebalance.offline.run import Replayed, with_planner
from ep_rebalance.offline.step_time import MeasuredSteps

_CHOSEN = ("mode", "window", "planner", "hardware", "decision", "links", "migration", "dispatch")
"""The sections of the settings that a replay's result depends on."""

_COMMAND = "vllm serve MODEL ... --enable-expert-parallel --plugin ep_rebalance"


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStep:
    """What to do.

    text: a sentence or two.
    command: for a shell; "" if there is nothing to start.
    """

    text: str
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Option:
    """A replay with a policy that the plugin can serve with."""

    size: Size
    one: Replayed
    gain: Gain

    @property
    def sure(self) -> bool:
        return self.gain.sure and _waits(self.one)


def next_step(head: TraceHead, replayed: Sequence[Replayed]) -> NextStep:
    """What to do on as many ranks as were recorded, or on the first number of ranks that was replayed."""
    sizes = by_size(head, replayed)
    ranks = {size.ranks: None for size in sizes}
    chosen = head.ep_size if head.ep_size in ranks else sizes[0].ranks
    options = [one for size in sizes if size.ranks == chosen for one in _options(size)]
    more = " `ep-rebalance advise` tells how many GPUs pay." if len(ranks) > 1 else ""
    if not options:
        return NextStep(
            text="Next: replay with --policy ours --policy none, to see what rebalancing would gain."
        )
    best = _best(options)
    if best is None:
        return NextStep(text=_why_not(max(options, key=lambda option: option.gain.saved)) + more)
    larger = [option.one for option in options if option.size.redundant > best.size.redundant]
    if larger and not any(Gain.of(one, best.one).sure for one in larger):
        more = f" More redundant experts are not surely faster.{more}"
    return _switch_on(head, best, f"{_against_fewest(best, sizes)}{more}")


def _against_fewest(best: _Option, sizes: Sequence[Size]) -> str:
    """What the redundant experts and the moves save together, if fewer were replayed, too."""
    size = best.size
    same = (one for one in sizes if one.ranks == size.ranks and one.first("none"))
    fewest = min(same, key=lambda one: one.redundant)
    if fewest.redundant == size.redundant:
        return ""
    baseline = fewest.first("none")
    assert baseline is not None
    saved = percent(Gain.of(best.one, baseline).saved)
    plain = counted(fewest.redundant, "redundant expert")
    return f" Compared with {plain}, as loaded, it saves {saved}."


def _options(size: Size) -> list[_Option]:
    by_policy = {one.scenario.policy: one for one in size.results if size.first("none")}
    return [
        _Option(size=size, one=by_policy[name], gain=gain)
        for name in SERVER_POLICIES
        if name in by_policy and (gain := size.gain(by_policy[name]))
    ]


def _best(options: Sequence[_Option]) -> _Option | None:
    """The one with the fewest redundant experts of those that no other is surely faster than."""
    sure = [option for option in options if option.sure]
    if not sure:
        return None
    fastest = min(sure, key=lambda option: option.one.mean_step_seconds)
    cheapest = sorted(sure, key=lambda option: option.size.redundant)
    return next(option for option in cheapest if not Gain.of(fastest.one, option.one).sure)


def _waits(one: Replayed) -> bool:
    """Whether some of a step surely waits for experts, by one standard error, as the server decides."""
    time = one.scenario.step_time
    return not isinstance(time, MeasuredSteps) or time.fraction > time.standard_error


def _switch_on(head: TraceHead, best: _Option, more: str) -> NextStep:
    name, size = best.one.scenario.policy, best.size
    settings = _settings(head, best)
    served = not head.origin and load_config(head.config).mode == "rebalance"
    if served and size.ranks == head.ep_size and not settings:
        return NextStep(text=f"Next: nothing, the recorded server had these settings.{more}")
    if size.redundant:
        settings["planner.redundant_experts"] = size.redundant
    lines = [_COMMAND]
    lines += [f"--ep-rebalance-config.{key} {_shell(value)}" for key, value in settings.items()]
    policy = "" if name == "ours" else f" and policy {name}"
    gained = f"which saves {percent(best.gain.saved)}, {margin(best.gain)}"
    return NextStep(
        text=f"Next: serve with the plugin{policy} on {size.label}, {gained}.{more}",
        command=" \\\n    ".join(lines),
    )


def _settings(head: TraceHead, best: _Option) -> dict[str, Any]:
    """Settings, by dotted key, that differ from the recorded server's, or from the defaults."""
    config = with_planner(
        best.one.scenario.config,
        policy=SERVER_POLICIES[best.one.scenario.policy],
        redundant_experts=best.size.redundant,
    )
    recorded, chosen = (flat(one.as_dict()) for one in (load_config(head.config), config))
    return {
        key: value
        for key, value in chosen.items()
        if value != recorded.get(key) and key.partition(".")[0] in _CHOSEN
    }


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        inner = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def _shell(value: Any) -> str:
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))


def _why_not(option: _Option) -> str:
    size, one, gain = option.size, option.one, option.gain
    hindsight = size.first("hindsight")
    possible = size.gain(hindsight) if hindsight else None
    off = "Nothing to gain here: leave it off, because"
    fixed = nothing_to_gain(size.experts, size.ranks, size.redundant)
    if fixed:
        return f"Nothing to gain here: leave it off.{_more_slots(size)}"
    if gain.error is None:
        return f"Next: record longer. {len(one.seconds_N)} snapshots are too few to tell a gain from noise."
    if not one.plans:
        return "Next: record longer. No migration ended within the trace."
    if gain.loss:
        return f"{off} steps would be longer."
    if not one.commits:
        plans = counted(len(one.plans), "plan")
        return f"{off} of {plans} none was worth its migration. Of the last: {one.plans[-1].reason}"
    if gain.sure:
        return f"{off} step times do not show that steps wait for the busiest ranks' experts."
    if possible and possible.sure:
        return (
            f"{off} load shifts faster than plans follow ({noise(gain)}), though knowing the future would "
            f"have saved {percent(possible.saved)}.{_more_slots(size)}"
        )
    baseline = size.first("none")
    assert baseline is not None
    return (
        f"{off} nothing stands out from noise ({noise(gain)}). As loaded, the busiest rank gets "
        f"{times_mean(baseline)}."
    )


def _more_slots(size: Size) -> str:
    """A hint at one more slot on each rank; "" if there can be none."""
    more = size.redundant + size.ranks
    if size.experts + more > size.experts * size.ranks:
        return ""
    return f" More slots may help: replay with --redundant {more}."
