"""Control: which requests can be followed, and what is said of the others."""

import pytest

from ep_rebalance.balancer.control import ACTIONS, Control
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.placement import Placement
from ep_rebalance.telemetry.journal import initial_status
from ep_rebalance.telemetry.metrics import Status

PLACEMENT = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2)


def status_while(activity: str) -> Status:
    status = initial_status(config=RebalanceConfig(), model="m", placement=PLACEMENT, top_k=2)
    status.activity = activity
    return status


WATCHING = status_while("watching")


def test_pause_and_resume_change_what_they_name():
    control = Control(RebalanceConfig())
    assert control.ask("pause", WATCHING) == ""
    assert control.paused
    assert control.ask("resume", WATCHING) == ""
    assert not control.paused


def test_what_makes_no_sense_is_refused_and_changes_nothing():
    control = Control(RebalanceConfig())
    assert "not paused" in control.ask("resume", WATCHING)
    for activity in ("planning", "scheduling", "migrating"):
        assert "already" in control.ask("rebalance", status_while(activity))
    control.ask("pause", WATCHING)
    assert "paused already" in control.ask("pause", WATCHING)
    assert "resume it first" in control.ask("rebalance", WATCHING)
    assert (control.paused, control.plan_asked) == (True, False)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "observe"},
        {"mode": "static", "state": {"path": "x"}},
        {"planner": {"policy": "none"}},
    ],
)
def test_a_server_that_never_plans_refuses_all(action, settings):
    control = Control(load_config(settings))
    assert "never" in control.ask(action, WATCHING)
    assert (control.paused, control.plan_asked) == (False, False)
