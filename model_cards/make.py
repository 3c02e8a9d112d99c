"""Make the example cards in this folder from real runs: compress by each system, reload, measure, write the card.

    python model_cards/make.py MODEL --calibration FILE --text FILE...

MODEL is a folder or an id on the Hub. The checkpoints stay in the work folder and are not made again if they are
there.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowrank import CompressionConfig, compress, evaluate
from hf_lowrank.publishing.measurements import text_quality
from hf_lowrank.publishing.model_card import record

RECIPES = {"sola": 0.3, "soco": 0.3, "slab": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the example model cards from real runs.")
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text file or dataset to calibrate on")
    parser.add_argument("--text", nargs="+", required=True, help="text files or datasets to measure on")
    parser.add_argument("--window", type=int, default=256, help="tokens per window, in calibration and measurement")
    parser.add_argument("--windows", type=int, help="measure on the first so many windows of each text; default: all")
    parser.add_argument("--work", type=Path, default=Path("out/model_cards"), help="where the checkpoints go")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    for method, ratio in RECIPES.items():
        folder = arguments.work / f"{Path(arguments.model).name}-{method}-{round(100 * ratio)}"
        if not (folder / "config.json").is_file():
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
            config = CompressionConfig(
                method=method, ratio=ratio, calibration=arguments.calibration, sequence_length=arguments.window
            )
            compress(model, config, tokenizer=tokenizer).save_pretrained(folder)
        compressed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        quality = []
        for text in arguments.text:
            measured = evaluate(
                compressed, tokenizer, text, window=arguments.window, max_windows=arguments.windows, reference=dense
            )  # fmt: skip
            quality += text_quality(measured.to_dict())
            print(
                f"{folder.name}, {text}: perplexity {measured.perplexity:.4g}, {measured.nats_lost:.4f} nats lost",
                flush=True,
            )
        record(folder, quality=quality, command=shlex.join(["python", *sys.argv]))
        shutil.copyfile(folder / "README.md", Path(__file__).parent / f"{folder.name}.md")


if __name__ == "__main__":
    main()
