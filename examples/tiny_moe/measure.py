"""Held-out loss and expert load by domain, and what a placement made for one domain costs another.

    python measure.py                      # tables from the prompts kept in this folder
    python measure.py --text held-out      # from all held-out text (train.py has left it on disk)
    python measure.py --text held-out --update-card   # also writes routing.json and README.md

A rank's load is the number of (token, expert) pairs it computes. Balancedness is the mean rank load
over the largest one, per layer, averaged over the layers: 1 is perfect, 1/ranks is the worst.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from byte_tokenizer import END_OF_TEXT_ID, PAD_ID
from corpus import DEFAULT_WORK_DIR, DOMAINS, load_part
from prompts import read_prompts
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

FOLDER = Path(__file__).resolve().parent
WINDOW = 512
RANK_COUNTS = (2, 4, 8)
MATRIX_RANK_COUNTS = (2, 4)
CARD_START = "<!-- measured: start -->"
CARD_END = "<!-- measured: end -->"


def token_stream(documents: list[str]) -> Tensor:
    """(bytes,) token ids of all documents, each closed by the end-of-text token."""
    ids: list[int] = []
    for text in documents:
        ids.extend(text.encode())
        ids.append(END_OF_TEXT_ID)
    return torch.tensor(ids, dtype=torch.long)


def load_model(folder: Path) -> Qwen3MoeForCausalLM:
    """The checkpoint with its weights widened to float32."""
    return Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="grouped_mm"
    ).eval()


def windows(documents: list[str], rows: int = 16) -> Iterator[Tensor]:
    """Batches of (rows, WINDOW) token ids that cover the documents, the last row padded."""
    stream = token_stream(documents)
    missing = -len(stream) % WINDOW
    padded = torch.nn.functional.pad(stream, (0, missing), value=PAD_ID).view(-1, WINDOW)
    yield from padded.split(rows)


@torch.inference_mode()
def mean_loss(model: Qwen3MoeForCausalLM, documents: list[str]) -> float:
    """Mean cross-entropy in nats per byte, over windows of WINDOW bytes."""
    total, count = 0.0, 0
    for batch in windows(documents):
        logits = model(input_ids=batch, use_cache=False, output_router_logits=False).logits
        targets = batch[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=PAD_ID, reduction="sum"
        )
        total += float(losses)
        count += int((targets != PAD_ID).sum())
    return total / count


@torch.inference_mode()
def expert_load(model: Qwen3MoeForCausalLM, documents: list[str]) -> Tensor:
    """(layers, experts) counts of the tokens routed to each expert; padding is not counted."""
    experts, chosen = model.config.num_experts, model.config.num_experts_per_tok
    load = torch.zeros(model.config.num_hidden_layers, experts, dtype=torch.long)
    for batch in windows(documents):
        is_text = (batch != PAD_ID).flatten()
        output = model(input_ids=batch, use_cache=False, output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            picked = logits[is_text].topk(chosen, dim=-1).indices
            load[layer] += torch.bincount(picked.flatten(), minlength=experts)
    return load


def contiguous_placement(experts: int, ranks: int) -> Tensor:
    """(experts,) rank of each expert when neighbours stay together, as vLLM places them first."""
    return torch.arange(experts) * ranks // experts


def packed_placement(load: Tensor, ranks: int) -> Tensor:
    """(experts,) rank of each expert: heaviest first, to the lightest rank that has a free slot."""
    slots = len(load) // ranks
    rank_load, rank_size = [0] * ranks, [0] * ranks
    placement = torch.empty(len(load), dtype=torch.long)
    for expert in load.argsort(descending=True, stable=True).tolist():
        rank = min((r for r in range(ranks) if rank_size[r] < slots), key=rank_load.__getitem__)
        placement[expert] = rank
        rank_load[rank] += int(load[expert])
        rank_size[rank] += 1
    return placement


def balancedness(load: Tensor, placements: list[Tensor], ranks: int) -> float:
    """Mean over layers of mean/max rank load; ``load`` is (layers, experts)."""
    scores = []
    for layer_load, placement in zip(load, placements, strict=True):
        rank_load = torch.zeros(ranks, dtype=torch.long).index_add_(0, placement, layer_load)
        scores.append(float(rank_load.sum()) / ranks / float(rank_load.max()))
    return sum(scores) / len(scores)


def contiguous_scores(load: Tensor) -> dict[str, float]:
    """Balancedness without any balancing, by number of ranks."""
    layers, experts = load.shape
    return {
        str(ranks): balancedness(load, [contiguous_placement(experts, ranks)] * layers, ranks)
        for ranks in RANK_COUNTS
    }


def hottest_over_mean(load: Tensor) -> list[float]:
    """Per layer, the most used expert's load in units of the mean load."""
    return [float(layer.max() / layer.float().mean()) for layer in load]


def cross_domain(loads: dict[str, Tensor], ranks: int) -> dict[str, dict[str, float]]:
    """Balancedness on the inner key's domain of the placement packed for the outer key's."""
    matrix = {}
    for source, source_load in loads.items():
        placements = [packed_placement(layer, ranks) for layer in source_load]
        matrix[source] = {
            target: balancedness(load, placements, ranks) for target, load in loads.items()
        }
    return matrix


def measure(model: Qwen3MoeForCausalLM, texts: dict[str, list[str]]) -> dict:
    """Everything this script reports, as plain data."""
    loss: dict[str, float] = {}
    loads: dict[str, Tensor] = {}
    for number, (domain, documents) in enumerate(texts.items(), 1):
        print(f"[{number}/{len(texts)}] {domain}", flush=True)
        loss[domain] = mean_loss(model, documents)
        loads[domain] = expert_load(model, documents)
    return {
        "bytes": {d: sum(len(text.encode()) for text in texts[d]) for d in texts},
        "loss_nats_per_byte": loss,
        "expert_load": {domain: load.tolist() for domain, load in loads.items()},
        "contiguous_balancedness": {d: contiguous_scores(load) for d, load in loads.items()},
        "hottest_over_mean": {d: hottest_over_mean(load) for d, load in loads.items()},
        "cross_domain_balancedness": {
            str(ranks): cross_domain(loads, ranks) for ranks in MATRIX_RANK_COUNTS
        },
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def report(result: dict) -> str:
    """The measured tables in Markdown."""
    loss, contiguous = result["loss_nats_per_byte"], result["contiguous_balancedness"]
    sections = [
        "Loss on held-out text:\n\n"
        + table(
            ["domain", "held-out bytes", "nats/byte", "bits/byte"],
            [
                [d, f"{result['bytes'][d]:,d}", f"{loss[d]:.3f}", f"{loss[d] / math.log(2):.3f}"]
                for d in loss
            ],
        ),
        "Expert load without balancing (experts in order, contiguous over the ranks): balancedness "
        "by number of ranks, and the hottest expert's load over the mean one, layer by layer:\n\n"
        + table(
            ["domain", *(f"EP={ranks}" for ranks in RANK_COUNTS), "hottest/mean"],
            [
                [
                    domain,
                    *(f"{contiguous[domain][str(ranks)]:.2f}" for ranks in RANK_COUNTS),
                    " ".join(f"{ratio:.1f}" for ratio in result["hottest_over_mean"][domain]),
                ]
                for domain in loss
            ],
        ),
    ]
    for ranks, matrix in result["cross_domain_balancedness"].items():
        sections.append(
            f"Balancedness at EP={ranks} of a placement packed for the row's domain (equal slots, "
            "no replicas) and scored on the column's:\n\n"
            + table(
                ["placed on", *matrix],
                [[s, *(f"{v:.2f}" for v in row.values())] for s, row in matrix.items()],
            )
        )
    return "\n\n".join(sections)


def update_card(card: Path, text: str) -> None:
    """Replace what stands between the card's two marks."""
    before, rest = card.read_text(encoding="utf-8").split(CARD_START)
    after = rest.split(CARD_END)[1]
    card.write_text(f"{before}{CARD_START}\n\n{text}\n\n{CARD_END}{after}", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--text", choices=("prompts", "held-out"), default="prompts")
    parser.add_argument("--work-dir", type=Path, default=DEFAULT_WORK_DIR)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--update-card", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.text == "prompts":
        texts = read_prompts(arguments.model / "prompts")
    else:
        texts = load_part(arguments.work_dir, "held_out")
    result = measure(load_model(arguments.model), {domain: texts[domain] for domain in DOMAINS})
    print(report(result))
    if arguments.update_card:
        (FOLDER / "routing.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        update_card(FOLDER / "README.md", report(result))


if __name__ == "__main__":
    main()
