"""The model of examples/tiny_moe with its experts quantised, in the formats that vLLM reads.

Only experts are quantised: what else a format may do is not the business of who moves them. The same
format gives the same bytes on every machine, but for what torch itself rounds.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TINY_MOE = Path(__file__).parents[2] / "examples" / "tiny_moe"
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
WEIGHTS = "model.safetensors"
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.\w+\.weight")

LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
BLOCK = 128
"""Rows and columns that share a scale, as in DeepSeek-V3."""
GROUP = 32
"""Columns of a row that share a scale in WNA16."""

Quantise = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
"""Name and float32 [rows, columns] of a projection: the tensors of a checkpoint in its place."""


def fp8_block(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / LARGEST_FP8
    return {
        name: (blocks / scales).reshape(rows, columns).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": scales.reshape(rows // BLOCK, columns // BLOCK),
    }


def fp8_per_tensor(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().max() / LARGEST_FP8
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def fp8_static(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """With a scale of activations, the larger the later the expert: ranks have not the same maximum."""
    expert = _EXPERT.fullmatch(name)
    assert expert is not None
    scale = torch.tensor(1.0 + int(expert[2]))
    return {**fp8_per_tensor(name, weight), f"{name.removesuffix('weight')}input_scale": scale}


def fp8_per_row(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / LARGEST_FP8
    return {name: (weight / scales).to(torch.float8_e4m3fn), f"{name}_scale": scales}


def int8_per_row(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return {name: (weight / scales).round().to(torch.int8), f"{name}_scale": scales}


def int4_in_groups(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)
    scales = (groups.abs().amax(2, keepdim=True) / 7).bfloat16()
    values = (groups / scales.float()).round().clamp(-8, 7).reshape(rows, columns)
    return {
        f"{name}_packed": _eight_in_a_word(values.int()),
        f"{name}_scale": scales.squeeze(2),
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def _eight_in_a_word(values: torch.Tensor) -> torch.Tensor:
    """values: int32 [rows, columns] of -8..7. Returns int32 [rows, columns / 8], the first value lowest."""
    nibbles = (values + 8).view(len(values), -1, 8)
    words = torch.zeros(nibbles.shape[:2], dtype=torch.int32)
    for place in range(8):
        words |= nibbles[..., place] << 4 * place
    return words


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """quantise: for each MoE layer how its experts become tensors; None leaves them as they are.
    config: `quantization_config` of config.json.
    """

    summary: str
    quantise: Sequence[Quantise | None]
    config: Mapping[str, Any]


LAYERS = 4
_SELF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
_NOT_EXPERTS = [
    *(f"model.layers.{n}.self_attn.{name}" for n in range(LAYERS) for name in _SELF_ATTENTION),
    *(f"model.layers.{n}.mlp.gate" for n in range(LAYERS)),
    "lm_head",
]


def _fp8(**more: Any) -> dict[str, Any]:
    names = {"ignored_layers": _NOT_EXPERTS, "modules_to_not_convert": _NOT_EXPERTS}
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **names, **more}


def _compressed(groups: Mapping[str, Mapping[str, Any]], *unquantised: str) -> dict[str, Any]:
    """groups: what a layer's experts are by a regular expression for their names."""
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(groups) > 1 else next(iter(groups.values()))["format"],
        "quantization_status": "compressed",
        "ignore": ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head", *unquantised],
        "config_groups": {
            f"group_{number}": {"targets": [target], "output_activations": None, **group}
            for number, (target, group) in enumerate(groups.items())
        },
    }


def _numbers(bits: int, kind: str, strategy: str, *, dynamic: bool, **more: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "type": kind, "strategy": strategy, "dynamic": dynamic}
    return {**scheme, "symmetric": True, **more}


_CT_FP8 = {
    "format": "float-quantized",
    "weights": _numbers(8, "float", "channel", dynamic=False),
    "input_activations": _numbers(8, "float", "token", dynamic=True),
}
_CT_INT8 = {
    "format": "int-quantized",
    "weights": _numbers(8, "int", "channel", dynamic=False),
    "input_activations": _numbers(8, "int", "token", dynamic=True),
}
_CT_INT4 = {
    "format": "pack-quantized",
    "weights": _numbers(4, "int", "group", dynamic=False, group_size=GROUP),
    "input_activations": None,
}


def _experts_of(layer: int) -> str:
    return rf"re:.*layers\.{layer}\.mlp\.experts.*"


CHECKPOINTS: dict[str, Checkpoint] = {
    "fp8_block": Checkpoint(
        f"FP8, a scale for {BLOCK} x {BLOCK} weights (DeepSeek-V3)",
        [fp8_block] * LAYERS,
        _fp8(weight_block_size=[BLOCK, BLOCK]),
    ),
    "fp8_tensor": Checkpoint(
        "FP8, a scale for each projection of an expert", [fp8_per_tensor] * LAYERS, _fp8()
    ),
    "fp8_static": Checkpoint(
        "the same, with a scale of activations for each projection (nothing was calibrated)",
        [fp8_static] * LAYERS,
        _fp8(activation_scheme="static"),
    ),
    "ct_fp8": Checkpoint(
        "compressed-tensors FP8, a scale for each row",
        [fp8_per_row] * LAYERS,
        _compressed({"Linear": _CT_FP8}),
    ),
    "ct_int8": Checkpoint(
        "compressed-tensors INT8, a scale for each row",
        [int8_per_row] * LAYERS,
        _compressed({"Linear": _CT_INT8}),
    ),
    "ct_wna16": Checkpoint(
        f"compressed-tensors WNA16: four bits, a scale for {GROUP} weights (Kimi K2)",
        [int4_in_groups] * LAYERS,
        _compressed({"Linear": _CT_INT4}),
    ),
    "ct_mixed": Checkpoint(
        "compressed-tensors of another precision in each layer: FP8, INT8, WNA16, bfloat16",
        [fp8_per_row, int8_per_row, int4_in_groups, None],
        _compressed(
            {_experts_of(0): _CT_FP8, _experts_of(1): _CT_INT8, _experts_of(2): _CT_INT4},
            _experts_of(3),
        ),
    ),
}


def write_checkpoint(name: str, folder: Path) -> Path:
    """Make `folder`, a model for `vllm serve`, and return it.

    name: of CHECKPOINTS.
    """
    checkpoint = CHECKPOINTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for beside in BESIDE_WEIGHTS:
        shutil.copy(TINY_MOE / beside, folder / beside)
    config = json.loads((TINY_MOE / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = checkpoint.config
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors: dict[str, torch.Tensor] = {}
    for tensor_name, tensor in sorted(load_file(TINY_MOE / WEIGHTS).items()):
        tensors |= _quantised(checkpoint, tensor_name, tensor)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def _quantised(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    expert = _EXPERT.fullmatch(name)
    quantise = checkpoint.quantise[int(expert[1])] if expert else None
    if quantise is None:
        return {name: tensor}
    return {key: value.contiguous() for key, value in quantise(name, tensor.float()).items()}


def main() -> None:
    width = max(map(len, CHECKPOINTS))
    parser = argparse.ArgumentParser(
        prog="scripts/quantise_tiny_moe",
        description="Write examples/tiny_moe with quantised experts, one folder for each format. "
        "Each is a model for `vllm serve`; where no kernel of the machine computes it, vLLM says so.",
        epilog="formats:\n"
        + "\n".join(f"  {name:{width}}  {made.summary}" for name, made in CHECKPOINTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the folders go; it is created")
    parser.add_argument(
        "formats", nargs="*", metavar="FORMAT", help="of the list below; all if none is given"
    )
    given = parser.parse_args()
    if unknown := sorted(set(given.formats) - set(CHECKPOINTS)):
        parser.error(f"no format {', '.join(unknown)}; there are {', '.join(CHECKPOINTS)}")
    for name in given.formats or CHECKPOINTS:
        folder = write_checkpoint(name, given.folder / name)
        size = (folder / WEIGHTS).stat().st_size
        print(f"{folder}: {size / 1e6:.1f} MB")  # noqa: T201


if __name__ == "__main__":
    main()
