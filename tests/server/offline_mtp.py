"""A process of its own for test_mtp.py, in which two tensor-parallel ranks serve a small model that drafts
with its own MTP layer, while experts of both move.

    python offline_mtp.py MODEL

Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from offline_model import SETTINGS, Engine

MOST_ROUNDS, DRAFTED = 60, 2
SPECULATIVE = {"method": "mtp", "num_speculative_tokens": DRAFTED}


def accepted(engine: Engine) -> dict[str, int]:
    """Drafts since the start, by vLLM's own metrics."""
    prefix = "vllm:spec_decode_num_"
    told = {metric.name: metric for metric in engine._llm.get_metrics()}
    return {
        name: told[prefix + name].value for name in ("drafts", "draft_tokens", "accepted_tokens")
    }


def singly(engine: Engine) -> dict[str, Any]:
    """Answers with no prompt in a batch with another, and what was drafted and accepted for them."""
    before = accepted(engine)
    answers = engine.single_answers()
    after = accepted(engine)
    return {"answers": answers, "drafts": {name: after[name] - before[name] for name in after}}


def together(model: str) -> dict[str, Any]:
    engine = Engine(
        model,
        "float32",
        speculative_config=SPECULATIVE,
        disable_log_stats=False,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        additional_config={"ep_rebalance": {**SETTINGS, "drafter": "balanced"}},
    )
    engine.ask("pause")
    told: dict[str, Any] = {"before": singly(engine), "unmoved": engine.counted()}
    told["unmoved status"] = engine.told("status")
    engine.ask("resume")
    for _ in range(MOST_ROUNDS):
        engine.all_answers()
        status = engine.told("status")
        if status["generation"] and status["drafter"]["generation"]:
            break
    engine.ask("pause")
    while any(one["migrating"] for one in (status, status["drafter"])):
        engine.answers([[1] * 4])
        status = engine.told("status")
    return told | {"after": singly(engine), "status": status, "load": engine.told("load")}


def main(model: str) -> None:
    sys.stdout.write(f"{json.dumps(together(model))}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
