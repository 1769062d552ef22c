"""What is refused at start of a drafter that has experts."""

from types import SimpleNamespace

import pytest

from ep_rebalance.config import ConfigurationError
from ep_rebalance.config_sources import load_config


def model(name, layers, experts):
    """What vLLM's configuration of a model tells."""
    return SimpleNamespace(
        model=name,
        hf_text_config=SimpleNamespace(to_dict=lambda: {"name": name}),
        get_num_experts=lambda: experts,
        get_total_num_hidden_layers=lambda: layers,
    )


def speculating(method="mtp", experts=6):
    """Two ranks serve a target of 10 layers and 6 experts, and a drafter of 2 layers."""
    return SimpleNamespace(
        model_config=model("target", 10, 6),
        speculative_config=SimpleNamespace(
            method=method, draft_model_config=model("drafter", 2, experts)
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2,
            prefill_context_parallel_size=1,
            data_parallel_size=1,
            pipeline_parallel_size=1,
        ),
    )


@pytest.fixture
def checks(vllm):
    from ep_rebalance.engines.vllm import checks

    return checks


def test_experts_of_a_drafter_must_divide_by_the_ranks_too(checks):
    checks._check_drafter(speculating(), load_config({}))
    checks._check_drafter(speculating(experts=0), load_config({}))
    checks._check_drafter(speculating("dspark", experts=7), load_config({}))
    with pytest.raises(ConfigurationError, match="the drafter's 7 experts"):
        checks._check_drafter(speculating(experts=7), load_config({}))


def test_a_draft_model_of_its_own_gets_no_redundant_experts(checks):
    config = load_config({"planner": {"redundant_experts": 1}})
    checks._check_drafter(speculating("draft_model", experts=6), config)
    with pytest.raises(ConfigurationError, match="7 experts \\+ 0 redundant") as raised:
        checks._check_drafter(speculating("draft_model", experts=7), config)
    assert raised.value.remedy.startswith("drop the drafter")


def test_a_drafter_that_is_balanced_has_a_state_file_of_its_own(checks, tmp_path):
    settings = {"state": {"path": str(tmp_path / "state.npz")}}
    (tmp_path / "state.drafter.npz").mkdir()
    checks._check_state(speculating(), load_config(settings))  # a pinned one has none
    with pytest.raises(ConfigurationError, match=r"state\.drafter\.npz"):
        checks._check_state(speculating(), load_config({**settings, "drafter": "balanced"}))


def test_what_a_saved_placement_of_a_drafter_must_match(checks):
    config = load_config({"planner": {"redundant_experts": 2}, "drafter": "balanced"})
    *_, drafter = checks._stages(speculating())
    for method, redundant in (("mtp", 2), ("draft_model", 0)):
        identity = checks._identity(speculating(method, experts=4), config, drafter)
        assert (identity.model, identity.experts) == ("drafter", 4)
        assert identity.redundant_experts == redundant
    target, *_ = checks._stages(speculating(experts=0))
    assert checks._identity(speculating(), config, target).model == "target"


def test_series_of_a_drafter_are_counted_too(checks):
    def check(limit, experts):
        metrics = load_config({"metrics": {"expert_tokens": True, "max_series": limit}}).metrics
        checks._check_metrics(speculating(experts=experts), metrics)

    check(60, experts=0)
    check(10 * 6 + 2 * 8, experts=8)
    with pytest.raises(ConfigurationError, match="up to 76 time series") as raised:
        check(75, experts=8)
    assert "8 in each of 2 of the drafter's" in raised.value.reason


def test_a_drafter_without_a_model_has_no_experts_though_vllm_names_the_targets(checks, tmp_path):
    vllm_config = speculating("ngram")
    target = vllm_config.model_config
    vllm_config.speculative_config = SimpleNamespace(
        method="ngram", draft_model_config=target, target_model_config=target
    )
    assert [stage.label for stage in checks._stages(vllm_config)] == [""]
    metrics = load_config({"metrics": {"expert_tokens": True, "max_series": 60}}).metrics
    checks._check_metrics(vllm_config, metrics)
