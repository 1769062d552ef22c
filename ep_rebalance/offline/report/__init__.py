"""Report: what a replay found, as one HTML page that needs nothing else, not even a network.

Sentences, tables and figures are made here. page.html holds the page around them, its colours, and the
script that passes the figures to plotly.js.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.report.figures import figures_of
from ep_rebalance.offline.report.frontier_charts import frontier_figures, frontier_section
from ep_rebalance.offline.report.markup import (
    control_bar,
    fact_list,
    origin_notice,
    policy_colours,
    policy_key,
    size_section,
    summary_table,
    verdict_text,
)
from ep_rebalance.offline.report.next_step import next_step
from ep_rebalance.offline.report.sentences import reading_hints
from ep_rebalance.offline.report.sizes import by_size
from ep_rebalance.offline.report.verdict import verdicts
from ep_rebalance.offline.run import Replayed


def check_report(path: Path) -> None:
    """Raise before a long replay what `write_report` would raise after it.

    Raises ValueError if plotly is not installed, or `path` cannot be written.
    """
    _plotly_js()
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path} cannot be written; give --report a file in a folder that can")


def write_report(path: Path, head: TraceHead, replayed: Sequence[Replayed]) -> None:
    """Replace a file atomically by a page about all scenarios.

    head: of the trace.

    Raises ValueError if plotly is not installed, OSError if the folder cannot be written.
    """
    plotly = _plotly_js()
    page, section = _templates()
    sizes = by_size(head, replayed)
    figures = {f"{name}-{i}": one for i, size in enumerate(sizes) for name, one in figures_of(size)}
    figures |= frontier_figures(sizes)
    text = page.substitute(
        model=escape(head.model),
        notice=origin_notice(head),
        verdict=verdict_text(verdicts(head, replayed), next_step(head, replayed)),
        facts=fact_list(head, replayed[0]),
        summary=summary_table(sizes),
        colours=policy_colours(),
        policies=policy_key(replayed),
        frontier=frontier_section(sizes),
        controls=control_bar(sizes, replayed),
        sizes="".join(size_section(section, i, size) for i, size in enumerate(sizes)),
        reading="".join(f"<li>{escape(line)}</li>" for line in reading_hints(head, replayed[0])),
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
    """(the page, the section that is repeated for each size)."""
    text = resources.files("ep_rebalance.offline.report").joinpath("page.html").read_text("utf-8")
    page, _, section = text.partition("<!-- What follows is repeated for each size. -->\n")
    return Template(page), Template(section)


def _script_json(value: Any) -> str:
    """JSON in which no HTML parser finds the end of the script around it."""
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
