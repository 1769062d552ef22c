"""Control: which requests can be followed, and what is said of the others."""

import pytest

from ep_rebalance.balancer.control import ACTIONS, Control
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config


def test_pause_and_resume_change_what_they_name():
    control = Control(RebalanceConfig())
    assert control.ask("pause", busy=False) == ""
    assert control.paused
    assert control.ask("resume", busy=False) == ""
    assert not control.paused


def test_what_makes_no_sense_is_refused_and_changes_nothing():
    control = Control(RebalanceConfig())
    assert "already" in control.ask("rebalance", busy=True)
    control.ask("pause", busy=False)
    assert "resume it first" in control.ask("rebalance", busy=False)
    assert (control.paused, control.plan_asked) == (True, False)


def test_of_several_requests_the_last_one_holds_however_often_it_was_sent():
    control = Control(RebalanceConfig())
    for action in ("resume", "pause", "pause", "resume", "resume", "pause", "pause"):
        assert control.ask(action, busy=False) == ""
        assert control.paused == (action == "pause")


@pytest.mark.parametrize("action", [action for action in ACTIONS if action != "audit"])
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
    assert "never" in control.ask(action, busy=False)
    assert (control.paused, control.plan_asked) == (False, False)


@pytest.mark.parametrize("mode", ["rebalance", "static"])
def test_slots_can_be_checked_in_any_mode_that_has_their_checksums(mode):
    settings = {"mode": mode, "state": {"path": "x"}, "planner": {"policy": "none"}}
    without = Control(load_config(settings))
    assert "audit.slots_per_minute" in without.ask("audit", busy=False)
    control = Control(load_config(settings, {"audit": {"slots_per_minute": 1}}))
    assert control.ask("audit", busy=True) == ""
    assert (control.audit_asked, without.audit_asked) == (True, False)
    observing = Control(load_config({"mode": "observe", "audit": {"slots_per_minute": 1}}))
    assert "observe" in observing.ask("audit", busy=False)
