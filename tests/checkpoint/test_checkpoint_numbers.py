"""What a checkpoint's configuration says, read without vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_checkpoints import KNOWN, Known

from ep_rebalance.checkpoint import (
    Checkpoint,
    numbers_of,
    read_checkpoint,
    told_layers,
    weight_size,
)
from ep_rebalance.config import ConfigurationError


def written(folder: Path, config: object, beside: object = None) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    return str(folder)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_a_known_model_is_read_as_its_publisher_describes_it(known: Known):
    read = numbers_of(known.config)
    assert (read.experts, read.top_k, read.layers) == (known.experts, known.top_k, known.layers)
    assert read.moe_layers is not None
    assert len(read.moe_layers) == known.moe_layers
    assert read.hidden_size is not None
    assert read.expert_parameters is not None


@pytest.mark.parametrize(
    ("settings_", "layers"),
    [
        ({"first_k_dense_replace": 2, "moe_layer_freq": 1}, (2, 3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"moe_layer_freq": [0, 1, 0, 1, 1, 0]}, (1, 3, 4)),
        ({"interleave_moe_layer_step": 2}, (1, 3, 5)),
        ({"interleave_moe_layer_step": 2, "moe_layers": [0, 3]}, (0, 3)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [5]}, (2,)),
        ({"moe_layers_enum": "4, 5,1"}, (1, 4, 5)),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse", "dense"]}, (1, 2, 4)),
        ({"hybrid_override_pattern": "MEM*E-"}, (1, 4)),
        ({"layers_block_type": ["mamba", "moe", "attention", "moe", "mlp", "moe"]}, (1, 3, 5)),
        ({"layers_block_type": ["mamba"] * 6, "expert_layer_period": 4}, (0, 4)),
        ({"expert_layer_period": 3, "expert_layer_offset": 2}, (2, 5)),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": 4, "moe_layer_interval": 2}, (3,)),
        ({"moe_layer_start_index": [1, 2], "moe_layer_end_index": [4, 3]}, (1, 2, 3, 4)),
        ({"moe_layer_end_index": -1}, (0, 1, 2, 3, 4, 5)),
        ({"num_dense_layers": 5}, (5,)),
        ({"block_configs": [{"block_type": "mamba"}, {"block_type": "moe"}]}, (1,)),
    ],
)
def test_layers_with_experts_are_those_that_the_settings_name(settings_, layers):
    config = {"num_experts": 8, "num_hidden_layers": 6, **settings_}
    assert numbers_of(config).moe_layers == layers


@pytest.mark.parametrize(
    "settings_",
    [
        {"moe_layers_enum": "all"},
        {"first_k_dense_replace": "none"},
        {"mlp_only_layers": 3},
        {"first_k_dense_replace": 6},
    ],
)
def test_settings_that_name_no_layer_leave_it_unknown(settings_):
    read = numbers_of({"num_experts": 8, "num_hidden_layers": 6, **settings_})
    assert read.moe_layers is None
    assert "not known" in told_layers(read.moe_layers, read.layers)


def test_layers_are_told_in_a_clause():
    assert told_layers(range(4), 4) == "in all 4 layers"
    assert told_layers((2, 3), 4) == "in layers 2 to 3 of 4"
    assert told_layers((1, 3, 5, 7), 8) == "in 4 of 8 layers (1, 3, 5, ... 7)"


def test_experts_that_blocks_describe_are_those_of_the_largest():
    blocks = [
        {"block_type": "attention"},
        {"block_type": "moe", "n_routed_experts": 64, "num_experts_per_tok": 4},
        {"block_type": "moe", "n_routed_experts": 96, "num_experts_per_tok": 6},
    ]
    read = numbers_of({"block_configs": blocks, "hidden_size": 64})
    assert (read.experts, read.top_k, read.layers) == (96, 6, 3)
    assert read.moe_layers == (1, 2)


def test_what_is_not_said_is_unknown_and_never_0():
    read = numbers_of({"num_experts": 8})
    assert (read.experts, read.top_k, read.layers, read.moe_layers) == (8, None, None, None)
    assert (read.hidden_size, read.expert_parameters) == (None, None)


@pytest.mark.parametrize("changes", [{}, {"num_experts": 0}, {"num_experts": None}])
def test_a_dense_model_has_no_experts(changes: dict[str, Any]):
    read = numbers_of({"num_hidden_layers": 4, "num_experts_per_tok": 2, **changes})
    assert (read.experts, read.top_k, read.moe_layers) == (0, None, ())


def test_a_model_whose_experts_are_switched_off_has_none():
    assert numbers_of({"num_experts": 8, "enable_moe_block": False}).experts == 0


def test_an_expert_without_a_gate_has_two_matrices():
    config = {"model_type": "nemotron_h", "num_experts": 2, "hidden_size": 8}
    read = numbers_of({**config, "moe_intermediate_size": 4})
    assert read.expert_parameters == 2 * 8 * 4
    latent = {**config, "moe_intermediate_size": 4, "moe_latent_size": 2}
    assert numbers_of(latent).expert_parameters == 2 * 2 * 4


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
_NAMES = sorted(
    {name for known in KNOWN for name in known.config} | {"text_config", "moe_layers", "dtype"}
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES))
def test_no_configuration_ends_the_reader(config: dict[str, Any]):
    read = numbers_of(config)
    assert read.experts >= 0
    assert read.top_k is None or read.top_k > 0
    if read.moe_layers:
        assert read.layers is not None
        assert 0 <= read.moe_layers[0] <= read.moe_layers[-1] < read.layers
    quantisation = config.get("quantization_config")
    held = quantisation if isinstance(quantisation, dict) else {}
    checkpoint = Checkpoint(folder=Path("."), config=config, quantisation=held)
    assert weight_size(checkpoint).bytes_per_parameter > 0
    assert all(isinstance(name, str) for name in checkpoint.architectures)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**30, True, "8", -1, 2.5, [[]]])
def test_what_is_no_number_of_experts_or_layers_is_none(value: object):
    read = numbers_of({"num_experts": value, "num_hidden_layers": value, "moe_layer_freq": value})
    assert (read.experts, read.layers, read.moe_layers) == (0, None, ())
    odd = numbers_of({"num_experts": 8, "num_hidden_layers": 4, "moe_layer_freq": value})
    assert odd.layers == 4


NVFP4 = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}


@pytest.mark.parametrize(
    ("config", "beside", "size", "source"),
    [
        ({}, None, 2.0, "assumed"),
        ({"dtype": "float32"}, None, 4.0, "dtype float32"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, None, 2.0, "dtype bfloat16"),
        ({"quantization_config": {"quant_method": "fp8"}}, None, 1.0, "FP8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, None, 17 / 32, "MXFP4"),
        ({}, NVFP4, 9 / 16, "NVFP4"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
            None,
            0.5 + 2 / 128,
            "4 bits, a scale for 128",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"a": {"weights": {"num_bits": 8, "group_size": None}}},
                }
            },
            None,
            1.0,
            "8 bits",
        ),
        ({"quantization_config": {"quant_method": "new"}}, None, 1.0, "new is not known"),
    ],
)
def test_a_parameter_has_the_size_of_its_precision(tmp_path: Path, config, beside, size, source):
    found = weight_size(read_checkpoint(written(tmp_path, config, beside)))
    assert found.bytes_per_parameter == size
    assert source in found.source


def test_the_root_counts_before_the_file_and_the_file_before_the_language_model(tmp_path: Path):
    nested = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    assert read_checkpoint(written(tmp_path, nested)).quantisation["quant_method"] == "awq"
    assert "producer" in read_checkpoint(written(tmp_path, nested, NVFP4)).quantisation
    both = {**nested, "quantization_config": {"quant_method": "fp8"}}
    assert read_checkpoint(written(tmp_path, both, NVFP4)).quantisation["quant_method"] == "fp8"


def test_the_file_itself_may_be_named_and_may_begin_with_a_mark(tmp_path: Path):
    file = tmp_path / "own.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"num_experts": 4}).encode())
    assert numbers_of(read_checkpoint(str(file)).config).experts == 4


@pytest.mark.parametrize("text", ["[1]", "{", "", "[" * 100_000, '{"quantization_config": 3}'])
def test_a_file_without_settings_is_refused_with_its_name(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match="cannot be read") as raised:
        read_checkpoint(str(tmp_path))
    assert str(tmp_path) in raised.value.reason
    assert "config.json" in raised.value.remedy


def test_lists_longer_than_models_are_not_searched_for_each_layer(tmp_path: Path):
    config = {"num_experts": 8, "num_hidden_layers": 4096, "mlp_only_layers": [-1] * 4097}
    assert numbers_of(read_checkpoint(written(tmp_path, config)).config).moe_layers is None


def test_numbers_that_no_model_has_are_left_out(tmp_path: Path):
    groups = {"quant_method": "gptq", "bits": 4, "group_size": 10**400}
    sizes = {"hidden_size": 1 << 30, "moe_intermediate_size": 1 << 30}
    config = {"num_experts": 8, "quantization_config": groups} | sizes
    checkpoint = read_checkpoint(written(tmp_path, config))
    assert weight_size(checkpoint).bytes_per_parameter == 0.5
    assert numbers_of(checkpoint.config).expert_parameters is None


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigurationError, match="FIFO"):
        read_checkpoint(str(tmp_path))


def test_a_name_that_is_not_cached_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="local cache"):
        read_checkpoint("no/such")
