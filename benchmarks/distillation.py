"""Measures how much of the loss by compression is recovered by distillation.

`python benchmarks/distillation.py MODEL --help` lists the options.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments

from hf_lowrank import CompressionConfig, DistillationTrainer, compress
from hf_lowrank.calibration.texts import read_documents, token_stream, windows
from hf_lowrank.training.distillation import Windows

BATCH = 16


@torch.no_grad()
def nats_per_token(model: PreTrainedModel, rows: Tensor) -> float:
    """Return the mean cross-entropy of the next token over windows (rows, length)."""
    model.eval()
    total = 0.0
    for batch in rows.split(BATCH):
        total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
    return total / len(rows)


def evaluate(model: PreTrainedModel, texts: Sequence[Tensor]) -> list[float]:
    """Return the nats per token of a model on each text."""
    return [nats_per_token(model, rows) for rows in texts]


def lost(model: PreTrainedModel, texts: Sequence[Tensor], dense: Sequence[float]) -> list[float]:
    """Return by how many nats per token a model is worse than the dense one on each text."""
    return [own - reference for own, reference in zip(evaluate(model, texts), dense, strict=True)]


def train(model: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor, arguments: argparse.Namespace) -> float:
    """Train a compressed model towards the teacher, and return the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 20,
            logging_steps=arguments.steps,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        trainer = DistillationTrainer(
            model, settings, train_dataset=Windows(rows), teacher_model=teacher, lm_weight=arguments.lm_weight
        )
        start = time.monotonic()
        trainer.train()
        return time.monotonic() - start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a dense model")
    parser.add_argument("recipes", nargs="+", metavar="METHOD,RATIO", help="for example slab,0.5")
    parser.add_argument("--train", required=True, help="text to calibrate and to train on")
    parser.add_argument("--text", nargs="+", required=True, help="texts to evaluate on")
    parser.add_argument("--length", type=int, required=True, help="tokens per window")
    parser.add_argument("--windows", type=int, default=200, help="windows per evaluation text")
    parser.add_argument("--steps", type=int, default=200, help="training steps of 16 windows")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--lm-weight", type=float, default=0.0, help="weight of the labels beside the teacher")
    return parser.parse_args()


def main() -> None:
    """Print one row per recipe."""
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def read_windows(text: str) -> Tensor:
        return windows(token_stream(tokenizer, read_documents(text)), arguments.length)

    training_rows = read_windows(arguments.train)
    texts = [read_windows(text)[: arguments.windows] for text in arguments.text]
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    dense = evaluate(teacher, texts)
    heads = " | ".join(f"{text}: lost | after training | recovered" for text in arguments.text)
    print(f"| method | removed | {heads} | training seconds |\n|" + "---|" * (3 + 3 * len(texts)), flush=True)
    for recipe in arguments.recipes:
        method, ratio = recipe.split(",")
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        config = CompressionConfig(
            method=method, ratio=float(ratio), calibration=arguments.train, sequence_length=arguments.length
        )
        compress(model, config, tokenizer)
        lost_before = lost(model, texts, dense)
        seconds = train(model, teacher, training_rows, arguments)
        cells = []
        for before, after in zip(lost_before, lost(model, texts, dense), strict=True):
            cells.append(f"{before:.3f} | {after:.3f} | {(before - after) / before:.0%}")
        print(f"| {method} | {float(ratio):.0%} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
