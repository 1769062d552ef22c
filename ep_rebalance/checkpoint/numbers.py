"""Numbers of a model: experts, top-k, layers and sizes, whatever its configuration calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep_rebalance.checkpoint.files import Settings, text_of
from ep_rebalance.checkpoint.moe_layers import layers_with_experts

# The first names of each are those that vLLM looks for, in its order
# (vllm/transformers_utils/model_arch_config_convertor.py). To the others its classes of configurations
# refer by one of the first.
_EXPERTS = (
    "num_experts",
    "moe_num_experts",
    "n_routed_experts",
    "num_local_experts",
    "num_routed_experts",
)
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "experts_per_token",
    "num_selected_experts",
)
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_WIDTH = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "ffn_hidden_size",
    "intermediate_size",
)
_SECTIONS = ("ffn_config", "moe", "moe_config")
"""Where some configurations keep what concerns experts."""

_LARGEST = 1 << 20
"""A larger number is no size of a model."""

_TWO_MATRICES = ("nemotron_h",)
"""Model types whose experts have no gate: two matrices instead of three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNumbers:
    """What a configuration says of a model; None where it does not say.

    experts: routed experts of a layer, the most if layers differ; 0 for a dense model.
    top_k: experts per token, the most if layers differ.
    layers: of the model, dense ones included.
    moe_layers: the numbers of those that have experts.
    hidden_size: numbers in a token between layers.
    expert_parameters: of one expert of one layer.
    """

    experts: int
    top_k: int | None
    layers: int | None
    moe_layers: tuple[int, ...] | None
    hidden_size: int | None
    expert_parameters: int | None


def numbers_of(config: Settings) -> ModelNumbers:
    """The numbers of a model.

    config: config.json, or the part of it that describes the language model.
    """
    text = text_of(config)
    parts = (text, *(part for name in _SECTIONS if isinstance(part := text.get(name), Mapping)))
    blocks = tuple(_moe_blocks(text))
    experts = _largest(parts, _EXPERTS) or _largest(blocks, _EXPERTS) or 0
    if text.get("enable_moe_block") is False:
        experts = 0
    layers = _layer_count(text)
    hidden, width = _largest(parts, _HIDDEN), _largest(parts, _WIDTH) or _largest(blocks, _WIDTH)
    return ModelNumbers(
        experts=experts,
        top_k=(_largest(parts, _TOP_K) or _largest(blocks, _TOP_K)) if experts else None,
        layers=layers,
        moe_layers=layers_with_experts(text, layers) if experts else (),
        hidden_size=hidden,
        expert_parameters=_expert_parameters(text, hidden, width) if experts else None,
    )


def _layer_count(text: Settings) -> int | None:
    pattern = text.get("layers_block_type") or text.get("hybrid_override_pattern")
    listed = text.get("block_configs") or pattern
    return _largest((text,), _LAYERS) or (len(listed) if isinstance(listed, list | str) else None)


def _expert_parameters(text: Settings, hidden: int | None, width: int | None) -> int | None:
    # Experts of some models work on a shorter token than the layers between them.
    inner = _number(text.get("moe_latent_size")) or hidden
    if not inner or not width:
        return None
    matrices = 2 if str(text.get("model_type", "")).startswith(_TWO_MATRICES) else 3
    return matrices * inner * width


def _moe_blocks(text: Settings) -> Iterator[Settings]:
    """The blocks with experts of a model whose layers are described one by one (Nemotron)."""
    blocks = text.get("block_configs")
    for block in blocks if isinstance(blocks, list) else ():
        if isinstance(block, Mapping) and block.get("block_type") == "moe":
            yield block


def _largest(parts: Sequence[Settings], names: Sequence[str]) -> int | None:
    """The number under the first of these names that has one; the largest if parts differ."""
    for name in names:
        if found := [number for part in parts if (number := _number(part.get(name)))]:
            return max(found)
    return None


def _number(value: Any) -> int | None:
    """A number above 0. Of a list, which has one for each layer or kind of token, its largest."""
    if isinstance(value, list | tuple):
        return max((number for one in value if (number := _number(one))), default=None)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole or isinstance(value, bool):
        return None
    return int(value) if 1 <= value <= _LARGEST else None
