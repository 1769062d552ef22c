"""Generated load: domains of text that come and go, each with experts that it prefers.

A step's routing is drawn from a mixture of the domains' routing. The mixture drifts, or jumps from one
domain to another; each expert's popularity fluctuates independently; and the tokens of a step are a
sample, so that even the best placement is never perfectly balanced. Popularities of real workloads can
stand for the domains; the timing is always made up.

Letter of this module: `D` domains; others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How the mixture of domains moves from step to step.

    drift: standard deviation of each domain's log-weight in the long run.
    memory_steps: steps. After so many, the correlation with earlier weights has fallen to 1 / e.
    burst_steps: steps. Mean time between two jumps to another domain; 0 for no jumps.
    wavering: standard deviation of each expert's log-popularity around that of its domain, with the same
        memory.
    """

    drift: float
    memory_steps: float = 96.0
    burst_steps: float = 0.0
    wavering: float = 0.1


_LEAD = 4.0
"""Added to the log-weight of the domain that the last burst jumped to."""

TIMINGS: Mapping[str, Timing] = MappingProxyType(
    {
        "steady": Timing(drift=0.3),
        "drift": Timing(drift=2.0),
        "real": Timing(drift=1.1, wavering=0.06),
        "burst": Timing(drift=1.0, burst_steps=36.0),
    }
)


def synthetic_domains(
    *, domains: int, layers: int, experts: int, seed: int, spread: float = 1.0, shared: float = 0.5
) -> NDArray[np.float64]:
    """float64 [D, L, E], log-normal popularities that sum to 1 over the experts.

    domains, layers, experts: D, L and E.
    spread: standard deviation of the logarithm; 1.0 gives the coefficient of variation, 1.3, that was
        published for DeepSeek-R1 on translation (TensorRT-LLM, "Scaling expert parallelism").
    shared: fraction of the variance that all domains have in common.
    """
    random = np.random.default_rng([seed, 1])
    common_LE = random.standard_normal((layers, experts))
    own_DLE = random.standard_normal((domains, layers, experts))
    log_DLE = spread * (np.sqrt(shared) * common_LE + np.sqrt(1.0 - shared) * own_DLE)
    return _normalised(np.exp(log_DLE))


def generate_steps(
    domains_DLE: NDArray[np.float64], timing: Timing, *, pairs_per_step: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """int64 [L, E] for each step, without end: (token, expert) pairs.

    domains_DLE: float64 [D, L, E]. Popularities that sum to 1 over the experts.
    pairs_per_step: pairs in each layer.
    """
    random = np.random.default_rng([seed, 2])
    domains, layers, experts = domains_DLE.shape
    # x' = kept * x + fresh * sigma * noise keeps the standard deviation of x at sigma, since
    # kept**2 + fresh**2 = 1.
    kept = float(np.exp(-1.0 / timing.memory_steps))
    fresh = float(np.sqrt(1.0 - kept**2))
    weights_D = timing.drift * random.standard_normal(domains)
    wavering_LE = timing.wavering * random.standard_normal((layers, experts))
    ahead = random.integers(domains)
    while True:
        if timing.burst_steps and random.random() < 1.0 / timing.burst_steps:
            ahead = random.integers(domains)
        lead = _LEAD if timing.burst_steps else 0.0
        mixture_D = _softmax(weights_D + lead * (np.arange(domains) == ahead))
        routing_LE = np.einsum("d,dle->le", mixture_D, domains_DLE) * np.exp(wavering_LE)
        yield random.multinomial(pairs_per_step, _normalised(routing_LE))
        weights_D = kept * weights_D + fresh * timing.drift * random.standard_normal(domains)
        noise_LE = random.standard_normal((layers, experts))
        wavering_LE = kept * wavering_LE + fresh * timing.wavering * noise_LE


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max())
    parts: NDArray[np.float64] = powers / powers.sum()
    return parts


def _normalised(popularity: NDArray[np.float64]) -> NDArray[np.float64]:
    parts: NDArray[np.float64] = popularity / popularity.sum(axis=-1, keepdims=True)
    return parts
