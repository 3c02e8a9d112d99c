"""Makes the table of exports in docs/serving.md: sizes of exported files, and times of what computes from them.

`python benchmarks/exports.py` needs onnxscript and onnxruntime. It takes a minute, on one thread. The clock is the
thread's own, which other processes on a shared machine do not disturb.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import CompressionConfig, compress

RECIPES = {
    "dense": None,
    "`svd`, ratio 0.5": CompressionConfig("svd", 0.5),
    "`slab`, ratio 0.5": CompressionConfig("slab", 0.5),
    "`gptq`, 4 bits": CompressionConfig("gptq", 0.86),
}
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12}
VOCABULARY = 512
REPEATS = 7


class Logits(nn.Module):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def milliseconds(compute: Callable[[], object]) -> float:
    """Return the least of some times, after one call that is not timed."""
    compute()
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        compute()
        times.append(time.thread_time() - start)
    return min(times) * 1e3


def row(name: str, config: CompressionConfig | None, folder: Path) -> str:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZES)).eval()
    if config is not None:
        compress(model, config, calibration=torch.randint(VOCABULARY, (4, 64)).tolist(), progress=False)
    logits, input_ids = Logits(model), torch.randint(VOCABULARY, (1, 16))
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}}
    program = torch.export.export(logits, (input_ids,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, folder / "model.pt2")
    torch.onnx.export(program, (), folder / "model.onnx", dynamo=True, external_data=False, verbose=False)
    opened = torch.export.load(folder / "model.pt2").module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    inputs = {"input_ids": input_ids.numpy()}
    with torch.no_grad():
        times = [
            milliseconds(lambda: logits(input_ids)),
            milliseconds(lambda: opened(input_ids)),
            milliseconds(lambda: session.run(None, inputs)),
        ]
    sizes = [(folder / file).stat().st_size / 1e6 for file in ("model.pt2", "model.onnx")]
    cells = [name, *(f"{size:.0f} MB" for size in sizes), *(f"{value:.0f} ms" for value in times)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| | `.pt2` | `.onnx` | in Transformers | loaded `.pt2` | ONNX Runtime |\n|---|---|---|---|---|---|")
    for name, config in RECIPES.items():
        with TemporaryDirectory() as folder:
            print(row(name, config, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
