"""Small checkpoints with a multi-token prediction layer, as DeepSeek-V3 has one behind its others."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def add_mtp_layer(folder: Path) -> int:
    """Copy the last layer of the model in `folder` into an MTP layer behind it, with other experts.

    The layer is given the previous hidden state as it is, so that it drafts something like what the model
    says. Returns the layer's number.
    """
    config = json.loads((folder / "config.json").read_text())
    number, hidden = config["num_hidden_layers"], config["hidden_size"]
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    last, added = f"model.layers.{number - 1}.", f"model.layers.{number}."
    layer = {n.replace(last, added): w.clone() for n, w in weights.items() if n.startswith(last)}
    for name, weight in layer.items():
        if ".experts." in name:
            layer[name] = weight * 0.5
    passed_on = torch.zeros(hidden, 2 * hidden, dtype=weights["model.norm.weight"].dtype)
    passed_on[:, hidden:] = torch.eye(hidden)
    layer |= {
        f"{added}enorm.weight": torch.ones_like(weights["model.norm.weight"]),
        f"{added}hnorm.weight": torch.ones_like(weights["model.norm.weight"]),
        f"{added}eh_proj.weight": passed_on,
        f"{added}shared_head.norm.weight": weights["model.norm.weight"].clone(),
        f"{added}shared_head.head.weight": weights["lm_head.weight"].clone(),
        f"{added}embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    save_file(weights | layer, folder / "model.safetensors", metadata={"format": "pt"})
    return number
