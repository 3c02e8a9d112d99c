"""Measures how many nats per token each recipe loses, at its stored size.

`python benchmarks/quality_ablation.py MODEL --help` lists the options.
"""

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.calibration.texts import read_documents, token_stream, windows

BATCH = 16


@torch.no_grad()
def nats_per_token(model: PreTrainedModel, rows: Tensor) -> float:
    """Return the mean cross-entropy of the next token over windows (rows, length)."""
    total = 0.0
    for batch in rows.split(BATCH):
        logits = model(batch).logits[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        )
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def main() -> None:
    """Print one row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a dense model")
    parser.add_argument(
        "recipes",
        nargs="+",
        metavar="METHOD,RATIO[,OPTION=VALUE]...",
        help="for example auto,0.72 or auto,0.5,quantised=false",
    )
    parser.add_argument("--text", nargs="+", required=True, help="texts to evaluate on")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--length", type=int, required=True, help="tokens per window")
    parser.add_argument("--windows", type=int, default=200, help="windows per text")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = []
    for text in arguments.text:
        rows = windows(token_stream(tokenizer, read_documents(text)), arguments.length)
        texts.append(rows[: arguments.windows])
    dense_model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    dense = [nats_per_token(dense_model, rows) for rows in texts]
    print("| recipe | bits per weight |", " | ".join(arguments.text), "|\n|---|---|" + "---|" * len(texts), flush=True)
    print("| dense |  |", " | ".join(f"{nats:.4f}" for nats in dense), "|", flush=True)
    for recipe in arguments.recipes:
        method, ratio, *options = recipe.split(",")
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
        config = CompressionConfig(
            method=method,
            ratio=float(ratio),
            options=dict(option.split("=") for option in options),
            calibration=arguments.calibration,
            sequence_length=arguments.length,
        )
        compress(model, config, tokenizer)
        bits_per_weight = 16 * (1 - model.save_pretrained.report["ratio_stored"])
        lost = [nats_per_token(model, rows) - nats for rows, nats in zip(texts, dense, strict=True)]
        print(f"| {recipe} | {bits_per_weight:.3f} |", " | ".join(f"{nats:.4f}" for nats in lost), "|", flush=True)


if __name__ == "__main__":
    main()
