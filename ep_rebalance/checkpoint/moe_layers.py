"""Which layers have experts: dense first layers, every n-th one, or a list.

Each rule is a setting of config.json and what vLLM's models do with it (vllm/model_executor/models/). A
layer has experts if all rules agree whose settings are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ep_rebalance.checkpoint.files import Settings

_MOST_LAYERS = 4096

_SPARSE = ("sparse", "moe")
"""What lists of kinds of layers call one with experts; `E` where they are a text."""


def layers_with_experts(text: Settings, layers: int | None) -> tuple[int, ...] | None:
    """The numbers of the layers that have experts, for a model that has any; None if that is not known.

    text: the settings of the language model.
    layers: of the model, dense ones included.
    """
    if layers is None or layers > _MOST_LAYERS:
        return None
    try:
        return tuple(_listed(text, layers) or _by_rules(text, layers)) or None
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None


def told_layers(moe_layers: Sequence[int] | None, layers: int | None) -> str:
    """A clause that says which layers have experts."""
    if moe_layers is None:
        return "which layers have experts is not known"
    first, last, count = moe_layers[0], moe_layers[-1], len(moe_layers)
    if count == layers:
        return f"in all {layers} layers"
    if count == last - first + 1:
        return f"in layers {first} to {last} of {layers}"
    return f"in {count} of {layers} layers ({', '.join(map(str, moe_layers[:3]))}, ... {last})"


def _listed(text: Settings, layers: int) -> list[int]:
    """Where a setting lists them; none if there is no such setting."""
    for name, listed in _LISTS.items():
        if found := [layer for layer in listed(text.get(name) or ()) if 0 <= layer < layers]:
            return found
    return []


def _by_rules(text: Settings, layers: int) -> list[int]:
    rules = [(rule, text[name]) for name, rule in _RULES.items() if text.get(name) is not None]
    if any(isinstance(value, list) and len(value) > _MOST_LAYERS for _, value in rules):
        raise ValueError("a list with more numbers than a model has layers")
    return [layer for layer in range(layers) if all(has(layer, v, text) for has, v in rules)]


def _numbers(value: Any) -> list[int]:
    """Of a list, or of a text such as "4,5,6"."""
    parts = value.split(",") if isinstance(value, str) else value
    return sorted(int(part) for part in parts)


def _of_kinds(kinds: Sequence[Any]) -> list[int]:
    return [number for number, kind in enumerate(kinds) if kind in _SPARSE]


def _of_pattern(pattern: Any) -> list[int]:
    """Nemotron-H: a letter for each layer, or a list of kinds."""
    if not isinstance(pattern, str):
        return _of_kinds(pattern)
    return [number for number, letter in enumerate(pattern) if letter == "E"]


def _of_blocks(blocks: Sequence[Any]) -> list[int]:
    kinds = [block.get("block_type") if isinstance(block, Mapping) else "" for block in blocks]
    return _of_kinds(kinds)


_LISTS: Mapping[str, Callable[[Any], list[int]]] = MappingProxyType(
    {
        "moe_layers_enum": _numbers,
        "mlp_layer_types": _of_kinds,
        "hybrid_override_pattern": _of_pattern,
        "layers_block_type": _of_pattern,
        "block_configs": _of_blocks,
        "moe_layers": _numbers,
    }
)
"""Settings that list the layers themselves. The first that names any counts."""


def _first_dense(layer: int, value: Any, _: Settings) -> bool:
    return layer >= int(value)


def _every(layer: int, value: Any, _: Settings) -> bool:
    """Layers 0, n, 2 n; a list has 1 for each layer with experts."""
    if isinstance(value, list):
        return layer < len(value) and bool(value[layer])
    return layer % max(int(value), 1) == 0


def _every_last(layer: int, value: Any, _: Settings) -> bool:
    """Layers n - 1, 2 n - 1; none for 0."""
    return int(value) > 0 and (layer + 1) % int(value) == 0


def _from(layer: int, value: Any, _: Settings) -> bool:
    """A list is Ernie's, for text and for pictures."""
    return layer >= (min(value) if isinstance(value, list) else int(value))


def _up_to(layer: int, value: Any, _: Settings) -> bool:
    last = max(value) if isinstance(value, list) else int(value)
    return last < 0 or layer <= last


def _not_among(layer: int, value: Any, _: Settings) -> bool:
    return layer not in value


def _period(layer: int, value: Any, text: Settings) -> bool:
    return layer % max(int(value), 1) == int(text.get("expert_layer_offset") or 0)


_RULES: Mapping[str, Callable[[int, Any, Settings], bool]] = MappingProxyType(
    {
        "first_k_dense_replace": _first_dense,
        "num_dense_layers": _first_dense,
        "moe_layer_freq": _every,
        "decoder_sparse_step": _every_last,
        "interleave_moe_layer_step": _every_last,
        "moe_layer_frequency": _every_last,
        "moe_layer_interval": _every_last,
        "moe_layer_start_index": _from,
        "moe_layer_end_index": _up_to,
        "mlp_only_layers": _not_among,
        "expert_layer_period": _period,
    }
)
