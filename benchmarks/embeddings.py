"""Measures what compressed embeddings lose by themselves: the blocks stay dense.

`python benchmarks/embeddings.py MODEL TEXT [--windows 12] [--window 512] [--bits 8 6 4]`

MODEL is a folder or a name on the Hub, TEXT a file or a dataset. The rows that the head multiplies by are rounded to
suit what it reads in the bundled calibration text, as `compress` does. It prints a table of nats lost per token and
KL, in float32.
"""

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_lowrank import CompressionConfig, evaluate
from hf_lowrank.calibration import calibration_batches
from hf_lowrank.compression.embeddings import compress_embeddings
from hf_lowrank.methods.second_order import shrunk

SEQUENCES = 48
"""Number of calibration sequences of 512 tokens."""


@torch.no_grad()
def head_gram(model: PreTrainedModel, tokenizer: object) -> Tensor:
    """Return the Gram matrix of what the head reads, shrunk as `compress` does it."""
    head = model.get_output_embeddings()
    gram = torch.zeros(head.weight.shape[1], head.weight.shape[1], dtype=torch.float64)

    def add(module: object, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, 1)
        gram.add_((x.T @ x).double())

    handle = head.register_forward_pre_hook(add)
    batches = calibration_batches(model, CompressionConfig(samples=SEQUENCES, sequence_length=512), tokenizer)
    for batch in batches:
        for row in batch.input_ids:
            model(row[None])
    handle.remove()
    return shrunk(gram, sum(batch.tokens for batch in batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
    gram = head_gram(dense, tokenizer)
    print("| bits of a value | nats lost | KL | top-1 |")
    print("|---|---|---|---|")
    for bits in arguments.bits:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
        compress_embeddings(model, bits, head_gram=gram)
        measured = evaluate(
            model, tokenizer, arguments.text, window=arguments.window, max_windows=arguments.windows, reference=dense
        )
        figures = f"{measured.nats_lost:.4f} | {measured.kl:.5f} | {measured.top1_agreement:.1%}"
        print(f"| {bits} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
