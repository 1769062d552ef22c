"""A process of its own for test_attach.py: one of two data-parallel ranks, started by itself as on a node
of its own.

    python offline_rank.py MODEL SETTINGS.json

SETTINGS holds `additional_config`. Prints one JSON line: the plugin's status after a prompt.
"""

from __future__ import annotations

import json
import sys


def main(model: str, settings: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        enable_expert_parallel=True,
        additional_config=json.loads(settings),
    )
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.generate(["import os\n"], greedy, use_tqdm=False)
    (status,) = llm.collective_rpc("ep_rebalance_status")
    sys.stdout.write(f"{status.decode()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
