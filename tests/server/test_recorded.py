"""`ep-rebalance record` asks a vLLM without the plugin; the counts are what transformers' routers choose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from command_line import run
from engines import V033_V2
from numpy.typing import NDArray
from serving import TINY_MOE, prompts, serving
from traces import records_of

from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.load.window import PHASES

pytestmark = V033_V2.marks

FLAGS = (
    "--enforce-eager",
    "--enable-return-routed-experts",
    "--enable-prompt-tokens-details",
)
TOKENS = 3
"""Of each answer."""


def chosen_LE(texts: list[str]) -> NDArray[np.int64]:
    """[L, E], tokens. The tokens of a prompt are its bytes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)
    counts = np.zeros((model.config.num_hidden_layers, model.config.num_experts), dtype=np.int64)
    for text in texts:
        with torch.no_grad():
            told = model(torch.tensor([list(text.encode())]), output_router_logits=True)
        for count_E, logits_TE in zip(counts, told.router_logits, strict=True):
            chosen_TK = logits_TE.topk(model.config.num_experts_per_tok).indices
            np.add.at(count_E, chosen_TK.numpy(), 1)
    return counts


def recorded_ALE(url: str, asked: Path, trace: Path) -> NDArray[np.int64]:
    """[phases, L, E], tokens. Of all snapshots of a new recording."""
    done = run(
        "record", url, "--prompts", str(asked), "-o", str(trace), "--max-tokens", str(TOKENS)
    )
    assert done.exit_code == 0, done.stderr
    snapshots = [one for one in records_of(trace) if isinstance(one, RecordedSnapshot)]
    return np.sum([one.counts_ALE for one in snapshots], axis=0, dtype=np.int64)


def test_what_is_recorded_is_what_the_routers_choose(logs: Path, tmp_path: Path) -> None:
    texts = prompts(per_domain=2, skip=60)
    asked = tmp_path / "prompts.jsonl"
    bodies = [{"prompt": text, "temperature": 0, "ignore_eos": True} for text in texts]
    asked.write_text("\n".join(map(json.dumps, bodies)))
    with serving(logs / "recorded.log", *FLAGS, engine=V033_V2, ranks=1) as server:
        first_ALE = recorded_ALE(server.url, asked, tmp_path / "first.eptrace")
        again_ALE = recorded_ALE(server.url, asked, tmp_path / "again.eptrace")
    prefill, decode = (PHASES.index(phase) for phase in ("prefill", "decode"))
    np.testing.assert_array_equal(first_ALE[prefill], chosen_LE(texts))
    # The last token of an answer is not computed.
    assert first_ALE[decode].sum(axis=1).tolist() == [len(texts) * (TOKENS - 1) * 2] * 4
    # The prefix cache has full blocks of every prompt now.
    assert (again_ALE[prefill] <= first_ALE[prefill]).all()
    assert again_ALE[prefill].sum() < first_ALE[prefill].sum()
    assert np.array_equal(again_ALE[decode], first_ALE[decode])
