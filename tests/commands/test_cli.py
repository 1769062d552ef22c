"""The `ep-rebalance` command."""

import json
import os
from collections.abc import Iterator

import msgspec
import pytest
import yaml
from command_line import run, server
from statuses import make_status

from ep_rebalance import __version__
from ep_rebalance.commands import app as application
from ep_rebalance.commands.reference import kernel_table, metric_table
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.telemetry.metrics import METRICS


def settings_of(model: type, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        yield from settings_of(field.annotation, f"{prefix}{name}.") if inner else [prefix + name]


def test_printed_configuration_is_read_back_as_the_defaults():
    done = run("config")
    assert done.exit_code == 0
    assert load_config(yaml.safe_load(done.output)) == RebalanceConfig()


def test_printed_configuration_holds_every_key_under_its_meaning():
    lines = run("config").output.splitlines()
    for name in settings_of(RebalanceConfig):
        key = name.rpartition(".")[2]
        found = [i for i, line in enumerate(lines) if line.lstrip().startswith(f"{key}:")]
        assert found, name
        assert any(lines[i - 1].lstrip().startswith("#") for i in found), name


def test_printed_configuration_names_the_choices():
    assert 'policy: "incremental"  # one of incremental, greedy, vllm, none' in run("config").output


def test_json_schema_is_json():
    schema = json.loads(run("config", "--json-schema").output)
    assert set(schema["properties"]) == set(RebalanceConfig.model_fields)


def test_metrics_prints_a_row_for_each_metric():
    done = run("metrics")
    assert done.output.strip() == metric_table()
    rows = metric_table().splitlines()[2:]
    assert len(rows) == len(METRICS)
    for row, metric in zip(rows, METRICS, strict=True):
        name, kind, labels, _ = (cell.strip() for cell in row.strip("|").split("|"))
        assert name.strip("`").removesuffix("_total") == metric.full_name
        assert name.endswith("_total`") == (kind == "counter")
        assert labels == (", ".join(metric.labels) or "-")


def test_kernels_prints_the_list_of_the_adapter():
    assert run("kernels").output.strip() == kernel_table()


def test_version_is_that_of_the_package():
    assert run("version").output.strip() == __version__


STATUS = msgspec.json.encode(make_status())


def test_status_shows_what_the_server_answers():
    with server(200, STATUS) as (url, requests):
        done = run("status", url + "/")
    assert done.exit_code == 0
    assert requests == [("/ep_rebalance/status", None)]
    for text in ("rebalance, incremental", "2 committed", "1.375"):
        assert text in done.output


def test_status_as_json_is_the_answer_itself():
    with server(200, STATUS) as (url, _):
        assert json.loads(run("status", url, "--json").output) == json.loads(STATUS)


@pytest.mark.parametrize(
    ("args", "environment"),
    [(["--api-key", "s3cret"], {}), ([], {"VLLM_API_KEY": "s3cret"})],
)
def test_status_sends_the_api_key(args, environment):
    with server(200, STATUS) as (url, requests):
        assert run("status", url, *args, **environment).exit_code == 0
    assert requests[0][1] == "Bearer s3cret"


@pytest.mark.parametrize(
    ("code", "body"),
    [
        pytest.param(404, b'{"error": "not active"}', id="not active"),
        pytest.param(401, b"{}", id="wrong key"),
        pytest.param(503, b"{}", id="not ready"),
        pytest.param(200, b"<html>hello</html>", id="no JSON"),
        pytest.param(200, b"[1, 2]", id="other JSON"),
        pytest.param(200, b'{"status": "ok"}', id="JSON of another route"),
        pytest.param(200, None, id="hangs up"),
        pytest.param(200, b"\xff\xfe\x00", id="no text"),
    ],
)
def test_an_answer_that_is_no_status_is_one_sentence_and_exit_code_1(code, body):
    with server(code, body) as (url, _):
        done = run("status", url)
    assert_explained(done, url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://bad host", "http://[::1"])
def test_a_server_that_cannot_be_asked_is_one_sentence_and_exit_code_1(url):
    assert_explained(run("status", url), url)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "ftp://[::1"])
def test_what_is_no_address_is_one_sentence_and_exit_code_1(url):
    done = run("status", url)
    assert done.exit_code == 1
    assert f"{url} is no address; write it as http://HOST:PORT" in done.stderr


def assert_explained(done, url: str) -> None:
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), done.exception
    assert f"{url}/ep_rebalance/status did not answer with a status" in done.stderr
    assert "--plugin ep_rebalance" in done.stderr
    assert "Traceback" not in done.output


def test_without_a_command_the_help_is_shown():
    assert "vllm serve MODEL" in " ".join(run().output.split())


@pytest.mark.parametrize(("given", "seen"), [(None, "ERROR"), ("DEBUG", "DEBUG")])
def test_the_command_keeps_vllm_quiet_unless_told_otherwise(monkeypatch, given, seen):
    """In its own process, and in those in which it replays."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", given or "to-be-restored")
    if given is None:
        monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    monkeypatch.setattr(application, "app", lambda: None)
    application.main()
    assert os.environ["VLLM_LOGGING_LEVEL"] == seen
