"""Contracts: what we rely on in vLLM, checked at start.

A seam states the functions that it wraps with the parameters that it passes or reads, and what vLLM
asks of each object of ours that it holds instead of its own. If something is missing, the server does
not start: a wrong guess about an engine's insides would show up as wrong answers.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from ep_rebalance.config import ConfigurationError

SUPPORTED_VERSIONS = ("0.32", "0.33")
_ON_CPU_ONLY = "vllm.v1.worker.cpu_worker:"


@dataclass(frozen=True, slots=True)
class Contract:
    """A function or attribute of vLLM that must exist.

    target: `module:Qualified.name`.
    parameters: names that its signature must have.
    """

    target: str
    parameters: tuple[str, ...] = ()

    @property
    def applies(self) -> bool:
        """Whether it is relied on in this process."""
        return may_import(self.target)

    def check(self) -> None:
        """Raises ConfigurationError that names what is missing."""
        found = resolve(self.target)
        if self.parameters and not callable(found):
            raise _unsupported(f"{self.target} is not a function")
        if callable(found):
            missing = [p for p in self.parameters if p not in inspect.signature(found).parameters]
            if missing:
                raise _unsupported(f"{self.target} has no parameter {', '.join(missing)}")


@dataclass(frozen=True, slots=True)
class StandInContract:
    """An object of ours that vLLM holds instead of its own: it must have all that vLLM asks of it.

    holder: `module:Class`. The class of vLLM whose methods use the object.
    attribute: the attribute in which the holder keeps it.
    stand_in: the object, or its class.
    never: names that only methods ask for that are never called.
    """

    holder: str
    attribute: str
    stand_in: object
    never: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return f"{self.holder}.{self.attribute}"

    @property
    def applies(self) -> bool:
        """Whether it is relied on in this process."""
        return may_import(self.holder)

    def asked(self) -> set[str]:
        """Names of the attributes that the holder's methods read, call or set on `self.<attribute>`."""
        # From the source: what a method asks for would otherwise show only when it runs.
        tree = ast.parse(textwrap.dedent(inspect.getsource(resolve(self.holder))))
        found = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == self.attribute
            and isinstance(node.value.value, ast.Name)
            and node.value.value.id == "self"
        }
        return found - set(self.never)

    def check(self) -> None:
        """Raises ConfigurationError that names what the stand-in lacks."""
        missing = sorted(name for name in self.asked() if not hasattr(self.stand_in, name))
        if missing:
            raise _unsupported(f"{self.target} is asked for {', '.join(missing)}, which ours lacks")


def may_import(target: str) -> bool:
    """Whether this process may import what `module:Qualified.name` names.

    As soon as vLLM's CPU worker is imported, it replaces streams, events and pinned memory of
    `torch.cuda` by stand-ins that do nothing, for the whole process (vllm/v1/worker/cpu/shm.py).
    """
    from vllm.platforms import current_platform

    return not target.startswith(_ON_CPU_ONLY) or bool(current_platform.is_cpu())


def resolve(target: str) -> Any:
    """What `module:Qualified.name` names. Raises ConfigurationError if it is missing."""
    module_name, _, path = target.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise _unsupported(f"{target} is missing ({error})") from None
    return found


def check_version(version: str) -> None:
    """Raises ConfigurationError for a minor version of vLLM that is not among SUPPORTED_VERSIONS."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED_VERSIONS:
        raise ConfigurationError(
            f"vLLM {version} is not supported; {' and '.join(SUPPORTED_VERSIONS)} are.",
            "install one of these, or a newer ep-rebalance.",
        )


def _unsupported(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"unsupported vLLM contract: {what}.",
        f"use vLLM {' or '.join(SUPPORTED_VERSIONS)} as released, or a newer ep-rebalance.",
    )
