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
from collections.abc import Iterator, Mapping
from pathlib import Path

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
    torch.manual_seed(seed)
    if family.tensors:
        _save_by_names(family, folder)
    else:
        _save_by_transformers(family, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def fuse_experts(folder: Path) -> None:
    """Put the experts of a layer into one tensor, as transformers saves many families."""
    apart, weights = re.compile(r"(.*\.experts)\.(\d+)\.(\w+_proj)\.weight"), {}
    stacked: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if found := apart.fullmatch(name):
            stacked.setdefault((found[1], found[3]), {})[int(found[2])] = tensor
        else:
            weights[name] = tensor
    whole = {
        key: torch.stack([tensors[expert] for expert in sorted(tensors)])
        for key, tensors in stacked.items()
    }
    for experts in {experts for experts, _ in whole}:
        gate, up = whole[experts, "gate_proj"], whole[experts, "up_proj"]
        weights[f"{experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        weights[f"{experts}.down_proj"] = whole[experts, "down_proj"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _save_by_transformers(family: Family, folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family.model_type](**{**_COMMON, **family.settings})
    # Once vLLM has read Kimi-K2's configuration in this process, DeepSeek-V3's class has Kimi's name.
    type(config).model_type = family.model_type
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = dict([*model.named_parameters(), *model.named_buffers()])
    tied = bool(model.config.tie_word_embeddings)
    _fill(family, weights, model.get_input_embeddings().weight, tied=tied)
    model.to(torch.bfloat16).save_pretrained(folder)
    if family.architecture:
        _name_architecture(folder / "config.json", family.architecture)
    if family.zero_experts:
        _drop_zero_experts(folder / WEIGHTS)


def _save_by_names(family: Family, folder: Path) -> None:
    """What is no matrix is 0: norms of such families scale by one more than their weights."""
    weights = {name: torch.zeros(shape) for name, shape in family.tensors.items()}
    _fill(family, weights, weights["model.embed_tokens.weight"])
    folder.mkdir(parents=True)
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(rounded, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        **_COMMON,
        **family.settings,
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@torch.no_grad()
def _fill(
    family: Family,
    weights: Mapping[str, torch.Tensor],
    embedding_VH: torch.Tensor,
    *,
    tied: bool = False,
) -> None:
    _randomise(weights)
    embedding_VH.normal_(0.0, 0.3 if tied else 1.0)
    if tied:  # The head is the same matrix, and would say each token again.
        _strengthen(weights)
    _mark_domains(embedding_VH)
    embedding_VH.div_(family.embedding_scale)
    for number, router in enumerate(_routers(weights, family)):
        _prefer(router, number)


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


def _randomise(weights: Mapping[str, torch.Tensor]) -> None:
    """Every matrix with outputs as large as its inputs; biases of choices small."""
    for name, weight in weights.items():
        if re.search(r"correction_bias|(expert|router)_bias$", name):
            weight.uniform_(0.0, 0.05)
        elif weight.ndim >= 2 and weight.is_floating_point():
            weight.normal_(0.0, weight.shape[-1] ** -0.5)


def _strengthen(weights: Mapping[str, torch.Tensor]) -> None:
    """Have layers add more to what they are given."""
    for name, weight in weights.items():
        if re.search(r"(o_proj|out_proj|down_proj|\.w2)(\.weight)?$", name):
            weight.mul_(4.0)


def _mark_domains(embedding_VH: torch.Tensor) -> None:
    embedding_VH[:, 0] = SIGNAL
    embedding_VH[:, 1] = SIGNAL
    embedding_VH[DOMAINS[1].start :, 1] = -SIGNAL


def _routers(weights: Mapping[str, torch.Tensor], family: Family) -> Iterator[torch.Tensor]:
    """[E, H] of each MoE layer, in their order."""
    experts = family.experts + family.zero_experts
    found = [
        weight
        for name, weight in weights.items()
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
