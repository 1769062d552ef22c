"""The quantised tiny_moe is the same each time, and the model that it was, nearly."""

import subprocess

import pytest
import torch
from quantised_checkpoints import (
    BLOCK,
    CHECKPOINTS,
    GROUP,
    LAYERS,
    TINY_MOE,
    WEIGHTS,
    write_checkpoint,
)
from safetensors.torch import load_file

COMMAND = TINY_MOE.parents[1] / "scripts" / "quantise_tiny_moe"
NAME = "model.layers.{layer}.mlp.experts.5.up_proj.weight"


def read_back(tensors, name):
    """float32 [rows, columns] of what a format made of a projection."""
    if name in tensors and f"{name}_scale_inv" in tensors:
        scale = tensors[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0)
        return tensors[name].float() * scale.repeat_interleave(BLOCK, 1)
    if name in tensors and f"{name}_scale" in tensors:
        return tensors[name].float() * tensors[f"{name}_scale"]
    if name in tensors:
        return tensors[name].float()
    words, scale = tensors[f"{name}_packed"], tensors[f"{name}_scale"].float()
    nibbles = torch.stack([(words >> 4 * place) & 15 for place in range(8)], -1)
    return (nibbles.flatten(1).float() - 8) * scale.repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_experts_are_nearly_what_they_were_and_nothing_else_has_changed(name, tmp_path):
    original = load_file(TINY_MOE / WEIGHTS)
    made = load_file(write_checkpoint(name, tmp_path) / WEIGHTS)
    for layer in range(LAYERS):
        weight = original[NAME.format(layer=layer)].float()
        error = (read_back(made, NAME.format(layer=layer)) - weight).norm() / weight.norm()
        assert error < 0.15
        quantised = CHECKPOINTS[name].quantise[layer] is not None
        assert (error > 0) == quantised
    for other in (key for key in original if ".experts." not in key):
        assert torch.equal(made[other], original[other])


def test_a_checkpoint_is_the_same_each_time(tmp_path):
    folders = [write_checkpoint("ct_mixed", tmp_path / name) for name in ("one", "two")]
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes()


def test_the_command_lists_its_formats_and_refuses_others(tmp_path):
    told = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in told.stdout for name in CHECKPOINTS)
    told = subprocess.run([COMMAND, tmp_path, "fp3"], capture_output=True, text=True)
    assert told.returncode == 2
    assert "no format fp3; there are fp8_block, " in told.stderr
    assert not list(tmp_path.iterdir())
