"""Activation: what comes between the halves of an expert, `act(gate) * up`, in torch and in a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from ep_rebalance.kernels.language import jit, tl

ActivationName = Literal["silu", "gelu", "gelu_tanh", "swiglu_oai"]


def activation_name(text: str) -> ActivationName:
    """`text`, if it names an activation that there is a kernel for. Raises ValueError otherwise."""
    for name in get_args(ActivationName):
        if name == text:
            return cast(ActivationName, name)
    raise ValueError(f"activation {text!r} is none of {', '.join(get_args(ActivationName))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What comes between the halves of an expert: `act(gate) * up`.

    name: `swiglu_oai` is that of gpt-oss, gate * sigmoid(alpha * gate) * (up + 1), with gate at most
        `limit` and up between -`limit` and `limit`.
    interleaved: whether the rows of the first weights are gate, up, gate, up ... instead of all gates
        followed by all ups.
    alpha, limit: of `swiglu_oai`.
    """

    name: ActivationName = "silu"
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0


def activate(first: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[rows, I], from the result [rows, 2 I] of the first weights."""
    gate, up = (first[:, ::2], first[:, 1::2]) if activation.interleaved else first.chunk(2, dim=1)
    if activation.name == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation.name == "swiglu_oai":
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    approximate = "tanh" if activation.name == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


@jit
def activate_tile(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, NAME: tl.constexpr):
    if NAME == "silu":
        result = gate * tl.sigmoid(gate) * up
    elif NAME == "swiglu_oai":
        gate = tl.minimum(gate, LIMIT)
        up = tl.clamp(up, -LIMIT, LIMIT)
        result = gate * tl.sigmoid(ALPHA * gate) * (up + 1.0)
    elif NAME == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), with z = sqrt(2 / pi) (gate + 0.044715 gate^3)
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        result = gate * tl.sigmoid(2.0 * inner) * up
    else:
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    return result
