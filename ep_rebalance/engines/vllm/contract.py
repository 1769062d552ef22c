"""What we rely on in vLLM, checked at start.

A seam states the functions that it wraps and the parameters that it passes or reads. If one is
missing, the server does not start: a wrong guess about an engine's insides would show up as wrong
answers.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

from ep_rebalance.config import ConfigurationError

SUPPORTED_VERSIONS = ("0.32", "0.33")


@dataclass(frozen=True, slots=True)
class Contract:
    """A function or attribute of vLLM that must exist.

    target: `module:Qualified.name`. parameters: names that its signature must have.
    """

    target: str
    parameters: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ConfigurationError that names what is missing."""
        module_name, _, path = self.target.partition(":")
        try:
            found: object = importlib.import_module(module_name)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            raise _unsupported(f"{self.target} is missing ({error})") from None
        if self.parameters and not callable(found):
            raise _unsupported(f"{self.target} is no function")
        if callable(found):
            missing = [p for p in self.parameters if p not in inspect.signature(found).parameters]
            if missing:
                raise _unsupported(f"{self.target} has no parameter {', '.join(missing)}")


def check_version(version: str) -> None:
    """Raises ConfigurationError for a vLLM that was never tried."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED_VERSIONS:
        raise ConfigurationError(
            f"vLLM {version} is not supported; known are {' and '.join(SUPPORTED_VERSIONS)}.",
            "install one of these, or a newer ep-rebalance.",
        )


def _unsupported(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"unsupported vLLM contract: {what}.",
        f"use vLLM {' or '.join(SUPPORTED_VERSIONS)} as released, or a newer ep-rebalance.",
    )
