"""Small checkpoints with random weights of many Mixture-of-Experts families, with routers that prefer some
experts.

Popularity is made by construction. The first coordinate of every token's embedding is the same, and the
second tells two domains of tokens apart. Both are far larger than what layers add to them, so that the
router's weights on them act as a bias of each expert, for all tokens and for those of a domain.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from moe_families import (
    BY_NAME,
    EXPERTS,
    FAMILIES,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    POSITIONS,
    VOCABULARY,
    Family,
)
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_moe"
DOMAINS = (range(VOCABULARY // 2), range(VOCABULARY // 2, VOCABULARY))
"""Ids of the tokens of each domain."""
SIGNAL = 3.0
"""Of both coordinates in embeddings; all others have a variance of at most 1."""
BIAS = 0.4
"""Per SIGNAL, what the router adds to a favoured expert and takes from the others."""

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": 0,
}


def write_checkpoint(family: Family, folder: Path, seed: int = 0) -> Path:
    """A model of the family, with a tokenizer, in `folder`, which is made. The same seed gives the same
    weights."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family.model_type](**{**_COMMON, **family.settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        _randomise(model)
        _mark_domains(model.get_input_embeddings().weight)
        for number, router in enumerate(_routers(model, family)):
            _prefer(router, number)
    model.to(torch.bfloat16).save_pretrained(folder)
    if family.architecture:
        _name_architecture(folder / "config.json", family.architecture)
    if family.zero_experts:
        _drop_zero_experts(folder / WEIGHTS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def _name_architecture(config: Path, name: str) -> None:
    settings = json.loads(config.read_text())
    settings["architectures"] = [name]
    config.write_text(json.dumps(settings, indent=2))


def _drop_zero_experts(weights: Path) -> None:
    """Released checkpoints have no weights of experts that compute nothing."""
    real = {
        name: tensor
        for name, tensor in load_file(weights).items()
        if not ((expert := re.search(r"experts\.(\d+)\.", name)) and int(expert[1]) >= EXPERTS)
    }
    save_file(real, weights, metadata={"format": "pt"})


def _randomise(model: Any) -> None:
    """Every matrix with outputs as large as its inputs; biases of choices small."""
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if "correction_bias" in name or name.endswith("expert_bias"):
            weight.uniform_(0.0, 0.05)
        elif weight.ndim >= 2 and weight.is_floating_point():
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
    # Small where the head is the same matrix: it would say each token again.
    tied = model.config.tie_word_embeddings
    model.get_input_embeddings().weight.normal_(0.0, 0.1 if tied else 1.0)


def _mark_domains(embedding_VH: torch.Tensor) -> None:
    embedding_VH[:, 0] = SIGNAL
    embedding_VH[:, 1] = SIGNAL
    embedding_VH[DOMAINS[1].start :, 1] = -SIGNAL


def _routers(model: Any, family: Family) -> Iterator[torch.Tensor]:
    """[E, H] of each MoE layer, in their order."""
    experts = EXPERTS + family.zero_experts
    found = [
        weight
        for name, weight in model.named_parameters()
        if weight.shape == (experts, HIDDEN) and re.search(r"(gate|router)[.\w]*weight$", name)
    ]
    assert len(found) == len(family.moe_layers), (family.name, len(found))
    return iter(found)


def _prefer(router_EH: torch.Tensor, number: int) -> None:
    """All tokens prefer the first half of the experts; the first domain's the even ones of them, the
    second's the odd ones. Later layers prefer less."""
    experts = torch.arange(len(router_EH))
    strength = BIAS / (1 + number / 4)
    first_half = experts < EXPERTS // 2
    router_EH[:, 0] = strength * torch.where(first_half, 1.0, -1.0)
    router_EH[:, 1] = strength * torch.where(experts % 2 == 0, 1.0, -1.0)


def main() -> None:
    """Write one family, or all, each into a folder of its name."""
    parser = argparse.ArgumentParser(
        description="Writes small MoE checkpoints with random weights, for trying servers."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"of {', '.join(BY_NAME)}; all by default"
    )
    given = parser.parse_args()
    for name in given.families or [family.name for family in FAMILIES]:
        folder = write_checkpoint(BY_NAME[name], given.folder / name)
        sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
