"""Pipeline stages and their files."""

import pytest

from ep_rebalance.config_sources import load_config
from ep_rebalance.pipeline import ONLY_STAGE, PipelineStage

SETTINGS = {"trace": {"path": "/traces"}, "state": {"path": "/var/state.npz"}}


def test_a_single_stage_keeps_the_files_of_the_settings():
    config = load_config(SETTINGS)
    assert config.of_stage(ONLY_STAGE) == config
    assert ONLY_STAGE.label == ""


def test_each_of_several_stages_has_files_of_its_own():
    first, second = (load_config(SETTINGS).of_stage(stage) for stage in PipelineStage.every(2))
    assert (first.trace.path, second.trace.path) == ("/traces/stage-0", "/traces/stage-1")
    assert second.state.path == "/var/state.stage-1.npz"


@pytest.mark.parametrize("path", ["state", "/a.b/state", ".state"])
def test_files_without_an_ending(path):
    assert PipelineStage(1, 2).file(path) == f"{path}.stage-1"


def test_without_files_nothing_changes():
    config = load_config({})
    assert config.of_stage(PipelineStage(1, 2)) == config
