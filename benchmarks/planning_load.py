"""Recorded loads: counts per workload that SGLang wrote, and routed ids token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.offline.generated_load import synthetic_domains
from ep_rebalance.offline.model_shape import ModelShape

_FINISHED = "True_False"
"""End of the keys of sequences that ended and do not repeat themselves."""


def load_domains(
    load: str, shape: ModelShape, seed: int, data: Path | None, *, layers: int | None = None
) -> NDArray[np.float64]:
    """float64 [D, L, E], the share of each expert in each kind of traffic: recorded ones for the load `real`,
    made up for others.

    data: folder with recorded loads.
    layers: about how many of the model's are wanted; all if None.
    """
    if load == "real":
        assert data is not None, "recorded load needs --data"
        domains_DLE = sglang_domains(data / "deepseek-logical-counts")
    else:
        domains_DLE = synthetic_domains(
            domains=8, layers=shape.layers, experts=shape.experts, seed=seed
        )
    return domains_DLE if layers is None else domains_DLE[:, :: max(shape.layers // layers, 1)]


def sglang_domains(folder: Path) -> NDArray[np.float64]:
    """float64 [D, L, E], the share of each expert in each workload; layers that are dense are left
    out."""
    domains = []
    for path in sorted(folder.glob("*.json")):
        counts_LE = np.array(json.loads(path.read_text())["logical_count"], dtype=np.float64)
        domains.append(counts_LE[counts_LE.any(axis=1)])
    if not domains:
        raise SystemExit(f"{folder} holds no recordings (*.json with 'logical_count').")
    counts_DLE = np.stack(domains)
    return counts_DLE / counts_DLE.sum(axis=2, keepdims=True)


def gpt_oss_sequences(
    folder: Path, shape: ModelShape, tokens_per_step: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Steps of recorded sequences in token order: as many at once as a step has tokens, each
    replaced by another when it ends, files one after the other so that the subject shifts."""
    sequences = _sequences(folder, seed)
    running = [next(sequences) for _ in range(tokens_per_step)]
    random = np.random.default_rng([seed, 3])
    positions = [int(random.integers(len(ids_TLK))) for ids_TLK in running]
    while True:
        counts_LE = np.zeros((shape.layers, shape.experts), dtype=np.int64)
        ids_TLK = np.stack([ids[at] for ids, at in zip(running, positions, strict=True)])
        for layer in range(shape.layers):
            counts_LE[layer] = np.bincount(ids_TLK[:, layer].ravel(), minlength=shape.experts)
        yield counts_LE
        for index, ids in enumerate(running):
            positions[index] += 1
            if positions[index] == len(ids):
                running[index], positions[index] = next(sequences), 0


def _sequences(folder: Path, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Recorded sequences by category, without end; no two seeds begin with the same ones."""
    random = np.random.default_rng([seed, 4])
    by_category: dict[str, list[NDArray[np.uint8]]] = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                if key.endswith(_FINISHED):
                    by_category.setdefault(key.split("|")[1], []).append(archive[key])
    if not by_category:
        raise SystemExit(f"{folder} holds no recordings (*.npz).")
    names = sorted(by_category)
    while True:
        for name in random.permutation(names):
            own = by_category[name]
            for index in random.permutation(len(own)):
                yield own[index]
