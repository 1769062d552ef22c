"""The command line, with vLLM's own parser."""

import json
import os

import pytest

from ep_rebalance import __version__
from ep_rebalance.config import RebalanceConfig

SERVE = ["--model", "m", "--enable-expert-parallel", "--tensor-parallel-size", "2"]
PLUGIN = [*SERVE, "--plugin", "ep_rebalance"]


@pytest.fixture(scope="module")
def parser(vllm):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Neither the tests' environment nor what parsing sets in it is seen by another test."""
    for name in list(os.environ):
        if name.startswith("EP_REBALANCE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_PLUGINS", "to-be-restored")
    monkeypatch.delenv("VLLM_PLUGINS")


def settings(parser, *args: str) -> dict:
    return parser.parse_args([*PLUGIN, *args]).additional_config["ep_rebalance"]


def refusal(parser, capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as raised:
        parser.parse_args(list(args))
    assert raised.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_the_flag_alone_puts_the_defaults_where_every_process_sees_them(parser):
    namespace = parser.parse_args(PLUGIN)
    assert namespace.additional_config == {
        "ep_rebalance": RebalanceConfig().as_dict(),
        "ep_rebalance_version": __version__,
    }
    assert not hasattr(namespace, "plugin")
    assert not hasattr(namespace, "ep_rebalance_config")


def test_engine_arguments_are_made_from_the_namespace(parser):
    from vllm.engine.arg_utils import EngineArgs

    engine_args = EngineArgs.from_cli_args(parser.parse_args(PLUGIN))
    assert engine_args.additional_config["ep_rebalance"]["mode"] == "rebalance"


@pytest.mark.parametrize(
    "args",
    [
        ["--ep-rebalance-config.mode", "observe", "--ep-rebalance-config.window.snapshots", "9"],
        ["--ep-rebalance-config.mode=observe", "--ep-rebalance-config.window.snapshots=9"],
        ["--ep-rebalance-config", '{"mode": "observe", "window": {"snapshots": 9}}'],
        ["--additional-config", '{"ep_rebalance": {"mode": "observe", "window": {"snapshots": 9}}}'],
    ],
)  # fmt: skip
def test_settings_can_be_given_in_any_form(parser, args):
    given = settings(parser, *args)
    assert (given["mode"], given["window"]["snapshots"]) == ("observe", 9)
    assert given["window"]["min_snapshots"] == 2


def test_a_later_way_in_wins_key_by_key(parser, tmp_path, monkeypatch):
    """File, environment, flags, additional_config: each sets one key more than the next one."""
    path = tmp_path / "settings.yaml"
    path.write_text("window: {snapshots: 11, min_snapshots: 3, min_tokens: 1, snapshot_steps: 5}\n")
    monkeypatch.setenv("EP_REBALANCE_WINDOW__SNAPSHOTS", "12")
    monkeypatch.setenv("EP_REBALANCE_WINDOW__MIN_SNAPSHOTS", "2")
    monkeypatch.setenv("EP_REBALANCE_WINDOW__MIN_TOKENS", "2")
    given = settings(
        parser,
        "--additional-config",
        '{"ep_rebalance": {"window": {"snapshots": 14}}, "other": 1}',
        "--ep-rebalance-config.window.snapshots",
        "13",
        "--ep-rebalance-config.window.min_snapshots",
        "1",
        "--ep-rebalance-config",
        str(path),
    )
    assert given["window"] == {
        "snapshots": 14,
        "min_snapshots": 1,
        "min_tokens": 2,
        "snapshot_steps": 5,
    }


def test_a_later_file_wins(parser, tmp_path):
    for name, mode in (("a.yaml", "observe"), ("b.yaml", "rebalance")):
        (tmp_path / name).write_text(f"mode: {mode}\n")
    files = [str(tmp_path / name) for name in ("a.yaml", "b.yaml")]
    args = [word for file in files for word in ("--ep-rebalance-config", file)]
    assert settings(parser, *args)["mode"] == "rebalance"


def test_other_additional_settings_are_kept(parser):
    namespace = parser.parse_args([*PLUGIN, "--additional-config", '{"other": {"a": 1}}'])
    assert namespace.additional_config["other"] == {"a": 1}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ep-rebalance-config.window.snapshoots", "9"],
         ["'window.snapshoots'", "use one of: min_snapshots, min_tokens, snapshot_steps, snapshots"]),
        (["--ep-rebalance-config", '{"windows": {}}'], ["'windows'", "use one of: attach,"]),
        (["--ep-rebalance-config.mode", "fast"], ["mode='fast'", "ep-rebalance config"]),
        (["--ep-rebalance-config", '{"mode": '], ["not valid JSON", "path of a YAML file"]),
        (["--ep-rebalance-config", "/no/such.yaml"], ["'/no/such.yaml'", "readable YAML"]),
        (["--ep-rebalance-config.mode", "static"], ["mode=static", "set state.path"]),
        (["--additional-config", '{"ep_rebalance": {"colour": 1}}'], ["'colour'", "use one of"]),
        (["--additional-config", '{"ep_rebalance": "observe"}'], ["'observe'", "mode: observe"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_with_the_remedy(parser, capsys, args, words):
    text = refusal(parser, capsys, *PLUGIN, *args)
    for word in [*words, "Remedy:"]:
        assert word in text


def test_the_plugin_without_expert_parallelism_is_refused(parser, capsys):
    text = refusal(parser, capsys, "--model", "m", "--plugin", "ep_rebalance")
    assert "add --enable-expert-parallel" in text
    assert "--tensor-parallel-size or --data-parallel-size" in text


def test_settings_without_the_plugin_are_refused(parser, capsys):
    text = refusal(parser, capsys, *SERVE, "--ep-rebalance-config.mode", "observe")
    assert "the plugin is not active" in text
    assert "add --plugin ep_rebalance" in text


def test_another_plugin_is_not_known(parser, capsys):
    assert "invalid choice: 'other'" in refusal(parser, capsys, *SERVE, "--plugin", "other")


def test_without_the_plugin_nothing_is_changed(parser):
    namespace = parser.parse_args(SERVE)
    assert "ep_rebalance" not in (namespace.additional_config or {})
    assert not hasattr(namespace, "plugin")
    assert "VLLM_PLUGINS" not in os.environ


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("other", "other,ep_rebalance"),
        ("", "ep_rebalance"),
        ("a,ep_rebalance,b", "a,ep_rebalance,b"),
        ("my_ep_rebalance", "my_ep_rebalance,ep_rebalance"),
    ],
)
def test_the_list_of_plugins_gains_this_one(parser, monkeypatch, before, after):
    monkeypatch.setenv("VLLM_PLUGINS", before)
    parser.parse_args(PLUGIN)
    assert os.environ["VLLM_PLUGINS"] == after


def test_without_a_list_of_plugins_all_that_are_installed_stay_on(parser):
    from importlib.metadata import entry_points

    parser.parse_args(PLUGIN)
    named = os.environ["VLLM_PLUGINS"].split(",")
    assert {entry.name for entry in entry_points(group="vllm.general_plugins")} <= set(named)
    assert "ep_rebalance" in named


def test_help_shows_the_group(parser):
    group = next(g for g in parser._action_groups if g.title == "EpRebalance")
    assert [action.option_strings[0] for action in group._group_actions] == [
        "--plugin",
        "--ep-rebalance-config",
    ]


def test_registering_again_changes_nothing(vllm):
    """vLLM asks of plugins that they can be loaded several times."""
    from vllm.engine.arg_utils import EngineArgs

    from ep_rebalance.engines.vllm import register

    before = EngineArgs.add_cli_args, EngineArgs.create_engine_config
    register()
    assert (EngineArgs.add_cli_args, EngineArgs.create_engine_config) == before


def test_settings_survive_json(parser):
    given = settings(parser, "--ep-rebalance-config.state.path", "/tmp/state.npz")
    assert json.loads(json.dumps(given)) == given
