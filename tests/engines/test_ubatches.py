"""Dual-batch overlap: a batch is served in two parts at a time, by two threads."""

from pathlib import Path

import pytest
from engine_releases import NEEDS_033, told_by

from ep_rebalance.config import ConfigurationError
from ep_rebalance.config_sources import load_config

COUNTS = Path(__file__).with_name("ubatch_counts.py")


@NEEDS_033
def test_parts_count_what_the_whole_batch_does():
    told = told_by(COUNTS, "0.33")
    whole = told["counts"].pop("whole")
    assert list(map(sum, whole)) == [2 * 7, 2 * 4]
    assert told["counts"] == dict.fromkeys(told["counts"], whole)


def test_a_release_that_does_not_tell_the_parts_apart_is_refused(vllm):
    from types import SimpleNamespace

    from ep_rebalance.engines.vllm import checks, parallel

    if parallel.tells_ubatches():
        pytest.skip("of vLLM 0.32")
    overlapping = SimpleNamespace(
        enable_expert_parallel=True,
        tensor_parallel_size=2,
        data_parallel_size=1,
        prefill_context_parallel_size=1,
        pipeline_parallel_size=1,
        enable_fault_tolerance=False,
        enable_elastic_ep=False,
        use_ubatching=True,
    )
    with pytest.raises(ConfigurationError, match="dual-batch overlap") as raised:
        checks._check_parallel(overlapping)
    assert "0.33" in raised.value.remedy


def test_our_all_to_all_is_refused_with_it(vllm):
    from types import SimpleNamespace

    from ep_rebalance.engines.vllm import data_plane

    overlapping = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=True, quantization=None),
        parallel_config=SimpleNamespace(use_ubatching=True, tensor_parallel_size=1),
    )
    config = load_config({"data_plane": {"all_to_all": "ours"}})
    with pytest.raises(ConfigurationError, match="one set of buffers"):
        data_plane.check_data_plane(overlapping, config)
