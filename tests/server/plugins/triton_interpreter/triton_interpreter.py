"""A vLLM plugin for its V2 model runner on CPU, whose kernels Triton's interpreter runs.

This package's own kernels run as their torch references, as they do without the interpreter: in it
they are tests/kernels' business, and a prompt would take seconds.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from ep_rebalance.kernels import language

    language.INTERPRETED = False
