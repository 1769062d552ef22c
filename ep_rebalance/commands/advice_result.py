"""The result of `ep-rebalance advise`: statements and options as JSON or tables."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from ep_rebalance.commands.output import console
from ep_rebalance.commands.replay_result import SCHEMA_VERSION
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.advice import WORTH, Advice
from ep_rebalance.offline.model_shape import ExpertSize
from ep_rebalance.offline.statements import Statement
from ep_rebalance.offline.step_time import Hardware
from ep_rebalance.version import __version__

_METHOD = (
    "home: (token, expert) pairs that stay on their GPU. decode, prefill: how much longer the experts take "
    "than with no copies, for the tokens of that phase alone, spread over all recorded steps. Modelled: the "
    "bytes of the experts that get tokens over the memory's bandwidth, or the operations over the peak, "
    "whichever takes longer. Where decode is above 0, a server that mostly decodes wants fewer copies."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedHardware:
    """An accelerator.

    name: in words.
    how: a clause for each figure that says where it is from.
    """

    name: str
    figures: Hardware
    how: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceResult:
    """What `advise` found.

    statements: the answers, in the order in which they are read.
    best: all options, the best first.
    """

    head: TraceHead
    settings: RebalanceConfig
    size: ExpertSize
    hardware: NamedHardware
    statements: Sequence[Statement]
    best: Sequence[Advice]

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "plugin_version": __version__,
            "model": self.head.model,
            "origin": self.head.origin or "recorded",
            "config": self.settings.as_dict(),
            "expert_size": asdict(self.size),
            "hardware": {
                "name": self.hardware.name,
                "figures": self.hardware.figures.model_dump(),
                "how": dict(self.hardware.how),
            },
            "statements": [asdict(statement) for statement in self.statements],
            "rows": [
                asdict(option)
                | {"saved": option.saved, "command": serve_command(self.head.model, option)}
                for option in self.best
            ],
        }

    def print(self) -> None:
        """On a terminal: the statements, then the options with their reasons, and the best one's command."""
        terminal = console()
        for statement in self.statements:
            terminal.print(textwrap.fill(statement.text, terminal.width), highlight=False)
            terminal.print(f"  {statement.how}", style="dim", highlight=False)
        terminal.print(
            f"Experts of {decimal(self.size.expert_bytes)}, hidden size {self.size.hidden_size}: "
            f"{self.size.how}.",
            highlight=False,
        )
        terminal.print(f"Hardware: {self.hardware.name}.", highlight=False)
        for name, how in self.hardware.how.items():
            figure = getattr(self.hardware.figures, name)
            terminal.print(f"  {name} {figure:.3g}: {how}", style="dim", highlight=False)
        terminal.print(_table(self.best))
        for number, option in enumerate(self.best, 1):
            terminal.print(f"{number:3}. {option.reason}", highlight=False)
        terminal.print(_METHOD, style="dim", highlight=False)
        command = serve_command(self.head.model, self.best[0])
        terminal.print(f"\nThe best:\n{command}", highlight=False, soft_wrap=True)


def serve_command(model: str, option: Advice) -> str:
    """The command that serves a model as this option says."""
    if not option.expert_parallel:
        return f"vllm serve {shlex.quote(model)} --tensor-parallel-size {option.ranks}"
    words = ["vllm serve", shlex.quote(model), f"--data-parallel-size {option.ranks}"]
    words.append("--enable-expert-parallel")
    if option.saved >= WORTH:
        words.append("--plugin ep_rebalance")
        if option.redundant:
            words.append(f"--ep-rebalance-config.planner.redundant_experts {option.redundant}")
    return " ".join(words)


def _table(best: Sequence[Advice]) -> Table:
    title = "Options, the best first by tokens/s for each GPU (modelled, not measured)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("", "GPUs", "experts", "copies", "max/mean", "home", "decode", "prefill", "step ms",
                 "saved", "tokens/s each", "weights each"):  # fmt: skip
        table.add_column(name, justify="left" if name == "experts" else "right", no_wrap=True)
    for number, option in enumerate(best, 1):
        table.add_row(
            str(number),
            str(option.ranks),
            "parallel" if option.expert_parallel else "cut",
            str(option.redundant),
            f"{option.imbalance:.2f}",
            f"{option.home_share:.0%}" if option.expert_parallel else "-",
            *(_longer(option, phase) for phase in ("decode", "prefill")),
            f"{1e3 * option.step_seconds:.1f}",
            f"{option.saved:.1%}" if option.expert_parallel else "-",
            f"{option.tokens_per_second_and_rank:,.0f}",
            decimal(option.weight_bytes) + ("" if option.fits else " !"),
        )
    return table


def _longer(option: Advice, name: str) -> str:
    """How much longer the phase's experts take than without redundant ones; "-" if that is not known."""
    found = [phase for phase in option.phases if phase.phase == name]
    return f"{found[0].longer:+.1%}" if found and option.extra_bytes else "-"
