"""Traces of format version 1 are read and replayed as before. `version_1.eptrace` was recorded by the code
of 0720215: two ranks, load that shifts once, eight generations.
"""

from pathlib import Path

import pytest

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot, TraceReader, TraceWriter
from ep_rebalance.offline.run import Scenario, replay
from ep_rebalance.offline.step_time import MeasuredSteps
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.topology import Topology

PATH = Path(__file__).with_name("version_1.eptrace")


def test_its_load_and_placements_are_read() -> None:
    reader = TraceReader(PATH)
    records = list(reader)
    snapshots = [record for record in records if isinstance(record, RecordedSnapshot)]
    assert (reader.head.version, reader.left_over) == (1, 0)
    assert len(snapshots) > 30
    assert all(snapshot.ended is None for snapshot in snapshots)
    assert sum(snapshot.agreed.planned for snapshot in snapshots) >= 8


def test_it_replays_to_what_its_server_committed() -> None:
    reader = TraceReader(PATH)
    scenario = Scenario(
        policy="ours",
        planner=planner_of("incremental"),
        config=load_config(reader.head.config),
        topology=Topology.single_node(2),
        step_time=MeasuredSteps(fraction=0.5),
    )
    recorded = {r.generation: r for r in reader if isinstance(r, RecordedPlacement)}
    commits = replay(reader.head, reader, scenario).commits
    assert [plan.generation for plan in commits] == list(range(1, 9)) == list(recorded)[1:]
    for plan in commits:
        assert plan.placement == recorded[plan.generation].placement


def test_what_is_written_of_it_is_of_the_newest_version(tmp_path: Path) -> None:
    reader = TraceReader(PATH)
    writer = TraceWriter(tmp_path, "load", reader.head)
    for record in reader:
        writer.write(record)
    writer.close()
    copied = TraceReader(*writer.files())
    assert copied.head.version == 2
    assert len(list(copied)) == len(list(reader))


def test_a_version_1_checksum_is_not_taken_for_one_of_version_2(tmp_path: Path) -> None:
    data = PATH.read_bytes()
    path = tmp_path / PATH.name
    path.write_bytes(data.replace(b'"version":1', b'"version":2', 1))
    with pytest.raises(ValueError, match="checksum"):
        TraceReader(path)
