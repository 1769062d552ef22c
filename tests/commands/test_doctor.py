"""`ep-rebalance doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import run, server
from statuses import make_status

from ep_rebalance.config_sources import load_config
from ep_rebalance.diagnosis import engine, machine, model, packages
from ep_rebalance.diagnosis.engine import Engine
from ep_rebalance.diagnosis.finding import Finding
from ep_rebalance.engines.vllm import contract
from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.engines.vllm.seams import router
from ep_rebalance.telemetry.metrics import encode

TINY_MOE = Path(__file__).parents[2] / "examples" / "tiny_moe"


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No answer of vLLM is kept from one test to the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_config(folder: Path, **changes: object) -> Path:
    config = json.loads((TINY_MOE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def findings(*options: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = run("doctor", "--json", *options)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, {one["check"]: one for one in json.loads(done.stdout)}


def test_this_machine_can_run_the_plugin(tmp_path: Path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"trace": {"path": str(tmp_path)}}))
    code, found = findings("--model", str(TINY_MOE), "--config", str(settings))
    problems = {name: one for name, one in found.items() if one["verdict"] == "problem"}
    assert problems == {}
    assert code == 0
    assert found["model"]["found"] == "Qwen3MoeForCausalLM, 16 experts, top 2, in all 4 layers"
    assert "contracts hold in 17 seams" in found["seams"]["found"]
    assert found["vLLM"]["verdict"] == "ok"
    assert found["trace.path"]["found"] == str(tmp_path)


def test_lines_name_the_verdict_and_the_remedy(tmp_path: Path):
    done = run("doctor", "--model", str(tmp_path / "none"))
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    (model,) = (n for n, line in enumerate(lines) if line.startswith("problem  model"))
    assert "cannot be read" in lines[model]
    assert "-> name a folder with config.json" in lines[model + 1]


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"num_experts": 0, "num_local_experts": 0}, "model", "without experts"),
        ({"quantization_config": {"quant_method": "new"}}, "quantisation", "never read"),
    ],
)
def test_models_that_cannot_be_balanced_are_problems(tmp_path: Path, changes, check, words):
    config = json.loads((TINY_MOE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    code, found = findings("--model", str(tmp_path))
    assert code == 1
    assert found[check]["verdict"] == "problem"
    assert words in found[check]["found"]
    assert found[check]["remedy"]


@pytest.mark.parametrize(
    ("settings", "check", "words"),
    [
        ({"planner": {"sed": 1}}, "settings", "unknown configuration key"),
        ({"planner": {"policy": "greed"}}, "settings", "policy='greed' is not allowed"),
        ({"state": {"path": "/nowhere/s.npz"}}, "state.path", "cannot be written"),
        ({"trace": {"path": "/nowhere"}}, "trace.path", "/nowhere"),
    ],
)
def test_settings_that_cannot_work_are_problems(tmp_path: Path, settings, check, words):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    code, found = findings("--config", str(file))
    assert code == 1
    assert found[check]["verdict"] == "problem"
    assert words in found[check]["found"]


@pytest.mark.parametrize(
    ("verdicts", "mode", "verdict", "words"),
    [
        ({"exact": 3, "within_noise": 1}, "rebalance", "ok", "MoE layers: 3 exact, 1 within_noise"),
        ({}, "rebalance", "warning", "not tried at start"),
        ({}, "observe", "skipped", "nothing moves"),
    ],
)
def test_a_running_server_tells_whether_experts_were_seen_to_move(verdicts, mode, verdict, words):
    status = make_status()
    status.self_test = verdicts
    status.info["mode"] = mode
    with server(200, encode(status)) as (url, _):
        _, found = findings("--server", url)
    assert found["server"]["found"] == f"mode {mode}, 2 MoE layers, generation 2"
    assert found["self-test"]["verdict"] == verdict
    assert words in found["self-test"]["found"]


def test_a_server_that_does_not_answer_is_a_problem():
    with server(200, None) as (url, _):
        pass
    code, found = findings("--server", url)
    assert code == 1
    assert found["server"]["verdict"] == "problem"
    assert "--plugin ep_rebalance" in found["server"]["remedy"]


def test_an_unknown_engine_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contract, "SUPPORTED_VERSIONS", ("9.9",))
    broken = Contract("vllm.config:NoSuchThing")
    monkeypatch.setattr(router, "CONTRACTS", (broken, *router.CONTRACTS))
    code, found = findings()
    assert code == 1
    assert "not supported" in found["vLLM"]["found"]
    assert found["seams"]["verdict"] == "problem"
    assert "NoSuchThing" in found["seam router"]["found"]


def test_a_check_that_fails_is_a_problem_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def fails() -> None:
        raise OSError("no /proc here")

    monkeypatch.setattr(machine, "processor", fails)
    monkeypatch.setattr(packages, "_ENTRY_POINTS", ("vllm.no_such_group",))
    code, found = findings()
    assert code == 1
    assert "OSError: no /proc here" in found["processor"]["found"]
    assert "without entry points" in found["ep-rebalance"]["found"]
    assert found["vLLM"]["verdict"] == "ok"


def test_an_engine_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    def fails(name: str) -> None:
        raise RuntimeError(f"{name}: undefined symbol")

    monkeypatch.setattr(engine, "import_module", fails)
    code, found = findings()
    assert code == 1
    assert "undefined symbol" in found["vLLM"]["found"]
    assert found["planner"]["verdict"] == "ok"


def test_a_quantised_model_is_fine_where_nothing_is_moved(tmp_path: Path):
    config = json.loads((TINY_MOE / "config.json").read_text())
    changes = {"quantization_config": {"quant_method": "fp8"}, "text_config": None}
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    settings = tmp_path / "settings.yaml"
    settings.write_text("mode: observe")
    code, found = findings("--model", str(tmp_path), "--config", str(settings))
    assert code == 0
    assert found["quantisation"]["found"] == "fp8: mode=observe moves no experts"


INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
CHECKPOINTS: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "DeepSeek-V3": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        },
        {
            "quantisation": "FP8, a scale per block, loaded by Fp8MoEMethod",
            "experts on H100": "FlashInferExperts, TritonOrDeepGemmExperts, TritonExperts: listed",
            "experts on A100": "MarlinExperts: listed",
            "experts on CPU": "CPUExpertsFp8: unlisted (compiled code packs",
        },
    ),
    "Qwen3-FP8": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head"],
            "weight_block_size": [128, 128],
        },
        {"experts on Blackwell": "TritonOrDeepGemmExperts, TritonExperts: listed"},
    ),
    "Kimi K2": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": INT4, "input_activations": None}
            },
        },
        {
            "quantisation": "compressed-tensors INT4 weights (WNA16)",
            "experts on H100": "not read); then MarlinExperts: listed",
            "experts on Blackwell": "MarlinExperts: listed",
        },
    ),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
        {"quantisation": "AWQ, loaded by AutoAWQMoEMethod"},
    ),
    "ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        {
            "experts on Blackwell": "TrtLlmNvFp4ExpertsModular, FlashInferCuteDSLExperts",
            "experts on ROCm": "refused (its scale of activations is the largest of the rank's own",
            "experts on CPU": "vLLM has no kernel there for this format",
        },
    ),
}


def looked_at(folder: Path, **settings: object) -> dict[str, Finding]:
    """What is told of the model alone."""
    return {one.check: one for one in model.model(str(folder), load_config(settings))}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_kernels_of_a_quantised_model_are_told_for_each_accelerator(tmp_path: Path, name: str):
    quantisation, told = CHECKPOINTS[name]
    found = looked_at(write_config(tmp_path, quantization_config=quantisation))
    assert found["quantisation"].verdict == "ok"
    for check, words in told.items():
        assert words in found[check].found
    for one in found.values():
        assert bool(one.remedy) == (one.verdict == "warning"), one


def test_a_kernel_that_is_listed_is_offered_where_another_one_comes_first(tmp_path: Path):
    quantisation, _ = CHECKPOINTS["Kimi K2"]
    hopper = looked_at(write_config(tmp_path, quantization_config=quantisation))["experts on H100"]
    assert hopper.verdict == "warning"
    assert hopper.remedy.startswith("--moe-backend marlin")


def test_a_quantisation_in_a_file_of_its_own_is_read(tmp_path: Path):
    """As ModelOpt wrote it before it put it into config.json."""
    held = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (write_config(tmp_path) / "hf_quant_config.json").write_text(json.dumps(held))
    found = looked_at(tmp_path)
    assert "ModelOpt NVFP4, loaded by ModelOptNvFp4FusedMoE" in found["quantisation"].found
    assert found["experts on H100"].verdict == "warning"


def test_gpt_oss_in_mxfp4_is_a_problem_whatever_is_set(tmp_path: Path):
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    write_config(tmp_path, model_type="gpt_oss", quantization_config=mxfp4)
    settings = tmp_path / "settings.yaml"
    settings.write_text("quantisation: {unlisted: self_test}")
    code, found = findings("--model", str(tmp_path), "--config", str(settings))
    assert code == 1
    assert "does not say which of its layers hold experts" in found["quantisation"]["found"]
    assert "without --plugin" in found["quantisation"]["remedy"]
    assert "experts on H100" not in found


def test_an_unknown_quantisation_is_left_to_the_trial_if_that_is_asked_for(tmp_path: Path):
    write_config(tmp_path, quantization_config={"quant_method": "new"})
    found = looked_at(tmp_path, quantisation={"unlisted": "self_test"})
    assert found["quantisation"].verdict == "warning"
    assert "unlisted with every kernel" in found["quantisation"].found


def test_code_that_comes_with_a_cached_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    repository = tmp_path / "models--someone--own"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    config = json.loads((TINY_MOE / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "conf.Own"}}
    (snapshot / "config.json").write_text(json.dumps({**config, **own}))
    (snapshot / "conf.py").write_text("raise SystemExit('was run')")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    (found, _) = model.model("someone/own")
    assert found.found == "Qwen3MoeForCausalLM, 16 experts, top 2, in all 4 layers"


def test_code_that_cannot_be_kept_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "cache_folder", lambda _: None)
    found = packages.planner()
    assert found.verdict == "warning"
    assert "NUMBA_CACHE_DIR" in found.remedy


TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \t{link}\tPXB\t0-63\t0
GPU1\t{link}\t X \tSYS\t0-63\t0
NIC0\tPXB\tSYS\t X
"""


@pytest.mark.parametrize("link", ["NV18", "SYS"])
def test_links_between_gpus_are_told_from_those_to_network_cards(link: str):
    assert machine.link_kinds(TOPOLOGY.format(link=link)) == {link}


def test_a_terminal_of_80_columns_is_kept_to():
    done = run("doctor", "--model", "no/such", COLUMNS="80", FORCE_COLOR="1", TERM="dumb")
    assert done.exit_code == 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "-> name a folder" in done.stdout


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "ok", "vLLM knows Qwen3MoeForCausalLM"),
        ({"architectures": "Qwen3MoeForCausalLM"}, "ok", "vLLM knows Qwen3MoeForCausalLM"),
        ({"architectures": ["NoSuchMoe"]}, "warning", "no model for NoSuchMoe"),
        ({"architectures": None}, "warning", "an unnamed architecture"),
    ],
)
def test_architectures_are_looked_up_in_the_engine(tmp_path: Path, changes, verdict, words):
    config = json.loads((TINY_MOE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    code, found = findings("--model", str(tmp_path))
    assert code == 0
    assert found["architecture"]["verdict"] == verdict
    assert words in found["architecture"]["found"]
    assert bool(found["architecture"]["remedy"]) == (verdict == "warning")


def test_architectures_are_skipped_without_an_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    (found,) = model.architecture(str(TINY_MOE), Engine())
    assert (found.verdict, found.found) == ("skipped", "vLLM is not installed")


def test_numbers_of_experts_may_be_lists(tmp_path: Path):
    config = {"architectures": ["X"], "moe_num_experts": [64, 64], "moe_k": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (found, _) = model.model(str(tmp_path))
    assert found.found.startswith("X, 64 experts, top 6, ")


def test_a_config_that_holds_no_settings_cannot_be_read(tmp_path: Path):
    (tmp_path / "config.json").write_text("[1]")
    (found,) = model.model(str(tmp_path))
    assert (found.verdict, "holds a list" in found.found) == ("problem", True)
    assert list(model.architecture(str(tmp_path), Engine())) == []


def nested(**settings: object) -> dict[str, object]:
    return {
        "model_type": "qwen3_vl_moe",
        "text_config": {"model_type": "qwen3_vl_moe_text", **settings},
    }


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (nested(num_experts=24, num_experts_per_tok=3, num_hidden_layers=6), "24 experts, top 3, in all 6"),
        (
            {
                "model_type": "qwen3_omni_moe",
                "thinker_config": {
                    "model_type": "qwen3_omni_moe_thinker",
                    "text_config": {"model_type": "qwen3_omni_moe_text", "num_experts": 40,
                                    "num_experts_per_tok": 5, "num_hidden_layers": 7},
                },
            },
            "40 experts, top 5, in all 7",
        ),
        (
            {
                "model_type": "gemma4",
                "text_config": {"model_type": "gemma4_text", "num_experts": 20, "top_k_experts": 3,
                                "enable_moe_block": True, "num_hidden_layers": 5},
            },
            "20 experts, top 3, in all 5",
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 48, "num_experts_per_tok": 4,
             "num_hidden_layers": 9, "first_k_dense_replace": 2},
            "48 experts, top 4, in layers 2 to 8 of 9",
        ),
    ],
    ids=["nested", "nested twice", "other names", "dense first layers"],
)  # fmt: skip
@pytest.mark.parametrize("installed", [True, False], ids=["by vLLM", "without vLLM"])
def test_experts_are_found_whatever_the_configuration_calls_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config, told, installed
):
    if not installed:
        monkeypatch.setattr(engine, "find_spec", lambda _: None)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["A"], **config}))
    found, *_ = model.model(str(tmp_path), None, Engine())
    assert (found.verdict, found.found.partition(", ")[2].startswith(told)) == ("ok", True), found


def test_a_top_k_that_nothing_says_is_unknown_with_a_remedy(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"], "num_experts": 8}))
    found, *_ = model.model(str(tmp_path))
    assert (found.verdict, "top-k unknown" in found.found) == ("warning", True)
    assert "--top-k" in found.remedy
    assert "top 0" not in found.found


def test_what_vllm_cannot_read_is_read_from_config_json_and_said(tmp_path: Path):
    config = {"architectures": ["X"], "model_type": "no-such", "num_experts": 8, "moe_k": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, *_ = model.model(str(tmp_path), None, Engine())
    assert found.verdict == "warning"
    assert "8 experts, top 2" in found.found
    assert "vLLM itself cannot read it" in found.found


def test_what_vllm_reads_counts_and_a_difference_is_said(tmp_path: Path, monkeypatch):
    read = {"experts": 12, "top_k": 2, "layers": 4, "hidden_size": 8}
    monkeypatch.setattr(
        "ep_rebalance.engines.vllm.diagnosis.numbers_as_served",
        lambda _: {"numbers": read, "quantisation": None},
    )
    found, *_ = model.model(str(write_config(tmp_path)), None, Engine())
    assert found.verdict == "warning"
    assert "12 experts" in found.found
    assert "by config.json there are 16" in found.found


# --- answers of vLLM that are kept


def test_an_answer_is_kept_until_something_changes(monkeypatch: pytest.MonkeyPatch):
    _, first = findings()
    assert "as seen" not in first["seams"]["found"]

    def asked(name: str) -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(engine, "import_module", asked)
    code, second = findings()
    assert code == 0
    assert second["seams"]["found"].startswith(f"{first['seams']['found']} (as seen ")
    assert "imported" in findings("--fresh")[1]["vLLM"]["found"]
    monkeypatch.setenv("VLLM_SOMETHING", "1")
    assert "imported" in findings()[1]["vLLM"]["found"]


def test_an_answer_with_a_problem_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        patched.setattr(contract, "SUPPORTED_VERSIONS", ("9.9",))
        assert findings()[1]["vLLM"]["verdict"] == "problem"
    assert findings()[1]["vLLM"]["verdict"] == "ok"


def test_a_changed_file_of_vllm_is_another_state(tmp_path: Path):
    (tmp_path / "a.py").write_text("1")
    before = sorted(engine._files(str(tmp_path)))
    (tmp_path / "a.py").write_text("12")
    assert sorted(engine._files(str(tmp_path))) != before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"asked": "now", "value": 1}'])
def test_a_kept_answer_that_cannot_be_read_is_asked_anew(tmp_path: Path, text: str):
    file = tmp_path / "answer.json"
    file.write_text(text)
    assert engine._read(file) is None


def test_where_nothing_can_be_kept_everything_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    for _ in range(2):
        _, found = findings()
        assert found["vLLM"]["verdict"] == "ok"
        assert "as seen" not in found["vLLM"]["found"]
