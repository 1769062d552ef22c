"""HTML: tables, controls, and the section about a size."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from string import Template

from rich.filesize import decimal

from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.balancing import PlanMade
from ep_rebalance.offline.gain import Gain
from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.report.figures import share_limit
from ep_rebalance.offline.report.frontier import PRICE_TITLES, best_for
from ep_rebalance.offline.report.next_step import NextStep
from ep_rebalance.offline.report.sentences import (
    imbalance_sentence,
    moved_sentence,
    share_sentence,
    step_sentence,
)
from ep_rebalance.offline.report.sizes import Size
from ep_rebalance.offline.report.words import LINK_TITLES, counted, milliseconds, percent, ranges_of
from ep_rebalance.offline.run import Replayed
from ep_rebalance.topology import LINKS, Link
from ep_rebalance.version import __version__

MAX_COMMITS = 200
"""Most rows in the table of commits."""


_NUMBER = re.compile(r"\d[\d.,]*(?:e[+-]?\d+)?")


def _policy_names(replayed: Sequence[Replayed]) -> list[str]:
    return list(dict.fromkeys(one.scenario.policy for one in replayed))


def origin_notice(head: TraceHead) -> str:
    if not head.origin:
        return ""
    return f'<p class="notice"><strong>Not recorded by a server:</strong> {escape(head.origin)}</p>'


def fact_list(head: TraceHead, one: Replayed) -> str:
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
    """A policy's name with a sample of its line."""
    dashes = ",".join(map(str, REPLAY_POLICIES[policy].line.dashes))
    return (
        '<span class="name"><svg class="swatch" viewBox="0 0 32 12" aria-hidden="true">'
        f'<line x2="32" y1="6" y2="6" stroke-dasharray="{dashes}" style="stroke:var(--{escape(policy)})"/>'
        f"</svg>{escape(policy)}</span>"
    )


def policy_colours() -> str:
    """A CSS variable with the colour of each policy."""
    return "\n  ".join(f"--{name}: {one.line.colour};" for name, one in REPLAY_POLICIES.items())


def policy_key(replayed: Sequence[Replayed]) -> str:
    return "".join(
        f"<div><dt>{_name(policy)}</dt><dd>{escape(REPLAY_POLICIES[policy].summary)}</dd></div>"
        for policy in _policy_names(replayed)
    )


def control_bar(sizes: Sequence[Size], replayed: Sequence[Replayed]) -> str:
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
    """A table that scrolls sideways if it is too wide.

    columns: titles, and a class of page.html for each ("" for numbers).
    groups: groups of rows of cells, in HTML.
    """
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


def verdict_text(sentences: Sequence[str], following: NextStep) -> str:
    command = f"<pre><code>{escape(following.command)}</code></pre>" if following.command else ""
    lines = [*sentences, following.text]
    return "".join(f"<p>{_code(escape(line))}</p>" for line in lines) + command


def _code(text: str) -> str:
    """What is between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def summary_table(sizes: Sequence[Size]) -> str:
    """With several sizes also where each replay is on a frontier."""
    columns = {
        "policy": "text",
        "EP": "",
        "redundant": "",
        "memory for them": "",
        "imbalance": "",
        "balancedness": "",
        "predicted step": "",
        "saved against none": "",
        "plans": "text",
        "experts moved": "",
        "bytes moved": "",
        "standing still": "",
    }
    groups = [[_summary_row(size, one) for one in size.results] for size in sizes]
    if len(sizes) > 1:
        columns["best for"] = "text"
        best = best_for(sizes)
        for size, rows in zip(sizes, groups, strict=True):
            for one, row in zip(size.results, rows, strict=True):
                row.append(", ".join(PRICE_TITLES[price] for price in best[one]) or "-")
    return _table("Each policy over the whole trace", columns, groups)


def _summary_row(size: Size, one: Replayed) -> list[str]:
    gain, memory = size.gain(one), size.redundant_bytes
    counted = one in size.planned
    plans = Counter(plan.outcome for plan in one.plans)
    return [
        _name(one.scenario.policy),
        str(size.ranks),
        str(size.redundant),
        "-" if memory is None else decimal(memory),
        f"{one.mean_imbalance:.3f}",
        f"{one.mean_balancedness:.3f}",
        milliseconds(one.mean_step_seconds),
        "-" if gain is None or one is size.first("none") else _saved(gain),
        escape(", ".join(f"{count} {_plain(name)}" for name, count in plans.items())) or "-",
        f"{one.moved:,}" if counted else "-",
        decimal(one.moved_bytes) if counted and size.bytes_known else "-",
        f"{one.stall_seconds:.2g}\N{NO-BREAK SPACE}s" if counted and size.bytes_known else "-",
    ]


def _saved(gain: Gain) -> str:
    """With two standard errors, if these are known."""
    error = "" if gain.error is None else f" ± {percent(2 * gain.error)}"
    return f"{percent(gain.saved)}{error}"


def _plain(outcome: str) -> str:
    return outcome.replace("_", " ")


def size_section(template: Template, number: int, size: Size) -> str:
    limit = share_limit(size)
    clipped = any(one.share_LR.max() > 1 + limit for one in size.extremes)
    still = "<p>None of these policies moves experts while it serves.</p>"
    return template.substitute(
        number=number,
        label=size.label,
        imbalance=chart(f"imbalance-{number}", "Imbalance", caption=imbalance_sentence(size)),
        step=chart(f"step-{number}", "Predicted step time", caption=step_sentence(size)),
        unit="Bytes" if size.bytes_known else "Experts",
        moved=chart(f"moved-{number}", "Sum of moves", caption=moved_sentence(size))
        if size.planned
        else still,
        share=escape(share_sentence(size)),
        least=f"{1 - limit:.1f}",
        most=f"{1 + limit:.1f}{' or more' if clipped else ''}",
        maps="".join(
            chart(f"share{i}-{number}", "Heat map", title=f"{when}: {one.scenario.policy}")
            for i, (when, one) in enumerate(zip(("Before", "After"), size.extremes, strict=False))
        ),
        changes=_changes(size),
    )


def chart(name: str, what: str, *, title: str = "", caption: str = "") -> str:
    """A place for a chart.

    what: the chart shows, for readers who cannot see it.
    """
    heading = f"<h4>{escape(title)}</h4>" if title else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    label = f"{what}, chart. {title}{caption}"
    return (
        f'<figure>{heading}<div class="chart" id="{name}" role="img" aria-label="{escape(label)}"></div>'
        f"{below}</figure>"
    )


def _changes(size: Size) -> str:
    if not size.planned:
        return "<p>Nothing: no policy here makes plans.</p>"
    one = size.planned[0]
    return _commits(size, one) + _refused(one)


def _commits(size: Size, one: Replayed) -> str:
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
        **{f"bytes {LINK_TITLES[link]}": "" for link in links},
        "predicted gain": "",
        "layers": "text wide",
    }
    rows = [_commit_row(size, plan, links) for plan in one.commits[:MAX_COMMITS]]
    more = len(one.commits) - len(rows)
    rest = f"<p>And {counted(more, 'more commit')}, not shown.</p>" if more else ""
    return _table(f"Committed plans of {policy}", columns, [rows]) + rest


def _commit_row(size: Size, plan: PlanMade, links: Sequence[Link]) -> list[str]:
    return [
        f"{plan.generation}",
        f"{plan.step:,}",
        f"{plan.served_at:,}",
        f"{plan.moved:,}",
        *(decimal(plan.bytes[link]) if link in plan.bytes else "-" for link in links),
        percent(plan.predicted_gain, 2),
        ranges_of(size.moe_layers[layer] for layer in plan.layers) or "-",
    ]


def _refused(one: Replayed) -> str:
    """Plans that were not carried out, grouped by reasons that differ only in their numbers."""
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
