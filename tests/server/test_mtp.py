"""A model of DeepSeek-V3's kind drafts with its own MTP layer, whose experts are counted and moved apart.

They are compared with its own answers alone: with such a layer, vLLM 0.32 on one CPU answers otherwise than
without it, also without the plugin (from the second token on).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cpu_server import START_SECONDS
from engines import V032
from moe_checkpoints import write_checkpoint
from moe_families import EXPERTS, FAMILIES, TOP_K
from mtp_checkpoints import add_mtp_layer
from offline_model import FLUSH, LENGTHS
from offline_process import output_of

pytestmark = V032.marks

SCRIPT = Path(__file__).with_name("offline_mtp.py")
(FAMILY,) = (family for family in FAMILIES if family.name == "deepseek_v3")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script told, as `ours`, and the number of the MTP `layer`."""
    folder = write_checkpoint(FAMILY, tmp_path_factory.mktemp("mtp") / FAMILY.name)
    layer = add_mtp_layer(folder)
    output = output_of(V032, SCRIPT, str(folder), seconds=2 * START_SECONDS)
    told = [json.loads(line) for line in output.splitlines() if line.startswith('{"before"')]
    assert told, output[-6000:]
    return {"ours": told[0], "layer": layer}


def test_answers_and_accepted_drafts_stay_when_experts_of_both_have_moved(
    served: dict[str, Any],
) -> None:
    ours = served["ours"]
    assert sum(ours["status"]["migrated_experts"].values()) > 0
    assert sum(ours["status"]["drafter"]["migrated_experts"].values()) > 0
    assert ours["after"] == ours["before"]
    assert ours["before"]["drafts"]["accepted_tokens"] > 0


def test_rows_of_the_mtp_layer_are_counted_once_for_each_expert(served: dict[str, Any]) -> None:
    load = served["ours"]["unmoved"]
    (drafted,), counted = load["drafter"]["layers"], load["layers"]
    assert drafted["layer"] == served["layer"]
    assert len(drafted["tokens"]["prefill"]) == EXPERTS
    target, drafter = (
        {phase: sum(layer["tokens"][phase]) / TOP_K for phase in ("prefill", "decode")}
        for layer in (counted[0], drafted)
    )
    assert target["prefill"] == 2 * sum(LENGTHS) + len(FLUSH[0])
    # The first pass takes the target's rows, the second one of each request: of a prompt, and of each batch
    # of a token and two drafts.
    assert drafter["prefill"] == target["prefill"]
    requests = 2 * len(LENGTHS) + 1
    assert target["decode"] % 3 == 0
    assert drafter["decode"] == target["decode"] + requests + target["decode"] / 3


def test_the_mtp_layer_is_in_no_number_of_the_target(served: dict[str, Any]) -> None:
    status = served["ours"]["status"]
    assert served["layer"] not in status["moe_layers"]
    assert status["drafter"]["moe_layers"] == [served["layer"]]
    assert status["layers"] == len(FAMILY.moe_layers)
    assert (
        status["drafter"]["overall_imbalance"]["served"]
        < (status["drafter"]["overall_imbalance"]["contiguous"])
    )
