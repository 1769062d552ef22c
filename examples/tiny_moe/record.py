"""Expert ids of the prompts in this folder, token by token, as `ep-rebalance convert` reads them.

    python record.py ids.npz
    ep-rebalance convert ids.npz routing.eptrace --model tiny_moe --tokens-per-snapshot 2048

routing.eptrace was made so. The prompts come in a shuffled order whose mixture changes from domain to domain,
as traffic of different time zones does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from byte_tokenizer import PAD_ID
from measure import FOLDER, load_model, windows
from numpy.typing import NDArray
from prompts import read_prompts
from transformers import Qwen3MoeForCausalLM

ROUNDS = 3
"""How often each prompt is sent."""
TURNS = 2
"""How often each domain comes to the front."""


@torch.inference_mode()
def expert_ids(model: Qwen3MoeForCausalLM, text: str) -> NDArray[np.uint8]:
    """uint8 (tokens, layers, top-k): the experts that the router chooses."""
    (batch,) = windows([text])
    is_text = (batch != PAD_ID).flatten()
    output = model(input_ids=batch, use_cache=False, output_router_logits=True)
    layers = [
        logits[is_text].topk(model.config.num_experts_per_tok, dim=-1).indices
        for logits in output.router_logits
    ]
    return torch.stack(layers, dim=1).numpy().astype(np.uint8)


def order(domains: list[str], prompts: int, random: np.random.Generator) -> list[tuple[str, int]]:
    """(domain, number of the prompt), each ROUNDS times, in an order in which domains come and go."""
    moments = []
    for place, domain in enumerate(domains):
        for prompt in np.tile(np.arange(prompts), ROUNDS):
            turn = random.integers(TURNS)
            at = turn * len(domains) + place + random.normal(scale=0.8)
            moments.append((at % (TURNS * len(domains)), domain, int(prompt)))
    return [(domain, prompt) for _, domain, prompt in sorted(moments)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="an .npz file to write")
    arguments = parser.parse_args()
    model, texts = load_model(FOLDER), read_prompts(FOLDER / "prompts")
    ids = {
        (domain, number): expert_ids(model, text)
        for domain, documents in texts.items()
        for number, text in enumerate(documents)
    }
    prompts = min(map(len, texts.values()))
    sequence = order(list(texts), prompts, np.random.default_rng(0))
    np.savez_compressed(arguments.output, ids=np.concatenate([ids[key] for key in sequence]))


if __name__ == "__main__":
    main()
