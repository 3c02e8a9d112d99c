"""Measure what a model loses on some texts, by the text that its compression was calibrated on.

    python -m benchmarks.calibration_text.measure MODEL --methods slab=0.5 auto=0.78125 --calibrations bundled self
        c4=C4.txt --texts A.txt B.txt --samples 64 --length 256 --windows 100 --out RESULTS.jsonl

A calibration is a name that `hf-lowrank compress --calibration` knows, or NAME=FILE. What RESULTS.jsonl holds already
is not measured again. The table of all that it holds is printed as Markdown.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.evaluation.perplexity import evaluate
from hf_lowrank.models.loading import load_model, load_tokenizer


def losses(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the loss of a model on every text, in nats per token."""
    found = {}
    for text in arguments.texts:
        result = evaluate(model, tokenizer, text, window=arguments.length, max_windows=arguments.windows)
        found[f"{Path(text).parent.name}/{Path(text).name}".lstrip("/")] = result.nll
    return found


def measured(arguments: argparse.Namespace, method: str, ratio: float, source: str, seed: int) -> dict[str, Any]:
    """Compress the model as asked, and return its losses and the seconds that the compression took."""
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, "auto")
    start = time.process_time()
    if ratio:
        config = CompressionConfig(
            method=method,
            ratio=ratio,
            calibration=source,
            samples=arguments.samples,
            sequence_length=arguments.length,
            seed=seed,
        )
        compress(model, config, tokenizer, progress=False)
    seconds = time.process_time() - start
    return {"seconds": seconds, "losses": losses(model.float(), tokenizer, arguments)}


def table(records: list[dict[str, Any]]) -> str:
    """Return the nats lost by method and calibration, averaged over the seeds."""
    dense = next(record for record in records if record["method"] == "dense")["losses"]
    rows = [["method", "removed", "calibration", *dense, "core-s"]]
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["method"] != "dense":
            groups.setdefault((record["method"], record["ratio"], record["calibration"]), []).append(record)
    for (method, ratio, calibration), group in groups.items():
        means = [sum(record["losses"][text] for record in group) / len(group) - dense[text] for text in dense]
        seconds = sum(record["seconds"] for record in group) / len(group)
        rows.append([method, f"{ratio:.2%}", calibration, *(f"{mean:.4f}" for mean in means), f"{seconds:.0f}"])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--methods", nargs="+", required=True, help="as METHOD=RATIO")
    parser.add_argument("--calibrations", nargs="+", required=True, help="as NAME or NAME=FILE")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens of a sequence and of a window")
    parser.add_argument("--windows", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds; the table has the mean")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    runs = [("dense", 0.0, "", "", 0)]
    for method in arguments.methods:
        name, _, ratio = method.partition("=")
        for calibration in arguments.calibrations:
            label, _, source = calibration.partition("=")
            runs += [(name, float(ratio), label, source or label, seed) for seed in range(arguments.seeds)]
    for method, ratio, label, source, seed in runs:
        run = {"method": method, "ratio": ratio, "calibration": label, "seed": seed}
        if not any(run.items() <= record.items() for record in records):
            records.append(run | measured(arguments, method, ratio, source, seed))
            arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(table(records))


if __name__ == "__main__":
    main()
