"""How much of what compression lost distillation gives back: python benchmarks/distillation.py MODEL --help."""

import argparse
import tempfile
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments

from hf_lowrank import CompressionConfig, DistillationTrainer, compress
from hf_lowrank.calibration.texts import read_documents, token_stream, windows
from hf_lowrank.training.distillation import Windows

BATCH = 16


@torch.no_grad()
def nats_per_token(model: PreTrainedModel, rows: Tensor) -> float:
    """Mean cross-entropy of the next token over windows (rows, length)."""
    model.eval()
    losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in rows.split(BATCH)]
    return sum(losses) / len(rows)


def sizes(arguments: argparse.Namespace) -> Iterator[tuple[str, float]]:
    for recipe in arguments.recipes:
        method, ratio = recipe.split(",")
        yield method, float(ratio)


def main() -> None:
    """Print one row per recipe."""
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
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train = windows(token_stream(tokenizer, read_documents(arguments.train)), arguments.length)
    texts = [
        windows(token_stream(tokenizer, read_documents(text)), arguments.length)[: arguments.windows]
        for text in arguments.text
    ]
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    dense = [nats_per_token(teacher, rows) for rows in texts]
    heads = " | ".join(f"{text}: lost | after training | recovered" for text in arguments.text)
    print(f"| method | removed | {heads} | training seconds |\n|" + "---|" * (3 + 3 * len(texts)), flush=True)
    for method, ratio in sizes(arguments):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        config = CompressionConfig(
            method=method, ratio=ratio, calibration=arguments.train, sequence_length=arguments.length
        )
        compress(model, config, tokenizer)
        before = [nats_per_token(model, rows) - each for rows, each in zip(texts, dense, strict=True)]
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
                model, settings, train_dataset=Windows(train), teacher_model=teacher, lm_weight=arguments.lm_weight
            )
            start = time.monotonic()
            trainer.train()
            seconds = time.monotonic() - start
        after = [nats_per_token(model, rows) - each for rows, each in zip(texts, dense, strict=True)]
        cells = " | ".join(f"{b:.3f} | {a:.3f} | {(b - a) / b:.0%}" for b, a in zip(before, after, strict=True))
        print(f"| {method} | {ratio:.0%} | {cells} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
