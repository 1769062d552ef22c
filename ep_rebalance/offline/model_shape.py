"""Model shapes: the sizes of models that traces are often of. Those of a trace are found by `expert_size`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model.

    layers: MoE layers.
    top_k: experts per token.
    expert_bytes: one expert of one layer, in the precision in which the model is served.
    bytes_per_parameter: size of its weights in that precision.
    expert_groups: groups in which its router chooses experts.
    """

    title: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    hidden_size: int
    bytes_per_parameter: float
    expert_groups: int = 1

    def size(self, how: str) -> ExpertSize:
        """Of an expert. how: see `ExpertSize`."""
        return ExpertSize(
            expert_bytes=self.expert_bytes,
            hidden_size=self.hidden_size,
            bytes_per_parameter=self.bytes_per_parameter,
            how=how,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSize:
    """How large an expert of a trace's model is.

    expert_bytes: one expert of one layer, in the precision in which the model is served.
    how: what it was taken from, in words.
    """

    expert_bytes: int
    hidden_size: int
    bytes_per_parameter: float
    how: str


SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "deepseek-v3": ModelShape(
            title="DeepSeek-V3",
            layers=58,
            experts=256,
            top_k=8,
            expert_bytes=3 * 7168 * 2048,
            hidden_size=7168,
            bytes_per_parameter=1.0,
            expert_groups=8,
        ),
        "kimi-k2": ModelShape(
            title="Kimi-K2",
            layers=60,
            experts=384,
            top_k=8,
            expert_bytes=3 * 7168 * 2048,
            hidden_size=7168,
            bytes_per_parameter=1.0,
        ),
        "qwen3-next": ModelShape(
            title="Qwen3-Next-80B-A3B",
            layers=48,
            experts=512,
            top_k=10,
            expert_bytes=2 * 3 * 2048 * 512,
            hidden_size=2048,
            bytes_per_parameter=2.0,
        ),
        "qwen3-235b": ModelShape(
            title="Qwen3-235B-A22B",
            layers=94,
            experts=128,
            top_k=8,
            expert_bytes=2 * 3 * 4096 * 1536,
            hidden_size=4096,
            bytes_per_parameter=2.0,
        ),
        # 17 / 32 bytes a parameter, MXFP4: 32 numbers of 4 bits have a scale of 8 bits.
        "gpt-oss-120b": ModelShape(
            title="gpt-oss-120b",
            layers=36,
            experts=128,
            top_k=4,
            expert_bytes=3 * 2880 * 2880 * 17 // 32,
            hidden_size=2880,
            bytes_per_parameter=0.53125,
        ),
        "gpt-oss-20b": ModelShape(
            title="gpt-oss-20b",
            layers=24,
            experts=32,
            top_k=4,
            expert_bytes=3 * 2880 * 2880 * 17 // 32,
            hidden_size=2880,
            bytes_per_parameter=0.53125,
        ),
        "mixtral-8x7b": ModelShape(
            title="Mixtral-8x7B",
            layers=32,
            experts=8,
            top_k=2,
            expert_bytes=2 * 3 * 4096 * 14336,
            hidden_size=4096,
            bytes_per_parameter=2.0,
        ),
    }
)
