"""Sizes of the models that placements are compared on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """expert_bytes: one expert of one layer, in the precision that the model is served in."""

    title: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: int


SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "deepseek-v3": ModelShape(
            title="DeepSeek-V3", layers=58, experts=256, top_k=8, expert_bytes=3 * 7168 * 2048
        ),
        "qwen3-235b": ModelShape(
            title="Qwen3-235B-A22B",
            layers=94,
            experts=128,
            top_k=8,
            expert_bytes=2 * 3 * 4096 * 1536,
        ),
        "gpt-oss-120b": ModelShape(
            title="gpt-oss-120b",
            layers=36,
            experts=128,
            top_k=4,
            expert_bytes=3 * 2880 * 2880 * 17 // 32,
        ),
        "gpt-oss-20b": ModelShape(
            title="gpt-oss-20b",
            layers=24,
            experts=32,
            top_k=4,
            expert_bytes=3 * 2880 * 2880 * 17 // 32,
        ),
        "mixtral-8x7b": ModelShape(
            title="Mixtral-8x7B",
            layers=32,
            experts=8,
            top_k=2,
            expert_bytes=2 * 3 * 4096 * 14336,
        ),
    }
)
