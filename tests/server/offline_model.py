"""A process of its own for test_models.py: two tensor-parallel ranks serve a small model, once as the engine
does and once with its experts moved.

    python offline_model.py MODEL DTYPE TRACES     with the plugin
    python offline_model.py MODEL DTYPE            without

Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from moe_checkpoints import DOMAINS

TOKENS = 8
MIGRATIONS = 3
ROUNDS = 60
LENGTHS = (5, 12, 21, 9)
SETTINGS: dict[str, Any] = {
    "window": {"snapshot_steps": 2, "snapshots": 8, "min_snapshots": 4, "min_tokens": 16},
    "planner": {"interval_snapshots": 4, "max_moved_fraction": 0.15},
    "decision": {"min_gain": 0.0, "min_gain_over_cost": 0.0},
    "migration": {"max_bytes_per_step": 128 << 10},
    "metrics": {"layer_rank_tokens": True, "replicas": True, "expert_tokens": True},
}
FLUSH = [[1] * 4]
"""What the last steps counted waits for a snapshot: asked before and after a measurement, it leaves the same
behind."""


def questions(domain: int) -> list[list[int]]:
    """Token ids of the prompts of a domain."""
    rng = np.random.default_rng(domain)
    return [rng.choice(DOMAINS[domain], size=length).tolist() for length in LENGTHS]


class Engine:
    """The engine, and what it is asked."""

    def __init__(self, model: str, dtype: str, additional: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        self._greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        self._llm = LLM(
            model,
            dtype=dtype,
            max_model_len=128,
            max_num_batched_tokens=256,
            tensor_parallel_size=2,
            enable_expert_parallel=True,
            enable_prefix_caching=False,
            enforce_eager=True,
            additional_config=additional,
        )

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(asked, self._greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def all_answers(self) -> list[list[list[int]]]:
        """By domain."""
        return [self.answers(questions(domain)) for domain in range(len(DOMAINS))]

    def told(self, what: str) -> dict[str, Any]:
        """The plugin's status, load or overview."""
        told: dict[str, Any] = json.loads(self._llm.collective_rpc(f"ep_rebalance_{what}")[0])
        return told

    def ask(self, action: str) -> None:
        refusals = self._llm.collective_rpc("ep_rebalance_ask", args=(action,))
        assert refusals == ["", None], refusals

    def counted(self) -> dict[str, Any]:
        """The load, all of it but the same steps each time."""
        self.answers(FLUSH)
        return self.told("load")


def migrate(engine: Engine) -> list[list[list[list[int]]]]:
    """Let experts move, with each domain's traffic in turn. Returns all answers of each round."""
    during = []
    for _ in range(ROUNDS):
        during.append(engine.all_answers())
        if engine.told("status")["generation"] >= MIGRATIONS:
            break
    return during


def run(engine: Engine) -> dict[str, Any]:
    engine.ask("pause")
    first = engine.counted()
    before = engine.all_answers()
    counted = engine.counted()
    unmoved = engine.told("status")
    engine.ask("resume")
    during = migrate(engine)
    engine.ask("pause")
    while engine.told("status")["migrating"]:
        engine.answers(FLUSH)
    return {
        "before": before,
        "loads": [first, counted],
        "unmoved": unmoved,
        "during": during,
        "after": engine.all_answers(),
        "status": engine.told("status"),
        "load": engine.told("load"),
        "overview": engine.told("overview"),
    }


def main(model: str, dtype: str, traces: str = "") -> None:
    if traces:
        settings = {"ep_rebalance": {**SETTINGS, "trace": {"path": traces}}}
        told = run(Engine(model, dtype, settings))
    else:
        told = {"before": Engine(model, dtype, {}).all_answers()}
    sys.stdout.write(f"{json.dumps(told)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
