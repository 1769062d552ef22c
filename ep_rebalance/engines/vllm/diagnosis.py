"""Checks for `ep-rebalance doctor`: does the installed vLLM offer what we rely on?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from ep_rebalance.config import ConfigurationError, QuantisationConfig
from ep_rebalance.diagnosis.finding import Check, Finding, run_checks
from ep_rebalance.engines.vllm import seams
from ep_rebalance.engines.vllm.contract import check_version
from ep_rebalance.engines.vllm.quantised_pairs import MOE_BACKENDS, Pair
from ep_rebalance.engines.vllm.quantised_schemes import (
    ACCELERATORS,
    Accelerator,
    Scheme,
    refuse_schemes,
    schemes_of,
)


def checks() -> list[tuple[str, Check]]:
    """(name, check) pairs. Running them imports vLLM, which takes seconds."""
    return [("vLLM", engine), ("seams", contracts)]


def findings() -> list[dict[str, Any]]:
    """The findings of all checks, JSON-ready."""
    return [asdict(finding) for finding in run_checks(checks())]


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


def architecture_finding(names: Sequence[str]) -> dict[str, Any]:
    """The finding of `architecture`, JSON-ready."""
    return asdict(architecture(names))


def numbers_as_served(folder: str) -> dict[str, Any]:
    """What vLLM reads in a configuration, as `ModelConfig.get_model_arch_config` does, JSON-ready.

    folder: that holds config.json. No code that comes with a checkpoint is run.

    `numbers` has the fields of `ModelNumbers` that vLLM knows, None or 0 for what it does not find, and
    `quantisation` is what it takes for the checkpoint's. Raises what vLLM and transformers raise for a
    configuration that they cannot read.
    """
    # By the module that uses them: imported first, transformers_utils would import itself in a circle.
    from vllm.config import model

    config = model.get_config(folder, trust_remote_code=False)
    convertor = model.MODEL_ARCH_CONFIG_CONVERTORS.get(
        config.model_type, model.ModelArchConfigConvertorBase
    )
    read = convertor(config, model.get_hf_text_config(config)).convert()
    return {
        "numbers": {
            "experts": read.num_experts or 0,
            "top_k": read.num_experts_per_token or None,
            "layers": read.total_num_hidden_layers or None,
            "hidden_size": read.hidden_size or None,
        },
        "quantisation": read.quantization_config,
    }


def quantisation(
    checkpoint: Mapping[str, Any], model: Mapping[str, Any], settings: QuantisationConfig
) -> Iterator[Finding]:
    """Whether the experts of a quantised checkpoint can be moved, and by which kernels.

    checkpoint: its quantisation. model: its configuration. vLLM is not imported.
    """
    schemes = schemes_of(checkpoint, model)
    try:
        refuse_schemes(schemes, settings)
    except ConfigurationError as error:
        yield Finding(
            check="quantisation", verdict="problem", found=error.reason, remedy=error.remedy
        )
        return
    for scheme in schemes:
        yield _scheme(scheme)
        if any(scheme.kernels.values()):
            yield from (_experts_on(accelerator, scheme) for accelerator in ACCELERATORS)


def _scheme(scheme: Scheme) -> Finding:
    known = f"{scheme.format}, loaded by {scheme.method or 'a method that was never read'}"
    if any(scheme.kernels.values()):
        return Finding(
            check="quantisation",
            verdict="ok",
            found=f"{known}: what may move depends on the kernel",
        )
    return Finding(
        check="quantisation",
        verdict="warning",
        found=f"{known}: unlisted with every kernel",
        remedy="the trial at start decides (quantisation.unlisted=self_test)",
    )


def _experts_on(accelerator: Accelerator, scheme: Scheme) -> Finding:
    """Of the kernels that vLLM tries there, in its order."""
    check, pairs = f"experts on {accelerator}", scheme.pairs(accelerator)
    if not pairs:
        return Finding(
            check=check, verdict="skipped", found="vLLM has no kernel there for this format"
        )
    return Finding(
        check=check,
        verdict="ok" if pairs[0].verdict == "listed" else "warning",
        found="; then ".join(_alike(list(group)) for _, group in groupby(pairs, _told)),
        remedy=_remedy(pairs),
    )


def _told(pair: Pair) -> str:
    return "listed" if pair.verdict == "listed" else f"{pair.verdict} ({pair.reason})"


def _alike(pairs: Sequence[Pair]) -> str:
    return f"{', '.join(pair.kernels[0] for pair in pairs)}: {_told(pairs[0])}"


def _remedy(pairs: Sequence[Pair]) -> str:
    """Where what vLLM tries first is not listed."""
    if pairs[0].verdict == "listed":
        return ""
    for pair in pairs:
        if pair.verdict == "listed" and pair.kernels[0] in MOE_BACKENDS:
            return f"--moe-backend {MOE_BACKENDS[pair.kernels[0]]} asks for the one that is listed"
    if any(pair.verdict == "unlisted" for pair in pairs):
        return "set quantisation.unlisted=self_test to have it tried at start, or use mode=observe"
    return "use mode=observe there"
