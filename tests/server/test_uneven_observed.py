"""Mode observe with experts that do not divide by the ranks: one of two has four of them, the other three."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from engines import V032
from metrics_page import samples
from moe_checkpoints import DOMAINS, write_checkpoint
from moe_families import BY_NAME, LAYERS, TOP_K
from numpy.typing import NDArray
from serving import DATA_PARALLEL, PLUGIN, Server, serving

from ep_rebalance.load.trace import SUFFIX, RecordedPlacement, TraceReader, read_records
from ep_rebalance.offline.summary import summarise

pytestmark = V032.marks

EXPERTS = 7
TOKENS = 12
SNAPSHOT_STEPS = 2
LENGTHS = (5, 21, 9, 14, 30, 7)
SETTINGS = {
    "mode": "observe",
    "window": {"snapshot_steps": SNAPSHOT_STEPS},
    "metrics": {"poll_seconds": 0.5, "layer_rank_tokens": True, "expert_tokens": True},
}


@dataclass(frozen=True)
class Asked:
    """A request. prompt, answer: token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Observed:
    """A server that has answered, the last request alone and after all others.

    load: of `GET /ep_rebalance/load`, once nothing came any more.
    """

    server: Server
    model: Path
    traces: Path
    asked: list[Asked]
    load: dict[str, Any]

    def tokens_ALE(self) -> NDArray[np.int64]:
        """What the server has counted."""
        layers = self.load["layers"]
        return np.array(
            [[layer["tokens"][phase] for layer in layers] for phase in ("prefill", "decode")]
        )


@pytest.fixture(scope="module")
def observed(logs: Path) -> Iterator[Observed]:
    family = BY_NAME["mixtral"]
    settings = {**family.settings, "num_local_experts": EXPERTS}
    uneven = replace(family, settings=settings, experts=EXPERTS)
    model = write_checkpoint(uneven, logs / "uneven")
    traces = logs / "uneven_traces"
    traces.mkdir()
    given = json.dumps({**SETTINGS, "trace": {"path": str(traces)}})
    arguments = (*DATA_PARALLEL, *PLUGIN, "--no-enable-prefix-caching", "--max-model-len", "128")
    log = logs / "uneven_observed.log"
    with serving(
        log, *arguments, "--ep-rebalance-config", given, tokens=TOKENS, model=model
    ) as server:
        asked = [ask(server, prompt) for prompt in prompts()]
        yield Observed(server, model, traces, asked, settled_load(server))


def prompts() -> list[list[int]]:
    """Token ids, of either domain."""
    rng = np.random.default_rng(0)
    return [rng.choice(domain, size=length).tolist() for length in LENGTHS for domain in DOMAINS]


def settled_load(server: Server) -> dict[str, Any]:
    """Data-parallel ranks go on with steps without tokens for a while."""
    seen = [server.load()]
    while len(seen) < 2 or seen[-1] != seen[-2]:
        time.sleep(1.0)
        seen.append(server.load())
    return seen[-1]


def ask(server: Server, prompt: list[int]) -> Asked:
    body = server.body("") | {"prompt": prompt}
    answered = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    answered.raise_for_status()
    return Asked(prompt, answered.json()["choices"][0]["token_ids"])


@dataclass(frozen=True)
class Routed:
    """What transformers' own class makes of a request.

    ids_LTK: logical experts of each token that passes the layers: all but the answer's last one.
    likeliest: the tokens that it would answer.
    """

    ids_LTK: NDArray[np.int64]
    likeliest: list[int]


def routed(model: Path, asked: Sequence[Asked]) -> list[Routed]:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for one in asked:
        ids = torch.tensor([one.prompt + one.answer[:-1]])
        with torch.no_grad():
            told = reference(ids, output_router_logits=True)
        chosen = [logits_TE.topk(TOP_K).indices.numpy() for logits_TE in told.router_logits]
        likeliest = told.logits[0].argmax(-1).tolist()[len(one.prompt) - 1 :]
        found.append(Routed(np.stack(chosen), likeliest))
    return found


def counts_LE(ids_LTK: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.array([np.bincount(ids.ravel(), minlength=EXPERTS) for ids in ids_LTK])


def test_experts_that_do_not_divide_are_counted_exactly_and_answer_rightly(
    observed: Observed,
) -> None:
    """What the last steps counted waits for a snapshot: some of the last answer's tokens are missing."""
    expected = routed(observed.model, observed.asked)
    assert [one.answer for one in observed.asked] == [one.likeliest for one in expected]
    prefill_LE, decode_LE = np.zeros((2, LAYERS, EXPERTS), dtype=np.int64)
    for one, route in zip(observed.asked, expected, strict=True):
        prefill_LE += counts_LE(route.ids_LTK[:, : len(one.prompt)])
        decode_LE += counts_LE(route.ids_LTK[:, len(one.prompt) :])
    counted_ALE = observed.tokens_ALE()
    assert (counted_ALE[0] == prefill_LE).all()
    last_LTK = expected[-1].ids_LTK
    waiting = range(3 * SNAPSHOT_STEPS)
    assert any(
        (counted_ALE[1] == decode_LE - counts_LE(last_LTK[:, last_LTK.shape[1] - missing :])).all()
        for missing in waiting
    ), (counted_ALE[1] - decode_LE).tolist()


def test_each_rank_is_shown_with_the_tokens_of_the_experts_that_it_holds(
    observed: Observed,
) -> None:
    tokens_LE = observed.tokens_ALE().sum(axis=0)
    expected_LR = np.stack([tokens_LE[:, :4].sum(1), tokens_LE[:, 4:].sum(1)], axis=1)
    status, seen = observed.server.status(), samples(observed.server)
    assert (status["ep_size"], status["slots"], status["experts"]) == (2, EXPERTS, EXPERTS)
    assert status["layer_rank_tokens"] == expected_LR.tolist()
    assert status["rank_tokens"] == expected_LR.sum(axis=0).tolist()
    assert status["busiest_rank_tokens"]["served"] >= expected_LR.max(axis=1).sum()
    assert status["imbalance"] == status["contiguous_imbalance"]
    shown = [seen["ep_rebalance_rank_tokens_total", str(rank)] for rank in range(2)]
    assert shown == status["rank_tokens"]
    overview = observed.server._get("/ep_rebalance/overview")
    for rank_load in overview["rank_load"]:
        assert sum(rank_load) == pytest.approx(2, abs=0.002)
    for hot in overview["hottest"]:
        assert hot["ranks"] == [int(hot["expert"] >= 4)]


def test_a_trace_of_them_is_summed_up_rank_by_rank(observed: Observed) -> None:
    (path,) = observed.traces.glob(f"*{SUFFIX}")
    reader = TraceReader(path)
    records = list(read_records([reader]))
    assert (reader.head.ep_size, reader.head.slots) == (2, EXPERTS)
    counted_LE = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    weighted_L = np.zeros(LAYERS)
    for record in records:
        if isinstance(record, RecordedPlacement):
            assert record.placement.slots_LP.tolist() == [list(range(EXPERTS))] * LAYERS
            continue
        load_LE = record.counts_ALE.sum(axis=0, dtype=np.int64)
        counted_LE += load_LE
        weighted_L += 2 * np.maximum(load_LE[:, :4].sum(1), load_LE[:, 4:].sum(1))
    assert (counted_LE == observed.tokens_ALE().sum(axis=0)).all()
    summary = summarise(reader.head, records)
    assert summary.imbalance == pytest.approx((weighted_L / counted_LE.sum(axis=1)).mean())
