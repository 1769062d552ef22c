"""Our log lines among vLLM's, in its format and at its level."""

from __future__ import annotations

import logging


def share_vllm_log() -> None:
    """Give the loggers of this package the handlers that vLLM configured for its own. Idempotent."""
    ours, theirs = logging.getLogger("ep_rebalance"), logging.getLogger("vllm")
    if theirs.handlers and not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
