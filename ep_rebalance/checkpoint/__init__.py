"""What the configuration of a checkpoint says of a model, read without vLLM, torch or transformers.

| module | what it reads |
|---|---|
| files | config.json and what lies beside it, from a folder or the local Hugging Face cache |
| numbers | experts, top-k, layers, sizes |
| moe_layers | which layers have experts |
| weights | how many bytes a parameter of an expert takes |

`docs/checkpoints.md` lists configurations on which it was held against vLLM's own reader. Nothing of a
checkpoint is executed.
"""

from __future__ import annotations

from ep_rebalance.checkpoint.files import Checkpoint, read_checkpoint
from ep_rebalance.checkpoint.moe_layers import told_layers
from ep_rebalance.checkpoint.numbers import ModelNumbers, numbers_of
from ep_rebalance.checkpoint.weights import WeightSize, weight_size

__all__ = [
    "Checkpoint",
    "ModelNumbers",
    "WeightSize",
    "numbers_of",
    "read_checkpoint",
    "told_layers",
    "weight_size",
]
