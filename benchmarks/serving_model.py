"""A Mixture-of-Experts model with random weights whose expert popularity is chosen, not learnt.

The architecture is Qwen3-MoE, so that vLLM runs its own model code, and it is so wide that a step
on a CPU is expert compute for the most part. Popularity is made by construction: the first
`domains` coordinates of the residual stream tell to which domain a token belongs, no layer writes
them, and the router's weights on them act as a bias per expert. The biases are fitted, layer by
layer, until each domain's tokens choose experts as often as asked. All other router weights are
noise, so that single tokens differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CACHE = Path("~/.cache/ep-rebalance").expanduser()
FORMAT = 3
"""Part of the cache key: raise it when what is written here changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of the model, and how skewed its router is.

    hot_share: (first layer, last layer), part of the routed tokens that go to the hot half of the
    experts; with two ranks and that half on one rank, imbalance is twice as much. 0.5 with `spread`
    0 makes an even router.
    spread: standard deviation of the log popularity within a half.
    domains: kinds of text. The hot half of domain 0 is what rank 0 of two holds; of each other one,
    a random half.
    """

    layers: int = 4
    hidden: int = 512
    expert_intermediate: int = 768
    experts: int = 16
    top_k: int = 2
    vocabulary: int = 2048
    max_tokens: int = 640
    domains: int = 4
    hot_share: tuple[float, float] = (0.70, 0.80)
    spread: float = 0.5
    seed: int = 0

    def even(self) -> ModelShape:
        """The same model with a router that uses all experts alike."""
        return ModelShape(**{**asdict(self), "hot_share": (0.5, 0.5), "spread": 0.0})

    @property
    def folder(self) -> Path:
        """Where the model lies once it was made."""
        text = json.dumps([FORMAT, asdict(self)], sort_keys=True)
        return CACHE / f"serving-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer, in bfloat16."""
        return 2 * 3 * self.hidden * self.expert_intermediate

    def token_ids(self, domain: int) -> range:
        """The tokens of a domain."""
        size = self.vocabulary // self.domains
        return range(domain * size, (domain + 1) * size)

    def popularity_DLE(self) -> NDArray[np.float64]:
        """Part of the routed tokens of a domain that each expert is to get; rows sum to 1."""
        rng = np.random.default_rng(self.seed)
        half = self.experts // 2
        shares = np.linspace(*self.hot_share, self.layers)
        popularity = np.empty((self.domains, self.layers, self.experts))
        for domain in range(self.domains):
            order = np.arange(self.experts) if domain == 0 else rng.permutation(self.experts)
            for layer, share in enumerate(shares):
                weights = np.exp(self.spread * rng.standard_normal((2, half)))
                weights /= weights.sum(1, keepdims=True)
                popularity[domain, layer, order[:half]] = share * weights[0]
                popularity[domain, layer, order[half:]] = (1 - share) * weights[1]
        return np.minimum(popularity, 0.9 / self.top_k)

    def contiguous_imbalance_L(self, ranks: int, domain: int = 0) -> NDArray[np.float64]:
        """max/mean rank load that the popularity gives when experts lie in order."""
        by_rank_LR = self.popularity_DLE()[domain].reshape(self.layers, ranks, -1).sum(2)
        imbalance_L: NDArray[np.float64] = by_rank_LR.max(1) / by_rank_LR.mean(1)
        return imbalance_L


def ensure_model(shape: ModelShape) -> Path:
    """The model's folder; makes the model (about a minute) if it is not there."""
    if (shape.folder / "config.json").exists():
        return shape.folder
    partial = shape.folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _make(shape, partial)
    shutil.rmtree(shape.folder, ignore_errors=True)
    partial.rename(shape.folder)
    return shape.folder


def _make(shape: ModelShape, folder: Path) -> None:
    import torch

    torch.manual_seed(shape.seed)
    with torch.no_grad():
        model = _random_model(shape)
        _mark_domains(shape, model)
        _fit_router(shape, model)
        model.to(torch.bfloat16).save_pretrained(folder)
    _tokenizer(shape).save_pretrained(folder)


def _random_model(shape: ModelShape) -> Any:
    """Every matrix with outputs as large as its inputs, but for those that write into the residual stream."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=shape.expert_intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=shape.max_tokens,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        small = name.endswith(("o_proj.weight", "down_proj")) or "down_proj.weight" in name
        gain = 0.5 if small else 1.0
        fan_in = 1 if "embed_tokens" in name else weight.shape[-1]
        weight.normal_(0.0, gain / fan_in**0.5)
    return model


def _mark_domains(shape: ModelShape, model: Any) -> None:
    """Give each domain a coordinate of the residual stream, set for its tokens only and never
    written.

    The output layer reads it too, so that a text keeps to its domain.
    """
    domains, signal = shape.domains, shape.hidden**0.5 / 4
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding[:, :domains] = 0.0
    head[:, :domains] = 0.0
    for domain in range(domains):
        ids = shape.token_ids(domain)
        embedding[ids.start : ids.stop, domain] = signal
        head[ids.start : ids.stop, domain] = 4.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:domains] = 0.0
        layer.mlp.experts.down_proj[:, :domains] = 0.0


def _fit_router(shape: ModelShape, model: Any) -> None:
    """Set the router's weights on the domain coordinates, each layer's after those before it."""
    import torch

    target_DLE = torch.from_numpy(shape.popularity_DLE())
    texts_DT = _sample_texts(shape)
    layers = model.model.layers
    for index, layer in enumerate(layers):
        model.model.layers = layers[: index + 1]
        gate = layer.mlp.gate
        gate.weight[:, : shape.domains] = 0.0
        inputs: list[torch.Tensor] = []
        handle = gate.register_forward_hook(
            lambda _, args, __, inputs=inputs: inputs.append(args[0].flatten(0, -2))
        )
        for text in texts_DT:
            model.model(text)
        handle.remove()
        for domain, hidden_TH in enumerate(inputs):
            bias_E = _fit_bias(hidden_TH @ gate.weight.T, target_DLE[domain, index], shape.top_k)
            gate.weight[:, domain] = bias_E / hidden_TH[:, domain].mean()


def _sample_texts(shape: ModelShape) -> Any:
    import torch

    rng = np.random.default_rng(shape.seed + 1)
    return [
        torch.from_numpy(rng.choice(shape.token_ids(domain), size=(8, 256)))
        for domain in range(shape.domains)
    ]


def _fit_bias(noise_TE: Any, target_E: Any, top_k: int) -> Any:
    """Biases with which the top k of `noise + bias` choose each expert as often as `target_E` says."""
    import torch

    bias_E = target_E.log().float()
    for attempt in range(200):
        chosen = (noise_TE + bias_E).topk(top_k, dim=1).indices
        measured_E = torch.bincount(chosen.flatten(), minlength=len(target_E)) / chosen.numel()
        rate = 0.5 if attempt < 100 else 0.1
        bias_E = bias_E + rate * (target_E / (measured_E + 1e-4)).log().float()
    return bias_E - bias_E.mean()


def _tokenizer(shape: ModelShape) -> Any:
    """One visible character per token, so that every generated token is an event of the stream."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(0x4E00 + token): token for token in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=shape.max_tokens, unk_token=chr(0x4E00)
    )


def main() -> None:
    """Make both models and say where they are and what imbalance is built into them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args()
    for name, shape in (("skewed", ModelShape()), ("even", ModelShape().even())):
        folder = ensure_model(shape)
        imbalance = ", ".join(f"{value:.2f}" for value in shape.contiguous_imbalance_L(2))
        print(f"{name}: {folder}, imbalance per layer on two ranks {imbalance}")


if __name__ == "__main__":
    main()
