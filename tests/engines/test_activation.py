"""The engine's configuration: what is completed, and what is refused with reason and remedy."""

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ep_rebalance import __version__
from ep_rebalance.config import ConfigurationError
from ep_rebalance.config_sources import load_config
from ep_rebalance.engines.vllm import checks
from ep_rebalance.load.state import FORMAT, FORMAT_VERSION, Header, SavedState, save_state
from ep_rebalance.placement import Placement

EXPERTS, LAYERS = 6, 2
WORKER_EXTENSION = "ep_rebalance.engines.vllm.worker_extension.WorkerExtension"
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 128,
    "dtype": "float32",
}
DENSE = {**MODEL, "num_experts": 0}
"""Of the same architecture, since vLLM takes long to look into each one that it has not seen yet."""


def write_model(folder: Path, config: dict) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), MODEL)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in list(os.environ):
        if name.startswith("EP_REBALANCE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def create(vllm, model, recwarn):
    """An engine's configuration, as `vllm serve` and `LLM` make it, with settings of the plugin."""
    from vllm.engine.arg_utils import EngineArgs

    def engine_config(settings: dict | None, **arguments):
        defaults = {
            "model": model,
            "skip_tokenizer_init": True,
            "enable_expert_parallel": True,
            "tensor_parallel_size": 2,
            "additional_config": {} if settings is None else {"ep_rebalance": settings},
        }
        return EngineArgs(**{**defaults, **arguments}).create_engine_config()

    return engine_config


def assert_refused(create, reason: list[str], remedy: list[str], settings=None, **arguments):
    with pytest.raises(ConfigurationError) as raised:
        create(settings or {}, **arguments)
    for word in reason:
        assert word in raised.value.reason
    for word in remedy:
        assert word in raised.value.remedy


# --- completed


def test_without_settings_of_ours_nothing_is_changed(create):
    config = create(None)
    assert not config.parallel_config.enable_eplb
    assert not config.parallel_config.worker_extension_cls
    assert not config.additional_config


def test_rebalancing_gets_slots_to_move_experts_between(create):
    config = create({"planner": {"redundant_experts": 4}})
    parallel = config.parallel_config
    assert parallel.enable_eplb
    assert parallel.eplb_config.num_redundant_experts == 4
    assert not parallel.eplb_config.use_async
    assert parallel.worker_extension_cls == WORKER_EXTENSION
    assert config.additional_config["ep_rebalance"]["planner"]["redundant_experts"] == 4
    assert config.additional_config["ep_rebalance_version"] == __version__


def test_on_cpu_the_engine_runs_eagerly(create):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM for CPU")
    assert create({}).model_config.enforce_eager


def test_observing_changes_no_more_than_the_worker(create):
    config = create({"mode": "observe"})
    assert not config.parallel_config.enable_eplb
    assert config.parallel_config.worker_extension_cls == WORKER_EXTENSION


def test_data_parallel_ranks_are_expert_parallel_ranks(create):
    from ep_rebalance.engines.vllm.engine_config import ep_size

    config = create({}, tensor_parallel_size=1, data_parallel_size=3)
    assert ep_size(config.parallel_config) == 3


def test_environment_is_read_where_no_command_line_was(create, monkeypatch):
    monkeypatch.setenv("EP_REBALANCE_MODE", "observe")
    monkeypatch.setenv("EP_REBALANCE_WINDOW__SNAPSHOTS", "9")
    settings = create({"window": {"snapshots": 7}}).additional_config["ep_rebalance"]
    assert (settings["mode"], settings["window"]["snapshots"]) == ("observe", 7)


def test_a_model_that_was_moved_has_the_same_identity(create, model, tmp_path):
    from ep_rebalance.engines.vllm.engine_config import active_config, model_identity

    elsewhere = write_model(tmp_path, {**MODEL, "transformers_version": "4.0"})
    other = write_model(tmp_path / "other", {**MODEL, "num_experts_per_tok": 1})

    def config_hash(path):
        config = create({}, model=path)
        return model_identity(config, active_config(config)).config_hash

    assert config_hash(elsewhere) == config_hash(model)
    assert config_hash(other) != config_hash(model)


# --- the compile cache


def cache_key(create, settings, **arguments):
    return create(settings, **arguments).compute_hash()


def test_settings_that_change_no_code_share_a_compile_cache(create):
    key = cache_key(create, {})
    assert key == cache_key(create, {"window": {"snapshots": 7}, "metrics": {"poll_seconds": 3}})
    assert key == cache_key(create, {"state": {"path": None}, "attach": {"timeout_seconds": 9}})


@pytest.mark.parametrize(
    "settings", [{"mode": "observe"}, {"data_plane": {"all_to_all": "ours", "buffers": "fixed"}}]
)
def test_settings_that_change_the_code_do_not(create, settings):
    assert cache_key(create, {}) != cache_key(create, settings)


def test_what_others_put_beside_our_settings_counts(create):
    ours = {"ep_rebalance": {}}
    keys = {
        cache_key(create, None, additional_config=ours | others)
        for others in ({}, {"gdn_prefill_backend": "a"}, {"gdn_prefill_backend": "b"})
    }
    assert len(keys) == 3


def test_the_configuration_reaches_workers_whole(create):
    config = pickle.loads(pickle.dumps(create({"window": {"snapshots": 7}})))
    assert config.additional_config["ep_rebalance"]["window"]["snapshots"] == 7
    assert config.additional_config.compute_hash()


# --- refused: parallelism


def test_one_expert_parallel_rank_is_refused(create):
    assert_refused(
        create,
        ["there is one expert-parallel rank"],
        ["--tensor-parallel-size or --data-parallel-size to 2 or more"],
        tensor_parallel_size=1,
    )


def test_no_expert_parallelism_is_refused(create):
    assert_refused(
        create,
        ["expert parallelism is off"],
        ["--enable-expert-parallel"],
        enable_expert_parallel=False,
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_the_saved_placement_of_each_pipeline_stage_is_looked_at(create, tmp_path, stage):
    (tmp_path / f"state.stage-{stage}.npz").write_bytes(b"of another program")
    assert_refused(
        create, [f"state.stage-{stage}.npz", "no readable state file"], ["state.path"],
        {"state": {"path": str(tmp_path / "state.npz")}},
        pipeline_parallel_size=2,
    )  # fmt: skip


def test_prefill_context_parallelism_is_refused(create, vllm):
    """Made from a configuration that vLLM takes: its V1 runner, the one on CPU, knows no such ranks."""
    from ep_rebalance.engines.vllm import checks
    from ep_rebalance.engines.vllm.engine_config import active_config

    config = create({})
    config.parallel_config.prefill_context_parallel_size = 2
    with pytest.raises(ConfigurationError, match="prefill_context_parallel_size=2") as raised:
        checks.check(config, active_config(config))
    assert "--prefill-context-parallel-size" in raised.value.remedy


def test_going_on_without_dead_ranks_is_refused(create):
    assert_refused(
        create,
        ["--enable-fault-tolerance", "would wait"],
        ["drop --enable-fault-tolerance"],
        enable_fault_tolerance=True,
        tensor_parallel_size=1,
        data_parallel_size=2,
        data_parallel_rank=0,
    )


MOONEP = {"all2all_backend": "moonep", "dtype": "bfloat16"}


def test_what_vllm_refuses_with_its_balancer_is_refused_with_ours(create):
    assert_refused(
        create,
        ["vLLM refuses", "moonep", "does not support EPLB"],
        ["mode=observe"],
        tensor_parallel_size=1,
        data_parallel_size=2,
        **MOONEP,
    )


def test_what_vllm_refuses_with_its_balancer_can_be_observed(create):
    data_parallel = {"tensor_parallel_size": 1, "data_parallel_size": 2}
    config = create({"mode": "observe"}, **data_parallel, **MOONEP)
    assert not config.parallel_config.enable_eplb


def test_what_vllm_refuses_anyway_is_told_as_vllm_tells_it(create):
    with pytest.raises(ValueError, match="gpu_memory_utilization") as raised:
        create({}, gpu_memory_utilization=2.0)
    assert not isinstance(raised.value, ConfigurationError)


def test_arguments_are_left_as_they_were_given(create, model, vllm):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        enable_expert_parallel=True,
        tensor_parallel_size=2,
        additional_config={"ep_rebalance": {"planner": {"redundant_experts": 2}}},
    )
    for _ in range(2):
        config = arguments.create_engine_config()
        assert config.parallel_config.eplb_config.num_redundant_experts == 2
        assert not arguments.enable_eplb
        assert arguments.eplb_config.num_redundant_experts == 0


def test_the_engines_own_balancer_is_refused(create):
    assert_refused(
        create,
        ["--enable-eplb", "two balancers"],
        ["drop --enable-eplb", "planner.redundant_experts"],
        enable_eplb=True,
    )


def test_redundant_experts_of_the_engines_own_balancer_are_refused(create):
    """They would be as if they had not been asked for."""
    assert_refused(
        create,
        ["--eplb-config.num_redundant_experts 2", "planner.redundant_experts=0"],
        ["planner.redundant_experts=2"],
        eplb_config={"num_redundant_experts": 2},
    )
    config = create({"planner": {"redundant_experts": 2}}, eplb_config={"num_redundant_experts": 2})
    assert config.parallel_config.eplb_config.num_redundant_experts == 2


@pytest.mark.parametrize(
    ("plane", "arguments", "reason", "remedy"),
    [
        (
            {"all_to_all": "engine"},
            {"data_parallel_size": 2},
            ["on CPU", "all_to_all=engine", "data-parallel"],
            ["all_to_all=ours", "tensor parallelism alone"],
        ),
        (
            {"all_to_all": "engine"},
            {"quantization": "fp8"},
            ["on CPU", "all_to_all=engine", "quantised"],
            ["all_to_all=ours"],
        ),
        ({"payload": "fp8"}, {}, ["payload=fp8", "128 columns", "has 64"], ["drop"]),
        (
            {"experts": "triton"},
            {"moe_backend": "batched_triton"},
            ["experts=triton", "batched_triton"],
            ["drop one"],
        ),
    ],
)
def test_a_data_plane_that_cannot_work_is_refused(create, plane, arguments, reason, remedy):
    assert_refused(create, reason, remedy, {"data_plane": plane}, **arguments)


@pytest.mark.parametrize(
    "plane",
    [
        {"buffers": "fixed", "all_to_all": "ours"},
        {"experts": "triton"},
        {"group_by_node": True},
        {"all_to_all": "engine"},
    ],
)
def test_a_data_plane_that_works_passes(create, plane):
    create({"data_plane": plane})


def test_the_engines_all_to_all_passes_where_its_communicator_can_gather(create, monkeypatch):
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def engine_with_data_parallelism():
        ranks = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        create({"data_plane": {"all_to_all": "engine"}}, **ranks)

    for name in ("all_gatherv", "reduce_scatterv"):
        with pytest.raises(ConfigurationError, match="cannot gather"):
            engine_with_data_parallelism()
        monkeypatch.setattr(CpuCommunicator, name, lambda *_, **__: None, raising=False)
    engine_with_data_parallelism()


def test_a_second_worker_extension_is_refused(create):
    assert_refused(
        create,
        ["one worker extension", "'some.other.Extension'"],
        ["drop --worker-extension-cls"],
        worker_extension_cls="some.other.Extension",
    )


# --- refused: model


@pytest.mark.parametrize(
    ("ranks", "redundant", "fitting"),
    [(2, 1, "0, 2, 4, ..."), (4, 0, "2, 6, 10, ..."), (4, 4, "2, 6, 10, ..."), (5, 0, "4, 9, 14")],
)
def test_redundant_experts_that_do_not_divide_are_refused_with_those_that_do(
    create, ranks, redundant, fitting
):
    assert_refused(
        create,
        [f"{EXPERTS} experts + planner.redundant_experts={redundant}", f"{ranks} ranks"],
        [f"set planner.redundant_experts to {fitting}"],
        {"planner": {"redundant_experts": redundant}},
        tensor_parallel_size=1,
        data_parallel_size=ranks,
    )


def test_more_slots_on_a_rank_than_experts_are_refused(create):
    assert_refused(
        create,
        ["planner.redundant_experts=8", "more slots than there are experts"],
        ["at most 6"],
        {"planner": {"redundant_experts": 8}},
    )


def test_experts_that_do_not_divide_can_be_observed(create):
    config = create({"mode": "observe"}, tensor_parallel_size=4)
    assert not config.parallel_config.enable_eplb
    assert_refused(
        create,
        [f"{EXPERTS} experts", "do not divide by 4 ranks"],
        ["set planner.redundant_experts to 2, 6, 10, ...", "mode=observe"],
        {"mode": "static", "state": {"path": "state.npz"}},
        tensor_parallel_size=4,
    )


def test_a_drafters_experts_need_not_divide_where_nothing_moves(vllm):
    from types import SimpleNamespace

    from ep_rebalance.engines.vllm import checks

    draft = SimpleNamespace(get_num_experts=lambda: EXPERTS + 1)
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method="eagle3", draft_model_config=draft),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2, prefill_context_parallel_size=1, data_parallel_size=1
        ),
    )
    checks._check_drafter(config, load_config({"mode": "observe"}))
    with pytest.raises(ConfigurationError, match="the drafter's"):
        checks._check_drafter(config, load_config({}))


def test_a_dense_model_is_refused(create, tmp_path):
    """By vLLM itself, before our own check; which of the two it is may change."""
    with pytest.raises(ValueError, match=r"[Nn]umber of experts|Mixture-of-Experts"):
        create({}, model=write_model(tmp_path, DENSE))


QUANTISED = {
    **MODEL,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "fmt": "e4m3",
    },
}


UNREAD = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int8"}}}


def test_a_quantised_model_passes_that_may_be_listed(create, tmp_path):
    """Whether it is depends on the kernel, which is chosen when the model is loaded."""
    config = create({}, model=write_model(tmp_path, QUANTISED))
    assert config.parallel_config.enable_eplb


def test_a_quantised_model_that_no_kernel_makes_right_is_refused():
    gpt_oss = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    assert_checked(
        {**MODEL, **gpt_oss},
        ["MXFP4 of gpt-oss", "does not say which of its layers hold experts"],
        ["without --plugin ep_rebalance"],
        {"quantisation": {"unlisted": "self_test"}},
    )


def test_a_quantised_model_that_was_never_read_is_refused_unless_it_is_to_be_tried():
    for quantisation, reason in (
        ({"quant_method": "new"}, "(new with any kernel): never read"),
        (UNREAD, "the largest of a rank's own experts"),
    ):
        model = {**MODEL, "quantization_config": quantisation}
        words = [reason], ["quantisation.unlisted=self_test", "mode=observe"]
        assert_checked(model, *words, {})
        check_quantisation(model, {"quantisation": {"unlisted": "self_test"}})
        check_quantisation(model, {"mode": "observe"})


def check_quantisation(model: dict, settings: dict) -> None:
    """Of a model that vLLM on a CPU may not know."""
    name = model["quantization_config"]["quant_method"]
    hf_config = SimpleNamespace(**model, to_dict=lambda: model)
    checks._check_quantisation(
        SimpleNamespace(quantization=name, hf_config=hf_config, hf_text_config=hf_config),
        load_config(settings),
    )


def assert_checked(model: dict, reason: list[str], remedy: list[str], settings: dict) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_quantisation(model, settings)
    assert all(word in caught.value.reason for word in reason), caught.value.reason
    assert all(word in caught.value.remedy for word in remedy), caught.value.remedy


def test_what_is_made_of_an_unquantised_checkpoint_has_the_name_of_the_argument():
    bare = SimpleNamespace(to_dict=dict)
    model = {"hf_config": bare, "hf_text_config": bare}
    online = SimpleNamespace(quantization="fp8_per_block", **model)
    checks._check_quantisation(online, load_config({}))
    with pytest.raises(ConfigurationError, match="NVFP4 made from an unquantised checkpoint"):
        checks._check_quantisation(
            SimpleNamespace(quantization="nvfp4_per_token", **model), load_config({})
        )


def test_a_quantised_model_can_be_observed(create, tmp_path):
    config = create({"mode": "observe"}, model=write_model(tmp_path, QUANTISED))
    assert config.model_config.quantization == "fp8"


# --- refused: adapters and weights


def test_adapters_of_experts_are_refused_where_experts_move(create):
    words = ["LoRA adapters of experts"], ["--lora-target-modules", "mode=observe"]
    assert_refused(create, *words, enable_lora=True)
    assert_refused(create, *words, enable_lora=True, lora_target_modules=["q_proj", "experts"])


def test_adapters_of_attention_pass(create):
    create({}, enable_lora=True, lora_target_modules=["q_proj", "o_proj"])
    create({"mode": "observe"}, enable_lora=True)


def test_weights_that_are_changed_in_place_are_refused_where_experts_move(create):
    for backend in ("sparse_nccl", "sharded_rdt"):
        past_loader = {"weight_transfer_config": {"backend": backend}}
        assert_refused(
            create, [f"'{backend}'", "bypasses"], ["nccl", "mode=observe"], **past_loader
        )
    create({"mode": "observe"}, **past_loader)
    create({}, weight_transfer_config={"backend": "nccl"})


def test_weights_on_the_host_are_refused_where_experts_move(create):
    for told, offloaded in (
        ("--cpu-offload-gb 2.5", {"cpu_offload_gb": 2.5}),
        ("--offload-group-size 4", {"offload_group_size": 4}),
    ):
        assert_refused(create, [told, "on the host"], ["drop it", "mode=observe"], **offloaded)
        create({"mode": "observe"}, **offloaded)


def test_weights_out_of_another_process_are_refused_where_experts_move(create):
    for name in ("ipc_cache", "modelexpress"):
        words = [f"--load-format {name}"], ["from files", "mode=observe"]
        assert_refused(create, *words, load_format=name)
        create({"mode": "observe"}, load_format=name)


# --- refused: engine and settings


def test_an_unknown_version_is_refused(create, vllm, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    assert_refused(create, ["vLLM 0.99.1 is not supported"], ["install one of these"])


def test_a_changed_engine_is_refused(create, vllm, monkeypatch):
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    monkeypatch.setattr(BaseRouter, "_apply_eplb_mapping", lambda self, ids: ids)
    assert_refused(
        create, ["_apply_eplb_mapping has no parameter topk_ids"], ["newer ep-rebalance"]
    )


def test_unknown_settings_are_refused(create):
    assert_refused(
        create, ["unknown configuration key 'planner.speed'"], ["redundant_experts"],
        {"planner": {"speed": 1}},
    )  # fmt: skip


def test_a_series_for_each_expert_is_refused_above_the_limit(create):
    expert_tokens = {"expert_tokens": True, "max_series": LAYERS * EXPERTS - 1}
    assert_refused(
        create,
        [
            "expert_tokens would make up to 12 time series",
            "6 experts in each of 2 layers",
            "max_series=11",
        ],
        ["GET /ep_rebalance/load", "raise metrics.max_series"],
        {"metrics": expert_tokens},
    )


def test_a_series_for_each_expert_can_be_had_up_to_the_limit(create):
    create({"metrics": {"expert_tokens": True, "max_series": LAYERS * EXPERTS}})
    create({"metrics": {"layer_rank_tokens": True, "max_series": LAYERS * 2}})
    create({"metrics": {"replicas": True, "max_series": 1}})


def test_a_series_for_each_rank_of_each_layer_is_refused_above_the_limit(create):
    assert_refused(
        create,
        ["layer_rank_tokens would make up to 4 time series", "2 ranks in each of 2 layers"],
        ["the page at /ep_rebalance/", "raise metrics.max_series"],
        {"metrics": {"layer_rank_tokens": True, "max_series": LAYERS * 2 - 1}},
    )


# --- refused: state file


def write_state(create, path: Path, **changes) -> None:
    """A state file as this model would have saved it, but for `changes` to its identity."""
    import msgspec

    from ep_rebalance.engines.vllm.engine_config import active_config, model_identity

    config = create({})
    identity = msgspec.structs.replace(model_identity(config, active_config(config)), **changes)
    placement = Placement.contiguous(num_layers=LAYERS, num_experts=EXPERTS, num_ranks=2)
    header = Header(
        format=FORMAT,
        version=FORMAT_VERSION,
        identity=identity,
        generation=3,
        saved_at=0.0,
        plugin_version=__version__,
    )
    state = SavedState(
        header=header,
        placement=placement,
        quotas_LP=placement.even_quotas_LP(),
        load_LE=np.ones((LAYERS, EXPERTS)),
    )
    save_state(path, state)


@pytest.mark.parametrize("mode", ["rebalance", "static"])
def test_a_state_file_of_this_model_passes(create, tmp_path, mode):
    path = tmp_path / "state.npz"
    write_state(create, path)
    create({"mode": mode, "state": {"path": str(path)}})


@pytest.mark.parametrize("mode", ["rebalance", "static"])
def test_a_state_file_of_another_model_is_refused(create, tmp_path, mode):
    path = tmp_path / "state.npz"
    write_state(create, path, model="other", config_hash="other")
    assert_refused(
        create, [str(path), "was saved for model 'other'"], ["delete it", "state.path"],
        {"mode": mode, "state": {"path": str(path)}},
    )  # fmt: skip


def test_a_state_file_of_another_number_of_ranks_is_refused(create, tmp_path):
    path = tmp_path / "state.npz"
    write_state(create, path, ep_size=3)
    assert_refused(
        create, ["ep_size=3, not 2"], ["another file in state.path"],
        {"state": {"path": str(path)}},
    )  # fmt: skip


def test_a_damaged_state_file_is_refused(create, tmp_path):
    path = tmp_path / "state.npz"
    write_state(create, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(
        create, [str(path), "is no readable state file"], ["delete it"],
        {"state": {"path": str(path)}},
    )  # fmt: skip


def test_a_state_path_that_cannot_be_written_is_refused(create, tmp_path):
    path = tmp_path / "missing" / "state.npz"
    assert_refused(
        create, [f"state.path={str(path)!r} cannot be written"], ["existing folder"],
        {"state": {"path": str(path)}},
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["rebalance", "static"])
def test_a_state_path_that_is_a_fifo_is_refused_without_waiting(create, tmp_path, mode):
    path = tmp_path / "state.npz"
    os.mkfifo(path)
    assert_refused(
        create, [str(path), "is a FIFO"], ["state.path"],
        {"mode": mode, "state": {"path": str(path)}},
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["is a FIFO", "is a regular file", "is a device", "does not exist"]
)
def test_a_trace_path_that_is_no_folder_is_refused(create, tmp_path, kind):
    path = tmp_path / "traces"
    match kind:
        case "is a FIFO":
            os.mkfifo(path)
        case "is a regular file":
            path.write_text("")
            path.chmod(0o777)
        case "is a device":
            path = "/dev/null"
    settings = {"mode": "observe", "trace": {"path": str(path)}}
    assert_refused(create, [f"trace.path='{path}' {kind}"], ["create it"], settings)


def test_the_trace_folder_of_each_pipeline_stage_is_looked_at(create, tmp_path):
    (tmp_path / "stage-1").write_text("")
    assert_refused(
        create, ["stage-1' is a regular file"], ["create it"],
        {"mode": "observe", "trace": {"path": str(tmp_path)}},
        pipeline_parallel_size=2,
    )  # fmt: skip


def test_static_without_its_file_is_refused(create, tmp_path):
    path = tmp_path / "state.npz"
    assert_refused(
        create, [f"mode=static serves the placement in {str(path)!r}", "no such file"],
        ["serve once in mode rebalance"],
        {"mode": "static", "state": {"path": str(path)}},
    )  # fmt: skip


def test_static_without_a_path_is_refused(create):
    assert_refused(create, ["mode=static"], ["ep-rebalance config"], {"mode": "static"})


def test_observing_does_not_read_the_state(create, tmp_path):
    path = tmp_path / "state.npz"
    path.write_bytes(b"something else")
    create({"mode": "observe", "state": {"path": str(path)}})


# --- refused: key of the operators


def test_a_key_that_is_none_is_refused(create, tmp_path: Path):
    empty, missing = tmp_path / "empty", tmp_path / "missing"
    empty.write_text(" \n")
    for path, reason in (
        (empty, "is empty"),
        (missing, "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        assert_refused(
            create, [str(path), reason], ["file" if path != empty else "openssl"],
            {"control": {"api_key_file": str(path)}},
        )  # fmt: skip
