"""Experts of which a part is not what it is taken for: the part is named at start, or moves with them.

tests/server/plugins/sabotaged_experts says what is done to them. Without it the same checkpoint is served,
and its experts move (test_quantised.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import REFERENCE_EXPERTS, SABOTAGED_EXPERTS, V032
from quantised_checkpoints import write_checkpoint
from quantised_servers import QUANTISED, TRIED, assert_moves_change_no_answer, serving_quantised
from serving import refused_start

pytestmark = V032.marks

CHECKPOINT = "fp8_tensor"
"""In which both scales of an expert have the same size."""
EXPERT_BYTES = 3 * 128 * 128 + 2 * 4
LAYER = "model.layers.0.mlp.experts"
TRIAL = "(w13_weight, w13_weight_scale, w2_weight, w2_weight_scale) found different outputs"
REFUSED = {
    "unseen_copy": [
        f"layer '{LAYER}' cannot move: on EP rank 0 a trial with its own experts {TRIAL}",
        "; the kernel does not seem to read w13_weight_scale;",
    ],
    "factor_of_the_rank": [f"layer '{LAYER}' differs between EP ranks 0 and 1 in largest_scale:"],
    "swapped_names": [
        f"layer '{LAYER}' cannot move: on EP rank 0 a trial with one of EP rank 1 {TRIAL}",
        "; nothing differs with w13_weight_scale and w2_weight_scale exchanged;",
    ],
}
AGAIN = pytest.mark.repeats


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param("unseen_copy", marks=AGAIN),
        pytest.param("factor_of_the_rank", marks=AGAIN),
        "swapped_names",
    ],
)
def test_a_part_that_could_not_move_rightly_is_named_at_start(
    tmp_path: Path, sabotage: str
) -> None:
    model = write_checkpoint(CHECKPOINT, tmp_path / CHECKPOINT)
    environment = V032.environment([*REFERENCE_EXPERTS, SABOTAGED_EXPERTS])
    code, output = refused_start(
        tmp_path, *QUANTISED, *TRIED, model=model, **environment, SABOTAGE=sabotage
    )
    assert code != 0
    for told in REFUSED[sabotage]:
        assert told in output
    assert "Remedy:" in output


@pytest.mark.repeats
def test_a_copy_that_the_quantisation_config_has_for_itself_moves_too(
    logs: Path, settings_file: str, operators_key: str
) -> None:
    log = logs / "sabotage-private_copy.log"
    with serving_quantised(
        CHECKPOINT,
        log,
        settings_file,
        operators_key,
        plugins=[SABOTAGED_EXPERTS],
        SABOTAGE="private_copy",
    ) as server:
        assert f" {EXPERT_BYTES + 4:,} bytes per expert; tried: {{'exact': 4}}" in server.log_text()
        assert_moves_change_no_answer(server)
