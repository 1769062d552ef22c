"""A process of its own for test_models.py, in which a small model is served: first by one rank without the
plugin, then by two tensor-parallel ranks whose experts move.

    python offline_model.py MODEL DTYPE TRACES

Prints one JSON line of each, and SECOND between them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from moe_checkpoints import DOMAINS

CORES = "VLLM_CPU_OMP_THREADS_BIND"
SECOND = "---- two ranks"
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

    def __init__(self, model: str, dtype: str, **more: Any) -> None:
        from vllm import LLM, SamplingParams

        self._greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        self._llm = LLM(
            model,
            dtype=dtype,
            max_model_len=128,
            max_num_batched_tokens=256,
            enable_prefix_caching=False,
            enforce_eager=True,
            **more,
        )

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(asked, self._greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def all_answers(self) -> list[list[list[int]]]:
        """By domain."""
        return [self.answers(questions(domain)) for domain in range(len(DOMAINS))]

    def single_answers(self) -> list[list[list[int]]]:
        """The same, with no prompt in a batch with another."""
        domains = range(len(DOMAINS))
        return [[self.answers([one])[0] for one in questions(domain)] for domain in domains]

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


def alone(model: str, dtype: str) -> dict[str, Any]:
    """What one rank without the plugin answers, to prompts together and one by one."""
    os.environ[CORES] = os.environ[CORES].partition("|")[0]
    engine = Engine(model, dtype)
    return {"before": engine.all_answers(), "singly": engine.single_answers()}


def together(model: str, dtype: str, traces: str) -> dict[str, Any]:
    settings = {"ep_rebalance": {**SETTINGS, "trace": {"path": traces}}}
    engine = Engine(
        model,
        dtype,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        additional_config=settings,
    )
    return run(engine)


def forked(work: Callable[[], dict[str, Any]]) -> None:
    """Do it in a process that has imported everything already, and print what comes of it."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            sys.stdout.write(f"{json.dumps(work())}\n")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.waitpid(child, 0)


def main(model: str, dtype: str, traces: str) -> None:
    import vllm.v1.worker.cpu_worker  # noqa: F401  (nothing that makes threads before the fork)

    forked(lambda: alone(model, dtype))
    sys.stdout.write(f"{SECOND}\n")
    sys.stdout.flush()
    forked(lambda: together(model, dtype, traces))


if __name__ == "__main__":
    main(*sys.argv[1:])
