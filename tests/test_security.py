"""What docs/threat-model.md says of the sources: nothing in a file is run, and files stay in place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from traces import contiguous, head_of, snapshots

import ep_rebalance
from ep_rebalance.api import routes
from ep_rebalance.load.trace import TraceWriter

ROOT = Path(__file__).parents[1]
FOLDERS = (Path(ep_rebalance.__file__).parent, ROOT / "kernels", ROOT / "dashboards")

RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "dill.loads"),
    *("read_pickle", "cloudpickle.loads"),
}
"""Calls that would run what a file or a request holds."""

NEEDS = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
"""Calls that are safe with one argument only."""


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file, name, call) of every call in the package."""
    for folder in FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(folder)}:{node.lineno}", ast.unparse(node.func), node


def test_nothing_in_a_file_is_run():
    found = list(calls())
    assert [where for where, name, _ in found if name in RUNS_CODE] == []
    seen = set()
    for where, name, call in found:
        if name in NEEDS:
            argument, value = NEEDS[name]
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get(argument) == str(value), where
            seen.add(name)
    assert seen == set(NEEDS)


def test_no_command_goes_through_a_shell():
    for where, name, call in calls():
        if name.startswith("subprocess."):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("shell", "False") == "False", where


def test_objects_of_other_processes_come_from_ranks_alone():
    """torch.distributed reads them with pickle, so they may only come over the engine's own links."""
    objects = [
        where.split(":")[0] for where, name, _ in calls() if re.search(r"_object(_list)?$", name)
    ]
    assert sorted(objects) == [
        "balancer/session.py",
        "engines/vllm/movable_experts.py",
        "engines/vllm/seams/joined_model.py",
        "migration/verdicts.py",
    ]


def test_no_request_names_a_file():
    """Handlers read one word of the query, and no body."""
    source = Path(routes.__file__).read_text(encoding="utf-8")
    assert re.findall(r"query_params\S*", source) == ['query_params.get("on",']
    assert not re.search(r"request\.(body|json|form|stream|path_params)", source)


@pytest.mark.parametrize("name", ["load-000001.eptrace", "load-000007.eptrace"])
def test_a_link_in_the_trace_folder_leads_nowhere(tmp_path: Path, name: str):
    outside, folder = tmp_path / "outside", tmp_path / "traces"
    outside.write_bytes(b"x" * 5000)
    folder.mkdir()
    (folder / name).symlink_to(outside)
    head = head_of()
    writer = TraceWriter(folder, "load", head, max_file_bytes=2000, max_bytes=4000)
    writer.write(contiguous(head))
    for snapshot in snapshots(head, 12):
        writer.write(snapshot)
    writer.close()
    assert (folder / name).is_symlink()
    assert outside.read_bytes() == b"x" * 5000
