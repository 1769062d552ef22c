"""Load from routers: requests on topics that come and go, each token the top-k of a random router.

Nothing here is drawn from experts' popularities, as in `ep_rebalance.offline.generated_load`. A token is a
latent vector: its topic's, its request's and its own part. A layer's router is a random matrix with a bias
for each expert, and its top-k are the token's experts, so that no token has an expert twice, experts with
like rows are chosen together, and all layers see the same text. Requests arrive on topics by Zipf's law and
end as birth and death take them; now and then another topic moves to the front (Rivest's move-to-front, of
1976). The mixture of experts as a random router on clustered latent vectors is that of Chen et al.,
"Towards understanding mixture of experts in deep learning" (arXiv 2208.02813).

Tokens are drawn from a bank, made once: some for each of some texts on each topic.

Letters of this module: `X` texts, `B` tokens of a text in the bank, `H` coordinates of a latent vector;
others as in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.compiled import compiled
from ep_rebalance.offline.model_shape import ModelShape

TOPICS, TEXTS_PER_TOPIC, TOKENS_PER_TEXT = 32, 8, 64
LATENT_SIZE = 48

_TOPIC_PART, _TEXT_PART = 0.35, 0.15
"""Of the variance of a token's latent vector; the rest is the token's own."""
_BIAS = 0.25
"""Standard deviation of the experts' biases, in that of their logits. The load of all topics together has a
coefficient of variation of .8 then, as SGLang's recordings of DeepSeek-V3 have."""

_PREFILL_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Which requests come, and how long they stay.

    front_steps: steps. Mean time until another topic moves to the front.
    request_steps: steps. Mean time that a request stays; a prompt's is a tenth.
    zipf: exponent of Zipf's law over the topics.
    """

    front_steps: float
    request_steps: float
    zipf: float


ARRIVALS = {
    "router": Arrivals(front_steps=48.0, request_steps=100.0, zipf=1.0),
    "router burst": Arrivals(front_steps=36.0, request_steps=30.0, zipf=1.5),
}


def router_steps(
    shape: ModelShape, arrivals: Arrivals, *, ranks: int, tokens_per_rank: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """int64 [L, E] for each step, without end: (token, expert) pairs.

    A step of more than 256 tokens a rank is prefill: each request brings 256 of them.
    """
    random = np.random.default_rng([seed, 5])
    bank_XBLK = _token_bank(shape, random)
    brought = _PREFILL_TOKENS if tokens_per_rank > _PREFILL_TOKENS else 1
    requests = ranks * tokens_per_rank // brought
    stay = arrivals.request_steps / (10.0 if brought > 1 else 1.0)
    topics = random.permutation(TOPICS)
    running_X = random.multinomial(requests, _text_shares(topics, arrivals.zipf))
    even_B = np.full(TOKENS_PER_TEXT, 1.0 / TOKENS_PER_TEXT)
    while True:
        drawn_XB = random.multinomial(running_X * brought, even_B)
        counts_LE = np.zeros((shape.layers, shape.experts), dtype=np.int64)
        _count(drawn_XB, bank_XBLK, counts_LE)
        yield counts_LE
        if random.random() < 1.0 / arrivals.front_steps:
            front = random.integers(TOPICS)
            topics = np.concatenate([topics[[front]], np.delete(topics, front)])
        ended_X = random.binomial(running_X, 1.0 / stay)
        running_X = (
            running_X
            - ended_X
            + random.multinomial(ended_X.sum(), _text_shares(topics, arrivals.zipf))
        )


def _text_shares(topics: NDArray[np.int64], zipf: float) -> NDArray[np.float64]:
    """float64 [X], the part of the arrivals that each text has; topics come in the order of their rank."""
    shares = np.empty(TOPICS)
    shares[topics] = np.arange(1.0, TOPICS + 1.0) ** -zipf
    return np.repeat(shares / shares.sum(), TEXTS_PER_TOPIC) / TEXTS_PER_TOPIC


def _token_bank(shape: ModelShape, random: np.random.Generator) -> NDArray[np.uint16]:
    """uint16 [X, B, L, K], the experts of each token."""
    texts = TOPICS * TEXTS_PER_TOPIC
    topic_XH = np.repeat(random.standard_normal((TOPICS, LATENT_SIZE)), TEXTS_PER_TOPIC, axis=0)
    text_XH = random.standard_normal((texts, LATENT_SIZE))
    own_XBH = random.standard_normal((texts, TOKENS_PER_TEXT, LATENT_SIZE))
    latent_XBH = np.sqrt(1.0 - _TOPIC_PART - _TEXT_PART) * own_XBH
    latent_XBH += (np.sqrt(_TOPIC_PART) * topic_XH + np.sqrt(_TEXT_PART) * text_XH)[:, None]
    latent = latent_XBH.reshape(-1, LATENT_SIZE).astype(np.float32)
    bank = np.empty((len(latent), shape.layers, shape.top_k), dtype=np.uint16)
    for layer in range(shape.layers):
        router_HE = random.standard_normal((LATENT_SIZE, shape.experts), dtype=np.float32)
        bias_E = _BIAS * random.standard_normal(shape.experts, dtype=np.float32)
        logits = latent @ router_HE / np.float32(np.sqrt(LATENT_SIZE)) + bias_E
        bank[:, layer] = np.argpartition(logits, -shape.top_k, axis=1)[:, -shape.top_k :]
    return bank.reshape(texts, TOKENS_PER_TEXT, shape.layers, shape.top_k)


@compiled
def _count(
    drawn_XB: NDArray[np.int64], bank_XBLK: NDArray[np.uint16], counts_LE: NDArray[np.int64]
) -> None:
    """Add the experts of the tokens, each as often as it was drawn."""
    for text in range(drawn_XB.shape[0]):
        for token in range(drawn_XB.shape[1]):
            times = drawn_XB[text, token]
            if times > 0:
                for layer in range(bank_XBLK.shape[2]):
                    for k in range(bank_XBLK.shape[3]):
                        counts_LE[layer, bank_XBLK[text, token, layer, k]] += times
