"""Small checkpoints of families: written by transformers, and by the names of their tensors."""

import re

import pytest
from moe_checkpoints import DOMAINS, WEIGHTS, write_checkpoint
from moe_families import BY_NAME, EXPERTS, HIDDEN, TOP_K
from safetensors.torch import load_file

FAMILIES = ("olmoe", "step3p5", "lfm2_moe")
"""By transformers, by names, and with a head that is the embedding."""


@pytest.mark.parametrize("name", FAMILIES)
def test_routers_of_its_moe_layers_prefer_some_experts_and_each_domain_others(name, tmp_path):
    weights = load_file(write_checkpoint(BY_NAME[name], tmp_path / name) / WEIGHTS)
    routers = {
        int(re.search(r"\.(\d+)\.", name)[1]): router
        for name, router in weights.items()
        if router.shape == (EXPERTS, HIDDEN)
    }
    assert tuple(sorted(routers)) == BY_NAME[name].moe_layers
    embedding_VH = weights["model.embed_tokens.weight"].float()
    for router_EH in routers.values():
        preferred = [
            (router_EH.float() @ embedding_VH[list(tokens)].mean(dim=0)).topk(TOP_K).indices
            for tokens in DOMAINS
        ]
        assert [sorted(experts.tolist()) for experts in preferred] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_seed_decides_on_the_weights(name, tmp_path):
    folders = [
        write_checkpoint(BY_NAME[name], tmp_path / folder, seed)
        for folder, seed in (("one", 0), ("same", 0), ("other", 1))
    ]
    one, same, other = [(folder / WEIGHTS).read_bytes() for folder in folders]
    assert one == same != other
