"""Train the tiny Qwen3-MoE on two CPU cores and write its checkpoint into this folder.

    python train.py                  # corpus, training, export, prompts
    python train.py --steps 300 --output /tmp/trial

The model is transformers' own ``Qwen3MoeForCausalLM``, so what is trained is what is exported.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from byte_tokenizer import END_OF_TEXT_ID, PAD_ID, VOCAB_SIZE, save_tokenizer
from corpus import DEFAULT_WORK_DIR, DOMAINS, build_corpus, load_part
from measure import load_model, mean_loss, token_stream
from prompts import write_prompts
from torch import Tensor
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

FOLDER = Path(__file__).resolve().parent

# (share of the steps, bytes in a row): short rows are cheaper, long ones teach the later positions.
LENGTH_STAGES = ((0.6, 256), (0.3, 512), (0.1, 1024))

# Small on purpose: enough to keep every layer's router from settling on two experts for good, not
# enough to even out their load, so that routing stays skewed and moves with the domain.
BALANCING_WEIGHT = 0.001


@dataclass(frozen=True)
class Schedule:
    """Steps, bytes in a step, and a learning rate that warms up and then falls to zero."""

    steps: int
    bytes_per_step: int
    peak_rate: float
    warmup: int = 100

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * done))

    def row_length(self, step: int) -> int:
        """Bytes in each row of a step's batch."""
        end = 0.0
        for share, length in LENGTH_STAGES:
            end += share
            if step < end * self.steps:
                return length
        return LENGTH_STAGES[-1][1]


def model_config() -> Qwen3MoeConfig:
    """Four MoE layers of 16 experts; heads and experts divide by 2, 4 and (experts) 8 ranks."""
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=BALANCING_WEIGHT,
        max_position_embeddings=LENGTH_STAGES[-1][1],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PAD_ID,
    )


def draw_batch(streams: list[Tensor], rows: int, length: int, generator: torch.Generator) -> Tensor:
    """(rows, length) token ids: every domain equally likely, any position of its text."""
    batch = torch.empty(rows, length, dtype=torch.long)
    for row in range(rows):
        stream = streams[int(torch.randint(len(streams), (), generator=generator))]
        start = int(torch.randint(len(stream) - length, (), generator=generator))
        batch[row] = stream[start : start + length]
    return batch


def build_optimizer(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def balancing_loss(router_logits: tuple[Tensor, ...], chosen: int) -> tuple[Tensor, list[float]]:
    """The switch-transformer loss summed over layers, and each layer's hottest/mean expert load.

    Each element is (tokens, experts). Layers are taken one by one: transformers' own function pools
    them, by which two layers that each lean on their own few experts look balanced together.
    """
    total, hottest = torch.zeros(()), []
    for logits in router_logits:
        tokens, experts = logits.shape
        picked = logits.detach().topk(chosen, dim=-1).indices.flatten()
        load = torch.bincount(picked, minlength=experts).float() * experts / (tokens * chosen)
        total = total + (load * logits.softmax(dim=-1).mean(dim=0)).sum()
        hottest.append(float(load.max()))
    return total, hottest


def train_model(
    model: Qwen3MoeForCausalLM, streams: list[Tensor], schedule: Schedule, seed: int
) -> float:
    """Train in place and return the seconds it took."""
    optimizer = build_optimizer(model, schedule.peak_rate)
    generator = torch.Generator().manual_seed(seed)
    chosen = model.config.num_experts_per_tok
    model.train()
    started = time.monotonic()
    recent: list[float] = []
    for step in range(schedule.steps):
        length = schedule.row_length(step)
        batch = draw_batch(streams, schedule.bytes_per_step // length, length, generator)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        output = model(input_ids=batch, use_cache=False, output_router_logits=True)
        prediction = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        )
        balancing, hottest = balancing_loss(output.router_logits, chosen)
        (prediction + BALANCING_WEIGHT * balancing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(float(prediction.detach()))
        if (step + 1) % 50 == 0 or step + 1 == schedule.steps:
            print_progress(step + 1, schedule, recent, hottest, started)
            recent.clear()
    return time.monotonic() - started


def print_progress(
    step: int, schedule: Schedule, recent: list[float], hottest: list[float], started: float
) -> None:
    """One line: steps done, mean loss since the last line, routing skew, speed and time left."""
    spent = time.monotonic() - started
    left = spent / step * (schedule.steps - step)
    print(
        f"step {step:5d}/{schedule.steps}  loss {sum(recent) / len(recent):.3f} nats/byte"
        f"  hottest/mean {' '.join(f'{ratio:.1f}' for ratio in hottest)}"
        f"  row {schedule.row_length(step - 1):4d}"
        f"  {step * schedule.bytes_per_step / spent / 1e3:5.1f} kB/s  ETA {left:4.0f} s",
        flush=True,
    )


def edit_json(path: Path, **fields: object) -> None:
    """Set fields of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **fields}, indent=2) + "\n", encoding="utf-8")


def export_checkpoint(model: Qwen3MoeForCausalLM, folder: Path) -> None:
    """Write the weights in bfloat16 (under 10 MB), the configuration and the tokenizer."""
    model.generation_config = GenerationConfig(
        eos_token_id=END_OF_TEXT_ID, pad_token_id=PAD_ID, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder, model.config.max_position_embeddings)
    # Releases of transformers before 5 know the number of experts and the tokenizer's class by
    # these names only.
    edit_json(folder / "config.json", num_experts=model.config.num_experts)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--bytes-per-step", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=DEFAULT_WORK_DIR)
    parser.add_argument("--output", type=Path, default=FOLDER)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    build_corpus(arguments.work_dir)
    training = load_part(arguments.work_dir, "train")
    held_out = load_part(arguments.work_dir, "held_out")

    model = Qwen3MoeForCausalLM._from_config(model_config(), experts_implementation="grouped_mm")
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,d} parameters")
    schedule = Schedule(arguments.steps, arguments.bytes_per_step, arguments.rate)
    streams = [token_stream(training[domain]) for domain in DOMAINS]
    seconds = train_model(model, streams, schedule, arguments.seed)
    print(f"trained for {seconds:.0f} s on {arguments.threads} threads")

    before = {domain: mean_loss(model, held_out[domain]) for domain in DOMAINS}
    export_checkpoint(model, arguments.output)
    exported = load_model(arguments.output)
    for domain in DOMAINS:
        after = mean_loss(exported, held_out[domain])
        print(f"{domain:12s} held-out loss {before[domain]:.3f}, as exported {after:.3f} nats/byte")
    write_prompts(held_out, arguments.output / "prompts")


if __name__ == "__main__":
    main()
