"""The comparisons of `planning.py`: whose load, on which model, on how many ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from planning_load import gpt_oss_sequences, load_domains
from planning_router import ARRIVALS, router_steps

from ep_rebalance.offline.generated_load import TIMINGS, generate_steps
from ep_rebalance.offline.model_shape import SHAPES, ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison: whose load, on which model, on how many ranks."""

    load: str
    shape: str
    ranks: int
    redundant: int
    tokens_per_rank: int = 128

    @property
    def title(self) -> str:
        return f"{self.model.title}, {self.load}: {self.size}"

    @property
    def size(self) -> str:
        tokens = f", {self.tokens_per_rank} tokens a rank" if self.tokens_per_rank != 128 else ""
        return f"EP{self.ranks}, {self.redundant} redundant{tokens}"

    @property
    def model(self) -> ModelShape:
        return SHAPES[self.shape]


GENERATED = ("steady", "drift", "burst", *ARRIVALS)
"""Loads that need no recording."""


def _cases(shape: str, *sizes: tuple[int, ...], loads: tuple[str, ...]) -> list[Case]:
    """For each size (ranks, redundant, tokens a rank if they are not 128) and load."""
    return [
        Case(load=load, shape=shape, ranks=size[0], redundant=size[1], tokens_per_rank=tokens)
        for size in sizes
        for tokens in (size[2:] or (128,))
        for load in loads
    ]


CASES = (
    *_cases("deepseek-v3", (8, 16), (32, 32, 128, 16, 2048), loads=("real", *GENERATED)),
    *_cases("deepseek-v3", (64, 64), (144, 32), (144, 176), loads=("real", *GENERATED)),
    *_cases("deepseek-v3", (8, 32), (16, 16), (32, 64), loads=("real",)),
    *_cases("deepseek-v3", (32, 0), loads=("steady", "router")),
    *_cases("kimi-k2", (32, 32), loads=GENERATED),
    *_cases("qwen3-next", (32, 32), loads=GENERATED),
    *_cases("qwen3-235b", (8, 16), (32, 32), loads=("drift", "router")),
    *_cases("gpt-oss-120b", (16, 16), loads=("drift", "router")),
    *_cases("mixtral-8x7b", (8, 8), loads=("drift", "router")),
    *_cases("gpt-oss-20b", (8, 8, 128, 16), loads=("recorded",)),
)


def chosen_cases(only: str, *, recordings: bool) -> list[Case]:
    """Those whose title contains `only`, without those that need recordings if there are none."""
    cases = [case for case in CASES if only in case.title]
    if not recordings:
        cases = [case for case in cases if case.load in GENERATED]
    return cases


def load_of(case: Case, seed: int, data: Path | None) -> Iterator[NDArray[np.int64]]:
    """int64 [L, E] for each step, without end.

    data: folder with recorded loads.
    """
    shape, tokens = case.model, case.ranks * case.tokens_per_rank
    if case.load in ARRIVALS:
        return router_steps(
            shape,
            ARRIVALS[case.load],
            ranks=case.ranks,
            tokens_per_rank=case.tokens_per_rank,
            seed=seed,
        )
    if case.load == "recorded":
        assert data is not None
        return gpt_oss_sequences(data / case.shape, shape, tokens, seed)
    domains_DLE = load_domains(case.load, shape, seed, data)
    return generate_steps(
        domains_DLE, TIMINGS[case.load], pairs_per_step=tokens * shape.top_k, seed=seed
    )
