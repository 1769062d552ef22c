"""Report: what a replay found, as one HTML page that needs nothing else, not even a network.

Sentences, tables and figures are made here; report.html holds the page around them, its colours and
the script that hands the figures to plotly.js.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources
from itertools import accumulate
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from ep_rebalance import __version__
from ep_rebalance.replay.balancing import PlanMade
from ep_rebalance.replay.run import SERVER_POLICIES, Replayed
from ep_rebalance.replay.step_time import MeasuredSteps, ModelledSteps, StepTime
from ep_rebalance.topology import LINKS, Link
from ep_rebalance.trace import TraceHead

MAX_POINTS = 300
"""Of a line; neighbouring snapshots are averaged to come down to it."""
MAX_COMMITS = 200
"""Rows in the table of commits."""

_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "ours": "the plugin: few moves, made only if they save more than they cost",
        "greedy": "the published DeepSeek algorithm in the plugin's loop; starts anew each time",
        "vllm": "vLLM's own policy in the plugin's loop; starts anew each time",
        "static": "placed once, by the first window of load",
        "none": "as the engine loads the experts (contiguous); nothing moves",
        "recorded": "what the recorded server served",
        "hindsight": "knows the load before it comes: a bound that no server can reach",
    }
)
_SUBJECTS: Mapping[str, str] = MappingProxyType(
    {
        "ours": "rebalancing",
        "static": "placing the experts once",
        "recorded": "serving as recorded",
    }
)
_DASHES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "greedy": (10, 3),
        "vllm": (5, 3),
        "static": (10, 3, 3, 3),
        "recorded": (16, 4),
        "hindsight": (6, 2, 2, 2, 2, 2),
    }
)
"""Lengths of a line's dashes and gaps in pixels: who cannot tell two colours apart can tell these.
Blue and black, of `ours` and `none`, everybody can tell apart."""
_WIDTHS: Mapping[str, float] = MappingProxyType({"ours": 3, "none": 1.5})
_LINK_TITLES: Mapping[str, str] = MappingProxyType(
    {"local": "within a rank", "intranode": "within a node", "internode": "between nodes"}
)
_NUMBER = re.compile(r"\d[\d.,]*(?:e[+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class _Size:
    """Replays with the same ranks and redundant experts. bytes_known: whether an expert's are."""

    ranks: int
    redundant: int
    bytes_known: bool
    results: tuple[Replayed, ...]

    @property
    def label(self) -> str:
        return f"EP{self.ranks}, {_count(self.redundant, 'redundant expert')}"

    @property
    def planned(self) -> tuple[Replayed, ...]:
        """Those whose moves are counted."""
        return tuple(one for one in self.results if one.scenario.policy in SERVER_POLICIES)

    @property
    def extremes(self) -> tuple[Replayed, ...]:
        """Before and after: `none` or the first, and `ours` or the last; one if there is no other."""
        before = self.first("none") or self.results[0]
        after = self.first("ours")
        if after is None or after is before:
            after = self.results[-1]
        return (before,) if after is before else (before, after)

    def first(self, *policies: str) -> Replayed | None:
        """The first of these policies that was replayed."""
        by_policy = {one.scenario.policy: one for one in self.results}
        return next((by_policy[policy] for policy in policies if policy in by_policy), None)

    def saved(self, one: Replayed) -> float | None:
        """Part of the step time of policy none, None without it."""
        baseline = self.first("none")
        return None if baseline is None else 1 - one.mean_step_seconds / baseline.mean_step_seconds


def check_report(path: Path) -> None:
    """What `write_report` would raise, before a long replay."""
    _plotly_js()
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path} cannot be written; give --report a file in a folder that can")


def write_report(path: Path, head: TraceHead, replayed: Sequence[Replayed]) -> None:
    """Replace the file at once by a page about all scenarios.

    head: of the trace. Raises ValueError if plotly is not installed, OSError if the folder cannot be
    written.
    """
    plotly = _plotly_js()
    page, section = _templates()
    sizes = _by_size(head, replayed)
    figures = {f"{name}-{i}": one for i, size in enumerate(sizes) for name, one in _figures(size)}
    text = page.substitute(
        model=escape(head.model),
        notice=_notice(head),
        verdict="".join(f"<p>{escape(line)}</p>" for line in verdicts(head, replayed)),
        facts=_facts(head, replayed[0]),
        summary=_summary(sizes),
        policies=_policies(replayed),
        controls=_controls(sizes, replayed),
        sizes="".join(_section(section, i, size) for i, size in enumerate(sizes)),
        reading="".join(f"<li>{escape(line)}</li>" for line in _reading(head, replayed[0])),
        figures=_script_json(figures),
        plotly=plotly,
    )
    _replace(path, text)


def _plotly_js() -> str:
    try:
        script: str = importlib.import_module("plotly.offline").get_plotlyjs()
    except ImportError:
        raise ValueError(
            "a report draws its charts with plotly: pip install 'ep-rebalance[report]'"
        ) from None
    return script


def _templates() -> tuple[Template, Template]:
    """The page, and the section that is repeated for each size."""
    text = resources.files("ep_rebalance.replay").joinpath("report.html").read_text("utf-8")
    page, _, section = text.partition("<!-- What follows is repeated for each size. -->\n")
    return Template(page), Template(section)


def _script_json(value: Any) -> str:
    """JSON that no HTML parser takes for the end of the script around it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(handle, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _by_size(head: TraceHead, replayed: Sequence[Replayed]) -> list[_Size]:
    results: dict[tuple[int, int], list[Replayed]] = {}
    for one in replayed:
        scenario = one.scenario
        key = (scenario.topology.num_ranks, scenario.config.planner.redundant_experts)
        results.setdefault(key, []).append(one)
    return [_Size(*key, all(head.expert_bytes), tuple(same)) for key, same in results.items()]


def _policy_names(replayed: Sequence[Replayed]) -> list[str]:
    return list(dict.fromkeys(one.scenario.policy for one in replayed))


# Sentences.


def verdicts(head: TraceHead, replayed: Sequence[Replayed]) -> list[str]:
    """One sentence in plain words for each size."""
    sizes = _by_size(head, replayed)
    if len(sizes) == 1:
        return [_verdict(sizes[0])]
    return [f"{size.label}: {_verdict(size)}" for size in sizes]


def _verdict(size: _Size) -> str:
    baseline, hindsight = size.first("none"), size.first("hindsight")
    served = size.first(*SERVER_POLICIES, "static", "recorded")
    clauses = []
    if served is not None:
        clauses.append(
            f"{_subject(served)} would have {_effect(size, served)}{_price(size, served)}"
        )
    elif baseline is not None:
        clauses.append(f"as loaded, the busiest rank gets {_times_mean(baseline)}")
    if hindsight is not None:
        future = "knowing the future would have"
        saved = size.saved(hindsight)
        clauses.append(
            f"{future} kept the busiest rank at {_times_mean(hindsight)}"
            if saved is None
            else f"{future} saved {_percent(saved)}"
        )
    text = "; ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}."


def _subject(one: Replayed) -> str:
    policy = one.scenario.policy
    return _SUBJECTS.get(policy, f"policy {policy}")


def _effect(size: _Size, one: Replayed) -> str:
    saved = size.saved(one)
    if saved is None:
        return f"kept the busiest rank at {_times_mean(one)}"
    if round(saved, 3) < 0:
        return f"added {_percent(-saved)} to the step time against the contiguous placement"
    return f"saved {_percent(saved)} of the step time against the contiguous placement"


def _price(size: _Size, one: Replayed) -> str:
    if one not in size.planned:
        return ""
    if not one.moved:
        return " and moved no expert"
    moved_bytes = f" ({decimal(one.moved_bytes)})" if size.bytes_known else ""
    return f" and moved {_count(one.moved, 'expert')}{moved_bytes}"


def _times_mean(one: Replayed) -> str:
    return f"{one.mean_imbalance:.2f} times the mean load"


def _reading(head: TraceHead, one: Replayed) -> list[str]:
    timing = (
        f"This load was not recorded by a server ({head.origin}): who is busy is as real as its source, "
        "but seconds, and how soon a plan is made, are not."
        if head.origin
        else "Load and step times were recorded by a server, so the moments of snapshots and plans are real."
    )
    return [
        "Every placement is scored on load that its plan had not seen, so a saving is one that a server "
        "would have had; hindsight alone knows what comes.",
        "Imbalance is the busiest rank's tokens over the mean, where 1 is even, because each layer waits "
        "for its busiest rank; balancedness is the mean over the busiest.",
        _how_steps_are_predicted(one.scenario.step_time),
        timing,
        "Moved experts and bytes are what a policy that plans moved while it served; for the others, "
        "moves are not counted (-).",
    ]


def _how_steps_are_predicted(step_time: StepTime) -> str:
    if isinstance(step_time, ModelledSteps):
        hardware = step_time.hardware
        return (
            f"Step times are computed, not measured: from {hardware.memory_bytes_per_second / 1e12:.3g} TB/s "
            f"of memory, {hardware.flops_per_second / 1e12:,.0f} TFLOP/s and links of "
            f"{hardware.intranode / 1e9:,.0f} GB/s within and {hardware.internode / 1e9:,.0f} GB/s between "
            f"nodes, with experts and all-to-all taken as {_percent(step_time.fraction, 0)} of a step with "
            "even load."
        )
    fraction = (
        f"{_percent(step_time.fraction, 0)} " if isinstance(step_time, MeasuredSteps) else "part "
    )
    return (
        f"Predicted step times are those of the trace: {fraction}of each (expert_time_fraction) is taken "
        "to wait for the busiest rank's experts and scaled by its tokens, the rest stays as it is."
    )


def _imbalance_sentence(size: _Size) -> str:
    means = (f"{one.scenario.policy} {one.mean_imbalance:.2f}" for one in size.results)
    ticks = (
        f" Ticks at the bottom are the {_migrations(one)} of {one.scenario.policy}."
        for one in size.planned[:1]
        if one.commits
    )
    return f"Busiest rank over mean, over the whole trace: {', '.join(means)}.{''.join(ticks)}"


def _step_sentence(size: _Size) -> str:
    means = (
        f"{one.scenario.policy} {_milliseconds(one.mean_step_seconds)}" for one in size.results
    )
    return f"Mean over all steps: {', '.join(means)}."


def _moved_sentence(size: _Size) -> str:
    totals = (
        f"{one.scenario.policy} "
        f"{decimal(one.moved_bytes) if size.bytes_known else _count(one.moved, 'expert')} "
        f"in {_migrations(one)}"
        for one in size.planned
    )
    return f"In all: {', '.join(totals)}."


def _share_sentence(size: _Size) -> str:
    parts = []
    for one in size.extremes:
        layer, rank = np.unravel_index(int(one.share_LR.argmax()), one.share_LR.shape)
        parts.append(
            f"with {one.scenario.policy} the busiest is rank {rank} in layer {layer}, at "
            f"{one.share_LR[layer, rank]:.2f} times the mean"
        )
    return f"Tokens over the layer's mean, summed over the whole trace: {'; '.join(parts)}."


# Numbers in words.


def _percent(part: float, digits: int = 1) -> str:
    return f"{round(100 * part, digits) + 0.0:.{digits}f}\N{NO-BREAK SPACE}%"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}\N{NO-BREAK SPACE}ms"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _migrations(one: Replayed) -> str:
    return _count(len(one.commits), "migration")


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# HTML.


def _notice(head: TraceHead) -> str:
    if not head.origin:
        return ""
    return f'<p class="notice"><strong>Not recorded by a server:</strong> {escape(head.origin)}</p>'


def _facts(head: TraceHead, one: Replayed) -> str:
    facts = {
        "Layers and experts": f"{head.layers} x {head.experts}, {head.top_k} per token",
        "Trace": f"{len(one.step_N):,} snapshots, {one.steps_N.sum():,} steps",
        "Versions": f"ep_rebalance {__version__}, trace by {head.plugin_version}",
    }
    if not head.origin:
        facts |= {
            "Recorded by a server": f"{datetime.fromtimestamp(head.started, UTC):%Y-%m-%d %H:%M} UTC",
            "Engine": head.engine,
            "Placement": f"EP{head.ep_size}, {head.slots} slots per layer",
        }
    return "".join(
        f"<div><dt>{term}</dt><dd>{escape(fact)}</dd></div>" for term, fact in facts.items()
    )


def _name(policy: str) -> str:
    """A policy and how its line looks."""
    dashes = ",".join(map(str, _DASHES.get(policy, ())))
    return (
        '<span class="name"><svg class="swatch" viewBox="0 0 32 12" aria-hidden="true">'
        f'<line x2="32" y1="6" y2="6" stroke-dasharray="{dashes}" style="stroke:var(--{escape(policy)})"/>'
        f"</svg>{escape(policy)}</span>"
    )


def _policies(replayed: Sequence[Replayed]) -> str:
    return "".join(
        f"<div><dt>{_name(policy)}</dt><dd>{_MEANINGS.get(policy, '')}</dd></div>"
        for policy in _policy_names(replayed)
    )


def _controls(sizes: Sequence[_Size], replayed: Sequence[Replayed]) -> str:
    options = "".join(f'<option value="{i}">{size.label}</option>' for i, size in enumerate(sizes))
    select = f'<label>Size <select id="size">{options}</select></label>' if len(sizes) > 1 else ""
    boxes = "".join(
        f'<label><input type="checkbox" value="{escape(policy)}" checked>{_name(policy)}</label>'
        for policy in _policy_names(replayed)
    )
    return f'{select}<div role="group" aria-labelledby="lines"><span id="lines">Lines</span>{boxes}</div>'


def _table(
    caption: str, columns: Mapping[str, str], groups: Sequence[Sequence[Sequence[str]]]
) -> str:
    """columns: their titles, and a class of report.html for each ("" for numbers). groups: of rows of
    cells, in HTML."""
    heads = "".join(
        f'<th scope="col" class="{kind}">{title}</th>' for title, kind in columns.items()
    )
    bodies = "".join(
        f"<tbody>{''.join(_row(list(columns.values()), row) for row in rows)}</tbody>"
        for rows in groups
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table>'
        f"<caption>{caption}</caption><thead><tr>{heads}</tr></thead>{bodies}</table></div>"
    )


def _row(kinds: Sequence[str], cells: Sequence[str]) -> str:
    first = f'<th scope="row" class="{kinds[0]}">{cells[0]}</th>'
    others = zip(kinds[1:], cells[1:], strict=True)
    rest = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in others)
    return f"<tr>{first}{rest}</tr>"


def _summary(sizes: Sequence[_Size]) -> str:
    columns = {
        "policy": "text",
        "EP": "",
        "redundant": "",
        "imbalance": "",
        "balancedness": "",
        "predicted step": "",
        "saved against none": "",
        "plans": "text",
        "experts moved": "",
        "bytes moved": "",
    }
    groups = [[_summary_row(size, one) for one in size.results] for size in sizes]
    return _table("Each policy over the whole trace", columns, groups)


def _summary_row(size: _Size, one: Replayed) -> list[str]:
    saved = size.saved(one)
    counted = one in size.planned
    plans = Counter(plan.outcome for plan in one.plans)
    return [
        _name(one.scenario.policy),
        str(size.ranks),
        str(size.redundant),
        f"{one.mean_imbalance:.3f}",
        f"{one.mean_balancedness:.3f}",
        _milliseconds(one.mean_step_seconds),
        "-" if saved is None or one is size.first("none") else _percent(saved),
        escape(", ".join(f"{count} {_plain(name)}" for name, count in plans.items())) or "-",
        f"{one.moved:,}" if counted else "-",
        decimal(one.moved_bytes) if counted and size.bytes_known else "-",
    ]


def _plain(outcome: str) -> str:
    return outcome.replace("_", " ")


def _section(template: Template, number: int, size: _Size) -> str:
    limit = _share_limit(size)
    clipped = any(one.share_LR.max() > 1 + limit for one in size.extremes)
    still = "<p>None of these policies moves experts while it serves.</p>"
    return template.substitute(
        number=number,
        label=size.label,
        imbalance=_chart(f"imbalance-{number}", "Imbalance", caption=_imbalance_sentence(size)),
        step=_chart(f"step-{number}", "Predicted step time", caption=_step_sentence(size)),
        unit="Bytes" if size.bytes_known else "Experts",
        moved=_chart(f"moved-{number}", "Sum of moves", caption=_moved_sentence(size))
        if size.planned
        else still,
        share=escape(_share_sentence(size)),
        least=f"{1 - limit:.1f}",
        most=f"{1 + limit:.1f}{' or more' if clipped else ''}",
        maps="".join(
            _chart(f"share{i}-{number}", "Heat map", title=f"{when}: {one.scenario.policy}")
            for i, (when, one) in enumerate(zip(("Before", "After"), size.extremes, strict=False))
        ),
        changes=_changes(size),
    )


def _chart(name: str, what: str, *, title: str = "", caption: str = "") -> str:
    """A place for a chart. what: it shows, for who cannot see it."""
    heading = f"<h4>{escape(title)}</h4>" if title else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    label = f"{what}, chart. {title}{caption}"
    return (
        f'<figure>{heading}<div class="chart" id="{name}" role="img" aria-label="{escape(label)}"></div>'
        f"{below}</figure>"
    )


def _changes(size: _Size) -> str:
    if not size.planned:
        return "<p>Nothing: no policy here makes plans.</p>"
    one = size.planned[0]
    return _commits(size, one) + _refused(one)


def _commits(size: _Size, one: Replayed) -> str:
    policy = escape(one.scenario.policy)
    if not one.commits:
        return f"<p>Nothing: {policy} committed no plan.</p>"
    links = [link for link in LINKS if any(link in plan.bytes for plan in one.commits)]
    links = links if size.bytes_known else []
    columns = {
        "generation": "",
        "planned at step": "",
        "served from step": "",
        "experts moved": "",
        **{f"bytes {_LINK_TITLES[link]}": "" for link in links},
        "predicted gain": "",
        "layers": "text wide",
    }
    rows = [_commit_row(plan, links) for plan in one.commits[:MAX_COMMITS]]
    more = len(one.commits) - len(rows)
    rest = f"<p>And {_count(more, 'more commit')}, not shown.</p>" if more else ""
    return _table(f"Committed plans of {policy}", columns, [rows]) + rest


def _commit_row(plan: PlanMade, links: Sequence[Link]) -> list[str]:
    return [
        f"{plan.generation}",
        f"{plan.step:,}",
        f"{plan.served_at:,}",
        f"{plan.moved:,}",
        *(decimal(plan.bytes[link]) if link in plan.bytes else "-" for link in links),
        _percent(plan.predicted_gain, 2),
        _ranges(plan.layers) or "-",
    ]


def _refused(one: Replayed) -> str:
    """Plans that were not carried out, those together whose reasons differ by their numbers only."""
    refused = [plan for plan in one.plans if plan.outcome != "committed"]
    policy = escape(one.scenario.policy)
    if not refused:
        return f"<p>No plan of {policy} was refused.</p>"
    kinds: dict[tuple[str, str], list[PlanMade]] = {}
    for plan in refused:
        kinds.setdefault((plan.outcome, _NUMBER.sub("", plan.reason)), []).append(plan)
    rows = [
        [escape(_plain(outcome)), f"{len(plans):,}", escape(plans[-1].reason)]
        for (outcome, _), plans in sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    ]
    columns = {"outcome": "text", "plans": "", "reason, with the last one's numbers": "text wide"}
    return f"<h4>Refused</h4>{_table(f'Plans of {policy} that were refused', columns, [rows])}"


# Figures: what plotly.js draws. Colours are the page's; `meta.policy` tells it which.


def _figures(size: _Size) -> Iterator[tuple[str, dict[str, Any]]]:
    commits = [_commit_ticks(size, one) for one in size.planned[:1] if one.commits]
    imbalance = [_line(one, one.imbalance_N, one.pairs_N) for one in size.results]
    yield "imbalance", _timeline(size, [*imbalance, *commits], "Busiest rank over mean", ".3f")
    step = [_line(one, 1e3 * one.seconds_N, one.steps_N) for one in size.results]
    yield "step", _timeline(size, step, "Mean step, ms", ".2f")
    if size.planned:
        yield "moved", _moved_figure(size)
    for index, one in enumerate(size.extremes):
        yield f"share{index}", _heat_map(one, _share_limit(size))


def _moved_figure(size: _Size) -> dict[str, Any]:
    title = "Bytes moved" if size.bytes_known else "Experts moved"
    figure = _timeline(size, [_staircase(size, one) for one in size.planned], title, ".4~s")
    suffix = "B" if size.bytes_known else ""
    figure["layout"]["yaxis"] |= {"tickformat": "~s", "ticksuffix": suffix, "rangemode": "tozero"}
    return figure


def _timeline(
    size: _Size, traces: Sequence[dict[str, Any]], title: str, hover: str
) -> dict[str, Any]:
    steps = size.results[0].step_N
    layout = {
        "height": 320,
        "hovermode": "x unified",
        "xaxis": {
            "title": {"text": "Engine step"},
            "tickformat": ",d",
            "range": [int(steps.min()), int(steps.max())],
            "unifiedhovertitle": {"text": "Step %{x:,d}"},
        },
        "yaxis": {"title": {"text": title}, "hoverformat": hover},
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }
    return {"data": list(traces), "layout": layout}


def _line(
    one: Replayed, values_N: NDArray[np.float64], weights_N: NDArray[np.number]
) -> dict[str, Any]:
    begins = np.unique(np.linspace(0, len(values_N), MAX_POINTS, endpoint=False).astype(np.int64))
    weights_N = np.maximum(weights_N, 1e-9)
    means = np.add.reduceat(values_N * weights_N, begins) / np.add.reduceat(weights_N, begins)
    ends = np.append(begins[1:], len(values_N)) - 1
    return _trace(one, x=one.step_N[ends].tolist(), y=[float(f"{mean:.5g}") for mean in means])


def _staircase(size: _Size, one: Replayed) -> dict[str, Any]:
    amounts = [sum(plan.bytes.values()) if size.bytes_known else plan.moved for plan in one.commits]
    steps = [plan.served_at for plan in one.commits]
    ends = one.step_N[[0, -1]].tolist()
    heights = list(accumulate(amounts, initial=0))
    trace = _trace(one, x=[ends[0], *steps, ends[1]], y=[*heights, heights[-1]])
    trace["line"]["shape"] = "hv"
    return trace


def _trace(one: Replayed, **points: list[Any]) -> dict[str, Any]:
    policy = one.scenario.policy
    dash = ",".join(f"{length}px" for length in _DASHES.get(policy, ())) or "solid"
    return {
        "type": "scatter",
        "mode": "lines",
        "name": policy,
        "meta": {"policy": policy},
        "zorder": int(policy == "ours"),
        "line": {"dash": dash, "width": _WIDTHS.get(policy, 2)},
        **points,
    }


def _commit_ticks(size: _Size, one: Replayed) -> dict[str, Any]:
    policy = one.scenario.policy
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "",
        "meta": {"policy": policy},
        "yaxis": "y2",
        "x": [plan.served_at for plan in one.commits],
        "y": [0.025] * len(one.commits),
        "text": [_commit_text(size, plan) for plan in one.commits],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": "line-ns-open", "size": 12, "line": {"width": 1.5}},
    }


def _commit_text(size: _Size, plan: PlanMade) -> str:
    moved_bytes = f", {decimal(sum(plan.bytes.values()))}" if size.bytes_known else ""
    return (
        f"Generation {plan.generation}: {_count(plan.moved, 'expert')}{moved_bytes}<br>"
        f"moved, predicted gain {_percent(plan.predicted_gain, 2)}"
    )


def _share_limit(size: _Size) -> float:
    """How far from 1 the colours of the heat maps reach, at most from 0 to 2."""
    farthest = max(float(np.abs(one.share_LR - 1).max()) for one in size.extremes)
    return float(np.clip(np.ceil(10 * farthest) / 10, 0.1, 1.0))


def _heat_map(one: Replayed, limit: float) -> dict[str, Any]:
    layers, ranks = one.share_LR.shape
    trace = {
        "type": "heatmap",
        "meta": {"policy": one.scenario.policy},
        "z": one.share_LR.round(3).tolist(),
        "zmin": 1 - limit,
        "zmax": 1 + limit,
        "showscale": False,
        "hovertemplate": "Layer %{y}, rank %{x}: %{z:.2f} times the mean<extra></extra>",
    }
    frame = {"showline": True, "mirror": True, "showgrid": False}
    layout = {
        "height": int(np.clip(80 + 11 * layers, 240, 720)),
        "xaxis": {"title": {"text": "Rank"}, "dtick": _tick_distance(ranks), **frame},
        "yaxis": {
            "title": {"text": "Layer"},
            "dtick": _tick_distance(layers),
            "autorange": "reversed",
            **frame,
        },
    }
    return {"data": [trace], "layout": layout}


def _tick_distance(number: int) -> int:
    """Of at most a dozen round numbers."""
    return next((step for step in (1, 2, 5, 10, 20, 50) if number <= 12 * step), 100)
