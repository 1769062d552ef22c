"""Reports of pipeline stages as one: nothing counted twice, no layer lost, nothing claimed of a stage that
has not said it.
"""

import msgspec
import pytest

from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.window import PHASES
from ep_rebalance.pipeline import PipelineStage
from ep_rebalance.placement import Placement
from ep_rebalance.telemetry.journal import initial_status
from ep_rebalance.telemetry.load_report import ExpertLoad, LayerLoad
from ep_rebalance.telemetry.metrics import Commit, Status, decode, encode
from ep_rebalance.telemetry.overview_report import HotExpert, Overview
from ep_rebalance.telemetry.whole_pipeline import _RULES, whole_report, whole_status


def stage_status(pp_rank: int, moe_layers: list[int], **known: object) -> Status:
    placement = Placement.contiguous(num_layers=len(moe_layers), num_experts=4, num_ranks=2)
    status = initial_status(
        config=RebalanceConfig(),
        model="m",
        placement=placement,
        top_k=2,
        moe_layers=moe_layers,
        pipeline_stage=PipelineStage(pp_rank, 2),
    )
    return msgspec.structs.replace(status, **known)


def commit(generation: int, time: float, pp_rank: int) -> Commit:
    return Commit(
        generation=generation,
        time=time,
        seconds=1.0,
        experts=2,
        bytes=10,
        predicted_gain=0.1,
        imbalance_before=1.5,
        pp_rank=pp_rank,
    )


@pytest.fixture
def stages() -> list[Status]:
    """Three layers and one, of which only the second stage has moved experts."""
    return [
        stage_status(
            0,
            [1, 2, 3],
            steps=9,
            imbalance=[1.1, 1.2, 1.3],
            overall_imbalance={"served": 1.2},
            rank_tokens=[10, 20],
            phase_tokens={"prefill": 5, "decode": 3},
            plans={"committed": 0, "no_gain": 4},
            message="no gain",
            generation=0,
            commits=[],
        ),
        stage_status(
            1,
            [4],
            steps=8,
            imbalance=[1.6],
            predicted_imbalance=[1.5],
            overall_imbalance={"served": 1.6, "predicted": 1.5},
            rank_tokens=[1, 2],
            phase_tokens={"prefill": 4, "decode": 3},
            plans={"committed": 2, "no_gain": 1},
            message="committed",
            activity="migrating",
            generation=2,
            commits=[commit(1, 10.0, 1), commit(2, 20.0, 1)],
        ),
    ]


def test_every_field_of_a_status_has_a_rule():
    assert _RULES.keys() == {field.name for field in msgspec.structs.fields(Status)}


def test_layers_follow_one_another(stages):
    whole = whole_status(stages)
    assert (whole.layers, whole.moe_layers) == (4, [1, 2, 3, 4])
    assert whole.imbalance == [1.1, 1.2, 1.3, 1.6]
    assert whole.predicted_imbalance == [None, None, None, 1.5]
    assert whole.contiguous_imbalance == []


def test_tokens_pass_all_stages_and_are_counted_once(stages):
    whole = whole_status(stages)
    assert whole.phase_tokens == {"prefill": 5, "decode": 3}
    assert (whole.steps, whole.rank_tokens) == (9, [11, 22])


def test_what_stages_did_is_added_up(stages):
    stages[0].commits = [commit(1, 15.0, 0)]
    whole = whole_status(stages)
    assert whole.plans == {"committed": 2, "no_gain": 5}
    assert [(c.time, c.pp_rank) for c in whole.commits] == [(10.0, 1), (15.0, 0), (20.0, 1)]
    assert (whole.generation, whole.activity) == (2, "migrating")
    assert whole.message == "stage 0: no gain; stage 1: committed"


def test_ratios_are_means_over_layers(stages):
    overall = whole_status(stages).overall_imbalance
    assert overall == pytest.approx({"served": (3 * 1.2 + 1.6) / 4, "predicted": 1.5})


def test_a_report_of_one_stage_is_left_as_it_is(stages):
    payload = encode(stages[0])
    assert whole_report([payload], Status) is payload


def test_the_drafter_of_the_last_stage_goes_along_and_is_in_no_sum(stages):
    alone = whole_status(stages)
    drafter = stages[1].drafter = stage_status(1, [5], rank_tokens=[7, 7])
    stages[1].uncounted_drafter = "a reason"
    whole = whole_status(stages)
    assert (whole.drafter, whole.uncounted_drafter) == (drafter, "a reason")
    assert (whole.rank_tokens, whole.moe_layers) == (alone.rank_tokens, alone.moe_layers)
    loads = [
        ExpertLoad(model="m", started=1.0, generation=0, ep_size=2, layers=[], drafter=drafts)
        for drafts in (None, ExpertLoad(model="d", started=1.0, generation=0, ep_size=2, layers=[]))
    ]
    whole_load = whole_report([encode(load) for load in loads], ExpertLoad)
    assert msgspec.json.decode(whole_load, type=ExpertLoad).drafter == loads[1].drafter


def test_reports_of_all_stages_become_one(stages):
    whole = decode(whole_report([encode(stage) for stage in stages], Status))
    assert whole == whole_status(stages)


def test_an_overview_has_the_hottest_of_all_stages(stages):
    views = [
        Overview(
            status=status,
            rank_load=[[1.0, 1.0]] * status.layers,
            hottest=[HotExpert(layer=status.moe_layers[0], expert=0, load=load, ranks=[0])],
        )
        for status, load in zip(stages, (2.0, 3.0), strict=True)
    ]
    whole = msgspec.json.decode(whole_report([encode(v) for v in views], Overview), type=Overview)
    assert [hot.layer for hot in whole.hottest] == [4, 1]
    assert len(whole.rank_load) == 4


def test_a_load_has_the_layers_of_all_stages():
    def load(layer: int) -> ExpertLoad:
        tokens = {phase: [layer] * 4 for phase in PHASES}
        row = LayerLoad(layer=layer, tokens=tokens, slots=[0, 1, 2, 3], quotas=[1.0] * 4)
        return ExpertLoad(model="m", started=1.0, generation=layer, ep_size=2, layers=[row])

    payload = whole_report([encode(load(3)), encode(load(7))], ExpertLoad)
    whole = msgspec.json.decode(payload, type=ExpertLoad)
    assert [row.layer for row in whole.layers] == [3, 7]
    assert whole.generation == 7


def test_a_file_of_any_stage_that_cannot_be_written_is_told_with_its_stage():
    fine = {"file_faults": {"state": ""}, "file_failing": {"state": 0}}
    full = {"file_faults": {"state": "full"}, "file_failing": {"state": 1}}
    whole = whole_status(
        [
            stage_status(0, [0], state_saved_timestamp=9.0, **fine),
            stage_status(1, [1], state_saved_timestamp=4.0, **full),
        ]
    )
    assert whole.file_faults == {"state": "stage 1: full"}
    assert (whole.file_failing, whole.state_saved_timestamp) == ({"state": 1}, 4.0)
    both = whole_status([stage_status(stage, [stage], **fine) for stage in (0, 1)])
    assert both.file_faults == {"state": ""}
