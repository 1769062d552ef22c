"""What a server saves."""

from pathlib import Path

import numpy as np

from ep_rebalance.config import ConfigurationError
from ep_rebalance.load.state import (
    FORMAT,
    FORMAT_VERSION,
    Header,
    ModelIdentity,
    SavedState,
    read_state,
)
from ep_rebalance.placement import Placement

IDENTITY = ModelIdentity(
    model="org/model", config_hash="abc", experts=4, ep_size=2, redundant_experts=2
)


PLACEMENT = Placement.contiguous(num_layers=3, num_experts=4, num_ranks=2, num_redundant=2)


HEADER = Header(
    format=FORMAT,
    version=FORMAT_VERSION,
    identity=IDENTITY,
    generation=7,
    saved_at=1234.5,
    plugin_version="0.1.0",
)


STATE = SavedState(
    header=HEADER,
    placement=PLACEMENT,
    quotas_LP=PLACEMENT.even_quotas_LP(),
    load_LE=np.arange(12.0).reshape(3, 4),
)


def saved_generation(path: Path) -> int:
    """Of a state file; -1 if there is none, or none that can be read."""
    try:
        return read_state(path).header.generation
    except ConfigurationError:
        return -1
