"""What the demo shows: a live panel on a terminal, plain lines elsewhere, and the verdict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from demo_phase import Level, Phase, total
from demo_traffic import Tally
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ep_rebalance.telemetry.metrics import OUTCOMES

SECONDS_BETWEEN_LINES = 5.0
BAR_WIDTH = 40


class Screen:
    """Shows progress: a panel that is redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._last_line = float("-inf")
        self._last_generation = 0
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def waiting(self, what: str, seconds: float) -> None:
        """Something takes its time: `seconds` so far."""
        line = f"{what}: {seconds:.0f} s"
        if self._live:
            self._live.update(Text(line, style="dim"), refresh=True)
        elif self._line_is_due(4 * SECONDS_BETWEEN_LINES):
            self.say(line)

    def progress(self, phase: Phase, tally: Tally) -> None:
        """How a phase goes."""
        if self._live:
            self._live.update(_panel(phase, tally), refresh=True)
            return
        status = phase.last
        if status.generation > self._last_generation:
            self._last_generation = status.generation
            self.say(f"    generation {status.generation} is served")
        if self._line_is_due(SECONDS_BETWEEN_LINES):
            self.say(_progress_line(phase, tally))
            self.say(f"    last decision: {status.last_decision or 'none yet'}")

    def _line_is_due(self, every: float) -> bool:
        now = time.monotonic()
        due = now - self._last_line >= every
        if due:
            self._last_line = now
        return due


def _progress_line(phase: Phase, tally: Tally) -> str:
    level, status = phase.now, phase.last
    imbalance = f"{level.served:.2f} (without {level.without:.2f})" if level else "not yet known"
    return (
        f"  {phase.elapsed:3.0f} s {phase.name}: imbalance {imbalance}, generation "
        f"{status.generation}, {total(status.migrated_experts)} experts moved, "
        f"{phase.tokens_per_second:.0f} tokens/s, {tally.equal} of {tally.compared} answers equal"
    )


def _panel(phase: Phase, tally: Tally) -> RenderableType:
    status, level = phase.last, phase.now
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    rows.add_row("imbalance now", _bar(level.served if level else None, status.ep_size, "green"))
    without = level.without if level else None
    rows.add_row("without rebalancing", _bar(without, status.ep_size, "red"))
    moving = "  (experts are moving)" if status.migrating else ""
    rows.add_row("generation", f"{status.generation}{moving}")
    plans = ", ".join(f"{status.plans.get(name, 0)} {name}" for name in OUTCOMES)
    rows.add_row("plans", plans.replace("_", " "))
    size = decimal(total(status.migrated_bytes))
    rows.add_row("moved", f"{total(status.migrated_experts)} experts, {size}")
    rows.add_row("traffic", f"{phase.tokens_per_second:.0f} tokens/s")
    rows.add_row("fixed answers", _answers(tally))
    rows.add_row("last decision", status.last_decision or "none yet")
    left = max(phase.seconds - phase.elapsed, 0.0)
    title = f"traffic: {phase.name} - {left:.0f} s left"
    return Panel(rows, title=title, title_align="left", border_style="cyan")


def _bar(imbalance: float | None, ranks: int, colour: str) -> RenderableType:
    """A bar from 1 (even) to the number of ranks (one rank does everything)."""
    if imbalance is None:
        return Text("not yet known", style="dim")
    row = Table.grid(padding=(0, 1))
    row.add_row(
        f"{imbalance:.2f}",
        Bar(ranks - 1, 0, imbalance - 1, width=BAR_WIDTH, color=colour, bgcolor="grey23"),
        Text(f"busiest rank {imbalance - 1:+.0%}", style="dim"),
    )
    return row


def _answers(tally: Tally) -> Text:
    if not tally.compared:
        return Text("kept to compare with")
    text = f"{tally.equal} of {tally.compared} equal"
    if tally.during_moves:
        text += f"; experts moved while {tally.during_moves} of them were written"
    return Text(text, style="green" if tally.equal == tally.compared else "bold red")


def verdict(phases: Sequence[Phase], tally: Tally) -> RenderableType:
    """The closing table."""
    table = Table(title="Imbalance (busiest rank / mean; 1 is even)", title_justify="left")
    table.add_column("traffic")
    for name in (
        "at start\nwithout us",
        "at start\nwith us",
        "at end\nwithout us",
        "at end\nwith us",
        "busiest\nrank",
        "gener-\nations",
        "experts\nmoved",
        "bytes\nmoved",
        "tokens/s",
    ):
        table.add_column(name, justify="right")
    for phase in phases:
        table.add_row(phase.name, *_phase_cells(phase))
    differing = Group(*(Text(line, style="red") for line in tally.differing[:10]))
    return Group(Rule("verdict"), table, Text("Fixed answers: ") + _answers(tally), differing)


def _phase_cells(phase: Phase) -> list[str]:
    end = phase.at_end
    return [
        *_level_cells(phase.at_start),
        *_level_cells(end),
        f"{-end.gain:+.1%}" if end else "-",
        str(phase.generations),
        str(phase.experts_moved),
        decimal(phase.bytes_moved),
        f"{phase.tokens_per_second:.0f}",
    ]


def _level_cells(level: Level | None) -> list[str]:
    return [f"{level.without:.3f}", f"{level.served:.3f}"] if level else ["-", "-"]
