from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.config_sources import (
    load_config,
    nest,
    parse_config_argument,
    read_config_file,
    settings_from_environment,
)


def test_defaults_work_and_survive_the_way_to_other_processes() -> None:
    config = load_config()
    assert config == RebalanceConfig()
    assert load_config(config.as_dict()) == config


def test_later_layers_win_key_by_key() -> None:
    config = load_config(
        {"window": {"snapshots": 8, "snapshot_steps": 2}},
        {"window": {"snapshots": 9}, "mode": "observe"},
    )
    assert (config.window.snapshots, config.window.snapshot_steps) == (9, 2)
    assert config.mode == "observe"


def test_a_layer_is_not_changed_by_merging() -> None:
    first = {"window": {"snapshots": 8}}
    load_config(first, {"window": {"snapshots": 9}})
    assert first == {"window": {"snapshots": 8}}


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        RebalanceConfig().mode = "observe"


@pytest.mark.parametrize(
    ("settings", "reason", "remedy"),
    [
        ({"windw": {}}, "unknown configuration key 'windw'", "window"),
        (
            {"window": {"snapshot": 1}},
            "unknown configuration key 'window.snapshot'",
            "min_snapshots",
        ),
        ({"window": {"snapshots": 0}}, "window.snapshots=0", "ep-rebalance config"),
        (
            {"data_plane": {"buffers": "fixed", "group_by_node": True}},
            "group_by_node works with buffers=exact only",
            "ep-rebalance config",
        ),
        ({"data_plane": {"capacity_factor": 0}}, "capacity_factor=0", "ep-rebalance config"),
        ({"mode": "fast"}, "mode='fast'", "ep-rebalance config"),
        (
            {"planner": {"policy": "greed"}},
            "planner.policy='greed' is not allowed: Input should be one of incremental, greedy",
            "ep-rebalance config",
        ),
        ({"mode": "static"}, "state.path", "ep-rebalance config"),
        ({"window": {"snapshots": 1}}, "min_snapshots=2", "ep-rebalance config"),
        (
            {"migration": {"max_bytes_per_step": 4095}},
            "migration.max_bytes_per_step=4095 is not allowed: Input should be `auto` or a whole number of "
            "bytes from 4096.",
            "ep-rebalance config",
        ),
        ({"migration": {"max_bytes_per_step": "fast"}}, "max_bytes_per_step='fast'", "config"),
        ({"migration": {"max_bytes_per_step": True}}, "max_bytes_per_step=True", "config"),
        ({"migration": {"max_staging_bytes": 0}}, "max_staging_bytes=0", "config"),
        ({"links": {"intranode_bytes_per_second": 0}}, "intranode_bytes_per_second=0", "config"),
        (
            {"links": {"internode_bytes_per_second": float("inf")}},
            "internode_bytes_per_second=inf",
            "config",
        ),
        ({"links": {"round_seconds": -1.0}}, "round_seconds=-1.0", "config"),
        ({"mode": "observe", "planner": {"redundant_experts": 2}}, "redundant_experts=2", "config"),
        ({"planner": 3}, "planner=3", "ep-rebalance config"),
        (
            {"quantisation": {"self_test": False, "unlisted": "self_test"}},
            "unlisted=self_test trusts the trial at start, which self_test=false leaves out; set",
            "ep-rebalance config",
        ),
        ({"quantisation": {"unlisted": "trust"}}, "unlisted='trust'", "ep-rebalance config"),
    ],
)
def test_a_fault_is_named_with_its_remedy(
    settings: dict[str, object], reason: str, remedy: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(settings)
    assert reason in caught.value.reason
    assert remedy in caught.value.remedy
    assert caught.value.reason in str(caught.value)


def test_environment_keys_nest_at_double_underscores() -> None:
    environment = {
        "EP_REBALANCE_MIGRATION__MAX_BYTES_PER_STEP": "1048576",
        "EP_REBALANCE_MIGRATION__DEADLINE_STEPS": "7",
        "EP_REBALANCE_MODE": "observe",
        "PATH": "/bin",
    }
    settings = settings_from_environment(environment)
    assert settings == {
        "migration": {"max_bytes_per_step": 1048576, "deadline_steps": 7},
        "mode": "observe",
    }
    assert load_config(settings).migration.deadline_steps == 7


@pytest.mark.parametrize("value", ["auto", 5000, "5000"])
def test_bytes_per_step_are_a_number_or_fitted(value: object) -> None:
    settings = load_config({"migration": {"max_bytes_per_step": value}}).migration
    assert settings.max_bytes_per_step == ("auto" if value == "auto" else 5000)


def test_nest() -> None:
    assert nest(["a", "b"], 1) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (
            "mode: observe\nwindow:\n  snapshots: 8\n",
            {"mode": "observe", "window": {"snapshots": 8}},
        ),
        ('{"mode": "observe"}', {"mode": "observe"}),
        ("", {}),
    ],
)
def test_files_are_yaml_or_json(tmp_path: Path, text: str, settings: dict[str, object]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert read_config_file(path) == settings
    assert parse_config_argument(str(path)) == settings


def test_json_may_be_given_in_place_of_a_path() -> None:
    assert parse_config_argument(' {"mode": "observe"}') == {"mode": "observe"}


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    listing, broken, binary = tmp_path / "list", tmp_path / "broken", tmp_path / "binary"
    listing.write_text("- 1\n- 2\n")
    broken.write_text("mode: [observe\n")
    binary.write_bytes(b"\xff\xfe\x00")
    month, text, deep = tmp_path / "month", tmp_path / "text", tmp_path / "deep"
    month.write_text("mode: 2026-13-01")
    text.write_text("mode: !!timestamp none")
    deep.write_text("[" * 100_000)
    for path in (listing, broken, binary, month, text, deep, tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigurationError, match=path.name):
            read_config_file(path)
    with pytest.raises(ConfigurationError, match="not valid JSON"):
        parse_config_argument("{mode")
    for text in ('{"seed": 1' + "0" * 5000 + "}", '{"mode": ' + "[" * 100_000):
        with pytest.raises(ConfigurationError, match="not valid JSON"):
            parse_config_argument(text)


def test_what_is_left_to_the_device_is_decided_by_it():
    assert not load_config({}).dispatch.by_own_counts
    assert load_config({}).on_device("cpu").dispatch.split == "own_counts"
    assert load_config({}).on_device("cuda").dispatch.split == "window"
    chosen = load_config({"dispatch": {"split": "window"}})
    assert chosen.on_device("cpu") == chosen


def test_one_active_replica_and_tokens_spread_over_all_exclude_each_other():
    figures = {"memory_bytes_per_second": 1e12, "flops_per_second": 1e15}
    by_time = {"planner": {"objective": "time"}, "hardware": figures}
    assert load_config(by_time).planner.objective == "time"
    with pytest.raises(
        ValueError, match=r"objective=time.*split=own_counts.*use dispatch.split=window"
    ):
        load_config(by_time | {"dispatch": {"split": "own_counts"}})
    assert load_config(by_time).on_device("cpu").dispatch.split == "window"


def test_a_variable_that_is_no_setting_is_named_with_the_likeliest_cause():
    with pytest.raises(ConfigurationError, match="EP_REBALANCE_SERVICE_HOST") as raised:
        settings_from_environment({"EP_REBALANCE_SERVICE_HOST": "10.0.0.1"})
    assert "enableServiceLinks: false" in raised.value.remedy


@pytest.mark.parametrize(
    ("section", "key"),
    [("window", "snapshots"), ("decision", "horizon_steps"), ("migration", "max_bytes_per_step")],
)
def test_numbers_that_cannot_be_computed_with_are_refused(section: str, key: str):
    with pytest.raises(ConfigurationError, match=f"{section}: {key} is beyond 9007199254740992"):
        load_config({section: {key: 10**40}})
