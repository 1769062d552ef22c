"""Every fault of the list, on a real server under traffic; then its history is read.

`scripts/test faults` runs all and writes docs/reliability.md; FAULTS_SEED chooses other moments.
"""

from __future__ import annotations

import os

import faults_inside
import faults_of_engine_calls
import faults_of_files
import faults_of_processes
import faults_of_requests
import faults_of_resources
import pytest
from checker import violations
from engines import V032
from fault import FAULTS, Fault
from faults_table import record
from scene import Scenes

MODULES = (
    faults_inside,
    faults_of_engine_calls,
    faults_of_requests,
    faults_of_files,
    faults_of_processes,
    faults_of_resources,
)
"""Imported for what they put on the list."""
SEED = int(os.environ.get("FAULTS_SEED", "1"))
BY_LAYOUT = sorted(FAULTS, key=lambda fault: fault.layout.name)

pytestmark = [*V032.marks, pytest.mark.faults]


@pytest.mark.parametrize("fault", BY_LAYOUT, ids=lambda fault: f"{fault.layout.name}: {fault.name}")
def test_what_is_promised_holds(fault: Fault, scenes: Scenes) -> None:
    scene = scenes.of(fault.layout)
    began = len(list(scene.history))
    try:
        seen = fault.inject(scene, SEED)
    except BaseException:
        scene.discard()
        raise
    told = list(scene.history)[began:]
    assert not violations(told, scene.answers, bound_seconds=fault.bound_seconds)
    record(fault, seen, SEED)
