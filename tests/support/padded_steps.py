"""Steps with rows that are padding."""

from dataclasses import replace

import torch
from routed_steps import (
    Step,
)

TOP_K = 3


def is_padding(padded: str, rank: int, tokens: int) -> torch.Tensor:
    """bool [T, K]."""
    if padded == "last rows":
        return (torch.arange(tokens) >= (tokens + 1) // 2).unsqueeze(1).expand(-1, TOP_K)
    if padded == "single pairs":
        return torch.arange(tokens * TOP_K).view(-1, TOP_K) % 4 < 2
    idle = padded == "all ranks idle" or rank == 0
    return torch.full((tokens, TOP_K), idle)


def with_padding(step: Step, padding_TK: torch.Tensor) -> Step:
    """Its padding holds NaN wherever it can."""
    return replace(
        step,
        hidden_TH=step.hidden_TH.masked_fill(padding_TK.all(1, keepdim=True), torch.nan),
        weights_TK=step.weights_TK.masked_fill(padding_TK, torch.nan),
        slots_TK=step.slots_TK.masked_fill(padding_TK, -1),
    )
