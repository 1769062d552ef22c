"""Expert-parallel load balancer for vLLM.

`Placement`, `plan`, `recorded_tokens` and `replay` are for notebooks; a server needs none of them, so that
they are loaded when they are asked for.
"""

from typing import TYPE_CHECKING, Any

from ep_rebalance.version import __version__

if TYPE_CHECKING:
    from ep_rebalance.offline.notebook import Placement, plan, recorded_tokens, replay

__all__ = ["Placement", "__version__", "plan", "recorded_tokens", "replay"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ep_rebalance' has no attribute {name!r}")
    from ep_rebalance.offline import notebook

    return getattr(notebook, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
