"""Measures what compressed embeddings lose by themselves: the blocks stay dense.

`python benchmarks/embeddings.py MODEL TEXT [--windows 12] [--window 512]`

MODEL is a folder or a name on the Hub, TEXT a file or a dataset. It prints a table of nats lost per token and KL, in
float32, at 8, 6 and 4 bits a value.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowrank import evaluate
from hf_lowrank.compression.embeddings import compress_embeddings

BITS = (8, 6, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--window", type=int, default=512)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
    print("| bits of a value | nats lost | KL | top-1 |")
    print("|---|---|---|---|")
    for bits in BITS:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
        compress_embeddings(model, bits)
        measured = evaluate(
            model, tokenizer, arguments.text, window=arguments.window, max_windows=arguments.windows, reference=dense
        )
        figures = f"{measured.nats_lost:.4f} | {measured.kl:.5f} | {measured.top1_agreement:.1%}"
        print(f"| {bits} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
