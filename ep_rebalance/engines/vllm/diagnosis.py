"""Checks for `ep-rebalance doctor`: does the installed vLLM offer what we rely on?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ep_rebalance.config import ConfigurationError
from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.engines.vllm import seams
from ep_rebalance.engines.vllm.contract import check_version


def checks() -> list[tuple[str, Check]]:
    """(name, check) pairs. Running them imports vLLM, which takes seconds."""
    return [("vLLM", engine), ("seams", contracts)]


def engine() -> Finding:
    """Whether the installed vLLM is a supported version."""
    import vllm
    from vllm.platforms import current_platform

    found = f"{vllm.__version__} for {current_platform.device_type}"
    try:
        check_version(vllm.__version__)
    except ConfigurationError as error:
        return Finding(check="vLLM", verdict="problem", found=error.reason, remedy=error.remedy)
    return Finding(check="vLLM", verdict="ok", found=found)


def contracts() -> Iterator[Finding]:
    """One finding for each contract that does not hold, and one for the sum of them."""
    held = stated = 0
    for seam in seams.every():
        for contract in filter(lambda contract: contract.applies, seam.CONTRACTS):
            stated += 1
            try:
                contract.check()
                held += 1
            except ConfigurationError as error:
                name = f"seam {seam.__name__.rpartition('.')[2]}"
                yield Finding(
                    check=name, verdict="problem", found=error.reason, remedy=error.remedy
                )
    yield Finding(
        check="seams",
        verdict="ok" if held == stated else "problem",
        found=f"{held} of {stated} contracts hold in {len(seams.every())} seams",
        remedy="" if held == stated else "see each seam that is named",
    )


def architecture(names: Sequence[str]) -> Finding:
    """Whether vLLM has a model of its own for one of the names in a checkpoint's config.json."""
    from vllm.model_executor.models.registry import ModelRegistry

    known = [name for name in names if name in ModelRegistry.get_supported_archs()]
    if known:
        return Finding(check="architecture", verdict="ok", found=f"vLLM knows {known[0]}")
    return Finding(
        check="architecture",
        verdict="warning",
        found=f"vLLM has no model for {', '.join(names) or 'an unnamed architecture'}",
        remedy="install the plugin that brings it; models run through Transformers were never tried",
    )
