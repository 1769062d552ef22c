"""examples/notebook.ipynb runs from its first cell to its last, and what it says is so."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

go = pytest.importorskip("plotly.graph_objects")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CELLS = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]

pytestmark = pytest.mark.usefixtures("compiled_planner")


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as Jupyter does. Returns the value of an expression at its end."""
    tree = ast.parse(source)
    *before, last = tree.body
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "cell", "exec"), names)
        return None
    exec(compile(ast.Module(before, type_ignores=[]), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.fixture(scope="module")
def executed() -> tuple[dict[str, Any], list[Any]]:
    """(the names that the cells left, the values that they show)."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXAMPLES)
        shown = [
            run("".join(cell["source"]), names) for cell in CELLS if cell["cell_type"] == "code"
        ]
    return names, shown


def test_it_imports_nothing_of_the_package_but_its_public_face() -> None:
    import ep_rebalance

    source = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("ep_rebalance")]
    assert [node.module for node in ours] == ["ep_rebalance"]
    assert {name.name for name in ours[0].names} == set(ep_rebalance.__all__) - {"__version__"}


def test_it_draws_what_it_says(executed: tuple[dict[str, Any], list[Any]]) -> None:
    figures = [value for value in executed[1] if isinstance(value, go.Figure)]
    assert len(figures) == 3
    for figure in figures:
        assert figure.layout.title.text
        for trace in figure.data:
            drawn = np.array(trace.z if trace.type == "heatmap" else trace.y, dtype=float)
            assert drawn.size >= 4
            assert np.isfinite(drawn).all()


def test_a_plan_is_more_even_on_load_that_it_has_not_seen(
    executed: tuple[dict[str, Any], list[Any]],
) -> None:
    loaded, planned, with_copies = executed[0]["scores"].values()
    assert with_copies < planned < loaded


def test_the_plugin_lies_between_one_placement_and_hindsight(
    executed: tuple[dict[str, Any], list[Any]],
) -> None:
    replays = executed[0]["replays"]
    seconds = [replays[name].mean_step_seconds for name in ("hindsight", "ours", "static", "none")]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 4


def test_it_is_kept_without_outputs() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
